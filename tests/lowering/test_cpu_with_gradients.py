"""The CPU kernel that forms gradients in the forward, with every way to cut its work; and when it is chosen."""

import pytest
import torch
import torch.nn.functional as F
from head_oracle import Head, error, some_rows
from operators import EVERY, LOSS, Operator, kernels
from test_memory import Allocations

import cce_inductor
from cce_inductor.lowering.choose import choose
from cce_inductor.lowering.cpu import element_dtype, multiplies_bfloat16
from cce_inductor.ops.call import Attributes
from cce_inductor.ops.choice import Problem
from cce_inductor.ops.library import BACKWARD, FORWARD
from cce_inductor.ops.with_gradients import WITH_GRADIENTS

pytestmark = pytest.mark.usefixtures("lowerings")


@pytest.mark.slow
def test_float32_kept_in_full_in_chunks_and_not_at_all():
    """One chunk, several (where all rows count), and a workspace too small for any: the same numbers."""
    weight = torch.rand(1003)
    for workspace, case, form in (
        (64 << 20, "one chunk", "tanh"),
        (1 << 20, "chunks", "rsqrt"),
        (1 << 18, "nothing kept", "tanh"),
    ):
        softcap = {"softcap": 5.0, "softcap_form": form}
        operator = Operator(EVERY, at_once=True, dynamic=True, scale=0.7, **softcap, workspace=workspace)
        for n in (137, 500):
            head = Head.make(n, 90, 1003, bias=True, seed=n)
            row_mask = None if case == "chunks" else some_rows(n)
            operator.check(f"{case}, {n} rows", head, column_weight=weight, row_mask=row_mask)
    assert kernels() == 3


@pytest.mark.slow
def test_bfloat16_kept_in_part():
    """16-bit dW: one chunk, of which the last rows are kept, in 16 bits where the CPU multiplies bfloat16."""
    head = Head.make(300, 70, 2500, torch.bfloat16, bias=True)
    for workspace in (64 << 20, 1 << 20, 1 << 17):
        operator = Operator(LOSS, at_once=True, workspace=workspace)
        ours, again = operator.check(f"bfloat16, {workspace} bytes", head), operator.run(head)
        assert all(torch.equal(ours[name], again[name]) for name in again)  # deterministic


@pytest.mark.slow
def test_float32_weights_in_bfloat16_and_masked_columns():
    """Autocast's kind, in chunks; columns of -inf keep no trace in what is stored between the passes."""
    head = Head.make(700, 48, 1200, bias=True)
    head.bias[::7] = -torch.inf
    head.target = head.target // 7 * 7 + 1
    ours = Operator(LOSS, at_once=True, workspace=1 << 20, compute_dtype=torch.bfloat16).check("autocast", head)
    assert (ours["dw"][::7] == 0).all() and (ours["db"][::7] == 0).all()


@pytest.mark.parametrize(
    "kind,compute",
    [
        pytest.param("budget", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("budget", torch.float32, marks=pytest.mark.slow),
        pytest.param("unbiased", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("unbiased", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_a_filter_computes_the_same_columns_from_kept_logits(kind, compute):
    """In chunks of blocks, and where a row's check fails: what the two operators give one after the other."""
    filter = f"{kind} 0.01"
    head = Head.make(700, 24, 1200, bias=True)
    head.w *= 3
    head.x[300] = 0.02 * head.x[300]  # a flat row among peaked ones, which loses too much
    tensors = {"seed": torch.tensor([11])} if kind == "unbiased" else {}
    named = {"input": head.x, "weight": head.w, "bias": head.bias, "target": head.target, **tensors}
    attributes = Attributes(grad_filter=filter, compute_dtype=compute, workspace=2 << 20).args()
    g = torch.where(torch.arange(700) == 300, 0.01, 1.0) / 700
    operands, names, needs = list(named.values()), " ".join(named), "input weight bias"

    def at_once(g, *operands):
        return WITH_GRADIENTS([g, -g], LOSS, list(operands), names, None, LOSS, needs, *attributes)[2:]

    def one_after_the_other(g, *operands):
        saved = FORWARD(list(operands), names, None, LOSS, True, *attributes)
        return BACKWARD([g, -g], LOSS, saved, list(operands), names, None, LOSS, needs, *attributes)

    ours, late = (torch.compile(f, fullgraph=True)(g, *operands) for f in (at_once, one_after_the_other))
    assert kernels() == 3
    exact = Attributes(compute_dtype=compute).args()
    saved = FORWARD(operands, names, None, LOSS, False, *exact)
    full = BACKWARD([g, -g], LOSS, saved, operands, names, None, LOSS, needs, *exact)
    for one, other, all_of_it in zip(ours, late, full, strict=True):
        assert error(one, other.double()) < 0.1 * error(other, all_of_it.double()) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_an_infinite_logit_is_not_lost_between_the_passes(dtype):
    """Its row has a gradient of NaN, as log_softmax gives it, and no other row has: the operator is for a loss."""
    head = Head.make(130, 16, 300, dtype)
    head.x[:, 0], head.w[:, 0] = 0, 0
    head.x[5, 0], head.w[7, 0] = torch.finfo(dtype).max, torch.finfo(dtype).max
    ours = Operator(LOSS, at_once=True).run(head)
    assert ours["lse"][5] == torch.inf and ours["lse"].isinf().sum() == 1
    assert ours["dx"][5].isnan().all() and ours["dx"].isnan().any(1).sum() == 1
    assert ours["dw"].isnan().all()


@pytest.mark.parametrize(
    "shape",
    [(1, 16, 131), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((37, 1, 131), (37, 16, 1)))],
    ids=["one row", "width one", "one column"],
)
def test_sizes_that_dynamo_compiles_apart(shape):
    """All others are in test_cpu_properties.py."""
    Operator(LOSS, at_once=True).check(str(shape), Head.make(*shape, bias=True))
    assert kernels() == 1


def test_confident_rows_keep_the_digits_of_their_gradient():
    """1 - p of the target is what is left of two numbers near 1: it must not come from logits stored in 16 bits."""
    head = Head.make(200, 32, 3000, torch.bfloat16)
    head.bias = torch.zeros(3000, dtype=torch.bfloat16)
    head.bias[head.target[:100]] = 24
    n = head.x.shape[0]
    tangents = [torch.ones(n) / n, -torch.ones(n) / n]
    out = Operator(LOSS, at_once=True).compiled(tangents, head.x, head.w, head.target, head.bias)
    wide = head.to(torch.float64)
    z = (wide.x @ wide.w.T + wide.bias).softmax(1)
    z[torch.arange(n), head.target] -= 1
    want = z.T @ wide.x / n
    rows = want[head.target[:100]].norm(dim=1)
    off = (out[3].double() - want)[head.target[:100]].norm(dim=1)
    assert (off / rows).max() < 3e-2


@pytest.mark.slow
def test_a_short_block_at_the_end_of_a_chunk_is_not_the_last_one():
    """Chunks of 192 rows in blocks of 128: dW is multiplied by the classes' factors once, behind the last chunk."""
    head = Head.make(440, 512, 3712).with_factors(rows=False)
    Operator(LOSS, at_once=True, workspace=4_500_000).check("factors in chunks", head)
    assert kernels() == 1


@pytest.mark.slow
def test_three_threads(three_threads):
    """In chunks, and with nothing kept between the passes."""
    head = Head.make(500, 71, 1003, bias=True)
    for workspace in (1 << 20, 1 << 18):
        operator = Operator(LOSS, at_once=True, workspace=workspace)
        operator.check_threads(f"{workspace} bytes", head, three_threads, row_mask=some_rows(500))
    assert kernels() == 2


def step(fn, x, w, t, factor):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = fn(x, w, t)
    (loss * factor).backward()
    return loss.detach(), x.grad, w.grad


def loss_of(x, w, t):
    return F.cross_entropy(F.linear(x, w), t)


@pytest.mark.parametrize("workspace_mb", [pytest.param(8, marks=pytest.mark.slow), "auto"])
def test_a_compiled_loss_uses_it_and_holds_one_gradient_of_the_weight(workspace_mb):
    n, d, v = 512, 64, 9000
    torch._dynamo.reset()
    scratch = n * v * 4 if workspace_mb == "auto" else workspace_mb << 20
    x, w = torch.randn(n, d), torch.randn(v, d) / 8
    t = torch.randint(0, v, (n,))
    t[::4] = -100
    compiled = torch.compile(loss_of, backend="cce", options={"workspace_mb": workspace_mb})
    for factor in (1.0, 1 / 3):
        want, ours = step(loss_of, x, w, t, factor), step(compiled, x, w, t, factor)
        for a, b in zip(ours, want, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-8)
    assert kernels() == 1  # the backward only multiplies
    leaves = x.requires_grad_(), w.requires_grad_()
    with Allocations() as a:
        compiled(*leaves, t).backward()
    gradients = x.nbytes + w.nbytes
    assert gradients <= a.peak <= gradients + scratch + 64 * n
    assert a.largest <= scratch


@pytest.mark.slow
def test_no_active_row_gives_nan_and_gradients_of_zero_as_eager():
    x, w, t = torch.randn(20, 8), torch.randn(5000, 8), torch.full((20,), -100)
    for ours, want in zip(
        step(torch.compile(loss_of, backend="cce"), x, w, t, 1.0), step(loss_of, x, w, t, 1.0), strict=True
    ):
        torch.testing.assert_close(ours, want, equal_nan=True)


def site(fn, *inputs, **options):
    with cce_inductor.config.patch(**options):
        (found,) = cce_inductor.explain(fn, *inputs).sites
    return found


def test_explain_names_the_kernel():
    x, w, t = torch.randn(20, 8, requires_grad=True), torch.randn(5000, 8), torch.randint(0, 5000, (20,))
    assert site(loss_of, x, w, t).kernel == "C++ kernel, gradients formed in the forward"
    assert site(loss_of, x, w, t, gradients_in_forward=False).kernel == "C++ kernel"
    with torch.no_grad():
        assert site(loss_of, x, w, t).kernel == "C++ kernel"
    per_row = site(lambda x, w, t: F.cross_entropy(F.linear(x, w), t, reduction="none"), x, w, t)
    assert per_row.kernel == "C++ kernel"  # its tangents are not known beforehand
    assert site(loss_of, x, w, t, compiler="aot_eager").kernel == "eager implementation"


@pytest.mark.parametrize("rows,kept", [pytest.param(120, False, marks=pytest.mark.slow), (400, True)])
def test_logits_are_kept_in_less_memory_than_they_take(rows, kept):
    """What is kept, and all other scratch, is less than the logits: of few rows too little is left to keep."""
    x, w, t = torch.randn(rows, 8, requires_grad=True), torch.randn(5000, 8), torch.randint(0, 5000, (rows,))
    assert ("gradients formed" in site(loss_of, x, w, t).kernel) == kept


def test_two_losses_leave_their_gradients_to_the_backward():
    """Each would hold a gradient of its weight from the forward on."""

    def two(x, w, t):
        z = F.linear(x, w)
        return F.cross_entropy(z[:10], t[:10]) + F.cross_entropy(z[10:], t[10:])

    x, w, t = torch.randn(20, 8, requires_grad=True), torch.randn(5000, 8), torch.randint(0, 5000, (20,))
    with cce_inductor.config.patch():
        assert {s.kernel for s in cce_inductor.explain(two, x, w, t).sites} == {"C++ kernel"}


def test_a_dtype_without_a_kernel_is_declined_while_its_logits_fit_in_memory():
    x, w, t = torch.randn(20, 8).double(), torch.randn(5000, 8).double(), torch.randint(0, 5000, (20,))
    found = site(loss_of, x, w, t)
    assert not found.fused and "float64 is none of float32, bfloat16 and float16" in found.reason
    large = Problem(1 << 20, 4096, 1 << 18, "cpu", (torch.float64,) * 2, torch.float64, 64 << 20, 1 << 41)
    assert choose(large).kernel.startswith("eager implementation: ") and not choose(large).refusal


def problem(n, d, v, dtype, compute=None, workspace=64 << 20):
    compute = compute or dtype
    return Problem(n, d, v, "cpu", (dtype, dtype), compute, workspace, n * v * compute.itemsize)


def test_where_it_pays():
    fp32, bf16 = torch.float32, torch.bfloat16
    assert choose(problem(1024, 1024, 32768, fp32)).gradients_in_forward
    assert choose(problem(10**6, 1024, 32768, fp32)).gradients_in_forward  # chunks: any number of rows
    assert not choose(problem(512, 640, 262144, fp32)).gradients_in_forward  # 48 rows at a time
    # Where bfloat16 is multiplied in fp32, 64 rows of logits are more than the 4 MiB that are saved.
    assert choose(problem(64, 256, 32768, bf16)).gradients_in_forward == multiplies_bfloat16()
    assert not choose(problem(10**5, 1024, 32768, bf16)).gradients_in_forward  # dW in 16 bits cannot be added up
    assert choose(problem(10**5, 1024, 32768, fp32, bf16)).gradients_in_forward
    assert not choose(problem(64, 256, 32768, torch.float16)).gradients_in_forward  # scaled losses
    assert element_dtype(bf16) == (bf16 if multiplies_bfloat16() else fp32)
