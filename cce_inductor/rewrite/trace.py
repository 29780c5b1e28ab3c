"""Follows the logits from a head through every use.

A small abstract interpretation: each node made from the logits has a `Value`, given by the rules of `rules`. The
trace ends at losses over row statistics, at graph outputs, and at reads of metadata; any other use is an escape,
recorded with its reason. It only reads the graph.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import Graph, Node
from torch.multiprocessing.reductions import StorageWeakRef

from . import rules, vocabulary
from .rules import Loss
from .values import Head, Refusal, Refused, Value, example, fake


@dataclass
class Trace:
    """One head and every use of its logits."""

    head: Head
    values: dict[Node, Value] = field(default_factory=dict)
    losses: list[tuple[Loss, Value]] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    metadata: list[tuple[Node, Value]] = field(default_factory=list)
    escapes: list[Refusal] = field(default_factory=list)


@dataclass
class Finding:
    """A loss node of the graph: the trace of its head, or why there is none."""

    loss: Node
    trace: Trace | None
    refusal: Refusal | None


def find(graph: Graph) -> list[Finding]:
    """Every loss over classes in the graph, in order, each with its head's trace or the reason it has none."""
    traces: dict[Node, Trace] = {}
    findings = []
    for node in graph.nodes:
        op = vocabulary.read(node)
        if op is None or op.name not in rules.LOSSES:
            continue
        try:
            loss = rules.LOSSES[op.name](node, op.args)
            head = _head_of(loss)
        except Refused as refused:
            findings.append(Finding(node, None, Refusal(node, refused.reason, refused.cure)))
            continue
        except _Blocked as blocked:
            findings.append(Finding(node, None, blocked.refusal))
            continue
        if head.node not in traces:
            traces[head.node] = trace(head)
        findings.append(Finding(node, traces[head.node], None))
    return findings


class _Blocked(Exception):
    def __init__(self, refusal: Refusal):
        self.refusal = refusal


def _head_of(loss: Loss) -> Head:
    """Walks from a loss back to the head whose logits it reads, through ops that have a rule."""
    node = loss.input
    while True:
        op = vocabulary.read(node)
        if op is not None and op.name in rules.HEADS:
            try:
                return rules.HEADS[op.name](node, op.args)
            except Refused as refused:
                raise _Blocked(Refusal(node, refused.reason, refused.cure)) from None
        if op is None or op.name not in rules.VALUES:
            raise _Blocked(_unknown(node))
        inputs = [op.args.get("input"), op.args.get("other")]
        # 30.0 * z and bias + z have the logits second; the wider operand is the one to follow.
        tensors = [n for n in inputs if isinstance(n, Node) and isinstance(example(n), Tensor)]
        if not tensors:
            raise _Blocked(_unknown(node))
        node = max(tensors, key=lambda n: fake(n).dim())


def _unknown(node: Node) -> Refusal:
    if node.op == "placeholder":
        return Refusal(
            node,
            "the logits come into the graph from outside",
            "compile the head and the loss in one torch.compile region",
        )
    cure = "apply it to the hidden states, or compute the loss outside the compiled region"
    return Refusal(node, f"{vocabulary.describe(node)} between the head and the loss has no fused form", cure)


def trace(head: Head) -> Trace:
    """Follows every use of a head's logits."""
    result = Trace(head)
    first = Value(head, head.node, fake(head.node).dim() - 1)
    if head.bias is not None:
        first = first.at(head.node, shifts=(rules.Shift(head.bias, 1.0),))
    result.values[head.node] = first
    pending = [first]
    while pending:
        value = pending.pop()
        for user in value.node.users:
            try:
                made = _use(result, value, user)
            except Refused as refused:
                result.escapes.append(Refusal(user, refused.reason, refused.cure))
                continue
            if made is not None and user not in result.values:
                result.values[user] = made
                pending.append(made)
    _check_independence(result)
    return result


def _use(result: Trace, value: Value, user: Node) -> Value | None:
    """What one use of `value` gives: another value, or None where the trace ends; Refused for an escape."""
    if user.op == "output":
        result.outputs.append(value)
        return None
    if vocabulary.mutated(user) is not None:
        raise Refused(
            f"{vocabulary.describe(user)} works in place on a tensor of the logits' graph",
            "use the out-of-place form",
        )
    op = vocabulary.read(user)
    if op is None:
        raise Refused(
            f"{vocabulary.describe(user)} reads the logits themselves",
            "compute it from the returned logits outside the compiled region, or from the hidden states",
        )
    if op.name in ("size", "metadata"):
        result.metadata.append((user, value))
        return None
    if op.name in rules.LOSSES:
        if op.args.get("input") is not value.node or _reads(op.args, value.node) != 1:
            raise Refused("the logits are the target or the weight of a loss", "use class indices as target")
        loss = rules.LOSSES[op.name](user, op.args)
        rules.check_loss(loss, value)
        result.losses.append((loss, value))
        return None
    if op.name not in rules.VALUES:
        raise Refused(f"{vocabulary.describe(user)} reads the logits themselves", "use the hidden states instead")
    if _reads(op.args, value.node) != 1:
        raise Refused(
            f"{vocabulary.describe(user)} takes the logits as a second argument, or twice", "pass something else there"
        )
    return rules.VALUES[op.name](value, user, op.args)


def _reads(args: dict, node: Node) -> int:
    return sum(arg is node for arg in args.values())


def _check_independence(result: Trace) -> None:
    """An operand made from the logits themselves (z + z.mean(0), pseudo-labels) is no operand."""
    behind = set(descendants(result.head.node))
    for loss, value in result.losses:
        others = [loss.target, loss.weight, *(s.node for s in value.shifts)]
        if any(isinstance(n, Node) and n in behind for n in others):
            reason = "the target or a bias is computed from the logits"
            result.escapes.append(Refusal(loss.node, reason, "compute it from the hidden states, or outside"))


def descendants(node: Node) -> Iterator[Node]:
    """Every node that depends on `node`."""
    seen, stack = set(), [node]
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                stack.append(user)
                yield user


def storages(node: Node) -> set[StorageWeakRef]:
    value = example(node)
    return {StorageWeakRef(value.untyped_storage())} if isinstance(value, Tensor) else set()


def written_between(graph: Graph, operands: list[Node], start: Node, end: Node | None) -> Node | None:
    """The first node behind `start` and in front of `end` that writes into the memory of one of `operands`.

    The fused operator reads its operands later than the head did: a write in between would change what it sees.
    """
    memory = set().union(*(storages(n) for n in operands)) if operands else set()
    inside = False
    for node in graph.nodes:
        if node is end:
            return None
        if inside:
            target = vocabulary.mutated(node)
            if target is not None and (target in operands or storages(target) & memory):
                return node
        inside |= node is start
    return None
