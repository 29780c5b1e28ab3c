"""Where logits with a margin end: losses of them, and what is read of them without the class that is edited.

A loss is ``softplus(rest - entry)``, with `rest` the log-sum-exp over all other classes (margins.py).
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
from ..graph.facts import Fact
from ..graph.fakes import example
from ..graph.memory import storages, written
from ..graph.nodes import Op
from ..graph.refusal import Refused
from ..ops.losses import cross_entropy, normalizer
from . import rules
from .decompose import in_dtype_of, widened
from .labels import log_count
from .operands import mapped, vocab
from .reasons import MARGIN
from .reduction import SOFTMAX, Loss, Reduction
from .targets import as_column, same_classes
from .values import Args, Edit, Value
from .walk import Entry, Walk


def without(walk: Walk, node: Node, op: Op, entry: Entry) -> bool:
    """What reads logits without the class of each row that was edited: nodes that were added (`_others`)."""
    (value,) = entry.values
    without = value.without
    made = rules.apply(op, replace(value, without=None), node)
    if isinstance(made, Value):
        walk.put(node, entry.trace, [replace(made, without=without)])
        return True
    if not isinstance(made, Reduction) or (value.labels is not None and not _is_log_sum(made)):
        raise Refused(*MARGIN)
    if made.given is None:
        if any(mask.fill != -math.inf for mask in value.masks):
            raise Refused("logits with a margin are masked with a finite number", "mask them with -inf")
        names, flat = _without(op, value)
        made = replace(made, statistics=names, given=without, flat=flat)
    else:
        # Of the other classes, the target's entry is one: what is read of it must be what was summed, bit by bit. By
        # itself it would be a product of two rows, which rounds otherwise; so all classes are asked for something.
        made = replace(made, statistics=("target_logit", "argmax"))
    entry.trace.reductions.append(made)
    return True


def _is_log_sum(made: Reduction) -> bool:
    """Whether it is a log-sum-exp, or the sum of the exponentials."""
    return made.given is None and made.statistics == SOFTMAX and made.value.kind in ("logits", "exp")


def _without(op: Op, value: Value) -> tuple[tuple[str, ...], Callable[[Any], Any]]:
    """The statistics that a sum over classes that some are left out of needs, and the sum."""
    rest = ("lse_rest", "lse_rest_low", "target_logit")
    if value.kind == "exp" and op.name in ("sum", "mean"):
        return rest, lambda s: s.lse_rest.exp() * value.factor / (s.vocab if op.name == "mean" else 1)
    if op.name == "logsumexp":
        return rest, lambda s: s.lse_rest
    if op.name == "sum" and value.kind == "logits":
        return ("target_logit", "logit_sum"), lambda s: s.logit_sum - s.target_logit
    raise Refused(*MARGIN)


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
        index: Any = 0
        if edit.classes is not None:
            index = _mapped(builder, edit.classes, of, edit.start)
        there = target if edit.classes is not None else (target - 1).clamp(min=0)
        own = builder.call(torch.where, target.eq(index), e, others.gather(c, there))
    gone = own.eq(-math.inf)
    own = builder.call(torch.where, gone, 0.0, own)
    lse = builder.call(torch.logaddexp, (others - own).logsumexp(c, True), e - own)
    if edit.filled is not None:
        lse = builder.call(torch.logaddexp, lse, _left_out_mass(builder, of, edit) - own)
    entry = builder.call(torch.where, gone, -math.inf, 0.0).to(example(lse.node).dtype)

    def in_rows(p: Any) -> Any:
        for _, row_map in value.rows[len(of.rows) :]:
            p = row_map(p, 1)
        return p

    def total() -> Any:
        if of.labels is not None:
            raise Refused(
                "label smoothing over classes that are masked where labels are equal", "smooth the loss yourself"
            )
        classes = vocab(builder, value) + (edit.classes is None and not isinstance(value.vocab, int))
        return in_rows((others.sum(c, True) + e) - own * classes)

    return _Sums(in_rows(own), in_rows(lse), in_rows(entry), total)


def _mapped(builder: Builder, n: Node | None, value: Value, start: int) -> Any:
    """A tensor with one number for each row that the logits had at row map `start`, for those of `value`."""
    assert n is not None
    return mapped(value, builder.proxy(n), start)


def _left_out_mass(builder: Builder, value: Value, edit: Edit) -> Any:
    """The log-sum-exp of what is in the place of the classes that have the row's label."""
    assert edit.filled is not None
    number, count = (widened(_mapped(builder, n, value, edit.start)) for n in edit.filled)
    return log_count(number, count)


def _another(walk: Walk, value: Value, target: Node | None, edit: Edit) -> bool:
    """Whether logits are read at other classes than those of the edit, as far as one can see."""
    if value.order is edit.order and target is not None:
        if _is_zero(target) if edit.target is None else same_classes(target, edit.target):
            return False
        if not edit.partial and value.labels is None and value.rows == walk.values[edit.logits].values[0].rows:
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


def loss(builder: Builder, walk: Walk, value: Value, node: Node, args: Args) -> Proxy:
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


def read(builder: Builder, walk: Walk, value: Value, made: Reduction) -> Proxy:
    """The entry of the target, its log-probability, or the log-sum-exp."""
    edit, c = value.edit, value.class_dim
    assert edit is not None
    logarithm = value.kind == "log_softmax" and value.factor == 1.0
    if not (value.kind == "logits" or logarithm) or (edit.partial and (made.given is None or made.wraps)):
        raise Refused(*MARGIN)
    if made.given is not None:
        at = as_column(builder, made.given, value) if _another(walk, value, made.target, edit) else None
        if at is not None and made.wraps:
            if edit.classes is None:
                raise Refused(*MARGIN)
            at = builder.call(torch.where, at < 0, at + vocab(builder, value), at)
        sums = _sums(builder, walk, value, edit, at)
        result = sums.entry - normalizer(sums.lse) if logarithm else sums.entry + sums.own
    elif value.kind == "logits" and made.statistics == ("lse", "lse_low"):
        of = walk.values[edit.logits].values[0]
        e = widened(_mapped(builder, edit.entry, of, edit.start))
        result = builder.call(torch.logaddexp, _others(builder, of, edit).logsumexp(c, True), e)
        if edit.filled is not None:
            result = builder.call(torch.logaddexp, result, _left_out_mass(builder, of, edit))
    else:
        raise Refused(*MARGIN)
    return in_dtype_of(made.shape(result.squeeze(c)), made.node)
