"""Logits whose entry at the target is another one: margins (ArcFace, CosFace), however they are spelled.

Two things. Where such logits begin (`begins`): an entry is written at the target, or one-hot tensors put it there,
as in ``one_hot * phi + (1 - one_hot) * z``. What is done to them afterwards (`follows`), and so to their entry as well.
And where they end: margin_losses.py. The nodes that compute the entry are put into the graph where the logits begin,
those of the loss in front of the loss.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..graph import nodes
from ..graph.builder import Builder, Proxy
from ..graph.facts import Fact
from ..graph.fakes import fake, is_number, is_tensor, same
from ..graph.memory import written_after
from ..graph.nodes import Op
from ..graph.refusal import Refused
from . import margin_losses, rules
from .at_target import OUT_OF_PLACE, Expression, is_pointwise, own_entry
from .indexing import positions
from .labels import OUT_OF_SIGHT, left_out
from .marks import mark
from .operands import vocab
from .reasons import LEFT_OUT, MARGIN
from .reduction import Reduction
from .reductions import is_arange
from .shapes import is_row_vector, is_vocabulary_vector, same_rows, same_shape
from .targets import as_column, base
from .values import Diagonal, Edit, Labels, Mask, Value
from .walk import Entry, Walk

# ---- where they begin


def begins(walk: Walk, node: Node, op: Op | None, touched: list[Node]) -> bool:
    """Whether a node, which no other rule takes, gives logits with another entry at the target."""
    ways: list[Callable[[], bool]] = []
    if op is not None:
        ways.append(lambda: _mask_labels(walk, node, op, touched))
    if op is not None and op.name in _WRITES and touched[0] in walk.values:
        ways.append(lambda: _WRITES[op.name](walk, node, op, walk.values[touched[0]]))
    elif is_pointwise(node):
        ways.append(lambda: _put_together(walk, node))
    for way in ways:
        with contextlib.suppress(Refused):
            if way():
                return True
    return False


def _edited(
    walk: Walk,
    node: Node,
    op: Op,
    entry: Entry,
    classes: Any,
    record: Callable[[Builder, Proxy, Value], Any],
    partial: bool = False,
    labels: Labels | None = None,
    filled: tuple[Node, Node] | None = None,
) -> bool:
    """Notes that `node` gives the logits of `entry` with another one at `classes`: what `record` makes of these.

    partial: whether `classes` may be none in rows, which the loss then ignores. labels, filled: of `Value`, `Edit`.
    """
    value = entry.values[0]
    _plain(value, classes)
    builder, before = Builder(walk.graph, node), node.prev

    def column() -> tuple[Node, Node]:
        index = as_column(builder, classes, value)
        index = index.clamp(0, vocab(builder, value) - 1) if partial else index
        found = record(builder, index, value)
        if not isinstance(found, torch.fx.Proxy) or not is_tensor(found.node):
            found = builder.call(torch.full_like, index, found, dtype=value.fake.dtype)
        elif fake(found.node).dim() != value.fake.dim():
            found = found.expand_as(index)  # one number for all rows
        return index.node, found.node

    index, at_target = builder.run(column)
    entry.trace.entries.update(walk.visit_added(before, node))
    target = base(classes) if isinstance(classes, Node) else classes
    logits = node if is_tensor(node) else op.args["input"]  # setitem gives nothing
    edit = Edit(target, index, at_target, logits, len(value.rows), value.order, partial, filled)
    walk.put_or_edit(node, op, entry, [replace(value, node=node, edit=edit, labels=labels)])
    return True


def _plain(value: Value, classes: Any) -> None:
    """Refused for what is no logits with the classes last, or for classes that are not one for each row."""
    last = value.class_dim == value.fake.dim() - 1
    if not value.whole or value.members or not last:
        raise Refused(*MARGIN)
    if isinstance(classes, Diagonal):
        return
    if not is_tensor(classes) or fake(classes).dtype != torch.int64 or written_after(classes):
        raise Refused(*MARGIN)
    if not is_row_vector(classes, value) and not same_rows(classes, value):
        raise Refused(*MARGIN)


def _scattered(walk: Walk, node: Node, op: Op, entry: Entry) -> bool:
    """scatter and scatter_add of one number or tensor for each row."""
    value, args = entry.values[0], op.args
    _along_classes(value, args["dim"])
    number = args.get("value") if args.get("value") is not None else args["src"]
    if args.get("reduce") is not None or not (
        is_number(number) or (is_tensor(number) and is_row_vector(number, value))
    ):
        raise Refused(*MARGIN)

    def record(builder: Builder, index: Proxy, value: Value) -> Any:
        given = builder.proxy(number) if is_tensor(number) else number
        return given if op.name == "scatter" else own_entry(builder, index, value) + given

    return _edited(walk, node, op, entry, args["index"], record)


def _along_classes(value: Value, dim: Any) -> None:
    if not isinstance(dim, int) or dim % value.fake.dim() != value.class_dim:
        raise Refused(*MARGIN)


def _set(walk: Walk, node: Node, op: Op, entry: Entry) -> bool:
    """logits[arange(N), target] or logits[mask] = a number; or, by an index, one for each row."""
    value, given = entry.values[0], op.args["value"]
    found = mark(op.args["index"], value)
    if found is not None and fake(op.args["index"]).dtype == torch.bool:
        if (found.elsewhere, found.at_target) != (False, True) or not is_number(given):
            raise Refused(*MARGIN)
        return _edited(walk, node, op, entry, found.target, lambda *_: given, found.partial)
    index = positions(value, op.args["index"])
    classes = next((i for dim, i in index if dim == value.class_dim), None)
    rows = [(dim, i) for dim, i in index if dim != value.class_dim]
    if not all(dim is not None and is_arange(i, value.lead_shape, dim) for dim, i in rows):
        raise Refused(*MARGIN)
    if not is_number(given) and not same_rows(given, value):
        raise Refused(*MARGIN)

    def record(builder: Builder, index: Proxy, value: Value) -> Any:
        return builder.proxy(given).unsqueeze(value.class_dim) if is_tensor(given) else given

    return _edited(walk, node, op, entry, classes, record)


def _filled(walk: Walk, node: Node, op: Op, entry: Entry) -> bool:
    """logits.fill_diagonal_(a number)"""
    value, number = entry.values[0], op.args["fill_value"]
    if not value.has_diagonal or not is_number(number):
        raise Refused(*MARGIN)
    return _edited(walk, node, op, entry, Diagonal(), lambda *_: number)


_WRITES: dict[str, Callable[[Walk, Node, Op, Entry], bool]] = {
    "fill_diagonal": _filled,
    "scatter": _scattered,
    "scatter_add": _scattered,
    "setitem": _set,
}


# ---- classes that have the row's label


def _mask_labels(walk: Walk, node: Node, op: Op, touched: list[Node]) -> bool:
    """Logits or their exponentials, of which a mask leaves out the classes of the row's label, but for one perhaps."""
    entry = walk.values.get(touched[0])
    ways = entry.values if entry is not None and len(touched) == 1 else []
    value = next((v for v in ways if v.class_dim == v.fake.dim() - 1), None)
    found = None if value is None else left_out(op, value)
    if found is None or value is None or entry is None or value.edit or value.without or value.labels:
        return False
    entry = replace(entry, values=[value])
    mask, number, keeps = found
    if is_tensor(node) and fake(node).dtype != value.fake.dtype:
        raise Refused(*MARGIN)
    builder, before = Builder(walk.graph, node), node.prev
    if keeps and value.kind == "logits":
        filled = None if number == -math.inf else builder.run(mask.filled, builder, number)
        walk.visit_added(before, node)
        return _edited(
            walk,
            node,
            op,
            entry,
            mask.kept,
            lambda b, index, v: own_entry(b, index, v),
            mask.partial,
            mask.labels,
            filled,
        )
    if keeps or number != -math.inf:
        raise Refused(*MARGIN)
    classes = Diagonal() if mask.kept is None else mask.kept
    index = builder.run(lambda: as_column(builder, classes, value)).node
    walk.visit_added(before, node)
    walk.put_or_edit(node, op, entry, [replace(value, node=node, without=index, labels=mask.labels)])
    return True


# ---- put together from one-hot tensors


def _put_together(walk: Walk, node: Node) -> bool:
    """An expression that is logits of the program but for the target."""
    expression = Expression(walk, node)
    elsewhere = expression.elsewhere(node)
    target = expression.target
    entry = walk.values.get(elsewhere) if isinstance(elsewhere, Node) else None
    if target is None or entry is None or not same_shape(node, entry.values[0]):
        return False
    if fake(node).dtype != fake(elsewhere).dtype:
        return False
    op = nodes.read(node)
    assert op is not None
    if op.inplace and op.args["input"] is not elsewhere:
        return False

    def record(builder: Builder, index: Proxy, value: Value) -> Any:
        return expression.there(builder, node, index, value)

    return _edited(walk, node, op, entry, target, record, expression.partial)


# ---- the other direction of a matrix

_TURNS = ("t", "transpose", "permute", "getattr", "movedim")


def _turned(walk: Walk, node: Node, source: Node) -> bool:
    """An edited matrix of similarities, transposed: the other side's logits, edited by the transposed tensors."""
    entry = walk.values.get(source)
    value = entry.values[0] if entry is not None and entry.values else None
    if entry is None or value is None or value.fake.dim() != 2 or not is_tensor(node) or not is_pointwise(source):
        return False
    if not (value.edit and value.edit.logits is source) and value.without is None:
        return False
    plain = [n for n in source.all_input_nodes if n in walk.values and len(walk.values[n].values) > 1]
    turns = all(map(same, fake(node).shape, reversed(fake(source).shape)))
    if not plain or not turns or written_after(source):
        return False
    builder, before = Builder(walk.graph, node), node.prev
    turned = {n: builder.run(builder.proxy(n).t).node for n in plain}
    walk.visit_added(before, node)
    for n in turned.values():
        found = walk.values[n]
        walk.put(n, found.trace, sorted(found.values, key=lambda v: -v.class_dim))

    def of(builder: Builder, n: Node) -> Any:
        op = nodes.read(n)
        if not is_tensor(n) or fake(n).dim() == 0 or (op is not None and op.name == "eye"):
            return builder.proxy(n)
        if fake(n).dim() == 1:
            return builder.proxy(n).unsqueeze(-1)
        if n in turned:
            return builder.proxy(turned[n])
        if not is_pointwise(n) or written_after(n):
            return builder.proxy(n).t()
        return builder.again(n, *map_arg((n.args, n.kwargs), lambda other: of(builder, other)))

    made = walk.values.get(walk.decompose(node, entry.trace, lambda b: of(b, source)))
    if made is not None:
        walk.put(node, made.trace, [v.at(node) for v in made.values])
    return True


# ---- what is done to them


def follows(walk: Walk, node: Node, op: Op, touched: list[Node]) -> bool:
    """Takes a use of logits with another entry at the target, or without one; False for a use of others."""
    try:
        return _follows(walk, node, op, touched)
    except Refused as refused:
        masked = any(v.labels is not None for n in touched if n in walk.values for v in walk.values[n].values)
        if masked and (refused.reason, refused.cure) == MARGIN:
            raise Refused(*LEFT_OUT) from None
        raise


def _follows(walk: Walk, node: Node, op: Op, touched: list[Node]) -> bool:
    if op.name == "cat" and _put_in_front(walk, node, op, touched):
        return True
    if op.name in _TURNS and _turned(walk, node, touched[0]):
        return True
    entry = walk.values.get(touched[0])
    if entry is None or len(entry.values) != 1 or (entry.values[0].edit is None and entry.values[0].without is None):
        if any(walk.is_edited(n) for n in touched):
            raise Refused(*MARGIN)
        return False
    value = entry.values[0]
    if op.name == "diagonal" and value.without is None:
        return False  # one entry of each row, by another rule
    if len(touched) > 1:
        raise Refused(*MARGIN)
    if value.without is not None:
        return margin_losses.without(walk, node, op, entry)
    edit = value.edit
    assert edit is not None
    if node not in walk.given and op.name == "scatter":
        walk.put(node, entry.trace, [replace(value, node=node, edit=None, without=op.args["index"])])
        return True
    plain = replace(value, edit=None)
    if edit.classes is None and _takes_the_rest(op, value):
        walk.put(node, entry.trace, [plain.at(node)])
        return True
    if op.has(Fact.LOSS):
        walk.decompose(node, entry.trace, lambda b: margin_losses.loss(b, walk, value, node, op.args))
        return True
    made = rules.apply(op, plain, node)
    if isinstance(made, Reduction):
        walk.decompose(node, entry.trace, lambda b: margin_losses.read(b, walk, value, made))
        return True
    if not isinstance(made, Value) or (made.picked, made.columns) != (None, value.columns):
        raise Refused(*MARGIN)
    masked = made.masks[len(value.masks) :]
    if any(mask.fill != -math.inf for mask in masked):
        raise Refused("logits with a margin are masked with a finite number", "mask them with -inf")
    if made.kind == "logits":
        rearranged = made.rows != value.rows
        edit = replace(edit, logits=node) if rearranged else _done_to_the_entry(walk, node, op, value, edit, masked)
    elif made.kind != "log_softmax":
        raise Refused(*MARGIN)
    walk.put_or_edit(node, op, entry, [replace(made, edit=edit)])
    return True


def _put_in_front(walk: Walk, node: Node, op: Op, touched: list[Node]) -> bool:
    """One entry of each row in front of its logits, as a positive one stands in front of sampled negatives."""
    tensors, entry = op.args["tensors"], walk.values.get(touched[0])
    if entry is None or len(touched) > 1 or not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
        return False
    first, second = tensors
    value, dim = entry.values[0], op.args["dim"]
    last = value.class_dim == value.fake.dim() - 1
    plain = value.whole and not value.members
    if second is not touched[0] or not plain or not last or not is_tensor(first) or not is_row_vector(first, value):
        return False
    if dim % value.fake.dim() != value.class_dim or fake(first).dtype != value.fake.dtype or written_after(first):
        return False
    edit = Edit(None, None, first, node, len(value.rows), value.order)
    walk.put(node, entry.trace, [replace(value, node=node, edit=edit)])
    return True


def _takes_the_rest(op: Op, value: Value) -> bool:
    """Whether an op takes all that stands behind the entry in front."""
    index = op.args.get("index")
    return op.name == "getitem" and index == (Ellipsis, slice(1, None, None))


def _done_to_the_entry(walk: Walk, node: Node, op: Op, value: Value, edit: Edit, masked: tuple[Mask, ...]) -> Edit:
    """What an op on every entry makes of the one at the target. masked: the classes that it has masked."""
    builder, before = Builder(walk.graph, node), node.prev

    def record(n: Node) -> Proxy:
        e = builder.proxy(n)
        if masked:
            return e.masked_fill(_at_classes(builder, masked[0].node, edit), masked[0].fill)
        if op.name in ("cast", "copy", "detach"):
            return e.detach() if op.name == "detach" else e
        if op.name == "neg":
            return -e  # type: ignore[operator]
        a, b = (
            e if x is value.node else _beside(builder, x, value, edit) for x in (op.args["input"], op.args["other"])
        )
        return OUT_OF_PLACE[op.name](a, b)

    known = masked or op.name in ("cast", "copy", "detach", "neg", *OUT_OF_PLACE)
    if not known or op.args.get("alpha", 1) != 1:
        raise Refused(*MARGIN)
    if value.labels is not None and not _keeps_what_is_left_out(op, value, edit, masked):
        raise Refused(*MARGIN)
    made, filled = builder.run(record, edit.entry).node, edit.filled
    if filled is not None:
        filled = builder.run(record, filled[0]).node, filled[1]
    walk.visit_added(before, node)
    return replace(edit, entry=made, logits=node, filled=filled)


def _at_classes(builder: Builder, n: Node | None, edit: Edit) -> Proxy:
    """What a tensor with one number for each class has at those of the edit."""
    if n is None or edit.classes is None:
        raise Refused(*MARGIN)
    return builder.proxy(n).reshape(-1)[builder.proxy(edit.classes)]


def _keeps_what_is_left_out(op: Op, value: Value, edit: Edit, masked: tuple[Mask, ...]) -> bool:
    """Whether an op does the same to all classes that a mask of labels leaves out, whatever else it takes.

    To those at -inf it does nothing, as long as that is finite.
    """
    first = op.args["input"] is value.node
    other = op.args.get("other") if first else op.args["input"]
    if edit.filled is not None:
        number = nodes.read(edit.filled[0])
        of_classes = is_tensor(other) and is_vocabulary_vector(fake(other), value.fake, value.class_dim)
        far = number is not None and number.has(Fact.CONSTANT) and number.args["fill_value"] <= OUT_OF_SIGHT
        return not masked and (not of_classes or (far and op.name in ("add", "sub")))
    if masked or op.name in ("cast", "copy", "detach", "add"):
        return True
    if op.name == "mul":
        return isinstance(other, (int, float)) and other > 0
    return first and (op.name == "sub" or (op.name == "div" and isinstance(other, (int, float)) and other > 0))


def _beside(builder: Builder, x: Any, value: Value, edit: Edit) -> Any:
    if is_number(x):
        return x
    if is_tensor(x) and (fake(x).numel() == 1 or (is_row_vector(x, value) and len(value.rows) == edit.start)):
        return builder.proxy(x)
    if is_tensor(x) and is_vocabulary_vector(fake(x), value.fake, value.class_dim):
        return _at_classes(builder, x, edit)
    raise Refused(*MARGIN)
