"""What came of following one head's logits: its reductions, outputs and escapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from ..graph.refusal import Refusal
from .reduction import Loss, Reduction
from .values import Head, SeveralHeads, Value

_SUMS = {"lse", "lse_rest"}


def _sums(reduction: Reduction) -> bool:
    """Whether a statistic is one of all classes. The largest probability, trained, is what a router gives."""
    routes = "argmax" in reduction.statistics and reduction.differentiated
    return bool(_SUMS & {*reduction.statistics}) and not routes


@dataclass
class Trace:
    """One head and every use of its logits. `values` are all nodes made from them, and what they are.

    parts: the traces of the heads that were combined in this one.
    """

    first: Value
    parts: list[Trace] = field(default_factory=list)
    values: dict[Node, list[Value]] = field(default_factory=dict)
    reductions: list[Reduction] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    metadata: list[tuple[Node, Node, Value]] = field(default_factory=list)  # the read, what it reads, its value
    escapes: list[Refusal] = field(default_factory=list)
    entries: set[Node] = field(default_factory=set)  # nodes that were added for another entry at the target
    wholes: list[Trace] = field(default_factory=list)  # tensors of several heads' logits that hold this one's

    @property
    def head(self) -> Head | SeveralHeads:
        """As its losses read it, or else its statistics."""
        read = self.sites or self.reductions
        return read[0].value.head if read else self.first.head

    @property
    def heads(self) -> list[Head | SeveralHeads]:
        """The heads as the program computes them: this one, or those that were combined in it."""
        return [head for part in self.parts for head in part.heads] or [self.first.head]

    @property
    def with_parts(self) -> list[Trace]:
        """This trace, and those of everything that was combined in it."""
        return [self, *(trace for part in self.parts for trace in part.with_parts)]

    @property
    def sites(self) -> list[Reduction]:
        """The reductions that are losses as the user wrote them, one of each.

        Calls of a loss function; or, where there are none, log-probabilities of a target; or a log-sum-exp.
        """
        reductions = [r for r in self.reductions if r.node not in self.entries]
        losses: list[Reduction] = [r for r in reductions if isinstance(r, Loss)]
        if losses or not any(map(_sums, reductions)):
            return losses
        picks: dict[Node, Reduction] = {}
        for r in sorted(reductions, key=lambda r: not _sums(r)):
            if r.classes is not None and r.statistics:
                picks.setdefault(r.classes, r)
        # A class that a log-sum-exp leaves out is none that a loss is about, if there are others.
        own = [r for r in picks.values() if "lse_rest" not in r.statistics]
        return own or list(picks.values()) or [next(r for r in reductions if _sums(r))]


@dataclass
class Decomposition:
    """A node that is replaced by `result` if all of `traces` are fused. added: what that needs, put into the graph."""

    node: Node
    result: Node
    traces: list[Trace]
    added: list[Node]


def refused_together(refused: Mapping[int, Refusal], bound: Iterable[Sequence[Trace]]) -> dict[int, Refusal]:
    """Heads that were combined are fused together, or none of them is: all that is refused, by the id of the trace.

    refused: what is by itself. bound: the traces that go together.
    """
    every, groups = dict(refused), [[id(trace) for trace in traces] for traces in bound]
    before = -1
    while len(every) != before:
        before = len(every)
        for group in groups:
            refusal = next((every[i] for i in group if i in every), None)
            if refusal is not None:
                every = dict.fromkeys(group, refusal) | every
    return every
