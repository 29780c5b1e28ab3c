"""Puts the operator of rankings in the place of the reductions it serves: the largest logits, counts of comparisons."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph

from ..graph.builder import Builder, Proxy
from ..graph.fakes import example, fake
from ..graph.hoist import Hoist
from ..ops.call import Attributes
from ..ops.ranking import RANKING
from ..trace import operands
from ..trace.affine import Affine, Shift
from ..trace.codes import codes
from ..trace.ranking import Ranking
from ..trace.values import Value
from .emit import in_rows
from .groups import RankingGroup


@dataclass
class Counts:
    """What a reduction of counts makes its result of."""

    count: Proxy
    vocab: Any


def emit(graph: Graph, group: RankingGroup, attributes: Attributes, hoist: Hoist) -> None:
    """Replaces the reductions of one group."""
    builder = Builder(graph, group.anchor)
    if group.counted is not None and group.counted.operand is not None:
        hoist.move(group.counted.operand, group.anchor)
    results = builder.run(_call, builder, group, attributes, hoist)
    for reduction in group.members:
        after = Builder(graph, reduction.node)
        made = after.run(_result, after, reduction, results, hoist).node
        hoist.replaced[reduction.node] = made
        reduction.node.replace_all_uses_with(made)


def _call(builder: Builder, group: RankingGroup, attributes: Attributes, hoist: Hoist) -> dict[str, Proxy]:
    """Records the operator; gives its results by name."""
    value, dtype = group.value, group.members[0].dtype
    scale, softcap, _, _ = value.affine.operator()
    given = _operands(builder, value)
    if group.counted is not None:
        given.update(_compared_with(builder, group.counted, hoist))
    out = builder.call(
        RANKING,
        list(given.values()),
        " ".join(given),
        " ".join(group.results),
        group.k,
        scale,
        softcap,
        value.affine.form,
        value.head.dtype,
        dtype,
        attributes.workspace,
        attributes.version,
    )
    return {name: out[i] for i, name in enumerate(group.results)}


def _operands(builder: Builder, value: Value) -> dict[str, Proxy]:
    """What the logits are made of. The operator has no gradient, so that nothing need be detached."""
    h = operands.hidden(builder, value, False)
    made = codes(value.one)
    if made is not None and made.scales:
        made = None  # it has no factors of classes
    given = {
        "input": operands.flat_rows(h, value.fake.dim(), value.class_dim),
        "weight": operands.weight(builder, value, False, made),
    }
    exact = operands.exact_dtype(value)
    bias, affine = _own_bias(value)
    if bias is not None:
        given["bias"] = operands.bias(builder, value, bias, False, exact, True)
    factor: Any = None
    for f in affine.factors:
        p = operands.number(builder, f.node, False).to(exact)
        p = p.reciprocal() if f.divides else p
        factor = p if factor is None else factor * p
    if factor is not None:
        given["factor"] = factor
    shift = operands.biases(builder, replace(value, affine=affine, masks=()), False)
    if shift is not None:
        given["shift"] = shift
    if value.masks:
        like = {"dtype": exact, "device": value.fake.device}
        filled = builder.call(torch.full, (operands.vocab(builder, value),), torch.nan, **like)
        for mask in value.masks:
            held = operands.masked(builder, mask, value)
            filled = filled.masked_fill(held, mask.fill - value.affine.constant)
        given["filled"] = filled
    return given


def _own_bias(value: Value) -> tuple[Shift | None, Affine]:
    """The bias that the head itself adds and that is scaled with all else, and the affine map without it."""
    affine = value.affine
    _, _, shifts, _ = affine.operator()
    for own, shift in zip(affine.shifts, shifts, strict=True):
        if own.node is value.one.bias and shift.factor == 1.0 and shift.factors == affine.factors:
            left = tuple(s for s in affine.shifts if s is not own)
            return replace(shift, factors=()), replace(affine, shifts=left)
    return None, affine


def _compared_with(builder: Builder, reduction: Ranking, hoist: Hoist) -> dict[str, Proxy]:
    """The operand that the logits are compared with, (N,)."""
    value, comparison = reduction.value, reduction.value.comparison
    assert comparison is not None and reduction.operand is not None
    p = builder.proxy(hoist.replaced.get(reduction.operand, reduction.operand))
    if fake(reduction.operand).dim() < fake(comparison.node).dim():
        p = p.unsqueeze(comparison.class_dim)
    p = operands.column(value, p, comparison.start).squeeze(-1)
    if comparison.target is None:
        return {"threshold": p}
    if comparison.wraps:
        p = builder.call(torch.where, p < 0, p + operands.vocab(builder, value), p)
    return {"target": p}


def _result(builder: Builder, reduction: Ranking, results: dict[str, Proxy], hoist: Hoist) -> Proxy:
    """Records what the program gets for a reduction, in eager's shape and dtype."""
    value, result = reduction.value, builder.proxy(results[reduction.result].node)
    if value.comparison is not None:
        counts = Counts(result, operands.vocab(builder, value))
        made = reduction.shape(in_rows(builder, value, reduction.flat(counts)))
    else:
        result = result[:, : reduction.k]
        if reduction.result == "values":
            result = result + value.affine.constant if value.affine.constant else result
            for term in value.terms:
                t = builder.proxy(hoist.replaced.get(term.node, term.node)).detach()
                result = result + operands.column(value, t, term.start) * term.factor
        made = _in_rows(builder, value, result)
    dtype = fake(reduction.node).dtype
    return made if dtype == example(made.node).dtype else made.to(dtype)


def _in_rows(builder: Builder, value: Value, largest: Proxy) -> Proxy:
    """(N, k) in the shape of the logits, with k where the classes are."""
    lead, rank = value.lead_shape, value.fake.dim()
    if rank == 1:
        return largest[0]
    if all(isinstance(size, int) for size in lead):
        made = largest.reshape(*lead, -1)
    else:
        h = operands.hidden(builder, value, False).movedim(value.class_dim, -1)
        k = fake(largest.node).shape[1]
        made = largest.reshape_as(h.narrow(-1, 0, 1).expand(*[-1] * (rank - 1), k))
    return made if value.class_dim == rank - 1 else made.movedim(-1, value.class_dim)
