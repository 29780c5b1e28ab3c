"""The GPU kernels, on a machine without a GPU.

Numerics in Triton's interpreter, resources by compiling ahead of time, and what Inductor puts around the kernels. None
of this shows that they run on a GPU, or how fast.
"""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

import ahead_of_time
import rendered
from gpu_cases import CASES, KEEPING, Case
from gpu_graphs import generate

from cce_inductor.lowering import cuda_budget
from cce_inductor.lowering.choose import choose
from cce_inductor.lowering.schedule_choice import ScheduleChoice, _example
from cce_inductor.lowering.schedules import Library, Sweep, budget_slabs, rounds, schedules
from cce_inductor.lowering.triton_configs import CACHED_TILE, TABLE
from cce_inductor.ops.choice import Choice, Problem

HERE = Path(__file__).parent
# Kernels that multiply no matrices, or none in tiles.
NO_PRODUCT = {
    *("linear_statistics_dlogits, kept", "linear_statistics_early"),
    *("linear_statistics, products", "linear_statistics_dlogits, products"),
} | {f"budget_{name}" for name in ("select", "mask", "bits", "tiles", "plan", "list", "check")}
# One of each kind of kernel, operand and statistic. All others are variants of these, and slow tests: interpreting one
# takes some seconds.
OFTEN = [
    *("any number of rows", "TMA", "factors, blocks", "budget, NaN", "two heads, softcaps"),
    "gradients in the forward, library, bfloat16",
]
VARIANTS = [name for name in CASES if name not in OFTEN]


@pytest.mark.parametrize(
    "group",
    [OFTEN, *(pytest.param(VARIANTS[i::8], marks=pytest.mark.slow) for i in range(8))],
    ids=["often", *"12345678"],
)
def test_interpreted_kernels_obey_the_error_rule(group):
    """Whole training graphs, forward and backward, with every kernel that Inductor generates for them."""
    folders = [HERE, HERE.parent, HERE.parent / "ops", *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-W", "ignore", str(HERE / "interpret_kernels.py"), *group]
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    results = {r["case"]: r for r in map(json.loads, out.stdout.splitlines())}
    assert list(results) == group, out.stderr[-3000:]
    assert {name: r["error"] for name, r in results.items() if "error" in r} == {}
    for name, result in results.items():
        ours = [name for name in result["launches"] if name.startswith("triton_tem")]
        # One kernel of each kind, for all regions.
        case = CASES[name]
        drops = case.budget and case.loss is not CASES["budget, smoothing"].loss
        assert len(ours) == (14 if drops else case.kernels), result


EVERY_KERNEL = [*ahead_of_time.VARIANTS]


@pytest.mark.parametrize(
    "dtype,architectures,variants,of_each",
    [
        ("bfloat16", [90], ["slab"], 1),
        *(
            pytest.param(dtype, ahead_of_time.ARCHITECTURES, EVERY_KERNEL, None, marks=pytest.mark.slow)
            for dtype in ("bfloat16", "autocast", "float32", "int8")  # float16 is loaded and multiplied as bfloat16 is
        ),
    ],
    ids=["often", *"1234"],
)
def test_no_configuration_spills_or_does_without_matrix_instructions(dtype, architectures, variants, of_each):
    rows = list(ahead_of_time.compiled(dtype, variants, architectures, of_each))
    wanted = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", "gfx942": "mfma"}
    kernels = {row["kernel"] for row in rows}
    # Only a dW of 16 bits is added up in fp32 beside it, or what the gradient of factors is made of.
    every = set(TABLE[90]) - ({"linear_statistics_dw, added"} if dtype in ("autocast", "float32") else set())
    alone = ("bound", "early", "products")
    factored = {k for k in every if k.startswith(("linear", "two_heads")) and not k.endswith(alone)}
    # A weight of int8 has no gradient.
    every -= {k for k in every if "dw" in k} if dtype == "int8" else set()
    # PyTorch's GEMMs multiply operands of one dtype.
    every -= {k for k in every if k.endswith("products")} if dtype in ("int8", "autocast") else set()
    every |= {f"{kernel}{ahead_of_time.FACTORS}" for kernel in factored}
    assert kernels == every if variants == EVERY_KERNEL else len(kernels) == 4
    assert {row["sm"] for row in rows} == set(architectures)
    shared = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, "gfx942": 64 << 10}
    for row in rows:
        assert row["stack"] == 0 and row["shared"] <= shared[row["sm"]], row
        # fp32 as PyTorch's default has it ("ieee") has no matrix instruction but AMD's, which multiplies all its bits.
        kernel = row["kernel"].removesuffix(ahead_of_time.FACTORS)
        is_gemm = (dtype != "float32" or row["sm"] == "gfx942") and kernel not in NO_PRODUCT
        assert row["instruction"] == (wanted[row["sm"]] if is_gemm else "none"), row


def make_leaves(case: Case) -> list[torch.Tensor]:
    *leaves, t = case.data()
    return [*(tensor.requires_grad_() for tensor in leaves), t]


def bfloat16_loss(**how) -> list[str]:
    """The wrappers of a loss over 512 rows of width 64 and 9000 columns, in 2 MiB."""
    n, d, v = 512, 64, 9000
    x, w = torch.randn(n, d).bfloat16().requires_grad_(), torch.randn(v, d).bfloat16().requires_grad_()
    t = torch.randint(0, v, (n,))

    def loss(x, w, t):
        return F.cross_entropy(F.linear(x, w).float(), t)

    return generate(loss, [x, w, t], **{"workspace": 1 << 21, **how})


def test_allocations_and_launches_of_a_training_step():
    """What is allocated: results, one slab of dlogits, the accumulator of dx, vectors. Never anything of N x V."""
    forward, backward = bfloat16_loss()
    # The mask, the list of active rows (three vectors and their number), four splits of lse and target logit.
    assert_expected_inline(
        rendered.summary(forward),
        """\
allocate (512) int64
launch pointwise
allocate (512) bool
allocate (512) int64
allocate (512) bool
launch persistent reduction
allocate (512) int64
launch persistent reduction
launch pointwise
allocate (1) int64
launch pointwise
allocate (2048) float32 x 3
launch linear_statistics
allocate (512) float32 x 2
allocate (512) bool
allocate (512) float32
allocate () float32
launch persistent reduction""",
    )
    # dW, the accumulator of dx, and one slab of dlogits that five regions share; at last dx in bf16.
    assert_expected_inline(
        rendered.summary(backward),
        """\
allocate (512) int64
launch persistent reduction
allocate (512) int64
launch pointwise x 2
allocate (1) int64
launch pointwise
allocate (512) float32
launch pointwise
allocate (9000, 64) bfloat16
allocate (512, 64) float32
launch pointwise
allocate (512, 2048) bfloat16
allocate (2) int64
launch pointwise
launch linear_statistics_dlogits
launch linear_statistics_dw
launch linear_statistics_dx
launch pointwise
launch linear_statistics_dlogits
launch linear_statistics_dw
launch linear_statistics_dx
launch pointwise
launch linear_statistics_dlogits
launch linear_statistics_dw
launch linear_statistics_dx
launch pointwise
launch linear_statistics_dlogits
launch linear_statistics_dw
launch linear_statistics_dx
launch pointwise
launch linear_statistics_dlogits
launch linear_statistics_dw
launch linear_statistics_dx
allocate (512, 64) bfloat16
launch pointwise""",
    )
    assert "extern_kernels." not in forward + backward


def test_allocations_and_launches_of_gradients_in_the_forward():
    """All logits in the workspace, 16 bits each, and dlogits in their place; the backward multiplies by the tangent."""
    choose = lambda problem: Choice("test", gradients_in_forward=True)  # noqa: E731
    forward, backward = bfloat16_loss(choose=choose, tiles=KEEPING, workspace=16 << 20)
    assert_expected_inline(
        rendered.summary(forward),
        """\
allocate (512) bfloat16
launch persistent reduction
allocate () int64
allocate (512) int64
launch persistent reduction
allocate (512) int64
launch pointwise
allocate (512) int64
launch pointwise
allocate (512, 9216) bfloat16
allocate (36352) float32
allocate (2048) float32 x 3
allocate (1) int64
launch pointwise
launch linear_statistics, kept
allocate (512) float32 x 3
allocate () float32
launch persistent reduction
allocate (9000, 64) bfloat16
allocate (512, 64) bfloat16
launch pointwise
allocate (2) int64
launch pointwise
launch linear_statistics_dlogits, kept
launch linear_statistics_dw
launch linear_statistics_dx""",
    )
    assert_expected_inline(rendered.summary(backward), """launch pointwise x 2""")


def gemms(wrapper: str) -> list[str]:
    """PyTorch's GEMMs of a wrapper."""
    return re.findall(r"cce_inductor\.((?:add_)?mm_)\.default\(", wrapper)


def test_allocations_and_launches_with_the_librarys_gemms():
    """A slab of products in fp32 and one of dlogits share the workspace; x without rows that do not count is where dx
    will be. Two products, and one that is added to, for each slab."""
    how = {"sweeps": (Sweep(0, 3072, ("input", "weight"), True, True),), "workspace": 9 << 20, "library": True}
    forward, backward = bfloat16_loss(**how)
    assert "launch linear_statistics\n" in rendered.summary(forward) and not gemms(
        forward
    )  # the forward needs no scratch
    assert gemms(backward) == ["mm_", "mm_", "mm_"] + ["mm_", "mm_", "add_mm_"] * 2
    assert_expected_inline(
        rendered.summary(backward),
        """\
allocate (512) float32
launch pointwise
allocate (9000, 64) bfloat16
allocate (512, 64) float32
allocate (512, 64) bfloat16
launch pointwise
allocate (512, 3072) bfloat16
allocate (512, 3072) float32
allocate (2) int64
launch pointwise
launch linear_statistics_dlogits, products
launch pointwise
launch linear_statistics_dlogits, products
launch pointwise
launch linear_statistics_dlogits, products
launch pointwise""",
    )
    assert allocated(backward) <= (9 << 20) + (9000 + 2 * 512) * 64 * 2 + 512 * 64 * 4 + (1 << 14)


def test_allocations_and_launches_of_gradients_in_the_forward_with_the_librarys_gemms():
    """The products, rounded as eager rounds the logits, and dlogits in their place: nothing else of that size."""
    choose = lambda problem: Choice("test", gradients_in_forward=True)  # noqa: E731
    forward, backward = bfloat16_loss(choose=choose, workspace=16 << 20, library=True)
    assert gemms(forward) == ["mm_"] * 3 and not gemms(backward)
    assert_expected_inline(
        rendered.summary(forward),
        """\
allocate (2) int64
launch pointwise
allocate (4) int64
launch pointwise
allocate (512) bfloat16
launch persistent reduction
allocate (512) int64
launch pointwise
allocate (2048) float32 x 3
allocate (512, 64) bfloat16
allocate (9000, 64) bfloat16
allocate (512, 9216) bfloat16
launch linear_statistics, products
allocate (512) bool
allocate (512) float32 x 3
allocate () float32
launch persistent reduction
launch linear_statistics_dlogits, products
allocate (512, 64) bfloat16
launch pointwise""",
    )
    assert_expected_inline(rendered.summary(backward), """launch pointwise x 2""")


def test_float32_without_tf32_takes_the_librarys_gemms():
    """Our kernels would do without matrix instructions. With tf32 they have them."""
    for precision, of_forward, of_backward in (("ieee", 2, 8), ("tf32", 0, 0)):
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = precision
        try:
            case = CASES["library"]
            forward, *_, backward = generate(case.loss, make_leaves(case), workspace=1 << 17, library=True)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        # Each of two slabs of the backward: products, dW, db, dx. With tf32 our kernels are the ones that win here.
        assert (len(gemms(forward)), len(gemms(backward))) == (of_forward, of_backward)
        assert ("linear_statistics, products" in rendered.summary(forward)) == (of_forward > 0)


def of_two_heads(loss: Callable, **how) -> list[str]:
    """The wrappers of a loss (z, r, t) over 512 rows and 9000 columns, of a head of width 64 and one of width 48."""
    n, v = 512, 9000
    x, w, y, u = (torch.randn(*size).bfloat16().requires_grad_() for size in ((n, 64), (v, 64), (n, 48), (v, 48)))
    t = torch.randint(0, v, (n,))

    def fn(x, w, y, u, t):
        return loss(F.linear(x, w), F.linear(y, u), t)

    return generate(fn, [x, w, y, u, t], workspace=1 << 21, **how)


def divergence(z, r, t):
    return F.kl_div(z.float().log_softmax(1), r.float().log_softmax(1), reduction="batchmean", log_target=True)


def test_allocations_and_launches_of_two_heads():
    """Both slabs of dlogits in the workspace, and an accumulator of dx for each head. Never anything of N x V."""
    forward, backward = of_two_heads(divergence)
    assert_expected_inline(
        rendered.summary(forward),
        """\
allocate (2048) float32 x 5
launch two_heads
allocate (512) float32 x 5
allocate () float32
launch persistent reduction""",
    )
    assert_expected_inline(
        rendered.summary(backward),
        """\
allocate () float32
launch pointwise
allocate (9000, 64) bfloat16
allocate (512, 64) float32
allocate (512, 1024) bfloat16
allocate (9000, 48) bfloat16
allocate (512, 48) float32
allocate (512, 1024) bfloat16
allocate (2) int64
launch pointwise
launch two_heads_dlogits
launch linear_statistics_dw
launch linear_statistics_dx
launch linear_statistics_dw
launch linear_statistics_dx
launch pointwise
launch two_heads_dlogits
launch linear_statistics_dw
launch linear_statistics_dx
launch linear_statistics_dw
launch linear_statistics_dx
launch pointwise
launch two_heads_dlogits
launch linear_statistics_dw
launch linear_statistics_dx
launch linear_statistics_dw
launch linear_statistics_dx
launch pointwise
launch two_heads_dlogits
launch linear_statistics_dw
launch linear_statistics_dx
launch linear_statistics_dw
launch linear_statistics_dx
launch pointwise
launch two_heads_dlogits
launch linear_statistics_dw
launch linear_statistics_dx
launch linear_statistics_dw
launch linear_statistics_dx
launch pointwise
launch two_heads_dlogits
launch linear_statistics_dw
launch linear_statistics_dx
launch linear_statistics_dw
launch linear_statistics_dx
launch pointwise
launch two_heads_dlogits
launch linear_statistics_dw
launch linear_statistics_dx
launch linear_statistics_dw
launch linear_statistics_dx
launch pointwise
launch two_heads_dlogits
launch linear_statistics_dw
launch linear_statistics_dx
launch linear_statistics_dw
launch linear_statistics_dx
launch pointwise
launch two_heads_dlogits
launch linear_statistics_dw
launch linear_statistics_dx
launch linear_statistics_dw
launch linear_statistics_dx
allocate (512, 64) bfloat16
launch pointwise
allocate (512, 48) bfloat16
launch pointwise""",
    )
    _, backward = of_two_heads(lambda z, r, t: divergence(z, r.detach(), t))
    summary = rendered.summary(backward)
    # The whole workspace is for the slabs of one head, which are twice as wide.
    assert summary.count("allocate (512, 2048) bfloat16") == 1 and summary.count("two_heads_dlogits") == 5
    assert summary.count("linear_statistics_dw") == summary.count("linear_statistics_dx") == 5


def test_without_a_tangent_of_both_heads_the_backward_is_of_one():
    def loss(z, r, t):
        z = z.float()
        return F.cross_entropy(z, t) + 0.1 * divergence(z, r, t).detach()

    forward, *_, backward = of_two_heads(loss)
    assert "launch two_heads" in rendered.summary(forward)
    summary = rendered.summary(backward)
    assert "two_heads" not in summary and "launch linear_statistics_dlogits" in summary


def test_two_heads_have_kernels_and_form_no_gradients_in_the_forward():
    problem = Problem(512, 64, 9000, "cuda", (torch.bfloat16,) * 2, torch.bfloat16, 1 << 30, 512 * 9000 * 2)
    assert choose(problem).gradients_in_forward
    assert choose(replace(problem, two_heads=True)) == Choice("Triton kernels")


def allocated(wrapper: str) -> int:
    """Bytes of all that a wrapper allocates."""
    size = 0
    for line in rendered.summary(wrapper).splitlines():
        found = re.match(r"allocate \((.*)\) (\w+)(?: x (\d+))?$", line)
        if found:
            sizes = [int(s) for s in found[1].split(", ") if s]
            size += math.prod(sizes) * getattr(torch, found[2]).itemsize * int(found[3] or 1)
    return size


def test_allocations_and_launches_under_a_budget():
    """Never anything of N x V but the bound and, in bits, masks of it."""
    forward, backward = bfloat16_loss(grad_filter="budget 0.004", workspace=8 << 20)
    assert_expected_inline(
        rendered.summary(forward),
        """\
allocate (512) bool
allocate (512) int64
allocate (512) bool
launch persistent reduction
allocate (9216) float32 x 3
allocate (4, 9000) uint8
launch pointwise
allocate (512) int64
launch persistent reduction
allocate (512) int64
launch pointwise x 2
allocate (1) int64
launch pointwise
allocate (512) float32
launch linear_statistics_early
allocate (4) int64
launch pointwise
allocate (512) float32
launch pointwise
launch linear_statistics, bound
allocate (512) float32
allocate (512) bool
launch persistent reduction
allocate () float32
allocate () int64
launch persistent reduction""",
    )
    assert_expected_inline(
        rendered.summary(backward),
        """\
allocate (512) int64
launch persistent reduction
allocate (512) int64
launch pointwise x 2
allocate (1) int64
launch pointwise
allocate (512) float32
launch pointwise
allocate (4) int32 x 3
launch budget_select
allocate (4) int64
launch pointwise x 2
allocate (4, 284) int32
allocate (9000) int64
launch budget_mask
allocate (4, 284) int32
allocate (4, 285) int32
allocate (71) int64
allocate (71, 4) int32
allocate (71) int32
allocate (2, 4) int32 x 3
allocate (2) int32
allocate (30208) int32
allocate (30208, 128) bfloat16
allocate (236, 128) float32
allocate (4, 128) float32
launch pointwise
allocate (9000, 64) bfloat16
allocate (512, 64) float32
launch pointwise
allocate (1) int64
launch pointwise
allocate (1) int64
launch pointwise
launch budget_bits
launch budget_tiles
launch budget_plan
launch budget_list
launch budget_dlogits
launch budget_dw
launch budget_dx
launch budget_list
launch budget_dlogits
launch budget_dw
launch budget_dx
allocate (1) int64
launch pointwise
launch budget_check
launch budget_bits
launch budget_tiles
launch budget_plan
launch budget_list
launch budget_dlogits
launch budget_dw
launch budget_dx
launch budget_list
launch budget_dlogits
launch budget_dw
launch budget_dx
allocate (512, 64) bfloat16
launch pointwise""",
    )


def test_slabs_of_a_budget_stay_within_the_workspace():
    n, d, v = 512, 64, 9000
    for workspace in (1 << 20, 3 << 20):
        _, backward = bfloat16_loss(grad_filter="budget 0.004", workspace=workspace)
        slabs, width = budget_slabs(n, v, 2, workspace)
        launches = rendered.summary(backward).count("launch budget_dlogits")
        assert launches == 2 * slabs > 2 and f"({4 * width}, 128), (128, 1), torch.bfloat16" in backward
        results, sums, vectors = v * d * 2 + n * d * 2, n * d * 4, 40 * n
        # The sort has its two results.
        assert allocated(backward) + 2 * 8 * v <= workspace + results + sums + vectors
    _, backward = bfloat16_loss(grad_filter="budget 0.004", workspace=1 << 19)
    summary = rendered.summary(backward)
    assert "launch linear_statistics_dlogits" in summary and "budget" not in summary


def test_the_autotuner_is_given_a_slab_that_keeps_everything():
    """What it fills integers with on its own would be an empty one."""
    head = SimpleNamespace(hint=300, v=1700, device=torch.device("cpu"))
    blocks, width, tiles, slabs = 3, 768, 14, 4
    made = SimpleNamespace(call=head, width=width, tiles=tiles, slabs=slabs, constants={"CHUNK": 128})
    example = {name: fill(None) for name, fill in cuda_budget._Budget._examples(made).items()}
    assert all(t.dtype == torch.int32 for name, t in example.items() if name != "PERM")
    assert example["RANGE"].tolist() == [[0, 6]] * slabs and example["MOST"].tolist() == [6] * slabs
    for name in ("START", "BASE"):
        assert example[name].tolist() == [[0, 768, 1536]] * slabs
    assert example["NUMBER"].tolist() == [[768] * blocks] * slabs
    assert example["LIST"].shape == (blocks * width,) and example["LIST"].max() < 1700
    assert example["PERM"].tolist() == list(range(1700)) and (example["BITS"] == -1).all()
    assert example["BITS"].shape == (blocks, 56) and example["RUN"].tolist() == [list(range(0, 57 * 32, 32))] * blocks
    assert example["OF_TILE"].tolist() == [[0, 1, 2]] * tiles and example["IN_TILE"].tolist() == [blocks] * tiles


def test_rounds_grow_and_cover_the_vocabulary():
    for blocks, v in ((64, 128256), (1, 128256), (512, 256000), (64, 500), (3, 49152)):
        found = rounds(blocks, v, 132)
        assert found[0].begin == 0 and found[-1].end == v
        for one, following in itertools.pairwise(found):
            assert following.begin == one.end and following.before == one.before + one.splits
            assert one.end % 256 == 0 and following.end - following.begin > one.end - one.begin
        assert all(one.width % 256 == 0 for one in found)
    assert [(r.end, r.splits) for r in rounds(64, 128256, 132)] == [(8192, 2), (32256, 2), (128256, 2)]


def test_offsets_beyond_two_to_the_31_are_64_bits():
    def loss(x, w, t):
        return F.cross_entropy(F.linear(x, w).float(), t)

    for n, d, v, wide in ((64, 4096, 600_000, True), (64, 4096, 60_000, False)):
        with FakeTensorMode():
            x = torch.empty(n, d, dtype=torch.bfloat16, requires_grad=True)
            w = torch.empty(v, d, dtype=torch.bfloat16, requires_grad=True)
            t = torch.empty(n, dtype=torch.int64)
        for wrapper in generate(loss, [x, w, t], workspace=64 << 20):
            ours = [kernel for kernel in rendered.kernels(wrapper) if kernel.ours]
            dtypes = {kernel.constants()["INDEX_DTYPE"] for kernel in ours}
            assert dtypes == {"tl.int64" if wide else "tl.int32"}


def test_float32_is_multiplied_as_pytorch_is_told():
    for precision, expected in (("ieee", "'ieee'"), ("tf32", "'tf32'")):
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = precision
        try:
            wrappers = generate(CASES["float32"].loss, make_leaves(CASES["float32"]))
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        ours = [kernel for wrapper in wrappers for kernel in rendered.kernels(wrapper) if kernel.ours]
        assert {kernel.constants()["PRECISION"] for kernel in ours} == {expected}


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


LLAMA = {"n": 8192, "d": 4096, "v": 128256, "compute": torch.bfloat16, "weight": torch.bfloat16}


def offered(workspace: int, static: bool = True, library: Library | None = None, needs=("input", "weight"), **head):
    head = {**LLAMA, **head}
    return schedules(**head, needs=needs, workspace=workspace, l2=50 << 20, static=static, library=library)


def test_schedules_that_fit():
    """By what is predicted to be the fastest; the tuner has the last word."""

    def names(*arguments, **options):
        return [s.name for s in offered(*arguments, **options)]

    # blocks would be more than 256 launches; dx of chunks would leave most of the GPU without work.
    assert names(64 << 20) == ["slab"]
    assert names(512 << 20) == ["slab", "separate"]
    assert names(3 << 30) == ["slab"]  # one slab
    assert names(3 << 30, n=65536) == ["slab", "chunk", "separate"]
    assert names(1 << 30, weight=torch.float32) == ["slab", "chunk", "separate"]
    assert names(64 << 20, n=4096, d=512, v=32768) == ["slab", "blocks"]
    assert names(1 << 30, static=False) == ["slab"]
    assert names(512 << 20, needs=["input"]) == ["chunk", "slab"]


def test_schedules_with_the_librarys_gemms_that_fit():
    def names(*arguments, **options):
        return [s.name for s in offered(*arguments, **{"library": Library(), **options})]

    # At 64 MiB slabs of products in fp32 would be more than 256 launches.
    assert names(64 << 20) == ["slab, library", "slab"]
    assert names(512 << 20) == ["library", "slab, library", "slab", "separate, library", "separate"]
    assert names(3 << 30) == ["library", "slab, library", "slab"]
    # Without fp32 of 16 bits nothing is rounded in between: the logits' products are our kernel's.
    assert names(3 << 30, library=Library(wide=False)) == ["slab, library", "slab"]
    # Any number of rows.
    assert names(1 << 30, static=False) == ["library", "slab, library", "slab"]
    # The copy of the hidden states without rows that do not count may take half of the workspace.
    assert names(64 << 20, library=Library(copied=64 << 20)) == ["slab"]
    (library, by_library, slab, _) = offered(512 << 20, library=Library(copied=64 << 20))
    assert library.sweeps[0].columns * 8192 * 6 + (64 << 20) <= 512 << 20
    assert by_library.sweeps[0].columns < slab.sweeps[0].columns
    # fp32 without matrix instructions.
    fp32 = {"compute": torch.float32, "weight": torch.float32, "library": Library(alone=True)}
    (only,) = offered(64 << 20, **fp32)
    assert only.name == "library" and only.sweeps[0].columns == 2048


def test_schedules_stay_within_the_workspace():
    for n, d, v in ((8192, 4096, 128256), (4096, 512, 32768), (1024, 64, 500), (65536, 2304, 256000)):
        for workspace in (1 << 22, 64 << 20, 1 << 30, 5 << 30, 1 << 40):
            for weight in (torch.bfloat16, torch.float32):
                for schedule in offered(workspace, n=n, d=d, v=v, weight=weight, library=Library()):
                    assert schedule.name.startswith("slab") or schedule.launches(n, v) <= 256
                    for sweep in schedule.sweeps:
                        dlogits = (sweep.rows or n) * sweep.columns * (6 if sweep.products else 2)
                        adds_dw = sweep.rows and "weight" in sweep.makes and weight != torch.float32
                        sums = sweep.columns * d * 4 if adds_dw else 0
                        # A slab is at least one tile wide, whatever the number of rows.
                        assert dlogits + sums <= workspace or sweep.columns == 256
                        # Nor is it more than the logits, and what fills their last tile.
                        assert dlogits + sums <= n * (v + 256) * 2 or sweep.columns == 256


def test_every_schedule_is_compiled_to_be_timed_and_the_fastest_is_used():
    wrappers = bfloat16_loss(workspace=8 << 20, fastest="chunk", library=True)
    launches = [rendered.summary(wrapper).count("launch linear_statistics") for wrapper in wrappers]
    # forward; alone slab with the library's GEMMs, slab, chunk, all by the library; the backward with chunks
    assert launches == [1, 2, 6, 6, 4, 6]
    assert [len(gemms(wrapper)) for wrapper in wrappers] == [0, 4, 0, 0, 12, 0]
    assert "(9216, 64), (64, 1), torch.float32" in wrappers[-1]  # dW is added up in fp32
    assert "(9216, 64), (64, 1), torch.float32" not in wrappers[2]


def test_a_schedule_is_timed_on_tensors_as_its_operands_will_be():
    """The autotuner's own would be the bases of views."""

    def node(dtype, size, stride):
        made = {"get_dtype": dtype, "get_size": size, "get_stride": stride, "get_device": torch.device("cpu")}
        return SimpleNamespace(**{name: lambda value=value: value for name, value in made.items()})

    scalar = _example(node(torch.float32, [512], [0]))
    assert scalar.shape == (512,) and scalar.stride() == (0,)
    transposed = _example(node(torch.bfloat16, [30, 20], [1, 30]))
    assert transposed.stride() == (1, 30) and transposed.float().std() > 0.5
    assert _example(node(torch.bool, [9], [1])).all()
    assert (_example(node(torch.int64, [9], [2])) == 0).all()


def test_wrappers_of_timed_schedules_name_their_buffers_properly():
    case = CASES["library, every statistic, bfloat16"]
    _, *timed, _ = generate(case.loss, make_leaves(case), workspace=1 << 14, library=True)
    assert len(timed) == 3  # slab, slab with PyTorch's GEMMs, all with them
    for wrapper in timed:
        names = re.findall(r"^ *(.*) = empty_strided_cuda", wrapper, re.M)
        assert names and all(name.isidentifier() for name in names)


def test_a_schedule_that_cannot_be_timed_loses():
    choice = object.__new__(ScheduleChoice)
    choice.input_nodes, choice.schedule = [None], SimpleNamespace(name="broken")
    assert choice.benchmark(out=None) == float("inf")


def test_a_fault_in_a_lowering_falls_back_to_the_eager_implementation(caplog):
    with patch("cce_inductor.lowering.cuda_backward.factor", side_effect=RuntimeError("broken")):
        wrappers = generate(CASES["float16"].loss, make_leaves(CASES["float16"]))
    assert "cce_inductor.linear_statistics_backward" in wrappers[-1]
    assert "launch linear_statistics" in rendered.summary(wrappers[0])
    assert "could not be lowered" in caplog.text


def test_every_kernel_has_configurations_for_every_kind_of_operands():
    for table in TABLE.values():
        assert table.keys() == TABLE[90].keys()
        for kernel, by_kind in table.items():
            assert by_kind.keys() == {"16 bits", "cast", "fp32"}
            for tiles in by_kind.values():
                plain = [t for t in tiles if not t.tma]
                assert plain, "operands of any strides"
                # What the forward keeps lies in tiles of one width.
                assert not kernel.endswith("kept") or any(t.block_n == CACHED_TILE for t in plain)


def test_entries_beside_two_heads_are_gathered_apart(caplog):
    def loss(z, r, t):
        entries = (t[:, None] + torch.arange(3, device=t.device)) % z.shape[1]
        return divergence(z, r, t) - z.float().log_softmax(1).gather(1, entries).mean()

    forward, backward = of_two_heads(loss)
    assert forward.count("cce_inductor.linear_statistics.default(") == 1
    assert backward.count("cce_inductor.linear_statistics_backward.default(") == 1
    assert "launch two_heads" in rendered.summary(forward) and "launch two_heads" in rendered.summary(backward)
    assert "could not be lowered" not in caplog.text


@pytest.mark.parametrize("grad_filter", ["exact", "budget 0.01"])
def test_entries_are_gathered_apart_from_the_kernels(grad_filter, caplog):
    def loss(x, w, b, t):
        entries = (t[:, None] + torch.arange(3, device=t.device)) % w.shape[0]
        return -F.linear(x, w, b).log_softmax(-1).gather(1, entries).mean()

    forward, backward = generate(loss, make_leaves(CASES["float16"]), grad_filter=grad_filter)
    assert forward.count("cce_inductor.linear_statistics.default(") == 1
    assert backward.count("cce_inductor.linear_statistics_backward.default(") == 1
    assert "launch linear_statistics" in rendered.summary(forward)
    assert "launch " in rendered.summary(backward) and "dlogits" in rendered.summary(backward)
    assert "could not be lowered" not in caplog.text
