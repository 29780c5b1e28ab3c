"""What the trace knows of a node that is made from a head's logits."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node


class Refused(Exception):
    """Raised inside the trace where it cannot go on; becomes a `Refusal`."""

    def __init__(self, reason: str, cure: str):
        super().__init__(reason)
        self.reason, self.cure = reason, cure


@dataclass(frozen=True)
class Refusal:
    """Why a site was left as it was: the node at fault, what is wrong with it, and what would make it fuse."""

    node: Node
    reason: str
    cure: str


def example(node: Node) -> Any:
    """The fake value that Dynamo gave a node; None where it gave none."""
    return node.meta.get("example_value", node.meta.get("val"))


def fake(node: Node) -> Tensor:
    """The fake tensor of a node, or Refused for a node that is no tensor."""
    value = example(node)
    if not isinstance(value, Tensor):
        raise Refused(f"%{node.name} has no tensor metadata", "report it: Dynamo gave a node without an example")
    return value


@dataclass(frozen=True)
class Head:
    """A linear map onto the vocabulary: logits = input @ weight.T + bias, `weight` (V, D).

    transposed: `weight` is stored (D, V), as in ``x @ w``. `bias` is a (V,)-like node or None.
    """

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    transposed: bool

    @property
    def dtype(self) -> torch.dtype:
        """What the logits were computed in: under autocast not the dtype of the operands."""
        return fake(self.node).dtype

    @property
    def vocab(self) -> Any:
        """V, an int or a SymInt."""
        return fake(self.node).shape[-1]

    @property
    def width(self) -> Any:
        return fake(self.input).shape[-1]

    def operands(self) -> list[Node]:
        return [n for n in (self.input, self.weight, self.bias) if n is not None]


@dataclass(frozen=True)
class Shift:
    """A bias over the vocabulary: the tensor of `node`, flattened to (V,), times `factor`."""

    node: Node
    factor: float


# (hidden, D) -> hidden, on FX proxies: does to the hidden states what an op did to the logits' leading dimensions.
RowMap = Callable[[Any, Any], Any]
# One op on values, with the class dimension last; the list holds the tensors of `Value.extra`.
Step = Callable[[Tensor, list[Tensor]], Tensor]


@dataclass(frozen=True)
class Value:
    """A tensor made from a head's logits: rows rearranged, values through an affine map and perhaps a softcap.

    With a = input @ weight.T, an entry is  post * tanh(scale * a + sum of shifts)  if `capped`, else without the tanh
    and the post. `shifts` are biases at that point. `kind` is "logits" or "log_softmax" of them.
    """

    head: Head
    node: Node
    class_dim: int
    kind: str = "logits"
    scale: float = 1.0
    shifts: tuple[Shift, ...] = ()
    capped: bool = False
    post: float = 1.0
    rounded: bool = False  # cast to a dtype narrower than the head's
    rows: tuple[tuple[Node, RowMap], ...] = ()
    # How eager computed the values, for deferred logits: ops in order, and tensors they read besides the head's.
    steps: tuple[Step, ...] = field(default=(), compare=False)
    extra: tuple[Node, ...] = ()

    @property
    def fake(self) -> Tensor:
        return fake(self.node)

    @property
    def lead_shape(self) -> tuple:
        shape = tuple(self.fake.shape)
        return shape[: self.class_dim] + shape[self.class_dim + 1 :]

    def at(self, node: Node, **changes: Any) -> "Value":
        return replace(self, node=node, **changes)

    def then(self, node: Node, step: Step, **changes: Any) -> "Value":
        return replace(self, node=node, steps=(*self.steps, step), **changes)

    def mapped(self, node: Node, row_map: RowMap, class_dim: int) -> "Value":
        return replace(self, node=node, rows=(*self.rows, (node, row_map)), class_dim=class_dim)

    def scaled(self, factor: float) -> "Value":
        """The fields of this value times a number."""
        if self.capped:
            return replace(self, post=self.post * factor)
        shifts = tuple(Shift(s.node, s.factor * factor) for s in self.shifts)
        return replace(self, scale=self.scale * factor, shifts=shifts)

    def canonical(self) -> tuple[float, float, tuple[Shift, ...]]:
        """(scale, softcap, biases inside the scale) of the operator: cap * tanh(scale * (a + biases) / cap)."""
        scale = self.scale * self.post if self.capped else self.scale
        softcap = abs(self.post) if self.capped else 0.0
        if scale == 0 or (self.capped and self.post == 0):
            raise Refused("logits multiplied by zero", "drop the loss: it is a constant")
        inner = self.scale
        return scale, softcap, tuple(Shift(s.node, s.factor / inner) for s in self.shifts)
