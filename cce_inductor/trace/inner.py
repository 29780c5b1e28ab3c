"""Sums over the classes of products of logits' functions, written in fewer ops: decomposed into products and sums.

`einsum`, `vecdot` and `bmm` of two tensors of the logits' shape, `xlogy` and `entr` of probabilities, and the logarithm
of a quotient of them; `einsum` of them, a matrix and vectors; `lerp`. A target that is made of one-hot tensors and of
probabilities gives a sum of products with each.
The target's entry of the logarithm of a mixture of two heads' probabilities asks for no more than the target's entries
of those. The nodes are put into the graph in front of what they replace, and followed like the program's own.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..graph import nodes
from ..graph.builder import Builder, Proxy
from ..graph.facts import Fact
from ..graph.fakes import fake, is_number, is_tensor, same
from ..graph.nodes import Op
from ..graph.refusal import Refused
from .decompose import in_dtype_of, widened
from .log_mixtures import LogOfMixture, only_used_by, takes_out
from .one_hot import coefficient, mixture
from .operands import vocab
from .reductions import arguments_of
from .shapes import per_row
from .trace import Trace
from .two_heads import Sum, averaged, factor_in
from .values import Value
from .walk import Walk, distinct

Record = Callable[[Builder], Proxy]


@dataclass(frozen=True)
class Quotient:
    """The probabilities `above` over the probabilities `below`."""

    above: Node
    below: Node
    traces: tuple[Trace, ...]
    what = "probabilities over probabilities"
    cure = "take its logarithm"


@dataclass(frozen=True)
class Terms:
    """A sum of products of the logits' shape: for each a number, and the tensors that are multiplied.

    detached: whether no gradient goes through it.
    """

    node: Node
    products: tuple[tuple[float, tuple[Node, ...]], ...]
    traces: tuple[Trace, ...]
    detached: bool = False
    what = "one-hot tensors and probabilities, added up"
    cure = "multiply them with log-probabilities, and sum"

    def times(self, node: Node, by: float | Node) -> Terms:
        made = [(n * by, of) if isinstance(by, (int, float)) else (n, (*of, by)) for n, of in self.products]
        return replace(self, node=node, products=tuple(made))

    def record(self, builder: Builder) -> list[Proxy]:
        """Each product, as a tensor."""
        found = []
        for number, of in self.products:
            parts = [p.detach() if self.detached else p for p in map(builder.proxy, of)]
            product = functools.reduce(operator.mul, parts)
            found.append(product if number == 1.0 else product * number)
        return found


@dataclass(frozen=True)
class Stacked:
    """Probabilities side by side in a new dimension `dim`."""

    parts: tuple[Node, ...]
    dim: int
    traces: tuple[Trace, ...]
    what = "probabilities of several heads in one tensor"
    cure = "add them up"


@dataclass(frozen=True)
class KlEntries:
    """kl_div of each entry against one-hot targets, for log-probabilities `value`. rows: their sums, 1 wide."""

    node: Node
    value: Value
    rows: Record
    traces: tuple[Trace, ...]
    what = "kl_div of each entry"
    cure = "sum it over the classes, weighted by rows alone"


Begun: TypeAlias = Quotient | Terms | LogOfMixture | Stacked | KlEntries


def follows(walk: Walk, node: Node, op: Op | None, touched: list[Node]) -> bool:
    """Whether a node is one of these; Refused for a use of what it began that has no rule."""
    if op is None:
        return False
    known: Any = next((k for n in touched if isinstance(k := walk.sums.get(n), tuple(_USES))), None)
    record: Any = _viewed(walk, node, op, touched)
    if record is not None:
        pass
    elif known is None:
        begun = _begins(walk, node, op, touched)
        if begun is not None:
            walk.put_sum(node, begun)
            return True
        rule = _RULES.get(op.name) if not op.inplace else None
        of_heads = all(n in walk.values or (op.name in _OF_SUMS and n in walk.sums) for n in touched)
        record = rule(walk, node, op) if rule is not None and of_heads else None
        if record is None:
            return False
    else:
        use = _USES[type(known)].get(op.name) if not op.inplace else None
        if use is None and isinstance(known, LogOfMixture):
            return False
        record = use(walk, node, op, known) if use is not None else None
        if record is None:
            raise Refused(f"{nodes.describe(node)} of {known.what}", known.cure)
        if isinstance(record, (Terms, KlEntries)):
            walk.put_sum(node, record)
            return True
    result = walk.decompose(node, _traces(walk, touched), lambda b: in_dtype_of(record(b), node))
    # What is as large as the logits is followed further under its own name.
    if result in walk.values:
        entry = walk.values[result]
        walk.put(node, entry.trace, [v.at(node) for v in entry.values])
    elif result in walk.sums:
        walk.put_sum(node, replace(walk.sums[result], node=node))
    return True


def _traces(walk: Walk, touched: list[Node]) -> list[Trace]:
    of_values = [walk.values[n].trace for n in touched if n in walk.values]
    return distinct([*of_values, *(t for n in touched if n in walk.sums for t in walk.sums[n].traces)])


def _viewed(walk: Walk, node: Node, op: Op, touched: list[Node]) -> Record | None:
    """A view of a mixture, or of its logarithm: that of the views of what is mixed."""
    source = touched[0]
    if not op.has(Fact.VIEW) or op.inplace or len(touched) > 1 or op.args.get("input") is not source:
        return None
    known = walk.sums.get(source)
    if isinstance(known, LogOfMixture):
        parts = known.parts
    elif isinstance(known, Sum) and _is_probability(walk, source):
        parts = _mixed(walk, known)
    else:
        return None

    def of_part(builder: Builder, part: Node) -> Any:
        given: Any = lambda n: builder.proxy(part if n is source else n)  # noqa: E731
        return builder.again(node, map_arg(node.args, given), map_arg(node.kwargs, given))

    def record(builder: Builder) -> Any:
        views = [(number, of_part(builder, part)) for number, part in parts]
        if isinstance(known, Sum):
            return functools.reduce(operator.add, [p * number for number, p in views])
        return _log_of(builder, views, walk.values[parts[0][1]].values[0].kind)

    return record


def _log_of(builder: Builder, parts: list[tuple[float, Any]], kind: str) -> Any:
    """The logarithm of a sum of probabilities, each times a number, from these or from their logarithms."""
    if kind == "softmax":
        return functools.reduce(operator.add, [p * number for number, p in parts]).log()
    # Where the probabilities would be 0 in floating point, their logarithms are not infinite.
    shifted = [p + math.log(number) for number, p in parts]
    return functools.reduce(lambda x, y: builder.call(torch.logaddexp, x, y), shifted)


# ---- what is begun


def _begins(walk: Walk, node: Node, op: Op, touched: list[Node]) -> Begun | None:
    if op.inplace:
        return None
    if op.name == "kl_div" and op.args["reduction"] == "none":
        return _entries(walk, node, op)
    if op.name == "stack" and only_used_by(node, ("mean", "sum")) and isinstance(op.args["dim"], int):
        parts = op.args["tensors"]
        if all(n in walk.values and _is_probability(walk, n) for n in parts):
            return Stacked(tuple(parts), op.args["dim"] % fake(node).dim(), tuple(_traces(walk, touched)))
    if op.name == "log" and isinstance(known := walk.sums.get(op.args["input"]), Sum):
        if not _is_probability(walk, op.args["input"]):
            return None
        return LogOfMixture(node, _mixed(walk, known), known.class_dim, known.traces)
    above, below = op.args.get("input"), op.args.get("other")
    if op.name == "div" and op.args["rounding_mode"] is None and all(_is_probability(walk, n) for n in (above, below)):
        return Quotient(above, below, tuple(_traces(walk, touched)))  # type: ignore[arg-type]
    if not all(n in walk.values for n in touched):
        return None
    probabilities = [n for n in touched if (v := walk.values[n].values[0]).kind == "softmax" and v.picked is None]
    if op.name != "add" or len(touched) != 1 or len(probabilities) != 1 or op.args["alpha"] != 1:
        return None
    hot = op.args["other"] if op.args["input"] is touched[0] else op.args["input"]
    value: Value = walk.values[touched[0]].values[0]
    if not is_tensor(hot) or fake(hot).shape != value.fake.shape or mixture(hot, value) is None:
        return None
    return Terms(node, ((1.0, (hot,)), (1.0, (touched[0],))), tuple(_traces(walk, touched)))


def _mixed(walk: Walk, mixture: Sum) -> tuple[tuple[float, Node], ...]:
    """The nodes of the softmaxes that were added up, with the numbers that each is multiplied by."""
    weights = [(p.factor, p.weights) for p in mixture.products if p.weights is not None]
    return tuple((number / factor_in(walk, of), of.node) for number, of in weights)


def _is_probability(walk: Walk, node: Any) -> bool:
    """Whether a node is a softmax, or a sum of them."""
    if isinstance(made := walk.sums.get(node), Sum):
        return all(p.weights is not None and p.values is None and not p.changes for p in made.products)
    value = walk.values[node].values[0] if node in walk.values else None
    return value is not None and value.kind == "softmax" and value.picked is None


# ---- one op that is several


def _einsum(walk: Walk, node: Node, op: Op) -> Record | None:
    given = op.args["operands"]
    given = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    inputs, arrow, output = str(op.args["equation"]).replace(" ", "").partition("->")
    if len(given) == 3 and arrow:
        return _chain(walk, node, given, inputs.split(","), output)
    letters, _, others = inputs.partition(",")
    if len(given) != 2 or not arrow or letters != others or len(letters) != len(output) + 1:
        return None
    at = next((i for i, letter in enumerate(letters) if letter not in output), None)
    if at is None or letters.replace(letters[at], "") != output or "..." in letters[at:]:
        return None
    return _summed(walk, given[0], given[1], at - len(letters))


def _chain(walk: Walk, node: Node, given: Any, letters: list[str], rows: str) -> Record | None:
    """``...v, vd, ...d -> ...`` in any order: a product with a matrix, and its inner products with vectors."""
    named = dict(zip(letters, given, strict=True))
    ours = next((of for of, n in named.items() if n in walk.values), "")
    matrix = next((of for of in letters if len(of) == 2 and of[0] != of[1] and len({*of} & {*rows}) == 0), "")
    vectors = next((of for of in letters if of not in (ours, matrix)), "")
    v, d = ours[len(rows) :], vectors[len(rows) :]
    if len(named) != 3 or ours != rows + v or vectors != rows + d or matrix not in (v + d, d + v) or "." in rows:
        return None
    if v == d or not all(map(is_tensor, given)) or not _classes(walk, (named[ours],), -1):
        return None

    def record(builder: Builder) -> Proxy:
        p, m, x = (builder.proxy(named[of]) for of in (ours, matrix, vectors))
        return ((p.matmul(m) if matrix == v + d else builder.call(torch.nn.functional.linear, p, m)) * x).sum(-1)

    return record


def _vecdot(walk: Walk, node: Node, op: Op) -> Record | None:
    return _summed(walk, op.args["input"], op.args["other"], op.args["dim"])


def _summed(walk: Walk, a: Any, b: Any, dim: int) -> Record | None:
    """The sum of a · b over `dim`, if that has the classes."""
    if not is_tensor(a) or not is_tensor(b) or fake(a).shape != fake(b).shape or not _classes(walk, (a, b), dim):
        return None
    return lambda builder: (builder.proxy(a) * builder.proxy(b)).sum(dim)


def _matmul(walk: Walk, node: Node, op: Op) -> Record | None:
    """(..., 1, V) @ (..., V, 1)."""
    a, b = op.args["input"], op.args["other"]
    if not is_tensor(a) or not is_tensor(b) or fake(a).dim() != fake(b).dim() or fake(a).dim() < 3:
        return None
    x, y = fake(a).shape, fake(b).shape
    if not (same(x[-2], 1) and same(y[-1], 1) and all(map(same, x[:-2], y[:-2]))):
        return None
    if not _classes(walk, (a,), -1) and not _classes(walk, (b,), -2):
        return None
    return lambda builder: (builder.proxy(a) * builder.proxy(b).transpose(-1, -2)).sum(-1, keepdim=True)


def _classes(walk: Walk, of: tuple[Node, ...], dim: int) -> bool:
    """Whether the classes of one of these can be read in a dimension."""
    ways = [v for n in of if n in walk.values for v in walk.values[n].values]
    return any(v.class_dim == dim % v.fake.dim() for v in ways)


def _xlogy(walk: Walk, node: Node, op: Op) -> Record | None:
    a, b = op.args["input"], op.args["other"]
    if not all(n in walk.sums or (n in walk.values and walk.values[n].values[0].kind == "softmax") for n in (a, b)):
        return None
    return lambda builder: builder.proxy(a) * builder.proxy(b).log()


def _entr(walk: Walk, node: Node, op: Op) -> Record | None:
    p = op.args["input"]
    return lambda builder: -(builder.proxy(p) * builder.proxy(p).log())


def _lerp(walk: Walk, node: Node, op: Op) -> Record | None:
    start, end, weight = op.args["input"], op.args["end"], op.args["weight"]
    if not is_number(weight) or not is_tensor(start) or not is_tensor(end):
        return None
    return lambda builder: builder.proxy(start) * (1.0 - weight) + builder.proxy(end) * weight


def _kl_div(walk: Walk, node: Node, op: Op) -> Record | None:
    """kl_div against one one-hot tensor, summed or averaged."""
    made = _entries(walk, node, op) if op.args["reduction"] in ("sum", "mean", "batchmean") else None
    if made is None:
        return None
    return lambda b: averaged(made.rows(b).sum(), b.proxy(made.value.node), op.args["reduction"])


def _entries(walk: Walk, node: Node, op: Op) -> KlEntries | None:
    """kl_div against one one-hot tensor, smoothed perhaps: its logarithms are those of two numbers a row."""
    args = op.args
    entry = walk.values.get(args["input"])
    value: Value | None = entry.values[0] if entry is not None else None
    if entry is None or value is None or value.kind != "log_softmax" or value.factor != 1.0 or args["log_target"]:
        return None
    mixed = mixture(args["target"], value) if is_tensor(args["target"]) else None
    if mixed is None or len(mixed.terms) != 1 or args["size_average"] is not None or args["reduce"] is not None:
        return None

    def rows(builder: Builder) -> Proxy:
        z, target = builder.proxy(value.node), builder.proxy(args["target"])
        own: Any = coefficient(builder, mixed.terms[0], value.class_dim) + mixed.constant
        rows: Any = _times_its_logarithm(builder, own) - (widened(z) * target).sum(value.class_dim)
        if mixed.constant:
            rows = rows + (vocab(builder, value) - 1) * _times_its_logarithm(builder, mixed.constant)
        return rows.unsqueeze(value.class_dim)

    return KlEntries(node, value, rows, tuple(entry.trace.with_parts))


def _times_its_logarithm(builder: Builder, p: Any) -> Any:
    if isinstance(p, torch.fx.Proxy):
        return builder.call(torch.xlogy, p, p)
    return p * math.log(p) if p > 0 else 0.0 if p == 0 else math.nan


_RULES: dict[str, Callable[[Walk, Node, Op], Record | None]] = {
    "einsum": _einsum,
    "kl_div": _kl_div,
    "vecdot": _vecdot,
    "matmul": _matmul,
    "xlogy": _xlogy,
    "entr": _entr,
    "lerp": _lerp,
}
# Those that may read sums of two heads' probabilities.
_OF_SUMS = ("xlogy", "entr", "einsum", "vecdot", "matmul")


# ---- what is done to what was begun


def _log(walk: Walk, node: Node, op: Op, known: Quotient) -> Record:
    return lambda builder: builder.proxy(known.above).log() - builder.proxy(known.below).log()


def _added(walk: Walk, node: Node, op: Op, known: Stacked) -> Record | None:
    if not takes_out(node, op, known.dim):
        return None
    factor = 1.0 / len(known.parts) if op.name == "mean" else 1.0
    return lambda builder: functools.reduce(operator.add, [builder.proxy(n) * factor for n in known.parts])


def _scaled(walk: Walk, node: Node, op: Op, known: Terms) -> Terms | None:
    other = op.args["other"] if op.args["input"] is known.node else op.args["input"]
    if is_number(other):
        return known.times(node, float(other) if op.name == "mul" else 1.0 / other)
    if op.name == "div" or not is_tensor(other) or fake(node).shape != fake(known.node).shape or known.detached:
        return None
    return known.times(node, other)


def _negated(walk: Walk, node: Node, op: Op, known: Terms) -> Terms:
    return known.times(node, -1.0)


def _detached(walk: Walk, node: Node, op: Op, known: Terms) -> Terms:
    return replace(known, node=node, detached=True)


def _total(walk: Walk, node: Node, op: Op, known: Terms) -> Record | None:
    if known.detached:
        return None
    args = [op.args["dim"], bool(op.args["keepdim"])] if op.args["dim"] is not None else []
    return lambda builder: functools.reduce(operator.add, [getattr(p, op.name)(*args) for p in known.record(builder)])


def _as_target(walk: Walk, node: Node, op: Op, known: Terms) -> Record | None:
    """cross_entropy is linear in its target."""
    if op.args["target"] is not known.node or op.args["label_smoothing"]:
        return None
    rest = {name: value for name, value in op.args.items() if name not in ("input", "target") and value is not None}

    def record(builder: Builder) -> Proxy:
        z = builder.proxy(op.args["input"])
        losses = [builder.call(torch.nn.functional.cross_entropy, z, p, **rest) for p in known.record(builder)]
        return functools.reduce(operator.add, losses)

    return record


def _gathered(walk: Walk, node: Node, op: Op, known: LogOfMixture) -> Record | None:
    index = op.args["index"]
    if op.args["dim"] % fake(node).dim() != known.class_dim or not is_tensor(index):
        return None
    return lambda builder: _log_entries(walk, builder, known, builder.proxy(index))


def _log_entries(walk: Walk, builder: Builder, known: LogOfMixture, index: Any) -> Any:
    """The logarithm of the mixture's entries at some classes."""
    found: list[Any] = [builder.proxy(part).gather(known.class_dim, index) for _, part in known.parts]
    parts = [(number, p) for (number, _), p in zip(known.parts, found, strict=True)]
    return _log_of(builder, parts, walk.values[known.parts[0][1]].values[0].kind)


def _nll_loss(walk: Walk, node: Node, op: Op, known: LogOfMixture) -> Record | None:
    arguments, target = arguments_of(op.args), op.args["target"]
    if op.args["weight"] is not None or fake(known.node).dim() != 2 or known.class_dim != 1 or not is_tensor(target):
        return None

    def record(builder: Builder) -> Proxy:
        t: Any = builder.proxy(target)
        counts = t.ne(arguments.ignore_index)
        own = _log_entries(walk, builder, known, builder.call(torch.where, counts, t, 0).unsqueeze(1)).squeeze(1)
        rows: Any = builder.call(torch.where, counts, -own, 0.0)
        if arguments.reduction == "none":
            return rows
        return rows.sum() / counts.sum() if arguments.reduction == "mean" else rows.sum()

    return record


def _weighed(walk: Walk, node: Node, op: Op, known: KlEntries) -> KlEntries | None:
    """Times or over something that is the same for all classes of a row; or 0 in some rows."""
    args = op.args
    if op.name == "masked_fill":
        mask = per_row(args["mask"], known.value)
        if mask is None or not is_number(args["value"]) or args["value"] != 0:
            return None
        return replace(known, node=node, rows=lambda b: known.rows(b).masked_fill(b.proxy(mask), 0.0))
    over = args["input"] is known.node
    other: Any = args["other"] if over else args["input"]
    if op.name == "div" and (not over or args["rounding_mode"] is not None):
        return None
    if is_tensor(other) and fake(other).numel() != 1:
        other = per_row(other, known.value)
    if not (is_number(other) or is_tensor(other)) or fake(node).shape != known.value.fake.shape:
        return None
    function = operator.mul if op.name == "mul" else operator.truediv

    def rows(builder: Builder) -> Proxy:
        return function(known.rows(builder), builder.proxy(other) if is_tensor(other) else other)

    return replace(known, node=node, rows=rows)


def _rows_summed(walk: Walk, node: Node, op: Op, known: KlEntries) -> Record | None:
    dims, value = op.args["dim"], known.value
    if dims is None:
        return lambda b: averaged(known.rows(b).sum(), b.proxy(value.node), op.name)
    listed = [d % value.fake.dim() for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    if value.class_dim not in listed or (op.name == "mean" and len(listed) > 1):
        return None
    keepdim = bool(op.args["keepdim"])
    if op.name == "sum":
        return lambda b: known.rows(b).sum(dims, keepdim)
    return lambda b: known.rows(b).sum(dims, keepdim) / vocab(b, value)


_USES: dict[type, dict[str, Callable[..., Any]]] = {
    KlEntries: {"mul": _weighed, "div": _weighed, "masked_fill": _weighed, "sum": _rows_summed, "mean": _rows_summed},
    Quotient: {"log": _log},
    Stacked: {"mean": _added, "sum": _added},
    LogOfMixture: {"gather": _gathered, "nll_loss": _nll_loss},
    Terms: {
        **{"mul": _scaled, "div": _scaled, "neg": _negated, "detach": _detached},
        **{"sum": _total, "mean": _total, "cross_entropy": _as_target},
    },
}
