"""Gradients: only the wanted ones are computed, twice when asked, never silently wrong; the same compiled."""

import pytest
import torch
from head_oracle import Head, cross_entropy, error

import cce_inductor
from cce_inductor.ops import reference


@pytest.fixture
def backward_calls(monkeypatch):
    """The `needs` of every call of the backward operator."""
    calls = []
    backward = reference.backward

    def spy(call, tangents, saved, needs):
        calls.append(" ".join(needs))
        return backward(call, tangents, saved, needs)

    monkeypatch.setattr(reference, "backward", spy)
    return calls


def loss_of(head: Head, **kwargs) -> torch.Tensor:
    return cce_inductor.linear_cross_entropy(head.x, head.w, head.target, bias=head.bias, **kwargs)


@pytest.mark.parametrize("wanted", ["x", "w", "b", "xw", "xb", "wb", "xwb"])
@pytest.mark.parametrize("compiled", [False, True])
def test_only_the_gradients_wanted_are_computed(wanted, compiled, backward_calls, small_tiles):
    head = Head.make(bias=True)
    every = {name: t for name, t in head.gradients(cross_entropy).items() if name != "loss"}
    leaves = {"dx": head.x, "dw": head.w, "db": head.bias}
    for name, t in leaves.items():
        t.requires_grad_(name[1] in wanted)
    fn = torch.compile(loss_of, backend="aot_eager") if compiled else loss_of
    fn(head).backward()
    long_names = {"x": "input", "w": "weight", "b": "bias"}
    assert backward_calls == [" ".join(long_names[letter] for letter in wanted)]
    for name, t in leaves.items():
        if name[1] in wanted:
            assert error(t.grad, every[name]) < 1e-6
        else:
            assert t.grad is None


def test_nothing_is_kept_where_no_gradient_is_wanted(backward_calls):
    head = Head.make()
    assert not loss_of(head).requires_grad
    head.w.requires_grad_()
    with torch.no_grad():
        assert loss_of(head).grad_fn is None
    with torch.inference_mode():
        assert loss_of(head).grad_fn is None
    assert not backward_calls


def test_only_tangents_that_exist_are_passed_on(monkeypatch):
    tangent_names = []
    backward = reference.backward
    monkeypatch.setattr(
        reference,
        "backward",
        lambda call, tangents, *rest: tangent_names.append(set(tangents)) or backward(call, tangents, *rest),
    )
    head = Head.make()
    head.x.requires_grad_()
    lse, target_logit = cce_inductor.linear_logsumexp(head.x, head.w, head.target)
    target_logit.sum().backward(retain_graph=True)
    assert error(head.x.grad, head.w[head.target]) < 1e-6
    head.x.grad = None
    lse.sum().backward()
    assert error(head.x.grad, (head.x @ head.w.T).softmax(1) @ head.w) < 1e-6
    assert tangent_names == [{"target_logit"}, {"lse"}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_backwards_give_the_same_bits(dtype, small_tiles):
    head = Head.make(dtype=dtype, bias=True)
    leaves = [t.requires_grad_() for t in (head.x, head.w, head.bias)]
    loss = loss_of(head, ignore_index=3)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    again = torch.autograd.grad(loss_of(head, ignore_index=3), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_torch_compile_refuses_a_second_derivative_in_its_own_words():
    head = Head.make()
    head.x.requires_grad_(), head.w.requires_grad_()
    with pytest.raises(RuntimeError, match="double backward"):
        (grad,) = torch.autograd.grad(torch.compile(loss_of, backend="aot_eager")(head), head.x, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize(
    "kind,arguments",
    [
        ("exact", {}),
        ("softcap and smoothing", {"softcap": 2.0, "scale": 0.7, "label_smoothing": 0.1, "z_loss": 0.01}),
        ("rows", {"ignore_index": 3, "reduction": "sum"}),
    ],
)
def test_a_second_derivative(kind, arguments):
    """From all logits."""
    head = Head.make(9, 5, 17, torch.float64, bias=True)
    head.x.requires_grad_(), head.w.requires_grad_(), head.bias.requires_grad_()
    leaves = [head.x, head.w, head.bias]

    def twice(fn, **given):
        first = torch.autograd.grad(fn(*leaves[:2], head.target, bias=head.bias, **given), leaves, create_graph=True)
        penalty = sum((g.square() * (1 + torch.arange(g.shape[-1]))).sum() for g in first)
        return [*first, *torch.autograd.grad(penalty, leaves)]

    expected = twice(cross_entropy, **arguments)
    for one, other in zip(twice(cce_inductor.linear_cross_entropy, **arguments), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_target_column_keeps_its_precision():
    """Confident rows, p_t near 1: rounding p_t to 16 bits before 1 is taken from it would lose the gradient."""
    torch.manual_seed(0)
    head = Head.make(64, 32, 256, torch.bfloat16)
    head.x = (head.w[head.target].double() * 4 + torch.randn(64, 32) * 0.1).to(torch.bfloat16)
    head.x[:, 0] *= 2
    exact = head.to(torch.float64).gradients(cross_entropy)
    result = head.gradients(cce_inductor.linear_cross_entropy)
    eager = head.gradients(cross_entropy)
    assert exact["loss"] < 0.1
    assert error(result["dx"], exact["dx"]) < 4e-3 and error(result["dw"], exact["dw"]) < 4e-3
    assert error(eager["dw"], exact["dw"]) > 4e-3  # the case is hard


CASES = {
    "plain": {},
    "everything": {
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "softcap": 5.0,
        "scale": 0.5,
        "ignore_index": 3,
        "reduction": "sum",
    },
    "rows": {"reduction": "none", "label_smoothing": 0.1},
}


@pytest.mark.parametrize(
    "backend,case,dynamic",
    [("aot_eager", case, dynamic) for case in CASES for dynamic in (False, True)]
    + [pytest.param("inductor", *case, marks=pytest.mark.slow) for case in (("everything", False), ("plain", True))],
)
def test_compiled_agrees_with_eager(case, dynamic, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    kwargs = CASES[case]
    fn = torch.compile(cce_inductor.linear_cross_entropy, backend=backend, dynamic=dynamic, fullgraph=True)
    for n in (37, 21, 64) if dynamic else (37,):
        head = Head.make(n, bias=True, seed=n)
        tangent = torch.randn(n) if kwargs.get("reduction") == "none" else None
        compiled = head.gradients(fn, tangent, **kwargs)
        eager = head.gradients(cce_inductor.linear_cross_entropy, tangent, **kwargs)
        for name in eager:
            assert error(compiled[name], eager[name]) < 1e-6, (n, name)
    if dynamic:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_logsumexp_compiled():
    head = Head.make(bias=True)
    fn = torch.compile(cce_inductor.linear_logsumexp, backend="aot_eager", fullgraph=True)
    for ours, want in zip(
        fn(head.x, head.w, head.target, bias=head.bias, softcap=3.0),
        cce_inductor.linear_logsumexp(head.x, head.w, head.target, bias=head.bias, softcap=3.0),
        strict=True,
    ):
        assert torch.equal(ours, want)


def test_hidden_states_of_any_rank():
    head = Head.make(24)
    want = cce_inductor.linear_cross_entropy(head.x, head.w, head.target, reduction="none")
    for shape in ((2, 12), (2, 3, 4), (24, 1)):
        x, target = head.x.reshape(*shape, 16), head.target.reshape(shape)
        ours = cce_inductor.linear_cross_entropy(x, head.w, target, reduction="none")
        assert torch.equal(ours, want.reshape(shape))
        assert cce_inductor.linear_logsumexp(x, head.w, target)[0].shape == shape
    one = cce_inductor.linear_cross_entropy(head.x[0], head.w, head.target[0], reduction="none")
    assert one.shape == () and torch.allclose(one, want[0])
