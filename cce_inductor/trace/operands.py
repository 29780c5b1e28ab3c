"""What an operator reads, recorded: the hidden states with the row maps replayed, the weight, the biases, the masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from ..graph.builder import Builder, Proxy
from ..graph.fakes import fake, same
from .affine import Listed, Range, Scale, Shift
from .codes import Codes, Times
from .values import Head, Mask, Value


def width(builder: Builder, head: Head) -> Any:
    """D as a number, or as a proxy where it is symbolic."""
    d = head.width
    return d if isinstance(d, int) else builder.proxy(head.input).size(head.width_dim)


def vocab(builder: Builder, value: Value) -> Any:
    """The number of classes as a number, or as a proxy where it is symbolic."""
    v = value.vocab
    if isinstance(v, int):
        return v
    return weight(builder, value, False).size(0)


def span(part: Range) -> slice:
    return slice(*part)


def cut(builder: Builder, p: Proxy, part: Range | Listed) -> Proxy:
    """Some of the classes, which are the first dimension of `p`."""
    if not isinstance(part, Listed):
        return p[span(part)]
    if isinstance(part.indices, Node):
        return p.index_select(0, builder.proxy(part.indices))
    return p[list(part.indices)]


def weight(builder: Builder, value: Value, detach: bool, made: Codes | None = None) -> Proxy:
    """The (V, D) weight of the classes that are left; the codes that it is `made` of, if they are given."""
    w = builder.proxy(made.node if made is not None else value.one.weight)
    w = value.one.matrix(w.detach() if detach and made is None else w)
    for part in value.columns:
        w = cut(builder, w, part)
    return w


def hidden(builder: Builder, value: Value, detach: bool) -> Proxy:
    """The hidden states with the value's row maps replayed: its shape, with D where the classes are."""
    h = builder.proxy(value.one.input)
    if detach:
        h = h.detach()
    for _, row_map in value.rows:
        h = row_map(h, width(builder, value.one))
    return h


def flat_rows(h: Proxy, rank: int, class_dim: int) -> Proxy:
    """(N, D) from hidden states of `rank` dimensions with D at `class_dim`."""
    if class_dim != rank - 1:
        h = h.movedim(class_dim, -1)
    if rank == 1:
        return h.unsqueeze(0)
    return h.flatten(0, -2) if rank > 2 else h


def column(value: Value, p: Proxy, start: int) -> Proxy:
    """(N, 1), in the order of the rows, from what was 1 wide in front of row map `start`."""
    return flat_rows(mapped(value, p, start), value.fake.dim(), value.class_dim)


def mapped(value: Value, p: Proxy, start: int) -> Proxy:
    """What was 1 wide in front of row map `start`, for the rows of now."""
    for _, row_map in value.rows[start:]:
        p = row_map(p, 1)
    return p


def flat(builder: Builder, node: Node) -> Proxy:
    p = builder.proxy(node)
    return p.reshape(-1) if fake(node).dim() != 1 else p


def last(builder: Builder, node: Node, dim: int) -> Proxy:
    """A tensor with one of its dimensions moved to the end."""
    p = builder.proxy(node)
    return p if dim == fake(node).dim() - 1 else p.movedim(dim, -1)


def input_rows(builder: Builder, value: Value, detach: bool) -> Proxy:
    """(N, D), multiplied by the tensors that the logits are multiplied with."""
    return scaled(builder, value, flat_rows(hidden(builder, value, detach), value.fake.dim(), value.class_dim), detach)


def scaled(builder: Builder, value: Value, h: Proxy, detach: bool) -> Proxy:
    """Hidden states, multiplied by the tensors that the logits are multiplied with."""
    for factor in value.affine.factors:
        f = number(builder, factor.node, detach)
        h = h / f if factor.divides else h * f
    return h


def row_scale(builder: Builder, value: Value, detach: bool) -> Proxy | None:
    """The product of the rows' factors, (N,), in the dtype of the statistics; None where there are none."""
    total: Any = None
    for factor in value.affine.scales:
        if factor.of_rows:
            p = flat_rows(row_factor(builder, value, factor), value.fake.dim(), value.class_dim).squeeze(-1)
            total = _times(total, p.detach() if detach else p, factor, value)
    return total


def row_factor(builder: Builder, value: Value, factor: Scale) -> Proxy:
    """A factor of the rows, in their order, 1 wide where the classes are."""
    p = builder.proxy(factor.node)
    if factor.expanded:
        h = builder.proxy(value.one.input)
        for _, row_map in value.rows[: factor.start]:
            h = row_map(h, width(builder, value.one))
        p = p.expand_as(h.narrow(factor.class_dim, 0, 1))
    return mapped(value, p, factor.start)


def column_scale(builder: Builder, value: Value, detach: bool, made: Codes | None = None) -> Proxy | None:
    """The product of the classes' factors, (V,), in the dtype of the statistics; None where there are none.

    With those that are missing where the weight's codes are read in its place.
    """
    total: Any = None
    for factor in value.affine.scales:
        if not factor.of_rows:
            total = _times(total, _of_classes(builder, factor, detach), factor, value)
    for times in made.scales if made is not None else ():
        total = _of_codes(builder, value, times, total, detach)
    return total


def _of_codes(builder: Builder, value: Value, times: Times, total: Any, detach: bool) -> Proxy:
    """The factors of the classes, and those of the weight's codes behind them."""
    of_all = isinstance(times.factor, float) or same(fake(times.factor).numel(), 1)
    if total is None and of_all:
        total = builder.call(torch.ones, (vocab(builder, value),), **like(value, exact_dtype(value)))
    if isinstance(times.factor, float):
        return total * times.factor
    if of_all:
        return _times(total, number(builder, times.factor, detach), times, value)
    factor = Scale(times.factor, times.divides, False, columns=value.columns)
    return _times(total, _of_classes(builder, factor, detach), factor, value)


def _of_classes(builder: Builder, factor: Scale, detach: bool) -> Proxy:
    """A factor of the classes that are left, (V,)."""
    p = flat(builder, factor.node)
    p = p.detach() if detach else p
    for part in factor.columns:
        p = cut(builder, p, part)
    return p


def _times(total: Any, p: Any, factor: Scale | Times, value: Value) -> Any:
    p = p.to(exact_dtype(value))
    if total is None:
        return p.reciprocal() if factor.divides else p
    return total / p if factor.divides else total * p


def exact_dtype(value: Value) -> torch.dtype:
    """The dtype of the statistics."""
    return torch.float64 if value.head.dtype == torch.float64 else torch.float32


def symbolic(builder: Builder, node: Node) -> Proxy:
    """A float of the graph as a tensor without dimensions, in fp64."""
    source = node.args[0] if node.target == "item" else None
    if isinstance(source, Node):  # Dynamo's own input. Other reads of it make AOTAutograd compile for every number.
        return builder.proxy(source)
    return builder.call(torch.full, (), builder.proxy(node), dtype=torch.float64)


def number(builder: Builder, node: Node, detach: bool) -> Proxy:
    """A tensor of one element without dimensions: it does not change the dtype of what it is multiplied with."""
    f = builder.proxy(node)
    f = f.detach() if detach else f
    return f.reshape(()) if fake(node).dim() else f


def biases(builder: Builder, value: Value, detach: bool) -> Proxy | None:
    """The sum of all that is added inside the scale, (V,), in fp32 where there is anything to compute."""
    scale, _, shifts, constant = value.affine.operator()
    exact = exact_dtype(value)
    total: Any = None
    plain = len(shifts) == 1 and not constant and not value.masks
    for shift in shifts:
        own = bias(builder, value, shift, detach, exact, plain)
        total = own if total is None else total + own
    if constant:
        if total is None:
            total = builder.call(torch.zeros, (vocab(builder, value),), **like(value, exact))
        total = total + constant
    for mask in value.masks:
        held = masked(builder, mask, value)
        if total is None:
            total = builder.call(torch.zeros, (vocab(builder, value),), **like(value, exact))
        # Where all classes hold a finite number, -inf would leave a log-sum-exp without a gradient of 0.
        least = math.inf if mask.fill == -math.inf else 1e30
        total = total.masked_fill(held, -least if scale > 0 else least)
    return total


def like(value: Value, dtype: torch.dtype) -> dict[str, Any]:
    return {"dtype": dtype, "device": value.fake.device}


def bias(builder: Builder, value: Value, shift: Shift, detach: bool, exact: torch.dtype, plain: bool) -> Proxy:
    b = builder.proxy(shift.node)
    b = b.detach() if detach else b
    b = b.reshape(-1) if fake(shift.node).dim() != 1 else b
    if fake(shift.node).numel() == 1:
        b = b + builder.call(torch.zeros, (vocab(builder, value),), **like(value, b.node.meta["example_value"].dtype))
    else:
        for part in shift.columns:
            b = cut(builder, b, part)
    if shift.factor == 1.0 and plain and not shift.factors:
        return b
    b = b.to(exact) * shift.factor
    for factor in shift.factors:
        if isinstance(factor, Scale):
            f = _of_classes(builder, factor, detach).to(exact)
        else:
            f = number(builder, factor.node, detach).to(exact)
        b = b / f if factor.divides else b * f
    return b


def masked(builder: Builder, mask: Mask, value: Value) -> Proxy:
    """(V,) bool: the classes that are left and masked."""
    if mask.node is not None:
        held = flat(builder, mask.node)
    else:
        assert mask.range is not None
        held = builder.call(torch.zeros, (mask.vocab,), **like(value, torch.bool))
        places = builder.call(torch.arange, mask.vocab, device=value.fake.device)
        held = held.index_fill(0, places[span(mask.range)], True)
    for part in mask.columns:
        held = cut(builder, held, part)
    return held
