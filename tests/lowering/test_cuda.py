"""The GPU kernels, on a machine without a GPU.

Numerics in Triton's interpreter, resources by compiling ahead of time, and what Inductor puts around the kernels. None
of this shows that they run on a GPU, or how fast.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import ahead_of_time
from gpu_graphs import generate
from interpret_kernels import CASES

HERE = Path(__file__).parent
# A third of the cases to a process: interpreting costs some seconds each.
GROUPS = [list(CASES)[i::3] for i in range(3)]


@pytest.mark.parametrize("group", GROUPS, ids=["1", "2", "3"])
def test_interpreted_kernels_obey_the_error_rule(group):
    """Whole training graphs, forward and backward, with every kernel that Inductor generates for them."""
    folders = [HERE, HERE.parent, HERE.parent / "ops", *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-W", "ignore", str(HERE / "interpret_kernels.py"), *group]
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    results = {r["case"]: r for r in map(json.loads, out.stdout.splitlines())}
    assert list(results) == group, out.stderr[-3000:]
    assert {name: r["error"] for name, r in results.items() if "error" in r} == {}
    for name, result in results.items():
        ours = [name for name in result["launches"] if name.startswith("triton_tem")]
        assert len(ours) == 3 or "one" in name, result  # forward, dacc, gradients: one kernel each, for all slabs


@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float16", "autocast", "float32"))]
)
def test_no_configuration_spills_or_does_without_matrix_instructions(dtype):
    rows = list(ahead_of_time.compiled(dtype))
    assert len({(row["sm"], row["kernel"]) for row in rows}) == 9
    wanted = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
    shared = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
    for row in rows:
        assert row["stack"] == 0 and row["shared"] <= shared[row["sm"]], row
        # fp32 as PyTorch's default has it ("ieee") has no matrix instruction.
        assert dtype == "float32" or row["instruction"] == wanted[row["sm"]], row


def test_allocations_and_launches_of_a_training_step():
    """What is allocated: results, one slab of dacc, the accumulator of dx, vectors. Never anything of N x V."""
    n, d, v = 512, 64, 9000
    x, w = torch.randn(n, d).bfloat16().requires_grad_(), torch.randn(v, d).bfloat16().requires_grad_()
    t = torch.randint(0, v, (n,))
    forward, backward = generate(
        lambda x, w, t: F.cross_entropy(F.linear(x, w).float(), t), [x, w, t], workspace=1 << 21
    )
    found = re.findall(r"empty_strided_cuda\(\((.*?)\), \(.*?\), torch\.(\w+)\)", backward)
    matrices = sorted((size, dtype) for size, dtype in found if "," in size.rstrip(", "))
    assert matrices == sorted(
        [("512, 2048", "bfloat16"), ("512, 64", "bfloat16"), ("512, 64", "float32"), ("9000, 64", "bfloat16")]
    )
    assert "extern_kernels." not in forward + backward
    assert len(re.findall(r"triton_tem\w+\.run\(", forward)) == 1
    assert len(re.findall(r"triton_tem\w+\.run\(", backward)) == 2 * 5  # five slabs, two kernels each


def test_any_number_of_rows_is_one_graph():
    n, d, v = 96, 32, 600
    x, w = torch.randn(n, d).requires_grad_(), torch.randn(v, d).requires_grad_()
    t = torch.randint(0, v, (n,))

    def loss(x, w, t):
        torch._check(x.shape[1] == 32)
        return F.cross_entropy(F.linear(x, w), t)

    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(t, 0)
    forward, backward = generate(loss, [x, w, t])
    for wrapper in (forward, backward):
        assert re.search(r"empty_strided_cuda\(\(s\d+", wrapper)
