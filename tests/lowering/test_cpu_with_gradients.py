"""The CPU kernel that forms gradients in the forward, with every way to cut its work; and when it is chosen."""

import pytest
import torch
import torch.nn.functional as F
from head_oracle import Head, check_error_rule, logits, some_rows, statistics
from test_memory import Allocations
from torch._dynamo.utils import counters

import cce_inductor
from cce_inductor.lowering.choose import choose
from cce_inductor.lowering.cpu import element_dtype, multiplies_bfloat16
from cce_inductor.lowering.register import register
from cce_inductor.ops.call import Attributes
from cce_inductor.ops.choice import Problem
from cce_inductor.ops.with_gradients import WITH_GRADIENTS
from cce_inductor.version import source_hash


@pytest.fixture(autouse=True)
def lowerings():
    register()
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tangents_of(n: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.rand(n, generator=generator) - 0.4) / 8 for _ in range(count)]


def operator(names: str, **attributes):
    """The operator as a function of tensors: statistics, then the gradients of all that may have one."""
    arguments = Attributes(**{"version": source_hash(), **attributes}).args()

    def call(tangents, x, w, target, bias=None, column_weight=None, active=None):
        operands = {"input": x, "weight": w, "target": target, "bias": bias, "column_weight": column_weight}
        given = {name: t for name, t in operands.items() if t is not None}
        needs = "input weight bias" if bias is not None else "input weight"
        floats = " ".join(n for n in names.split() if n != "argmax")
        return WITH_GRADIENTS(tangents, floats, list(given.values()), " ".join(given), active, names, needs, *arguments)

    return call


def from_logits(head: Head, names: str, tangents, scale=1.0, softcap=0.0, column_weight=None, active=None, **_):
    leaves = [t.detach().clone().requires_grad_() for t in (head.x, head.w, head.bias) if t is not None]
    z = logits(leaves[0], leaves[1], leaves[2] if head.bias is not None else None, scale, softcap or None)
    out = statistics(names, z, head.target, column_weight)
    out = out if active is None else [torch.where(active, t, 0) for t in out]
    floats = [t for t in out if t.is_floating_point()]
    total = sum((t * g.to(t.dtype)).sum() for t, g in zip(floats, tangents, strict=True))
    found = dict(zip(names.split(), [t.detach() for t in out], strict=True))
    return found | dict(zip(["dx", "dw", "db"], torch.autograd.grad(total, leaves), strict=False))


def check(case: str, compiled, head: Head, names: str, compute_dtype=None, column_weight=None, active=None, **options):
    tangents = tangents_of(head.x.shape[0], len([n for n in names.split() if n != "argmax"]))
    out = compiled(tangents, head.x, head.w, head.target, head.bias, column_weight, active)
    gradients = ["dx", "dw"] + ["db"] * (head.bias is not None)
    ours = dict(zip([*names.split(), *gradients], out, strict=True))
    for name, want in (("dx", head.x), ("dw", head.w), ("db", head.bias)):
        assert name not in ours or (ours[name].dtype, ours[name].shape) == (want.dtype, want.shape)
    rounded = head if compute_dtype is None else head.to(compute_dtype)
    wide = None if column_weight is None else column_weight.double()
    exact = from_logits(head.to(torch.float64), names, tangents, column_weight=wide, active=active, **options)
    eager = from_logits(rounded, names, tangents, column_weight=column_weight, active=active, **options)
    if "argmax" in names:
        assert torch.equal(ours.pop("argmax"), exact.pop("argmax")), case
        eager.pop("argmax")
    check_error_rule(case, ours, eager, exact, compute_dtype or head.x.dtype)
    return ours


EVERY = "lse target_logit logit_sum entropy argmax"


def test_float32_kept_in_full_in_chunks_and_not_at_all():
    """One chunk, several, and a workspace too small for any: the same numbers, within the rule."""
    options = {"scale": 0.7, "softcap": 5.0}
    weight = torch.rand(1003)
    for workspace, case in ((64 << 20, "one chunk"), (1 << 20, "chunks"), (1 << 18, "nothing kept")):
        compiled = torch.compile(operator(EVERY, workspace=workspace, **options), dynamic=True)
        for n in (137, 500):
            head = Head.make(n, 90, 1003, bias=True, seed=n)
            check(f"{case}, {n} rows", compiled, head, EVERY, column_weight=weight, active=some_rows(n), **options)
            check(f"{case}, {n} rows, all active", compiled, head, EVERY, column_weight=weight, **options)
    assert counters["inductor"]["cpp_templated_kernel_counter"] == 6


def test_bfloat16_kept_in_part():
    """16-bit dW: one chunk, of which the last rows are kept, in 16 bits where the CPU multiplies bfloat16."""
    head = Head.make(300, 70, 2500, torch.bfloat16, bias=True)
    for workspace in (64 << 20, 1 << 20, 1 << 17):
        compiled = torch.compile(operator("lse target_logit", workspace=workspace))
        ours = check(f"bfloat16, {workspace} bytes", compiled, head, "lse target_logit")
        again = compiled(tangents_of(300, 2), head.x, head.w, head.target, head.bias)
        assert all(torch.equal(a, b) for a, b in zip(ours.values(), again, strict=True))  # deterministic


def test_float32_weights_in_bfloat16_and_masked_columns():
    """Autocast's kind, in chunks; columns of -inf keep no trace in what is stored between the passes."""
    head = Head.make(700, 48, 1200, bias=True)
    head.bias[::7] = -torch.inf
    head.target = head.target // 7 * 7 + 1
    options = {"workspace": 1 << 20, "compute_dtype": torch.bfloat16}
    ours = check(
        "autocast", torch.compile(operator("lse target_logit", **options)), head, "lse target_logit", **options
    )
    assert (ours["dw"][::7] == 0).all() and (ours["db"][::7] == 0).all()


def test_confident_rows_keep_the_digits_of_their_gradient():
    """1 - p of the target is what is left of two numbers near 1: it must not come from logits stored in 16 bits."""
    head = Head.make(200, 32, 3000, torch.bfloat16)
    head.bias = torch.zeros(3000, dtype=torch.bfloat16)
    head.bias[head.target[:100]] = 24
    n = head.x.shape[0]
    tangents = [torch.ones(n) / n, -torch.ones(n) / n]
    out = torch.compile(operator("lse target_logit"))(tangents, head.x, head.w, head.target, head.bias)
    wide = head.to(torch.float64)
    z = (wide.x @ wide.w.T + wide.bias).softmax(1)
    z[torch.arange(n), head.target] -= 1
    want = z.T @ wide.x / n
    rows = want[head.target[:100]].norm(dim=1)
    off = (out[3].double() - want)[head.target[:100]].norm(dim=1)
    assert (off / rows).max() < 3e-2


def step(fn, x, w, t, factor):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = fn(x, w, t)
    (loss * factor).backward()
    return loss.detach(), x.grad, w.grad


def loss_of(x, w, t):
    return F.cross_entropy(F.linear(x, w), t)


def test_a_compiled_loss_uses_it_and_holds_one_gradient_of_the_weight():
    n, d, v = 512, 64, 9000
    x, w = torch.randn(n, d), torch.randn(v, d) / 8
    t = torch.randint(0, v, (n,))
    t[::4] = -100
    compiled = torch.compile(loss_of, backend="cce", options={"workspace_mb": 8})
    for factor in (1.0, 1 / 3):
        want, ours = step(loss_of, x, w, t, factor), step(compiled, x, w, t, factor)
        for a, b in zip(ours, want, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-8)
    assert counters["inductor"]["cpp_templated_kernel_counter"] == 1  # the backward only multiplies
    leaves = x.requires_grad_(), w.requires_grad_()
    with Allocations() as a:
        compiled(*leaves, t).backward()
    gradients = x.nbytes + w.nbytes
    assert gradients <= a.peak <= gradients + (8 << 20) + 64 * n
    assert a.largest <= 8 << 20 < n * v * 4


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
    assert choose(problem(64, 256, 32768, bf16)).gradients_in_forward
    assert not choose(problem(10**5, 1024, 32768, bf16)).gradients_in_forward  # dW in 16 bits cannot be added up
    assert choose(problem(10**5, 1024, 32768, fp32, bf16)).gradients_in_forward
    assert not choose(problem(64, 256, 32768, torch.float16)).gradients_in_forward  # scaled losses
    assert element_dtype(bf16) == (bf16 if multiplies_bfloat16() else fp32)
