"""Sums over the classes of products of two heads' functions, as statistics that one operator computes from both.

`in_functions` puts such a sum together from as few functions of two heads (ops/pairs.py) as there are: nodes that call
`of_two`. `put_function` is the rule for those nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.builder import Builder, Proxy
from ..graph.refusal import Refused
from ..ops.pairs import Function
from .pointwise import not_rounded
from .reduction import SOFTMAX, Reduction
from .values import Value
from .walk import Entry, Walk


@dataclass(frozen=True)
class Change:
    """What was done to the products of a row: multiplied or divided by a tensor of one number, or of one for each row,
    set to 0 where one is true ("fill") or false ("keep"), or rearranged ("map") with the other rows.
    """

    how: str
    node: Node | None = None
    row_map: Any = None


@dataclass(frozen=True)
class Product:
    """factor · softmax(weights) · log_softmax(values), or the logits `values`, with what was done to it since.

    No weights stand for 1, and no values as well.
    """

    factor: float
    weights: Value | None
    values: Value | None
    changes: tuple[Change, ...] = ()


def of_two(values: Tensor, weights: Tensor, function: Function, dim: int) -> Tensor:
    """Stands in a graph for a function of two heads: of the logits that `values` and `weights` are made of, over `dim`.

    Only graphs whose losses are fused keep what is decomposed into it, and those have an operator in its place.
    """
    product = values * weights
    return (product if product.dtype == torch.float64 else product.float()).sum(dim)


def read_with(entry: Entry, class_dim: int | None) -> Value:
    """The logits as they are read with the classes there, or first."""
    return next((v for v in entry.values if v.class_dim == class_dim), entry.values[0])


def comparable(value: Value) -> None:
    """Refused for logits that are no plain ones of one head."""
    if value.members or value.picked is not None or value.edit is not None or value.without is not None:
        raise Refused("edited logits, or those of several heads, are compared with others", "compute a loss of each")
    if value.masks:
        raise Refused("masked logits are compared with those of another head", "slice the weight instead of masking")
    not_rounded(value)


# ---- as functions of two heads


def in_functions(builder: Builder, products: Sequence[Product], class_dim: int) -> Any:
    """The sum of products over the classes, in the leading shape of the logits, as functions of two heads.

    class_dim: where the classes are once everything was done to the products.
    """
    total: Any = None
    for changes in dict.fromkeys(p.changes for p in products):
        part = _changed(builder, [p for p in products if p.changes == changes], changes, class_dim)
        total = part if total is None else total + part
    return total


def _changed(builder: Builder, products: Sequence[Product], changes: tuple[Change, ...], class_dim: int) -> Any:
    """Products that have been through the same, with that done to their sum."""
    total: Any = _expected(builder, products)
    if not changes:
        return total
    value = next(v for p in products for v in (p.weights, p.values) if v is not None)
    total = total.unsqueeze(value.class_dim)
    for change in changes:
        if change.how == "map":
            total = change.row_map(total, 1)
            continue
        assert change.node is not None
        p = builder.proxy(change.node)
        if change.how in ("mul", "div"):
            total = total * p if change.how == "mul" else total / p
        else:
            kept, other = (total, 0.0) if change.how == "keep" else (0.0, total)
            total = builder.call(torch.where, p, kept, other)
    return total.squeeze(class_dim)


def _expected(builder: Builder, products: Sequence[Product]) -> Any:
    """The sum over the classes of products, in the leading shape of the logits."""
    constant, total = 0.0, None
    found: dict[Any, tuple[Value, dict[Any, tuple[Value, float]]]] = {}
    for p in products:
        if p.weights is None:
            raise Refused("log-probabilities are summed beside another head's", "sum them by themselves")
        if p.values is None:
            constant += p.factor
            continue
        _, averages = found.setdefault(_key(p.weights), (p.weights, {}))
        value, factor = averages.get(_key(p.values), (p.values, 0.0))
        averages[_key(p.values)] = value, factor + p.factor

    def plus(term: Any, factor: float) -> None:
        nonlocal total
        term = term if factor == 1.0 else term * factor
        total = term if total is None else total + term

    for key, (weights, averages) in found.items():
        logs = {k: v for k, v in averages.items() if v[0].kind == "log_softmax"}
        own = logs.pop(key, (weights, 0.0))[1]
        # As many divergences as there are, whose values the difference of two sums would lose to rounding.
        whole = sum(factor for _, factor in logs.values())
        for value, factor in logs.values():
            plus(_call(builder, value, weights, "divergence" if own == -whole else "cross_entropy"), -factor)
        if own and own != -whole:
            plus(_call(builder, weights, weights, "cross_entropy"), -own)
        for value, factor in averages.values():
            if value.kind == "logits":
                plus(_call(builder, value, weights, "expected"), factor)
    if total is None:
        raise Refused("a sum of probabilities, which is 1", "leave it out")
    return total + constant if constant else total


def _key(value: Value) -> Any:
    kind = "logits" if value.kind == "logits" else "softmax"
    return value.source, value.affine, value.terms if kind == "logits" else (), value.fake.requires_grad, kind


def _call(builder: Builder, values: Value, weights: Value, function: Function) -> Proxy:
    a, b = builder.proxy(values.node), builder.proxy(weights.node)
    return builder.call(of_two, a, b, function, values.class_dim)


# ---- a function of two heads


def put_function(walk: Walk, node: Node) -> None:
    """Notes that a node is a statistic of two heads; of the one that is differentiated, or comes first."""
    first, second, function, dim = node.args
    assert isinstance(first, Node) and isinstance(second, Node) and isinstance(dim, int)
    entries = [walk.values[n] for n in (first, second)]
    a, b = (read_with(e, dim) for e in entries)
    for value in (a, b):
        comparable(value)
    if _key(a) == _key(b) and function == "cross_entropy":
        made = Reduction(node, a, (*SOFTMAX, "entropy"), flat=lambda s: s.entropy)
        entries[0].trace.reductions.append(made)
        return
    if (a.head.dtype == torch.float64) != (b.head.dtype == torch.float64):
        raise Refused("logits in float64 are compared with others in a narrower dtype", "compute both in one dtype")
    order = [a.fake.requires_grad, b.fake.requires_grad]
    earlier = next(n for n in walk.graph.nodes if n in (a.head.node, b.head.node))
    by_other = order[0] > order[1] if order[0] != order[1] else earlier is a.head.node
    own, other = (a, b) if by_other else (b, a)
    trace = entries[0 if by_other else 1].trace
    statistics, flat = _statistics(function, by_other, a)  # type: ignore[arg-type]
    trace.reductions.append(Reduction(node, own, statistics, flat=flat, other=other))


BOTH = (*SOFTMAX, "other_lse", "other_lse_low")


def _statistics(function: Function, by_other: bool, averaged: Value) -> tuple[tuple[str, ...], Callable[[Any], Any]]:
    """What a function of two heads needs, and itself. by_other: the other head's softmax weighs."""
    if function != "expected":
        name = function if by_other else f"other_{function}"
        return (*BOTH, name), lambda s: s.of_both(name)
    if averaged.terms or averaged.affine.constant:
        raise Refused("the expected value of logits to which something was added", "add it to the expected value")
    if not by_other:
        return (*SOFTMAX, "expected_other"), lambda s: s.of_both("expected_other")
    # The sum of q (lse - log p), with q a softmax.
    return (*BOTH, "cross_entropy"), lambda s: (s.lse - s.of_both("cross_entropy")) + s.lse_low
