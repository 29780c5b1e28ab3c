"""Other words for the same: what a graph is rewritten to before it is followed, so that rules need not know both.

`made_full`: ``scores.data.clone().fill_(0.1)`` reads no score; it makes a tensor full of a number. `broadcast`: a bias
that is expanded or repeated to the shape of what it is added to broadcasts to that by itself, as a mask does. `kept`: a
mask over the vocabulary that says which columns stay.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import Graph, Node

from . import nodes
from .builder import Builder
from .facts import Fact
from .fakes import example, fake, is_number, is_tensor, same
from .memory import storages, written


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


def kept(graph: Graph) -> None:
    """``torch.where(mask, z, number)`` of a mask of the last dimension is that of its opposite, the other way round."""
    for node in list(graph.nodes):
        op = nodes.read(node)
        if op is None or op.name != "where" or node.kwargs or len(node.args) != 3:
            continue
        mask, z, number = node.args
        if is_number(number) and is_tensor(z) and is_tensor(mask) and fake(mask).dim() == 1 < fake(z).dim():
            builder = Builder(graph, node)
            node.args = builder.run(builder.proxy(mask).logical_not).node, number, z


# The operands of each op that may broadcast to another one.
_BROADCASTING: dict[str, tuple[str, ...]] = dict.fromkeys(("add", "sub", "mul", "div"), ("input", "other"))
_BROADCASTING |= {"masked_fill": ("mask",), "where": ("condition",)}


def broadcast(graph: Graph) -> None:
    """Operands of arithmetic that are expanded to the shape of the other one are given as they were before."""
    repeats: set[Node] = set()  # tensors that something smaller broadcasts to
    for node in list(graph.nodes):
        op = nodes.read(node)
        if op is None or not is_tensor(node) or (op.inplace and op.name != "masked_fill"):
            continue
        if op.name in _BROADCASTING:
            _broadcast_operand(graph, node, op, repeats)
        if not op.inplace and _repeats(node, op, repeats):
            repeats.add(node)


def _broadcast_operand(graph: Graph, node: Node, op: nodes.Op, repeats: set[Node]) -> None:
    for wide in (op.args[name] for name in _BROADCASTING[op.name]):
        others = [x for x in op.args.values() if is_tensor(x) and x is not wide]
        whole = any(fake(other).shape == fake(node).shape for other in others)
        if wide in repeats and whole and fake(wide).shape == fake(node).shape:
            node.replace_input_with(wide, _narrow(Builder(graph, node), wide))
            _erase_unused(wide)
            return


def _repeats(node: Node, op: nodes.Op, repeats: set[Node]) -> bool:
    """Whether a tensor is made of a smaller one that broadcasts to it; `repeats`: those in front of it that are."""
    source = op.args.get("input")
    if op.has(Fact.REPEATS):
        as_they_are = op.name != "repeat" or _repeats_ones(op)
        if not as_they_are or not is_tensor(source) or fake(source).shape == fake(node).shape:
            return False
        return not written(node.graph.nodes, storages(node) | storages(source))
    if not op.has(Fact.ENTRYWISE) or node.kwargs.get("out") is not None:
        return False
    whole, others = _sorted(node)
    if not whole or not repeats.issuperset(whole) or not all(same(fake(n).numel(), 1) for n in others):
        return False
    return not written(node.graph.nodes, storages(node))


def _sorted(node: Node) -> tuple[list[Node], list[Node]]:
    """The tensors that a node reads: of its own shape, and others."""
    read = [n for n in node.all_input_nodes if is_tensor(n)]
    whole = [n for n in read if fake(n).shape == fake(node).shape]
    return whole, [n for n in read if n not in whole]


def _narrow(builder: Builder, node: Node) -> Node:
    """The smaller tensor that one that `_repeats` is made of."""
    op = nodes.read(node)
    if op is not None and op.has(Fact.REPEATS):
        return op.args["input"]
    made = {n: _narrow(builder, n) for n in _sorted(node)[0]}
    given: Any = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: made.get(n, n))
    return builder.run(builder.again, node, *given).node


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
