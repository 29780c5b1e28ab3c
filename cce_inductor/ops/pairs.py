"""What a loss may ask of two sets of logits over one vocabulary: expected values of the one under the other's softmax.

Notation: `a` are the logits whose values are averaged, `b` those whose softmax `p_b` weighs them, of the same rows and
classes, and `p_a` the softmax of `a`. The rows of the table in statistics.py are these functions with one head's logits
for `a` and the other head's for `b`.

| function      | value                              | d / d a_j  | d / d b_j                              |
|---------------|------------------------------------|------------|----------------------------------------|
| expected      | E = sum p_b a                      | p_b        | p_b (a - E)                            |
| cross_entropy | H = -sum p_b log p_a               | p_a - p_b  | -p_b (log p_a + H)                     |
| divergence    | K = sum p_b (log p_b - log p_a)    | p_a - p_b  | p_b (log p_b - log p_a - K)            |

A divergence is not put together from other statistics: where the heads are close it is far smaller than they are, and
would be lost to their rounding. What is summed is the difference of the two logits, each relative to its own maximum,
and both sums of exponentials are formed in the same way, so that equal heads have exactly 0.

A class of which `b` has no mass adds nothing, even where the other logit is infinite: 0 · log 0 is taken for 0.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Function = Literal["expected", "cross_entropy", "divergence"]


def shift(maximum: Tensor) -> Tensor:
    """The maximum as a shift for exp: 0 where it is infinite, as in torch.logsumexp, so that inf - inf never occurs."""
    return torch.where(maximum.isinf(), 0, maximum)


@dataclass
class Running:
    """The online log-sum-exp of the rows seen so far: (rows,) each, total being the sum of exp(z - maximum)."""

    maximum: Tensor
    total: Tensor

    @property
    def shift(self) -> Tensor:
        return shift(self.maximum)

    def rescale(self, new_shift: Tensor) -> Tensor:
        """What sums over the rows seen so far are multiplied by, where they become relative to another shift."""
        return torch.exp(torch.where(self.maximum == -torch.inf, -torch.inf, self.shift - new_shift))


@dataclass
class RunningPair:
    """The rows seen so far of two heads. weighted: what is averaged, times exp(b - maximum of b), summed."""

    a: Running
    b: Running
    weighted: Tensor


def update(state: RunningPair | None, a: Tensor, b: Tensor, function: Function) -> RunningPair:
    """Folds one tile of both heads, (rows, columns) each, into the state."""
    maxima = [z.amax(1) for z in (a, b)]
    if state is not None:
        maxima = [torch.maximum(old.maximum, new) for old, new in zip((state.a, state.b), maxima, strict=True)]
    below = [z - shift(maximum)[:, None] for z, maximum in zip((a, b), maxima, strict=True)]
    exp = below[1].exp()
    values = a if function == "expected" else -below[0] if function == "cross_entropy" else below[1].sub_(below[0])
    weighted = (values * exp).masked_fill_(exp == 0, 0).sum(1)
    totals = [torch.zeros_like(weighted) if function == "expected" else below[0].exp_().sum(1), exp.sum(1)]
    if state is not None:
        # By how much what is averaged changes, as it becomes relative to other maxima.
        moved = [old.shift - shift(new) for old, new in zip((state.a, state.b), maxima, strict=True)]
        change = {"expected": 0.0 * moved[0], "cross_entropy": -moved[0], "divergence": moved[1] - moved[0]}[function]
        rescale = state.b.rescale(shift(maxima[1]))
        weighted += (state.weighted + change * state.b.total) * rescale
        totals[0] += state.a.total * state.a.rescale(shift(maxima[0]))
        totals[1] += state.b.total * rescale
    return RunningPair(Running(maxima[0], totals[0]), Running(maxima[1], totals[1]), weighted)


def finish(state: RunningPair, function: Function) -> Tensor:
    """The value, (rows,)."""
    mean = state.weighted / state.b.total
    if function == "expected":
        return mean
    # Of the quotient, and not the difference of two logarithms, which are rounded where they are larger than it.
    total = state.a.total if function == "cross_entropy" else state.a.total / state.b.total
    return total.log() + mean


@dataclass
class Side:
    """One head in a tile: its logits, their softmax and its logarithm, (rows, columns) each, where they are needed."""

    z: Tensor
    p: Tensor
    log_p: Tensor


def gradient_of_values(a: Side, b: Side, function: Function) -> Tensor:
    """d value / d a, (rows, columns), which nobody may edit."""
    return b.p if function == "expected" else a.p - b.p


def gradient_of_weights(a: Side, b: Side, value: Tensor, function: Function) -> Tensor:
    """d value / d b, (rows, columns). value: (rows,), the finished statistic."""
    mean = value[:, None]
    if function == "expected":
        inner = a.z - mean
    elif function == "cross_entropy":
        inner = torch.add(a.log_p, mean).neg_()
    else:
        inner = (b.log_p - a.log_p).sub_(mean)
    return inner.mul_(b.p).masked_fill_(b.p == 0, 0)
