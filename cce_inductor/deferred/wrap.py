"""Compiled functions with what has to be done to their arguments and results: logits taken in, logits given out."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .. import compat
from ..rewrite.outputs import Deferral
from ..rewrite.result import Rewritten
from ..trace.heads import worth_deferring
from . import split_logits
from .autograd import computed, defer
from .gradient import Dense, behind, gradients
from .other_graphs import Form
from .pending import Fuse
from .steps import autocast_now
from .tensor import DeferredLogits


def with_logits(compiled: Callable, form: Form, gm: GraphModule) -> Callable:
    """A compiled function for the program's arguments, where its graph takes logits in the way that `form` says.

    gm: the graph as it was captured, with the logits as inputs.
    """

    def run(*args: Any) -> Any:
        given = form.arguments(args)
        waiting = [i for i in sorted(form.inlined) if args[i].waits]
        if not waiting:
            return compiled(*given)
        logits = [args[i] for i in waiting]
        leaves = [t for z in logits for t in z.head().leaves]
        return tuple(behind(logits, leaves, given, compiled, _dense(gm, args, waiting)))

    return run


def _dense(gm: GraphModule, args: Sequence[Any], at: Sequence[int]) -> Dense:
    """The gradients of the logits at these places, through the graph as PyTorch runs it in eager mode."""
    mode = autocast_now(args[at[0]].device)
    values = {i: t.as_now() for i, t in enumerate(args) if isinstance(t, DeferredLogits)}

    def dense(grads: Sequence[Tensor | None], others: Sequence[Tensor] | None) -> Sequence[Tensor]:
        plain = [values[i](others is not None) if i in values else t for i, t in enumerate(args)]
        with mode(), torch.enable_grad():
            made = gm.forward(*plain)
        return gradients(made, grads, [plain[i] for i in at], others)

    return dense


def computed_on_entry(compiled: Callable) -> Callable:
    """A compiled function, also for pending logits, which it was not compiled for: they are computed on the way in."""

    def run(*args: Any) -> Any:
        return compiled(*(a.materialize() if isinstance(a, DeferredLogits) else a for a in args))

    return run


def with_deferred(compiled: Callable, result: Rewritten, fuse: Fuse, timeout: int) -> Callable:
    """A compiled function that gives deferred logits where its graph gives the hidden states.

    `fuse` computes losses and statistics that are called eagerly on them. timeout: in seconds, of a read that other
    ranks have to come to.
    """
    deferrals, n = result.deferrals, result.user_outputs
    positions = {deferral.position for deferral in deferrals}

    def make(deferral: Deferral, operands: Sequence[Tensor]) -> Tensor:
        if deferral.split is not None:
            return split_logits.of(deferral, operands, timeout)
        shape = deferral.shape(operands)
        large = worth_deferring(math.prod(shape) * deferral.dtype.itemsize)
        # A weight that may be gone when the loss comes is of no use for a loss in another graph.
        freed = any(map(compat.is_freed_after_forward, operands[1:]))
        # So are, without a gradient, a few rows, and tensors that do not say when they are changed.
        kept = deferral.requires_grad or (large and not torch.is_inference_mode_enabled())
        if not result.fused and (freed or not kept):
            return computed(deferral.compute, operands, deferral.requires_grad)
        return defer(
            deferral.compute,
            operands,
            shape=shape,
            dtype=deferral.dtype,
            requires_grad=deferral.requires_grad,
            fuse=fuse,
            large=large,
            # Evaluation reads at the cost of plain logits: the operators' eager implementation is a little slower.
            alone=bool(result.fused) or deferral.requires_grad,
            meeting=split_logits.meeting(deferral.compute, timeout),
        )

    def run(*args: Any) -> tuple:
        everything = iter(compiled(*args))
        outputs = [None if i in positions else next(everything) for i in range(n)]
        extra = list(everything)
        made: dict[Any, Tensor] = {}
        for deferral in deferrals:
            # An output that stands twice in the user's graph is one tensor.
            key = id(deferral.compute), deferral.split and deferral.split.placements
            if key not in made:
                made[key] = make(deferral, [source.get(args, extra) for source in deferral.operands])
            outputs[deferral.position] = made[key]
        return tuple(outputs)

    return run
