"""Losses that compare two sets of logits over one vocabulary: divergences, and cross-entropies with probabilities.

Such a loss sums, over the classes, products of one head's softmax with another head's log-probabilities, however it is
spelled. A tensor of those products is a `Sum`: it is followed through what a program does to it (`follows`), and ends
where the classes are summed. There it is put together again from as few functions of two heads as there are
(functions.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..graph import memory, nodes
from ..graph.builder import Builder, Proxy
from ..graph.facts import Fact
from ..graph.fakes import fake, is_number, is_tensor, same
from ..graph.nodes import Op
from ..graph.refusal import Refused
from . import masks_of_two, rules
from .decompose import in_dtype_of, widened
from .functions import (
    Change,
    LogMixture,
    Product,
    as_recorded,
    comparable,
    in_functions,
    of_two,
    put_function,
    read_with,
)
from .log_mixtures import LogOfMixture
from .masks_of_two import Expanded, Infinite, Zeros
from .operands import vocab
from .reductions import arguments_of, over_rows, reads_the_classes
from .shapes import per_row
from .trace import Trace
from .values import Function as Kind
from .values import Value
from .walk import Entry, Walk, distinct

# ---- tensors of products


@dataclass(frozen=True)
class Sum:
    """A tensor of the logits' shape, the sum of products, with the classes in dimension `class_dim`."""

    node: Node
    class_dim: int
    products: tuple[Product, ...]
    traces: tuple[Trace, ...]
    what = "products of two heads' probabilities"

    def changed(self, node: Node, change: Change) -> Sum:
        return replace(self, node=node, products=tuple(replace(p, changes=(*p.changes, change)) for p in self.products))

    def times(self, node: Node, number: float) -> Sum:
        return replace(self, node=node, products=tuple(replace(p, factor=p.factor * number) for p in self.products))

    @property
    def shaped(self) -> Value:
        """A value with its shape: the rules for rows ask for nothing else."""
        value = next(v for p in self.products for v in p.members)
        return replace(value, node=self.node, class_dim=self.class_dim, rows=(), function=Kind())


@dataclass(frozen=True)
class Stale:
    """What shares memory with products that were edited in place."""

    traces: tuple[Trace, ...]
    what = "aliases of edited products"


# More products than any loss is written with.
_MOST = 8


def _lifted(entry: Entry, class_dim: int | None) -> Sum:
    """A function of one head's logits as a sum of one product."""
    value = read_with(entry, class_dim)
    comparable(value)
    weights = replace(value, function=Kind("softmax")) if value.kind in ("softmax", "p log p", "p z") else None
    kinds = {"log_softmax": "log_softmax", "p log p": "log_softmax", "logits": "logits", "p z": "logits"}
    values = replace(value, function=Kind(kinds[value.kind])) if value.kind in kinds else None
    if weights is None and values is None:
        raise Refused(f"the {value.words} are compared with those of another head", "use softmax and log_softmax")
    product = Product(1.0 if value.kind == "logits" else value.factor, weights, values)
    return Sum(value.node, value.class_dim, (product,), tuple(entry.trace.with_parts))


def _lifted_mixture(walk: Walk, known: LogOfMixture) -> Sum:
    """The logarithm of a mixture as a sum of one product."""
    parts = []
    for number, node in known.parts:
        value = read_with(walk.values[node], known.class_dim)
        comparable(value)
        number *= value.factor if value.kind == "softmax" else 1.0
        parts.append((number, replace(value, function=Kind("softmax"))))
    return Sum(known.node, known.class_dim, (Product(1.0, None, LogMixture(tuple(parts))),), known.traces)


def factor_in(walk: Walk, part: Value) -> float:
    """The factor that the node of a product's part has already."""
    return read_with(walk.values[part.node], part.class_dim).factor


def _sum(walk: Walk, node: Node, class_dim: int | None = None) -> Sum:
    """What a node is, with the classes there if it can be read so; Refused for what is no such sum."""
    if node in walk.sums:
        found = walk.sums[node]
        if isinstance(found, (Infinite, Zeros, Expanded)):
            raise Refused(f"{found.what} are read as numbers", "mask the products with them")
        if isinstance(found, LogOfMixture):
            return _lifted_mixture(walk, found)
        if isinstance(found, Stale):
            raise Refused("an alias of what two heads are compared by was edited in place", "use the out-of-place form")
        return found
    if node not in walk.values:
        raise Refused("parts of the logits are compared with another head's", "compare the logits")
    return _lifted(walk.values[node], class_dim)


def _class_dim(walk: Walk, given: Sequence[Node]) -> int | None:
    """Where the classes are: some of the tensors can be read in one way only."""
    found = [s.class_dim if isinstance(s := walk.sums.get(n), Sum) else _only(walk.values.get(n)) for n in given]
    return next((c for c in found if c is not None), None)


def _only(entry: Entry | None) -> int | None:
    return entry.values[0].class_dim if entry is not None and len(entry.values) == 1 else None


# ---- what is done to them


def follows(walk: Walk, node: Node, op: Op | None, touched: list[Node]) -> bool:
    """Whether a node is made of two heads, which is then noted; Refused if there is no rule for what it does."""
    if node.target is of_two:
        put_function(walk, node)
        return True
    if not any(n in walk.sums for n in touched) and not _begins(walk, node, op, touched):
        return False
    if op is not None and (mask := masks_of_two.made(walk, op)) is not None:
        walk.put_sum(node, mask)
        return True
    if op is not None and op.has(Fact.METADATA) and len(touched) == 1:
        return _shape_is_read(walk, node, touched[0])
    rule = _RULES.get(op.name) if op is not None else None
    layout_rule = op is not None and op.has(Fact.VIEW | Fact.HANDS_ON) and op.args.get("input") is touched[0]
    if op is None or not (rule or layout_rule) or (op.inplace and op.args.get("input") not in walk.sums):
        what = nodes.describe(node)
        raise Refused(f"{what} of the products of two heads' probabilities", "sum them over the classes first")
    made = rule(walk, node, op) if rule is not None else _rearranged(walk, node, op)
    if made is not None:
        made = replace(made, products=as_recorded(walk, node, made.products))
        put(walk, node, made, op.args["input"] if op.inplace else None)
    return True


def _shape_is_read(walk: Walk, node: Node, source: Node) -> bool:
    """Notes a read of the shape of products: that of logits with what happened to their rows."""
    sum_ = _sum(walk, source)
    product = sum_.products[0]
    first = product.members[0]
    maps = [(c.node, c.row_map) for c in product.changes if c.how == "map" and c.node is not None]
    value = replace(first, node=source, class_dim=sum_.class_dim, rows=(*first.rows, *maps), function=Kind())
    walk.values[first.node].trace.metadata.append((node, source, value))
    return True


def put(walk: Walk, node: Node, made: Sum, edited: Node | None) -> None:
    """Notes what a node is, and what `edited` is from here on, which it has written into."""
    if edited is not None:
        own = memory.storages(edited)
        for other in walk.sums:
            if memory.storages(other) & own:
                walk.sums[other] = Stale(made.traces)
        walk.sums[edited] = replace(made, node=edited)
    walk.put_sum(node, made)


def _set(walk: Walk, node: Node, op: Op) -> Sum:
    """0 where what weighs is 0, and infinity where what is averaged is the logarithm of 0: as it is anyway."""
    sum_, mask, number = _sum(walk, op.args["input"]), op.args["index"], op.args["value"]
    zeros = walk.sums.get(mask) if isinstance(mask, Node) else None
    of = [p.weights if number == 0 else p.values for p in sum_.products]
    source = zeros.value.source if isinstance(zeros, Zeros) and not zeros.other else None
    own = [v is not None and v.source == source for v in of]
    if number not in (0, float("inf")) or not (all(own) if number == 0 else any(own)):
        raise Refused("the products of two heads' probabilities are masked by class", "mask whole rows, with 0")
    return replace(sum_, node=node)


def _begins(walk: Walk, node: Node, op: Op | None, touched: list[Node]) -> bool:
    """Whether a node puts functions of two heads together that nothing else takes."""
    if op is not None and op.name in masks_of_two.BEGIN:
        return op.name == "isinf" or masks_of_two.made(walk, op) is not None
    if op is None or op.inplace or len(touched) != 2 or not all(n in walk.values for n in touched):
        return False
    if op.name in ("cross_entropy", "kl_div"):
        return True
    a, b = (walk.values[n].values[0] for n in touched)
    kinds = {a.kind, b.kind}
    if op.name in ("add", "sub"):
        # Two heads' logits are those of one wider head.
        alike = {"softmax", "log_softmax", "p log p"} | ({"logits"} if a.source != b.source else set())
        return kinds <= alike and kinds != {"logits"}
    if op.name != "mul" or "softmax" not in kinds or not kinds & {"log_softmax", "logits"}:
        return False
    gradients = {v.fake.requires_grad for v in (a, b)}
    return a.source != b.source or a.affine != b.affine or (len(gradients) > 1 and fake(node).requires_grad)


def _beside(sum_: Sum, node: Node, other: Any, how: str) -> Sum:
    """Multiplied or divided by something that is not made of logits."""
    if is_number(other):
        return sum_.times(node, float(other) if how == "mul" else 1.0 / other)
    shaped = sum_.shaped
    one = is_tensor(other) and same(fake(other).numel(), 1) and fake(other).dim() <= shaped.fake.dim()
    by = other if one else per_row(other, shaped)
    if by is None:
        raise Refused("the products of two heads' probabilities are weighed by class", "weigh the rows")
    return sum_.changed(node, Change(how, by))


def _mul(walk: Walk, node: Node, op: Op) -> Sum:
    given = op.args["input"], op.args["other"]
    ours = [x for x in given if isinstance(x, Node) and (x in walk.sums or x in walk.values)]
    if len(ours) == 1:
        return _beside(_sum(walk, ours[0]), node, given[1] if ours[0] is given[0] else given[0], "mul")
    a, b = (_sum(walk, n, _class_dim(walk, ours)) for n in ours)
    _alike(node, a, b)
    products = []
    for p in a.products:
        for q in b.products:
            weights, values = [x for x in (p.weights, q.weights) if x], [x for x in (p.values, q.values) if x]
            if len(weights) != 1 or len(values) != 1 or p.changes or q.changes:
                raise Refused("a loss over two heads that is none of expected values", "use a divergence of the two")
            products.append(Product(p.factor * q.factor, weights[0], values[0]))
    return _checked(Sum(node, a.class_dim, tuple(products), _of_both(a, b)))


def _div(walk: Walk, node: Node, op: Op) -> Sum:
    if op.args["input"] not in walk.sums or op.args["rounding_mode"] is not None or op.args["other"] in walk.sums:
        raise Refused("something is divided by the products of two heads' probabilities", "sum them first")
    return _beside(_sum(walk, op.args["input"]), node, op.args["other"], "div")


def _add(walk: Walk, node: Node, op: Op) -> Sum:
    given, alpha = (op.args["input"], op.args["other"]), op.args["alpha"]
    if not is_number(alpha) or not all(isinstance(n, Node) and (n in walk.sums or n in walk.values) for n in given):
        raise Refused("something is added to the products of two heads' probabilities", "add it to the loss")
    a, b = (_sum(walk, n, _class_dim(walk, given)) for n in given)
    _alike(node, a, b)
    b = b.times(b.node, -alpha if op.name == "sub" else alpha)
    return _checked(Sum(node, a.class_dim, (*a.products, *b.products), _of_both(a, b)))


def _alike(node: Node, a: Sum, b: Sum) -> None:
    shape, *others = (fake(n).shape for n in (a.node, b.node, node))
    alike = all(len(other) == len(shape) and all(map(same, shape, other)) for other in others)
    if a.class_dim != b.class_dim or not alike:
        raise Refused("two heads are compared whose logits differ in shape", "give both the same rows and classes")


def _of_both(a: Sum, b: Sum) -> tuple[Trace, ...]:
    return tuple(distinct([*a.traces, *b.traces]))


def _checked(made: Sum) -> Sum:
    if len(made.products) > _MOST:
        raise Refused("a loss over two heads of more than eight products", "use a divergence of the two")
    return made


def _neg(walk: Walk, node: Node, op: Op) -> Sum:
    return _sum(walk, op.args["input"]).times(node, -1.0)


def _cast(walk: Walk, node: Node, op: Op) -> Sum:
    made = fake(node)
    if not made.is_floating_point() or made.dtype == torch.float64:
        raise Refused(f"the products of two heads' probabilities are cast to {made.dtype}", "cast the loss")
    return replace(_sum(walk, op.args["input"]), node=node)


def _filled(walk: Walk, node: Node, op: Op) -> Sum:
    """0 in some rows."""
    sum_ = _sum(walk, op.args["input"])
    if isinstance(walk.sums.get(op.args["mask"]), Infinite):
        return replace(sum_, node=node)
    return _with_zeros(sum_, node, op.args["mask"], op.args["value"], "fill")


def _where(walk: Walk, node: Node, op: Op) -> Sum:
    condition, first, second = op.args["condition"], op.args["input"], op.args["other"]
    keeps = isinstance(first, Node) and first in walk.sums
    sum_, other = (_sum(walk, first), second) if keeps else (_sum(walk, second), first)
    mass = walk.sums.get(condition)
    if isinstance(mass, Zeros) and mass.other == keeps and _is_zero(other) and _weighed_by(sum_, mass.value):
        return replace(sum_, node=node)
    return _with_zeros(sum_, node, condition, other, "keep" if keeps else "fill")


def _weighed_by(sum_: Sum, value: Value) -> bool:
    return all(p.weights is not None and p.weights.source == value.source for p in sum_.products)


def _with_zeros(sum_: Sum, node: Node, mask: Any, other: Any, how: str) -> Sum:
    shaped = sum_.shaped
    of_rows = per_row(mask, shaped)
    if of_rows is None or not _is_zero(other) or fake(node).shape != shaped.fake.shape:
        raise Refused("the products of two heads' probabilities are masked by class", "mask whole rows, with 0")
    return sum_.changed(node, Change(how, of_rows))


def _is_zero(other: Any) -> bool:
    if is_number(other):
        return other == 0
    op = nodes.read(other) if isinstance(other, Node) else None
    return op is not None and op.name == "full" and op.args["fill_value"] == 0


def _rearranged(walk: Walk, node: Node, op: Op) -> Sum:
    """A view of the rows, or some of them."""
    sum_ = _sum(walk, op.args["input"])
    made = rules.apply(op, sum_.shaped, node)
    if not isinstance(made, Value) or len(made.rows) != 1:
        if isinstance(made, Value) and not made.rows and made.columns == sum_.shaped.columns:
            return replace(sum_, node=node)
        raise Refused("the products of two heads' probabilities are cut by class", "sum them over the classes first")
    return replace(sum_.changed(node, Change("map", node, made.rows[0][1])), class_dim=made.class_dim)


# ---- losses


def _kl_div(walk: Walk, node: Node, op: Op) -> Sum | None:
    """target · (log target - input), or exp(target) · (target - input)."""
    args, reduction = op.args, op.args["reduction"]
    if args["size_average"] is not None or args["reduce"] is not None:
        raise Refused("the deprecated arguments size_average or reduce", "use reduction=")
    values, target = _input_and_target(walk, op)
    kind = "log_softmax" if args["log_target"] else "softmax"
    if values.products[0].weights is not None or values.products[0].values is None:
        raise Refused("kl_div takes log-probabilities as its input, and these are none", "use log_softmax")
    parts, log = _distribution(target, args["log_target"])
    if log is None:
        raise Refused(f"the target of kl_div is no {kind}", "give it log_target=True for log-probabilities")
    _alike(args["input"], values, target)
    products = [Product(share, weights, log) for share, weights in parts]
    for share, weights in parts:
        products.append(replace(values.products[0], weights=weights, factor=-values.products[0].factor * share))
    made = Sum(node, values.class_dim, tuple(products), _of_both(values, target))
    if reduction == "none":
        return made
    made = replace(made, node=args["input"])

    def record(builder: Builder) -> Proxy:
        total = in_functions(builder, made.products, made.class_dim).sum()
        return in_dtype_of(averaged(total, builder.proxy(parts[0][1].node), reduction), node)

    walk.decompose(node, made.traces, record)
    return None


def averaged(total: Any, like: Any, reduction: str) -> Any:
    """What kl_div makes of the sum over all entries of tensors of this shape."""
    return total if reduction == "sum" else total / (like.size(0) if reduction == "batchmean" else like.numel())


def _distribution(target: Sum, is_log: bool) -> tuple[list[tuple[float, Value]], Value | LogMixture | None]:
    """The softmaxes that a target is a mixture of, with their shares, and its logarithm; None where it is none."""
    first = target.products[0]
    if is_log:
        alone = len(target.products) == 1 and first.weights is None and first.factor == 1.0 and not first.changes
        if alone and isinstance(first.values, LogMixture):
            return list(first.values.parts), first.values
        if alone and isinstance(first.values, Value) and first.values.kind == "log_softmax":
            return [(1.0, replace(first.values, function=Kind("softmax")))], first.values
        return [], None
    if any(p.weights is None or p.values is not None or p.changes for p in target.products):
        return [], None
    parts = [(p.factor, p.weights) for p in target.products if p.weights is not None]
    if len(parts) == 1 and first.factor == 1.0:
        return parts, replace(parts[0][1], function=Kind("log_softmax"))
    return parts, LogMixture(tuple(parts))


def _cross_entropy(walk: Walk, node: Node, op: Op) -> None:
    """-target · log_softmax(input), summed over the classes."""
    args = op.args
    smoothing = arguments_of(args).label_smoothing
    if args["weight"] is not None:
        raise Refused("cross_entropy with probabilities, and class weights", "leave them out")
    values, target = _input_and_target(walk, op)
    (first,), (parts, _) = values.products, _distribution(target, False)
    value = first.values
    if not isinstance(value, Value) or first.weights is not None or not parts:
        raise Refused("cross_entropy of logits and another head's logits", "give it the softmax of the other head")
    if first.factor != 1.0:
        raise Refused("cross_entropy of scaled log-probabilities", "scale the logits instead")
    reads_the_classes("cross_entropy", value)
    _alike(args["input"], values, target)
    log = replace(value, function=Kind("log_softmax"))
    products = tuple(Product(-share * (1.0 - smoothing), weights, log) for share, weights in parts)
    made = Sum(args["input"], values.class_dim, products, _of_both(values, target))

    def record(builder: Builder) -> Proxy:
        rows = in_functions(builder, made.products, made.class_dim)
        if smoothing:
            z, c = widened(builder.proxy(args["input"])), made.class_dim
            lse = z.logsumexp(c) if value.kind == "logits" else 0.0
            rows = rows + (lse - z.mean(c)) * smoothing
        reduced = rows if args["reduction"] == "none" else getattr(rows, args["reduction"])()
        return in_dtype_of(reduced, node)

    walk.decompose(node, made.traces, record)


def _input_and_target(walk: Walk, op: Op) -> tuple[Sum, Sum]:
    """The arguments of a loss, each a function of one head."""
    given = op.args["input"], op.args["target"]
    for node, which in zip(given, ("input", "target"), strict=True):
        mixtures = LogOfMixture if which == "input" else (LogOfMixture, Sum)
        if not isinstance(node, Node) or not (node in walk.values or isinstance(walk.sums.get(node), mixtures)):
            raise Refused(
                f"the {which} of {op.name} is no function of one head's logits", "use softmax and log_softmax"
            )
    class_dim = _class_dim(walk, given)
    first, second = (_sum(walk, node, class_dim) for node in given)
    return first, second


def _gather(walk: Walk, node: Node, op: Op) -> None:
    """The entries at some classes of log-probabilities that were added up."""
    sum_ = _sum(walk, op.args["input"])
    along = op.args["dim"] % fake(node).dim() == sum_.class_dim
    if not along or any(p.weights or not isinstance(p.values, Value) or p.changes for p in sum_.products):
        raise Refused("the products of two heads' probabilities are cut by class", "sum them over the classes first")

    def record(builder: Builder) -> Proxy:
        total: Any = 0.0
        for p in sum_.products:
            assert isinstance(p.values, Value)
            entry = builder.proxy(p.values.node).gather(op.args["dim"], builder.proxy(op.args["index"]))
            total = total + entry * (p.factor / factor_in(walk, p.values))
        return in_dtype_of(total, node)

    walk.decompose(node, sum_.traces, record)


def _total(walk: Walk, node: Node, op: Op) -> None:
    """The sum, or mean, over the classes."""
    sum_ = _sum(walk, op.args["input"])
    mean = op.name == "mean"
    shape = over_rows(sum_.shaped, op.args["dim"], bool(op.args["keepdim"]), mean)

    def record(builder: Builder) -> Proxy:
        rows = in_functions(builder, sum_.products, sum_.class_dim)
        return in_dtype_of(shape(rows / vocab(builder, sum_.shaped) if mean else rows), node)

    walk.decompose(node, sum_.traces, record)


_RULES: dict[str, Callable[[Walk, Node, Op], Sum | None]] = {
    "mul": _mul,
    "div": _div,
    "add": _add,
    "sub": _add,
    "neg": _neg,
    "cast": _cast,
    "masked_fill": _filled,
    "where": _where,
    "setitem": _set,
    "kl_div": _kl_div,
    "cross_entropy": _cross_entropy,
    "gather": _gather,
    "sum": _total,
    "mean": _total,
}
