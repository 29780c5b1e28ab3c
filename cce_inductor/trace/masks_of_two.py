"""Masks that a loss over two heads is written with: none of them needs the logits.

Where logits are infinite, in none of the classes of a head without a bias; where probabilities are 0, or are not, which
the products with them say anyway; and masks of rows that are expanded to the logits' shape.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..graph.fakes import fake
from ..graph.nodes import Op
from ..graph.refusal import Refused
from .functions import comparable
from .shapes import per_row
from .trace import Trace
from .values import Value
from .walk import Walk, distinct

# Probabilities are 0, or they are not.
_COMPARED = ("eq", "ne", "gt")
BEGIN = ("isinf", "expand_as", *_COMPARED)  # what such a mask is made by


@dataclass(frozen=True)
class Infinite:
    """A mask of where logits are infinite: in none of the classes of a head without a bias."""

    traces: tuple[Trace, ...]
    what = "masks of infinite logits"


@dataclass(frozen=True)
class Zeros:
    """A mask of where the probabilities of `value` are 0; or are not, if `other`."""

    value: Value
    traces: tuple[Trace, ...]
    other: bool = False
    what = "masks of probabilities"


@dataclass(frozen=True)
class Expanded:
    """A tensor of one number for each row, in the shape of the logits: nothing but that is read of them."""

    traces: tuple[Trace, ...]
    what = "masks of the logits' shape"


def made(walk: Walk, op: Op) -> Infinite | Zeros | Expanded | None:
    """The mask that an op gives, if it is one of these; Refused for one of logits that may be infinite."""
    if op.name in ("isinf", "or"):
        return _infinite(walk, op)
    return _mask(walk, op) if op.name in BEGIN else None


def _infinite(walk: Walk, op: Op) -> Infinite:
    """isinf of logits, and one such mask or another."""
    found: list[Trace] = []
    for node in op.args.values():
        made = walk.sums.get(node)
        if isinstance(made, Infinite):
            found += made.traces
            continue
        value = walk.values[node].values[0] if op.name == "isinf" and node in walk.values else None
        if value is None or value.kind != "logits" or value.affine.shifts or value.masks or value.edit:
            raise Refused("where logits with a bias or a mask are infinite is asked", "compute the loss without that")
        comparable(value)
        found += walk.values[node].trace.with_parts
    return Infinite(tuple(distinct(found)))


def _mask(walk: Walk, op: Op) -> Zeros | Expanded | None:
    """Where probabilities are 0, as torch.distributions asks; that, or one for each row, in another tensor's shape."""
    source = op.args["input"]
    if op.name == "expand_as":
        made, other = walk.sums.get(source), op.args["other"]
        if other in walk.values and source not in walk.values and made is None:
            entry = walk.values[other]
            of_rows = per_row(source, entry.values[0]) is not None
            return Expanded(tuple(entry.trace.with_parts)) if of_rows else None
        same_shape = made is not None and fake(source).shape == fake(other).shape
        return made if same_shape and isinstance(made, Zeros) else None
    value = walk.values[source].values[0] if source in walk.values else None
    if value is None or value.kind != "softmax" or value.factor != 1.0 or op.args["other"] != 0:
        return None
    comparable(value)
    return Zeros(value, tuple(walk.values[source].trace.with_parts), op.name != "eq")
