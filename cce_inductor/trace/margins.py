"""Logits whose entry at the target is another one: margins (ArcFace, CosFace), however they are spelled.

Three things. Where such logits begin (`begins`): an entry is written at the target, or one-hot tensors put it there,
as in ``one_hot * phi + (1 - one_hot) * z``. What is done to them afterwards (`follows`), and so to their entry as well.
And where they end: a loss of them is ``softplus(rest - entry)``, with `rest` the log-sum-exp over all other classes.
The nodes that compute the entry are put into the graph where the logits begin, those of the loss in front of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..graph import nodes
from ..graph.builder import Builder, Proxy
from ..graph.fakes import example, fake, is_number, is_tensor
from ..graph.memory import storages, written, written_after
from ..graph.nodes import Op
from ..graph.refusal import Refused
from ..graph.spellings import Fact
from ..ops.losses import cross_entropy, normalizer
from . import rules
from .at_target import OUT_OF_PLACE, Expression, is_pointwise, own_entry
from .decompose import in_dtype_of, widened
from .indexing import positions
from .marks import mark
from .operands import vocab
from .reasons import MARGIN
from .reduction import Loss, Reduction
from .reductions import is_arange
from .shapes import is_row_vector, same_rows, same_shape
from .targets import base, diagonal, same_classes
from .values import Args, Diagonal, Edit, Value
from .walk import Entry, Walk

# ---- where they begin


def begins(walk: Walk, node: Node, op: Op | None, touched: list[Node]) -> bool:
    """Whether a node, which no other rule takes, gives logits with another entry at the target."""
    writes = _WRITES.get(op.name) if op is not None else None
    try:
        if writes is not None and op is not None and touched[0] in walk.values:
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
    target = base(classes) if isinstance(classes, Node) else classes
    logits = node if is_tensor(node) else op.args["input"]  # setitem gives nothing
    edit = Edit(target, index, at_target, logits, len(value.rows), value.order, partial)
    walk.put_or_edit(node, op, entry, [replace(value, node=node, edit=edit)])
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


def _column(builder: Builder, classes: Node | Diagonal, value: Value) -> Proxy:
    """The classes, 1 wide where those of the logits are."""
    if isinstance(classes, Diagonal):
        return diagonal(builder, value)
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
    if op.name == "diagonal" and value.without is None:
        return False  # one entry of each row, by another rule
    if len(touched) > 1:
        raise Refused(*MARGIN)
    if value.without is not None:
        return _summed(walk, node, op, entry)
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


def _summed(walk: Walk, node: Node, op: Op, entry: Entry) -> bool:
    """What reads logits without the class of each row that was edited: nodes that were added (`_others`)."""
    (value,) = entry.values
    without = value.without
    made = rules.apply(op, replace(value, without=None), node)
    if isinstance(made, Value):
        walk.put(node, entry.trace, [replace(made, without=without)])
        return True
    assert isinstance(made, Reduction)
    if made.given is None:
        if any(mask.fill != -math.inf for mask in value.masks):
            raise Refused("logits with a margin are masked with a finite number", "mask them with -inf")
        names, flat = _WITHOUT[op.name]
        made = replace(made, statistics=names, given=without, flat=flat)
    else:
        # Of the other classes, the target's entry is one: what is read of it must be what was summed, bit by bit. By
        # itself it would be a product of two rows, which rounds otherwise; so all classes are asked for something.
        made = replace(made, statistics=("target_logit", "argmax"))
    entry.trace.reductions.append(made)
    return True


# The statistics that a sum over all classes but one needs, and the sum.
_WITHOUT: dict[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
    "logsumexp": (("lse_rest", "lse_rest_low", "target_logit"), lambda s: s.lse_rest),
    "sum": (("target_logit", "logit_sum"), lambda s: s.logit_sum - s.target_logit),
}


# ---- where they end


def _others(builder: Builder, value: Value, edit: Edit) -> Any:
    """The logits without those entries. value: of `edit.logits`."""
    z = widened(builder.proxy(edit.logits))
    if edit.classes is None:
        return z[..., 1:]
    return builder.call(torch.scatter, z, value.class_dim, _mapped(builder, edit.classes, value, edit.start), -math.inf)


@dataclass(frozen=True)
class _Sums:
    """What a loss reads of such logits, recorded, 1 wide where the classes are.

    own: the entry of the row's target, or 0 where that is -inf. lse: the log-sum-exp less `own`. entry: that of the
    target less `own`: 0, or -inf. total: the sum of all entries, less `own` as often. `own` is subtracted from every
    term: where the target holds nearly all mass, the loss has all its digits.
    """

    own: Any
    lse: Any
    entry: Any
    total: Callable[[], Any]


def _sums(builder: Builder, walk: Walk, value: Value, edit: Edit, target: Any) -> _Sums:
    """target: the classes that are read, recorded, 1 wide; None: those of the edit."""
    of = walk.values[edit.logits].values[0]
    c = of.class_dim
    others, e = _others(builder, of, edit), widened(_mapped(builder, edit.entry, of, edit.start))
    own = e
    if target is not None:
        index = _mapped(builder, edit.classes, of, edit.start)
        own = builder.call(torch.where, target.eq(index), e, others.gather(c, target))
    gone = own.eq(-math.inf)
    own = builder.call(torch.where, gone, 0.0, own)
    lse = builder.call(torch.logaddexp, (others - own).logsumexp(c, True), e - own)
    entry = builder.call(torch.where, gone, -math.inf, 0.0).to(example(lse.node).dtype)

    def in_rows(p: Any) -> Any:
        for _, row_map in value.rows[len(of.rows) :]:
            p = row_map(p, 1)
        return p

    def total() -> Any:
        classes = vocab(builder, value) + (edit.classes is None and not isinstance(value.vocab, int))
        return in_rows((others.sum(c, True) + e) - own * classes)

    return _Sums(in_rows(own), in_rows(lse), in_rows(entry), total)


def _mapped(builder: Builder, n: Node | None, value: Value, start: int) -> Any:
    """A tensor with one number for each row that the logits had at row map `start`, for those of `value`."""
    assert n is not None
    p = builder.proxy(n)
    for _, row_map in value.rows[start:]:
        p = row_map(p, 1)
    return p


def _another(walk: Walk, value: Value, target: Node | None, edit: Edit) -> bool:
    """Whether logits are read at other classes than those of the edit, as far as one can see."""
    if value.order is edit.order and target is not None:
        if edit.target is None and _is_zero(target):
            return False
        if edit.target is not None and same_classes(target, edit.target):
            return False
        if edit.target is not None and not edit.partial and value.rows == walk.values[edit.logits].values[0].rows:
            return True
    raise Refused("logits with a margin at one target are read at another", "use the same class indices in both")


def _is_zero(node: Node) -> bool:
    """Whether a tensor is full of zeros."""
    op = nodes.read(node)
    while op is not None and op.name == "cast":
        node = op.args["input"]
        op = nodes.read(node)
    if op is None or not op.has(Fact.CONSTANT) or written(node.graph.nodes, storages(node)):
        return False
    return op.args["fill_value"] == 0


def _loss(builder: Builder, walk: Walk, value: Value, node: Node, args: Args) -> Proxy:
    """A loss over classes."""
    made = rules.apply(nodes.read(node), replace(value, edit=None), node)  # type: ignore[arg-type]
    edit, c = value.edit, value.class_dim
    assert isinstance(made, Loss) and edit is not None
    if not made.ignores:
        raise Refused("class probabilities for logits with a margin", "use class indices")
    if made.column_weight is not None:
        raise Refused("label smoothing with class weights over logits with a margin", "smooth the loss yourself")
    another = _another(walk, value, made.target, edit)
    target = builder.proxy(args["target"])
    row_mask = target.ne(made.arguments.ignore_index)
    at = builder.call(torch.where, row_mask, target, 0).unsqueeze(c) if another else None
    sums = _sums(builder, walk, value, edit, at)
    weight = None if made.weight is None else builder.proxy(made.weight)
    stats = {"lse": sums.lse.squeeze(c), "target_logit": sums.entry.squeeze(c), "lse_low": 0.0}
    if made.arguments.label_smoothing:
        stats["logit_sum"] = sums.total().squeeze(c)
    return in_dtype_of(cross_entropy(stats, target, row_mask, weight, vocab(builder, value), made.arguments), node)


def _read(builder: Builder, walk: Walk, value: Value, made: Reduction) -> Proxy:
    """The entry of the target, its log-probability, or the log-sum-exp."""
    edit, c = value.edit, value.class_dim
    assert edit is not None
    logarithm = value.kind == "log_softmax" and value.factor == 1.0
    if not (value.kind == "logits" or logarithm) or (edit.partial and (made.given is None or made.wraps)):
        raise Refused(*MARGIN)
    if made.given is not None:
        at = _column(builder, made.given, value) if _another(walk, value, made.target, edit) else None
        if at is not None and made.wraps:
            at = builder.call(torch.where, at < 0, at + vocab(builder, value), at)
        sums = _sums(builder, walk, value, edit, at)
        result = sums.entry - normalizer(sums.lse) if logarithm else sums.entry + sums.own
    elif value.kind == "logits" and made.statistics == ("lse", "lse_low"):
        of = walk.values[edit.logits].values[0]
        e = widened(_mapped(builder, edit.entry, of, edit.start))
        result = builder.call(torch.logaddexp, _others(builder, of, edit).logsumexp(c, True), e)
    else:
        raise Refused(*MARGIN)
    return in_dtype_of(made.shape(result.squeeze(c)), made.node)
