"""Bad and odd input: as `F.cross_entropy(F.linear(...))` does, or an error that is clearer."""

import math

import pytest
import torch
import torch.nn.functional as F
from head_oracle import Head, call_forward, cross_entropy, error, some_rows

import cce_inductor
from cce_inductor import linear_cross_entropy, linear_logsumexp

N, D, V = 37, 16, 131


@pytest.mark.parametrize("wrong", [-1, -101, V, 2**40])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_target_outside_the_vocabulary(wrong, compiled):
    head = Head.make()
    head.target[11] = wrong
    fn = torch.compile(linear_cross_entropy, backend="aot_eager") if compiled else linear_cross_entropy
    with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds.*131 classes"):
        fn(head.x, head.w, head.target)
    with pytest.raises(IndexError):
        F.cross_entropy(F.linear(head.x, head.w), head.target)
    assert linear_cross_entropy(head.x, head.w, head.target, ignore_index=wrong).isfinite()


def test_minus_100_is_a_target_like_any_other_beside_another_ignore_index():
    head = Head.make()
    head.target[3] = -100
    for ignore_index in (0, None):
        with pytest.raises(IndexError, match="Target -100"):
            linear_logsumexp(head.x, head.w, head.target, ignore_index=ignore_index)
    with pytest.raises(IndexError, match="Target -100"):
        linear_cross_entropy(head.x, head.w, head.target, ignore_index=0)


WRONG = {
    "int32 targets": ({"target": torch.zeros(N, dtype=torch.int32)}, TypeError, r"int64.*target\.long\(\)"),
    "bool targets": ({"target": torch.zeros(N, dtype=torch.bool)}, TypeError, "int64"),
    "class probabilities": ({"target": torch.rand(N, V)}, TypeError, "class probabilities need all logits"),
    "integer input": ({"input": torch.ones(N, D, dtype=torch.int64)}, RuntimeError, "input must be floating point"),
    "integer weight": ({"weight": torch.ones(V, D, dtype=torch.int64)}, RuntimeError, "weight must be floating point"),
    "another dtype": (
        {"weight": torch.ones(V, D).double()},
        RuntimeError,
        "input is torch.float32 but weight is torch.fl",
    ),
    "bias dtype": ({"bias": torch.ones(V).bfloat16()}, RuntimeError, "but bias is torch.bfloat16"),
    "another device": ({"weight": torch.ones(V, D, device="meta")}, RuntimeError, "weight is on meta, input on cpu"),
    "width": ({"weight": torch.ones(V, D + 1)}, ValueError, r"\(37, 16\) and weight \(131, 17\) differ in their last"),
    "transposed weight": ({"weight": torch.ones(D, V)}, ValueError, r"weight is \(V, D\)"),
    "weight with three dimensions": ({"weight": torch.ones(1, V, D)}, ValueError, r"weight \(V, D\)"),
    "scalar input": ({"input": torch.tensor(1.0)}, ValueError, r"input must be \(..., D\)"),
    "too few targets": ({"target": torch.zeros(N - 1, dtype=torch.int64)}, ValueError, r"one class per row.*\(37,\)"),
    "targets of another shape": ({"target": torch.zeros(N, 1, dtype=torch.int64)}, ValueError, "one class per row"),
    "bias": ({"bias": torch.ones(V - 1)}, RuntimeError, r"bias must be \(131,\), got \(130,\)"),
    "class_weight": ({"class_weight": torch.ones(V - 1)}, ValueError, r"class_weight must be \(131,\), got \(130,\)"),
    "reduction": ({"reduction": "average"}, ValueError, "reduction must be one of 'mean', 'sum', 'none'"),
    "label_smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0.0 and 1.0"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be positive"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    change, kind, message = WRONG[case]
    head = Head.make()
    arguments = {"input": head.x, "weight": head.w, "target": head.target, **change}
    with pytest.raises(kind, match=message):
        linear_cross_entropy(**arguments)
    if case in ("integer weight", "width", "bias"):  # the compiler's tracing says the same
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message):  # static: a size that changed before would have a name
            torch.compile(linear_cross_entropy, backend="aot_eager", dynamic=False)(**arguments)


def same_as_eager(head: Head, tolerance: float = 1e-5, tangent=None, **kwargs) -> dict[str, torch.Tensor]:
    result = head.gradients(linear_cross_entropy, tangent, **kwargs)
    eager = head.gradients(cross_entropy, tangent, **kwargs)
    for name, want in eager.items():
        assert error(result[name], want) <= tolerance, name
    return result


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction, smoothing):
    head = Head.make(0, bias=True)
    tangent = torch.ones(0) if reduction == "none" else None
    result = same_as_eager(head, tangent=tangent, reduction=reduction, label_smoothing=smoothing)
    assert result["loss"].shape == ((0,) if reduction == "none" else ())
    assert not result["dw"].any() and not result["db"].any()
    lse, target_logit = linear_logsumexp(head.x, head.w, head.target)
    assert lse.shape == target_logit.shape == (0,)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_row_ignored(reduction, smoothing):
    head = Head.make(bias=True)
    head.target.fill_(-100)
    tangent = torch.ones(N) if reduction == "none" else None
    result = same_as_eager(head, tangent=tangent, reduction=reduction, label_smoothing=smoothing)
    assert result["loss"].isnan().all() if reduction == "mean" else not result["loss"].any()
    assert not any(result[name].any() for name in ("dx", "dw", "db"))


@pytest.mark.parametrize("n,d,v", [(1, 1, 1), (3, 1, 5), (1, 16, 1), (5, 0, 7)])
def test_smallest_shapes(n, d, v):
    same_as_eager(Head.make(n, d, v, bias=True), label_smoothing=0.1)


LAYOUTS = {
    "every other column of the input": lambda h: {"x": torch.randn(N, 2 * D)[:, ::2]},
    "transposed input": lambda h: {"x": torch.randn(D, N).t()},
    "one row expanded": lambda h: {"x": torch.randn(1, D).expand(N, D)},
    "one column expanded": lambda h: {"x": torch.randn(N, 1).expand(N, D)},
    "a weight kept as (D, V)": lambda h: {"w": torch.randn(D, V).t()},
    "every other row of the weight": lambda h: {"w": torch.randn(2 * V, D)[::2]},
    "one class expanded": lambda h: {"w": torch.randn(1, D).expand(V, D)},
    "expanded bias": lambda h: {"bias": torch.randn(1).expand(V)},
    "strided bias": lambda h: {"bias": torch.randn(3 * V)[::3]},
    "one target expanded": lambda h: {"target": torch.tensor([7]).expand(N)},
    "strided targets": lambda h: {"target": torch.randint(V, (N, 3))[:, 1]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, small_tiles):
    head = Head.make(bias=True)
    changed = Head(**{**vars(head), **LAYOUTS[layout](head)})
    leaves = [t.detach().requires_grad_() for t in (changed.x, changed.w, changed.bias)]
    result = torch.autograd.grad(linear_cross_entropy(*leaves[:2], changed.target, bias=leaves[2]), leaves)
    plain = [t.contiguous() for t in leaves]
    want = torch.autograd.grad(cross_entropy(*plain[:2], changed.target.contiguous(), bias=plain[2]), plain)
    for ours, theirs in zip(result, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradient_of_an_expanded_base():
    row, w, target = torch.randn(1, D, requires_grad=True), torch.randn(V, D), torch.randint(V, (N,))
    (ours,) = torch.autograd.grad(linear_cross_entropy(row.expand(N, D), w, target), row)
    (want,) = torch.autograd.grad(cross_entropy(row.expand(N, D), w, target), row)
    assert error(ours, want) < 1e-5


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_columns_at_minus_infinity(softcap, small_tiles):
    """A bias that bars classes, a whole tile of them at the front: their gradients are 0, nothing turns NaN."""
    head = Head.make(bias=True)
    head.bias[:60] = head.bias[100] = -math.inf
    head.target = head.target % 40 + 60
    result = same_as_eager(head, softcap=softcap)
    assert all(t.isfinite().all() for t in result.values())
    assert softcap or not result["dw"][:60].any()


def test_columns_at_minus_infinity_before_very_low_logits(small_tiles):
    """The running maximum starts at -inf and goes on at -200, where exp(200) would overflow."""
    head = Head.make(bias=True)
    head.bias -= 200
    head.bias[:60] = -math.inf
    head.target = head.target % 40 + 60
    result = same_as_eager(head)
    assert all(t.isfinite().all() for t in result.values())


def test_a_target_at_minus_infinity():
    head = Head.make(bias=True)
    head.bias[5] = -math.inf
    head.target[:] = 5
    result = head.gradients(linear_cross_entropy)
    eager = head.gradients(cross_entropy)
    assert result["loss"] == eager["loss"] == math.inf
    assert all(error(result[name], eager[name]) < 1e-5 for name in ("dx", "db"))


def test_entropy_with_columns_at_minus_infinity(small_tiles):
    head = Head.make(bias=True)
    head.bias[:60] = -math.inf
    for t in (head.x, head.w, head.bias):
        t.requires_grad_()
    lse, entropy = call_forward(head, "lse entropy", bias=head.bias)
    (lse + entropy).sum().backward()
    rest = Head(head.x.detach(), head.w.detach()[60:], head.target % 71, head.bias.detach()[60:])
    for t in (rest.x, rest.w, rest.bias):
        t.requires_grad_()
    want = call_forward(rest, "lse entropy", bias=rest.bias)
    sum(want).sum().backward()
    assert error(lse, want[0]) < 1e-6 and error(entropy, want[1]) < 1e-5
    assert error(head.x.grad, rest.x.grad) < 1e-5 and error(head.w.grad[60:], rest.w.grad) < 1e-5
    assert not head.w.grad[:60].any() and not head.bias.grad[:60].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(dtype, small_tiles):
    head = Head.make(dtype=dtype)
    head.w[::2] *= 1e4 / (head.x @ head.w.T).abs().max()
    head.w[1::2] *= 1e-4
    assert 9e3 < (head.x @ head.w.T).abs().max() < 1.1e4
    result, exact = head.gradients(linear_cross_entropy), head.to(torch.float64).gradients(cross_entropy)
    for name, want in exact.items():
        assert result[name].isfinite().all()
        assert error(result[name], want) < 4 * torch.finfo(dtype).eps, name


def test_a_row_of_nan():
    """It spreads as in eager: to its own dx and loss, and to every row of dW and db."""
    head = Head.make(bias=True)
    head.x[4, 3] = math.nan
    result = same_as_eager(head, tangent=torch.ones(N), reduction="none")
    assert result["loss"].isnan().sum() == 1 and result["dx"].isnan().any(1).sum() == 1
    assert result["dw"].isnan().any(1).all()


def test_a_row_of_nan_that_is_ignored_has_no_part_in_the_loss_and_spreads_to_the_gradients():
    """The gradient of its softmax is 0 * NaN."""
    head = Head.make(bias=True)
    ignored = head.target == head.target[4]
    clean = head.gradients(linear_cross_entropy, ignore_index=int(head.target[4]))
    head.x[ignored] = math.nan
    result = same_as_eager(head, ignore_index=int(head.target[4]))
    assert torch.equal(result["loss"], clean["loss"])
    assert torch.equal(result["dx"].isnan().any(1), ignored) and result["dw"].isnan().all()


@pytest.mark.parametrize("names", ["lse target_logit", "lse target_logit logit_sum entropy argmax"])
def test_inactive_rows_do_not_count(names, small_tiles):
    head, row_mask = Head.make(), some_rows(N)
    head.x[~row_mask], head.target[~row_mask] = math.nan, 10**12
    x, w = head.x.requires_grad_(), head.w.requires_grad_()
    out = call_forward(head, names, row_mask=row_mask)
    assert all(not t[~row_mask].any() for t in out)
    tangent = torch.full((N,), math.nan).masked_fill(row_mask, 1)  # what 0 / 0 leaves behind in a masked mean
    result = torch.autograd.grad([t for t in out if t.requires_grad], [x, w], [tangent for t in out if t.requires_grad])
    rest = Head(x.detach()[row_mask].requires_grad_(), w.detach().requires_grad_(), head.target[row_mask])
    kept = [t for t in call_forward(rest, names) if t.requires_grad]
    want = torch.autograd.grad(kept, [rest.x, rest.w], [torch.ones_like(t) for t in kept])
    assert error(result[0][row_mask], want[0]) < 1e-5 and error(result[1], want[1]) < 1e-5
    assert not result[0][~row_mask].any()


def test_fresh_memory_is_never_read(monkeypatch, small_tiles):
    """The gradients are allocated empty; filled with NaN, as torch does for deterministic algorithms, nothing shows."""
    heads = [Head.make(), Head.make(0)]
    want = [head.gradients(linear_cross_entropy, reduction="sum") for head in heads]
    torch.use_deterministic_algorithms(True)
    try:
        result = [head.gradients(linear_cross_entropy, reduction="sum") for head in heads]
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(result, want, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_class_weight_gets_no_gradient():
    """Documented: weights of classes are constants."""
    head, class_weight = Head.make(), torch.rand(V, requires_grad=True)
    head.x.requires_grad_()
    loss = linear_cross_entropy(head.x, head.w, head.target, class_weight=class_weight, label_smoothing=0.1)
    loss.backward()
    assert class_weight.grad is None and head.x.grad is not None


def test_z_loss_is_the_mean_over_rows_that_count():
    head = Head.make()
    head.target[:5] = -100
    weight = torch.rand(V)
    kwargs = {"class_weight": weight}
    with_z = linear_cross_entropy(head.x, head.w, head.target, z_loss=0.5, **kwargs)
    without = linear_cross_entropy(head.x, head.w, head.target, **kwargs)
    lse = (head.x[5:] @ head.w.T).logsumexp(1)
    assert torch.allclose(with_z - without, 0.5 * (lse**2).mean(), rtol=1e-5)


def test_workspace_of_the_config_reaches_the_operator(monkeypatch):
    from cce_inductor.ops import reference

    seen = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda call: seen.append(call.attributes.workspace) or forward(call))
    head = Head.make()
    with cce_inductor.config.patch(workspace_mb=3):
        linear_cross_entropy(head.x, head.w, head.target)
    linear_cross_entropy(head.x, head.w, head.target)
    assert seen == [3 << 20, 64 << 20]
