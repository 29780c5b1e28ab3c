"""Moves nodes to where an operator needs their results earlier than the program computed them."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Graph, Node

from . import memory, nodes
from .facts import Fact
from .fakes import example
from .memory import storages


class Hoist:
    """The order of a graph's nodes, and what may be moved up in it.

    Only views and integer arithmetic, by name: they read nothing but their arguments, need no gradient mode and draw no
    random numbers. Nothing is moved over a write into what it reads.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.order: dict[Node, float] = {node: float(i) for i, node in enumerate(graph.nodes)}
        self.writes: list[tuple[float, Node]] = []
        self.switches: list[float] = []
        self.replaced: dict[Node, Node] = {}  # reductions that the program now gets from an operator
        for node, position in self.order.items():
            self.writes += [(position, target) for target in memory.mutated(node)]
            name = getattr(node.target, "__name__", "")
            if name in ("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"):
                self.switches.append(position)

    def position(self, node: Node) -> float:
        return self.order[node]

    def before(self, node: Node, anchor: Node) -> bool:
        return self.order[node] < self.order[anchor]

    def written(self, node: Node, start: Node, end: Node) -> bool:
        """Whether something between `start` and `end` writes into the memory of `node`."""
        memory = storages(node)
        return any(
            self.order[start] <= at < self.order[end] and (n is node or storages(n) & memory) for at, n in self.writes
        )

    def can(self, node: Node, anchor: Node) -> bool:
        """Whether `node` is computed in front of `anchor`, or can be."""
        if self.before(node, anchor):
            return True
        if node is anchor or node.op == "placeholder" or not self._pure(node):
            return False
        before, after = self.order[anchor], self.order[node]
        value = example(node)
        if isinstance(value, Tensor) and value.is_floating_point() and any(before < s < after for s in self.switches):
            return False
        memory = set().union(*(storages(n) for n in node.all_input_nodes))
        if any(before <= at < after and storages(n) & memory for at, n in self.writes):
            return False
        return all(self.can(n, anchor) for n in node.all_input_nodes)

    @staticmethod
    def _pure(node: Node) -> bool:
        op = nodes.read(node)
        return op is not None and not op.inplace and op.has(Fact.PURE)

    def move(self, node: Node, anchor: Node) -> None:
        """Moves `node`, for which `can` holds, and what it needs in front of `anchor`."""
        if node not in self.order or self.before(node, anchor):
            return
        for n in node.all_input_nodes:
            self.move(n, anchor)
        anchor.prepend(node)
        self.order[node] = self.order[anchor] - 0.5
