"""What in a graph shares the memory of deferred logits that it is given: edits of them, and views that it returns.

An edit in place has to reach the logits' values, their other views and their gradients. Only autograd's own record of
views sees to all of that, and a compiled graph, which takes the operands of the head or a plain tensor in the place of
the logits, has none of it. So:

* Dynamo breaks a graph where it would edit deferred logits. Where it may not (``fullgraph``), the whole graph is run as
  it is, in eager mode (:func:`edited`).
* Views that a graph returns are made outside of it, from the tensors that the program gave, or from the one of its
  outputs that they share memory with (:func:`without_views`).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef

from .. import compat
from ..graph import memory
from ..graph.fakes import example
from ..graph.memory import storages
from ..graph.regions import copy_graph
from .tensor import DeferredLogits

log = logging.getLogger(__name__)


def deferred_memory(node: Node) -> StorageWeakRef | None:
    """The memory that a node's tensor has in common with deferred logits, which share theirs also where they are fake;
    None for other tensors."""
    tensor = example(node)
    if isinstance(tensor, Tensor) and not isinstance(tensor, DeferredLogits):
        tensor = tensor._base  # what `materialize` gave
    return StorageWeakRef(Tensor.untyped_storage(tensor)) if isinstance(tensor, DeferredLogits) else None


def edited(gm: GraphModule) -> bool:
    """Whether a graph edits deferred logits in place, or a view of them."""
    return any(deferred_memory(target) is not None for n in gm.graph.nodes for target in memory.mutated(n))


@dataclass
class ReturnedViews:
    """The outputs at `positions` of a graph's `count`, which `make` gives.

    Of the graph's arguments, and of what it returns at `bases` of its other outputs; the last `added` of those are
    there for nothing else.
    """

    positions: tuple[int, ...]
    count: int
    make: Callable[..., tuple]
    bases: tuple[int, ...]
    added: int

    def put_back(self, compiled: Callable) -> Callable:
        """The graph's function, from the one that was compiled without them."""

        def run(*args: Any) -> tuple:
            given = compiled(*args)
            views = iter(self.make(*args, *(given[i] for i in self.bases)))
            others = iter(given[: len(given) - self.added])
            return tuple(next(views if i in self.positions else others) for i in range(self.count))

        return run


def without_views(gm: GraphModule, min_vocab: int) -> tuple[GraphModule, ReturnedViews | None]:
    """A graph without the views among its outputs, and those; itself if there are none.

    Views of deferred logits that it is given, and of matrices of at least `min_vocab` columns that may become deferred
    logits: those that it returns in two tensors that share memory.
    """
    try:
        return _without_views(gm, min_vocab)
    except Exception:  # as in `rewrite`: a fault of ours must not cost the user the compilation
        log.exception("cce_inductor could not take the views out of a graph's outputs, and left them there")
        return gm, None


def _without_views(gm: GraphModule, min_vocab: int) -> tuple[GraphModule, ReturnedViews | None]:
    outputs = compat.outputs(gm)
    bases = _bases(gm, outputs, min_vocab)
    positions = tuple(i for i, n in enumerate(outputs) if n in bases)
    if not positions or edited(gm):
        return gm, None
    views = [outputs[i] for i in positions]
    behind = _needed(views, set(bases.values()))
    rest = [n for i, n in enumerate(outputs) if i not in positions]
    made = list(dict.fromkeys(base for base in bases.values() if base.op != "placeholder"))
    added = [base for base in made if base not in rest]
    rest += added
    # Nothing but the views goes: what has effects stays.
    edits = {n for n in behind if memory.mutated(n)}
    others = _needed([n for n in gm.graph.nodes if n not in behind and n.op != "output"] + [*edits, *rest], set())
    remaining = [n for n in gm.graph.nodes if n in others or n not in behind]
    switches = {n for n in gm.graph.nodes if getattr(n.target, "__name__", "") in _SWITCHES}
    make = _part(gm, [*(behind - edits), *switches], views, made).forward
    places = tuple(rest.index(base) for base in made)
    return _part(gm, remaining, rest), ReturnedViews(positions, len(outputs), make, places, len(added))


# What a view that is made under them is made under when it is made again.
_SWITCHES = ("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")


def _bases(gm: GraphModule, outputs: Sequence[Any], min_vocab: int) -> dict[Node, Node]:
    """The outputs that are views, each with what it is a view of: an input or the first node in its memory."""
    first: dict[StorageWeakRef, Node] = {}
    for node in gm.graph.nodes:
        for own in _memories(node):
            first.setdefault(own, node)
    bases: dict[Node, Node] = {}
    several: dict[Node, set[Node]] = {}
    for node in {n for n in outputs if isinstance(n, Node)}:
        for own in _memories(node):
            several.setdefault(first[own], set()).add(node)
    for base, nodes in several.items():
        given = deferred_memory(base) is not None
        logits = len(nodes) > 1 and base.op != "placeholder" and example(base).shape[-1:] >= (min_vocab,)
        within = _needed(list(nodes), {base})
        plain = all(n is base or not isinstance(example(n), Tensor) or _memories(n) & _memories(base) for n in within)
        if (given or logits) and plain:
            bases |= {node: base for node in nodes if given or node is not base}
    return bases


def _memories(node: Node) -> set[StorageWeakRef]:
    """The memory of a node's tensor: that of deferred logits, or else its own."""
    own = deferred_memory(node)
    return storages(node) if own is None else {own}


def _needed(nodes: Sequence[Any], end: set[Node]) -> set[Node]:
    """Nodes, and what they are computed from, as far as `end`."""
    seen: set[Node] = set()
    stack = [n for n in nodes if isinstance(n, Node)]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes if node not in end else []
    return seen


def _part(gm: GraphModule, nodes: Sequence[Node], outputs: Sequence[Any], given: Sequence[Node] = ()) -> GraphModule:
    """A graph of the same inputs and of `given`, with these of its nodes and other outputs.

    Edits that are not among the nodes have been done to what is given.
    """
    copy = copy_graph(gm)
    graph: Graph = copy.graph
    names = {n.name for n in nodes}
    copies = {n.name: n for n in graph.nodes}
    for base in given:
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            placeholder = graph.placeholder(f"{base.name}_given")
        copies[base.name].replace_all_uses_with(placeholder)
        copies[base.name] = placeholder
    end = next(n for n in reversed(graph.nodes) if n.op == "output")
    end.args = (tuple(copies[n.name] if isinstance(n, Node) else n for n in outputs),)
    names -= {base.name for base in given}
    for node in list(graph.nodes) if given else ():
        if edited := memory.mutated(node):
            node.replace_all_uses_with(edited[0])  # the base holds what was edited, whatever tensor it was edited by
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and node.name not in names:
            graph.erase_node(node)
    copy.recompile()
    return copy
