"""explain, doctor, dumps, logs, traces."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import cce_inductor
from cce_inductor import config, doctor, record, report

SCRIPT = """
import torch, torch.nn.functional as F
def fn(h, w, t):
    good = F.cross_entropy(F.linear(h, w), t)
    return good + F.cross_entropy(F.linear(h, w).relu(), t)
h, w, t = torch.randn(6, 8), torch.randn(40, 8), torch.randint(0, 40, (6,))
print("loss", torch.compile(fn, BACKEND)(h, w, t).item())
"""


def rand(*shape):
    return torch.randn(*shape).requires_grad_()


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    torch._dynamo.reset()
    return rand(2, 6, 8), rand(5000, 8), torch.randint(0, 5000, (2, 6))


def returning(h, w, t):
    z = F.linear(h, w)
    return F.cross_entropy(z.view(-1, 5000), t.view(-1)), z


def run(tmp_path, arguments=(), backend="", **environment):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("BACKEND", backend or "backend='inductor'"))
    env = {**os.environ, "CCE_INDUCTOR_MIN_VOCAB": "0", "CCE_INDUCTOR_COMPILER": "aot_eager", **environment}
    command = [sys.executable, *arguments, str(script)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=600)


def test_explain_reports_every_site(inputs):
    before = dict(counters["cce_inductor"])
    report = cce_inductor.explain(returning, *inputs)
    (site,) = report.sites
    assert site.fused and site.reason == "" and report.deferred == 1
    assert (site.rows, site.vocab, site.width) == ("12", "5000", "8")
    assert site.logits_bytes == 12 * 5000 * 4
    assert "test_debugging.py" in site.location
    assert site.source == "return F.cross_entropy(z.view(-1, 5000), t.view(-1)), z"
    text = str(report)
    assert "1 fused, 0 declined" in text and "1 output(s) deferred" in text
    assert "scratch: workspace_mb=64, the default on CPUs, and" in text
    assert dict(counters["cce_inductor"]) == before  # looking changes nothing


def test_the_report_has_the_options_that_a_loss_was_compiled_with(inputs):
    options = {"compiler": "aot_eager", "workspace_mb": 32, "grad_filter": 0.02}
    with record.collect() as graphs:
        torch.compile(returning, backend="cce", options=options)(*inputs)
    text = str(made := report.of(graphs))
    (site,) = made.sites
    assert site.workspace_mb == 32 and "workspace_mb=32, and" in text
    assert "grad_filter: budget 0.02" in text


def test_the_report_says_how_much_auto_is(inputs):
    with cce_inductor.config.patch(workspace_mb="auto"):
        text = str(cce_inductor.explain(returning, *inputs))
    assert "workspace_mb=auto, as much as the logits: at most 0.2 MiB, and" in text


def test_a_loss_without_a_name_is_dumped_and_reported(tmp_path, inputs):
    def fn(h, w, t):
        return F.multi_margin_loss(F.linear(h, w).flatten(0, -2), t.flatten().clamp(min=0))

    with config.patch(dump_dir=tmp_path):
        torch.compile(fn, backend="cce", options={"compiler": "aot_eager"})(*inputs)
    (folder,) = (tmp_path / "cce_inductor").iterdir()
    (site,) = json.loads((folder / "sites.json").read_text())
    assert not site["fused"] and site["loss"].endswith("multi_margin_loss") and "test_debugging.py" in site["location"]
    torch._dynamo.reset()
    text = str(cce_inductor.explain(fn, *inputs))
    assert "0 fused, 1 declined" in text and "F.multi_margin_loss(F.linear(h, w)" in text


def test_explain_of_logits_whose_loss_comes_later(inputs):
    text = str(cce_inductor.explain(lambda h, w, t: F.linear(h, w), *inputs))
    assert "Logits were deferred" in text


def test_explain_prints_a_table(monkeypatch):
    """Where, how large, what is saved, what became of it; below, the lines of code and what to change."""
    monkeypatch.chdir(os.path.dirname(__file__))
    h, w, t = rand(512, 8), rand(5000, 8), torch.randint(0, 5000, (512,))

    def fn(h, w, t):
        z = F.linear(h, w)
        capped = F.relu(F.linear(h, w))
        return F.cross_entropy(z, t) + F.cross_entropy(capped, t)

    first = fn.__code__.co_firstlineno
    torch._dynamo.reset()
    with config.patch(compiler="aot_eager"):
        lines = str(cce_inductor.explain(fn, h, w, t)).splitlines()
    cells = [re.split(r"  +", line) for line in lines[2:6]]
    assert cells[0] == ["#", "place", "loss", "N × V", "D", "logits"]
    place = f"test_debugging.py:{first + 3}"
    # One tensor of logits: 512 * 5000 * 4 bytes.
    assert cells[2] == ["1", place, "cross_entropy", "512 × 5000", "8", "9.8 MiB saved", "fused: eager implementation"]
    assert cells[3][:6] == ["2", place, "cross_entropy", "512 × 5000", "8", "9.8 MiB held"]
    assert cells[3][6].startswith("declined: ") and "relu" in cells[3][6]
    below = "\n".join(lines[6:])
    assert f"2. {place}: return F.cross_entropy(z, t) + F.cross_entropy(capped, t)" in below
    assert f"because of %capped in test_debugging.py:{first + 2}: capped = F.relu(F.linear(h, w))" in below
    assert "to fuse it, " in below


def test_explain_of_symbolic_sizes(inputs):
    h, w, t = inputs
    torch._dynamo.mark_dynamic(h, 0)
    torch._dynamo.mark_dynamic(t, 0)
    report = cce_inductor.explain(returning, h, w, t)
    assert report.sites[0].fused and report.sites[0].logits_bytes is None
    assert "MiB" not in str(report) and "× 5000" in str(report)


def test_explain_of_a_compiled_function_and_of_a_module(inputs):
    h, _, t = inputs

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(8, 5000)

        def forward(self, h, t):
            return returning(h, self.head.weight, t)

    assert cce_inductor.explain(torch.compile(returning), *inputs).sites[0].fused
    assert cce_inductor.explain(torch.compile(Model()), h, t).sites[0].fused
    assert cce_inductor.explain(Model(), h, t=t).sites[0].fused


def test_explain_without_a_loss():
    report = cce_inductor.explain(torch.sin, torch.ones(3))
    assert report.sites == [] and "No loss over a vocabulary" in str(report)


def test_dump_dir(tmp_path, inputs):
    with config.patch(dump_dir=tmp_path):
        torch.compile(returning, backend="cce", options={"compiler": "aot_eager"})(*inputs)
    (folder,) = (tmp_path / "cce_inductor").iterdir()
    before, after = (folder / "before.py").read_text(), (folder / "after.py").read_text()
    assert "cross_entropy" in before and "linear_statistics" not in before
    code = [line for line in after.splitlines() if not line.strip().startswith("#")]
    assert any("linear_statistics" in line for line in code) and not any("cross_entropy(" in line for line in code)
    (site,) = json.loads((folder / "sites.json").read_text())
    assert site["fused"] and site["vocab"] == "5000"


def test_dump_dir_has_the_rendered_kernels(tmp_path, inputs):
    with config.patch(dump_dir=tmp_path):
        options = {"fx_graph_cache": False, "gradients_in_forward": False}
        loss, _ = torch.compile(returning, backend="cce", options=options)(*inputs)
        loss.backward()
    (folder,) = (tmp_path / "cce_inductor").iterdir()
    for name in ("linear_statistics.cpp", "linear_statistics_backward.cpp"):
        assert "at::parallel_for" in (folder / name).read_text()


def test_debug_folder_structured_trace_and_log_of_pytorch(tmp_path):
    trace = tmp_path / "trace"
    debug = {"TORCH_COMPILE_DEBUG": "1", "TORCH_COMPILE_DEBUG_DIR": str(tmp_path)}
    out = run(tmp_path, backend="backend='cce'", TORCH_TRACE=str(trace), TORCH_LOGS="+cce_inductor", **debug)
    found = list(tmp_path.glob("torch_compile_debug/run_*/cce_inductor/graph_0_pid_*/after.py"))
    assert len(found) == 1 and "linear_statistics" in found[0].read_text()
    assert "fused: torch.nn.functional.cross_entropy at " in out.stderr and "declined: " in out.stderr
    assert "relu" in out.stderr and "train.py:5" in out.stderr
    text = "\n".join(p.read_text() for p in trace.iterdir())
    assert all(f'"cce_inductor_{name}"' in text for name in ("before.py", "after.py", "sites.json"))


def test_declined_losses_are_quiet_without_the_log_switched_on(tmp_path):
    """A loss that is left as it was is nothing to worry a user who did not ask."""
    out = run(tmp_path, backend="backend='cce'")
    assert "loss" in out.stdout and "declined" not in out.stderr


def test_explain_command(tmp_path):
    out = run(tmp_path, arguments=("-m", "cce_inductor", "explain"))
    assert "loss" in out.stdout
    assert "1 graph(s), 2 loss(es) over a vocabulary: 1 fused, 1 declined" in out.stdout
    assert "\n1  train.py:4  cross_entropy" in out.stdout


@pytest.mark.parametrize("before, behind", [(["--html", "a.html"], ["--x"]), ([], ["--x", "--html=a.html", "-h"])])
@pytest.mark.slow
def test_explain_command_writes_a_page(tmp_path, before, behind):
    """Wherever the option stands; what is not ours goes to the script."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys; print('given', sys.argv[1:])\n" + SCRIPT.replace(", BACKEND", "") + "os.chdir('/')"
    )
    command = [sys.executable, "-m", "cce_inductor", "explain", *before, str(script), *behind]
    env = {**os.environ, "CCE_INDUCTOR_MIN_VOCAB": "0", "CCE_INDUCTOR_COMPILER": "eager"}
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=600)
    assert f"given {[word for word in behind if 'html' not in word]}" in out.stdout
    assert f"{tmp_path / 'a.html'} written" in out.stdout
    assert "2 loss(es) over a vocabulary" in (tmp_path / "a.html").read_text()


def test_doctor_says_what_is_in_force():
    text = doctor.report()
    for word in (torch.__version__, "triton", "min_vocab", "compile cache", "threads", 'backend="cce"'):
        assert word in text
    assert "does not use cce_inductor" in text
    cce_inductor.enable()
    try:
        assert "plain torch.compile        uses cce_inductor" in doctor.report()
    finally:
        cce_inductor.disable()
