"""The log-sum-exp of all classes but the target: the eager implementation and the C++ kernels against all logits."""

import sys
from pathlib import Path

import pytest
import torch
from head_oracle import Head, some_rows
from torch._dynamo.utils import counters

from cce_inductor.lowering.register import register
from cce_inductor.ops.call import LABELS, Attributes
from cce_inductor.ops.library import FORWARD

sys.path.insert(0, str(Path(__file__).parent.parent / "lowering"))
from operators import Operator, compare, differentiate, forward, from_logits

NAMES = "lse_rest target_logit logit_sum argmax"


def confident(dtype: torch.dtype, bias: bool = True) -> Head:
    """A head most of whose rows give nearly all mass to their target."""
    head = Head.make(n=150, d=24, v=333, dtype=torch.float32, bias=bias)
    head.x[:120] += 8 * head.w[head.target[:120]]
    return head.to(dtype)


def labels(n: int = 150, v: int = 333) -> dict[str, torch.Tensor]:
    """One of each row, and of each class, which lie in every second place: of 64 bits, and some rows have one alone."""
    of_classes = torch.randint(40, (v, 2), generator=torch.Generator().manual_seed(3)) << 40
    return {"row_label": torch.arange(n) % 41 << 40, "class_label": of_classes[:, 1]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, small_tiles):
    for softcap, masked, left_out in ((0.0, False, {}), (5.0, True, {}), (0.0, True, labels()), (5.0, False, labels())):
        head, attributes = confident(dtype), Attributes(scale=0.7, softcap=softcap)
        mask = some_rows(150) if masked else None
        ours = differentiate(forward(NAMES, attributes), head, NAMES, row_mask=mask, **left_out)
        compare(f"{dtype}, {softcap}, {masked}", ours, head, NAMES, attributes, row_mask=mask, **left_out)


@pytest.mark.parametrize(
    "dtype,softcap", [(torch.float32, 5.0), pytest.param(torch.bfloat16, 0.0, marks=pytest.mark.slow)]
)
def test_compiled(dtype, softcap):
    register()
    torch._dynamo.reset()
    counters.clear()
    operator = Operator(NAMES, scale=0.7, softcap=softcap, workspace=1 << 18)
    operator.check(f"{dtype}", confident(dtype), row_mask=some_rows(150))
    assert counters["inductor"]["cpp_templated_kernel_counter"] == 2


@pytest.mark.parametrize(
    "dtype,softcap,masked",
    [
        (torch.float32, 0.0, True),
        *(pytest.param(d, 5.0, False, marks=pytest.mark.slow) for d in (torch.float32, torch.bfloat16)),
    ],
)
def test_compiled_with_labels(dtype, softcap, masked):
    register()
    torch._dynamo.reset()
    counters.clear()
    operator = Operator(NAMES, scale=0.7, softcap=softcap, workspace=1 << 18)
    operator.check(f"{dtype}", confident(dtype), row_mask=some_rows(150) if masked else None, **labels())
    assert counters["inductor"]["cpp_templated_kernel_counter"] == 2


def test_low_is_what_rounding_left():
    head = confident(torch.float32)
    x, w = ((tensor * 16).round() / 16 for tensor in (head.x, head.w))  # exact, and so are their products
    given = [x, w, head.target, torch.full((333,), 4096.0)]
    names = "input weight target bias", None, "lse_rest lse_rest_low target_logit", False
    rest, low, _ = FORWARD(given, *names, *Attributes().args())
    exact, *_ = FORWARD([t.double() if t.is_floating_point() else t for t in given], *names, *Attributes().args())
    assert ((rest.double() + low - exact).abs() < (rest.double() - exact).abs().max() / 50).all()


def test_no_other_class():
    """The log-sum-exp of nothing is -inf; where nothing comes back to it, nothing is NaN."""
    x, w, t = torch.randn(3, 4).requires_grad_(), torch.randn(1, 4).requires_grad_(), torch.zeros(3, dtype=torch.int64)
    rest, z = FORWARD([x, w, t], "input weight target", None, "lse_rest target_logit", True, *Attributes().args())
    assert (rest == -torch.inf).all()
    loss = torch.nn.functional.softplus(rest - z).sum()
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (x, w)))


def test_second_derivatives_are_those_of_the_logits():
    head, names = Head.make(9, 5, 12, torch.float64), "lse_rest target_logit"
    results = []
    for fn in (forward(names, Attributes()), from_logits(names, Attributes())):
        x, w = head.x.clone().requires_grad_(), head.w.clone().requires_grad_()
        rest, z = fn(x, w, head.target, row_label=torch.arange(9) // 2, class_label=torch.arange(12) // 3)
        first = torch.autograd.grad(torch.nn.functional.softplus(rest - z).sum(), (x, w), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, w)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("others", ["lse", "lse entropy"])
def test_not_in_one_call_with_the_whole_sum(others):
    head = Head.make()
    with pytest.raises(RuntimeError, match="two calls"):
        names = f"lse_rest target_logit {others}"
        FORWARD([head.x, head.w, head.target], "input weight target", None, names, False, *Attributes().args())


@pytest.mark.parametrize(
    "given,message",
    [
        ({"row_label": torch.zeros(37, dtype=torch.int64)}, "row_label and class_label come together"),
        ({"row_label": torch.zeros(37), "class_label": torch.zeros(131, dtype=torch.int64)}, "row_label must hold"),
        (
            dict.fromkeys(LABELS, torch.zeros(37, dtype=torch.int64)),
            r"class_label must be \(131,\)",
        ),
    ],
)
def test_labels_that_do_not_fit(given, message):
    head = Head.make()
    operands = [head.x, head.w, head.target, *given.values()]
    names = " ".join(["input weight target", *given])
    with pytest.raises(RuntimeError, match=message):
        FORWARD(operands, names, None, "lse_rest target_logit", False, *Attributes().args())
