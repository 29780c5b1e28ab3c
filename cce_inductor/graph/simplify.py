"""Other words for the same: what a graph is rewritten to before it is followed, so that rules need not know both.

`made_full`: ``scores.data.clone().fill_(0.1)`` reads no score; it makes a tensor full of a number. `broadcast`: a bias
that is expanded or repeated to the shape of what it is added to broadcasts to that by itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import Graph, Node

from . import nodes
from .builder import Builder
from .fakes import example, fake, is_number, is_tensor, same
from .memory import storages, written
from .spellings import Fact


def made_full(graph: Graph) -> None:
    """Fresh tensors that are filled with a number before anything reads them are made full of it instead."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        op = nodes.read(node)
        if op is None or op.name != "fill" or not is_number(number := op.args["value"]):
            continue
        made = op.args["input"]
        like = _shaped_like(made)
        if like is None or fake(made).requires_grad or min(order[user] for user in made.users) < order[node]:
            continue
        builder = Builder(graph, node)
        made_so = functools.partial(builder.call, torch.full_like, dtype=fake(made).dtype)
        full = builder.run(made_so, builder.proxy(like), number).node
        full.meta["example_value"] = example(made)  # it lies in the memory that later edits write into
        node.replace_all_uses_with(full)
        graph.erase_node(node)
        for user in [user for user in made.users if user is not full]:
            user.replace_input_with(made, full)
        if not made.users:
            graph.erase_node(made)


def _shaped_like(made: Any) -> Node | None:
    """A tensor with the shape of one that has memory of its own; None where others may lie in that."""
    op = nodes.read(made) if is_tensor(made) else None
    if op is None or op.inplace:
        return None
    if op.has(Fact.CONSTANT):
        return made
    source = op.args["input"] if op.name == "copy" else None
    return source if is_tensor(source) and not storages(source) & storages(made) else None


_BROADCASTING = ("add", "sub", "mul", "div")


def broadcast(graph: Graph) -> None:
    """Operands of arithmetic that are expanded to the shape of the other one are given as they were before."""
    for node in list(graph.nodes):
        op = nodes.read(node)
        if op is None or op.inplace or op.name not in _BROADCASTING or not is_tensor(node):
            continue
        for wide, other in ((op.args["input"], op.args["other"]), (op.args["other"], op.args["input"])):
            shaped = is_tensor(other) and fake(other).shape == fake(node).shape
            if not shaped or not is_tensor(wide) or fake(wide).shape != fake(node).shape:
                continue
            narrow = _narrow(Builder(graph, node), wide)
            if narrow is not None:
                node.replace_input_with(wide, narrow)
                _erase_unused(wide)
                break


def _narrow(builder: Builder, node: Node) -> Node | None:
    """A tensor that broadcasts to what a node is, or None where there is none that is smaller."""
    op = nodes.read(node)
    if op is None or op.inplace or written(node.graph.nodes, storages(node)):
        return None
    source = op.args.get("input")
    if op.has(Fact.REPEATS):
        as_they_are = op.name != "repeat" or _repeats_ones(op)
        if not as_they_are or not is_tensor(source) or written(node.graph.nodes, storages(source)):
            return None
        return source if fake(source).shape != fake(node).shape else None
    read = [n for n in node.all_input_nodes if is_tensor(n)]
    whole = [n for n in read if fake(n).shape == fake(node).shape]
    numbers = all(same(fake(n).numel(), 1) for n in read if n not in whole)
    if not op.has(Fact.ENTRYWISE) or not whole or not numbers or node.kwargs.get("out") is not None:
        return None
    made = {n: _narrow(builder, n) for n in whole}
    if not all(made.values()):
        return None
    given: Any = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: made.get(n) or n)
    return builder.run(builder.tracer.create_proxy, node.op, node.target, *given).node


def _repeats_ones(op: nodes.Op) -> bool:
    sizes = op.args["sizes"]
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    own = zip(reversed(fake(op.args["input"]).shape), reversed(sizes), strict=False)
    return all(same(size, 1) or times == 1 for size, times in own)


def _erase_unused(node: Node) -> None:
    """Erases a node that nothing reads any more, and what it alone was made of."""
    if node.users or node.op == "placeholder":
        return
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        op = nodes.read(source)
        if op is not None and not op.inplace and (op.has(Fact.REPEATS) or op.has(Fact.ENTRYWISE)):
            _erase_unused(source)
