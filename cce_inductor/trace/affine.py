"""How the entries of logits come from a product: factors, biases, a softcap."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..graph.fakes import fake
from ..graph.refusal import Refused

Range = tuple[Any, Any, Any]  # start, stop and step of a slice


@dataclass(frozen=True)
class Listed:
    """Classes by their indices: a (K,) node, or numbers."""

    indices: Node | tuple[int, ...]

    @property
    def count(self) -> int | torch.SymInt:
        """How many classes."""
        return fake(self.indices).shape[0] if isinstance(self.indices, Node) else len(self.indices)


Columns = tuple[Range | Listed, ...]  # parts taken of the vocabulary, one after the other


@dataclass(frozen=True)
class Factor:
    """A tensor of one element that logits are multiplied with, or divided by."""

    node: Node
    divides: bool = False


@dataclass(frozen=True)
class Scale:
    """A factor for each class, or for each row, that logits are multiplied with or divided by: the tensor of `node`.

    of_rows: whether it is of rows: 1 wide where the classes were. columns: what was taken of the vocabulary after it.
    start: how many of `Value.rows` had been applied to the logits by then; the others apply to it as well. class_dim:
    where the classes were then. expanded: whether several rows share a number.
    """

    node: Node
    divides: bool
    of_rows: bool
    columns: Columns = ()
    start: int = 0
    class_dim: int = -1
    expanded: bool = False


@dataclass(frozen=True)
class Shift:
    """A bias over the vocabulary: the tensor of `node`, flattened to (V,), times `factor` and `factors`.

    A tensor of one element is added to every class. columns: what was taken of the vocabulary after it was added.
    """

    node: Node
    factor: float
    factors: tuple[Factor | Scale, ...] = ()
    columns: Columns = ()


@dataclass(frozen=True)
class Affine:
    """How logits come from a = input @ weight.T: s and `post` only if `capped`.

    z = post * s(rows * (scale * factors * columns * a + sum of shifts) + inner) + offset, s(t) = tanh(t), or
    t / sqrt(1 + t²) for the form "rsqrt" (ops/softcap.py). `rows` and `columns` are the products of the `scales`.
    """

    scale: float = 1.0
    factors: tuple[Factor, ...] = ()
    scales: tuple[Scale, ...] = ()
    shifts: tuple[Shift, ...] = ()
    inner: float = 0.0
    capped: bool = False
    form: str = "tanh"
    post: float = 1.0
    offset: float = 0.0

    def scaled(self, factor: float) -> Affine:
        if self.capped:
            return replace(self, post=self.post * factor, offset=self.offset * factor)
        shifts = tuple(replace(s, factor=s.factor * factor) for s in self.shifts)
        return replace(self, scale=self.scale * factor, shifts=shifts, inner=self.inner * factor)

    def squashed(self, form: str = "tanh", post: float = 1.0) -> Affine:
        """Behind a softcap. A constant that is added in front of it has to be a bias, which the rows' factor scales."""
        if self.of_rows and self.inner:
            raise Refused("a softcap of logits with a constant behind a factor for each row", "leave the constant out")
        return replace(self, capped=True, form=form, post=post)

    def times(self, factor: Factor) -> Affine:
        """Scaled by a tensor; only without a softcap, and a constant has to be a bias before it."""
        shifts = tuple(replace(s, factors=(*s.factors, factor)) for s in self.shifts)
        return replace(self, factors=(*self.factors, factor), shifts=shifts)

    def scaled_along(self, factor: Scale) -> Affine:
        """Scaled by a factor for each class or row, under the same conditions."""
        shifts = self.shifts
        if not factor.of_rows:
            shifts = tuple(replace(s, factors=(*s.factors, factor)) for s in shifts)
        return replace(self, scales=(*self.scales, factor), shifts=shifts)

    @property
    def of_rows(self) -> bool:
        """Whether there is a factor for each row."""
        return any(s.of_rows for s in self.scales)

    @property
    def nodes(self) -> list[Node]:
        """The tensors that the logits were computed with."""
        of_shifts = [n for s in self.shifts for n in (s.node, *(f.node for f in s.factors))]
        return [*of_shifts, *(f.node for f in self.factors), *(s.node for s in self.scales)]

    def plus(self, constant: float) -> Affine:
        if self.capped:
            return replace(self, offset=self.offset + constant)
        return replace(self, inner=self.inner + constant)

    def multiple(self, other: Affine) -> float | None:
        """What `other`, without a softcap, is to be scaled by to be this, but for rounding; None if nothing does it."""
        if other.scale == 0:
            return None
        ratio = self.scale / other.scale
        scaled = other.scaled(ratio)
        if self._without_numbers() != scaled._without_numbers():
            return None
        numbers = zip(self._numbers(), scaled._numbers(), strict=True)
        return ratio if all(math.isclose(a, b, rel_tol=1e-12) for a, b in numbers) else None

    def _numbers(self) -> list[float]:
        return [self.inner, *(s.factor for s in self.shifts)]

    def _without_numbers(self) -> Affine:
        return replace(self, scale=1.0, inner=0.0, shifts=tuple(replace(s, factor=1.0) for s in self.shifts))

    def operator(self) -> tuple[float, float, tuple[Shift, ...], float]:
        """(scale, softcap, biases, constant bias) of the operator: cap * s(scale * (a + biases + constant) / cap).

        The constant is 0 without a softcap: there, as behind one, it is added to the statistics (`constant`).
        """
        scale = self.scale * self.post if self.capped else self.scale
        if scale == 0:
            raise Refused("logits multiplied by zero", "drop the loss: it is a constant")
        shifts = tuple(replace(s, factor=s.factor / self.scale) for s in self.shifts)
        return scale, abs(self.post) if self.capped else 0.0, shifts, self.inner / self.scale if self.capped else 0.0

    @property
    def constant(self) -> float:
        """What the logits are larger than the operator's by."""
        return self.offset if self.capped else self.inner


IDENTITY = Affine()
