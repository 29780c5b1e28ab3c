"""The logarithm of a mixture of two heads' probabilities: its spellings, and what is done with it.

The logarithm of a sum of probabilities, and the log-sum-exp of log-probabilities to which the logarithms of their
weights were added. Beside other log-probabilities it is the `values` of a product (functions.py), and the sum of those
over the classes a divergence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from ..graph import constants, nodes
from ..graph.fakes import fake, is_number
from ..graph.nodes import Op
from ..graph.refusal import Refused
from .trace import Trace
from .values import Value
from .walk import Walk, distinct

# What a number that was added to log-probabilities may end in.
_PUT_TOGETHER = ("stack", "logaddexp")


@dataclass(frozen=True)
class LogOfMixture:
    """The logarithm of a sum of heads' probabilities, each times a number.

    parts: the numbers, with the nodes of the probabilities, or of their logarithms.
    """

    node: Node
    parts: tuple[tuple[float, Node], ...]
    class_dim: int
    traces: tuple[Trace, ...]
    what = "the logarithm of a mixture of two heads' probabilities"
    cure = "take the entry of a target, or use a divergence of the two"


@dataclass(frozen=True)
class Shifted:
    """Log-probabilities of one head, the node of which is `source`, to which a number was added."""

    number: float
    source: Node
    traces: tuple[Trace, ...]
    what = "log-probabilities to which a number was added"


@dataclass(frozen=True)
class Stacked:
    """Log-probabilities of several heads, with the numbers added to them, side by side in a new dimension `dim`."""

    parts: tuple[tuple[float, Node], ...]
    dim: int
    traces: tuple[Trace, ...]
    what = "log-probabilities of two heads in one tensor"


def with_numbers(op: Op | None) -> Op | None:
    """An op on what is made of two heads, with numbers in the places of tensors that hold one that is known."""
    if op is None or op.inplace or op.name not in ("add", "sub", "mul", "div", "lerp", "logaddexp"):
        return op
    found = {name: value for name, node in op.args.items() if (value := constants.number(node)) is not None}
    return replace(op, args=op.args | found) if found else op


def follows(walk: Walk, node: Node, op: Op | None, touched: list[Node]) -> bool:
    """Whether a node is one of these, or on the way to it; which is then noted."""
    if op is None or op.inplace:
        return False
    known = walk.sums.get(touched[0])
    made: Any = None
    if op.name in ("add", "sub") and len(touched) == 1:
        made = _plus(walk, node, op, touched[0])
    elif op.name == "stack" and only_used_by(node, ("logsumexp",)):
        made = _stacked(walk, node, op)
    elif op.name == "logsumexp" and isinstance(known, Stacked):
        made = _summed(walk, node, op, known)
    elif op.name == "logaddexp":
        parts = _parts(walk, (op.args["input"], op.args["other"]))
        made = _mixture(walk, node, parts) if parts is not None else None
    elif op.name == "cast" and isinstance(known, LogOfMixture) and fake(node).dtype == fake(touched[0]).dtype:
        made = replace(known, node=node)
    if made is not None:
        walk.put_sum(node, made)
    elif isinstance(known, (Shifted, Stacked)):
        raise Refused(f"{nodes.describe(node)} of {known.what}", "use torch.logsumexp of both, stacked")
    return made is not None


def only_used_by(node: Node, names: tuple[str, ...]) -> bool:
    """Whether a node has users, and all of them are ops of these names."""
    ops = [nodes.read(user) for user in node.users]
    return bool(ops) and all(op is not None and op.name in names for op in ops)


def takes_out(node: Node, op: Op, dim: int) -> bool:
    """Whether an op reduces one dimension of its input, which is gone afterwards, and nothing else."""
    dims = op.args["dim"] if isinstance(op.args["dim"], (list, tuple)) else [op.args["dim"]]
    rank = fake(node).dim() + 1
    whole = op.args["keepdim"] or not all(isinstance(d, int) for d in dims)
    return not whole and [d % rank for d in dims] == [dim]


def _plus(walk: Walk, node: Node, op: Op, source: Node) -> LogOfMixture | Shifted | None:
    """A number added to log-probabilities, or to the logarithm of a mixture."""
    other = op.args["other"] if op.args["input"] is source else op.args["input"]
    if not is_number(other) or op.args["alpha"] != 1 or (op.name == "sub" and op.args["input"] is not source):
        return None
    number = -other if op.name == "sub" else other
    known = walk.sums.get(source)
    if isinstance(known, LogOfMixture):
        parts = tuple((of * math.exp(number), part) for of, part in known.parts)
        return replace(known, node=node, parts=parts)
    if not math.isfinite(number) or not _is_log(walk, source) or not only_used_by(node, _PUT_TOGETHER):
        return None
    return Shifted(number, source, tuple(walk.values[source].trace.with_parts))


def _is_log(walk: Walk, node: Any) -> bool:
    """Whether a node has one head's log-probabilities, as they are."""
    value: Value | None = walk.values[node].values[0] if node in walk.values else None
    return value is not None and value.kind == "log_softmax" and value.factor == 1.0 and value.picked is None


def _parts(walk: Walk, given: Any) -> tuple[tuple[float, Node], ...] | None:
    """What the exponentials of these tensors are, if all are log-probabilities: numbers, with nodes of logarithms."""
    parts = []
    for node in given:
        known = walk.sums.get(node)
        if isinstance(known, Shifted):
            parts.append((math.exp(known.number), known.source))
        elif isinstance(node, Node) and _is_log(walk, node):
            parts.append((1.0, node))
        else:
            return None
    return tuple(parts)


def _traces(walk: Walk, parts: tuple[tuple[float, Node], ...]) -> tuple[Trace, ...]:
    return tuple(distinct(t for _, node in parts for t in walk.values[node].trace.with_parts))


def _stacked(walk: Walk, node: Node, op: Op) -> Stacked | None:
    tensors = op.args["tensors"]
    parts = _parts(walk, tensors) if isinstance(tensors, (list, tuple)) and isinstance(op.args["dim"], int) else None
    if parts is None:
        return None
    return Stacked(parts, op.args["dim"] % fake(node).dim(), _traces(walk, parts))


def _summed(walk: Walk, node: Node, op: Op, known: Stacked) -> LogOfMixture | None:
    return _mixture(walk, node, known.parts) if takes_out(node, op, known.dim) else None


def _mixture(walk: Walk, node: Node, parts: tuple[tuple[float, Node], ...]) -> LogOfMixture | None:
    values = [walk.values[part].values[0] for _, part in parts]
    dims = {value.class_dim for value in values}
    if len(dims) != 1 or any(value.fake.shape != fake(node).shape for value in values):
        return None
    return LogOfMixture(node, parts, dims.pop(), _traces(walk, parts))
