"""Softcaps where the logits are far beyond them: their derivative keeps its digits, and infinity is a number as any."""

import math

import pytest
import torch
from head_oracle import Head, call_forward, check_error_rule, error, logits, statistics
from torch import Tensor

from cce_inductor.ops.softcap import FORMS, softcapped

EVERY = "lse target_logit logit_sum entropy"
CAP = 3.0


def by_angles(u: Tensor) -> Tensor:
    """t / sqrt(1 + t²) = sin(atan(t)): no square that could be infinite."""
    return CAP * torch.sin(torch.atan(u / CAP))


def total(out: list[Tensor]) -> Tensor:
    return sum(((i + 1) * t).mean() for i, t in enumerate(out))


def ours(form: str):
    def loss(x, w, target, bias):
        return total(call_forward(Head(x, w, target), EVERY, bias=bias, softcap=CAP, softcap_form=form))

    return loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("times", [0.01, 30.0, 1000.0])
def test_far_beyond_the_softcap(form, times, small_tiles):
    head = Head.make(bias=True)
    head.x *= times
    head.bias *= times

    def plain(x, w, target, bias):
        return total(statistics(EVERY, logits(x, w, bias, 1.0, CAP, form), target))

    exact = head.to(torch.float64).gradients(plain)
    check_error_rule(form, head.gradients(ours(form)), head.gradients(plain), exact, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e25, math.inf])
def test_huge_and_infinite_logits(dtype, size, small_tiles):
    """Whose square is infinite: cap and -cap, without a gradient; what a program that squares them makes NaN, or 0."""
    head = Head.make(dtype=dtype, bias=True)
    head.bias[:60], head.bias[100:110] = -size, size
    bound = lambda x, w, target, bias: total(statistics(EVERY, by_angles(x @ w.T + bias), target))  # noqa: E731
    result, exact = head.gradients(ours("rsqrt")), head.to(torch.float64).gradients(bound)
    assert all(t.isfinite().all() for t in result.values())
    beyond = head.bias.abs() > 100
    assert (result["db"][beyond].abs() <= 1e-70).all() and result["db"][~beyond].all()
    for name, want in exact.items():
        assert error(result[name], want) < 100 * torch.finfo(dtype).eps, name
    head.bias[70] = math.nan
    assert all(
        t.isnan().all() for t in call_forward(head, EVERY, bias=head.bias, softcap=CAP, softcap_form="rsqrt")[::2]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_by_operations_that_autograd_knows(dtype):
    u = torch.tensor([0.0, 1e-3, -2.0, 3.0, 60.0, -1e25, math.inf], dtype=dtype, requires_grad=True)
    exact = u.detach().double().requires_grad_()
    for form, want in {"tanh": CAP * torch.tanh(exact / CAP), "rsqrt": by_angles(exact)}.items():
        made = softcapped(u, CAP, form, dtype)
        (got,), (slope,) = torch.autograd.grad(made.sum(), u), torch.autograd.grad(want.sum(), exact)
        torch.testing.assert_close(made.double(), want, rtol=1e-6, atol=0)
        torch.testing.assert_close(got.double(), slope, rtol=1e-4, atol=1e-30)
        assert softcapped(torch.full_like(u, math.nan), CAP, form, dtype).isnan().all()
