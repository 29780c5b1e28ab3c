"""Compiling once: across processes warm where nothing changed, cold where our sources or options did; within one, again
only where PyTorch itself would."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir

import cce_inductor
from cce_inductor.version import hash_files, templates_dir

SCRIPT = Path(__file__).with_name("train_once.py")


def train(cache, package=None, **options):
    """Runs the script in a process of its own; gives what it printed."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    if package is not None:
        env["PYTHONPATH"] = str(package)
    command = [sys.executable, str(SCRIPT), json.dumps(options)]
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


@pytest.fixture
def copied_package(tmp_path):
    """The package and its templates at another place, to be edited by a test."""
    target = tmp_path / "site"
    shutil.copytree(Path(cce_inductor.__file__).parent, target / "cce_inductor")
    shutil.copytree(templates_dir(), target / "cce_inductor" / "templates", dirs_exist_ok=True)
    return target


def test_second_process_is_warm_and_an_edit_is_not(copied_package):
    """In the cache of all tests, which knows what instructions the CPU has. No sources were compiled there yet that are
    these: one of them has a comment that nobody wrote before."""
    cache = cache_dir()
    with (copied_package / "cce_inductor" / "version.py").open("a") as source:
        source.write(f"# {uuid.uuid4()}\n")
    cold = train(cache, copied_package)
    assert cold["cce"]["fused"] == 1 and cold["aot"]["autograd_cache_miss"] == 1

    warm = train(cache, copied_package)
    assert warm["aot"].get("autograd_cache_hit") == 1 and "autograd_cache_miss" not in warm["aot"]
    assert warm["inductor"]["fxgraph_cache_hit"] == 2 and "fxgraph_cache_miss" not in warm["inductor"]
    assert warm["loss"] == cold["loss"]
    # The record does not depend on the cache: counters and the lazy logits are there on a hit as well.
    assert warm["cce"] == cold["cce"] == {"fused": 1, "declined": 0, "deferred": 1}
    assert warm["lazy"] == "DeferredLogits"

    # Edited source, here every log-sum-exp 3 larger: the cached code was generated from another one and must not run.
    template = copied_package / "cce_inductor" / "templates" / "row_statistics.cpp.jinja"
    line = "whole = log + shift(maximum);"
    assert template.read_text().count(line) == 1
    template.write_text(template.read_text().replace(line, line.replace(";", " + 3.0;")))
    edited = train(cache, copied_package)
    assert edited["aot"].get("autograd_cache_miss") == 1 and edited["inductor"]["fxgraph_cache_miss"] >= 1
    assert abs(edited["loss"] - cold["loss"] - 3) < 1e-5


@pytest.mark.slow
def test_another_option_that_a_lowering_reads_is_not_warm(tmp_path):
    """It is an argument of the operator: another value is another graph."""
    cold, other = train(tmp_path / "cache"), train(tmp_path / "cache", workspace_mb=1)
    assert cold["aot"]["autograd_cache_miss"] == other["aot"].get("autograd_cache_miss") == 1


@pytest.mark.slow
def test_dynamic_rows_are_warm_for_other_numbers_of_rows(tmp_path):
    cold = train(tmp_path / "cache", dynamic=True)
    warm = train(tmp_path / "cache", dynamic=True, rows=40)
    assert cold["aot"]["autograd_cache_miss"] == 1 and cold["inductor"]["fxgraph_cache_miss"] == 2
    assert warm["aot"].get("autograd_cache_hit") == 1 and "fxgraph_cache_miss" not in warm["inductor"]
    assert warm["cce"] == cold["cce"] and warm["error"] < 1e-5


@pytest.mark.slow
def test_numbers_of_a_filter_are_left_by_a_warm_graph_too(tmp_path):
    cold, warm = (train(tmp_path / "cache", grad_filter=0.1, diagnostics=True) for _ in range(2))
    assert warm["aot"].get("autograd_cache_hit") == 1 and cold["aot"]["autograd_cache_miss"] == 1
    (numbers,) = warm["numbers"]
    assert numbers["filter"] == "budget 0.1" and numbers["backwards"] == numbers["blocks"] == 1
    assert warm["numbers"] == cold["numbers"]


def test_hash_sees_names_and_contents(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "k.cpp.jinja").write_text("{}")
    (tmp_path / "notes.txt").write_text("not a source")
    first = hash_files(tmp_path)
    (tmp_path / "notes.txt").write_text("still none")
    assert hash_files(tmp_path) == first
    (tmp_path / "k.cpp.jinja").write_text("{ }")
    second = hash_files(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    third = hash_files(tmp_path)
    (tmp_path / "b.py").write_text("x = 2\n")
    assert len({first, second, third, hash_files(tmp_path)}) == 4


V, D = 96, 16


def shifted(h, w, t):
    """What Hugging Face's models end with: labels shifted, the logits returned."""
    z = F.linear(h, w)
    labels = F.pad(t, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(z.float().view(-1, V), labels.view(-1)), z


def batch(rows, length):
    return torch.randn(rows, length, D).requires_grad_(), torch.randint(0, V, (rows, length))


def compiled(fn, compiler, **kwargs):
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(fn, backend="cce", options={"min_vocab": 0, "compiler": compiler}, **kwargs)


def assert_same_step(fn, h, w, t):
    loss, _ = fn(h, w, t)
    want, _ = shifted(h, w, t)
    torch.testing.assert_close(loss, want)
    for got, expected in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(want, (h, w)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_marked_batch_and_sequence_lengths_compile_once(compiler):
    step, w = compiled(shifted, compiler), torch.randn(V, D).requires_grad_()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, length in ((2, 6), (3, 9), (5, 4), (130, 3)):
            h, t = batch(rows, length)
            for x in (h, t):
                torch._dynamo.mark_dynamic(x, 0)
                torch._dynamo.mark_dynamic(x, 1)
            assert_same_step(step, h, w, t)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["cce_inductor"]["fused"] == 1 and counters["cce_inductor"]["deferred_materialized"] == 0


def test_lengths_that_change_compile_as_often_as_without_the_pass():
    """Automatic dynamic shapes: a size that changes becomes symbolic, and then no more compilations."""
    w = torch.randn(V, D).requires_grad_()
    batches = [batch(rows, length) for rows, length in ((2, 6), (3, 6), (4, 6), (4, 7), (5, 8), (9, 3))]

    def graphs(step):
        number = []
        for h, t in batches:
            assert_same_step(step, h, w, t)
            number.append(counters["stats"]["unique_graphs"])
        return number

    plain = compiled(shifted, "aot_eager")
    ours = graphs(plain)
    torch._dynamo.reset()
    counters.clear()
    assert ours == graphs(torch.compile(shifted, backend="aot_eager"))
    assert ours[-1] == ours[-3] <= 3


def test_training_does_not_compile_again():
    """Other data, more or fewer ignored labels, new weights, logits that are read, evaluation in between."""
    torch.manual_seed(0)
    embedding, trunk = torch.nn.Embedding(V, D), torch.nn.Linear(D, D)
    parameters = [*embedding.parameters(), *trunk.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def model(ids, labels):
        return shifted(torch.tanh(trunk(embedding(ids))), embedding.weight, labels)

    step = compiled(model, "aot_eager")
    losses = []

    def train(ignored):
        ids = torch.randint(0, V, (4, 12))
        labels = ids.clone()
        labels[:, :ignored] = -100
        loss, logits = step(ids, labels)
        if ignored % 2:
            losses.append((logits.detach() + 0).argmax(-1).eq(ids).float().mean().item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()

    def evaluate():
        ids = torch.randint(0, V, (4, 12))
        with torch.no_grad():
            assert step(ids, ids)[0].isfinite()

    train(0), evaluate()
    before = dict(counters["stats"])
    assert before["unique_graphs"] == 2  # with gradients and without
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ignored in (3, 12, 0, 5, 1):
            train(ignored), evaluate()
    assert counters["stats"]["unique_graphs"] == 2 and counters["cce_inductor"]["fused"] == 2
    assert counters["cce_inductor"]["deferred_materialized"] == len(losses) == 3
