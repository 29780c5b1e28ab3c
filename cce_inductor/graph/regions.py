"""Graphs as wholes: copies of them, checkpointed parts, torch.func transforms, derivatives taken again."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator

import torch
from torch.fx import Graph, GraphModule, Node

from .. import compat


def descendants(node: Node, past: Iterable[Node] = ()) -> Iterator[Node]:
    """Every node that depends on `node`, but for those of `past` and what depends on it through them."""
    seen, stack = set(past), [node]
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                stack.append(user)
                yield user


def differentiated_again(gm: GraphModule) -> str:
    """Where the program takes a derivative that it differentiates again, right behind a graph; "" if it does not.

    Dynamo breaks the graph there, and says so, or leaves the function that does so to Python.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and "autograd.grad" in str(reason.reason) and reason.user_stack:
        frame = reason.user_stack[-1]
        return f"{frame.filename}:{frame.lineno}" if _AGAIN in (frame.line or "") else ""
    caller = compat.uncompiled_caller()
    if caller is None:
        return ""
    try:
        lines, first = inspect.getsourcelines(caller)
    except (OSError, TypeError):  # typed in, or made by exec()
        return ""
    return next((f"{caller.co_filename}:{first + i}" for i, line in enumerate(lines) if _AGAIN in line), "")


_AGAIN = "create_graph=True"


def copy_graph(gm: GraphModule) -> GraphModule:
    """A copy of a Dynamo graph module that keeps node metadata and the module's attributes."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    result = graph.graph_copy(gm.graph, mapping, return_output_node=True)
    assert isinstance(result, tuple)
    graph.output(result[0]).meta.update(result[1].meta)
    for old, new in mapping.items():
        compat.copy_node_attributes(old, new)
    copy = GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for name, value in vars(gm).items():
        if name not in vars(copy):
            setattr(copy, name, value)
    return copy


def checkpointed(gm: GraphModule) -> list[tuple[str, GraphModule]]:
    """The bodies of torch.utils.checkpoint calls, by the names of the attributes that hold them."""
    found = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.higher_order.tag_activation_checkpoint:
            body = node.args[0]
            region = getattr(gm, str(body.target), None) if isinstance(body, Node) and body.op == "get_attr" else None
            if isinstance(region, GraphModule):
                found[str(body.target)] = region
    return list(found.items())


def transform_around(graph: Graph, nodes: set[Node]) -> Node | None:
    """The torch.func transform (vmap, grad, jvp) around one of `nodes`: the operators have no rules for it."""
    open_levels: list[Node] = []
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name.endswith("_increment_nesting"):
            open_levels.append(node)
        elif name.endswith("_decrement_nesting"):
            open_levels.pop()
        elif node in nodes and open_levels:
            return open_levels[-1]
    return None
