"""Follows the logits from every head of a graph through every use.

A small abstract interpretation, node by node in the graph's order: each node made from logits has a `Value` (or
several: a product of two matrices can be read as logits in two ways), given by the rules that the table of spellings
names. It ends at reductions to row statistics, at graph outputs, and at reads of metadata; any other use is an escape,
recorded with its reason. An edit in place gives the node a new value from there on. What the graph computes is left as
it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..graph import memory, nodes
from ..graph.builder import Builder
from ..graph.facts import Fact
from ..graph.fakes import example, fake, is_symbolic, is_tensor, same
from ..graph.nodes import Op
from ..graph.refusal import Refusal, Refused
from ..graph.regions import descendants
from . import decompose, embeddings, inner, log_mixtures, margins, ranking, rsqrt_softcap, rules, two_heads
from .affine import Listed, Scale
from .at_target import is_pointwise
from .heads import subclassed
from .one_hot import marks_target, mixture, one_hot_target
from .operands import exact_dtype, symbolic
from .reasons import MARGIN, dense
from .reduction import Loss, Reduction
from .trace import Trace, refused_together
from .values import SQUARES, Mixture, SeveralHeads, Value
from .walk import Entry, Parts, Walk, distinct, each_way


class _OpenError(Exception):
    """Something was made of logits that no rule follows."""


class Interpreter(Walk):
    """A walk over a whole graph."""

    def __init__(self, graph: Graph):
        super().__init__(graph)
        # Whether something may tell a row's target from other classes.
        self.has_marks = any((op := nodes.read(n)) and op.name in _MARKS for n in graph.nodes)
        # How a use of logits is taken: the first of these that does has it.
        self.order = (
            self._part,
            self._metadata,
            self._number,
            self._margin,
            self._of_a_square,
            self._several,
            self._once,
            self._beside,
            self._first,
            self._decomposition,
            self._rules,
        )

    def run(self) -> None:
        for node in self.given:
            self.visit(node)
        for trace in self.traces.values():
            _drop_compared(trace)
            _check_independence(trace)
        self._check_combinations()

    def visit(self, node: Node) -> None:
        op = nodes.read(node)
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "_set_grad_enabled":
            self.records_gradients = node.args[0] is not False
        made_of = (self.values, self.parts, self.open, self.sums)
        touched = [n for n in node.all_input_nodes if any(n in nodes_ for nodes_ in made_of)]
        if touched:
            self._use(node, op, touched)
        if op is not None and op.is_head and node not in self.sums and all(d.node is not node for d in self.decomposed):
            self._head(node, op)

    def _head(self, node: Node, op: Op) -> None:
        try:
            self._check_gradient(node)
            # A product with one vector is a number for each row: no logits.
            values = [v for v in rules.HEADS[op.name](node, op.args) if not same(v.vocab, 1)]
        except Refused as refused:
            self.refused.setdefault(node, (Refusal(node, refused.reason, refused.cure), None))
            return
        if not values:
            return
        trace = self.traces[node] = Trace(values[0])
        self.put(node, trace, values)

    def _check_combinations(self) -> None:
        """Heads that were combined have a loss that reads them together, or escape; and then all of them do."""
        for trace in self.traces.values():
            if trace.first.members:
                for part in trace.with_parts[1:]:
                    part.wholes.append(trace)
        read = {id(trace) for trace in self.traces.values() if trace.reductions}
        for traces in (*(t.parts for t in self.traces.values()), *(d.traces for d in self.decomposed)):
            read |= {id(trace) for trace in traces}
        for node, trace in self.traces.items():
            only_leaves = trace.outputs and not any(part.reductions for part in trace.with_parts)
            if trace.parts and not trace.escapes and id(trace) not in read and not only_leaves:
                reason = "logits of several heads are combined, and no loss reads them"
                trace.escapes.append(Refusal(node, reason, "compute a loss of each"))
        every = {id(t): t for t in (*self.traces.values(), *(t for d in self.decomposed for t in d.traces))}
        bound = [[trace, *trace.parts] for trace in self.traces.values()] + [d.traces for d in self.decomposed]
        escaped = {i: t.escapes[0] for i, t in every.items() if t.escapes}
        for i, refusal in refused_together(escaped, bound).items():
            every[i].escapes = every[i].escapes or [refusal]

    def erase_unused(self) -> None:
        """Erases the nodes that were added and that nothing reads."""
        given = set(self.given)
        for node in reversed(list(self.graph.nodes)):
            if node not in given and not node.users and node.op != "output":
                self.graph.erase_node(node)

    # ---- one use

    def _use(self, node: Node, op: Op | None, touched: list[Node]) -> None:
        entries: list[Entry | Parts] = [e for n in touched if (e := self.values.get(n) or self.parts.get(n))]
        traces = distinct(
            [
                *(e.trace for e in entries),
                *(t for n in touched if n in self.open for t in self.open[n][1]),
                *(t for n in touched if self.sums.get(n) for t in self.sums[n].traces),
            ]
        )
        if node.op == "output":
            map_arg(node.args, lambda n: self._output(node, n))
            return
        try:
            if any(n in self.open for n in touched):
                if self._shape_of_open(node, op, touched):
                    return
                raise _OpenError
            if any(e.stale for e in entries):
                raise Refused("an alias of the logits was edited in place", "use the out-of-place form")
            self._step(node, op, touched)
        except (Refused, _OpenError) as refused:
            if self.has_marks and margins.begins(self, node, op, touched):
                return
            first = next((self.open[n][0] for n in touched if n in self.open), None)
            if isinstance(refused, Refused):
                # What reads the logits of a head that is split over ranks is not at fault.
                first = first or subclassed(traces[0].head) or Refusal(node, refused.reason, refused.cure)
            assert first is not None
            if self.has_marks and is_pointwise(node) and not memory.mutated(node):
                self.open[node] = first, traces
                for trace in traces:
                    trace.values[node] = []
                return
            self.refused[node] = first, traces[0]
            for trace in traces:
                trace.escapes.append(first)

    def _output(self, node: Node, n: Node) -> Node:
        """A node that leaves the graph."""
        for trace in self.open[n][1] if n in self.open else ():
            trace.escapes.append(self.open[n][0])
        if self.sums.get(n):
            refusal = Refusal(node, f"{self.sums[n].what} leave the graph", "return what the loss reads of them")
            for trace in self.sums[n].traces:
                trace.escapes.append(refusal)
            return n
        entry = self.values.get(n) or self.parts.get(n)
        if entry is None or any(n is value.node for value in entry.trace.outputs):
            return n
        escapes, outputs = entry.trace.escapes, entry.trace.outputs
        if isinstance(entry, Parts) or entry.stale:
            escapes.append(Refusal(node, "parts of the logits leave the graph", "return the logits"))
            return n
        value = entry.values[0]
        plain = value.picked is None and not value.terms and not self.is_edited(n)
        plain = plain and not (value.members and value.affine.of_rows)
        read = [other.node if isinstance(other, Scale) else other for other in value.extra]
        plain = plain and all(other in self.given for other in read)
        if isinstance(value.head, SeveralHeads) and value.head.stacked_at is not None:
            reason = "the logits of several heads leave the graph in one tensor"
            escapes.append(Refusal(n, reason, "return the logits of each head"))
        elif any(isinstance(p, Listed) and not isinstance(p.count, int) for p in value.columns):
            reason = "logits of a symbolic number of classes leave the graph"
            escapes.append(Refusal(n, reason, "return all of them"))
        elif plain and value.kind in ("logits", "log_softmax"):
            outputs.append(value)
        else:
            reason = f"the {value.kind.replace('_', '-')} leaves the graph"
            escapes.append(Refusal(n, reason, "return the logits instead"))
        return n

    def _step(self, node: Node, op: Op | None, touched: list[Node]) -> None:
        """What a node makes of the values it reads; Refused for an escape."""
        op = log_mixtures.with_numbers(op) if self._is_of_two(touched) else op
        into_logits = op is not None and op.inplace and op.has(Fact.IN_PLACE) and self._known(op.args["input"])
        if not into_logits and memory.mutated(node):
            what = f"{nodes.describe(node)} works in place on a tensor of the logits' graph"
            raise Refused(what, "use the out-of-place form")
        if any(follows(self, node, op, touched) for follows in _OF_SEVERAL):
            return
        known = op is not None and rules.follows(op)
        if op is None or not known or not any(take(node, op, touched) for take in self.order):
            raise dense(node, self.words(touched[0]))

    def _is_of_two(self, touched: list[Node]) -> bool:
        """Whether some of these are made of two heads, or may be compared with those of another one."""
        return any(n in self.sums or self._kind(n) in ("softmax", "log_softmax") for n in touched)

    def _known(self, node: Any) -> bool:
        return node in self.values or node in self.sums

    def _part(self, node: Node, op: Op, touched: list[Node]) -> bool:
        """A part that is taken out of a tuple."""
        source = touched[0]
        if source not in self.parts:
            return False
        if op.name != "getitem":
            raise dense(node, self.words(source))
        parts, index = self.parts[source], op.args["index"]
        if parts.makers[0][index] is None:
            return True
        made = each_way(lambda makers: makers[index](node), parts.makers)
        self._put(node, op, node, Entry(parts.trace, []), made)
        return True

    def _metadata(self, node: Node, op: Op, touched: list[Node]) -> bool:
        """A read of a shape or a dtype."""
        attribute = op.name == "getattr" and op.args["name"] in _ATTRIBUTES
        like_these = op.name == "cast" and op.args["input"] not in touched  # something else, in their dtype
        if not op.has(Fact.METADATA) and not attribute and not like_these:
            return False
        entry = self.values[touched[0]]
        if entry.values[0].members:
            raise Refused("the shape of several heads' logits in one tensor is read", "read that of each of them")
        entry.trace.metadata.append((node, touched[0], entry.values[0]))
        return True

    def _shape_of_open(self, node: Node, op: Op | None, touched: list[Node]) -> bool:
        """A read of the shape of what is made of logits and may become a margin: it is theirs."""
        (first, *others), value = touched, self.open[touched[0]][1][0].first if touched[0] in self.open else None
        if op is None or not op.has(Fact.METADATA) or others or value is None:
            return False
        own = fake(first)
        if own.shape != value.fake.shape or own.dtype != value.fake.dtype:
            return False
        self.open[first][1][0].metadata.append((node, first, value))
        return True

    def _number(self, node: Node, op: Op, touched: list[Node]) -> bool:
        """A factor that is a float of the graph: a tensor of one element instead."""
        factor = op.args.get("other") if op.args.get("input") is touched[0] else op.args.get("input")
        entry = self.values.get(touched[0])
        if entry is None or op.name not in ("mul", "div") or op.inplace or not is_symbolic(factor):
            return False
        value = entry.values[0]

        def record(builder: Builder) -> Any:
            z: Any = builder.proxy(touched[0])
            number = symbolic(builder, factor).to(exact_dtype(value))
            a, b = (z, number) if op.args["input"] is touched[0] else (number, z)
            if op.name == "mul":
                return a * b
            return builder.call(torch.div, a, b, rounding_mode=op.args["rounding_mode"])

        made = self.values.get(self.decompose(node, entry.trace, record))
        if made is not None:
            self.put(node, made.trace, [v.at(node) for v in made.values])
        return True

    def _margin(self, node: Node, op: Op, touched: list[Node]) -> bool:
        """Logits with another entry at the target."""
        return margins.follows(self, node, op, touched)

    def _of_a_square(self, node: Node, op: Op, touched: list[Node]) -> bool:
        """The square of logits may be used for a softcap, and for nothing else."""
        if not op.has(Fact.OF_SQUARES) and any(self._kind(n) in SQUARES for n in touched):
            raise Refused(f"{nodes.describe(node)} reads the square of the logits", rsqrt_softcap.CURE)
        return False

    def _kind(self, node: Node) -> str:
        return self.values[node].values[0].kind if node in self.values else ""

    def _several(self, node: Node, op: Op, touched: list[Node]) -> bool:
        """More than one tensor of logits."""
        rule = rules.SEVERAL.get(op.name)
        return rule is not None and rule(self, node, op, touched)

    def _once(self, node: Node, op: Op, touched: list[Node]) -> bool:
        """All rules from here on take one tensor of logits, in one place."""
        source = touched[0]
        if op.name == "where" and any(
            self._kind(n) == "logits" and marks_target(op.args["condition"], self.values[n].values[0]) for n in touched
        ):
            raise Refused(*MARGIN)
        if op.has(Fact.LOSS) and op.args["target"] in self.values:
            words = self.words(op.args["target"])
            raise Refused(f"{words} of a head are the target of a loss: they need every logit", "use class indices")
        if len(touched) > 1 or sum(arg is source for arg in op.args.values()) != 1:
            what = f"{nodes.describe(node)} takes the logits as a second argument, or twice"
            raise Refused(what, "pass something else there")
        return False

    def _beside(self, node: Node, op: Op, touched: list[Node]) -> bool:
        """Logits, and perhaps a statistic of theirs."""
        rule, entry = rules.BESIDE.get(op.name), self.values[touched[0]]
        if rule is None or op.inplace:
            return False
        known = {r.node: r for r in entry.trace.reductions}
        made = each_way(lambda value: rule(value, node, op.args, known), entry.values)
        if made[0] is None:
            return False
        self.put(node, entry.trace, [value for value in made if value is not None])
        return True

    def _first(self, node: Node, op: Op, touched: list[Node]) -> bool:
        """The logits come first, but for ops that do not mind."""
        if not op.has(Fact.ANY_PLACE) and op.args.get("input") is not touched[0]:
            raise Refused("the logits are the target or the weight of a loss", "use class indices as target")
        return False

    def _decomposition(self, node: Node, op: Op, touched: list[Node]) -> bool:
        """Mixtures of one-hot tensors, as nodes that read one target for each row."""
        entry = self.values[touched[0]]
        value = entry.values[0]
        if op.name == "cross_entropy" and (mixed := _probabilities(op, value)) is not None:
            self.decompose(node, entry.trace, lambda b: decompose.mixed_loss(b, value, node, op.args, mixed))
        elif op.name in ("sum", "mean") and isinstance(value.picked, Mixture):
            self.decompose(node, entry.trace, lambda b: decompose.mixed_sum(b, value, node, op.args, op.name == "mean"))
        else:
            return False
        return True

    def _rules(self, node: Node, op: Op, touched: list[Node]) -> bool:
        """What the rules of the op itself make of the logits."""
        entry = self.values[touched[0]]
        made = each_way(lambda value: rules.apply(op, value, node), entry.values)
        if made[0] is None:
            return False
        self._put(node, op, touched[0], entry, made)
        return True

    def _put(self, node: Node, op: Op, touched: Node, entry: Entry, made: list) -> None:
        """Notes what rules gave: of several ways to read the logits, those that agree with the first in what it is."""
        first = made[0]
        if isinstance(first, Reduction):
            self._reduced(node, entry, first)
        elif isinstance(first, list):
            self.put_parts(node, entry.trace, [makers for makers in made if isinstance(makers, list)])
        else:
            values = [value for value in made if isinstance(value, Value)]
            if entry.values and entry.values[0].gains_gradient(node):
                raise Refused("detached logits are combined with a tensor that requires grad", "detach them afterwards")
            if op.name == "detach" or not memory.storages(node) & memory.storages(touched):
                self._check_gradient(node, op.name == "detach")
            source = op.args["input"]
            # A cast to the logits' own dtype, or contiguous() of contiguous ones, gives the very tensor.
            if op.name in ("cast", "copy") and memory.storages(node) == memory.storages(source):
                self.originals[node] = source
            self.put_or_edit(node, op, entry, values)

    def _check_gradient(self, node: Node, detaches: bool = False) -> None:
        """Refuses what has no gradient where it is made, but for an edit in place, which has changed the example."""
        made = example(node)
        if isinstance(made, Tensor) and made.requires_grad and (detaches or not self.records_gradients):
            raise Refused("detached logits are edited with a tensor that requires grad", "detach them afterwards")

    def _reduced(self, node: Node, entry: Entry, reduction: Reduction) -> None:
        members = reduction.value.members
        if not members:
            entry.trace.reductions.append(reduction)
            return
        of = self.members[reduction.value.head.node]
        if any(e.stale or self.values[e.values[0].node] is not e for e in of):
            raise Refused("logits were edited after they had been put together", "edit them before")
        self.decompose(node, entry.trace, lambda b: decompose.of_members(b, reduction))


# What reads functions of one head or two, entry by entry, in this order.
_OF_SEVERAL = (log_mixtures.follows, inner.follows, embeddings.follows, two_heads.follows)
# Ops that logits with a margin at the target are made with.
_MARKS = ("one_hot", "scatter", "scatter_add", "setitem", "eq", "ne", "eye", "fill_diagonal")
_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout")


def _probabilities(op: Op, value: Value) -> Mixture | None:
    """What the target of a loss is a mixture of, if it is one that indices cannot stand for."""
    target = op.args["target"]
    if not is_tensor(target) or not fake(target).is_floating_point():
        return None
    # One plain one-hot tensor is as good as indices.
    plain = value.members or one_hot_target(target, value) is None or op.args["weight"] is not None
    return mixture(target, value) if plain else None


def _drop_compared(trace: Trace) -> None:
    """Leaves out the entries of targets that are for nothing but comparisons, which find them themselves."""
    comparisons = {n: v[0].comparison for n, v in trace.values.items() if v and v[0].comparison is not None}
    for r in list(trace.reductions):
        own = [n for n, made in comparisons.items() if made is not None and made.read is r.node]
        dropped = ranking.only_compared(r.node, own) if own else None
        if dropped is not None:
            trace.reductions.remove(r)
            trace.values.update((n, []) for n in dropped)


def _check_independence(trace: Trace) -> None:
    """An operand made from the logits themselves (z + z.mean(0), pseudo-labels) is no operand."""
    if not trace.reductions:
        return
    shapes = {node for part in trace.with_parts for node, _, _ in part.metadata}
    behind = {n for part in trace.with_parts for n in descendants(part.first.node, shapes)}
    for r in trace.reductions:
        others: list[Any] = [r.classes, *r.value.affine.nodes]
        labels = r.value.labels
        others += [] if labels is None else [labels.rows, labels.classes]
        others += [*(m.node for m in r.value.masks), *r.others, *(r.other.operands() if r.other else ())]
        others += [part.indices for part in r.value.columns if isinstance(part, Listed)]
        if isinstance(r, Loss):
            others.append(r.weight)
        if any(isinstance(n, Node) and n in behind for n in others):
            reason = "the target, a bias or a threshold is computed from the logits"
            trace.escapes.append(Refusal(r.node, reason, "compute it from the hidden states, or outside"))
