"""What in a graph shares the memory of deferred logits that it is given: edits of them, and views that it returns.

An edit in place has to reach the logits' values, their other views and their gradients. Only autograd's own record of
views sees to all of that, and a compiled graph, which takes the operands of the head or a plain tensor in the place of
the logits, has none of it. So:

* Dynamo breaks a graph where it would edit deferred logits. Where it may not (``fullgraph``), the whole graph is run as
  it is, in eager mode (:func:`edited`).
* Views that a graph returns are made outside of it, from the tensors that the program gave (:func:`without_views`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef

from . import compat
from .deferred import DeferredLogits
from .rewrite import vocabulary
from .rewrite.rewrite import copy_graph
from .rewrite.values import example


def memory(node: Node) -> StorageWeakRef | None:
    """The memory that a node's tensor has in common with deferred logits, which share theirs also where they are fake;
    None for other tensors."""
    tensor = example(node)
    if isinstance(tensor, Tensor) and not isinstance(tensor, DeferredLogits):
        tensor = tensor._base  # what `materialize` gave
    return StorageWeakRef(Tensor.untyped_storage(tensor)) if isinstance(tensor, DeferredLogits) else None


def edited(gm: GraphModule) -> bool:
    """Whether a graph edits deferred logits in place, or a view of them."""
    return any(memory(target) is not None for n in gm.graph.nodes for target in vocabulary.mutated(n))


@dataclass
class ReturnedViews:
    """The outputs at `positions` of a graph's `count`, which `make` gives for the graph's arguments."""

    positions: tuple[int, ...]
    count: int
    make: Callable[..., tuple]

    def put_back(self, compiled: Callable) -> Callable:
        """The graph's function, from the one that was compiled without them."""

        def run(*args: Any) -> tuple:
            views, others = iter(self.make(*args)), iter(compiled(*args))
            return tuple(next(views if i in self.positions else others) for i in range(self.count))

        return run


def without_views(gm: GraphModule) -> tuple[GraphModule, ReturnedViews | None]:
    """A graph without the views of given logits among its outputs, and those; itself if there are none."""
    outputs = compat.outputs(gm)
    given = {memory(n) for n in gm.graph.nodes if n.op == "placeholder"} - {None}
    positions = tuple(i for i, n in enumerate(outputs) if isinstance(n, Node) and memory(n) in given)
    if not positions or edited(gm):
        return gm, None
    views = [outputs[i] for i in positions]
    rest = [n for i, n in enumerate(outputs) if i not in positions]
    behind = _needed(views)
    switches = {n for n in gm.graph.nodes if getattr(n.target, "__name__", "") in _SWITCHES}
    needed = _needed([n for n in gm.graph.nodes if n not in behind])
    # Nothing but the views goes: what has effects stays.
    kept = [n for n in gm.graph.nodes if n in needed or n not in behind]
    return (
        _part(gm, kept, rest),
        ReturnedViews(positions, len(outputs), _part(gm, [*behind, *switches], views).forward),
    )


# What a view that is made under them is made under when it is made again.
_SWITCHES = ("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")


def _needed(nodes: Sequence[Any]) -> set[Node]:
    """Nodes, and what they are computed from."""
    seen: set[Node] = set()
    stack = [n for n in nodes if isinstance(n, Node)]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen


def _part(gm: GraphModule, nodes: Sequence[Node], outputs: Sequence[Any]) -> GraphModule:
    """A graph of the same inputs, with these of its nodes and other outputs."""
    copy = copy_graph(gm)
    graph: Graph = copy.graph
    names = {n.name for n in nodes}
    copies = {n.name: n for n in graph.nodes}
    end = next(n for n in reversed(graph.nodes) if n.op == "output")
    end.args = (tuple(copies[n.name] if isinstance(n, Node) else n for n in outputs),)
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and node.name not in names:
            graph.erase_node(node)
    copy.recompile()
    return copy
