"""How deferred logits are made, and how a gradient that reaches them goes on to the operands of their head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import compat
from .gradient import PendingGradient, added, of_leaves
from .lazy import entries, rows
from .pending import Compute, Fuse, Origin, PendingHead, PendingValue, SharedMemory
from .staleness import check_allocated, operand_name
from .steps import surroundings
from .tensor import DeferredLogits
from .value_graph import ValueGraph
from .without_gradient import keep


def defer(
    compute: Compute,
    operands: Sequence[Tensor],
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    requires_grad: bool,
    fuse: Fuse | None = None,
    large: bool = False,
    alone: bool = True,
    eager: bool = False,
    meeting: Callable[[], None] | None = None,
) -> Tensor:
    """A tensor of this shape and dtype that stands for ``compute(operands)`` and computes it on first touch.

    ``compute`` is a pure, differentiable function of the operands and returns a tensor of ``shape`` and ``dtype`` that
    does not alias them; ours is contiguous.  ``operands[0]`` are the hidden states (..., D), ``operands[1]`` the
    head's weight.  It runs outside autocast and outside Dynamo: once for the value, and once more inside the backward
    if a gradient reaches the logits.  ``requires_grad`` says whether eager's logits would have required grad.

    ``fuse`` is asked for the result when a function of ``LOSSES``, ``STATISTICS`` or ``ROWS`` is called on the pending
    logits, or on a pending tensor made from them; where it gives ``NotImplemented`` the call reads the logits.
    ``large`` says that a read had better be spared: what is done to the logits without a gradient is then recorded too.
    ``alone``: whether ``fuse`` is asked for these logits alone. If not, it is for rows of them, and beside other ones.
    ``eager``: whether a loss is behind the logits in the autograd graph wherever it can be, as in eager mode; else it
    goes around them, unless somebody waits for their gradient.
    ``meeting`` is called before they are read: where ``compute`` needs other ranks, it waits for them.

    The operands are referred to, not copied.  A read after they have changed raises
    :class:`DeferredLogitsError`; see :class:`Operand` for what is recognised and what cannot be.
    """
    shape = torch.Size(shape)
    head = PendingHead(compute, operands, shape, dtype, fuse, large, alone, eager, meeting)
    if not requires_grad:
        logits = root(head, shape)
        keep(logits._value)
        return logits
    with torch.enable_grad():  # the caller may have left a no_grad region that the logits were not computed in
        return DeferLogits.apply(head, compute, shape, *operands)


def computed(compute: Compute, operands: Sequence[Tensor], requires_grad: bool) -> Tensor:
    """What :func:`defer` stands for, at once: a plain tensor, differentiable by ordinary autograd if it is to be."""
    with surroundings(operands[0].device, grad=requires_grad):
        return compute(operands).contiguous()


def root(head: PendingHead, shape: torch.Size) -> DeferredLogits:
    """The whole logits of a head, of this shape, contiguous and without a ``grad_fn``."""
    return DeferredLogits(
        PendingValue(head, Origin(head), memory=SharedMemory(head)),
        torch.empty(shape, dtype=head.dtype, device="meta"),
        head.device,
    )


class DeferLogits(torch.autograd.Function):
    """Gives deferred logits their ``grad_fn``.

    It saves the operands and not the value, and is not part of a backward that does not come through the logits.
    One that does goes through the graph that a read has left; without one it computes the head anew, since the value
    was computed below autograd.  So it does where the backward is to be differentiated itself.
    """

    boxed_grads_call = True  # the gradient comes in a list, and need not be held until the backward is done

    @staticmethod
    def forward(ctx: Any, head: PendingHead, compute: Compute, shape: torch.Size, *operands: Tensor) -> Tensor:
        """Pending logits of this shape: nothing is computed."""
        ctx.compute = compute
        # For a loss that goes around the logits: inputs, not outputs, so this is no cycle, and nothing lives on
        # that is not an input of the graph behind them.
        ctx.head, ctx.operands = head, operands
        head.needs = tuple(ctx.needs_input_grad[3:])
        ctx.save_for_backward(*operands)
        ctx.set_materialize_grads(False)
        return root(head, shape)

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:
        """The gradients of the operands, from that of the logits; an error if an operand has been edited or freed."""
        grad = compat.boxed_grads(given)
        needed = ctx.needs_input_grad[3:]
        grads: list[Tensor | None] = [None] * len(needed)
        pending = grad[0]
        if isinstance(pending, PendingGradient):
            made = of_leaves(pending, ctx.head)
            grads, grad[0] = (grads, pending.value()) if made is None else (made, pending.rest)
            if made is not None and pending.rest is None and not compat.keeps_graph():
                ctx.head, ctx.operands = None, ()  # who keeps the loss must not keep the hidden states
        del pending
        if grad[0] is None:
            return (None,) * 3 + tuple(grads)
        create_graph = torch.is_grad_enabled()
        # Behind a read, the gradient of a bias alone needs neither the hidden states nor the weight.
        of_bias = ctx.head.graph is not None and not create_graph and not any(needed[:2]) and len(needed) == 3
        # Raises, as for eager's head, if one of them has been modified in place.
        operands = ctx.head.graph.operands if of_bias else ctx.saved_tensors
        for i, operand in enumerate(operands):
            check_allocated(operand_name(i), operand)
        wanted = [i for i, need in enumerate(needed) if need]
        found: Sequence[Tensor | None]
        with surroundings(ctx.head.device, grad=True):
            if create_graph:
                # Aliases, not detached for the sake of create_graph; the operands' own hooks must not run here.
                inputs = [t.view_as(t) if need else t.detach() for t, need in zip(operands, needed, strict=True)]
                found = torch.autograd.grad(
                    ctx.compute(inputs), [inputs[i] for i in wanted], grad[0], create_graph=True, allow_unused=True
                )
            else:
                found = _graph_of(ctx, operands).gradients(wanted, grad, compat.keeps_graph())
        for i, g in zip(wanted, found, strict=True):
            grads[i] = added(grads[i], g)
        return (None,) * 3 + tuple(grads)


def _graph_of(ctx: Any, operands: Sequence[Tensor]) -> ValueGraph:
    """The graph that a read has left, or else one of the head computed anew. Gone, unless the backward retains it."""
    graph = ctx.head.graph
    if graph is None:
        inputs = [t.detach().requires_grad_(need) for t, need in zip(operands, ctx.needs_input_grad[3:], strict=True)]
        graph = ValueGraph.of(ctx.compute(inputs), inputs)
    elif not compat.keeps_graph():
        ctx.head.graph = None
    return graph


class Rows(torch.autograd.Function):
    """Gives rows of pending logits, pending, a gradient that leads back to all of them: pending where it is."""

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits, index: Tensor) -> Tensor:
        """These rows of (N, V) logits: nothing is computed."""
        ctx.of_logits = True
        ctx.like = logits._meta(), logits.device
        ctx.save_for_backward(index)
        ctx.set_materialize_grads(False)
        return rows(logits, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """The gradient of the logits, from that of the rows."""
        (grad,), (index,) = grads, ctx.saved_tensors
        meta, device = ctx.like

        def of_all(grad: Tensor) -> Tensor:
            return grad.new_zeros(meta.shape).index_add(0, index, grad)

        if not isinstance(grad, PendingGradient):
            return None if grad is None else of_all(grad), None
        rest = None if grad.rest is None else of_all(grad.rest)
        return PendingGradient(meta, device, [*grad.parts], rest, lambda: of_all(grad.value())), None


class Largest(torch.autograd.Function):
    """Gives the entries of pending logits that `topk` has found, pending, the `grad_fn` that they have in eager mode.

    That of `gather` keeps the logits, and their backward would not have them edited.
    """

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits, dim: int, classes: Tensor) -> Tensor:
        """The entries of these classes along `dim`: nothing is computed."""
        ctx.of_logits = True
        ctx.dim, ctx.shape = dim, logits.shape
        ctx.save_for_backward(classes)
        ctx.set_materialize_grads(False)
        return entries(logits, dim, classes)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """The gradient of the logits, from that of the entries."""
        (grad,), (classes,) = grads, ctx.saved_tensors
        return None if grad is None else grad.new_zeros(ctx.shape).scatter(ctx.dim, classes, grad), None, None
