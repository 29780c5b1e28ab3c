"""Losses whose gradients are formed in the forward: the operators."""

import pytest
import torch
from head_oracle import Head, check_error_rule, cross_entropy, loss_with_gradients
from test_divergences import JSD, with_parts
from test_two_heads import (
    EVERY,
    LOWS,
    OTHER_D,
    D,
    N,
    V,
    at_once,
    compare,
    heads,
    is_differentiated,
    tangent,
)
from torch.utils.flop_counter import FlopCounterMode

from cce_inductor.ops.call import Attributes
from cce_inductor.ops.library import BACKWARD, FORWARD
from cce_inductor.ops.losses import CrossEntropy
from cce_inductor.ops.with_gradients import ATTACH, WITH_GRADIENTS

ATTRIBUTES = Attributes(scale=0.7, softcap=4.0).args()
NAMES = "lse target_logit logit_sum"


def arguments(head: Head, needs: str = "input weight bias") -> tuple:
    given = [torch.rand(head.x.shape[0]) - 0.4 for _ in NAMES.split()]
    operands = [head.x, head.w, head.bias, head.target]
    row_mask = head.target % 3 != 0
    return given, NAMES, operands, "input weight bias target", row_mask, NAMES, needs, *ATTRIBUTES


def test_it_is_the_forward_and_then_the_backward():
    given, names, operands, operand_names, row_mask, _, needs, *_ = call = arguments(Head.make(bias=True))
    out = WITH_GRADIENTS(*call)
    stats = FORWARD(operands, operand_names, row_mask, NAMES, True, *ATTRIBUTES)
    grads = BACKWARD(given, names, stats, operands, operand_names, row_mask, NAMES, needs, *ATTRIBUTES)
    assert len(out) == 6 and all(torch.equal(a, b) for a, b in zip(out, [*stats, *grads], strict=True))


TWO_HEADS = f"{with_parts(JSD, 'other_skew(0.9)')} {EVERY.removeprefix(LOWS)} entropy target_logit logit_sum"


@pytest.mark.parametrize("frozen", ["other_", "input", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_of_two_heads_it_is_the_forward_and_then_the_backward(frozen, masked, small_tiles):
    """Bit by bit, with a tangent of every statistic that has one."""
    given = heads(torch.float64) | {"target": torch.arange(N), "column_weight": torch.rand(V).double()}
    wanted = [name for name in given if name not in ("target", "column_weight") and not name.startswith(frozen)]
    options, mask = Attributes(scale=0.7, softcap=6.0, other_scale=0.5), torch.arange(N) % 3 != 0 if masked else None
    ours = at_once(given, TWO_HEADS, options, mask, wanted=wanted)
    saved = FORWARD(list(given.values()), " ".join(given), mask, TWO_HEADS, True, *options.args())
    names = [name for name in TWO_HEADS.split() if is_differentiated(name)]
    call = list(given.values()), " ".join(given), mask, TWO_HEADS, " ".join(wanted), *options.args()
    grads = BACKWARD([tangent(name, N) for name in names], " ".join(names), saved, *call)
    assert len(names) == 11 and len(ours) == len(saved) + len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), [*saved, *grads], strict=True))
    compare(given, TWO_HEADS, options, mask, wanted, WITH_GRADIENTS, at_once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_two_heads_by_the_error_rule(dtype, small_tiles):
    compare(heads(dtype), f"{LOWS} divergence", Attributes(), operator=WITH_GRADIENTS, how=at_once)


def test_rows_of_two_heads_that_are_not_finite():
    """The tangent of lse is NaN in such a row, as arithmetic on it would give; all others are as they are."""
    given = heads()
    given["input"][3] = torch.inf
    ours = at_once(given, f"{LOWS} divergence", Attributes(), wanted=["input", "other_input"])
    for name in ("dinput", "dother_input"):
        assert ours[name][3].isnan().all() and ours[name].isnan().any(1).sum() == 1


def test_flops_of_two_heads():
    """A product of each head's logits, computed once, and one for each gradient."""
    given = heads()
    for needs, products in (("input weight", (3, 1)), ("input other_input other_weight", (2, 3))):
        with FlopCounterMode(display=False) as counter:
            at_once(given, f"{LOWS} divergence", Attributes(), wanted=needs.split())
        assert counter.get_total_flops() == 2 * N * V * (products[0] * D + products[1] * OTHER_D)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_of_two_heads(requires_grad):
    given = {name: t.requires_grad_(requires_grad) for name, t in heads().items()}
    names, options = f"{with_parts(JSD)} divergence", Attributes(other_softcap=5.0).args()
    tangents, mask = [torch.rand(N), torch.rand(N)], torch.arange(N) % 2 == 0
    call = tangents, f"{JSD} divergence", list(given.values()), " ".join(given), mask, names
    torch.library.opcheck(WITH_GRADIENTS, (*call, "input other_weight other_bias", *options))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    head = Head.make(9, 5, 40, bias=True)
    call = arguments(head)
    for t in call[2][:3]:
        t.requires_grad_(requires_grad)
    torch.library.opcheck(WITH_GRADIENTS, call)
    value = torch.tensor(2.0)
    gradients = [torch.randn_like(head.x), torch.randn_like(head.w)]
    torch.library.opcheck(ATTACH, (value, [head.x, head.w], gradients))


def test_attached_gradients_are_multiplied_by_the_tangent_and_keep_their_dtype():
    x, w = torch.randn(3, 2, dtype=torch.bfloat16).requires_grad_(), torch.randn(4, 2).requires_grad_()
    dx, dw = torch.randn(3, 2, dtype=torch.bfloat16), torch.randn(4, 2)
    value = torch.tensor(5.0)
    loss = ATTACH(value, [x, w], [dx, dw])
    assert loss.item() == 5.0 and loss is not value
    a, b = torch.autograd.grad(loss, [x, w], torch.tensor(0.3), retain_graph=True)
    assert torch.equal(a, (dx.float() * 0.3).bfloat16()) and torch.equal(b, dw * 0.3)
    one = torch.autograd.grad(loss, [x, w])
    assert torch.equal(one[0], dx) and torch.equal(one[1], dw)  # every bit, at the usual tangent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_loss_with_attached_gradients_against_eager(dtype):
    """Put together as the rewrite puts them, under a tangent that is no power of two."""
    loss = CrossEntropy(label_smoothing=0.1)

    def fused(x, w, target, bias):
        return loss_with_gradients(x, w, target, bias, loss)

    def plain(x, w, target, bias):
        return cross_entropy(x, w, target, bias=bias, label_smoothing=0.1)

    head = Head.make(dtype=dtype, bias=True)
    head.target[::5] = -100
    tangent = torch.tensor(1 / 3)
    exact = head.to(torch.float64).gradients(plain, tangent)
    check_error_rule(str(dtype), head.gradients(fused, tangent), head.gradients(plain, tangent), exact, dtype)
