"""One-hot tensors that a program multiplies its logits by, recognised by what they hold.

Outside a graph nobody sees that ``F.one_hot(t, V)`` was called: what arrives is a tensor as large as the logits. One
that holds the same number everywhere but for one class of each row is the same function of that class, and a loss of it
needs none of its entries. So is one of two classes, as mixup has them. To look costs about what the product with the
logits does, and nothing for a tensor whose first rows are otherwise.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PROBED = 4  # rows
_AT_ONCE = 2**22  # entries


@dataclass(frozen=True)
class Spread:
    """How a tensor of `rank` dimensions follows from one class of each row, or two: `high` there, and `low` elsewhere.

    high: a number for each of them; a class that stands twice has what both are above `low`.
    """

    low: float
    high: tuple[float, ...]
    classes: int
    dtype: torch.dtype
    rank: int

    def __call__(self, classes: Any) -> Any:
        """The tensor, of the classes of its rows; of a recorded tensor, as a program writes it."""
        if isinstance(classes, Tensor):
            return classes if classes.dim() == self.rank and classes.dtype == self.dtype else self._made(classes)
        several = [classes] if len(self.high) == 1 else [classes[i] for i in range(len(self.high))]
        made: Any = None
        for high, own in zip(self.high, several, strict=True):
            term = F.one_hot(own, self.classes)
            term = term if self.dtype == torch.bool else term.to(self.dtype)
            term = term * (high - self.low) if high - self.low != 1 else term
            made = term if made is None else made + term
        made = made + self.low if self.low else made
        return made.to(self.dtype) if self.dtype == torch.bool else made

    def _made(self, classes: Tensor) -> Tensor:
        several = classes[None] if len(self.high) == 1 else classes
        whole = torch.full((*several.shape[1:], self.classes), self.low, dtype=self.dtype, device=classes.device)
        for high, own in zip(self.high, several, strict=True):
            index = own.unsqueeze(-1)
            before = whole.gather(-1, index)
            whole.scatter_(-1, index, torch.where(before == self.low, high, before + (high - self.low)).to(self.dtype))
        return whole


class Spreadable:
    """The classes of a tensor that was found to be a :class:`Spread`: an :class:`Extra` without its memory.

    tensor, alias: (rows...) or, where there are two of each row, (2, rows...), int64.
    """

    unchanged = True

    def __init__(self, whole: Tensor, classes: Tensor) -> None:
        self.tensor = self.alias = classes
        self._whole, self._version = weakref.ref(whole), whole._version

    @property
    def copy(self) -> Tensor:
        """The tensor itself while it is there, for a read of the logits; else the classes."""
        whole = self._whole()
        return self.tensor if whole is None or whole._version != self._version else whole.detach()


def spread(whole: Tensor) -> tuple[Spread, Spreadable] | None:
    """How `whole`, (rows..., V), follows from one class or two of each row; None where it does not."""
    if whole.is_inference() or whole.requires_grad or whole.dim() < 2 or not whole.numel() or whole.shape[-1] < 3:
        return None
    if not whole.is_contiguous() or (whole.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    v = whole.shape[-1]
    with torch.no_grad():
        rows = whole.view(-1, v)
        step = max(1, _AT_ONCE // v)
        numbers = _numbers(rows[:_PROBED])
        if numbers is None or _classes(rows[:_PROBED], *numbers) is None:
            return None
        found = [_classes(block, *numbers) for block in rows.split(step)]
        if any(classes is None for classes in found):
            return None
        classes = torch.cat(found, -1)  # type: ignore[arg-type]
    low, high = numbers
    classes = classes.view(*classes.shape[:-1], *whole.shape[:-1])
    return Spread(low, high, v, whole.dtype, whole.dim()), Spreadable(whole, classes)


def _numbers(rows: Tensor) -> tuple[float, tuple[float, ...]] | None:
    """What all classes of each row hold but one or two, and what those hold; None where these rows are otherwise."""
    rows = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
    low = rows[0].median()
    others = rows != low
    most = int(others.sum(1).max())
    if most not in (1, 2) or (most == 2 and not rows.is_floating_point()):
        return None
    row = int(others.sum(1).argmax())
    high = tuple(sorted(rows[row][others[row]].tolist(), reverse=True))
    return (low.item(), high) if all(map(math.isfinite, (low.item(), *high))) else None


def _classes(rows: Tensor, low: float, high: tuple[float, ...]) -> Tensor | None:
    """The classes of these rows, (rows,) or (2, rows), that hold other numbers than all others; None where there are
    other rows among them."""
    others = rows != low
    count = others.sum(1)
    if not ((count >= 1) & (count <= len(high))).all():
        return None
    at = others.to(torch.uint8).topk(len(high), 1).indices
    held = rows.gather(1, at)
    if len(high) == 1:
        return at[:, 0] if bool((held == high[0]).all()) else None
    first, second = held.unbind(1)
    swapped = first != high[0]
    fits = torch.where(swapped, (first == high[1]) & (second == high[0]), second == high[1])
    both = high[0] + high[1] - low
    once = (first.double() - both).abs() <= 2 * torch.finfo(rows.dtype).eps * abs(both)
    if not torch.where(count == 2, fits, once).all():
        return None
    classes = torch.where(swapped[:, None], at.flip(1), at)
    return torch.where((count == 1)[:, None], at[:, :1], classes).t().contiguous()
