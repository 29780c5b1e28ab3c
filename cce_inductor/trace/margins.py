"""Logits whose entry at the target is another one: margins (ArcFace, CosFace), however they are spelled.

Three things. Where such logits begin (`begins`): an entry is written at the target, or one-hot tensors put it there,
as in ``one_hot * phi + (1 - one_hot) * z``. What is done to them afterwards (`follows`), and so to their entry as well.
And where they end: a loss of them is ``softplus(rest - entry)``, with `rest` the log-sum-exp over all other classes.
The nodes that compute the entry are put into the graph where the logits begin, those of the loss in front of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..graph import nodes
from ..graph.builder import Builder, Proxy
from ..graph.fakes import fake, is_number, is_tensor
from ..graph.memory import storages, written, written_after
from ..graph.nodes import Op
from ..graph.refusal import Refused
from ..graph.spellings import Fact
from ..ops.losses import cross_entropy
from . import rules
from .at_target import OUT_OF_PLACE, Expression, is_pointwise, own_entry
from .decompose import in_dtype_of, widened
from .indexing import positions
from .operands import vocab
from .reasons import MARGIN
from .reduction import Loss, Reduction
from .reductions import is_arange
from .shapes import is_row_vector, same_rows, same_shape
from .targets import base
from .values import Args, Edit, Value
from .walk import Entry, Walk

# ---- where they begin


def begins(walk: Walk, node: Node, op: Op | None, touched: list[Node]) -> bool:
    """Whether a node, which no other rule takes, gives logits with another entry at the target."""
    writes = _WRITES.get(op.name) if op is not None else None
    try:
        if writes is not None and op is not None:
            return writes(walk, node, op, walk.values[touched[0]])
        return is_pointwise(node) and _put_together(walk, node)
    except Refused:
        return False


def _edited(
    walk: Walk,
    node: Node,
    op: Op,
    entry: Entry,
    classes: Any,
    record: Callable[[Builder, Proxy, Value], Any],
    partial: bool = False,
) -> bool:
    """Notes that `node` gives the logits of `entry` with another one at `classes`: what `record` makes of these.

    partial: whether `classes` may be none in rows, which the loss then ignores.
    """
    value = entry.values[0]
    _plain(value, classes)
    builder, before = Builder(walk.graph, node), node.prev

    def column() -> tuple[Node, Node]:
        index = _column(builder, classes, value)
        index = index.clamp(0, vocab(builder, value) - 1) if partial else index
        found = record(builder, index, value)
        if not isinstance(found, torch.fx.Proxy) or not is_tensor(found.node):
            found = builder.call(torch.full_like, index, found, dtype=value.fake.dtype)
        elif fake(found.node).dim() != value.fake.dim():
            found = found.expand_as(index)  # one number for all rows
        return index.node, found.node

    index, at_target = builder.run(column)
    entry.trace.entries.update(walk.visit_added(before, node))
    edit = Edit(base(classes), index, at_target, node, len(value.rows), value.order)
    walk.put_or_edit(node, op, entry, [replace(value, node=node, edit=edit)])
    return True


def _plain(value: Value, classes: Any) -> None:
    """Refused for what is no logits with the classes last, or for classes that are not one for each row."""
    last = value.class_dim == value.fake.dim() - 1
    if not value.whole or value.members or not last:
        raise Refused(*MARGIN)
    if not is_tensor(classes) or fake(classes).dtype != torch.int64 or written_after(classes):
        raise Refused(*MARGIN)
    if not is_row_vector(classes, value) and not same_rows(classes, value):
        raise Refused(*MARGIN)


def _column(builder: Builder, classes: Node, value: Value) -> Proxy:
    """The classes, 1 wide where those of the logits are."""
    p = builder.proxy(classes)
    return p if fake(classes).dim() == value.fake.dim() else p.unsqueeze(value.class_dim)


def _scattered(walk: Walk, node: Node, op: Op, entry: Entry) -> bool:
    """scatter and scatter_add of one number or tensor for each row."""
    value, args = entry.values[0], op.args
    _along_classes(value, args["dim"])
    number = args.get("value") if args.get("value") is not None else args["src"]
    if args.get("reduce") is not None or not (
        is_number(number) or (is_tensor(number) and is_row_vector(number, value))
    ):
        raise Refused(*MARGIN)
    if op.name == "scatter" and number == -math.inf and not op.inplace:
        return _left_out(walk, node, entry, args["index"])

    def record(builder: Builder, index: Proxy, value: Value) -> Any:
        given = builder.proxy(number) if is_tensor(number) else number
        return given if op.name == "scatter" else own_entry(builder, index, value) + given

    return _edited(walk, node, op, entry, args["index"], record)


def _along_classes(value: Value, dim: Any) -> None:
    if not isinstance(dim, int) or dim % value.fake.dim() != value.class_dim:
        raise Refused(*MARGIN)


def _set(walk: Walk, node: Node, op: Op, entry: Entry) -> bool:
    """logits[arange(N), target] = a number, or one for each row."""
    value, given = entry.values[0], op.args["value"]
    index = positions(value, op.args["index"])
    classes = next((i for dim, i in index if dim == value.class_dim), None)
    rows = [(dim, i) for dim, i in index if dim != value.class_dim]
    if not all(dim is not None and is_arange(i, dim, value) for dim, i in rows):
        raise Refused(*MARGIN)
    if not is_number(given) and not same_rows(given, value):
        raise Refused(*MARGIN)

    def record(builder: Builder, index: Proxy, value: Value) -> Any:
        return builder.proxy(given).unsqueeze(value.class_dim) if is_tensor(given) else given

    return _edited(walk, node, op, entry, classes, record)


_WRITES: dict[str, Callable[[Walk, Node, Op, Entry], bool]] = {
    "scatter": _scattered,
    "scatter_add": _scattered,
    "setitem": _set,
}


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


# ---- what is done to them


def follows(walk: Walk, node: Node, op: Op, touched: list[Node]) -> bool:
    """Takes a use of logits with another entry at the target, or without one; False for a use of others."""
    if op.name == "cat" and _put_in_front(walk, node, op, touched):
        return True
    entry = walk.values.get(touched[0])
    if entry is None or len(entry.values) != 1 or (entry.values[0].edit is None and entry.values[0].without is None):
        if any(walk.is_edited(n) for n in touched):
            raise Refused(*MARGIN)
        return False
    value = entry.values[0]
    if len(touched) > 1:
        raise Refused(*MARGIN)
    if value.without is not None:
        return _summed(walk, node, op, entry)
    edit = value.edit
    assert edit is not None
    if op.name == "scatter" and op.args["value"] == -math.inf and not op.inplace:
        return base(op.args["index"]) is edit.target and _left_out(walk, node, entry, op.args["index"])
    plain = replace(value, edit=None)
    if edit.classes is None and _takes_the_rest(op, value):
        walk.put(node, entry.trace, [plain.at(node)])
        return True
    if op.has(Fact.LOSS):
        walk.decompose(node, entry.trace, lambda b: _loss(b, walk, value, node, op.args))
        return True
    made = rules.apply(op, plain, node)
    if isinstance(made, Reduction):
        walk.decompose(node, entry.trace, lambda b: _read(b, walk, value, made))
        return True
    if not isinstance(made, Value) or (made.picked, made.columns, made.masks) != (None, value.columns, value.masks):
        raise Refused(*MARGIN)
    if made.kind == "logits":
        rearranged = made.rows != value.rows
        edit = replace(edit, logits=node) if rearranged else _done_to_the_entry(walk, node, op, value, edit)
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


def _done_to_the_entry(walk: Walk, node: Node, op: Op, value: Value, edit: Edit) -> Edit:
    """What an op on every entry makes of the one at the target."""
    builder, before = Builder(walk.graph, node), node.prev

    def record() -> Proxy:
        e = builder.proxy(edit.entry)
        if op.name in ("cast", "copy", "detach"):
            return e.detach() if op.name == "detach" else e
        if op.name == "neg":
            return -e  # type: ignore[operator]
        a, b = (
            e if x is value.node else _beside(builder, x, value, edit) for x in (op.args["input"], op.args["other"])
        )
        return OUT_OF_PLACE[op.name](a, b)

    if op.name not in ("cast", "copy", "detach", "neg", *OUT_OF_PLACE) or op.args.get("alpha", 1) != 1:
        raise Refused(*MARGIN)
    made = builder.run(record)
    walk.visit_added(before, node)
    return replace(edit, entry=made.node, logits=node)


def _beside(builder: Builder, x: Any, value: Value, edit: Edit) -> Any:
    if is_number(x):
        return x
    if is_tensor(x) and (fake(x).numel() == 1 or (is_row_vector(x, value) and len(value.rows) == edit.start)):
        return builder.proxy(x)
    raise Refused(*MARGIN)


def _left_out(walk: Walk, node: Node, entry: Entry, classes: Node) -> bool:
    """The logits of all classes but one of each row."""
    (value,) = entry.values[:1]
    if value.edit is None:
        _plain(value, classes)
    walk.put(node, entry.trace, [replace(value, node=node, edit=None, without=classes)])
    return True


def _summed(walk: Walk, node: Node, op: Op, entry: Entry) -> bool:
    """What may be done to logits that a class is left out of: something is added to the rows, and they are summed."""
    (value,) = entry.values
    without = value.without
    made = rules.apply(op, replace(value, without=None), node) if not op.inplace else None
    if isinstance(made, Value) and made.kind == "logits" and made.affine == value.affine and made.rows == value.rows:
        walk.put(node, entry.trace, [replace(made, without=without)])
        return True
    masked = any(mask.fill != -math.inf for mask in value.masks)
    if not isinstance(made, Reduction) or op.name != "logsumexp" or masked:
        raise Refused("the logits of all classes but one are used otherwise than in a log-sum-exp", "use them all")
    statistics = ("lse_rest", "lse_rest_low", "target_logit")
    reduction = replace(made, statistics=statistics, given=without, flat=lambda s: s.lse_rest)
    entry.trace.reductions.append(reduction)
    return True


# ---- where they end


def _nll(builder: Builder, walk: Walk, value: Value, edit: Edit) -> Proxy:
    """The cross-entropy of each row, in the shape of `value`, 1 wide where the classes are."""
    of = walk.values[edit.logits].values[0]
    z, e = widened(builder.proxy(edit.logits)), _mapped(builder, edit.entry, of, edit.start)
    if edit.classes is None:
        rest: Any = z[..., 1:] - e
    else:
        index = _mapped(builder, edit.classes, of, edit.start)
        rest = builder.call(torch.scatter, z, of.class_dim, index, -math.inf) - e
    nll: Any = builder.call(F.softplus, rest.logsumexp(of.class_dim, True))
    for _, row_map in value.rows[len(of.rows) :]:
        nll = row_map(nll, 1)
    return nll


def _mapped(builder: Builder, n: Node, value: Value, start: int) -> Any:
    """A tensor with one number for each row that the logits had at row map `start`, for those of `value`."""
    p = builder.proxy(n)
    for _, row_map in value.rows[start:]:
        p = row_map(p, 1)
    return p


def _check(value: Value, target: Node | None, edit: Edit) -> None:
    same = target is edit.target if edit.target is not None else target is not None and _is_zero(target)
    if not same or value.order is not edit.order:
        raise Refused("logits with a margin at one target are read at another", "use the same class indices in both")


def _is_zero(node: Node) -> bool:
    """Whether a tensor is full of zeros."""
    op = nodes.read(node)
    while op is not None and op.name == "cast":
        node = op.args["input"]
        op = nodes.read(node)
    if op is None or not op.has(Fact.CONSTANT) or written(node.graph.nodes, storages(node)):
        return False
    return op.name == "zeros" or op.args["fill_value"] == 0


def _loss(builder: Builder, walk: Walk, value: Value, node: Node, args: Args) -> Proxy:
    """A loss over classes."""
    made = rules.apply(nodes.read(node), replace(value, edit=None), node)  # type: ignore[arg-type]
    edit = value.edit
    assert isinstance(made, Loss) and edit is not None
    _check(value, made.target, edit)
    if made.arguments.label_smoothing or not made.ignores:
        raise Refused("label smoothing over logits with a margin", "smooth the loss yourself")
    rows = _nll(builder, walk, value, edit).squeeze(value.class_dim)
    target = builder.proxy(args["target"])
    weight = None if made.weight is None else builder.proxy(made.weight)
    stats = {"lse": rows, "target_logit": 0.0, "lse_low": 0.0}
    row_mask = target.ne(made.arguments.ignore_index)
    return in_dtype_of(cross_entropy(stats, target, row_mask, weight, vocab(builder, value), made.arguments), node)


def _read(builder: Builder, walk: Walk, value: Value, made: Reduction) -> Proxy:
    """The entry of the target, its log-probability, or the log-sum-exp."""
    edit = value.edit
    assert edit is not None
    c = value.class_dim
    if made.given is not None:
        _check(value, made.target, edit)
    if made.given is not None and value.kind == "log_softmax" and value.factor == 1.0:
        return in_dtype_of(made.shape(-_nll(builder, walk, value, edit).squeeze(c)), made.node)  # type: ignore[operator]
    if value.kind != "logits" or (made.given is None and made.statistics != ("lse", "lse_low")):
        raise Refused(*MARGIN)
    e = _mapped(builder, edit.entry, value, edit.start)
    if made.given is None:
        e = e + _nll(builder, walk, value, edit)
    return in_dtype_of(made.shape(e.squeeze(c)), made.node)
