"""Puts the fused operator and the arithmetic on its (N,) results in the place of traced readings.

Readings of the same rows of the same logits share one operator (`Group`), and so do losses of other rows that are
multiplied by the same weight (`Bundle`): their rows are put behind each other, or else the gradients of the weight
would be added up in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node, Proxy

from ..ops.call import SEEDS, Attributes, filtered, sampled
from ..ops.diagnostics import meter
from ..ops.filters import Filter
from ..ops.library import FORWARD
from ..ops.losses import computed, cross_entropy, normalizer, tangents
from ..ops.softcap import softcapped
from ..ops.statistics import TABLE
from ..ops.with_gradients import ATTACH, WITH_GRADIENTS
from . import operands, vocabulary
from .builder import Builder
from .hoist import Hoist
from .ranking import Ranking
from .readings import Loss, Reading
from .trace import Trace, descendants
from .values import Value, example, fake

EXACT = Filter()


@dataclass
class Group:
    """Readings that share one operator call, in graph order."""

    members: list[Reading]

    @property
    def value(self) -> Value:
        return self.members[0].value

    @property
    def anchor(self) -> Node:
        """The operator stands in front of this node."""
        return self.members[0].node

    @property
    def statistics(self) -> list[str]:
        names = {name for reading in self.members for name in reading.statistics}
        return [name for name in TABLE_ORDER if name in names]

    @property
    def target(self) -> Node | None:
        return next((r.target for r in self.members if r.target is not None), None)

    def given(self, hoist: Hoist, anchor: Node) -> Node | None:
        """The target in the form that takes least: as a vector where the program has made one before `anchor`."""
        for r in self.members:
            if r.given is not None and fake(r.given).dim() == 1 and hoist.before(r.given, anchor):
                return r.given
        return self.target

    @property
    def wraps(self) -> bool:
        """Whether a negative target counts from the end, for all of them that read one."""
        return all(r.wraps for r in self.members if r.target is not None)

    @property
    def ignored(self) -> int | None:
        """The class of rows that do not count, or None if some reading counts every row."""
        first = self.members[0]
        if not isinstance(first, Loss) or not all(isinstance(r, Loss) and r.ignores for r in self.members):
            return None
        return first.arguments.ignore_index

    @property
    def column_weight(self) -> Node | None:
        """The class weights that `logit_sum` is taken with: the same for all members."""
        return next((r.column_weight for r in self.members if isinstance(r, Loss) and r.column_weight), None)

    def reads(self) -> list[Node]:
        """The nodes that the rows of the operator are made of: hidden states, what they are indexed by, the target."""
        value = self.value
        logits = {value.head.node, *descendants(value.head.node)}
        given = [value.head.input, *(n for node, _ in value.rows for n in node.all_input_nodes if n not in logits)]
        return given if self.target is None else [*given, self.target]

    def takes(self, reading: Reading, hoist: Hoist, exact: bool) -> bool:
        """Whether one operator can serve `reading` as well."""
        first = self.members[0]
        if reading.value.source != first.value.source:
            return False
        if reading.differentiated != first.differentiated:
            # Statistics for logging come along, unless they keep a filter from being applied.
            if reading.differentiated or ("entropy" in reading.statistics and not exact):
                return False
        elif reading.value.fake.requires_grad != first.value.fake.requires_grad:
            return False
        if None not in (reading.target, self.target):
            if reading.target is not self.target:
                return False
        elif reading.target is not None and not hoist.can(reading.target, self.anchor):
            return False
        if isinstance(reading, Loss):
            for other in self.members:
                if isinstance(other, Loss) and (other.ignores, other.arguments.ignore_index) != (
                    reading.ignores,
                    reading.arguments.ignore_index,
                ):
                    return False
        sums = [r for r in (*self.members, reading) if "logit_sum" in r.statistics]
        return len({r.column_weight if isinstance(r, Loss) else None for r in sums}) <= 1


TABLE_ORDER = ("lse", "lse_low", "target_logit", "logit_sum", "entropy", "argmax")
assert set(TABLE_ORDER) == set(TABLE)


def groups(trace: Trace, hoist: Hoist, exact: bool) -> list[Group]:
    """The readings of a head in groups. `exact`: no filter is set that a statistic could keep from being applied."""
    found: list[Group] = []
    readings = [r for r in trace.readings if not isinstance(r, Ranking)]
    for reading in sorted(readings, key=lambda r: hoist.position(r.node)):
        group = next((g for g in found if g.takes(reading, hoist, exact)), None)
        if group is None:
            reading.value.affine.operator()  # refused here, not where it is emitted
            found.append(Group([reading]))
        else:
            group.members.append(reading)
    return found


@dataclass
class Bundle:
    """Groups whose rows go through one operator call, one behind the other."""

    groups: list[Group]
    name: str = ""  # of the site: where its first loss stands

    @property
    def members(self) -> list[Reading]:
        return [reading for group in self.groups for reading in group.members]

    @property
    def first(self) -> Group:
        return self.groups[0]

    @property
    def statistics(self) -> list[str]:
        names = {name for group in self.groups for name in group.statistics}
        return [name for name in TABLE_ORDER if name in names]

    def filter(self, attributes: Attributes) -> Filter:
        """What the gradient filter comes to for these logits and statistics: "exact" where none applies to them."""
        _, softcap, _, _ = self.first.value.affine.operator()
        applies = filtered(" ".join(self.statistics), replace(attributes, softcap=softcap))
        return Filter.read(attributes.grad_filter) if applies else EXACT

    def takes(self, group: Group, hoist: Hoist) -> bool:
        """Whether the rows of `group` can stand behind those of this bundle."""
        a, b = self.first, group
        one, two = a.value, b.value
        alike = all(
            (
                one.source[2:] == two.source[2:],
                (one.head.weight, one.head.transposed, one.head.bias)
                == (two.head.weight, two.head.transposed, two.head.bias),
                one.head.dtype == two.head.dtype,
                fake(one.head.input).dtype == fake(two.head.input).dtype,
                one.fake.requires_grad == two.fake.requires_grad,
                a.members[0].differentiated == b.members[0].differentiated,
                a.ignored == b.ignored,
                (a.target is None) == (b.target is None),
                a.wraps == b.wraps,
                a.statistics == b.statistics,
                a.column_weight is b.column_weight,
                not one.masks,
            )
        )
        if not alike:
            return False
        operands = [*two.head.operands(), *(s.node for s in two.affine.shifts), *(f.node for f in two.affine.factors)]
        if any(hoist.written(n, a.anchor, b.anchor) for n in (*b.reads(), *operands)):
            return False
        return all(hoist.can(n, a.anchor) for n in b.reads())


def bundles(found: list[Group], hoist: Hoist) -> list[Bundle]:
    made: list[Bundle] = []
    for group in sorted(found, key=lambda g: hoist.position(g.anchor)):
        bundle = next((b for b in made if b.takes(group, hoist)), None)
        if bundle is None:
            made.append(Bundle([group]))
        else:
            bundle.groups.append(group)
    return made


# ---- the operator


def emit(
    graph: Graph,
    bundle: Bundle,
    attributes: Attributes,
    hoist: Hoist,
    gradients: bool = False,
    diagnostics: bool = False,
) -> None:
    """Replaces the readings of one bundle. With `gradients`, of one `linear` loss, they are formed in the forward.

    diagnostics: whether a filtered backward leaves its numbers to the site's meter.
    """
    anchor = bundle.first.anchor
    for group in bundle.groups:
        for node in group.reads():
            hoist.move(node, anchor)
    builder = Builder(graph, anchor)
    call = builder.run(_Call, builder, bundle, attributes, hoist, diagnostics)
    if gradients:
        ((loss,),) = (group.members for group in bundle.groups)
        assert isinstance(loss, Loss)
        loss.node.replace_all_uses_with(builder.run(_with_gradients, builder, loss, call, hoist).node)
        return
    results = builder.run(call.statistics, builder)
    for i, group in enumerate(bundle.groups):
        parts = builder.run(call.part, builder, results, i)
        for reading in group.members:
            after = Builder(graph, reading.node)
            again = Statistics(after, reading, group, {name: after.proxy(p.node) for name, p in parts.items()}, hoist)
            made = after.run(_result, after, reading, again).node
            hoist.replaced[reading.node] = made
            reading.node.replace_all_uses_with(made)


class _Call:
    """The arguments of a bundle's operator, recorded: its operands, the (N,) target, the mask of active rows."""

    def __init__(self, builder: Builder, bundle: Bundle, attributes: Attributes, hoist: Hoist, diagnostics: bool):
        group, value = bundle.first, bundle.first.value
        head = value.head
        scale, softcap, _, _ = value.affine.operator()
        # The loss of logits that eager computed without a graph must have none either.
        detach = not value.fake.requires_grad and any(fake(n).requires_grad for n in value.operands())
        inputs = [operands.input_rows(builder, g.value, detach) for g in bundle.groups]
        self.sizes = [_rows(p) for p in inputs]
        self.operands: dict[str, Proxy] = {
            "input": builder.call(torch.cat, inputs) if len(inputs) > 1 else inputs[0],
            "weight": operands.weight(builder, value, detach),
        }
        bias = operands.biases(builder, value, detach)
        # The rows that count, and those that the operator computes.
        self.active: Proxy | None = None
        self.computed: Proxy | None = None
        self.target: Proxy | None = None
        self.targets: list[Proxy] = []
        if group.target is not None:
            self.targets = [
                operands.flat(builder, given)
                for g in bundle.groups
                if (given := g.given(hoist, group.anchor)) is not None
            ]
            self.target = builder.call(torch.cat, self.targets) if len(self.targets) > 1 else self.targets[0]
            if group.ignored is not None:
                self.active = self.target.ne(group.ignored)
                self.computed = computed(self.active, self.operands["input"], bias)
                self.operands["target"] = builder.call(torch.where, self.active, self.target, 0)
            elif group.wraps:
                wrapped = self.target + operands.vocab(builder, value)
                self.target = builder.call(torch.where, self.target < 0, wrapped, self.target)
            else:
                self.target = _without_ignored(builder, self.target, bundle)
            self.operands.setdefault("target", self.target)
        if bias is not None:
            self.operands["bias"] = bias
        if group.column_weight is not None:
            self.operands["column_weight"] = builder.proxy(group.column_weight).detach()
        self.names = bundle.statistics
        self.attributes = Attributes(
            scale,
            softcap,
            value.affine.form,
            head.dtype,
            attributes.grad_filter,
            attributes.workspace,
            attributes.version,
        )
        differentiated = group.members[0].differentiated
        if differentiated and sampled(" ".join(self.names), self.attributes):
            device = fake(head.input).device
            self.operands["seed"] = builder.call(torch.randint, SEEDS, (1,), device=device)
        applied = bundle.filter(attributes)
        if diagnostics and differentiated and applied.kind != "exact":
            slot = meter(bundle.name, str(applied), fake(head.input).device).slot()
            self.operands["diagnostics"] = builder.parameter("cce_inductor_diagnostics", slot)

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
        if self.active is not None:
            every["active"] = self.active
        if len(self.sizes) == 1:
            return every
        start: Any = 0
        for size in self.sizes[:i]:
            start = size + start
        return {name: p.narrow(0, start, self.sizes[i]) for name, p in every.items()}


def _rows(p: Proxy) -> Any:
    n = example(p.node).shape[0]
    return n if isinstance(n, int) else p.size(0)


def _without_ignored(builder: Builder, target: Proxy, bundle: Bundle) -> Proxy:
    """The target with a class that there is in rows that a loss ignores and another reading does not."""
    ignored = next((r.arguments.ignore_index for r in bundle.members if isinstance(r, Loss) and r.ignores), 0)
    if ignored >= 0 and not (isinstance(bundle.first.value.vocab, int) and ignored >= bundle.first.value.vocab):
        return target  # it is a class itself
    return builder.call(torch.where, target.ne(ignored), target, 0)


def _with_gradients(builder: Builder, loss: Loss, call: _Call, hoist: Hoist) -> Proxy:
    """Records the operator that forms the gradients as well, and the loss they are attached to."""
    weight = None if loss.weight is None else builder.proxy(loss.weight)
    known = tangents(call.target, call.active, weight, operands.vocab(builder, loss.value), loss.arguments)
    needs = [name for name, p in call.operands.items() if example(p.node).requires_grad]
    out = builder.call(
        WITH_GRADIENTS,
        list(known.values()),
        " ".join(known),
        list(call.operands.values()),
        " ".join(call.operands),
        call.computed,
        " ".join(call.names),
        " ".join(needs),
        *call.attributes.args(),
    )
    stats = {name: out[i] for i, name in enumerate(call.names)}
    parts = call.part(builder, stats, 0)
    result = _result(builder, loss, Statistics(builder, loss, Group([loss]), parts, hoist))
    gradients = [out[len(call.names) + i] for i in range(len(needs))]
    return builder.call(ATTACH, result, [call.operands[name] for name in needs], gradients)


# ---- what the program gets


class Statistics:
    """The statistics of a group as one reading sees them, (N,): of the logits with all that was done to them."""

    def __init__(self, builder: Builder, reading: Reading, group: Group, parts: dict[str, Proxy], hoist: Hoist) -> None:
        self.builder, self.reading, self.group = builder, reading, group
        self.value = reading.value
        self.parts = parts
        self.replaced = hoist.replaced
        # A loss reads differences only; what masked columns are filled with is as large as the logits are.
        cancels = isinstance(reading, Loss) and not self.value.masks
        self.constant = 0.0 if cancels else self.value.affine.constant
        self.detach = group.members[0].differentiated and not reading.differentiated

    def _part(self, name: str) -> Proxy:
        p = self.parts[name]
        return p.detach() if self.detach and name not in ("target", "active", "argmax", "lse_low") else p

    @property
    def vocab(self) -> Any:
        return operands.vocab(self.builder, self.value)

    @property
    def lse(self) -> Any:
        result = self._shifted(self._part("lse"))
        for mask in self.value.masks:
            if mask.fill != -torch.inf:
                count = operands.masked(self.builder, mask, self.value).sum()
                other = count.to(example(result.node).dtype).log() + mask.fill
                result = self.builder.call(torch.logaddexp, result, other)
        return result

    @property
    def lse_low(self) -> Any:
        """What lse lacks. Another log-sum-exp that is added to it is not known that well either."""
        added = any(mask.fill != -torch.inf for mask in self.value.masks)
        return 0.0 if added else self._part("lse_low")

    def log_p(self, z: Any, count: Any = 1) -> Any:
        """z less `count` times what log_softmax subtracts; z is one logit, or the sum of `count` of them."""
        return (z - normalizer(self.lse) * count) - self.lse_low * count

    @property
    def target_logit(self) -> Any:
        result = self._shifted(self._part("target_logit"))
        for mask in self.value.masks:
            held = operands.masked(self.builder, mask, self.value)[self.classes]
            result = self.builder.call(torch.where, held, mask.fill, result)
        return result

    @property
    def classes(self) -> Any:
        """The target, and some class in rows without one."""
        target, active = self.parts["target"], self.parts.get("active")
        return target if active is None else self.builder.call(torch.where, active, target, 0)

    @property
    def logit_sum(self) -> Any:
        total = self._part("logit_sum")
        total = total + self.vocab * self.constant if self.constant else total
        return self._with_terms(total, self.vocab)

    @property
    def maximum(self) -> Any:
        """The logit of the class that is argmax: a product of one row with one row of the weight."""
        value, detach = self.group.value, not self.reading.differentiated
        scale, softcap, _, _ = value.affine.operator()
        exact = torch.float64 if value.head.dtype == torch.float64 else torch.float32
        x = operands.input_rows(self.builder, value, detach).to(exact)
        classes = self._part("argmax")
        w = self.builder.call(F.embedding, classes, operands.weight(self.builder, value, detach)).to(exact)
        z = (x * w).sum(-1)
        bias = operands.biases(self.builder, value, detach)
        z = (z if bias is None else z + bias.to(exact)[classes]) * scale
        return self._shifted(softcapped(z, softcap, value.affine.form, exact) if softcap else z)

    @property
    def entropy(self) -> Any:
        # Of log_softmax: where that is NaN, so is the entropy, and its gradient in all classes.
        lse = self._part("lse")
        return self.builder.call(torch.where, lse.isfinite(), self._part("entropy"), normalizer(lse))

    @property
    def argmax(self) -> Any:
        return self._part("argmax")

    def _shifted(self, p: Any) -> Any:
        return self._with_terms(p + self.constant if self.constant else p)

    def _with_terms(self, p: Any, times: Any = 1) -> Any:
        """With what was added to the rows. A loss reads differences only."""
        for term in () if isinstance(self.reading, Loss) else self.value.terms:
            t = self.builder.proxy(self.replaced.get(term.node, term.node))
            for _, row_map in self.value.rows[term.start :]:
                t = row_map(t, 1)
            t = t.detach() if self.detach else t
            p = p + operands.flat_rows(t, self.value.fake.dim(), self.value.class_dim).squeeze(-1) * (
                term.factor * times
            )
        return p


def _result(builder: Builder, reading: Reading, statistics: Statistics) -> Proxy:
    """Records what the program gets for a reading, in eager's shape and dtype."""
    if isinstance(reading, Loss):
        result = _loss(builder, reading, statistics)
    else:
        result = reading.shape(in_rows(builder, reading.value, reading.flat(statistics)))
    dtype = fake(reading.node).dtype
    return result if dtype == result.node.meta["example_value"].dtype else result.to(dtype)


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
    target, active = statistics.parts["target"], statistics.parts.get("active")
    stats = {name: getattr(statistics, name) for name in loss.statistics}
    if active is None and loss.ignores and statistics.group.target is not None:
        # Others read every row: what is ignored was computed as well.
        active = operands.flat(builder, loss.target).ne(loss.arguments.ignore_index)  # type: ignore[arg-type]
    elif active is None:
        active = target.ge(0)
    result = cross_entropy(stats, target, active, weight, statistics.vocab, loss.arguments)
    lead = loss.value.lead_shape
    if loss.arguments.reduction == "none" and len(lead) != 1:
        result = in_rows(builder, loss.value, result)
    return result


# ---- what is left


def replace_metadata(graph: Graph, trace: Trace) -> None:
    """Lets reads of the logits' shape read it off the hidden states, so that they do not keep the logits alive."""
    for node, read, value in trace.metadata:
        builder = Builder(graph, node)
        node.replace_input_with(read, builder.run(_same_shape, builder, value).node)


def _same_shape(builder: Builder, value: Value) -> Proxy:
    """A tensor of the logits' shape that takes no memory of its own: one column of the hidden states, expanded."""
    h = operands.hidden(builder, value, detach=True).narrow(value.class_dim, 0, 1)
    h = h if value.fake.dtype == h.node.meta["example_value"].dtype else h.to(value.fake.dtype)
    sizes = [-1] * value.fake.dim()
    sizes[value.class_dim] = operands.vocab(builder, value)
    return h.expand(*sizes)


def erase_dead(graph: Graph, trace: Trace, findings: list[Node]) -> None:
    """Erases losses and logits without a use. Only nodes of the trace: they are known to be pure, or to edit logits."""
    dead = set(findings)
    for part in trace.with_parts:
        dead |= set(part.values)
        # Views of what was broadcast together with the logits.
        dead |= {n for n in descendants(part.first.node) if (op := vocabulary.read(n)) and op.name == "getitem"}
    for node in reversed(list(graph.nodes)):
        if node in dead and not node.users:
            graph.erase_node(node)
