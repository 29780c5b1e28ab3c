"""Tensors that tell the class of each row's target from all others."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..graph import nodes
from ..graph.builder import Builder
from ..graph.fakes import fake, is_number, is_tensor
from ..graph.memory import written_after
from .one_hot import coefficient, mixture
from .shapes import is_row_vector, is_vocabulary_vector
from .targets import counts
from .values import Diagonal, Mixture, Value


@dataclass(frozen=True)
class Mark:
    """What a tensor holds: `elsewhere` a number or a bool, at the `target` of each row what `there` gives.

    partial: whether rows may have no target, such as those that the loss ignores: a comparison finds none.
    """

    target: Node | Diagonal
    elsewhere: float | bool
    at_target: Mixture | bool
    partial: bool = False

    def there(self, builder: Builder) -> Any:
        """A bool, a number, or a recorded tensor with one number for each row, 1 wide where the classes are."""
        if isinstance(self.at_target, bool):
            return self.at_target
        (term,) = self.at_target.terms
        made = coefficient(builder, term)
        return made + self.at_target.constant if self.at_target.constant else made


def mark(node: Any, value: Value) -> Mark | None:
    """What a tensor of the logits' shape holds at the target and elsewhere, the classes being last; else None."""
    mixed = mixture(node, value)
    if mixed is not None and len(mixed.terms) == 1 and fake(node).dtype == torch.bool:
        return _truth(node, value, bool)
    if mixed is not None and len(mixed.terms) == 1:
        return Mark(mixed.terms[0][2], mixed.constant, mixed)
    return _mask(node, value)


COMPARED = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
}


def _mask(node: Any, value: Value) -> Mark | None:
    """As `mark`, of a bool tensor."""
    if not is_tensor(node) or fake(node).dtype != torch.bool or written_after(node) or not node.args:
        return None
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    source, op = node.args[0], nodes.read(node)
    if op is not None and op.name == "not":
        found = mark(source, value) if is_tensor(source) and fake(source).dtype == torch.bool else None
        return found and replace(found, elsewhere=not found.elsewhere, at_target=not found.at_target)
    if name in ("bool", "to", "type"):
        return _truth(source, value, lambda number: number != 0)
    if op is None or op.name not in COMPARED:
        return None
    compare, other = COMPARED[op.name], op.args["other"]
    if is_number(other):
        return _truth(source, value, lambda number: compare(number, other))
    for classes, target in ((source, other), (other, source)):
        if (
            op.name in ("eq", "ne")
            and is_tensor(classes)
            and is_vocabulary_vector(fake(classes), value.fake, value.class_dim)
            and counts(classes)
            and is_tensor(target)
            and is_row_vector(target, value)
        ):
            every = value.has_diagonal and counts(target)
            return Mark(target, op.name == "ne", op.name == "eq", partial=not every)
    return None


def _truth(source: Any, value: Value, of: Any) -> Mark | None:
    mixed = mixture(source, value)
    if mixed is None or len(mixed.terms) != 1 or mixed.terms[0][1]:
        return None
    factor, _, target = mixed.terms[0]
    return Mark(target, bool(of(mixed.constant)), bool(of(mixed.constant + factor)))
