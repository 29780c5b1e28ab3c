"""Entries that a program has been given of pending logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Entries(NamedTuple):
    """Entries of pending logits that were computed without the others, by another kernel: rounded otherwise.

    Programs compare logits with such entries (``z > z.gather(-1, t)``), and these are equal to themselves. So a read
    puts them where they belong. size, stride, offset: of the tensor that they were taken of. classes: None for the
    largest; of these `rows` of (rows, classes) where they are given, else along `dim` as `gather` has it.
    """

    size: Sequence[int]
    stride: Sequence[int]
    offset: Any
    dim: int
    classes: Tensor | None
    values: Tensor
    rows: Tensor | None = None

    def put(self, memory: Tensor) -> None:
        """Writes them into `memory`, a tensor that begins where theirs does; no version counts it."""
        whole = memory.data.as_strided(self.size, self.stride, memory.storage_offset() + self.offset)
        classes = whole.argmax(self.dim, keepdim=True) if self.classes is None else self.classes
        if self.rows is None:
            whole.scatter_(self.dim, classes, self.values)
        else:
            whole[self.rows, classes] = self.values
