"""What is left of the logits once their reductions are served."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Graph, Node

from ..graph import nodes
from ..graph.builder import Builder, Proxy
from ..graph.facts import Fact
from ..graph.nodes import Op
from ..graph.regions import descendants
from ..trace import operands
from ..trace.codes import codes
from ..trace.trace import Trace
from ..trace.values import Head, Value
from ..trace.walk import distinct

# ---- what is left


def replace_metadata(graph: Graph, trace: Trace) -> None:
    """Lets reads of the logits' shape read it off the hidden states, so that they do not keep the logits alive."""
    for node, read, value in trace.metadata:
        builder = Builder(graph, node)
        node.replace_input_with(read, builder.run(_same_shape, builder, value).node)


def _same_shape(builder: Builder, value: Value) -> Proxy:
    """A tensor of the logits' shape that takes no memory of its own: one column of the hidden states, expanded."""
    h = operands.hidden(builder, value, detach=True).narrow(value.class_dim, 0, 1)
    h = h if value.fake.dtype == h.node.meta["example_value"].dtype else h.to(value.fake.dtype)
    sizes = [-1] * value.fake.dim()
    sizes[value.class_dim] = operands.vocab(builder, value)
    return h.expand(*sizes)


def erase_dead(graph: Graph, traces: Iterable[Trace], findings: Iterable[Node]) -> None:
    """Erases losses and logits without a use. Only nodes of traces: they are known to be pure, or to edit logits.

    Of all traces at once: what is made of two heads keeps both alive.
    """
    dead = set(findings)
    for part in distinct(part for trace in traces for part in trace.with_parts):
        dead |= set(part.values)
        # Views of what was broadcast together with the logits.
        dead |= {n for n in descendants(part.first.node) if (op := nodes.read(n)) and op.name == "getitem"}
        dead |= _weight(part)
    for node in reversed(list(graph.nodes)):
        if node in dead and not node.users:
            graph.erase_node(node)


def _weight(trace: Trace) -> set[Node]:
    """What makes a head's weight of its codes, and the views of it that the head multiplies."""
    made = codes(trace.first.head) if isinstance(trace.first.head, Head) else None
    if made is None:
        return set()
    behind = {n for n in descendants(made.chain[-1]) if (op := nodes.read(n)) and (op.has(Fact.VIEW) or _turns(op))}
    return {*made.chain, *behind}


def _turns(op: Op) -> bool:
    return op.name == "getattr" and op.args["name"] in ("T", "mT")
