"""What only a GPU can show: the kernels run, right, within their memory, in CUDA graphs, and train.

`make gpu-check`. CCE_GPU_STEPS: length of the training runs [1500].
"""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from budget_oracle import check_budget
from device import DEVICE, train
from gpu_cases import CASES, named
from head_oracle import check_error_rule, error
from torch._dynamo.utils import counters

import cce_inductor
from cce_inductor.lowering.schedules import STEP, Schedule
from cce_inductor.lowering.triton_configs import TABLE, configurations
from cce_inductor.ops.call import Attributes
from cce_inductor.ops.library import FORWARD
from cce_inductor.version import source_hash

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS = int(os.environ.get("CCE_GPU_STEPS", "1500"))
HERE = Path(__file__).parent
MIB = 1 << 20


@pytest.fixture(autouse=True)
def fresh():
    """No kernel from another test: schedules are chosen by patches that no cache key knows."""
    torch._dynamo.reset()
    counters.clear()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


def compiled(function, **options):
    return torch.compile(function, backend=cce_inductor.cce_backend, options={"min_vocab": 0, **options})


@contextlib.contextmanager
def only(sweeps, vocab: int):
    """The backward in one schedule, in regions larger than the interpreter's; without sweeps, in any."""
    whole = -(-vocab // STEP) * STEP
    larger = [dataclasses.replace(s, rows=s.rows * 16, columns=min(s.columns * 8, whole)) for s in sweeps]
    if not larger or DEVICE == "cpu":
        yield
        return
    with patch("cce_inductor.lowering.cuda_backward.schedules", return_value=[Schedule("chosen", tuple(larger))]):
        yield


def same(a, b):
    """In every bit, NaN included."""
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.budget])
def test_kernels_obey_the_error_rule(name):
    """The interpreter's cases, larger, in the configurations and schedules that the autotuner finds best."""
    case = CASES[name]
    rows, odd = (1, 0) if case.n == 1 else (case.n * 16 - 5, 0 if case.transposed else 3)
    case = dataclasses.replace(case, n=rows, d=case.d * 8, v=case.v * 16 + odd)
    *leaves, t = data = case.data(DEVICE)
    # 1 MiB: slabs are several.
    function = compiled(case.function(), workspace_mb=64 if case.early else 1, gradients_in_forward=case.early)
    inputs = [tensor.detach().requires_grad_() for tensor in leaves]
    for tensor in (inputs[0], t) if case.dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 0)
    with only(case.sweeps, case.v):
        value = function(*inputs, t)
        gradients = torch.autograd.grad(value, inputs, torch.ones_like(value))
    again = torch.autograd.grad(function(*inputs, t), inputs, torch.ones_like(value))
    exact = case.eager(data, torch.float64)
    check_error_rule(name, named(value.detach(), gradients), case.eager(data, case.dtype), exact, case.compute)
    assert all(same(a, b) for a, b in zip(gradients, again, strict=True)), "not deterministic"


@pytest.mark.parametrize(
    "name", ["", ", bfloat16", ", float16", ", tangents of both signs", ", a row that loses too much"]
)
def test_a_budget_drops_what_it_may_and_nothing_else(name):
    case = dataclasses.replace(CASES[f"budget{name}"], n=700, d=320, v=5000)
    data = case.data()
    attributes = Attributes(grad_filter=f"budget {case.budget!r}", workspace=4 * MIB, version=source_hash()).args()

    def step(x, w, b, t, g):
        names = "input weight bias target", t >= 0, "lse target_logit"
        lse, target_logit, bound = FORWARD([x, w, b, t], *names, True, *attributes)
        return ((lse - target_logit) * g).sum(), lse, target_logit, bound

    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in data[:3]]
    rest = [data[3].to(DEVICE), case.tangent(data[3]).to(DEVICE)]
    function = torch.compile(step, backend=cce_inductor.cce_backend)
    runs = []
    for _ in range(2):
        out = function(*leaves, *rest)
        runs.append([*(t.detach().cpu() for t in out), *(t.cpu() for t in torch.autograd.grad(out[0], leaves))])
    check_budget(case, data, runs[0][:4], named(runs[0][0], runs[0][4:]))
    assert all(same(a, b) for a, b in zip(*runs, strict=True)), "not deterministic"


def head(n: int, d: int, v: int, dtype=torch.bfloat16) -> list[torch.Tensor]:
    """x, w, t on the device."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(n, d, dtype=dtype, device=DEVICE, generator=generator).requires_grad_()
    w = torch.empty(v, d, dtype=dtype, device=DEVICE).normal_(std=d**-0.5, generator=generator).requires_grad_()
    return [x, w, torch.randint(v, (n,), device=DEVICE, generator=generator)]


def loss(x, w, t):
    return F.cross_entropy(F.linear(x, w).float(), t)


@pytest.mark.parametrize("shape", [(4096, 1024, 64000), (8192, 2304, 256000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory_above_results(shape, dtype):
    n, d, _ = shape
    x, w, t = head(*shape, dtype)
    function = compiled(loss)
    torch.autograd.grad(function(x, w, t), [x, w])  # compiles and tunes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(function(x, w, t), [x, w])
    peak = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in gradients)
    accumulator = n * d * 4 if dtype != torch.float32 else 0
    # Vectors of N, and what the merge of the splits reads.
    assert peak <= 64 * MIB + accumulator + n * 1024, f"{peak / MIB:.1f} MiB"


def test_offsets_beyond_two_to_the_31():
    """More than 2^31 elements of W, and of dlogits."""
    for shape, workspace in (((64, 4096, 600_000), 100), ((8192, 64, 300_032), 5000)):
        x, w, t = head(*shape)
        for early in (False, True):
            torch._dynamo.reset()
            value = compiled(loss, workspace_mb=workspace, gradients_in_forward=early)(x, w, t)
            gradients = torch.autograd.grad(value, [x, w])
            want = loss(x, w, t)
            expected = torch.autograd.grad(want, [x, w])
            assert abs(value.item() - want.item()) < 2e-2
            for ours, theirs in zip(gradients, expected, strict=True):
                assert error(ours[-4096:], theirs[-4096:]) < 2e-2 and error(ours[:4096], theirs[:4096]) < 2e-2


def test_reduce_overhead_captures_the_step():
    cce_inductor.enable()
    try:
        function = torch.compile(loss, mode="reduce-overhead")
        for i in range(5):
            x, w, t = head(512, 256, 8192)
            x.data += i
            t[i::3] = -100
            torch.compiler.cudagraph_mark_step_begin()
            value = function(x, w, t)
            gradients = [g.clone() for g in torch.autograd.grad(value, [x, w])]
            want = loss(x, w, t)
            expected = torch.autograd.grad(want, [x, w])
            assert abs(value.item() - want.item()) < 2e-2
            assert all(error(a, b) < 2e-2 for a, b in zip(gradients, expected, strict=True))
    finally:
        cce_inductor.disable()
    assert counters["cce_inductor"]["fused"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("early", [False, True])
def test_explicit_cuda_graph(early):
    """Nothing in the step waits for the host, and a replay reads new data and another number of active rows."""
    x, w, t = head(512, 256, 8192)
    function = compiled(loss, gradients_in_forward=early)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(function(x, w, t), [x, w])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = function(x, w, t)
        gradients = torch.autograd.grad(value, [x, w])
    for i in range(3):
        with torch.no_grad():
            x.normal_()
            t.random_(8192)
            t[i::2] = -100
        graph.replay()
        want = loss(x, w, t)
        expected = torch.autograd.grad(want, [x, w])
        assert abs(value.item() - want.item()) < 2e-2
        assert all(error(a, b) < 2e-2 for a, b in zip(gradients, expected, strict=True))


def test_grad_scaler_in_float16():
    """The scale of 2^16 is applied and taken off again; gradients far below fp16's smallest number survive."""
    x, w, t = head(2048, 256, 8192, torch.float16)
    scale = 2.0**16
    value = compiled(lambda x, w, t: loss(x, w, t) * scale)(x, w, t)
    gradients = torch.autograd.grad(value, [x, w])
    wide = [x.detach().double().requires_grad_(), w.detach().double().requires_grad_()]
    exact = torch.autograd.grad(loss(*wide, t) * scale, wide)
    eager = torch.autograd.grad(loss(x, w, t) * scale, [x, w])
    for ours, theirs, want in zip(gradients, eager, exact, strict=True):
        assert error(ours, want) <= 1.25 * error(theirs, want) + 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("kind", ["cce", "cce late"])
def test_memory_checker_finds_nothing(kind):
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    folders = [HERE.parent.parent, HERE, HERE.parent / "ops", *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # The first run tunes and fills the cache, so that the second, under the tool, runs little but our kernels.
    command = [sys.executable, str(HERE / "device.py"), kind, "2"]
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=600)
    checked = [tool, "--error-exitcode", "9", *command]
    out = subprocess.run(checked, env=env, capture_output=True, text=True, timeout=900)
    if "Device not supported" in out.stdout + out.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert out.returncode == 0, (out.stdout + out.stderr)[-3000:]


@pytest.mark.parametrize("kind", ["cce", "cce late"])
def test_training_run_is_as_eager(kind):
    ours, eager = train(kind, STEPS), train("eager", STEPS)
    assert counters["cce_inductor"]["fused"] == 1
    tail = max(STEPS // 10, 1)
    mean = [sum(losses[-tail:]) / tail for losses in (ours, eager)]
    print(json.dumps({"steps": STEPS, "first": ours[0], kind: mean[0], "eager": mean[1]}))
    assert abs(ours[0] - eager[0]) < 1e-2
    assert mean[0] < ours[0] - 1 or STEPS < 500
    assert abs(mean[0] - mean[1]) < 0.02 * mean[1]


@pytest.mark.parametrize("workspace_mb", [64, 512])
def test_schedules_are_timed_and_the_one_that_is_chosen_is_right(workspace_mb):
    """Several schedules fit: the autotuner compiles and times each."""
    x, w, t = head(4096, 512, 32768)
    value = compiled(loss, workspace_mb=workspace_mb, gradients_in_forward=False)(x, w, t)
    gradients = torch.autograd.grad(value, [x, w])
    want = loss(x, w, t)
    expected = torch.autograd.grad(want, [x, w])
    assert abs(value.item() - want.item()) < 2e-2
    assert all(error(a, b) < 2e-2 for a, b in zip(gradients, expected, strict=True))
    assert counters["inductor"]["select_algorithm_autotune"] > 0 or DEVICE == "cpu"


def each_configuration():
    """Every configuration of the architecture at hand, for 16-bit operands."""
    if not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability()
    table = TABLE[max(sm for sm in TABLE if isinstance(sm, int) and sm <= major * 10 + minor)]
    return sorted({str(t) for by_kind in table.values() for t in by_kind["16 bits"]})


@pytest.mark.parametrize("tiles", each_configuration())
@pytest.mark.parametrize("masked", [False, True])
def test_every_configuration_is_right(tiles, masked):
    """Not only the fastest: each by itself, where a kernel has it."""
    name = "bfloat16" if masked else "TMA, x as well"
    case = dataclasses.replace(CASES[name], n=700, d=320, v=5000)
    data = case.data(DEVICE)
    everything = configurations

    def one(*arguments):
        found = everything(*arguments)
        return [t for t in found if str(t) == tiles] or found[:1]

    inputs = [tensor.detach().requires_grad_() for tensor in data[:3]]
    with patch("cce_inductor.lowering.cuda_call.configurations", one):
        value = compiled(case.function(), workspace_mb=1, gradients_in_forward=False)(*inputs, data[3])
        gradients = torch.autograd.grad(value, inputs)
    exact = case.eager(data, torch.float64)
    check_error_rule(tiles, named(value.detach(), gradients), case.eager(data, case.dtype), exact, case.compute)
