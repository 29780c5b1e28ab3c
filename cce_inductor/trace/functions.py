"""Sums over the classes of products of two heads' functions, as statistics that one operator computes from both.

`in_functions` puts such a sum together from as few functions of two heads (ops/pairs.py) as there are: nodes that call
`of_two`. `put_function` is the rule for those nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.builder import Builder, Proxy
from ..graph.fakes import fake, is_tensor
from ..graph.refusal import Refused
from ..ops.divergences import PARTS, Divergence
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
    node: Node | None = None  # or what was rearranged
    row_map: Any = None


@dataclass(frozen=True)
class LogMixture:
    """The logarithm of a sum of softmaxes, each times a number."""

    parts: tuple[tuple[float, Value], ...]
    kind = "logarithm of a mixture"
    source = None  # of no one head


@dataclass(frozen=True)
class Product:
    """factor · softmax(weights) · log_softmax(values), or the logits `values`, with what was done to it since.

    No weights stand for 1, and no values as well.
    """

    factor: float
    weights: Value | None
    values: Value | LogMixture | None
    changes: tuple[Change, ...] = ()

    @property
    def members(self) -> list[Value]:
        """The functions of one head that it is made of."""
        of_values = [v for _, v in self.values.parts] if isinstance(self.values, LogMixture) else [self.values]
        return [v for v in (self.weights, *of_values) if v is not None]


def of_two(values: Tensor, weights: Tensor, function: str, dim: int) -> Tensor:
    """Stands in a graph for a function of two heads: of the logits that `values` and `weights` are made of, over `dim`.

    function: one of ops/pairs.py, or a divergence of ops/divergences.py, of which p is given first.

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


def as_recorded(walk: Walk, node: Node, products: tuple[Product, ...]) -> tuple[Product, ...]:
    """The products that a node holds, without a gradient that it has not: it was detached, or made under no_grad."""
    members = [m for p in products for m in p.members]
    if not is_tensor(node) or fake(node).requires_grad or not any(m.fake.requires_grad for m in members):
        return products
    given = [c.node for p in products for c in p.changes if c.how != "map"]
    if any(n is not None and fake(n).requires_grad for n in given):
        raise Refused("weighted products of two heads' probabilities are detached", "detach their sum, or each head")
    builder, before = Builder(walk.graph, node), node.prev
    detached = {n: builder.run(lambda n=n: builder.proxy(n).detach()).node for n in {m.node: None for m in members}}
    walk.visit_added(before, node)

    def of(value: Value) -> Value:
        return replace(read_with(walk.values[detached[value.node]], value.class_dim), function=value.function)

    def of_values(values: Value | LogMixture | None) -> Value | LogMixture | None:
        if isinstance(values, LogMixture):
            return LogMixture(tuple((number, of(v)) for number, v in values.parts))
        return values and of(values)

    return tuple(replace(p, weights=p.weights and of(p.weights), values=of_values(p.values)) for p in products)


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
    total = total.unsqueeze(products[0].members[0].class_dim)
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
    terms, products, constant = _divergences(builder, products)
    total: Any = None
    found: dict[Any, tuple[Value, dict[Any, tuple[Value, float]]]] = {}
    for p in products:
        if p.weights is None:
            raise Refused("log-probabilities are summed beside another head's", "sum them by themselves")
        if p.values is None:
            constant += p.factor
            continue
        assert isinstance(p.values, Value)
        _, averages = found.setdefault(_key(p.weights), (p.weights, {}))
        value, factor = averages.get(_key(p.values), (p.values, 0.0))
        averages[_key(p.values)] = value, factor + p.factor

    def plus(term: Any, factor: float) -> None:
        nonlocal total
        term = term if factor == 1.0 else term * factor
        total = term if total is None else total + term

    for term, factor in terms:
        plus(term, factor)
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


@dataclass
class Mixed:
    """What is averaged of the logarithm of one mixture, by key: its two heads with their shares, and factors."""

    heads: dict[Any, tuple[float, Value]]
    factors: dict[Any, float]


def _divergences(
    builder: Builder, products: Sequence[Product]
) -> tuple[list[tuple[Proxy, float]], list[Product], float]:
    """Products with logarithms of mixtures as divergences (ops/divergences.py), each with its factor; the products that
    are left; and a constant.
    """
    left = [p for p in products if not isinstance(p.values, LogMixture)]
    own: dict[Any, float] = {}  # of a head's probabilities times their own logarithm
    for p in left:
        if (key := _averages_itself(p)) is not None:
            own[key] = own.get(key, 0.0) + p.factor
    mixed, constant = _mixed(products)
    if any(_compares(p, made) for p in left for made in mixed):
        # It would be the difference of two numbers that may be far larger.
        raise Refused("a divergence between a mixture of two heads and one of them", "mix the second distribution")
    terms: list[tuple[Proxy, float]] = []
    used: set[Any] = set()
    for made in mixed:
        alone = {k for k, f in made.factors.items() if f and math.isclose(own.get(k, 0.0), -f, rel_tol=1e-5)}
        used |= alone
        (a, (share_a, first)), (b, (share_b, second)) = made.heads.items()
        of_a, of_b = made.factors[a], made.factors[b]
        if len(alone) == 2 and math.isclose(of_a * share_b, of_b * share_a, rel_tol=1e-5):
            whole = Divergence("jensen_shannon", (share_b,))
            terms.append((_call(builder, first, second, str(whole)), -of_a / share_a))
            continue
        for key, p_value, q_value, share in ((a, first, second, share_b), (b, second, first, share_a)):
            if made.factors[key]:
                part = Divergence("skew" if key in alone else "mixture", (share,))
                terms.append((_call(builder, p_value, q_value, str(part)), -made.factors[key]))
    return terms, [p for p in left if _averages_itself(p) not in used or _averages_itself(p) is None], constant


def _mixed(products: Sequence[Product]) -> tuple[list[Mixed], float]:
    """What is averaged of each mixture's logarithm; and the sum of what numbers in front of mixtures add."""
    found: dict[Any, Mixed] = {}
    constant = 0.0
    for p in products:
        if not isinstance(p.values, LogMixture):
            continue
        heads, whole = _two_heads(p.values)
        key = None if p.weights is None else _key(p.weights)
        if key not in heads:
            cure = "take the entry of a target, or use a divergence of the two heads"
            raise Refused("the logarithm of a mixture, averaged by something else", cure)
        constant += p.factor * math.log(whole)
        shares = tuple((k, share) for k, (share, _) in heads.items())
        found.setdefault(shares, Mixed(heads, dict.fromkeys(heads, 0.0))).factors[key] += p.factor
    return list(found.values()), constant


def _compares(p: Product, made: Mixed) -> bool:
    """Whether a product is of one head of a mixture and the other one's logarithm."""
    if p.weights is None or not isinstance(p.values, Value) or _averages_itself(p) is not None:
        return False
    return {_key(p.weights), _key(p.values)} <= {*made.heads}


def _averages_itself(p: Product) -> Any:
    """The key of a head whose probabilities are multiplied by their own logarithm; None if it is another product."""
    if p.weights is None or not isinstance(p.values, Value) or p.values.kind != "log_softmax":
        return None
    return _key(p.weights) if _key(p.weights) == _key(p.values) else None


def _two_heads(mixture: LogMixture) -> tuple[dict[Any, tuple[float, Value]], float]:
    """The heads that are mixed, by key, with their shares; and the sum of the numbers that they are multiplied by."""
    heads: dict[Any, tuple[float, Value]] = {}
    for number, value in mixture.parts:
        heads[_key(value)] = heads.get(_key(value), (0.0, value))[0] + number, value
    if len(heads) != 2 or any(number <= 0 for number, _ in heads.values()):
        raise Refused("the logarithm of a mixture of other than two heads' probabilities", "mix those of two")
    whole = sum(number for number, _ in heads.values())
    # The exponential of a logarithm in fp32 is not quite the number that was meant.
    whole = 1.0 if math.isclose(whole, 1.0, rel_tol=1e-6) else whole
    return {key: (_meant(number / whole), value) for key, (number, value) in heads.items()}, whole


def _meant(share: float) -> float:
    """The number of four digits that another one is up to rounding in fp32, or that one."""
    short = round(share, 4)
    return short if math.isclose(share, short, rel_tol=2e-7) else share


def _key(value: Value) -> Any:
    kind = "logits" if value.kind == "logits" else "softmax"
    return value.source, value.affine, value.terms if kind == "logits" else (), value.fake.requires_grad, kind


def _call(builder: Builder, values: Value, weights: Value, function: str) -> Proxy:
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
    statistics, flat = _statistics(str(function), by_other, a)
    trace.reductions.append(Reduction(node, own, statistics, flat=flat, other=other))


BOTH = (*SOFTMAX, "other_lse", "other_lse_low")


def _statistics(function: str, by_other: bool, averaged: Value) -> tuple[tuple[str, ...], Callable[[Any], Any]]:
    """What a function of two heads needs, and itself. by_other: the other head's softmax weighs, or is given second."""
    if (divergence := Divergence.read(function)) is not None:
        name = str(divergence.of(by_other))
        return (*BOTH, *(f"{name}{part}" for part in PARTS)), lambda s: s.of_both(name)
    if function != "expected":
        name = function if by_other else f"other_{function}"
        return (*BOTH, name), lambda s: s.of_both(name)
    if averaged.terms or averaged.affine.constant:
        raise Refused("the expected value of logits to which something was added", "add it to the expected value")
    if not by_other:
        return (*SOFTMAX, "expected_other"), lambda s: s.of_both("expected_other")
    # The sum of q (lse - log p), with q a softmax.
    return (*BOTH, "cross_entropy"), lambda s: (s.lse - s.of_both("cross_entropy")) + s.lse_low
