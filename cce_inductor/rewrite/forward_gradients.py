"""Gradients that are formed in the forward: of a loss that is one number, linear in the statistics.

By what it multiplies each statistic is known before the statistic is, so one operator gives both, and the logits need
not be computed again. Here it is found out of the rewritten graph whether all that the program makes of the statistics
comes together in one number (`_Tail`), and what the tangents are (`_tangents`): from that number back to the
statistics, by the rule of each op. The numbers that it multiplies by, such as a mask and its sum, have to be there
first: the operator, and what follows from it, moves down to the number.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node

from ..graph import memory, nodes
from ..graph.builder import Builder, Proxy
from ..graph.facts import Fact
from ..graph.fakes import example, is_number, is_tensor, same
from ..graph.nodes import Op
from ..graph.regions import descendants
from ..ops.library import FORWARD
from ..ops.with_gradients import ATTACH, WITH_GRADIENTS

# The derivative of the loss by the entries of a tensor: one number, or a vector of one for each, in their order.
Tangent = Any
# (builder, derivative by the result) -> derivative by the argument
Adjoint = Callable[[Builder, Tangent], Tangent]
# Of a node: which of its arguments have a gradient, each with its adjoint; none where it is not linear.
Made = list[tuple[Node, Adjoint]]

# Operands and statistics of which no kernel forms gradients in the forward.
_WITHOUT = frozenset(("entries", "row_label", "class_label"))
_REST = "lse_rest"
_LOG_SUM_EXPS = ("lse", "other_lse")
# Functions by which a program changes how the ops behind them are run.
_SWITCHES = ("_set_grad_enabled", "_inference_mode", "_enter_autocast", "_exit_autocast")


def form(graph: Graph) -> bool:
    """Has the operator of a graph form the gradients too, where it can; gives whether it does."""
    calls = [node for node in graph.nodes if node.target is FORWARD]
    if len(calls) != 1:
        return False  # each would hold a gradient of its weight until the backward
    (call,) = calls
    arguments: Any = call.args
    _, names, _, statistics, *_ = arguments
    if _WITHOUT & {*names.split()} or _REST in statistics:
        return False
    _fix_dtypes(call)
    tail = _Tail(call)
    if tail.end is None:
        return False
    tail.sink(tail.end)
    _replace(graph, tail, tail.end)
    return True


def _fix_dtypes(call: Node) -> None:
    """Has ``x.to(a statistic)``, which reads the dtype of that, say the dtype."""
    for node in list(descendants(call)):
        if node.op == "call_method" and node.target == "to" and isinstance(node.args[1], Node):
            node.args = (node.args[0], example(node).dtype)


class _Tail:
    """What a program makes of the statistics that an operator gives, up to where it is one number.

    late: all that follows from the operator. rules: of each node with a gradient up to the end, which of its arguments
    has one, and its adjoint. bare: log-sum-exps on their way to `losses.normalizer`: to the operator those that are not
    finite are NaN, and in other uses they are not. end: the number; None where there is none, or where what leads to it
    is not linear.
    """

    def __init__(self, call: Node) -> None:
        operands: Any = call.args[0]
        self.call, self.input = call, operands[0]
        self.dtype = torch.float64 if example(self.input).dtype == torch.float64 else torch.float32
        self.late = set(descendants(call))
        self.rules: dict[Node, Made] = {}
        self.bare: set[Node] = set()
        self.end = self._find()

    def has_gradient(self, n: Any) -> bool:
        """Whether a gradient passes a node on its way to the statistics."""
        return n in self.late and is_tensor(n) and example(n).requires_grad

    def is_known(self, x: Any) -> bool:
        """Whether something is there before the operator, and is not trained itself."""
        return not isinstance(x, Node) or (x not in self.late and not _trains(x))

    def rows(self, builder: Builder) -> Any:
        """How many rows the operator has, recorded."""
        n = example(self.input).shape[0]
        return n if isinstance(n, int) else builder.proxy(self.input).size(0)

    def is_of_rows(self, count: Any) -> bool:
        """Whether a size is how many rows the operator has."""
        return same(example(self.input).shape[0], count)

    def sink(self, end: Node) -> None:
        """Moves the operator, and what follows from it, in front of the number."""
        moved = [self.call, *(n for n in self._behind() if n in self.late)]
        for node in moved[: moved.index(end)]:
            end.prepend(node)

    def _find(self) -> Node | None:
        """The last number that all gradients pass; or None."""
        waiting: dict[Node, set[Node]] = {}  # users with a gradient that have not come yet
        end = None
        for node in self._behind():
            if memory.mutated(node) or getattr(node.target, "__name__", "").endswith(_SWITCHES):
                break
            if not self.has_gradient(node):
                continue
            if not self._take(node):
                break
            for source, _ in self.rules[node]:
                waiting.get(source, set()).discard(node)
            waiting[node] = {n for n in node.users if not is_tensor(n) or self.has_gradient(n)}
            if example(node).dim() == 0 and not any(users for n, users in waiting.items() if n is not node):
                end = node
        return end

    def _behind(self) -> Iterator[Node]:
        node = self.call.next
        while node.op != "root":
            yield node
            node = node.next

    def _take(self, node: Node) -> bool:
        """Notes the adjoint of a node; False if it is not linear."""
        if node.target is operator.getitem and node.args[0] is self.call:
            self.rules[node] = [(self.call, _as_it_is)]
            arguments: Any = self.call.args
            if arguments[3].split()[node.args[1]] in _LOG_SUM_EXPS:
                self.bare.add(node)
            return True
        op = nodes.read(node)
        if op is None or op.inplace:
            return False
        rule = _RULES.get(op.name, _same if op.has(Fact.IN_ORDER) else None)
        made = [] if rule is None else rule(self, node, op)
        sources = [source for source, _ in made]
        if not self.bare.isdisjoint(sources) and not _makes_normalizer(node):
            if op.name not in ("add", "sub") or len(made) > 1:
                return False
            self.bare.add(node)
        self.rules[node] = made
        return bool(made) and all(n in sources for n in node.all_input_nodes if _trains(n))


def _trains(n: Node) -> bool:
    return bool(getattr(example(n), "requires_grad", False))


# ---------------------------------------------------------------------------------------------------------- the rules


def _as_it_is(builder: Builder, t: Tangent) -> Tangent:
    return t


def _same(tail: _Tail, node: Node, op: Op) -> Made:
    """All entries, in their order: a cast, a copy, another shape."""
    return [(op.args["input"], _as_it_is)]


def _sum_of_two(tail: _Tail, node: Node, op: Op) -> Made:
    factors = {"add": (1.0, 1.0), "sub": (1.0, -1.0), "rsub": (-1.0, 1.0)}[op.name]
    given = zip((op.args["input"], op.args["other"]), factors, strict=True)
    made: Made = [(x, partial(_times, factor)) for x, factor in given if tail.has_gradient(x)]
    return made if op.args.get("alpha", 1) == 1 and all(_fits(x, node) for x, _ in made) else []


def _negative(tail: _Tail, node: Node, op: Op) -> Made:
    return [(op.args["input"], partial(_times, -1.0))]


def _times(factor: float, builder: Builder, t: Tangent) -> Tangent:
    return t if factor == 1.0 else -t


def _product(tail: _Tail, node: Node, op: Op) -> Made:
    x, y = op.args["input"], op.args["other"]
    if op.name == "mul" and tail.has_gradient(y):
        x, y = y, x
    if op.args.get("rounding_mode") is not None or not tail.has_gradient(x) or not _fits(x, node):
        return []
    if _makes_normalizer(node):
        return [(x, _as_it_is)]  # the operator does that to its tangents itself
    if not tail.is_known(y) or (is_tensor(y) and example(y).dim() and not _fits(y, node)):
        return []

    def adjoint(builder: Builder, t: Tangent) -> Tangent:
        factor = _flat(builder, y)
        if is_tensor(y) and (wide := torch.promote_types(example(y).dtype, tail.dtype)) != example(y).dtype:
            factor = factor.to(wide)
        return t / factor if op.name == "div" else t * factor

    return [(x, adjoint)]


def _makes_normalizer(node: Node) -> bool:
    """Whether a node is `losses.normalizer` of its first argument: times NaN where that is not finite, else times 1."""
    x, factor = node.args if len(node.args) == 2 else (None, None)
    cast = nodes.read(factor) if isinstance(factor, Node) else None
    chosen = nodes.read(cast.args["input"]) if cast is not None and cast.name == "cast" else None
    if chosen is None or chosen.name != "where" or chosen.args["input"] != 1.0:
        return False
    other, finite = chosen.args["other"], chosen.args["condition"]
    return is_number(other) and math.isnan(other) and finite.target == "isfinite" and finite.args[0] is x


def _chosen(tail: _Tail, node: Node, op: Op) -> Made:
    """where and masked_fill."""
    filled = op.name == "masked_fill"
    mask, *given = (op.args[n] for n in (("mask", "input", "value") if filled else ("condition", "input", "other")))
    places = zip(given, (not filled, filled), strict=True)
    made: Made = [(x, partial(_where, mask, there, tail.dtype)) for x, there in places if tail.has_gradient(x)]
    return made if tail.is_known(mask) and _fits(mask, node) and all(_fits(x, node) for x, _ in made) else []


def _where(mask: Node, there: bool, dtype: torch.dtype, builder: Builder, t: Tangent) -> Tangent:
    held = _flat(builder, mask)
    if _is_tensor(t):
        return builder.call(torch.where, held, *((t, 0.0) if there else (0.0, t)))
    return (held if there else ~held).to(dtype) * t


def _total(tail: _Tail, node: Node, op: Op) -> Made:
    """sum and mean, of all or over the last dimensions, whose sizes are numbers."""
    x, dim = op.args["input"], op.args.get("dim")
    shape = example(x).shape
    given = range(len(shape)) if dim is None else dim if isinstance(dim, (list, tuple)) else [dim]
    first = len(shape) - len(given)
    if sorted(d % len(shape) for d in given) != list(range(first, len(shape))):
        return []
    count = math.prod(shape[first:])
    counted = count > 0 if isinstance(count, int) else first == 0 and (op.name == "sum" or tail.is_of_rows(count))

    def adjoint(builder: Builder, t: Tangent) -> Tangent:
        if first and _is_tensor(t) and example(t.node).dim():
            t = t.unsqueeze(-1).expand(-1, count).reshape(-1)
        if op.name == "sum":
            return t
        return t / (count if isinstance(count, int) else tail.rows(builder))

    return [(x, adjoint)] if counted else []


def _is_tensor(t: Tangent) -> bool:
    """Whether a derivative is a tensor, and not a number, which may be one of the graph."""
    return isinstance(t, torch.fx.Proxy) and is_tensor(t.node)


def _fits(x: Any, node: Node) -> bool:
    """Whether a tensor has the shape of a node's result."""
    if not is_tensor(x) or example(x).dim() != example(node).dim():
        return False
    return all(map(same, example(x).shape, example(node).shape))


def _flat(builder: Builder, x: Any) -> Any:
    """A number, or one for each entry, in one dimension."""
    if not isinstance(x, Node):
        return x
    return builder.proxy(x).reshape(-1) if is_tensor(x) and example(x).dim() > 1 else builder.proxy(x)


_RULES: dict[str, Callable[[_Tail, Node, Op], Made]] = {
    "cast": _same,
    "add": _sum_of_two,
    "sub": _sum_of_two,
    "rsub": _sum_of_two,
    "mul": _product,
    "div": _product,
    "neg": _negative,
    "where": _chosen,
    "masked_fill": _chosen,
    "sum": _total,
    "mean": _total,
}


# -------------------------------------------------------------------------------------------------------- the operator


def _tangents(builder: Builder, tail: _Tail, end: Node) -> dict[int, Tangent]:
    """What each statistic, by its place among the operator's results, is multiplied by."""
    found: dict[Node, Tangent] = {end: 1.0}
    made: dict[int, Tangent] = {}
    for node in reversed(tail.rules):
        for source, adjoint in tail.rules[node] if node in found else ():
            t = adjoint(builder, found[node])
            key: Any = node.args[1] if source is tail.call else source
            into: dict[Any, Tangent] = made if source is tail.call else found
            into[key] = into[key] + t if key in into else t
    return made


def _replace(graph: Graph, tail: _Tail, end: Node) -> None:
    call = tail.call
    arguments: Any = call.args
    operands, names, row_mask, statistics, _, *attributes = arguments
    wanted, named = statistics.split(), dict(zip(names.split(), operands, strict=True))
    needs = [name for name, t in named.items() if example(t).requires_grad]
    builder = Builder(graph, call)

    def record() -> Node:
        given = {wanted[i]: _vector(builder, tail, t) for i, t in sorted(_tangents(builder, tail, end).items())}
        rest = (names, row_mask, statistics, " ".join(needs), *attributes)
        return builder.call(WITH_GRADIENTS, list(given.values()), " ".join(given), operands, *rest).node

    made = builder.run(record)
    for user in list(call.users):
        user.replace_input_with(call, made)
    graph.erase_node(call)
    behind = Builder(graph, end.next)

    def attach() -> Node:
        out = behind.proxy(made)
        gradients = [out[len(wanted) + i] for i in range(len(needs))]
        return behind.call(ATTACH, behind.proxy(end), [named[name] for name in needs], gradients).node

    attached = behind.run(attach)
    end.replace_all_uses_with(attached, delete_user_cb=lambda user: user is not attached)


def _vector(builder: Builder, tail: _Tail, t: Tangent) -> Proxy:
    """A tangent as (N,), of the dtype of the statistics."""
    if not _is_tensor(t):
        return builder.call(torch.full, (tail.rows(builder),), t, dtype=tail.dtype, device=example(tail.input).device)
    t = t if example(t.node).dim() else t.expand(tail.rows(builder))
    return t.to(tail.dtype)  # type: ignore[return-value]
