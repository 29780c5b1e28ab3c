"""Expressions of logits and one-hot tensors: what they are at the target, and elsewhere.

Where the target is not, one-hot tensors are numbers, and what is left may be the logits themselves. Where it is, the
same nodes are repeated on one entry of each row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graph import nodes
from ..graph.builder import Builder, Proxy
from ..graph.facts import Fact
from ..graph.fakes import fake, is_number, is_tensor
from ..graph.memory import storages, written, written_after
from ..graph.nodes import Op
from ..graph.refusal import Refused
from .cosines import are_cosines, between_cosines
from .decompose import widened
from .marks import Mark, mark
from .reasons import MARGIN
from .shapes import is_row_vector, is_vocabulary_vector, same_shape
from .targets import same_classes
from .values import Diagonal, Value
from .walk import Walk


def is_pointwise(node: Node) -> bool:
    """Whether a node makes each entry of a new tensor from those at the same place."""
    op = nodes.read(node)
    return op is not None and op.has(Fact.ENTRYWISE) and is_tensor(node) and node.kwargs.get("out") is None


def own_entry(builder: Builder, index: Proxy, value: Value) -> Any:
    """The entry that the logits have at the target."""
    return widened(builder.proxy(value.node)).gather(value.class_dim, index)


class Expression:
    """An expression of logits and of tensors that tell the target from the other classes."""

    def __init__(self, walk: Walk, root: Node):
        self.walk, self.root = walk, root
        self.target: Node | Diagonal | None = None
        self.partial = False

    def _leaf(self, n: Any) -> Value | None:
        """The plain logits that a node is, if it is."""
        entry = self.walk.values.get(n) if isinstance(n, Node) else None
        value = entry.values[0] if entry is not None and entry.values and not entry.stale else None
        if value is not None and not self._made_of_logits(n):
            return None
        return value if value is not None and value.whole else None

    def _made_of_logits(self, n: Node) -> bool:
        """What is broadcast to them is none of them, even if it is a product of matrices itself."""
        known = n in self.walk.values or n in self.walk.open
        return n is self.root or (known and fake(n).shape == fake(self.root).shape)

    def _mark(self, n: Any) -> Mark | None:
        """What a tensor holds at the target and elsewhere; Refused for two targets."""
        like = next(
            (
                v.values[0]
                for v in self.walk.values.values()
                if v.values and is_tensor(n) and same_shape(n, v.values[0])
            ),
            None,
        )
        found = mark(n, like) if like is not None else None
        if found is not None:
            if self.target is not None and not same_classes(self.target, found.target):
                raise Refused(*MARGIN)
            self.target = self.target or found.target
            self.partial |= found.partial
        return found

    def elsewhere(self, n: Any) -> Any:
        """What it is where the target is not: a node of logits, or a number; Refused for anything else.

        0 times what is done to the logits is 0 as long as that is finite, as it has to be for the loss to be.
        """
        if not is_tensor(n):
            return n
        if not self._made_of_logits(n):
            found = self._mark(n)
            if found is not None:
                return found.elsewhere
            if not self._is_made_for_it(n):
                return n
        elif self._leaf(n) is not None:
            return n
        op = nodes.read(n)
        name = "" if op is None else _called(n) if op.name == "function" else op.name
        if op is None or name not in _SIMPLIFIED:
            raise Refused(*MARGIN)
        made = _SIMPLIFIED[name](*(self._lazily(op, a) for a in _ARGUMENTS.get(name, ("input", "other"))))
        if isinstance(made, _Angles):
            leaf = self._leaf(made.of)
            if op.inplace or leaf is None or not are_cosines(leaf):
                raise Refused(*MARGIN)
        return made

    def _lazily(self, op: Op, name: str) -> Callable[[], Any]:
        if op.args.get("alpha", 1) != 1 or op.args.get("rounding_mode") is not None:
            raise Refused(*MARGIN)
        return lambda: self.elsewhere(op.args[name])

    def there(self, builder: Builder, n: Any, index: Proxy, value: Value) -> Any:
        """What it is at the target: a number, a bool, or a recorded (rows..., 1)."""
        if not is_tensor(n):
            return builder.proxy(n) if isinstance(n, Node) else n  # a number that is an input of the graph
        if not self._made_of_logits(n):
            return self._given(builder, n, index, value)
        leaf = self._leaf(n)
        if leaf is not None and not (is_pointwise(n) and self._all_known(n)):
            before = itertools.takewhile(lambda other: other is not self.root, builder.graph.nodes)
            if written(before, storages(n)):
                raise Refused(*MARGIN)
            made = own_entry(builder, index, leaf)
        else:
            made = self._again(builder, n, index, value)
        # Under no_grad, or detached: these nodes may stand elsewhere.
        return made.detach() if isinstance(made, torch.fx.Proxy) and not fake(n).requires_grad else made

    def _again(self, builder: Builder, n: Node, index: Proxy, value: Value) -> Any:
        """What a node makes of the entries of its arguments."""
        op = nodes.read(n)
        if op is None or not is_pointwise(n):
            raise Refused(*MARGIN)

        def entry(argument: Any) -> Any:
            return self.there(builder, argument, index, value)

        if op.name in _BRANCHES:
            condition, yes, no = (op.args[name] for name in _BRANCHES[op.name])
            holds = entry(condition)
            if isinstance(holds, bool):
                return entry(yes if holds else no)
        args, kwargs = [entry(a) for a in n.args], {k: entry(a) for k, a in n.kwargs.items()}
        if not isinstance(args[0], torch.fx.Proxy) and not isinstance(args[-1], torch.fx.Proxy):
            dtype = fake(n).dtype if fake(n).is_floating_point() else value.fake.dtype
            args[0] = builder.call(torch.full_like, index, float(args[0]), dtype=dtype)
        if op.name == "cast":
            return args[0].to(fake(n).dtype)
        if op.inplace or not isinstance(args[0], torch.fx.Proxy):
            return OUT_OF_PLACE[op.name](args[0], args[1])
        return builder.again(n, tuple(args), kwargs)

    def _all_known(self, n: Node) -> bool:
        """Whether the entry can be followed further back: to what the fewest entries are picked out of."""
        sources = [a for a in n.all_input_nodes if self._made_of_logits(a)]
        return all(self._leaf(a) is not None or a in self.walk.open for a in sources)

    def _given(self, builder: Builder, n: Node, index: Proxy, value: Value) -> Any:
        """The entry of a tensor that is not made of logits."""
        found = self._mark(n)
        if found is not None:
            return found.there(builder)
        if fake(n).numel() == 1 or is_row_vector(n, value):
            return builder.proxy(n)
        if is_vocabulary_vector(fake(n), value.fake, value.class_dim):
            return builder.proxy(n).reshape(-1)[index]
        if self._is_made_for_it(n):
            return self._again(builder, n, index, value)
        raise Refused(*MARGIN)

    def _is_made_for_it(self, n: Node) -> bool:
        """Whether a tensor of the logits' shape was made entry by entry, such as numbers of the classes, one-hot."""
        return fake(n).shape == fake(self.root).shape and is_pointwise(n) and not written_after(n)


@dataclass(frozen=True)
class _Cosines:
    """Logits between -1 and 1, cut off there perhaps."""

    node: Node


@dataclass(frozen=True)
class _Angles:
    """The angles whose cosines logits are."""

    of: Node


def _called(node: Node) -> str:
    """What torch calls a function of one number."""
    name = nodes.called(node).rstrip("_")
    return {"arccos": "acos"}.get(name, name)


# The condition of a choice between two, what holds where it is true, and where it is not.
_BRANCHES = {"where": ("condition", "input", "other"), "masked_fill": ("mask", "value", "input")}
_ARGUMENTS = _BRANCHES | {"cast": ("input",), "clamp": ("input", "min", "max"), "acos": ("input",), "cos": ("input",)}
OUT_OF_PLACE: dict[str, Callable[[Any, Any], Any]] = {
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
}


def _product(a: Callable[[], Any], b: Callable[[], Any]) -> Any:
    for x, other in ((a, b), (b, a)):
        try:
            known = x()
        except Refused:
            continue
        known = int(known) if isinstance(known, bool) else known
        if is_number(known) and known == 0:
            return 0.0
        if is_number(known):
            rest = other()
            rest = int(rest) if isinstance(rest, bool) else rest
            return rest if known == 1 else known * rest if is_number(rest) else _unknown()
    return _unknown()


def _sum(a: Callable[[], Any], b: Callable[[], Any], sign: float = 1.0) -> Any:
    x, y = a(), b()
    if is_number(x) and is_number(y):
        return x + sign * y
    if is_number(y) and y == 0:
        return x
    return y if is_number(x) and x == 0 and sign == 1.0 else _unknown()


def _branch(condition: Callable[[], Any], a: Callable[[], Any], b: Callable[[], Any]) -> Any:
    holds = condition()
    return (a if holds else b)() if isinstance(holds, bool) else _unknown()


def _cast(a: Callable[[], Any]) -> Any:
    number = a()
    return number if is_number(number) else _unknown()


def _clamped(a: Callable[[], Any], low: Callable[[], Any], high: Callable[[], Any]) -> Any:
    """To what cosines are anyway, or a rounding error less: their arccosine has a finite slope then."""
    z = a()
    return _Cosines(z) if isinstance(z, Node) and between_cosines(low(), high()) else _unknown()


def _angles(a: Callable[[], Any]) -> Any:
    z = a()
    return _Angles(z.node) if isinstance(z, _Cosines) else _Angles(z) if isinstance(z, Node) else _unknown()


def _cosines(a: Callable[[], Any]) -> Any:
    angles = a()
    return angles.of if isinstance(angles, _Angles) else _unknown()


def _unknown() -> Any:
    raise Refused(*MARGIN)


# Ops whose result elsewhere may be one of their arguments.
_SIMPLIFIED: dict[str, Callable[..., Any]] = {
    "mul": _product,
    "add": _sum,
    "sub": lambda a, b: _sum(a, b, -1.0),
    "where": _branch,
    "masked_fill": _branch,
    "cast": _cast,
    "clamp": _clamped,
    "acos": _angles,
    "cos": _cosines,
}
