"""The operators on deferred logits that are answered without their values: a table of them, and their rules.

A view, a copy or a cast of deferred logits is deferred logits too, with one :class:`Step` more between it and the head.
What is only made in their image (``zeros_like``) is a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map

from ..graph.spellings import FUNCTIONS, NAMES, Fact
from .mixtures import Spreadable, spread
from .steps import Extra, Read, Step
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


def _record(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operator on every entry, with numbers and small tensors beside the logits: from these as they are now.

    Whether it can be a part of a loss that is fused is for the tracer to say, when there is one.
    """
    given = [i for i, a in enumerate(args) if isinstance(a, DeferredLogits)]
    if len(given) != 1:
        return _record_pair(func, *args) if given == [0, 1] and len(args) == 2 and not kwargs else NotImplemented
    at = given[0]
    logits, others = args[at], (*args[:at], *args[at + 1 :])
    value = logits._value
    tensors = [a for a in tree_leaves((others, kwargs)) if isinstance(a, Tensor)]
    if not _recordable(logits, *tensors):
        return NotImplemented
    if len(args) == 2 and len(tensors) == 1 and not kwargs:
        made = _record_with_statistic(func, args, logits, tensors[0])
        if made is not NotImplemented:
            return made
    if not all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors):
        return NotImplemented
    large = [t for t in tensors if 2 * t.numel() > logits.numel()]
    spreads = {id(t): spread(t) if t.shape == logits.shape else None for t in large}
    if not all(spreads.values()):
        return NotImplemented
    meta = func(*args[:at], logits._meta(), *args[at + 1 :], **kwargs) if not tensors else _meta(func, args, kwargs)
    if meta.shape != logits.shape or not meta.is_floating_point():
        return NotImplemented
    extras: list[Extra | Spreadable] = []

    def read(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        if func is aten.where.self and is_literal(argument):
            return argument.item()
        found = spreads.get(id(argument))
        extras.append(Extra(argument) if found is None else found[1])
        return Read(len(value.origin.extras) + len(extras) - 1, found and found[0])

    beside = [read(a) for a in others]
    if func is aten.where.self and not isinstance(beside[1], Read):
        func = aten.where.ScalarSelf if at == 2 else aten.where.ScalarOther
    return DeferredLogits(value.copy(Step.of(func, beside, kwargs, at), extras), meta, logits.device)


def _record_pair(func: Any, a: DeferredLogits, b: DeferredLogits) -> Any:
    """An operator on two tensors that follow from the same logits: probabilities times their logarithm."""
    # Steps do not say what has been computed without a gradient.
    if not _recordable(a) or (torch.is_grad_enabled() and a.requires_grad != b.requires_grad):
        return NotImplemented
    meta = func(a._meta(), b._meta())
    value = a._value.pair(func, b._value) if meta.is_floating_point() and meta.shape == a.shape == b.shape else None
    return NotImplemented if value is None else DeferredLogits(value, meta, a.device)


def _record_with_statistic(func: Any, args: Sequence[Any], logits: DeferredLogits, other: Tensor) -> Any:
    """An operator on logits and a statistic of them, which the program has: both are one function of the logits."""
    value = logits._value
    again = logits.head().known_as(other)
    if again is None or (torch.is_grad_enabled() and other.requires_grad != logits.requires_grad):
        return NotImplemented
    meta = _meta(func, args, {})
    beside = [get_gradient_edge(other).node] if other.requires_grad else []
    first, second = (value, again) if args[0] is logits else (again, value)
    made = first.pair(func, second, beside) if meta.shape == logits.shape else None
    return NotImplemented if made is None else DeferredLogits(made, meta, logits.device)


def _stays(logits: DeferredLogits, *beside: Tensor) -> bool:
    """Whether what follows from pending logits and others stays pending: as a part of a loss, or since they are large.

    What is computed of others without a gradient is for somebody's eyes, perhaps when the weights have changed.
    """
    origin = logits._value.origin
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (logits, *beside))
    return origin is not None and (origin.head.large or trains)


def _recordable(logits: DeferredLogits, *beside: Tensor) -> bool:
    """Whether what is done to logits and others is recorded: where it stays pending, and nobody traces it."""
    return _stays(logits, *beside) and not logits._value.fake and not logits._value.functional


def is_literal(tensor: Tensor) -> bool:
    """Whether a tensor may be a number that the program wrote, which `torch.where` makes a tensor of."""
    return tensor.dim() == 0 and tensor.device.type == "cpu" and not tensor.requires_grad


def _meta(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """What an operator gives, without memory."""

    def without_memory(x: Any) -> Any:
        if isinstance(x, DeferredLogits):
            return x._meta()
        # A number in a tensor takes no part in the choice of the result's dtype.
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x

    return func(*tree_map(without_memory, args), **tree_map(without_memory, kwargs))


def _copied(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A copy, or what else has elements of its own: computed from the logits as they are now."""
    if logits.is_materialized or kwargs.get("pin_memory") or kwargs.get("layout") not in (None, torch.strided):
        return NotImplemented
    if "non_blocking" in kwargs:
        # The copy happens at the first read, after any synchronisation that the caller has planned for it.
        kwargs = {**kwargs, "non_blocking": False}
    meta = func(logits._meta(), *args, **{k: v for k, v in kwargs.items() if k != "device"})
    return DeferredLogits(logits._value.copy(Step.of(func, args, kwargs)), meta, _device(logits, kwargs))


def _normalised(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Probabilities, or their logarithms: over the last dimension they are the same with any number of others."""
    if func is aten._softmax.default and not _stays(logits):
        return NotImplemented
    dim, *rest = args
    return _copied(logits, func, (dim - logits.dim() if dim == logits.dim() - 1 else dim, *rest), kwargs)


def _gathered(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Some entries of each row."""
    dim, index = args
    if not _recordable(logits) or kwargs or type(index) is not Tensor or 2 * index.numel() > logits.numel():
        return NotImplemented
    return entries(logits, dim, index)


def entries(logits: DeferredLogits, dim: int, index: Tensor) -> DeferredLogits:
    """Some entries of each row of pending logits, pending."""
    origin = logits._value.origin
    assert origin is not None
    meta = aten.gather.default(logits._meta(), dim, index.to("meta"))
    step = Step.of(aten.gather.default, (dim, Read(len(origin.extras))), {})
    return DeferredLogits(logits._value.copy(step, [Extra(index)]), meta, logits.device)


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
    aten._log_softmax.default: _normalised,
    aten._softmax.default: _normalised,
    aten.gather.default: _gathered,
    aten.view.default: _viewed,
    aten._unsafe_view.default: _viewed,
    aten.slice.Tensor: _viewed,
    aten.select.int: _viewed,
    aten.unsqueeze.default: _viewed,
    aten.squeeze.default: _viewed,
    aten.squeeze.dim: _viewed,
    aten.squeeze.dims: _viewed,
    aten.expand.default: _viewed,
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


def _entrywise() -> Iterator[tuple[Any, Callable]]:
    """The operators on every entry that the tracer has a rule for, each with the function of torch that it is."""
    for function, (name, _) in FUNCTIONS.items():
        row, called = NAMES[name], getattr(function, "__name__", "")
        packet = getattr(aten, called, None)
        known = (row.rules and row.facts & Fact.ENTRYWISE and not row.facts & Fact.VIEW) or row.beside
        if packet is not None and known and getattr(torch, called, None) is function:
            for operator in (getattr(packet, overload) for overload in packet.overloads()):
                schema = operator._schema
                if not schema.is_mutable and any(isinstance(a.type, torch.TensorType) for a in schema.arguments):
                    yield operator, function


def _rsub(logits: Any, other: Any, alpha: Any = 1) -> Any:
    return other - (logits if alpha == 1 else alpha * logits)


# operator -> the function of torch that a program calls for it. A number less a tensor is an operator of its own.
WRITTEN: dict[Any, Callable] = {**dict(_entrywise()), aten.rsub.Scalar: _rsub, aten.rsub.Tensor: _rsub}
RULES.entrywise, RULES.record = frozenset(WRITTEN), _record
