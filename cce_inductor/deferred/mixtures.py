"""One-hot tensors that a program multiplies its logits by, recognised by what they hold.

Outside a graph nobody sees that ``F.one_hot(t, V)`` was called: what arrives is a tensor as large as the logits. One
that holds the same number everywhere but for one class of each row is the same function of that class, and a loss of it
needs none of its entries. To look costs about what the product with the logits does, and nothing for a tensor whose
first rows hold more than two numbers.
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
    """How a tensor of `rank` dimensions follows from the class of each row: `high` there, and `low` elsewhere."""

    low: float
    high: float
    classes: int
    dtype: torch.dtype
    rank: int

    def __call__(self, classes: Any) -> Any:
        """The tensor, of the classes of its rows; of a recorded tensor, as a program writes it."""
        if isinstance(classes, Tensor):
            if classes.dim() == self.rank:
                return classes  # the program's own
            shape = (*classes.shape, self.classes)
            whole = torch.full(shape, self.low, dtype=self.dtype, device=classes.device)
            return whole.scatter_(-1, classes.unsqueeze(-1), self.high)
        made = F.one_hot(classes, self.classes).to(self.dtype)
        if self.high - self.low != 1:
            made = made * (self.high - self.low)
        return made + self.low if self.low else made


class Spreadable:
    """The classes of a tensor that was found to be a :class:`Spread`: an :class:`Extra` without its memory.

    tensor: (rows...), int64.
    """

    unchanged = True

    def __init__(self, whole: Tensor, classes: Tensor) -> None:
        self.tensor = classes
        self._whole, self._version = weakref.ref(whole), whole._version

    @property
    def copy(self) -> Tensor:
        """The tensor itself while it is there, for a read of the logits; else the classes."""
        whole = self._whole()
        return self.tensor if whole is None or whole._version != self._version else whole.detach()


def spread(whole: Tensor) -> tuple[Spread, Spreadable] | None:
    """How `whole`, (rows..., V), follows from one class of each row; None where it does not."""
    if whole.is_inference() or whole.requires_grad or whole.dim() < 2 or not whole.numel() or whole.shape[-1] < 3:
        return None
    if not whole.is_contiguous() or (whole.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    v = whole.shape[-1]
    with torch.no_grad():
        rows = whole.view(-1, v)
        least, most = (x.item() for x in rows[0].aminmax())
        ones = int((rows[0] == most).sum())
        low, high = (least, most) if ones == 1 else (most, least)
        if not (math.isfinite(low) and math.isfinite(high)) or low == high or not _fits(rows[:_PROBED], low, high):
            return None
        step = max(1, _AT_ONCE // v)
        blocks = [rows[i : i + step] for i in range(0, len(rows), step)]
        if not all(_fits(block, low, high) for block in blocks):
            return None
        find = torch.argmax if high > low else torch.argmin
        classes = torch.cat([find(block, 1) for block in blocks]).view(whole.shape[:-1])
    return Spread(low, high, v, whole.dtype, whole.dim()), Spreadable(whole, classes)


def _fits(rows: Tensor, low: float, high: float) -> bool:
    """Whether each row holds `high` once, and `low` everywhere else."""
    return bool((((rows == high).sum(1) == 1) & ((rows == low).sum(1) == rows.shape[1] - 1)).all())
