"""Logits that leave a graph in which there is no loss: deferred in the hope that the loss comes later.

A model compiled apart from its loss, or a graph that breaks in front of it, ends in the head. Nobody knows yet what
the logits are for. Where they are likely to be trained on they are deferred all the same: a loss over them can then be
fused where it stands (`cce_inductor.elsewhere`), and any other use computes them.
"""

import torch
from torch.fx import Graph, GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import compat
from ..config import Settings
from . import emit, rules, vocabulary
from .defer import Outputs
from .rewrite import Rewritten, copy_graph
from .trace import Trace, trace, written_between
from .values import Refused, fake

# Linear layers inside a model (an MLP of four times the width) end a graph too where it breaks behind them.
_WIDENING = 4


def defer_heads(gm: GraphModule, settings: Settings) -> Rewritten:
    """Defers the logits of a graph without a loss; a copy of `gm`, or `gm` itself where there are none."""
    if not settings.defer_logits or not settings.defer_without_loss or not _heads(gm.graph, settings):
        return Rewritten(gm, [])
    copy = copy_graph(gm)
    traces = _heads(copy.graph, settings)
    outputs = Outputs(copy.graph)
    deferrals = [deferral for found in traces for value in found.outputs for deferral in outputs.defer(value)]
    user_outputs = outputs.finish()
    for found in traces:
        emit.replace_metadata(copy.graph, found)
        emit.erase_dead(copy.graph, found, [])
    copy.graph.lint()
    copy.recompile()
    return Rewritten(copy, [], deferrals, user_outputs)


def _heads(graph: Graph, settings: Settings) -> list[Trace]:
    """The heads whose logits have no other use than to leave the graph."""
    found = []
    for node in graph.nodes:
        op = vocabulary.read(node)
        if op is None or op.name not in rules.HEADS:
            continue
        try:
            head = rules.HEADS[op.name](node, op.args)
            if not fake(node).requires_grad or not _large(head.vocab, head.width, settings):
                continue
            traced = trace(head)
            plain = not any(is_traceable_wrapper_subclass(fake(n)) for n in head.operands())
            if not traced.outputs or traced.escapes or traced.losses or not plain:
                continue
            if not all(value.fake.requires_grad for value in traced.outputs):
                continue
            if written_between(graph, head.operands(), node, None) is None:
                found.append(traced)
        except Refused:
            continue
    return found


def _large(vocab: int | torch.SymInt, width: int | torch.SymInt, settings: Settings) -> bool:
    """Whether a head is over a vocabulary. By what symbolic sizes were at capture, without a guard."""
    classes = compat.size_hint(vocab)
    return classes >= settings.min_vocab and classes > _WIDENING * compat.size_hint(width)
