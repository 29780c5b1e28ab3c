"""Losses that no rule has a name for: large heads behind which the logits stay dense, for the record of the reason.

Cross-entropies and log-probabilities of a target are found by the trace. A divergence, a hinge, a loss over K classes a
row or one written as an autograd function is not: to the trace it is an op that reads the logits. That it is a loss
shows behind it: what requires grad comes down from a number for each class to a few numbers for each row, and those
leave the graph. The entries of a hidden layer or of attention weights are multiplied with another matrix instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from .. import compat
from ..config import Settings
from ..graph import memory, nodes
from ..graph.facts import Fact
from ..graph.fakes import example, fake
from ..graph.refusal import Refusal
from .findings import Finding
from .heads import large
from .interpreter import Interpreter
from .reasons import unknown
from .trace import Trace
from .values import Head, SeveralHeads, Value

# Products with another matrix, besides those that may be heads.
_PRODUCTS = (
    "scaled_dot_product_attention",
    "flex_attention",
    "bilinear",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)

# In the `meta` of a placeholder: it is logits that another graph has deferred, computed on the way in.
GIVEN = "cce_inductor_given_logits"


def unnamed(interpreter: Interpreter, known: list[Finding], settings: Settings) -> list[Finding]:
    """The losses over a vocabulary that are none of `known`, one finding each, in the order of the heads."""
    named = {finding.loss for finding in known}
    recorded = _recorded(interpreter, known)
    found: dict[Node, Finding] = {}
    for node, trace in _heads(interpreter):
        ways = [value.head for value in _ways(trace)]
        if id(trace) in recorded or (ways and not any(_outnumbers(head, settings) for head in ways)):
            continue
        flow = _Flow(interpreter.given, node, _classes(trace, node, settings), named, settings.min_vocab)
        # What comes from outside is known by nothing but a softmax of its classes.
        may = flow.vocab in flow.over if node.op == "placeholder" and GIVEN not in node.meta else True
        candidates = flow.losses(trace) if may and _may_have_a_loss(flow, trace, settings) else []
        # Several heads may be read by one loss.
        if candidates and found.keys().isdisjoint(candidates):
            refusal = _refusal(interpreter, trace, node, flow, candidates[0])
            loss = refusal.node if refusal.node in candidates else candidates[0]
            found[loss] = Finding(loss, trace, refusal)
    return list(found.values())


def behind_break(ends: Any, interpreter: Interpreter, known: list[Finding], settings: Settings) -> Finding | None:
    """The loss that a graph breaks at, if what Dynamo says of its end names one, and that logits leave the graph for.

    CTC is one: it reads its lengths. The finding is at the logits; where the loss stands Dynamo says.
    """
    reason = str(getattr(ends, "reason", ""))
    name = next((name for name in nodes.DENSE_LOSSES if name in reason), None)
    recorded = _recorded(interpreter, known)
    for trace in interpreter.traces.values() if name is not None else ():
        leaves = [value for value in trace.outputs if value.fake.requires_grad and _outnumbers(value.head, settings)]
        if leaves and id(trace) not in recorded and not trace.escapes:
            why = f"{name} breaks the graph, and reads the {leaves[0].words} of every class behind it"
            cure = "use a loss of log-sum-exps, entries of a target or sums of the logits"
            return Finding(leaves[0].node, trace, Refusal(leaves[0].node, why, cure))
    return None


def _outnumbers(head: Head | SeveralHeads, settings: Settings) -> bool:
    """Whether a head has the classes of a vocabulary, where it is known that they are classes.

    A router has fewer of them than its width. By what symbolic sizes were at capture, without a guard.
    """
    classes = compat.size_hint(head.vocab)
    return classes >= settings.min_vocab and classes > compat.size_hint(head.width)


def _recorded(interpreter: Interpreter, known: list[Finding]) -> set[int]:
    """The heads that have a record already, of their own or together with others."""
    recorded = {id(finding.trace) for finding in known if finding.trace is not None}
    together = [{id(t) for t in (*trace.with_parts, *trace.wholes)} for trace in interpreter.traces.values()]
    together += [{id(t) for t in written.traces} for written in interpreter.decomposed]
    more = True
    while more:
        joined = [traces for traces in together if recorded & traces and not traces <= recorded]
        recorded = recorded.union(*joined)
        more = bool(joined)
    return recorded


def _heads(interpreter: Interpreter) -> Iterator[tuple[Node, Trace | None]]:
    """The heads of the program, also those that no rule could take, and logits that may come from another graph."""
    for node in interpreter.given:
        trace = interpreter.traces.get(node)
        refused = interpreter.refused.get(node)
        op = nodes.read(node)
        of_its_own = refused is not None and refused[1] is None and op is not None and op.is_head
        is_head = (
            trace is not None
            or of_its_own
            or GIVEN in node.meta
            or (node.op == "placeholder" and not interpreter.traces)
        )
        if is_head and isinstance(made := example(node), Tensor) and made.requires_grad and made.dim():
            yield node, trace


def _ways(trace: Trace | None) -> list[Value]:
    """The ways to read the product of a head, the likelier one first."""
    ways = trace.values.get(trace.first.node) or [trace.first] if trace is not None else []
    return [value for value in ways if not value.members]


def _classes(trace: Trace | None, node: Node, settings: Settings) -> int:
    """How many classes a head has, by what symbolic sizes were at capture: in the first way that has enough of them."""
    counts = [compat.size_hint(value.head.vocab) for value in _ways(trace)] or [compat.size_hint(fake(node).shape[-1])]
    return next((count for count in counts if count >= settings.min_vocab), counts[0])


def _may_have_a_loss(flow: _Flow, trace: Trace | None, settings: Settings) -> bool:
    """Whether what reads the logits, or else the sizes of their head, says that they are of a vocabulary."""
    heads = [value.head for value in _ways(trace)]
    if flow.vocab < settings.min_vocab:
        return False
    if flow.named:
        # Many rows of few classes look like few rows of many: only a softmax says which it is.
        heads = [head for head in heads if compat.size_hint(head.vocab) in flow.over] or heads[:1]
        return not heads or _outnumbers(heads[0], settings)
    return not flow.layered and any(large(head.vocab, head.width, settings) for head in heads[:1])


def _refusal(interpreter: Interpreter, trace: Trace | None, head: Node, flow: _Flow, loss: Node) -> Refusal:
    """Why a loss is not fused: what reads the logits on the way to it, or else anything that needs them."""
    if GIVEN in head.meta:
        reason = (
            "logits of another graph that come computed: they were read before, are edited here, or are no plain head's"
        )
        return Refusal(loss, reason, "compile the head and the loss in one torch.compile region")
    if trace is None and head.op == "placeholder":
        return replace(unknown(head), node=loss)
    if trace is None:
        return interpreter.refused[head][0]
    own = interpreter.refused.get(loss)
    if own is not None:
        return own[0]
    escape = next((e for e in trace.escapes if e.node in flow.used), next(iter(trace.escapes), None))
    if escape is not None:
        return escape
    names = ", ".join(dict.fromkeys(nodes.describe(reduction.node) for reduction in trace.reductions))
    reason = f"nothing but {names or 'a part of them'} reads the logits: no loss function and no log-sum-exp"
    return Refusal(loss, reason, "take the logits of a target from cce_inductor.linear_logsumexp")


@dataclass
class _Flow:
    """What becomes of the logits of one head, as far as gradients come back from there.

    wide: nodes that have a number for each class still. few: those that have a few for each row. sources: for each, the
    nodes of the two that it is made of. normalised: softmaxes, of `over` classes, and what is behind them. layered:
    whether logits are multiplied with another matrix; what is behind it is not followed. named: whether something over
    the classes is a loss, or the softmax of one. ends: what leaves the graph. used: what the loss that was found is
    made of.
    """

    given: Iterable[Node]
    head: Node
    vocab: int
    stop: set[Node]  # losses that have a record: what is behind them is theirs
    min_vocab: int
    wide: set[Node] = field(default_factory=set)
    few: set[Node] = field(default_factory=set)
    sources: dict[Node, list[Node]] = field(default_factory=dict)
    normalised: set[Node] = field(default_factory=set)
    over: set[int] = field(default_factory=set)
    layered: bool = False
    named: bool = False
    ends: list[Node] = field(default_factory=list)
    used: set[Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.rows = max(1, _size(self.head) // max(1, self.vocab))
        self.wide.add(self.head)
        reached = set(self.head.users)
        for node in self.given:
            if node in reached and node is not self.head and node not in self.stop:
                read = [n for n in node.all_input_nodes if n in self.wide or n in self.few]
                for made in self._use(node, read):
                    reached.update(made.users)

    def _use(self, node: Node, read: list[Node]) -> Sequence[Node]:
        """Notes what a node makes of what it reads; gives what is to be followed, itself or what it writes into."""
        if node.op == "output":
            map_arg(node.args, lambda n: self.ends.append(n) if n in read else None)
            return ()
        if not _has_gradient(node):
            return ()
        op = nodes.read(node)
        entries = [n for n in read if n in self.wide]
        if entries and self._is_layer(node, op, entries[0]):
            self.layered = True
            return ()
        if entries and self._normalises(op):
            self.normalised.add(node)
            self.named = True
        if self.normalised.intersection(read):
            self.normalised.add(node)
        if entries and (nodes.is_dense_loss(node) or self._computes_a_loss(node)):
            self.named = True
        kind = self.few if self._is_few(node, op, read) else self.wide
        followed = (node, *memory.mutated(node))
        for made in followed:
            self.sources.setdefault(made, []).extend(read)
            if made not in self.wide:
                kind.add(made)
        return followed

    def _is_few(self, node: Node, op: nodes.Op | None, read: list[Node]) -> bool:
        entries = [n for n in read if n in self.wide]
        if not entries:
            return _size(node) <= max(self.rows, *map(_size, read))
        picks = op is not None and op.has(Fact.PICKS) and 4 * _size(node) <= max(map(_size, entries))
        return picks or _size(node) <= self.rows

    def _normalises(self, op: nodes.Op | None) -> bool:
        """Whether an op is a softmax, or its logarithm or sum, over a vocabulary."""
        if op is None or not op.has(Fact.NORMALISES):
            return False
        dim, of = op.args.get("dim"), op.args["input"]
        dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        if not isinstance(dim, int) or not isinstance(example(of), Tensor):
            return False
        classes = compat.size_hint(fake(of).shape[dim])
        if classes >= self.min_vocab:
            self.over.add(classes)
        return classes >= self.min_vocab

    def _is_layer(self, node: Node, op: nodes.Op | None, entries: Node) -> bool:
        """Whether a product takes logits to another width. With a vector, or entry by entry, it is a sum over them."""
        if getattr(node.target, "__name__", "") in _PRODUCTS:
            return True
        if op is None or not op.is_head:
            return False
        others = [n for n in node.all_input_nodes if n is not entries and isinstance(example(n), Tensor)]
        sums = any(fake(n).dim() == 1 or _size(n) >= _size(entries) for n in others) or not others
        return op.name == "linear" or not sums or _size(node) > self.rows

    def _computes_a_loss(self, node: Node) -> bool:
        """Whether code of the user's own, which cannot be looked into, makes a few numbers for each row."""
        if not nodes.is_custom(node):
            return False
        return any(t.requires_grad and _numel(t) <= self.rows for t in _tensors(example(node)))

    # ---- what it comes to

    def _made_of(self, ends: list[Node]) -> set[Node]:
        """Those of the nodes that some of them are made of, themselves among them."""
        seen, stack = set(ends), list(ends)
        while stack:
            for source in self.sources.get(stack.pop(), ()):
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        return seen

    def losses(self, trace: Trace | None) -> list[Node]:
        """The nodes that may be called the loss, in order; none if there is no loss."""
        self.used = self._made_of([n for n in self.ends if n in self.few])
        candidates = []
        for node in self.given:
            entries = node in self.used and any(n in self.wide for n in self.sources.get(node, ()))
            if entries and (node in self.few or nodes.is_dense_loss(node) or self._computes_a_loss(node)):
                candidates.append(node)
        if candidates or trace is None or self.layered:
            return candidates
        # A softmax that leaves as it is. Logits and their log_softmax may leave, and are deferred.
        deferred = {value.node for value in trace.outputs}
        leaves = [n for n in self.ends if n in self.normalised and n in self.wide and n not in deferred]
        self.used = self._made_of(leaves)
        return leaves


def _tensors(made: Any) -> list[Tensor]:
    if isinstance(made, (tuple, list)):
        return [t for part in made for t in _tensors(part)]
    return [made] if isinstance(made, Tensor) else []


def _has_gradient(node: Node) -> bool:
    """Whether a gradient may come back from a node. One that gives nothing writes into something."""
    made = example(node)
    return made is None or any(t.requires_grad for t in _tensors(made))


def _numel(tensor: Tensor) -> int:
    """By what symbolic sizes were at capture."""
    count = 1
    for size in tensor.shape:
        count *= compat.size_hint(size)
    return count


def _size(node: Node) -> int:
    return max((_numel(t) for t in _tensors(example(node))), default=0)
