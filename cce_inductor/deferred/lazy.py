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


def _aliased(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    with torch.inference_mode(self.is_inference()):  # as what it aliases, wherever that is done
        return DeferredLogits(self._value, self._meta(), self.device, self, self.storage_offset())


def _viewed(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if self.is_materialized:
        return NotImplemented
    meta = func(self._meta(), *args, **kwargs)
    value = self._value.view(Step.of(func, args, kwargs))
    with torch.inference_mode(self.is_inference()):
        return DeferredLogits(value, meta, self.device, self, meta.storage_offset())


def _split(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if self.is_materialized:
        return NotImplemented
    given = dict(zip(("sizes", "dim"), args, strict=False)) | kwargs
    dim, start, parts = given.get("dim", 0), 0, []
    for part in func(self._meta(), *args, **kwargs):
        end = start + part.size(dim)
        parts.append(_viewed(self, aten.slice.Tensor, (dim, start, end), {}))
        start = end
    return parts


def _unbound(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if self.is_materialized:
        return NotImplemented
    dim = args[0] if args else kwargs.get("dim", 0)
    return [_viewed(self, aten.select.int, (dim, i), {}) for i in range(self.size(dim))]


def _for_statistics(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    origin = self._value.origin
    return _copied(self, func, args, kwargs) if origin is not None and origin.head.statistics else NotImplemented


def _scaled(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if type(args[0]) not in (int, float) or not math.isfinite(args[0]):
        return NotImplemented
    return _for_statistics(self, func, args, kwargs)


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


def _multiplied(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Logits times a number, or probabilities times their logarithm, as an entropy is written.

    The probabilities are pending only where statistics are served.
    """
    other = args[0]
    if not isinstance(other, DeferredLogits):
        return _scaled(self, func, args, kwargs)
    # Steps do not say what has been computed without a gradient.
    if torch.is_grad_enabled() and self.requires_grad != other.requires_grad:
        return NotImplemented
    source, first, second = self._value.meet(other._value)
    if source is None:
        return NotImplemented
    pair = {tuple(step.op for step in steps) for steps in (first, second)}
    if pair not in _ENTROPIES:
        return NotImplemented
    meta = func(self._meta(), other._meta())
    return DeferredLogits(source.copy(Step.of(times, (first, second), {})), meta, self.device)


def _copied(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if self.is_materialized or kwargs.get("pin_memory") or kwargs.get("layout") not in (None, torch.strided):
        return NotImplemented
    if "non_blocking" in kwargs:
        # The copy happens at the first read, after any synchronisation that the caller has planned for it.
        kwargs = {**kwargs, "non_blocking": False}
    meta = func(self._meta(), *args, **{k: v for k, v in kwargs.items() if k != "device"})
    return DeferredLogits(self._value.copy(Step.of(func, args, kwargs)), meta, _device(self, kwargs))


def _from_shape(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return func(self._meta(), *args, **{**kwargs, "device": _device(self, kwargs)})


def _device(self: DeferredLogits, kwargs: dict[str, Any]) -> torch.device:
    device = kwargs.get("device")
    return self.device if device is None else torch.empty(0, device=device).device  # "cuda" is "cuda:0"


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
