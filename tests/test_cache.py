"""Compile caches across processes: warm where nothing changed, cold where our sources or options did."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_second_process_is_warm_and_an_edit_is_not(tmp_path, copied_package):
    cache = tmp_path / "cache"
    cold = train(cache, copied_package)
    assert cold["cce"]["fused"] == 1 and cold["aot"]["autograd_cache_miss"] == 1

    warm = train(cache, copied_package)
    assert warm["aot"].get("autograd_cache_hit") == 1 and "autograd_cache_miss" not in warm["aot"]
    assert warm["inductor"]["fxgraph_cache_hit"] == 2 and "fxgraph_cache_miss" not in warm["inductor"]
    assert warm["loss"] == cold["loss"]
    # The record does not depend on the cache: counters and the lazy logits are there on a hit as well.
    assert warm["cce"] == cold["cce"] == {"fused": 1, "declined": 0, "deferred": 1}
    assert warm["lazy"] == "DeferredLogits"

    # An option that a lowering reads is an argument of the operator: another value is another graph.
    assert train(cache, copied_package, workspace_mb=1)["aot"].get("autograd_cache_miss") == 1

    # Edited source: the cached code was generated from another one and must not run.
    source = copied_package / "cce_inductor" / "ops" / "reference.py"
    source.write_text(source.read_text() + "\n# edited\n")
    edited = train(cache, copied_package)
    assert edited["aot"].get("autograd_cache_miss") == 1 and edited["inductor"]["fxgraph_cache_miss"] >= 1


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
    assert len({first, second, hash_files(tmp_path)}) == 3
