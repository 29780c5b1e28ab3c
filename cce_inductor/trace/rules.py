"""The rules that the table of spellings names, by op: what it makes of logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Node

from ..graph.facts import Fact
from ..graph.nodes import Op
from ..graph.spellings import NAMES, REDUCING
from . import (
    heads,
    indexing,
    layout,
    masks,
    pointwise,
    ranking,
    reductions,
    rsqrt_softcap,
    several,
    softmax,
)
from .reduction import Reduction
from .values import Value

MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        *(heads, indexing, layout, masks, pointwise),
        *(ranking, reductions, rsqrt_softcap, several, softmax),
    )
}


def _rule(where: str) -> Callable[..., Any]:
    """The function that a row of the table names as ``module.function``."""
    module, _, function = where.partition(".")
    return getattr(MODULES[module], function)


# name -> (node, arguments) -> the values of its result, one for each way to read the product
HEADS: dict[str, Callable[[Node, dict], list[Value]]] = {
    name: _rule(row.head) for name, row in NAMES.items() if row.head
}
# name -> (walk, node, op, logits among its arguments) -> whether it takes the node
SEVERAL: dict[str, Callable[..., bool]] = {name: _rule(row.several) for name, row in NAMES.items() if row.several}
# name -> (value, node, arguments, known reductions) -> a value or None
BESIDE: dict[str, Callable[..., Value | None]] = {name: _rule(row.beside) for name, row in NAMES.items() if row.beside}
# name -> (value, node, arguments) -> a value, a reduction, a list of what makes its parts, or None
RULES: dict[str, Sequence[Callable[..., Any]]] = {
    name: tuple(map(_rule, row.rules)) for name, row in NAMES.items() if row.rules
}


def follows(op: Op) -> bool:
    """Whether there is a rule for logits among an op's arguments, be it that they are metadata to it, or a matrix."""
    return op.is_head or op.has(Fact.METADATA) or any(op.name in table for table in (SEVERAL, BESIDE, RULES))


def leads_on(op: Op) -> bool:
    """Whether an op gives logits, or functions of every one of them, and not only a statistic."""
    return any(not where.startswith(REDUCING) for where in NAMES[op.name].rules)


def apply(op: Op, value: Value, node: Node) -> Value | Reduction | list | None:
    """What the first rule gives that takes the use, or None if none does; Refused if that rule cannot."""
    for rule in RULES.get(op.name, ()):
        made = rule(value, node, op.args)
        if made is not None:
            return made
    return None
