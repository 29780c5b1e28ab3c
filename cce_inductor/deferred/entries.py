"""Entries that a program has been given of pending logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
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
        if not self.values.numel():
            return
        begin = memory.storage_offset() + self.offset
        whole = memory.data.as_strided(self.size, self.stride, begin)
        classes = whole.argmax(self.dim, keepdim=True) if self.classes is None else self.classes
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        # By where they are in memory: PyTorch does not write into an expanded tensor, whose rows share theirs.
        places = self._places(classes)
        memory.data.as_strided((extent,), (1,), begin).scatter_(0, places.flatten(), self.values.flatten())

    def _places(self, classes: Tensor) -> Tensor:
        """How far into the memory of their tensor the entries of these classes lie."""
        if self.rows is not None:
            rows = self.rows % self.size[0]  # a negative one counts from the end
            return rows * self.stride[0] + classes * self.stride[1]
        own = self.dim % len(self.size)
        places = classes * self.stride[own]
        for dim, size in enumerate(classes.shape):
            if dim != own:
                steps = torch.arange(size, device=classes.device) * self.stride[dim]
                places = places + steps.view(-1, *[1] * (classes.dim() - 1 - dim))
        return places
