"""Follows the logits from every head of a graph through every use.

A small abstract interpretation, node by node in the graph's order: each node made from logits has a `Value` (or
several: a product of two matrices can be read as logits in two ways), given by the rules of `rows` and `pointwise`. It
ends at readings of row statistics, at graph outputs, and at reads of metadata; any other use is an escape, recorded
with its reason. An in-place edit gives the node a new value from there on. What the graph computes is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_arg

from . import ranking, roots, vocabulary
from .builder import Builder
from .combine import added, rows
from .heads import HEADS, subclassed
from .one_hot import Mixture, is_number, is_row_vector, is_tensor, marks_target, mixture, one_hot_target
from .pointwise import INPLACE, MARGIN, VALUES, over_classes, product
from .readings import LOSSES, SOFTMAX, Loss, Reading, maximum, reading
from .rows import PARTS, ROWS, join
from .values import Head, Listed, Refusal, Refused, Value, differentiates, example, fake, storages
from .vocabulary import Op
from .written_out import concatenated, mixed_loss, mixed_sum, of_members
from .written_out import stacked as several_heads


@dataclass
class Trace:
    """One head and every use of its logits. `values` are all nodes made from them, and what they are.

    parts: the traces of the heads that were combined in this one.
    """

    first: Value
    parts: list[Trace] = field(default_factory=list)
    values: dict[Node, list[Value]] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    metadata: list[tuple[Node, Node, Value]] = field(default_factory=list)  # the read, what it reads, its value
    escapes: list[Refusal] = field(default_factory=list)
    wholes: list[Trace] = field(default_factory=list)  # tensors of several heads' logits that hold this one's

    @property
    def head(self) -> Head:
        """As its losses read it, or else its statistics."""
        read = self.sites or self.readings
        return read[0].value.head if read else self.first.head

    @property
    def heads(self) -> list[Head]:
        """The heads as the program computes them: this one, or those that were combined in it."""
        return [head for part in self.parts for head in part.heads] or [self.first.head]

    @property
    def with_parts(self) -> list[Trace]:
        """This trace, and those of everything that was combined in it."""
        return [self, *(trace for part in self.parts for trace in part.with_parts)]

    @property
    def sites(self) -> list[Reading]:
        """The readings that are losses as the user wrote them, one of each.

        Calls of a loss function; or, where there are none, log-probabilities of a target; or a log-sum-exp.
        """
        losses: list[Reading] = [r for r in self.readings if isinstance(r, Loss)]
        if losses or not any("lse" in r.statistics for r in self.readings):
            return losses
        picks: dict[Node, Reading] = {}
        for r in self.readings:
            if r.target is not None and r.statistics:
                picks.setdefault(r.target, r)
        return list(picks.values()) or [next(r for r in self.readings if "lse" in r.statistics)]


@dataclass
class Finding:
    """A loss of the graph: the trace of its head, or why there is none."""

    loss: Node
    trace: Trace | None
    refusal: Refusal | None


def losses(graph: Graph) -> list[Node]:
    """The calls of a loss function over classes."""
    return [n for n in graph.nodes if (op := vocabulary.read(n)) is not None and op.name in LOSSES]


@dataclass
class WrittenOut:
    """A node that is replaced by `result` if all of `traces` are fused. added: what that needs, put into the graph."""

    node: Node
    result: Node
    traces: list[Trace]
    added: list[Node]


@dataclass
class _Entry:
    trace: Trace
    values: list[Value]
    stale: bool = False  # an alias was edited in place


@dataclass
class _Parts:
    """A tuple of values: for every alternative, the value of each part as a function of the node that takes it."""

    trace: Trace
    makers: list[list[Callable[[Node], Value] | None]]
    stale: bool = False
    readings: Callable[[Node, int], Reading] | None = None  # of a maximum and where it is


class Interpreter:
    """The state of a walk over a graph: what every node is that is made from logits.

    It adds nodes to the graph where heads are combined, which nothing reads: `erase_unused` takes them out again.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.traces: dict[Node, Trace] = {}
        self.values: dict[Node, _Entry] = {}
        self.parts: dict[Node, _Parts] = {}
        self.originals: dict[Node, Node] = {}  # of nodes that give the very tensor of another one
        self.lse: dict[Node, Reading] = {}  # log-sum-exps, by nodes that hold them in the logits' rank
        self.sums: dict[Node, Reading] = {}  # of their exponentials
        self.refused: dict[Node, tuple[Refusal, Trace | None]] = {}
        self.records_gradients = True
        self.given = list(graph.nodes)
        self.written_out: list[WrittenOut] = []
        self.members: dict[Node, list[_Entry]] = {}  # of values that are made of several heads', when they were

    def run(self) -> None:
        for node in self.given:
            self._visit(node)
        for trace in self.traces.values():
            _drop_compared(trace)
            _check_independence(trace)
        self._settle_parts()

    def _visit(self, node: Node) -> None:
        op = vocabulary.read(node)
        self._grad_mode(node)
        touched = [n for n in node.all_input_nodes if n in self.values or n in self.parts]
        if touched:
            self._use(node, op, touched)
        elif op is not None and node not in self.values:
            self._follow_lse(node, op)
        if op is not None and op.name in HEADS:
            self._head(node, op)

    def _settle_parts(self) -> None:
        """Heads that were combined are fused together, or none of them is."""
        for trace in self.traces.values():
            if trace.first.head.members:
                for part in trace.with_parts[1:]:
                    part.wholes.append(trace)
        read = {id(trace) for trace in self.traces.values() if trace.readings}
        for traces in (*(t.parts for t in self.traces.values()), *(w.traces for w in self.written_out)):
            read |= {id(trace) for trace in traces}
        for node, trace in self.traces.items():
            only_leaves = trace.outputs and not any(part.readings for part in trace.with_parts)
            if trace.parts and not trace.escapes and id(trace) not in read and not only_leaves:
                reason = "logits of several heads are combined, and no loss reads them"
                trace.escapes.append(Refusal(node, reason, "compute a loss of each"))
        bound = [[trace, *trace.parts] for trace in self.traces.values()] + [w.traces for w in self.written_out]
        settled = False
        while not settled:
            settled = True
            for traces in bound:
                refusal = next((trace.escapes[0] for trace in traces if trace.escapes), None)
                for trace in traces:
                    if refusal is not None and not trace.escapes:
                        trace.escapes.append(refusal)
                        settled = False

    def findings(self, statistics: bool = False) -> list[Finding]:
        """Every loss over classes in the graph, in order, each with its head's trace or the reason it has none.

        statistics: also a statistic of each head that has no loss.
        """
        order = {node: i for i, node in enumerate(self.given)}
        findings = []
        for trace in self.traces.values():
            sites = trace.sites or (trace.readings[:1] if statistics else [])
            # What is not written as a loss is one only if it can be served, or reads the entry of a target.
            if trace.escapes and not any(isinstance(s, Loss) or (s.target and s.differentiated) for s in sites):
                continue
            findings += [Finding(self.source(site.node), trace, None) for site in sites]
        for written in self.written_out:
            op = vocabulary.read(written.node)
            if op is not None and op.name in LOSSES:
                trace = next(t for t in written.traces if not t.first.head.members)
                findings.append(Finding(self.source(written.node), trace, None))
        findings = list({finding.loss: finding for finding in reversed(findings)}.values())
        found = {finding.loss for finding in findings}
        for node in losses(self.graph):
            if node not in found:
                findings.append(Finding(node, *self.why(node)))
        return sorted(findings, key=lambda finding: order[finding.loss])

    def source(self, node: Node) -> Node:
        """The node of the program that `node` is part of, where that was written out."""
        for written in reversed(self.written_out):
            if node in written.added:
                node = written.node
        return node

    def erase_unused(self) -> None:
        """Erases the nodes that were added and that nothing reads."""
        given = set(self.given)
        for node in reversed(list(self.graph.nodes)):
            if node not in given and not node.users and node.op != "output":
                self.graph.erase_node(node)

    def _grad_mode(self, node: Node) -> None:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "_set_grad_enabled":
            self.records_gradients = node.args[0] is not False

    def _head(self, node: Node, op: Op) -> None:
        try:
            values = HEADS[op.name](node, op.args)
        except Refused as refused:
            self.refused.setdefault(node, (Refusal(node, refused.reason, refused.cure), None))
            return
        trace = self.traces[node] = Trace(values[0])
        self._set(node, trace, values)

    def _set(self, node: Node, trace: Trace, values: list[Value]) -> None:
        self.values[node] = _Entry(trace, values)
        trace.values[node] = values

    # ---- one use

    def _use(self, node: Node, op: Op | None, touched: list[Node]) -> None:
        entries: list[_Entry | _Parts] = [self.values.get(n) or self.parts[n] for n in touched]
        traces = list({id(e.trace): e.trace for e in entries}.values())
        if node.op == "output":
            self._output(node)
            return
        try:
            if any(e.stale for e in entries):
                raise Refused("an alias of the logits was edited in place", "use the out-of-place form")
            self._step(node, op, touched)
        except Refused as refused:
            # What reads the logits of a head that is split over ranks is not at fault.
            refusal = subclassed(traces[0].head) or Refusal(node, refused.reason, refused.cure)
            self.refused[node] = refusal, traces[0]
            for trace in traces:
                trace.escapes.append(refusal)

    def _output(self, node: Node) -> None:
        seen: set[Node] = set()

        def leave(n: Node) -> Node:
            entry = self.values.get(n) or self.parts.get(n)
            if entry is None or n in seen:
                return n
            seen.add(n)
            if isinstance(entry, _Parts) or entry.stale:
                entry.trace.escapes.append(Refusal(node, "parts of the logits leave the graph", "return the logits"))
            elif entry.values[0].head.stacked_at is not None:
                reason = "the logits of several heads leave the graph in one tensor"
                entry.trace.escapes.append(Refusal(n, reason, "return the logits of each head"))
            elif entry.values[0].kind != "logits" or entry.values[0].picked is not None or entry.values[0].terms:
                reason = f"the {entry.values[0].kind.replace('_', '-')} leaves the graph"
                cure = "return the logits instead"
                plain = entry.values[0].picked is None and not entry.values[0].terms
                if entry.values[0].kind == "log_softmax" and plain:
                    entry.trace.outputs.append(entry.values[0])
                else:
                    entry.trace.escapes.append(Refusal(n, reason, cure))
            else:
                entry.trace.outputs.append(entry.values[0])
            return n

        map_arg(node.args, leave)

    def _step(self, node: Node, op: Op | None, touched: list[Node]) -> None:
        """What a node makes of the values it reads; Refused for an escape."""
        source = touched[0]
        inplace = op is not None and op.inplace and op.name in INPLACE and op.args["input"] in self.values
        if not inplace and vocabulary.mutated(node):
            raise Refused(
                f"{vocabulary.describe(node)} works in place on a tensor of the logits' graph",
                "use the out-of-place form",
            )
        if op is None:
            raise _dense(node, self._words(source))
        if source in self.parts:
            self._take(node, op, source)
            return
        shape_only = op.name in ("size", "metadata", "full", "zeros")
        if shape_only or (op.name == "getattr" and op.args["name"] in _METADATA):
            entry = self.values[source]
            if entry.values[0].head.members:
                raise Refused("the shape of several heads' logits in one tensor is read", "read that of each of them")
            entry.trace.metadata.append((node, source, entry.values[0]))
            return
        squares = any(n in self.values and self.values[n].values[0].kind in roots.SQUARES for n in touched)
        if squares and op.name not in roots.READS:
            raise Refused(f"{vocabulary.describe(node)} reads the square of the logits", roots.CURE)
        if op.name == "broadcast_tensors":
            self._broadcast(node, op, source)
            return
        if op.name in ("cat", "stack") and all(n in self.values for n in touched):
            self._join(node, op)
            return
        if op.name in ("add", "sub") and all(n in self.values for n in self._added(op)):
            self._add(node, op)
            return
        if op.name == "mul" and op.args["input"] is op.args["other"] and not op.inplace:
            own = self.values[source]
            self._set(node, own.trace, self._all(lambda v: roots.product_with_itself(v, node), own.values))
            return
        if squares and len(touched) == 2 and op.name == "div" and op.args["rounding_mode"] is None and not op.inplace:
            a, b = (self.values[op.args[name]] for name in ("input", "other"))
            pairs = list(zip(a.values, b.values, strict=False))
            self._set(node, a.trace, self._all(lambda pair: roots.softcap(pair[0], pair[1], node, True), pairs))
            return
        if len(touched) == 2 and op.name == "mul" and not op.inplace:
            a, b = (self.values[n] for n in touched)
            if a.trace is not b.trace:
                raise Refused(*_product_of_two(a.values[0], b.values[0]))
            pairs = list(zip(a.values, b.values, strict=False))
            self._set(node, a.trace, self._all(lambda pair: product(pair[0], pair[1], node), pairs))
            return
        read = [self.values[n].values[0] for n in touched if n in self.values]
        if op.name == "where" and any(v.kind == "logits" and marks_target(op.args["condition"], v) for v in read):
            raise Refused(*MARGIN)
        if op.name in LOSSES and op.args["target"] in self.values:
            words = self._words(op.args["target"])
            raise Refused(f"{words} of a head are the target of a loss: they need every logit", "use class indices")
        if len(touched) > 1 or sum(arg is source for arg in op.args.values()) != 1:
            raise Refused(
                f"{vocabulary.describe(node)} takes the logits as a second argument, or twice",
                "pass something else there",
            )
        entry = self.values[source]
        if op.name == "sub" and op.args["other"] in self.lse and not op.inplace:
            self._set(node, entry.trace, self._all(lambda v: self._minus_lse(v, node, op), entry.values))
            return
        if op.name == "div" and op.args["other"] in self.sums and not op.inplace:
            self._set(node, entry.trace, self._all(lambda v: self._over_sum(v, node, op), entry.values))
            return
        if op.name in _COMPARISONS and entry.values[0].head.members:
            raise Refused("logits of several heads are compared", "compare those of each head")
        if op.name in _COMPARISONS and not op.inplace:
            known = {r.node: r for r in entry.trace.readings}
            self._set(node, entry.trace, self._all(lambda v: ranking.compared(v, node, op, known), entry.values))
            return
        if op.name not in _SYMMETRIC and op.args.get("input") is not source:
            raise Refused("the logits are the target or the weight of a loss", "use class indices as target")
        if self._write_out(node, op, entry):
            return
        readings = self._all(lambda v: _read(v, node, op), entry.values)
        if readings[0] is not None:
            entry.trace.readings.append(readings[0])
            self._follow_lse(node, op, readings[0])
            return
        if op.name in ("max", "topk") and entry.values[0].head.members:
            raise Refused("the largest logits of several heads", "take those of each head")
        if op.name == "max":
            self._maximum(node, op, entry)
            return
        if op.name == "topk":
            self._largest(node, op, entry)
            return
        if op.name in PARTS:
            made = self._all(lambda v: PARTS[op.name](v, node, op.args), entry.values)
            self.parts[node] = _Parts(entry.trace, made)
            entry.trace.values[node] = []
            return
        rule = ROWS.get(op.name) or VALUES.get(op.name)
        if rule is None:
            raise _dense(node, self._words(source))
        try:
            values = self._all(lambda v: rule(v, node, op.args), entry.values)
        except Refused:
            # One way to read the logits may be refused as a statistic, and the other for being none.
            for value in entry.values:
                _read(value, node, op)
            raise
        if _gains_gradient(entry.values[0], node):
            raise Refused("detached logits are combined with a tensor that requires grad", "detach them afterwards")
        if inplace:
            self._edit(node, op, source, entry, values)
            return
        if op.name in ("cast", "copy") and storages(node) == storages(source):
            self.originals[node] = source
        self._set(node, entry.trace, values)

    def _words(self, node: Node) -> str:
        """What a person calls a node that is made from logits."""
        return self.values[node].values[0].words if node in self.values else "parts of the logits"

    @staticmethod
    def _all(rule: Callable[[Any], Any], values: list) -> list:
        """What a rule gives for every alternative that it takes; Refused if it takes none."""
        made, first = [], None
        for value in values:
            try:
                made.append(rule(value))
            except Refused as refused:
                first = first or refused
        if not made:
            assert first is not None
            raise first
        return made

    @staticmethod
    def _first(ways: list[Callable[[], Value]]) -> Value:
        """What the first of several ways gives that does not refuse; Refused by the first if all do."""
        first = None
        for way in ways:
            try:
                return way()
            except Refused as refused:
                first = first or refused
        assert first is not None
        raise first

    def _take(self, node: Node, op: Op, source: Node) -> None:
        parts, index = self.parts[source], op.args["index"]
        if parts.readings is not None:
            parts.trace.readings.append(parts.readings(node, index))
            return
        if parts.makers[0][index] is not None:
            self._set(node, parts.trace, self._all(lambda makers: makers[index](node), parts.makers))

    def _broadcast(self, node: Node, op: Op, source: Node) -> None:
        """Tensors expanded to the logits' shape: those that are not logits are followed no further."""
        entry = self.values[source]
        own = [i for i, n in enumerate(op.args["tensors"]) if n is source]
        if len(own) != 1 or example(node)[own[0]].shape != fake(source).shape:
            raise Refused("the logits are expanded to the shape of another tensor", "expand the other one only")

        def makers(value: Value) -> list[Callable[[Node], Value] | None]:
            return [value.at if i in own else None for i in range(len(example(node)))]

        made = [makers(value) for value in entry.values]
        self.parts[node] = _Parts(entry.trace, made)
        entry.trace.values[node] = []

    def _maximum(self, node: Node, op: Op, entry: _Entry) -> None:
        """The largest logit of each row, and its class."""
        dim, keepdim = op.args["dim"], bool(op.args["keepdim"])

        def checked(value: Value) -> Value:
            over_classes(value, "max", dim)
            return value

        values = self._all(checked, entry.values)

        def taken(part: Node, index: int) -> Reading:
            if index == 0:
                return maximum(values[0], part, keepdim)
            made = reading(values[0], part, Op("argmax", {"dim": dim, "keepdim": keepdim}))
            assert made is not None
            return made

        self.parts[node] = _Parts(entry.trace, [], readings=taken)
        entry.trace.values[node] = []

    def _largest(self, node: Node, op: Op, entry: _Entry) -> None:
        """The largest logits of each row, and their classes."""

        def taken(part: Node, index: int) -> Reading:
            (made, *_) = self._all(lambda v: ranking.largest(v, part, index, op.args), entry.values)
            return made

        self.parts[node] = _Parts(entry.trace, [], readings=taken)
        entry.trace.values[node] = []

    # ---- what is written out

    def _write_out(self, node: Node, op: Op, entry: _Entry) -> bool:
        """Whether a use was written out, as nodes that rules have a form for."""
        value = entry.values[0]
        traces = [entry.trace]
        if op.name == "cross_entropy" and (mixed := self._probabilities(op, value)) is not None:
            self._add_nodes(node, traces, lambda b: mixed_loss(b, value, node, op.args, mixed))
        elif op.name in ("sum", "mean") and isinstance(value.picked, Mixture):
            self._add_nodes(node, traces, lambda b: mixed_sum(b, value, node, op.args, op.name == "mean"))
        elif value.head.members:
            made = reading(value, node, op)
            if made is None:
                return False
            entries = self.members[value.head.node]
            if any(e.stale or self.values[e.values[0].node] is not e for e in entries):
                raise Refused("logits were edited after they had been put together", "edit them before")
            self._add_nodes(node, traces, lambda b: of_members(b, made))
        else:
            return False
        return True

    @staticmethod
    def _probabilities(op: Op, value: Value) -> Mixture | None:
        target = op.args["target"]
        if not is_tensor(target) or not fake(target).is_floating_point():
            return None
        # One plain one-hot tensor is as good as indices.
        plain = value.head.members or one_hot_target(target, value) is None or op.args["weight"] is not None
        return mixture(target, value) if plain else None

    def _add_nodes(self, node: Node, traces: list[Trace], record: Callable[[Builder], Proxy]) -> None:
        builder = Builder(self.graph, node)
        before = node.prev
        result = builder.run(record, builder)
        assert fake(result.node).shape == fake(node).shape, f"{node} was written out in another shape"
        added: list[Node] = []
        while before.next is not node:
            before = before.next
            added.append(before)
        every = _distinct([part for trace in traces for part in trace.with_parts])
        self.written_out.append(WrittenOut(node, result.node, every, added))
        for n in added:
            self._visit(n)
        for trace in self.traces.values():
            trace.escapes = [replace(e, node=node) if e.node in added else e for e in trace.escapes]

    # ---- several heads

    @staticmethod
    def _added(op: Op) -> list[Any]:
        return [op.args["input"], op.args["other"]]

    def _add(self, node: Node, op: Op) -> None:
        """A sum of logits: one head, or the same logits twice."""
        a, b = (self.values[n] for n in self._added(op))
        alpha = op.args["alpha"]
        if not is_number(alpha):
            raise Refused("logits are added with a computed factor", "multiply them by it")
        factor = -alpha if op.name == "sub" else alpha
        builder = Builder(self.graph, node)
        pairs = [(x, y) for x in a.values for y in b.values]
        values = self._all(lambda pair: added(builder, pair[0], pair[1], node, factor), pairs)
        entry = a
        if all(values[0].head is not v.head for v in a.values):
            trace = self.traces[node] = Trace(values[0], parts=_distinct([a.trace, b.trace]))
            entry = _Entry(trace, values)
        if op.inplace:
            self._edit(node, op, op.args["input"], a, values, entry.trace)
        else:
            self._set(node, entry.trace, values)

    def _join(self, node: Node, op: Op) -> None:
        tensors = op.args["tensors"]
        found = [self.values.get(n) for n in tensors] if isinstance(tensors, (list, tuple)) else [None]
        entries = [e for e in found if e is not None]
        if len(entries) != len(found):
            raise Refused("logits are put together with other tensors", "compute a loss of each")
        stacked, dim, traces = op.name == "stack", op.args["dim"], _distinct([e.trace for e in entries])

        def together(values: tuple[Value, ...]) -> Value:
            at = dim % (values[0].fake.dim() + stacked)
            if not stacked and at == values[0].class_dim:
                return concatenated(values, node, at)
            ways = [
                lambda: rows(Builder(self.graph, node), values, node, at, stacked),
                lambda: several_heads(values, node, at, stacked),
            ]
            if len(traces) == 1:
                ways.insert(0, lambda: join(values, node, at, stacked))
            return self._first(ways)

        values = self._all(together, list(zip(*(e.values for e in entries), strict=False)))
        trace = traces[0]
        if values[0].head.node is node:
            trace = self.traces[node] = Trace(values[0], parts=traces)
            self.members[node] = entries
        self._set(node, trace, values)

    def _edit(
        self, node: Node, op: Op, source: Node, entry: _Entry, values: list[Value], trace: Trace | None = None
    ) -> None:
        """`source` holds other values from here on, and so do its aliases, which nothing may read any more.

        trace: which those values belong to, if not to that of `entry`.
        """
        if entry.values[0].fake.requires_grad and not self.records_gradients:
            raise Refused("the logits are edited in place without recording gradients", "use the out-of-place form")
        memory = storages(source)
        selves = [n for n in self.values if self._itself(n) is self._itself(source)]
        for other, alias in self.values.items():
            if alias.trace is entry.trace and other not in selves:
                alias.stale |= bool(storages(other) & memory)
        for parts in self.parts.values():
            parts.stale |= parts.trace is entry.trace
        if isinstance(example(node), Tensor):
            selves.append(node)
            self.originals[node] = source
        else:
            entry.trace.values[node] = []
        for n in selves:
            self._set(n, trace or entry.trace, [v.at(n) for v in values])

    def _itself(self, node: Node) -> Node:
        """The first node that gave the same tensor: an edit in place returns it, as does a cast to its own dtype."""
        while node in self.originals:
            node = self.originals[node]
        return node

    # ---- z - z.logsumexp(-1, keepdim=True)

    def _follow_lse(self, node: Node, op: Op, made: Reading | None = None) -> None:
        """Remembers the log-sum-exps of rows, in the rank of the logits."""
        if made is not None:
            known = {"logsumexp": self.lse, "sum": self.sums}.get(op.name)
            if known is not None and made.statistics == SOFTMAX and made.value.factor == 1.0:
                known[node] = made
            return
        source = op.args.get("input")
        for known in (self.lse, self.sums):
            if source in known and op.name in ("unsqueeze", "getitem") and not op.inplace:
                known[node] = known[source]
        if source in self.sums and op.name == "log" and not op.inplace:
            self.lse[node] = self.sums[source]

    def _minus_lse(self, value: Value, node: Node, op: Op) -> Value:
        """The logits minus their log-sum-exp: log_softmax. Minus another one, they are shifted by row."""
        value.need("logits", "a log-sum-exp is subtracted from log-probabilities", "subtract it once")
        if _gains_gradient(value, node):
            raise Refused("a log-sum-exp that requires grad is subtracted from detached logits", "detach both, or none")
        if not self._is_own(value, self.lse[op.args["other"]], node, op) or op.args["alpha"] != 1:
            return VALUES["sub"](value, node, op.args)
        return value.then(node, lambda z, _: z - z.logsumexp(-1, keepdim=True), kind="log_softmax", terms=())

    def _over_sum(self, value: Value, node: Node, op: Op) -> Value:
        """The exponentials over their sum: softmax."""
        value.need("exp", "something is divided by a sum of exponentials", "use softmax")
        if not self._is_own(value, self.sums[op.args["other"]], node, op) or value.factor != 1.0:
            raise Refused("exponentials of logits are divided by the sum of others", "use softmax")
        return value.then(node, lambda z, _: z / z.sum(-1, keepdim=True), kind="softmax", terms=())

    @staticmethod
    def _is_own(value: Value, made: Reading, node: Node, op: Op) -> bool:
        """Whether a reading is of these very logits, and stands where it is broadcast along the classes."""
        whole = is_row_vector(op.args["other"], value) and fake(node).shape == value.fake.shape
        same_rows = (value.source, value.affine, value.terms) == (
            made.value.source,
            made.value.affine,
            made.value.terms,
        )
        return whole and same_rows and not value.masks and differentiates(node, value.node, op.args["other"])

    # ---- reasons

    def why(self, loss: Node) -> tuple[Trace | None, Refusal]:
        """Why a loss has no trace that serves it: the node at fault, on the way back from the loss to a head."""
        if loss in self.refused:
            refusal, trace = self.refused[loss]
            return trace, refusal
        op = vocabulary.read(loss)
        assert op is not None
        node = op.args["input"]
        while True:
            if not isinstance(node, Node):
                return None, Refusal(loss, "the logits are not a tensor of the graph", "make them one")
            if node in self.refused:
                refusal, trace = self.refused[node]
                return trace, refusal
            op_ = vocabulary.read(node)
            if op_ is not None and op_.name in ("cat", "stack") and op_.args["tensors"]:
                node = op_.args["tensors"][0]
                continue
            if op_ is None or not any(op_.name in rules for rules in (VALUES, ROWS, PARTS)):
                before = next((self.refused[n] for n in node.all_input_nodes if n in self.refused), None)
                return (before[1], before[0]) if before is not None else (None, _unknown(node))
            # 30.0 * z and bias + z have the logits second; the wider operand is the one to follow.
            given = [n for n in (op_.args.get("input"), op_.args.get("other")) if isinstance(n, Node)]
            if not given:
                return None, _unknown(node)
            node = max(given, key=lambda n: fake(n).dim() if is_tensor(n) else 0)


_METADATA = ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout")
_COMPARISONS = ("gt", "ge", "lt", "le")
_SYMMETRIC = ("mul", "add", "sub", "div", "where")


def _gains_gradient(value: Value, node: Node) -> bool:
    """Whether a node has a gradient and the logits in it have none, though their operands do."""
    made = example(node)
    if value.fake.requires_grad or not isinstance(made, Tensor) or not made.requires_grad:
        return False
    return any(fake(n).requires_grad for n in value.operands())


def _dense(node: Node, words: str) -> Refused:
    """What reads logits that no rule follows, and what to do instead."""
    what, op = vocabulary.describe(node), vocabulary.read(node)
    own = "write the loss with PyTorch's own operations"
    if vocabulary.is_autograd_function(node):
        return Refused(f"a torch.autograd.Function takes the {words}: what it reads of them is not known", own)
    if vocabulary.is_custom(node):
        return Refused(f"the operator {what} takes the {words}: what it reads of them is not known", own)
    if names := vocabulary.unknown_arguments(node):
        return Refused(f"{what} of the {words} with {names}, which is not known here", "leave the argument out")
    if vocabulary.reads_size(node):
        reason = "rows are chosen by a tensor, such as a mask, and only the data knows how many they are"
        return Refused(reason, "choose the rows of the hidden states, in front of the head")
    if op is not None and op.name in HEADS:
        reason = f"{what} multiplies the {words} of all classes with something else"
        return Refused(reason, "compute it from the hidden states, or outside the compiled region")
    if vocabulary.is_dense_loss(node):
        cure = "use a loss of log-sum-exps, entries of a target or sums of the logits"
        return Refused(f"{what} reads the {words} of every class", cure)
    cure = "compute it from the returned logits outside the compiled region, or from the hidden states"
    return Refused(f"{what} reads the {words} themselves", cure)


def _product_of_two(a: Value, b: Value) -> tuple[str, str]:
    """Why the entries of two products with a matrix are not multiplied, and what to do instead."""
    costs = next((v for v in (a, b) if v.kind == "logits" and not v.fake.requires_grad), None)
    if costs is not None and {a.kind, b.kind} != {"logits"}:
        words = (a if costs is b else b).words
        reason = f"the {words} are multiplied class by class with another product of two matrices, such as costs"
        return reason, "compute the expected cost from the hidden states, or outside the compiled region"
    reason = f"the {a.words} of a head are multiplied with the {b.words} of another: a loss over two heads"
    return reason, "compute a loss of each"


def _distinct(traces: list[Trace]) -> list[Trace]:
    return list({id(trace): trace for trace in traces}.values())


def _read(value: Value, node: Node, op: Op) -> Reading | None:
    return ranking.reading(value, node, op) or reading(value, node, op)


def _unknown(node: Node) -> Refusal:
    if node.op == "placeholder":
        return Refusal(
            node,
            "the logits come into the graph from outside",
            "compile the head and the loss in one torch.compile region",
        )
    cure = "apply it to the hidden states, or compute the loss outside the compiled region"
    return Refusal(node, f"{vocabulary.describe(node)} between the head and the loss has no fused form", cure)


def _drop_compared(trace: Trace) -> None:
    """Leaves out the entries of targets that are for nothing but comparisons, which find them themselves."""
    comparisons = {n: v[0].comparison for n, v in trace.values.items() if v and v[0].comparison is not None}
    for r in list(trace.readings):
        own = [n for n, made in comparisons.items() if made is not None and made.read is r.node]
        dropped = ranking.only_compared(r.node, own) if own else None
        if dropped is not None:
            trace.readings.remove(r)
            trace.values.update((n, []) for n in dropped)


def _check_independence(trace: Trace) -> None:
    """An operand made from the logits themselves (z + z.mean(0), pseudo-labels) is no operand."""
    if not trace.readings:
        return
    behind = {n for part in trace.with_parts for n in descendants(part.first.node)}
    for r in trace.readings:
        affine = r.value.affine
        others: list[Any] = [r.target, *(s.node for s in affine.shifts), *(f.node for f in affine.factors)]
        others += [*(m.node for m in r.value.masks), *r.others]
        others += [part.indices for part in r.value.columns if isinstance(part, Listed)]
        if isinstance(r, Loss):
            others.append(r.weight)
        if any(isinstance(n, Node) and n in behind for n in others):
            reason = "the target, a bias or a threshold is computed from the logits"
            trace.escapes.append(Refusal(r.node, reason, "compute it from the hidden states, or outside"))


def descendants(node: Node) -> Iterator[Node]:
    """Every node that depends on `node`."""
    seen, stack = set(), [node]
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                stack.append(user)
                yield user


def written_between(graph: Graph, operands: list[Node], start: Node, end: Node | None) -> Node | None:
    """The first node behind `start` and in front of `end` that writes into the memory of one of `operands`.

    The fused operator reads its operands later than the head did: a write in between would change what it sees.
    """
    memory = set().union(*(storages(n) for n in operands)) if operands else set()
    inside = False
    for node in graph.nodes:
        if node is end:
            return None
        if inside and any(target in operands or storages(target) & memory for target in vocabulary.mutated(node)):
            return node
        inside |= node is start
    return None
