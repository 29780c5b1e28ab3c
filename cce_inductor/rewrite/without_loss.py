"""Logits that leave a graph in which there is no loss: deferred in the hope that the loss comes later.

A model compiled apart from its loss, or a graph that breaks in front of it, ends in the head. Nobody knows yet what
the logits are for. Where they are likely to be trained on they are deferred all the same: a loss over them can then be
fused where it stands (`deferred.other_graphs`), and any other use computes them.
"""

import logging
import math

import torch
from torch.fx import Graph, GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import compat
from ..config import Settings
from ..graph.fakes import fake
from ..graph.memory import written_between
from ..graph.regions import copy_graph, differentiated_again
from ..trace.heads import large, worth_deferring
from ..trace.interpreter import Interpreter
from ..trace.trace import Trace
from ..trace.values import SeveralHeads, Value
from . import cleanup
from .outputs import Outputs
from .result import Rewritten

log = logging.getLogger(__name__)


def defer_heads(gm: GraphModule, settings: Settings) -> Rewritten:
    """Defers the logits of a graph without a loss: a copy of `gm`, or `gm` where there are none. Never raises."""
    try:
        return _defer_heads(gm, settings)
    except Exception:
        log.exception("cce_inductor could not defer the logits of a graph and left it as it was")
        return Rewritten(gm, [])


def _defer_heads(gm: GraphModule, settings: Settings) -> Rewritten:
    wanted = settings.defer_logits and settings.defer_without_loss and not differentiated_again(gm)
    if not wanted:
        return Rewritten(gm, [])
    copy = copy_graph(gm)
    interpreter = Interpreter(copy.graph)
    interpreter.run()
    traces = [t for t in interpreter.traces.values() if _only_leaves(copy.graph, t, settings)]
    if not traces:
        return Rewritten(gm, [])
    outputs = Outputs(copy.graph)
    deferrals = [deferral for found in traces for value in found.outputs for deferral in outputs.defer(value)]
    user_outputs = outputs.finish()
    for found in traces:
        for trace in found.with_parts:
            cleanup.replace_metadata(copy.graph, trace)
        cleanup.erase_dead(copy.graph, [found], [])
    interpreter.erase_unused()
    copy.graph.lint()
    copy.recompile()
    return Rewritten(copy, [], deferrals, user_outputs)


def _may_be_a_teacher(value: Value) -> bool:
    """Whether logits without a gradient may be what those of another model are compared with, and are worth it.

    Of a few rows, as in generation, nobody trains; and tensors of inference mode do not say when they are changed.
    """
    if torch.is_inference_mode_enabled():
        return False
    size = math.prod(map(compat.size_hint, value.fake.shape)) * value.fake.dtype.itemsize
    return worth_deferring(size)


def _only_leaves(graph: Graph, trace: Trace, settings: Settings) -> bool:
    """Whether the logits of a head have no other use than to leave the graph."""
    head = trace.head
    if isinstance(head, SeveralHeads):
        return False
    if not trace.outputs or trace.escapes or trace.reductions or not large(head.vocab, head.width, settings):
        return False
    if not all(value.fake.requires_grad or _may_be_a_teacher(value) for value in trace.outputs):
        return False
    if any(is_traceable_wrapper_subclass(fake(n)) for h in (head, *trace.heads) for n in h.operands()):
        return False
    return all(written_between(graph, h.operands(), h.node, None) is None for h in (head, *trace.heads))
