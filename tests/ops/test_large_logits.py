"""Logits with a large part in common. A log-sum-exp of 4096 has 12 of its 24 bits left for what a softmax is made of.

All numbers are multiples of 1/16, and so the logits exact in fp32: what is off is what is made of them. Eager, which
subtracts the largest logit first, is off by little.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from head_oracle import Head, call_forward, check_error_rule, cross_entropy, loss_with_gradients

from cce_inductor import config, linear_cross_entropy, linear_logsumexp
from cce_inductor.ops.losses import CrossEntropy

OFFSETS = (0.0, 4096.0, -4096.0, 16384.0)


def large(offset: float, n: int = 37, d: int = 16, v: int = 131) -> Head:
    """The rows of the weight have a component in common, which a gradient whose rows do not add up to 0 would show."""
    head = Head.make(n, d, v, bias=True)
    head.x, head.w, head.bias = ((t * 16).round() / 16 for t in (head.x, head.w, head.bias))
    head.x[:, 0], head.w[:, 0] = 1.0, offset
    return head


def check(ours: Callable, plain: Callable, head: Head, case: str, **arguments) -> None:
    result, eager = head.gradients(ours, **arguments), head.gradients(plain, **arguments)
    check_error_rule(case, result, eager, head.to(torch.float64).gradients(plain, **arguments), torch.float32)


@pytest.mark.parametrize("offset", OFFSETS)
def test_statistics(offset, small_tiles):
    head = large(offset)
    lse, low, entropy = call_forward(head, "lse lse_low entropy", bias=head.bias)
    z = F.linear(*(t.double() for t in (head.x, head.w, head.bias)))
    log_p = z.log_softmax(1)
    assert ((lse.double() + low.double()) - z.logsumexp(1)).abs().max() < 1e-6
    assert (low.abs() <= lse.abs() * 2.0**-24).all() and (not offset or low.any())
    assert torch.allclose(entropy.double(), -(log_p.exp() * log_p).sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", OFFSETS)
def test_losses(offset, small_tiles):
    for arguments in ({}, {"reduction": "sum"}, {"class_weight": torch.rand(131)}):
        check(linear_cross_entropy, cross_entropy, large(offset), f"{offset} {arguments}", **arguments)


@pytest.mark.parametrize("offset", OFFSETS)
def test_label_smoothing(offset, small_tiles):
    """Of the sum of the logits is known what one number in fp32 holds, and that is as large as they are."""
    head = large(offset)
    ours, eager = (head.gradients(f, label_smoothing=0.1) for f in (linear_cross_entropy, cross_entropy))
    exact = head.to(torch.float64).gradients(cross_entropy, label_smoothing=0.1)
    assert (ours.pop("loss") - exact.pop("loss")).abs() < (abs(offset) + 8) * 2.0**-23
    check_error_rule(str(offset), ours, eager, exact, torch.float32)


@pytest.mark.parametrize("offset", OFFSETS)
def test_gradients_formed_in_the_forward(offset, small_tiles):
    ours = lambda x, w, t, bias: loss_with_gradients(x, w, t, bias, CrossEntropy())  # noqa: E731
    check(ours, cross_entropy, large(offset), str(offset))


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_filter_that_keeps_everything(offset, small_tiles):
    with config.patch(grad_filter=1e-9):
        check(linear_cross_entropy, cross_entropy, large(offset, n=200), str(offset))


def test_gradients_of_a_log_sum_exp(small_tiles):
    """Better than eager's, whose softmax is exp(z - lse) as well."""

    def ours(x, w, t, bias):
        return (linear_logsumexp(x, w, t, bias=bias)[0]).sum()

    head = large(4096.0)
    exact = head.to(torch.float64).gradients(lambda x, w, t, bias: F.linear(x, w, bias).logsumexp(1).sum())
    result = head.gradients(ours)
    for name in ("dw", "db"):
        assert (result[name] - exact[name]).norm() < 1e-6 * exact[name].norm()
