"""Puts the fused operator and the arithmetic on its (N,) results in the place of a traced loss.

Losses that read the same rows of the same logits against the same target share one operator.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy

from ..ops.call import SEEDS, Attributes, filtered, sampled
from ..ops.diagnostics import OPERAND, meter
from ..ops.filters import Filter
from ..ops.library import FORWARD
from ..ops.losses import cross_entropy, tangents
from ..ops.with_gradients import ATTACH, WITH_GRADIENTS
from .builder import Builder
from .rules import Loss
from .trace import Trace
from .values import Head, Shift, Value, example, fake


def group_key(loss: Loss, value: Value) -> tuple:
    """Losses with equal keys can be served by one operator call."""
    return (
        value.head.node,
        tuple(node for node, _ in value.rows),
        value.class_dim,
        value.canonical(),
        loss.target,
        loss.arguments.ignore_index,
        loss.weight if loss.arguments.label_smoothing else None,
        fake(loss.node).requires_grad,
        value.fake.requires_grad,
    )


@dataclass
class Group:
    """Losses that share one operator call, in graph order, and the statistics they need together."""

    members: list[tuple[Loss, Value]]
    name: str = ""  # of the site: where the first loss stands

    @property
    def statistics(self) -> list[str]:
        names = {name for loss, _ in self.members for name in loss.arguments.statistics.split()}
        return [name for name in ("lse", "target_logit", "logit_sum") if name in names]

    def filter(self, attributes: Attributes) -> Filter:
        """What the gradient filter comes to for these statistics: "exact" where none applies to them."""
        applies = filtered(" ".join(self.statistics), attributes)
        return Filter.read(attributes.grad_filter) if applies else Filter()

    @property
    def column_weight(self) -> Node | None:
        """The class weights that `logit_sum` is taken with: the same for all members, by `group_key`."""
        return next((loss.weight for loss, _ in self.members if loss.arguments.label_smoothing), None)


def groups(trace: Trace, order: dict[Node, int]) -> list[Group]:
    found: dict[tuple, Group] = {}
    for loss, value in sorted(trace.losses, key=lambda pair: order[pair[0].node]):
        found.setdefault(group_key(loss, value), Group([])).members.append((loss, value))
    return list(found.values())


def width(builder: Builder, head: Head) -> Any:
    """D as a number, or as a proxy where it is symbolic."""
    d = head.width
    return d if isinstance(d, int) else builder.proxy(head.input).size(-1)


def vocab(builder: Builder, head: Head) -> Any:
    """V as a number, or as a proxy where it is symbolic."""
    v = head.vocab
    return v if isinstance(v, int) else builder.proxy(head.weight).size(-1 if head.transposed else 0)


def hidden(builder: Builder, value: Value, detach: bool) -> Proxy:
    """The hidden states with the value's row maps replayed: its shape, with D where the classes are."""
    h = builder.proxy(value.head.input)
    if detach:
        h = h.detach()
    for _, row_map in value.rows:
        h = row_map(h, width(builder, value.head))
    return h


def _flat_rows(h: Proxy, rank: int, class_dim: int) -> Proxy:
    """(N, D) from hidden states of `rank` dimensions with D at `class_dim`."""
    if class_dim != rank - 1:
        h = h.movedim(class_dim, -1)
    if rank == 1:
        return h.unsqueeze(0)
    return h.flatten(0, -2) if rank > 2 else h


def _bias(builder: Builder, shifts: tuple[Shift, ...], detach: bool) -> Proxy | None:
    """The sum of the biases inside the scale, (V,), in fp32 where there is anything to compute."""
    total = None
    for shift in shifts:
        b = builder.proxy(shift.node)
        b = b.detach() if detach else b
        b = b.reshape(-1) if fake(shift.node).dim() != 1 else b
        if shift.factor != 1.0 or len(shifts) > 1:
            exact = torch.float64 if fake(shift.node).dtype == torch.float64 else torch.float32
            b = b.to(exact) * shift.factor
        total = b if total is None else total + b
    return total


def emit(
    graph: Graph, group: Group, attributes: Attributes, gradients: bool = False, diagnostics: bool = False
) -> None:
    """Replaces the losses of one group. With `gradients`, of one `linear` loss, they are formed in the forward.

    diagnostics: whether a filtered backward leaves its numbers to the site's meter.
    """
    loss, value = group.members[0]
    builder = Builder(graph, loss.node)
    call = builder.run(_Call, builder, group, attributes)
    applied = group.filter(attributes)
    if diagnostics and applied.kind != "exact" and value.fake.requires_grad:
        slot = meter(group.name, str(applied), fake(value.head.weight).device).slot()
        call.operands[OPERAND] = builder.run(builder.parameter, f"cce_inductor_{OPERAND}", slot)
    if gradients:
        loss.node.replace_all_uses_with(builder.run(_with_gradients, builder, loss, value, call).node)
        return
    stats = builder.run(call.statistics, builder)
    for loss, value in group.members:
        after = Builder(graph, loss.node)
        again = [after.proxy(p.node) for p in (call.target, call.active)]
        shared = {name: after.proxy(p.node) for name, p in stats.items()}
        result = after.run(_loss, after, loss, value, shared, *again)
        loss.node.replace_all_uses_with(result.node)


class _Call:
    """The arguments of a group's operator, recorded: its operands, the (N,) target, the mask of active rows."""

    def __init__(self, builder: Builder, group: Group, attributes: Attributes):
        loss, value = group.members[0]
        head = value.head
        scale, softcap, shifts = value.canonical()
        # The loss of logits that eager computed without a graph must have none either.
        detach = not value.fake.requires_grad and any(fake(n).requires_grad for n in head.operands())
        weight = builder.proxy(head.weight)
        weight = weight.detach() if detach else weight
        rank = value.fake.dim()
        self.operands: dict[str, Proxy] = {
            "input": _flat_rows(hidden(builder, value, detach), rank, value.class_dim),
            "weight": weight.t() if head.transposed else weight,
        }
        target = builder.proxy(loss.target)
        self.operands["target"] = self.target = target.reshape(-1) if fake(loss.target).dim() != 1 else target
        bias = _bias(builder, shifts, detach)
        if bias is not None:
            self.operands["bias"] = bias
        if group.column_weight is not None:
            self.operands["column_weight"] = builder.proxy(group.column_weight).detach()
        self.active = self.target.ne(loss.arguments.ignore_index)
        self.names = group.statistics
        self.attributes = Attributes(
            scale, softcap, head.dtype, attributes.grad_filter, attributes.workspace, attributes.version
        )
        differentiated = fake(loss.node).requires_grad and value.fake.requires_grad
        if differentiated and sampled(" ".join(self.names), self.attributes):
            device = fake(head.input).device
            self.operands["seed"] = builder.call(torch.randint, SEEDS, (1,), device=device)

    def statistics(self, builder: Builder) -> dict[str, Proxy]:
        """Records the operator; gives its results by name."""
        given, names = list(self.operands.values()), " ".join(self.operands)
        rest = " ".join(self.names), False, *self.attributes.args()
        out = builder.call(FORWARD, given, names, self.active, *rest)
        return {name: out[i] for i, name in enumerate(self.names)}


def _with_gradients(builder: Builder, loss: Loss, value: Value, call: _Call) -> Proxy:
    """Records the operator that forms the gradients as well, and the loss they are attached to."""
    weight = None if loss.weight is None else builder.proxy(loss.weight)
    known = tangents(call.target, call.active, weight, vocab(builder, value.head), loss.arguments)
    needs = [name for name, p in call.operands.items() if example(p.node).requires_grad]
    out = builder.call(
        WITH_GRADIENTS,
        list(known.values()),
        " ".join(known),
        list(call.operands.values()),
        " ".join(call.operands),
        call.active,
        " ".join(call.names),
        " ".join(needs),
        *call.attributes.args(),
    )
    stats = {name: out[i] for i, name in enumerate(call.names)}
    result = _loss(builder, loss, value, stats, call.target, call.active)
    gradients = [out[len(call.names) + i] for i in range(len(needs))]
    return builder.call(ATTACH, result, [call.operands[name] for name in needs], gradients)


def _loss(builder: Builder, loss: Loss, value: Value, stats: dict[str, Proxy], target: Proxy, active: Proxy) -> Proxy:
    """Records the arithmetic of one loss, in eager's shape and dtype."""
    weight = None if loss.weight is None else builder.proxy(loss.weight)
    result = cross_entropy(stats, target, active, weight, vocab(builder, value.head), loss.arguments)
    if loss.arguments.reduction == "none" and fake(loss.target).dim() != 1:
        result = result.reshape_as(builder.proxy(loss.target))
    dtype = fake(loss.node).dtype
    return result if dtype == result.node.meta["example_value"].dtype else result.to(dtype)


def replace_metadata(graph: Graph, trace: Trace) -> None:
    """Lets reads of the logits' shape read it off the hidden states, so that they do not keep the logits alive."""
    for node, value in trace.metadata:
        builder = Builder(graph, node)
        node.replace_input_with(value.node, builder.run(_same_shape, builder, value).node)


def _same_shape(builder: Builder, value: Value) -> Proxy:
    """A tensor of the logits' shape that takes no memory of its own: one column of the hidden states, expanded."""
    h = hidden(builder, value, detach=True).narrow(value.class_dim, 0, 1)
    sizes = [-1] * value.fake.dim()
    sizes[value.class_dim] = vocab(builder, value.head)
    return h.expand(*sizes)


def erase_dead(graph: Graph, trace: Trace, findings: list[Node]) -> None:
    """Erases losses and logits without a use. Only nodes of the trace: they are known to be pure."""
    dead = set(findings) | set(trace.values)
    for node in reversed(list(graph.nodes)):
        if node in dead and not node.users:
            graph.erase_node(node)
