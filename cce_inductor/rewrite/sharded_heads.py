"""Heads whose weight a graph puts together of the ranks' shards, for tokens of each rank's own, as SimpleFSDP does.

In the graph that is a `redistribute` to all ranks and a `to_local` whose gradient is a sum or mean over ranks, or
:func:`~cce_inductor.ops.sharded.gathered`. The pass follows such a head as one with a plain weight. Behind it,
:func:`localise` puts this rank's shard into the operator, where a schedule without the whole weight is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.fx import Graph, GraphModule, Node

from ..config import Settings
from ..graph import nodes
from ..graph.builder import Builder
from ..graph.fakes import example
from ..ops.call import Attributes
from ..ops.choice import Choice, Chooser, Problem
from ..ops.library import FORWARD
from ..ops.sharded import OPERANDS, STATISTICS, Shards, gathered, statistics
from ..ranks import is_distributed

_AVERAGE = {"avg": True, "sum": False}
_FEW = "it has so few classes that a rank has none"


@dataclass(frozen=True)
class Gather:
    """How a node puts a tensor together of what each rank has.

    shard: the node of a DTensor, or of this rank's part. casts: the dtypes that it is cast to on the way.
    schedule: what is asked for in the place of it, "" for what the settings say.
    """

    shard: Node
    casts: tuple[torch.dtype, ...]
    shards: Shards
    schedule: str = ""

    @property
    def is_dtensor(self) -> bool:
        return isinstance(example(self.shard), DTensor)

    def then(self, dtype: torch.dtype) -> Gather:
        """With a cast behind it."""
        return replace(self, casts=(*self.casts, dtype))

    def whole(self) -> Whole:
        """What it does, as a value."""
        made = self.shards
        return Whole(made.classes, made.group, made.average, self.schedule, self.casts)


@dataclass(frozen=True)
class Whole:
    """Puts a weight, or a bias, together of this rank's part and those of the others: a collective of all ranks."""

    classes: int
    group: str
    average: bool
    schedule: str = ""
    casts: tuple[torch.dtype, ...] = ()

    def __call__(self, shard: Tensor) -> Tensor:
        """(V/P, ...) to (V, ...). Records nodes for a proxy."""
        for dtype in self.casts:
            shard = shard.to(dtype)
        return gathered(shard, self.classes, self.group, self.average, self.schedule)


# ------------------------------------------------------------------------------------------------------- what is there


def read(node: Any) -> Gather | None:
    """What a node gathers, through casts and `detach`; None if it does not, or in a way that is not known."""
    if not isinstance(node, Node):
        return None
    if node.target is gathered:
        arguments: Any = node.args
        shard, classes, group, average, *rest = arguments
        source, casts = _without_casts(shard)
        return Gather(_of_dtensor(source), casts, Shards(classes, group, average), *rest)
    op = nodes.read(node)
    if op is not None and op.name in ("cast", "detach"):
        inner = read(op.args["input"])
        same = inner is None or op.name == "detach" or example(node).dtype == example(op.args["input"]).dtype
        return inner if inner is None or same else inner.then(example(node).dtype)
    if node.op != "call_method" or node.target not in ("to_local", "full_tensor"):
        return None
    given = node.args[0]
    return _of_simple_fsdp(node, given) if isinstance(given, Node) else None


def _of_simple_fsdp(node: Node, source: Node) -> Gather | None:
    placements = node.kwargs.get("grad_placements", node.args[1] if len(node.args) > 1 else None)
    reduced = [getattr(p, "reduce_op", None) for p in placements or ()]  # type: ignore[union-attr]
    if len(reduced) != 1 or reduced[0] not in _AVERAGE:
        return None  # without a reduction the ranks have the same tokens
    behind: tuple[torch.dtype, ...] = ()
    if node.target == "to_local" and source.target == "redistribute":
        value = example(source)
        if not isinstance(value, DTensor) or value.placements != (Replicate(),) or source.kwargs.get("async_op"):
            return None
        dtype = source.kwargs.get("forward_dtype")
        behind = (dtype,) if isinstance(dtype, torch.dtype) else ()
        source = source.args[0]  # type: ignore[assignment]
    elif node.target == "to_local":
        return None
    source, casts = _without_casts(source)
    value = example(source)
    if not isinstance(value, DTensor) or value.placements != (Shard(0),) or not isinstance(value.shape[0], int):
        return None
    group = value.device_mesh.get_group().group_name
    return Gather(source, (*casts, *behind), Shards(value.shape[0], group, _AVERAGE[reduced[0]]))


def _without_casts(node: Node) -> tuple[Node, tuple[torch.dtype, ...]]:
    """What is cast, and the dtypes that it is cast to."""
    op = nodes.read(node)
    if op is None or op.name != "cast":
        return node, ()
    source, casts = _without_casts(op.args["input"])
    return source, (*casts, example(node).dtype)


def _of_dtensor(shard: Any) -> Node:
    """The DTensor that a node takes this rank's part of, if it does nothing else; or else the node."""
    plain = shard.op == "call_method" and shard.target == "to_local" and len(shard.args) == 1 and not shard.kwargs
    value = example(shard.args[0]) if plain else None
    return shard.args[0] if isinstance(value, DTensor) and value.placements == (Shard(0),) else shard


def _heads(graph: Graph) -> Iterator[tuple[Node, Gather]]:
    """The products with a weight that is gathered: linear layers, and those that `functional` spells otherwise."""
    for node in graph.nodes:
        op = nodes.read(node) if node.op in ("call_function", "call_method") else None
        if op is not None and op.is_head:
            for given in node.all_input_nodes:
                found = read(given)
                if found is not None and example(given).dim() == 2:
                    yield node, found


def schedule_of(product: Node, gather: Gather, settings: Settings) -> str:
    """What takes the place of the gather: "swap", "stream", or "gather" itself.

    Where a rank has no class, it is gathered: a compiler would take out what that rank has to send for the others.
    Under "auto" the tokens of all ranks travel where they are fewer than the classes. Sizes that are symbols are
    guarded, so that ranks with as many rows decide alike.
    """
    asked = gather.schedule or settings.sharded_head
    if asked != "auto" or not gather.shards.all_have_some:
        return asked if gather.shards.all_have_some else "gather"
    z = example(product)
    return "swap" if gather.shards.ranks * (z.numel() // z.shape[-1]) < gather.shards.classes else "gather"


def is_wanted(gm: GraphModule, settings: Settings) -> bool:
    """Whether a head of a graph is to be fused without its whole weight."""
    heads = _heads(gm.graph) if is_distributed() else ()
    return any(schedule_of(node, gather, settings) != "gather" for node, gather in heads)


def alike(choose: Chooser | None) -> Chooser | None:
    """A chooser that refuses nothing: what a machine has room for is not what the others have."""
    if choose is None:
        return None

    def chosen(problem: Problem) -> Choice:
        choice = choose(problem)
        return Choice("eager implementation") if choice.refusal else choice

    return chosen


# --------------------------------------------------------------------------------------------------- what comes instead


def localise(gm: GraphModule, settings: Settings) -> str:
    """Puts this rank's shard into the operator of each head that is gathered now, with the schedule asked for.

    Returns "", or why it cannot be, with the graph of no use any more.
    """
    graph, weights, parts = gm.graph, [], []
    reason = "the loss reads it in another form"
    for node in list(graph.nodes):
        given = _given(node) if node.target is FORWARD else {}
        gather = read(given.get("weight"))
        schedule = "gather" if gather is None else schedule_of(given["input"], gather, settings)
        if gather is None:
            continue
        if schedule == "gather":
            reason = "the ranks have more tokens than there are classes" if gather.shards.all_have_some else _FEW
            continue
        if why_not := _localise(node, gather, schedule):
            return why_not
        weights.append(given["weight"])
        parts += [given[name] for name in ("weight", "bias") if name in given]
    if not weights:
        return reason
    if any(weight.users for weight in weights):
        return "something else needs it in one piece"
    _erase(graph, parts)
    graph.lint()
    gm.recompile()
    return ""


def _erase(graph: Graph, unused: list[Node]) -> None:
    """Erases those of these nodes, and of what they are made of, that have no users."""
    found = set(unused)
    for node in reversed(list(graph.nodes)):
        if node in found and not node.users and node.op != "placeholder":
            found.update(node.all_input_nodes)
            graph.erase_node(node)


def _given(node: Node) -> dict[str, Node]:
    arguments: Any = node.args
    return dict(zip(arguments[1].split(), arguments[0], strict=True))


def _localise(node: Node, gather: Gather, schedule: str) -> str:
    arguments: Any = node.args
    _, names, row_mask, wanted, _, *attributes = arguments
    given = _given(node)
    if missing := sorted({*names.split()} - OPERANDS) + sorted({*wanted.split()} - STATISTICS):
        return f"the ranks' parts of {missing[0]} are not put together"
    bias = read(given["bias"]) if "bias" in given else None
    if "bias" in given and (bias is None or bias.shards != gather.shards):
        return "its bias is not sharded with it"
    builder, compute = Builder(node.graph, node), Attributes(*attributes).compute_dtype

    def local(name: str, gather: Gather) -> Node:
        part = builder.call(local_part, gather.shard) if gather.is_dtensor else builder.proxy(gather.shard)
        # What is cast to the dtype of the products is read as it is, and its gradient not rounded.
        for dtype in gather.casts if {*gather.casts} - {compute} else ():
            part = part.to(dtype)
        return (part if example(given[name]).requires_grad else part.detach()).node

    def call() -> list[Node]:
        operands = given | {"weight": local("weight", gather)} | ({"bias": local("bias", bias)} if bias else {})
        shards = gather.shards
        how = shards.classes, shards.group, shards.average, schedule
        made = builder.call(statistics, [*operands.values()], names, row_mask, wanted, attributes, *how)
        return [made[i].node for i in range(len(wanted.split()))]

    parts = builder.run(call)
    for user in list(node.users):
        user.replace_all_uses_with(parts[user.args[1]])  # type: ignore[index]
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    return ""


def local_part(tensor: DTensor) -> Tensor:
    """This rank's rows of a weight, or entries of a bias."""
    return tensor.to_local()
