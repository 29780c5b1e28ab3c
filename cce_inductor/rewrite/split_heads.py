"""Heads that are split over ranks by their classes: tensor parallelism with DTensors.

Each rank has some rows of the weight, hence some columns of the logits. Before the pass, :func:`plain` gives such a
head whole operands that are not there, so that everything else is followed as on one rank. Behind it, :func:`localise`
puts the operator on this rank's part of the weight, and one all-gather of its statistics, a few numbers a row, in their
place. The gradient of the hidden states is a partial sum then, which DTensor's autograd adds up as before.

A `redistribute` of the logits, to the same placement or to all ranks, and their `to_local` are left out: nothing is
left to be sent.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..graph import nodes
from ..graph.builder import Builder
from ..graph.fakes import example
from ..graph.regions import copy_graph
from ..ops import sharded
from ..ops.library import FORWARD
from ..ops.sharded import OPERANDS, STATISTICS

_MOVES = ("redistribute", "to_local", "full_tensor", "prim_redistribute", "prim_to_local")


# --------------------------------------------------------------------------------------------------- in front of it


def whole(tensor: DTensor) -> Tensor:
    """Stands in a graph for a tensor that is split over ranks, in one piece. It is not there, and never computed."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).requires_grad_(tensor.requires_grad)


def everywhere(tensor: DTensor, weight: DTensor) -> Tensor:
    """Stands for a tensor that every rank has, as a plain one, in the computation of a head with this weight."""
    return whole(tensor)


def is_possible() -> bool:
    """Whether there are ranks at all."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def plain(gm: GraphModule) -> GraphModule | None:
    """A copy of a graph whose split heads look like those of one rank; None where there are none, or not only such."""
    if not any(_split_weight(node) is not None for node in gm.graph.nodes):
        return None
    copy = copy_graph(gm)
    made: dict[Node, Node] = {}
    weight: Node | None = None
    for node in list(copy.graph.nodes):
        own = _split_weight(node)
        if own is not None and weight in (None, own):
            weight = own
            made[node] = _as_whole(node, own)
        elif weight is None or not any(n in made for n in node.all_input_nodes):
            continue
        elif not (_give_out if node.op == "output" else _follow)(node, made, weight):
            return None
    for node in reversed(list(made)):
        if not node.users:
            copy.graph.erase_node(node)
    copy.graph.lint()
    copy.recompile()
    return copy


def _split_weight(node: Node) -> Node | None:
    """The weight of a head that is split over all ranks of its mesh by its classes, if a node is one."""
    op = nodes.read(node) if node.op == "call_function" else None
    if op is None or op.name != "linear":
        return None
    given = [op.args[name] for name in ("input", "weight", "bias") if op.args[name] is not None]
    tensors: Any = [example(n) if isinstance(n, Node) else None for n in given]
    if not all(isinstance(t, DTensor) and t.device_mesh.ndim == 1 for t in tensors):
        return None
    x, w, *bias = tensors
    fits = x.placements == (Replicate(),) and all(t.placements == (Shard(0),) for t in (w, *bias))
    return op.args["weight"] if fits and w.dim() == 2 and _all_have_some(w) else None


def _all_have_some(weight: DTensor) -> bool:
    """Whether every rank has a part of a weight: of so few classes that one has none, nothing is gained."""
    ranks, classes = weight.device_mesh.size(), weight.shape[0]
    return isinstance(classes, int) and _start(classes, ranks, ranks - 1) < classes


def _start(classes: int, ranks: int, rank: int) -> int:
    """The first class of a rank, as DTensor splits them."""
    return min(classes, -(-classes // ranks) * rank)


def _as_whole(node: Node, weight: Node) -> Node:
    op = nodes.read(node)
    assert op is not None
    builder = Builder(node.graph, node)

    def linear() -> Node:
        x = builder.call(everywhere, op.args["input"], weight)
        bias = op.args["bias"]
        parts = [builder.call(whole, n) for n in (weight, bias) if n is not None]
        return builder.call(torch._C._nn.linear, x, *parts, *([None] if bias is None else [])).node

    return builder.run(linear)


def _follow(node: Node, made: dict[Node, Node], weight: Node) -> bool:
    """Records what a node computes of what is in one piece now; False where that is not known to be the same."""
    op = nodes.read(node)
    first = node.args[0] if node.args else None
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name in _MOVES and isinstance(first, Node) and first in made:
        target = example(node)
        moved = isinstance(target, DTensor) and any(isinstance(p, Partial) for p in target.placements)
        # What is still split, without being a DTensor, is this rank's part.
        part = name in ("to_local", "prim_to_local") and _is_split(first)
        made[node] = made[first]
        return not moved and not part
    if op is not None and op.inplace:
        return False
    builder = Builder(node.graph, node)

    def given(n: Node) -> Node:
        if n in made or not isinstance(example(n), DTensor):
            return made.get(n, n)
        if _is_split(n):
            raise LookupError
        return builder.call(everywhere, n, weight).node

    def again() -> Node:
        args, kwargs = map_arg((node.args, node.kwargs), given)
        return builder.again(node, args, kwargs).node

    try:
        made[node] = builder.run(again)
    except LookupError:
        return False
    return True


def _is_split(node: Any) -> bool:
    value = example(node)
    return isinstance(value, DTensor) and any(not isinstance(p, Replicate) for p in value.placements)


def _give_out(output: Node, made: dict[Node, Node], weight: Node) -> bool:
    """What the graph returns: the results, as the program's DTensors. False where logits are among them.

    They would be computed as before, beside the loss that then has no use for them: that would be more, not less.
    """
    builder = Builder(output.graph, output)
    classes = example(weight).shape[0]
    if any(classes in example(made[n]).shape for n in output.all_input_nodes if n in made):
        return False

    def given(n: Node) -> Node:
        if n in made and isinstance(example(n), DTensor):
            return builder.call(as_dtensor, made[n], weight).node
        return made.get(n, n)

    output.args = builder.run(lambda: map_arg(output.args, given))
    return True


def as_dtensor(tensor: Tensor, weight: DTensor) -> DTensor:
    """A tensor that all ranks have computed, as one of their mesh."""
    return DTensor.from_local(tensor, weight.device_mesh, (Replicate(),), run_check=False)


# ------------------------------------------------------------------------------------------------------- behind it


def localise(gm: GraphModule) -> bool:
    """Puts this rank's part of each split head into its operator, and its statistics together with the others'.

    False, with the graph of no use any more, where something else reads what is not there.
    """
    graph = gm.graph
    for node in list(graph.nodes):
        weight = _origin(node.args[0], node.args[1]) if node.target is FORWARD else None
        if weight is not None and not _localise(graph, node, weight):
            return False
    for node in list(graph.nodes):
        if node.target is whole and not node.users:
            graph.erase_node(node)
        elif node.target is whole and all(user.target == "amax" for user in node.users):
            # Which rows are computed, though they do not count, since a bias is not finite: each rank sees to its own.
            node.target = local_part
            node.meta["example_value"] = Builder(graph, node).tracer._run(node)
        elif node.target is everywhere:
            node.target = local_input
            node.meta["example_value"] = Builder(graph, node).tracer._run(node)
    if any(node.target is whole for node in graph.nodes):
        return False
    graph.lint()
    gm.recompile()
    return True


def _origin(operands: Any, names: Any) -> Node | None:
    """The split weight of an operator's head, if it has one."""
    given = dict(zip(names.split(), operands, strict=True))
    node = given["weight"]
    while node.op == "call_method" and node.target == "detach":
        node = node.args[0]
    return node.args[0] if node.target is whole else None


def _localise(graph: Graph, node: Node, weight: Node) -> bool:
    arguments: Any = node.args
    operands, names, row_mask, statistics, training, *rest = arguments
    wanted = statistics.split()
    if not {*names.split()} <= OPERANDS or not {*wanted} <= STATISTICS:
        return False
    given = dict(zip(names.split(), operands, strict=True))
    builder = Builder(graph, node)

    def local() -> Node:
        inside = None
        for name in ("weight", "bias"):
            if name in given:
                given[name] = _part_of(builder, given[name])
        if "target" in given:
            placed = builder.call(local_target, given["target"], weight)
            given["target"], inside = placed[0].node, placed[1].node
        out = builder.call(FORWARD, list(given.values()), names, row_mask, statistics, training, *rest)
        parts = [out[i].node for i in range(len(wanted))]
        return builder.call(merged, parts, wanted, inside, weight).node

    made = builder.run(local)
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_input_with(node, made)
    if node.users:
        return False
    graph.erase_node(node)
    return True


def _part_of(builder: Builder, node: Node) -> Node:
    if node.target is whole:
        return builder.call(local_part, node.args[0]).node
    return builder.proxy(_part_of(builder, node.args[0])).detach().node  # type: ignore[arg-type]


def local_part(tensor: DTensor) -> Tensor:
    """This rank's rows of a weight, or entries of a bias."""
    return tensor.to_local()


def local_input(tensor: DTensor, weight: DTensor) -> Tensor:
    """Hidden states, or targets, that all ranks have: of the former each rank computes a part of the gradient."""
    return tensor.to_local(grad_placements=(Partial(),))


def local_target(target: Tensor, weight: DTensor) -> tuple[Tensor, Tensor]:
    """(N,) classes among those of this rank, class 0 for the others; and which rows have theirs here."""
    mesh, count = weight.device_mesh, weight.to_local().shape[0]
    own = target - _start(weight.shape[0], mesh.size(), mesh.get_local_rank())
    inside = (own >= 0) & (own < count)
    return torch.where(inside, own, 0), inside


def merged(
    statistics: Sequence[Tensor], names: Sequence[str], inside: Tensor | None, weight: DTensor
) -> tuple[Tensor, ...]:
    """The statistics (N,) of all classes, from each rank's of its own; all ranks get the same bits."""
    given = dict(zip(names, statistics, strict=True))
    if inside is not None and "target_logit" in given:
        given["target_logit"] = torch.where(inside, given["target_logit"], 0.0)
    made = Merge.apply(weight.device_mesh, tuple(given), *given.values())
    return tuple(made)


class Merge(torch.autograd.Function):
    """One all-gather. The tangents are the same on all ranks, whose losses are one, so the backward sends nothing."""

    @staticmethod
    def forward(ctx: Any, mesh: Any, names: tuple[str, ...], *local: Tensor) -> tuple[Tensor, ...]:
        """(N,) statistics of some classes to those of all."""
        ctx.names = names
        rows = torch.stack([t.to(torch.float32) if t.dtype != torch.float64 else t for t in local])
        gathered = funcol.all_gather_tensor(rows.contiguous(), 0, mesh)
        if isinstance(gathered, funcol.AsyncCollectiveTensor):
            gathered = gathered.wait()
        parts = dict(zip(names, gathered.view(mesh.size(), *rows.shape).unbind(1), strict=True))
        own = dict(zip(names, local, strict=True))
        made = sharded.merged(parts)
        if "lse" in made:
            # A rank all of whose logits are -inf has no share.
            lse = sharded.log_sum_exp(parts)
            share = torch.exp(own["lse"].double() - torch.where(lse == -torch.inf, 0.0, lse))
            ctx.save_for_backward(share.to(own["lse"].dtype))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[made[n] for n in ("lse_low",) if n in made])
        return tuple(made[name].to(own[name].dtype) for name in names)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """The gradients of this rank's statistics."""
        found = []
        for name, grad in zip(ctx.names, grads, strict=True):
            if name == "lse" and grad is not None:
                (share,) = ctx.saved_tensors
                grad = grad * share
            found.append(None if name == "lse_low" else grad)
        return None, None, *found
