"""Which reductions share one call of the operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from torch.fx import Node

from ..filters import Filter
from ..graph.fakes import fake, same
from ..graph.hoist import Hoist
from ..graph.refusal import Refused
from ..graph.regions import descendants
from ..ops.call import Attributes, filtered
from ..ops.ranking import RESULTS
from ..ops.statistics import TABLE, in_order
from ..trace.ranking import Ranking
from ..trace.reduction import Loss, Reduction
from ..trace.trace import Trace
from ..trace.values import Value

EXACT = Filter()


Member = TypeVar("Member", bound=Reduction)
Item = TypeVar("Item")
Box = TypeVar("Box")


@dataclass
class Shared(Generic[Member]):
    """Reductions that share one operator call, in graph order."""

    members: list[Member]

    @property
    def value(self) -> Value:
        return self.members[0].value

    @property
    def anchor(self) -> Node:
        """The operator stands in front of this node."""
        return self.members[0].node


def _is_entry(reduction: Reduction) -> bool:
    """Whether it reads nothing but logits of classes that are given."""
    return reduction.statistics in (("target_logit",), ("entry_logits",))


def ratio(value: Value, of: Value) -> float | None:
    """What the logits of one value are a multiple of those of another by; None where they are not."""
    if value.source == of.source:
        return 1.0
    places = [(v.head, v.order, v.columns, v.masks) for v in (value, of)]
    capped = value.affine.capped or of.affine.capped
    return None if capped or places[0] != places[1] else value.affine.multiple(of.affine)


@dataclass
class Group(Shared[Reduction]):
    """Reductions that one call of the statistics' operator serves."""

    @property
    def value(self) -> Value:
        """The logits that the operator is called for: entries of others may be multiples of its."""
        return next((r.value for r in self.members if not _is_entry(r)), self.members[0].value)

    @property
    def other(self) -> Value | None:
        """The logits of the second head, if there is one."""
        return next((r.other for r in self.members if r.other is not None), None)

    @property
    def statistics(self) -> list[str]:
        names = {name for r in self.members for name in r.statistics if name != "target_logit" or not self.is_entry(r)}
        names |= {"entry_logits"} if self.entries else set()
        return as_results(names)

    @property
    def target(self) -> Node | None:
        return next((r.target for r in self.members if r.target is not None), None)

    def is_entry(self, reduction: Reduction) -> bool:
        """Whether the classes of a reduction are among `entries`: K for each row, or another target than the first."""
        return reduction.classes is not None and reduction.classes is not self.target

    @property
    def entries(self) -> list[Reduction]:
        """For each tensor of classes that stands among the entries, in order, the first reduction that reads it."""
        found: dict[tuple, Reduction] = {}
        for r in self.members:
            if self.is_entry(r):
                found.setdefault((r.classes, r.wraps), r)
        return list(found.values())

    def place(self, reduction: Reduction) -> tuple[int, int]:
        """Which of `entries` has the classes of a reduction, and how many there are."""
        keys = [(r.classes, r.wraps) for r in self.entries]
        return keys.index((reduction.classes, reduction.wraps)), len(keys)

    def is_as_wide(self, other: Group) -> bool:
        """Whether another group has as many entries for each row."""
        mine, others = (sum(r.width for r in group.entries) for group in (self, other))
        return same(mine, others)

    def given(self, hoist: Hoist, anchor: Node) -> Node | None:
        """The target in the form that takes least: as a vector where the program has made one before `anchor`."""
        for r in self.members:
            if self.is_entry(r):
                continue
            if r.given is not None and fake(r.given).dim() == 1 and hoist.before(r.given, anchor):
                return r.given
        return self.target

    @property
    def wraps(self) -> bool:
        """Whether a negative target counts from the end, for all of them that read one."""
        return all(r.wraps for r in self.members if r.target is not None and not self.is_entry(r))

    @property
    def ignored(self) -> int | None:
        """The class of rows that do not count, or None if some reduction counts every row."""
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
        given: list[Node] = []
        for value in (self.value,) if self.other is None else (self.value, self.other):
            logits = {value.head.node, *descendants(value.head.node)}
            given += [value.one.input, *(n for node, _ in value.rows for n in node.all_input_nodes if n not in logits)]
            given += [s.node for s in value.affine.scales if s.of_rows]
            given += [] if value.labels is None else [value.labels.rows, value.labels.classes]
        given += [r.classes for r in self.entries if r.classes is not None]
        return given if self.target is None else [*given, self.target]

    def takes(self, reduction: Reduction, hoist: Hoist, exact: bool) -> bool:
        """Whether one operator can serve `reduction` as well."""
        first = self.members[0]
        if reduction.value.source != self.value.source and not self._has_multiple(reduction):
            return False
        if not _same_other(self.other, reduction.other):
            return False
        summed = [{"lse", "entropy"} & {*names} for names in (self.statistics, reduction.statistics)]
        if (summed[0] and "lse_rest" in reduction.statistics) or (summed[1] and "lse_rest" in self.statistics):
            return False
        if reduction.differentiated != first.differentiated:
            # Statistics for logging come along, unless they keep a filter from being applied.
            if reduction.differentiated or ("entropy" in reduction.statistics and not exact):
                return False
        elif reduction.value.fake.requires_grad != first.value.fake.requires_grad:
            return False
        if reduction.classes is not None and reduction.classes is not self.target:
            if self.target is not None and "lse_rest" in (*self.statistics, *reduction.statistics):
                return False  # without the target: it has to be that one
            if not hoist.can(reduction.classes, self.anchor):
                return False
        if isinstance(reduction, Loss):
            for other in self.members:
                if isinstance(other, Loss) and (other.ignores, other.arguments.ignore_index) != (
                    reduction.ignores,
                    reduction.arguments.ignore_index,
                ):
                    return False
        sums = [r for r in (*self.members, reduction) if "logit_sum" in r.statistics]
        return len({r.column_weight if isinstance(r, Loss) else None for r in sums}) <= 1

    def _has_multiple(self, reduction: Reduction) -> bool:
        """Whether the entries that one of the two reads are multiples of the logits of the other."""
        pairs = [(reduction, self.value)] if _is_entry(reduction) else []
        pairs += [(r, reduction.value) for r in self.members] if all(map(_is_entry, self.members)) else []
        return bool(pairs) and all(ratio(r.value, value) is not None for r, value in pairs)


TABLE_ORDER = (
    *("lse", "lse_low", "lse_rest", "lse_rest_low"),
    *("target_logit", "entry_logits", "logit_sum", "entropy", "argmax"),
    *("other_lse", "other_lse_low", "expected_other"),
    *("cross_entropy", "other_cross_entropy", "divergence", "other_divergence"),
)
assert set(TABLE_ORDER) == set(TABLE)


def as_results(names: set[str]) -> list[str]:
    """Statistics in the order of the operator's results; divergences, which have names of their own, behind."""
    return in_order(names, TABLE_ORDER)


def _same_other(a: Value | None, b: Value | None) -> bool:
    """Whether one call can have both second heads."""
    if a is None or b is None:
        return True
    return (a.source, a.affine, a.fake.requires_grad) == (b.source, b.affine, b.fake.requires_grad)


def in_groups(trace: Trace, hoist: Hoist, exact: bool) -> list[Group]:
    """The reductions of a head in groups. `exact`: no filter is set that a statistic could keep from being applied."""

    def alone(reduction: Reduction) -> Group:
        for value in (reduction.value,) if reduction.other is None else (reduction.value, reduction.other):
            value.affine.operator()  # refused here, not where it is emitted
        return Group([reduction])

    found = [r for r in trace.reductions if not isinstance(r, Ranking)]
    return _boxed(
        sorted(found, key=lambda r: hoist.position(r.node)),
        alone,
        lambda group, reduction: group.takes(reduction, hoist, exact),
        lambda group, reduction: group.members.append(reduction),
    )


def _boxed(
    items: Iterable[Item],
    alone: Callable[[Item], Box],
    takes: Callable[[Box, Item], bool],
    add: Callable[[Box, Item], Any],
) -> list[Box]:
    """Each item in the first box that takes it, or alone in a new one."""
    boxes: list[Box] = []
    for item in items:
        box = next((b for b in boxes if takes(b, item)), None)
        if box is None:
            boxes.append(alone(item))
        else:
            add(box, item)
    return boxes


# ---- of order


@dataclass
class RankingGroup(Shared[Ranking]):
    """Reductions that one call of the rankings' operator serves."""

    @property
    def counted(self) -> Ranking | None:
        """The first reduction that counts."""
        return next((r for r in self.members if r.value.comparison), None)

    @property
    def results(self) -> list[str]:
        return [name for name in RESULTS if any(r.result == name for r in self.members)]

    @property
    def k(self) -> int:
        return max(r.k for r in self.members)

    def takes(self, reduction: Ranking, hoist: Hoist) -> bool:
        """Whether one operator can serve `reduction` as well: of the same rows, compared with the same numbers."""
        mine, other = ((r.value.source, r.value.affine.constant, r.dtype) for r in (self.members[0], reduction))
        if mine != other:
            return False
        if reduction.value.comparison is None:
            return True
        if self.counted is None:
            return reduction.operand is not None and hoist.can(reduction.operand, self.anchor)
        return (reduction.target, reduction.others) == (self.counted.target, self.counted.others)


def _ranking_alone(ranking: Ranking) -> RankingGroup:
    if ranking.value.affine.scales:
        raise Refused("the order is asked of logits that have a factor for each class or row", "rank them before it")
    return RankingGroup([ranking])


def in_ranking_groups(trace: Trace, hoist: Hoist) -> list[RankingGroup]:
    """The rankings of a head in groups: apart from its statistics, so that those are computed as without them."""
    found = [r for r in trace.reductions if isinstance(r, Ranking)]
    return _boxed(
        sorted(found, key=lambda r: hoist.position(r.node)),
        _ranking_alone,
        lambda group, ranking: group.takes(ranking, hoist),
        lambda group, ranking: group.members.append(ranking),
    )


# ---- rows behind each other


@dataclass
class Bundle:
    """Groups whose rows go through one operator call, one behind the other."""

    groups: list[Group]
    name: str = ""  # of the site: where its first loss stands

    @property
    def members(self) -> list[Reduction]:
        return [reduction for group in self.groups for reduction in group.members]

    @property
    def first(self) -> Group:
        return self.groups[0]

    @property
    def statistics(self) -> list[str]:
        return as_results({name for group in self.groups for name in group.statistics})

    def filter(self, attributes: Attributes) -> Filter:
        """What the gradient filter comes to for these logits and statistics: "exact" where none applies to them."""
        _, softcap, _, _ = self.first.value.affine.operator()
        if self.first.value.affine.scales:
            return EXACT
        applies = filtered(" ".join(self.statistics), replace(attributes, softcap=softcap))
        return Filter.read(attributes.grad_filter) if applies else EXACT

    def takes(self, group: Group, hoist: Hoist) -> bool:
        """Whether the rows of `group` can stand behind those of this bundle."""
        a, b = self.first, group
        if a.other is not None or b.other is not None:
            return False
        one, two = a.value, b.value
        alike = all(
            (
                one.source[2:] == two.source[2:],
                (one.one.weight, one.one.transposed, one.one.bias)
                == (two.one.weight, two.one.transposed, two.one.bias),
                one.head.dtype == two.head.dtype,
                fake(one.one.input).dtype == fake(two.one.input).dtype,
                one.fake.requires_grad == two.fake.requires_grad,
                a.members[0].differentiated == b.members[0].differentiated,
                a.ignored == b.ignored,
                (a.target is None) == (b.target is None),
                a.wraps == b.wraps,
                a.statistics == b.statistics,
                a.is_as_wide(b),
                a.column_weight is b.column_weight,
                not one.masks,
            )
        )
        if not alike:
            return False
        if any(hoist.written(n, a.anchor, b.anchor) for n in (*b.reads(), *two.operands())):
            return False
        return all(hoist.can(n, a.anchor) for n in b.reads())


def in_bundles(found: Iterable[Group], hoist: Hoist) -> list[Bundle]:
    """Groups in bundles."""
    return _boxed(
        sorted(found, key=lambda g: hoist.position(g.anchor)),
        lambda group: Bundle([group]),
        lambda bundle, group: bundle.takes(group, hoist),
        lambda bundle, group: bundle.groups.append(group),
    )
