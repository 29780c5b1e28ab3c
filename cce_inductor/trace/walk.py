"""The state of a walk over a graph: what every node is that is made from logits."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor
from torch.fx import Graph, Node

from ..graph import memory
from ..graph.builder import Builder, Proxy
from ..graph.fakes import example, fake
from ..graph.nodes import Op
from ..graph.refusal import Refusal, Refused
from .reduction import Reduction
from .trace import Decomposition, Trace
from .values import Value

Taken = TypeVar("Taken")
Result = TypeVar("Result")


@dataclass
class Entry:
    """What one node is: a value for each way to read the product of its head."""

    trace: Trace
    values: list[Value]
    stale: bool = False  # an alias was edited in place


@dataclass
class Parts:
    """What a node is that is a tuple: for each way to read it, what its parts are at the nodes that take them out.

    None stands for a part that has nothing to do with logits.
    """

    trace: Trace
    makers: list[list[Callable[[Node], Value | Reduction] | None]]
    stale: bool = False


class Walk(abc.ABC):
    """What is known so far. Rules for several heads add nodes to the graph; `Interpreter.erase_unused` takes out those
    that nothing reads."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.given = list(graph.nodes)
        self.traces: dict[Node, Trace] = {}
        self.values: dict[Node, Entry] = {}
        self.parts: dict[Node, Parts] = {}
        self.originals: dict[Node, Node] = {}  # of nodes that give the very tensor of another one
        # What is made of logits in a way that no rule follows, entry by entry: with the reason.
        self.open: dict[Node, tuple[Refusal, list[Trace]]] = {}
        # What is made of two heads (two_heads.py, embeddings.py).
        self.sums: dict[Node, Any] = {}
        self.refused: dict[Node, tuple[Refusal, Trace | None]] = {}
        self.records_gradients = True
        self.decomposed: list[Decomposition] = []
        self.members: dict[Node, list[Entry]] = {}  # of values that are made of several heads', when they were

    @abc.abstractmethod
    def visit(self, node: Node) -> None:
        """Follows one more node."""

    def put(self, node: Node, trace: Trace, values: list[Value]) -> None:
        """Notes what a node is."""
        self.values[node] = Entry(trace, values)
        trace.values[node] = values

    def put_sum(self, node: Node, made: Any) -> None:
        """Notes what a node is that is made of two heads, or for them."""
        self.sums[node] = made
        for trace in made.traces:
            trace.values.setdefault(node, [])

    def put_parts(self, node: Node, trace: Trace, makers: list) -> None:
        """Notes what the parts of a node are."""
        self.parts[node] = Parts(trace, makers)
        trace.values[node] = []

    def words(self, node: Node) -> str:
        """What a person calls a node that is made from logits."""
        return self.values[node].values[0].words if node in self.values else "parts of the logits"

    def is_edited(self, node: Node) -> bool:
        """Whether a node is logits with another entry at the target, or without it."""
        values = self.values[node].values if node in self.values else []
        return any(value.edit is not None or value.without is not None for value in values)

    # ---- edits in place

    def edit(self, node: Node, source: Node, entry: Entry, values: list[Value], trace: Trace | None = None) -> None:
        """`source` holds other values from here on, and so do its aliases, which nothing may read any more.

        trace: which those values belong to, if not to that of `entry`.
        """
        if entry.values[0].fake.requires_grad and not self.records_gradients:
            raise Refused("the logits are edited in place without recording gradients", "use the out-of-place form")
        own = memory.storages(source)
        selves = [n for n in self.values if self._itself(n) is self._itself(source)]
        for other, alias in self.values.items():
            if alias.trace is entry.trace and other not in selves:
                alias.stale |= bool(memory.storages(other) & own)
        for parts in self.parts.values():
            parts.stale |= parts.trace is entry.trace
        if isinstance(example(node), Tensor):
            selves.append(node)
            self.originals[node] = source
        else:
            entry.trace.values[node] = []
        for n in selves:
            self.put(n, trace or entry.trace, [v.at(n) for v in values])

    def _itself(self, node: Node) -> Node:
        """The first node that gave the same tensor: an edit in place returns it, as does a cast to its own dtype."""
        while node in self.originals:
            node = self.originals[node]
        return node

    def put_or_edit(self, node: Node, op: Op, entry: Entry, values: list[Value], trace: Trace | None = None) -> None:
        """Notes what an op gives, or has written into its first argument."""
        if op.inplace:
            self.edit(node, op.args["input"], entry, values, trace)
        else:
            self.put(node, trace or entry.trace, values)

    # ---- nodes that are added

    def visit_added(self, before: Node, node: Node) -> list[Node]:
        """Follows the nodes that stand between two; gives them."""
        added: list[Node] = []
        while before.next is not node:
            before = before.next
            added.append(before)
        for n in added:
            self.visit(n)
        return added

    def decompose(self, node: Node, of: Trace | Iterable[Trace], record: Callable[[Builder], Proxy]) -> Node:
        """Puts nodes that compute the same as `node` in front of it, and follows them; gives the last.

        of: the heads that it reads.
        """
        builder = Builder(self.graph, node)
        before = node.prev
        result = builder.run(record, builder)
        assert fake(result.node).shape == fake(node).shape, f"{node} was decomposed into another shape"
        read = [of] if isinstance(of, Trace) else list(of)
        made = Decomposition(node, result.node, distinct(t for trace in read for t in trace.with_parts), [])
        self.decomposed.append(made)
        added = self.visit_added(before, node)
        made.added += added
        made.traces += [self.traces[n] for n in added if n in self.traces]
        for t in self.traces.values():
            t.escapes = [replace(e, node=node) if e.node in added else e for e in t.escapes]
        return result.node


def each_way(rule: Callable[[Taken], Result], ways: Iterable[Taken]) -> list[Result]:
    """What a rule gives for every way to read a product that it takes; Refused, by the first, if it takes none."""
    made, first = [], None
    for way in ways:
        try:
            made.append(rule(way))
        except Refused as refused:
            first = first or refused
    if not made:
        assert first is not None
        raise first
    return made


def first_way(ways: Iterable[Callable[[], Value]]) -> Value:
    """What the first of several readings gives that is not refused; Refused, by the first, if all are."""
    return each_way(lambda way: way(), ways)[0]


def distinct(traces: Iterable[Trace]) -> list[Trace]:
    """Each trace once."""
    return list({id(trace): trace for trace in traces}.values())
