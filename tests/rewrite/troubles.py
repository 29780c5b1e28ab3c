"""Programs, and what may be wrong with the numbers they are given; eager's result is the judge of each pair.

A program is compiled once for all troubles: nothing of it depends on what its tensors hold.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from head_oracle import error
from torch import Tensor

N, D, V = 12, 8, 40
IGNORED = 3  # the class of rows that do not count


def z(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b).float()


def softcapped(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(z(x, w, b) / 3) * 3


def picked(source: Tensor, t: Tensor) -> Tensor:
    return source.gather(1, t[:, None])[:, 0]


CLASS_WEIGHT = torch.rand(V, generator=torch.Generator().manual_seed(2)) + 0.1


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


PROGRAMS: dict[str, Callable[..., Tensor]] = {
    "mean": lambda x, w, b, t: F.cross_entropy(z(x, w, b), t, ignore_index=IGNORED),
    "sum": lambda x, w, b, t: F.cross_entropy(z(x, w, b), t, ignore_index=IGNORED, reduction="sum"),
    "none": lambda x, w, b, t: F.cross_entropy(z(x, w, b), t, ignore_index=IGNORED, reduction="none"),
    "none, weighted": lambda x, w, b, t: (
        F.cross_entropy(z(x, w, b), t, reduction="none") * torch.where(t == IGNORED, 0, torch.linspace(-1, 2, len(t)))
    ),
    "no bias": lambda x, w, b, t: F.cross_entropy(F.linear(x, w).float(), t, ignore_index=IGNORED),
    "in the logits' dtype": lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b), t, ignore_index=IGNORED),
    "class weights": lambda x, w, b, t: F.cross_entropy(z(x, w, b), t, CLASS_WEIGHT, ignore_index=IGNORED),
    "label smoothing": lambda x, w, b, t: F.cross_entropy(z(x, w, b), t, ignore_index=IGNORED, label_smoothing=0.1),
    "smoothing of class weights": lambda x, w, b, t: F.cross_entropy(
        z(x, w, b), t, CLASS_WEIGHT, ignore_index=IGNORED, label_smoothing=0.1, reduction="sum"
    ),
    "softcap": lambda x, w, b, t: F.cross_entropy(softcapped(x, w, b), t, ignore_index=IGNORED),
    "nll of log_softmax": lambda x, w, b, t: F.nll_loss(z(x, w, b).log_softmax(1), t, ignore_index=IGNORED),
    "gathered log_softmax": lambda x, w, b, t: picked(z(x, w, b).log_softmax(1), t),
    "gathered softmax": lambda x, w, b, t: picked(z(x, w, b).softmax(1), t),
    "sum of log_softmax": lambda x, w, b, t: z(x, w, b).log_softmax(1).sum(1),
    "logsumexp": lambda x, w, b, t: z(x, w, b).logsumexp(1),
    "logsumexp - target": lambda x, w, b, t: (logits := z(x, w, b)).logsumexp(1) - picked(logits, t),
    "the same of one head": lambda x, w, b, t: (lambda l: l.logsumexp(1) - picked(l, t))(z(x, w, b)),
    "z-loss": lambda x, w, b, t: (lambda l: F.cross_entropy(l, t) + 0.1 * l.logsumexp(1).square().mean())(z(x, w, b)),
    "z-loss of rows that count": lambda x, w, b, t: (
        lambda l: F.cross_entropy(l, t, ignore_index=IGNORED) + (0.1 * l.logsumexp(1).square() * (t != IGNORED)).sum()
    )(z(x, w, b)),
    "entropy": lambda x, w, b, t: (lambda l: F.cross_entropy(l, t, reduction="none") - entropy(l))(z(x, w, b)),
    "entropy by logsumexp": lambda x, w, b, t: (
        lambda l: l.logsumexp(1) - (l.softmax(1) * l).sum(1) + F.cross_entropy(l, t)
    )(z(x, w, b)),
    "sum of logits": lambda x, w, b, t: (lambda l: F.cross_entropy(l, t) + l.sum(1))(z(x, w, b)),
    "largest logit": lambda x, w, b, t: (lambda l: F.cross_entropy(l, t, reduction="none") + l.max(1).values)(
        z(x, w, b)
    ),
    "argmax": lambda x, w, b, t: (lambda l: F.cross_entropy(l, t, reduction="none") + l.argmax(1))(z(x, w, b)),
}


def data(dtype: torch.dtype, rows: int = N) -> list[Tensor]:
    """x, w, b, t. The first three rows do not count, and no target is one of the last classes."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, D, generator=g), torch.randn(V, D, generator=g)
    t = torch.randint(4, V - 10, (rows,), generator=g)
    t[:3] = IGNORED
    return [x.to(dtype), w.to(dtype), torch.randn(V, generator=g).to(dtype), t]


INF, NAN = float("inf"), float("nan")


def at(tensor: int, index: Any, value: float) -> Callable[[list[Tensor]], None]:
    def change(tensors: list[Tensor]) -> None:
        tensors[tensor][index] = value

    return change


TROUBLES: dict[str, Callable[[list[Tensor]], None]] = {
    "none": lambda tensors: None,
    "bias +inf": at(2, 35, INF),
    "bias +inf twice": at(2, [30, 35], INF),
    "bias -inf": at(2, [33, 35], -INF),
    "bias -inf everywhere": at(2, slice(None), -INF),
    "bias -inf at a target": lambda tensors: at(2, tensors[3][5], -INF)(tensors),
    "bias +inf at a target": lambda tensors: at(2, tensors[3][5], INF)(tensors),
    "bias NaN": at(2, 35, NAN),
    "bias NaN behind +inf": lambda tensors: (at(2, 31, INF)(tensors), at(2, 35, NAN)(tensors))[0],
    "bias +inf, first row NaN": lambda tensors: (at(2, 31, INF)(tensors), at(0, (0, 1), NAN)(tensors))[0],
    "ignored row NaN": at(0, 1, NAN),
    "ignored entry NaN": at(0, (1, 2), NAN),
    "ignored entry +inf": at(0, (1, 2), INF),
    "ignored entry -inf": at(0, (1, 2), -INF),
    "ignored entries +-inf": at(0, (1, slice(0, 2)), torch.tensor([INF, -INF])),
    "row NaN": at(0, 7, NAN),
    "entry NaN": at(0, (7, 2), NAN),
    "entry +inf": at(0, (7, 2), INF),
    "entry -inf": at(0, (7, 2), -INF),
    "every row NaN": at(0, slice(None), NAN),
    "every row ignored, one NaN": lambda tensors: (at(3, slice(None), IGNORED)(tensors), at(0, 4, NAN)(tensors))[0],
    "weight NaN": at(1, (35, 2), NAN),
    "weight +inf": at(1, (35, 2), INF),
    "weight -inf": at(1, (35, 2), -INF),
    "ignored row overflows": lambda tensors: at(0, 1, torch.finfo(tensors[0].dtype).max)(tensors),
    "row overflows": lambda tensors: at(0, 7, torch.finfo(tensors[0].dtype).max)(tensors),
}


def run(fn: Callable, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The value and the gradients of the first three tensors, by name."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors[:3]]
    value = fn(*leaves, tensors[3])
    tangent = torch.ones_like(value)
    grads = torch.autograd.grad(value, leaves, tangent, allow_unused=True)
    named = {"value": value.detach(), "dx": grads[0], "dw": grads[1], "db": grads[2]}
    return {name: t for name, t in named.items() if t is not None}


def compare(ours: dict[str, Tensor], eager: dict[str, Tensor], tolerance: float) -> list[str]:
    """What differs: where NaN and infinities stand, and the rest by more than `tolerance`."""
    wrong = []
    for name, want in eager.items():
        got = ours[name]
        for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
            if not torch.equal(test(got), test(want)):
                wrong.append(f"{name}: {int(test(got).sum())} {what} for {int(test(want).sum())} of {want.numel()}")
        both = got.isfinite() & want.isfinite()
        off = error(got[both], want[both])
        if not off < tolerance:
            wrong.append(f"{name}: off by {off:.1e}")
    return wrong
