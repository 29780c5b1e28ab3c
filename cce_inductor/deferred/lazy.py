"""The operators on deferred logits that are answered without their values: a table of them, and their rules.

A view, a copy or a cast of deferred logits is deferred logits too, with one :class:`Step` more between it and the head.
What is only made in their image (``zeros_like``) is a plain tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .pending import Step
from .tensor import RULES, DeferredLogits

aten = torch.ops.aten


def _aliased(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The same elements in a tensor of their own, which shares the value: pending or computed."""
    with torch.inference_mode(logits.is_inference()):  # as what it aliases, wherever that is done
        return DeferredLogits(logits._value, logits._meta(), logits.device, logits, logits.storage_offset())


def _viewed(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A view: pending in the same memory."""
    if logits.is_materialized:
        return NotImplemented
    meta = func(logits._meta(), *args, **kwargs)
    value = logits._value.view(Step.of(func, args, kwargs))
    with torch.inference_mode(logits.is_inference()):
        return DeferredLogits(value, meta, logits.device, logits, meta.storage_offset())


def _split(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Views one behind the other, each a slice."""
    if logits.is_materialized:
        return NotImplemented
    given = dict(zip(("sizes", "dim"), args, strict=False)) | kwargs
    dim, start, parts = given.get("dim", 0), 0, []
    for part in func(logits._meta(), *args, **kwargs):
        end = start + part.size(dim)
        parts.append(_viewed(logits, aten.slice.Tensor, (dim, start, end), {}))
        start = end
    return parts


def _unbound(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Views of one index each."""
    if logits.is_materialized:
        return NotImplemented
    dim = args[0] if args else kwargs.get("dim", 0)
    return [_viewed(logits, aten.select.int, (dim, i), {}) for i in range(logits.size(dim))]


def _for_statistics(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """As `_copied`, where statistics of the result are served."""
    origin = logits._value.origin
    return _copied(logits, func, args, kwargs) if origin is not None and origin.head.statistics else NotImplemented


def _scaled(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Logits times, or divided by, a finite number."""
    if type(args[0]) not in (int, float) or not math.isfinite(args[0]):
        return NotImplemented
    return _for_statistics(logits, func, args, kwargs)


def times(tensor: Tensor, first: Sequence[Step], second: Sequence[Step]) -> Tensor:
    """The product of two tensors that both follow from `tensor`, by the steps `first` and `second`: itself a step."""
    a = b = tensor
    for step in first:
        a = step(a)
    for step in second:
        b = step(b)
    return a * b


# The steps of the factors of an entropy, behind what they share.
_ENTROPIES = (
    {(), (aten.exp.default,)},
    {(aten._log_softmax.default,), (aten._log_softmax.default, aten.exp.default)},
    {(aten._log_softmax.default,), (aten._softmax.default,)},
)


def _multiplied(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Logits times a number, or probabilities times their logarithm, as an entropy is written.

    The probabilities are pending only where statistics are served.
    """
    other = args[0]
    if not isinstance(other, DeferredLogits):
        return _scaled(logits, func, args, kwargs)
    # Steps do not say what has been computed without a gradient.
    if torch.is_grad_enabled() and logits.requires_grad != other.requires_grad:
        return NotImplemented
    source, first, second = logits._value.meet(other._value)
    if source is None:
        return NotImplemented
    pair = {tuple(step.op for step in steps) for steps in (first, second)}
    if pair not in _ENTROPIES:
        return NotImplemented
    meta = func(logits._meta(), other._meta())
    return DeferredLogits(source.copy(Step.of(times, (first, second), {})), meta, logits.device)


def _copied(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A copy, or what else has elements of its own: computed from the logits as they are now."""
    if logits.is_materialized or kwargs.get("pin_memory") or kwargs.get("layout") not in (None, torch.strided):
        return NotImplemented
    if "non_blocking" in kwargs:
        # The copy happens at the first read, after any synchronisation that the caller has planned for it.
        kwargs = {**kwargs, "non_blocking": False}
    meta = func(logits._meta(), *args, **{k: v for k, v in kwargs.items() if k != "device"})
    return DeferredLogits(logits._value.copy(Step.of(func, args, kwargs)), meta, _device(logits, kwargs))


def _from_shape(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A plain tensor for which only shape, dtype and device of the logits matter."""
    return func(logits._meta(), *args, **{**kwargs, "device": _device(logits, kwargs)})


def _device(logits: DeferredLogits, kwargs: dict[str, Any]) -> torch.device:
    device = kwargs.get("device")
    return logits.device if device is None else torch.empty(0, device=device).device  # "cuda" is "cuda:0"


RULES.lazy |= {
    aten.detach.default: _aliased,
    aten.alias.default: _aliased,
    aten.clone.default: _copied,
    aten._to_copy.default: _copied,
    aten._log_softmax.default: _copied,
    aten.view.default: _viewed,
    aten._unsafe_view.default: _viewed,
    aten.slice.Tensor: _viewed,
    aten.select.int: _viewed,
    aten.unsqueeze.default: _viewed,
    aten.squeeze.dim: _viewed,
    aten.t.default: _viewed,
    aten.transpose.int: _viewed,
    aten.permute.default: _viewed,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbound,
    aten.empty_like.default: _from_shape,
    aten.zeros_like.default: _from_shape,
    aten.ones_like.default: _from_shape,
    aten.full_like.default: _from_shape,
    aten.rand_like.default: _from_shape,
    aten.randn_like.default: _from_shape,
    aten.new_empty.default: _from_shape,
    aten.new_zeros.default: _from_shape,
    aten.new_ones.default: _from_shape,
    aten.new_full.default: _from_shape,
    aten.new_empty_strided.default: _from_shape,
}

# What entropies and temperatures are written with.  Lazy only where a statistic of it would be asked for: the longer
# something is pending, the more often it is read too late.
EXPONENTIALS = frozenset((aten._softmax.default, aten.exp.default))
RULES.lazy |= {
    **dict.fromkeys(EXPONENTIALS, _for_statistics),
    aten.mul.Tensor: _multiplied,
    aten.div.Tensor: _scaled,
}
