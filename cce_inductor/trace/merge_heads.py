"""Logits made of several heads that are the logits of one: sums of heads, and rows of one weight put together.

``x1 @ W1.T + x2 @ W2.T`` is one product, of [x1, x2] with [W1, W2], as in a head with a LoRA adapter. Rows of logits of
one weight, put together, are the product of their hidden states put together. The operands of that product are put into
the graph where the logits were combined. Nothing reads them until a loss is fused; those that nothing reads are erased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.builder import Builder, Proxy
from ..graph.fakes import example, fake, same
from ..graph.refusal import Refused
from . import operands
from .affine import Affine, Scale, Shift
from .reasons import MARGIN
from .values import Head, Step, SumOfHeads, Value


def _plain(value: Value) -> None:
    """Refused for logits that more was done to than a scale, of each class perhaps, and a bias."""
    value.need("logits", f"the {value.words} of a head are added to those of another", "compute a loss of each")
    if value.masks or value.terms or value.affine.capped or value.affine.of_rows or value.members:
        raise Refused("capped, masked or shifted logits are combined with others", "combine them before")
    if value.rounded:
        raise Refused("logits that were rounded to a narrower dtype are combined with others", "leave the cast out")


def _same_shape(a: Value, b: Value) -> bool:
    if a.fake.dim() != b.fake.dim() or a.class_dim != b.class_dim:
        return False
    return all(same(x, y) for x, y in zip(a.fake.shape, b.fake.shape, strict=True))


def _detached(value: Value) -> bool:
    """Whether no gradient goes through logits that are made of tensors which have one."""
    return not value.fake.requires_grad and any(fake(n).requires_grad for n in value.operands())


# ---- sums


def added(builder: Builder, a: Value, b: Value, node: Node, factor: float) -> Value:
    """The value of a + factor * b."""
    if a.kind == b.kind == "logits" and (a.picked is not None or b.picked is not None):
        raise Refused(*MARGIN)
    if a.head == b.head and (a.kind, b.kind) != ("logits", "logits"):
        what = a.words if a.kind == b.kind else f"{a.words} and {b.words}"
        raise Refused(f"{what} of one head are added class by class", "add what is read of them: entries, sums")
    for value in (a, b):
        _plain(value)
    if not _same_shape(a, b) or fake(node).shape != a.fake.shape:
        raise Refused(f"logits of shapes {tuple(a.fake.shape)} and {tuple(b.fake.shape)} are added", "expand neither")
    if a.head.dtype != b.head.dtype:
        raise Refused(
            f"logits computed in {a.head.dtype} and in {b.head.dtype} are added", "compute both heads in one dtype"
        )
    if _same_logits(a, b):
        return _twice(builder, a, b, node, factor)
    return builder.run(_one_head, builder, a, b, node, factor)


def _same_logits(a: Value, b: Value) -> bool:
    """Whether two values are the same rows of the same product, but for scales and biases."""
    alike = (a.head, a.order, a.columns, a.affine.factors) == (b.head, b.order, b.columns, b.affine.factors)
    return alike and a.fake.requires_grad == b.fake.requires_grad


def _twice(builder: Builder, a: Value, b: Value, node: Node, factor: float) -> Value:
    other = b.affine.scaled(factor)
    affine = replace(
        a.affine,
        scale=a.affine.scale + other.scale,
        shifts=(*a.affine.shifts, *other.shifts),
        inner=a.affine.inner + other.inner,
    )
    if a.affine.scales != b.affine.scales:
        total = builder.run(_times_of_classes, builder, ((1.0, a), (factor, b)), _detached(a))
        affine = replace(affine, scale=1.0, scales=(Scale(total.node, False, False),))
    count = len(a.extra)

    def step(z: Tensor, extra: list[Tensor]) -> Tensor:
        return _through(a.steps, z, extra[:count]) + factor * _through(b.steps, z, extra[count:])

    rounded = (*a.arithmetic, *b.arithmetic, fake(node).dtype)
    return replace(a, node=node, affine=affine, steps=(step,), plain=1, extra=(*a.extra, *b.extra), arithmetic=rounded)


def _through(steps: Sequence[Step], z: Tensor, extra: list[Tensor]) -> Tensor:
    for step in steps:
        z = step(z, extra)
    return z


def _times_of_classes(builder: Builder, terms: Sequence[tuple[float, Value]], detach: bool) -> Any:
    """What the products of one head are multiplied with, added up: (V,), or a number where it is the same for all."""
    total: Any = 0.0
    for times, value in terms:
        own = operands.column_scale(builder, value, detach)
        number = times * value.affine.scale
        total = total + (number if own is None else own * number)
    return total


def _leaves(value: Value, times: float) -> list[tuple[float, Value]]:
    """The heads that logits are a sum of, and what each is multiplied with."""
    head, affine = value.head, value.affine
    if isinstance(head, SumOfHeads) and not (value.rows or value.columns or affine.factors or affine.scales):
        return [leaf for factor, part in head.parts for leaf in _leaves(part, factor * times * affine.scale)]
    return [(times, value)]


def _one_head(builder: Builder, a: Value, b: Value, node: Node, factor: float) -> Value:
    alike: list[list[tuple[float, Value]]] = []
    for leaf in (*_leaves(a, 1.0), *_leaves(b, factor)):
        group = next((g for g in alike if _same_logits(g[0][1], leaf[1])), None)
        if group is None:
            alike.append(group := [])
        group.append(leaf)
    inputs, weights = [], []
    for group in alike:
        first = group[0][1]
        detach = _detached(first)
        x: Any = operands.scaled(builder, first, operands.hidden(builder, first, detach), detach)
        w: Any = operands.weight(builder, first, detach)
        times = _times_of_classes(builder, group, detach)
        if isinstance(times, torch.fx.Proxy):
            w = (w * times.unsqueeze(1)).to(example(w.node).dtype)
        elif times != 1.0:
            x = x * times
        inputs.append(x)
        weights.append(w)
    shifts: list[Shift] = []
    for value, times in ((a, 1.0), (b, factor)):
        own = value.affine.scaled(times).shifts
        shifts += [_without_gradient(builder, s) for s in own] if _detached(value) else own
    x, w = builder.call(torch.cat, inputs, a.class_dim), builder.call(torch.cat, weights, 1)
    head = SumOfHeads(
        node,
        x.node,
        w.node,
        None,
        transposed=False,
        width_dim=a.class_dim,
        product_dtype=a.head.dtype,
        parts=((1.0, a), (factor, b)),
    )
    rounded = (fake(node).dtype,) * 2  # eager rounds each term, and their sum
    inner = a.affine.inner + b.affine.scaled(factor).inner
    return Value(head, node, a.class_dim, affine=Affine(shifts=tuple(shifts), inner=inner), arithmetic=rounded)


def _without_gradient(builder: Builder, shift: Shift) -> Shift:
    def detached(node: Node) -> Node:
        return builder.proxy(node).detach().node

    factors = tuple(replace(f, node=detached(f.node)) for f in shift.factors)
    return replace(shift, node=detached(shift.node), factors=factors)


# ---- rows


def rows(builder: Builder, values: Sequence[Value], node: Node, dim: int, stacked: bool) -> Value:
    """The value of cat, along other than the classes, or stack over logits of other hidden states and one weight."""
    first = values[0]
    if not all(_alike(first, value) for value in values):  # the first too: it may be the only one
        raise Refused("logits of different heads, or treated differently, are put together", "compute a loss of each")
    class_dim = first.class_dim + (stacked and dim <= first.class_dim)

    def record() -> Proxy:
        made = [operands.hidden(builder, value, False) for value in values]
        return builder.call(torch.stack if stacked else torch.cat, made, dim)

    given = {"node": node, "input": builder.run(record).node, "width_dim": class_dim}
    head = replace(first.one, **given, product_dtype=first.head.dtype)
    return replace(first, head=head, node=node, rows=(), class_dim=class_dim, order=None)


def _alike(a: Value, b: Value) -> bool:
    """Whether the rows of two values can be rows of one head: the same weight, and the same done to the logits."""
    if type(a.head) is not Head or type(b.head) is not Head:
        return False
    one: dict[str, Any] = {"node": a.node, "input": a.head.input, "width_dim": a.head.width_dim}
    other = replace(b, node=a.node, head=replace(b.head, **one), rows=(), order=None)
    both_plain = not (a.picked or a.comparison or a.terms or a.affine.of_rows)
    shapes = a.fake.dim() == b.fake.dim() and a.fake.requires_grad == b.fake.requires_grad
    of_dtypes = (a.fake.dtype, a.head.dtype, fake(a.head.input).dtype)
    same_dtypes = of_dtypes == (b.fake.dtype, b.head.dtype, fake(b.head.input).dtype)
    mine = replace(a, head=replace(a.head, **one), rows=(), order=None)
    return both_plain and shapes and same_dtypes and other == mine
