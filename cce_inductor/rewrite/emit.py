"""Puts the fused operator and the arithmetic on its (N,) results in the place of traced reductions.

Reductions of the same rows of the same logits share one operator (`Group`), and so do losses of other rows that are
multiplied by the same weight (`Bundle`): their rows are put behind each other, or else the gradients of the weight
would be added up in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph

from ..graph.builder import Builder, Proxy
from ..graph.fakes import example, fake
from ..graph.hoist import Hoist
from ..graph.memory import storages, written
from ..ops.call import LABELS, OTHER, SEEDS, Attributes, sampled
from ..ops.diagnostics import meter
from ..ops.library import FORWARD
from ..ops.losses import computed, cross_entropy
from ..trace import operands
from ..trace.codes import Codes, codes
from ..trace.reduction import Loss, Reduction
from ..trace.values import Value
from .groups import EXACT, Bundle
from .served import Statistics

# ---- the operator


def emit(
    graph: Graph,
    bundle: Bundle,
    attributes: Attributes,
    hoist: Hoist,
    diagnostics: bool = False,
) -> None:
    """Replaces the reductions of one bundle.

    diagnostics: whether a filtered backward leaves its numbers to the site's meter.
    """
    anchor = bundle.first.anchor
    for group in bundle.groups:
        for node in group.reads():
            hoist.move(node, anchor)
    builder = Builder(graph, anchor)
    call = builder.run(_Arguments, builder, bundle, attributes, hoist, diagnostics)
    results = builder.run(call.statistics, builder)
    for i, group in enumerate(bundle.groups):
        parts = builder.run(call.part, builder, results, i)
        for reduction in group.members:
            after = Builder(graph, reduction.node)
            again = Statistics(after, reduction, group, {name: after.proxy(p.node) for name, p in parts.items()}, hoist)
            made = after.run(_result, after, reduction, again).node
            hoist.replaced[reduction.node] = made
            reduction.node.replace_all_uses_with(made)


class _Arguments:
    """The arguments of a bundle's operator, recorded: its operands, the (N,) target, the mask of active rows."""

    def __init__(self, builder: Builder, bundle: Bundle, attributes: Attributes, hoist: Hoist, diagnostics: bool):
        group, value = bundle.first, bundle.first.value
        head = value.one
        scale, softcap, _, _ = value.affine.operator()
        # The loss of logits that eager computed without a graph must have none either.
        detach = not value.fake.requires_grad and any(fake(n).requires_grad for n in value.operands())
        made = codes_read(bundle, attributes)
        inputs = [operands.input_rows(builder, g.value, detach) for g in bundle.groups]
        self.sizes = [_rows(p) for p in inputs]
        self.operands: dict[str, Proxy] = {
            "input": _joined(builder, inputs),
            "weight": operands.weight(builder, value, detach, made),
        }
        bias = operands.biases(builder, value, detach)
        scales = _scales(builder, bundle, detach, made)
        # The rows that count, and those that the operator computes.
        self.row_mask: Proxy | None = None
        self.computed: Proxy | None = None
        self.target: Proxy | None = None
        self.targets: list[Proxy] = []
        if group.target is not None:
            self.targets = [
                operands.flat(builder, given)
                for g in bundle.groups
                if (given := g.given(hoist, group.anchor)) is not None
            ]
            self.target = _joined(builder, self.targets)
            if group.ignored is not None:
                self.row_mask = self.target.ne(group.ignored)
                counted = _counted(builder, self.row_mask, bundle, group.ignored)
                self.computed = computed(counted, self.operands["input"], bias, **scales)
                self.operands["target"] = builder.call(torch.where, self.row_mask, self.target, 0)
            elif group.wraps:
                wrapped = self.target + operands.vocab(builder, value)
                self.target = builder.call(torch.where, self.target < 0, wrapped, self.target)
            else:
                self.target = _without_ignored(builder, self.target, bundle)
            self.operands.setdefault("target", self.target)
        self.operands |= _labels(builder, bundle)
        self._take_entries(builder, bundle)
        self.operands |= scales if bias is None else {"bias": bias, **scales}
        if group.column_weight is not None:
            self.operands["column_weight"] = builder.proxy(group.column_weight).detach()
        self.names = bundle.statistics
        self.attributes = replace(
            attributes,
            scale=scale,
            softcap=softcap,
            softcap_form=value.affine.form,
            compute_dtype=head.dtype,
            grad_filter="exact" if scales else attributes.grad_filter,
        )
        if group.other is not None:
            self._add_other(builder, group.other)
        self._add_for_filter(builder, bundle, attributes, diagnostics)

    def _add_for_filter(self, builder: Builder, bundle: Bundle, attributes: Attributes, diagnostics: bool) -> None:
        """The seed of a filter that draws a sample, and the slot for its numbers."""
        group, device = bundle.first, fake(bundle.first.value.one.input).device
        differentiated = group.members[0].differentiated
        if differentiated and sampled(" ".join(self.names), self.attributes):
            self.operands["seed"] = builder.call(torch.randint, SEEDS, (1,), device=device)
        applied = bundle.filter(attributes)
        if diagnostics and differentiated and applied.kind != "exact":
            slot = meter(bundle.name, str(applied), device).slot()
            self.operands["diagnostics"] = builder.parameter("cce_inductor_diagnostics", slot)

    def _add_other(self, builder: Builder, value: Value) -> None:
        """The operands and attributes of the second head."""
        detach = not value.fake.requires_grad and any(fake(n).requires_grad for n in value.operands())
        own = {
            "input": operands.input_rows(builder, value, detach),
            "weight": operands.weight(builder, value, detach),
            "bias": operands.biases(builder, value, detach),
            "row_scale": operands.row_scale(builder, value, detach),
            "column_scale": operands.column_scale(builder, value, detach),
        }
        self.operands |= {OTHER + name: p for name, p in own.items() if p is not None}
        scale, softcap, _, _ = value.affine.operator()
        self.attributes = replace(
            self.attributes,
            other_scale=scale,
            other_softcap=softcap,
            other_softcap_form=value.affine.form,
            other_compute_dtype=value.head.dtype,
        )

    def _take_entries(self, builder: Builder, bundle: Bundle) -> None:
        """The classes of each row besides the target: (N, K), those of each reduction side by side."""
        rows = [[_classes(builder, r) for r in g.entries] for g in bundle.groups]
        if rows[0]:
            blocks = [_joined(builder, parts, 1) for parts in rows]
            self.operands["entries"] = _joined(builder, blocks)

    def statistics(self, builder: Builder) -> dict[str, Proxy]:
        """Records the operator; gives its results by name."""
        given, names = list(self.operands.values()), " ".join(self.operands)
        rest = " ".join(self.names), False, *self.attributes.args()
        out = builder.call(FORWARD, given, names, self.computed, *rest)
        return {name: out[i] for i, name in enumerate(self.names)}

    def part(self, builder: Builder, results: dict[str, Proxy], i: int) -> dict[str, Proxy]:
        """The statistics, the target and the mask of active rows of group `i`: its rows of them all."""
        every = dict(results)
        if self.target is not None:
            every["target"] = self.target
        if self.row_mask is not None:
            every["row_mask"] = self.row_mask
        if "entries" in self.operands:
            every["entries"] = self.operands["entries"]
        if len(self.sizes) == 1:
            return every
        start: Any = 0
        for size in self.sizes[:i]:
            start = size + start
        return {name: p.narrow(0, start, self.sizes[i]) for name, p in every.items()}


def codes_read(bundle: Bundle, attributes: Attributes) -> Codes | None:
    """The codes that the weight is made of, where they are read in its place: a filter needs logits without factors."""
    made = codes(bundle.first.value.one)
    return None if made is not None and made.scales and bundle.filter(attributes) != EXACT else made


def _joined(builder: Builder, parts: Sequence[Proxy], dim: int = 0) -> Proxy:
    """One tensor behind the other, or the only one."""
    return builder.call(torch.cat, parts, *([dim] if dim else [])) if len(parts) > 1 else parts[0]


def _classes(builder: Builder, reduction: Reduction) -> Proxy:
    """(N, K): the classes that a reduction reads of each row, and class 0 in rows that it ignores."""
    value = reduction.value
    if reduction.entries is not None:
        p = operands.flat_rows(builder.proxy(reduction.entries), value.fake.dim(), value.class_dim)
    else:
        assert reduction.target is not None
        p = operands.flat(builder, reduction.target).unsqueeze(-1)
    if isinstance(reduction, Loss) and reduction.ignores:
        return builder.call(torch.where, p.ne(reduction.arguments.ignore_index), p, 0)
    return builder.call(torch.where, p < 0, p + operands.vocab(builder, value), p) if reduction.wraps else p


def _labels(builder: Builder, bundle: Bundle) -> dict[str, Proxy]:
    """The labels of the rows and of the classes, where those that are equal are left out."""
    if bundle.first.value.labels is None:
        return {}
    rows: list[Any] = []
    for value in (g.value for g in bundle.groups):
        assert value.labels is not None
        rows.append(operands.column(value, builder.proxy(value.labels.rows), value.labels.start).squeeze(-1))
    of_rows = _joined(builder, rows)
    of_classes = operands.flat(builder, bundle.first.value.labels.classes)
    return dict(zip(LABELS, (of_rows.to(torch.int64), of_classes.to(torch.int64)), strict=True))


def _scales(builder: Builder, bundle: Bundle, detach: bool, made: Codes | None) -> dict[str, Proxy]:
    """The factors of the rows and of the classes, where there are any."""
    of_rows = [p for g in bundle.groups if (p := operands.row_scale(builder, g.value, detach)) is not None]
    of_classes = operands.column_scale(builder, bundle.first.value, detach, made)
    scales = {} if of_classes is None else {"column_scale": of_classes}
    if of_rows:
        scales["row_scale"] = _joined(builder, of_rows)
    return scales


def _counted(builder: Builder, row_mask: Any, bundle: Bundle, ignored: int) -> Any:
    """The rows that some loss of a bundle counts: by its target, or by another one, which stands among the entries."""
    for k in range(len(bundle.first.entries)):
        own = [operands.flat(builder, g.entries[k].target).ne(ignored) for g in bundle.groups]  # type: ignore[arg-type]
        row_mask = row_mask | _joined(builder, own)
    return row_mask


def _rows(p: Proxy) -> Any:
    n = example(p.node).shape[0]
    return n if isinstance(n, int) else p.size(0)


def _without_ignored(builder: Builder, target: Proxy, bundle: Bundle) -> Proxy:
    """The target with a class that there is in rows that a loss ignores and another reduction does not."""
    ignored = next((r.arguments.ignore_index for r in bundle.members if isinstance(r, Loss) and r.ignores), 0)
    if ignored >= 0 and not (isinstance(bundle.first.value.vocab, int) and ignored >= bundle.first.value.vocab):
        return target  # it is a class itself
    return builder.call(torch.where, target.ne(ignored), target, 0)


def _result(builder: Builder, reduction: Reduction, statistics: Statistics) -> Proxy:
    """Records what the program gets for a reduction, in eager's shape and dtype."""
    if isinstance(reduction, Loss):
        result = _loss(builder, reduction, statistics)
    else:
        flat = reduction.flat(statistics)
        result = reduction.shape(
            in_rows(builder, reduction.value, flat)
            if reduction.entries is None
            else flat.reshape_as(operands.last(builder, reduction.entries, reduction.value.class_dim))
        )
    dtype = fake(reduction.node).dtype
    result = result if dtype == result.node.meta["example_value"].dtype else result.to(dtype)
    # Autograd may have saved it, where eager's op saves something else and lets it be edited.
    edited = written(reduction.node.graph.nodes, storages(reduction.node))
    return result.clone() if edited else result


def in_rows(builder: Builder, value: Value, flat: Any) -> Any:
    """(N,) in the leading shape of the logits."""
    lead = value.lead_shape
    if len(lead) == 1:
        return flat
    if all(isinstance(s, int) for s in lead):
        return flat.reshape(tuple(lead))
    return flat.reshape_as(operands.hidden(builder, value, True).select(value.class_dim, 0))


def _loss(builder: Builder, loss: Loss, statistics: Statistics) -> Proxy:
    """Records the arithmetic of one loss over classes."""
    weight = None if loss.weight is None else builder.proxy(loss.weight)
    target, row_mask = statistics.parts["target"], statistics.parts.get("row_mask")
    if statistics.group.is_entry(loss):
        target, row_mask = operands.flat(builder, loss.target), None  # type: ignore[arg-type]
    stats = {name: getattr(statistics, name) for name in loss.statistics}
    if row_mask is None and loss.ignores and statistics.group.target is not None:
        # Others read every row: what is ignored was computed as well.
        row_mask = operands.flat(builder, loss.target).ne(loss.arguments.ignore_index)  # type: ignore[arg-type]
    elif row_mask is None:
        row_mask = target.ge(0)
    result = cross_entropy(stats, target, row_mask, weight, statistics.vocab, loss.arguments)
    lead = loss.value.lead_shape
    if loss.arguments.reduction == "none" and len(lead) != 1:
        result = in_rows(builder, loss.value, result)
    return result
