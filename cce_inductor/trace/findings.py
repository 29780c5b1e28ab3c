"""The losses of a graph: each with the trace of its head, or the reason it has none."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, Node

from .. import compat
from ..config import Settings
from ..graph import nodes
from ..graph.facts import Fact
from ..graph.fakes import fake, is_tensor, same
from ..graph.refusal import Refusal
from ..graph.regions import descendants
from ..ops.picked import FEWEST
from . import rules
from .heads import large
from .reasons import unknown
from .reduction import Loss
from .trace import Trace
from .walk import Walk


@dataclass
class Finding:
    """A loss of the graph: the trace of its head, or why there is none."""

    loss: Node
    trace: Trace | None
    refusal: Refusal | None


def losses(graph: Graph) -> list[Node]:
    """The calls of a loss function over classes."""
    return [n for n in graph.nodes if (op := nodes.read(n)) is not None and op.has(Fact.LOSS)]


def findings(walk: Walk, settings: Settings, statistics: bool = False) -> list[Finding]:
    """Every loss over classes in the graph, in order, each with its head's trace or the reason it has none.

    statistics: also a statistic of each head that has no loss.
    """
    order = {node: i for i, node in enumerate(walk.given)}
    found = []
    for trace in walk.traces.values():
        sites = trace.sites or (trace.reductions[:1] if statistics or _only_picked(trace, settings) else [])
        # What is not written as a loss is one only if it can be served, or reads the entry of a target.
        if trace.escapes and not any(isinstance(s, Loss) or (s.classes and s.differentiated) for s in sites):
            continue
        found += [Finding(source(walk, site.node), trace, None) for site in sites]
    for made in walk.decomposed:
        op = nodes.read(made.node)
        if op is not None and op.has(Fact.LOSS):
            trace = next(t for t in made.traces if not t.first.members)
            found.append(Finding(source(walk, made.node), trace, None))
    found = list({finding.loss: finding for finding in reversed(found)}.values())
    known = {finding.loss for finding in found} | _of_entries(walk)
    found += [Finding(node, *why(walk, node)) for node in losses(walk.graph) if node in order and node not in known]
    return sorted(found, key=lambda finding: order[finding.loss])


def _of_entries(walk: Walk) -> set[Node]:
    """Losses over a few classes whose logits were picked, K for each row: what comes of a statistic is no logits."""
    picked = [r.node for trace in walk.traces.values() for r in trace.reductions if r.entries is not None]
    behind = {n for node in picked for n in (node, *descendants(node))}
    return {loss for loss in losses(walk.graph) if loss in behind and loss not in walk.refused}


def _only_picked(trace: Trace, settings: Settings) -> bool:
    """Whether nothing but a few logits of each row of a vocabulary are read, with a gradient: candidates, rankings.

    They need no product of matrices. A value of few actions, say, is no loss over a vocabulary.
    """
    picks = {r.classes: r for r in trace.reductions}
    if not picks or trace.escapes or not large(trace.head.vocab, trace.head.width, settings):
        return False
    if not all(r.statistics in (("target_logit",), ("entry_logits",)) for r in trace.reductions):
        return False
    few = FEWEST * sum(compat.size_hint(r.width) for r in picks.values()) <= compat.size_hint(trace.head.vocab)
    return few and any(r.differentiated for r in trace.reductions)


def source(walk: Walk, node: Node) -> Node:
    """The node of the program that `node` is part of, where that was decomposed."""
    for made in reversed(walk.decomposed):
        if node in made.added:
            node = made.node
    return node


def why(walk: Walk, loss: Node) -> tuple[Trace | None, Refusal]:
    """Why a loss has no trace that serves it: the node at fault, on the way back from the loss to a head."""
    if loss in walk.refused:
        refusal, trace = walk.refused[loss]
        return trace, refusal
    op = nodes.read(loss)
    assert op is not None
    node = op.args["input"]
    while True:
        if not isinstance(node, Node):
            return None, Refusal(loss, "the logits are not a tensor of the graph", "make them one")
        if node in walk.refused:
            refusal, trace = walk.refused[node]
            return trace, refusal
        op = nodes.read(node)
        if op is not None and op.is_head and node not in walk.values and same(fake(node).shape[-1], 1):
            reason = "the layer in front of it gives one number for each row, and no logits of classes"
            return None, Refusal(node, reason, "leave it: there is nothing to save")
        if op is not None and op.name in ("cat", "stack") and op.args["tensors"]:
            node = op.args["tensors"][0]
            continue
        if op is None or not rules.leads_on(op):
            before = next((walk.refused[n] for n in node.all_input_nodes if n in walk.refused), None)
            return (before[1], before[0]) if before is not None else (None, unknown(node))
        # 30.0 * z and bias + z have the logits second; the wider operand is the one to follow.
        given = [n for n in (op.args.get("input"), op.args.get("other")) if isinstance(n, Node)]
        if not given:
            return None, unknown(node)
        node = max(given, key=lambda n: fake(n).dim() if is_tensor(n) else 0)
