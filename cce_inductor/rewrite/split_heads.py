"""Heads that are split over ranks by their classes: tensor parallelism with DTensors.

Each rank has some rows of the weight, hence some columns of the logits. Before the pass, :func:`plain` gives such a
head whole operands that are not there, so that everything else is followed as on one rank. Behind it, :func:`localise`
puts the operator on this rank's part of the weight, and one all-gather of its statistics, a few numbers a row, in their
place. The gradient of the hidden states is a partial sum then, which DTensor's autograd adds up as before.

A `redistribute` of the logits, to the same placement or to all ranks, and their `to_local` are left out: nothing is
left to be sent. Logits that leave the graph are deferred, and each rank keeps its own operands of them.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..graph import nodes
from ..graph.builder import Builder
from ..graph.fakes import example
from ..graph.regions import copy_graph
from ..ops.library import FORWARD
from ..ops.sharded import OPERANDS
from ..ops.sharded import STATISTICS as SUMS
from ..ranks import is_distributed
from .on_ranks import as_dtensor, largest_of, local_input, local_target, merged, shards_of
from .outputs import Split
from .result import Rewritten
from .sharded_heads import local_part

# What is put together of the ranks' statistics.
STATISTICS = SUMS | {"entropy", "argmax"}
_MOVES = ("redistribute", "to_local", "full_tensor", "prim_redistribute", "prim_to_local")


# --------------------------------------------------------------------------------------------------- in front of it


def whole(tensor: DTensor) -> Tensor:
    """Stands in a graph for a tensor that is split over ranks, in one piece. It is not there, and never computed."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).requires_grad_(tensor.requires_grad)


def everywhere(tensor: DTensor, weight: DTensor) -> Tensor:
    """Stands for a tensor that every rank has, as a plain one, in the computation of a head with this weight."""
    return whole(tensor)


def has_one(gm: GraphModule) -> bool:
    """Whether a graph has a head that is split over more than one rank."""
    weights = [_split_weight(node) for node in gm.graph.nodes] if is_distributed() else []
    return any(weight is not None and example(weight).device_mesh.size() > 1 for weight in weights)


class Whole(NamedTuple):
    """A graph whose split heads look like those of one rank.

    splits: by position among its outputs, what the program gets of logits that are split.
    """

    graph_module: GraphModule
    splits: dict[int, Split]


def plain(gm: GraphModule, defer_logits: bool) -> Whole | None:
    """A copy of a graph whose split head looks like that of one rank; None where there is none, or not only such.

    The head is the last layer that is split by its columns: there may be others in the model. defer_logits: whether
    logits may leave the graph: then they have to be deferred.
    """
    copy = copy_graph(gm)
    weights = [own for node in copy.graph.nodes if (own := _split_weight(node)) is not None]
    if not weights:
        return None
    made: dict[Node, Node] = {}
    weight = weights[-1]
    splits: dict[int, Split] | None = {}
    for node in list(copy.graph.nodes):
        if _split_weight(node) is weight:
            made[node] = _as_whole(node, weight)
        elif not any(n in made for n in node.all_input_nodes):
            continue
        elif node.op == "output":
            splits = _give_out(node, made, weight)
        elif not _follow(node, made, weight):
            return None
    if splits is None or (splits and not defer_logits):
        return None
    for node in reversed(list(made)):
        if not node.users:
            copy.graph.erase_node(node)
    copy.graph.lint()
    copy.recompile()
    return Whole(copy, splits)


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
    return isinstance(weight.shape[0], int) and shards_of(weight).all_have_some


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


def _give_out(output: Node, made: dict[Node, Node], weight: Node) -> dict[int, Split] | None:
    """What the graph returns: the results, as the program's DTensors, and logits in one piece, with their splits.

    None where logits are returned that can not be deferred: inside of a structure. They would be computed as before,
    beside the loss that then has no use for them: that would be more, not less.
    """
    builder = Builder(output.graph, output)
    classes, mesh = example(weight).shape[0], example(weight).device_mesh
    splits: dict[int, Split] = {}

    def is_whole(n: Any) -> bool:
        return isinstance(n, Node) and n in made and classes in example(made[n]).shape

    returned: Any = output.args[0]
    for i, n in enumerate(returned):
        if is_whole(n):
            value = example(n)
            splits[i] = Split(mesh, classes, value.placements if isinstance(value, DTensor) else None)
        elif not isinstance(n, Node) and any(is_whole(inner) for inner in pytree.tree_leaves(n)):
            return None

    def given(n: Node) -> Node:
        if n in made and isinstance(example(n), DTensor) and not is_whole(n):
            return builder.call(as_dtensor, made[n], weight).node
        return made.get(n, n)

    output.args = builder.run(lambda: map_arg(output.args, given))
    return splits


# ------------------------------------------------------------------------------------------------------- behind it


def localise(result: Rewritten, splits: dict[int, Split]) -> bool:
    """Puts this rank's part of each split head into its operator, and its statistics together with the others'.

    False, with the graph of no use any more, where something else reads what is not there. splits: of :class:`Whole`.
    """
    result.deferrals = [replace(deferral, split=splits.pop(deferral.position)) for deferral in result.deferrals]
    if splits:
        return False
    graph = result.graph_module.graph
    for node in list(graph.nodes):
        weight = _origin(node.args[0], node.args[1]) if node.target is FORWARD else None
        if weight is not None and not _localise(graph, node, weight):
            return False
    for node in list(graph.nodes):
        if node.target is whole and not node.users:
            graph.erase_node(node)
        elif node.target is whole and all(user.target == "amax" or user.op == "output" for user in node.users):
            # Which rows are computed, though they do not count, since a bias is not finite: each rank sees to its own.
            # What leaves the graph is an operand of deferred logits.
            node.target = local_part
            node.meta["example_value"] = Builder(graph, node).tracer._run(node)
        elif node.target is everywhere:
            node.target = local_input
            node.meta["example_value"] = Builder(graph, node).tracer._run(node)
    if any(node.target is whole for node in graph.nodes):
        return False
    graph.lint()
    result.graph_module.recompile()
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
    if "entropy" in wanted and "lse" not in wanted:
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
        largest = None
        if "argmax" in wanted:
            heads = [given[name] for name in ("input", "weight", "bias") if name in given]
            largest = builder.call(largest_of, parts[wanted.index("argmax")], rest[0] < 0, *heads).node
        return builder.call(merged, parts, wanted, inside, largest, weight).node

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
