"""The operators on deferred logits that are answered without their values: a table of them, and their rules.

A view, a copy or a cast of deferred logits is deferred logits too, with one :class:`Step` more between it and the head.
What is only made in their image (``zeros_like``) is a plain tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map

from ..graph import spellings
from ..graph.facts import Fact
from ..graph.spellings import FUNCTIONS, NAMES, function_of
from .mixtures import Spreadable, spread
from .pending import PendingValue
from .steps import Extra, Part, Read, Step, moved
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
    args = [_narrowed(a) for a in args]
    given = [i for i, a in enumerate(args) if isinstance(a, DeferredLogits)]
    leaves = tree_leaves((args, kwargs))
    tensors = [a for a in leaves if isinstance(a, Tensor) and not isinstance(a, DeferredLogits)]
    if not given or len(given) != sum(isinstance(a, DeferredLogits) for a in leaves):
        return NotImplemented
    if any(isinstance(a, Tensor) for a in kwargs.values()):
        return NotImplemented
    logits = args[given[0]]
    if any(_mixes_gradients(args[i], tensors) for i in given):
        return NotImplemented
    if not all(_recordable(args[i], *tensors, *(args[k] for k in given)) for i in given):
        return NotImplemented
    if len(given) == 1 and len(args) == 2 and len(tensors) == 1 and not kwargs:
        made = _record_with_statistic(func, args, logits, tensors[0])
        if made is not NotImplemented:
            return made
    if not all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors):
        return NotImplemented
    spreads = {id(t): spread(t) if t.shape == logits.shape else None for t in tensors if 2 * t.numel() > logits.numel()}
    if not all(spreads.values()):
        return NotImplemented
    meta = func(*(a._meta() if a is logits else a for a in args), **kwargs) if not tensors and len(given) == 1 else None
    meta = _meta(func, args, kwargs) if meta is None else meta
    if meta.shape != logits.shape or not (meta.is_floating_point() or func in _COMPARISONS):
        return NotImplemented
    extras: list[Extra | Spreadable] = []

    def read(argument: Any) -> Any:
        if not isinstance(argument, Tensor) or isinstance(argument, DeferredLogits):
            return argument
        if func is aten.where.self and is_literal(argument):
            return argument.item()
        found = spreads.get(id(argument))
        extras.append(Extra(argument) if found is None else found[1])
        return Read(len(extras) - 1, found and found[0])

    value = _step_of(func, [read(a) for a in args], kwargs, given, extras)
    return NotImplemented if value is None else DeferredLogits(value, meta, logits.device)


def _mixes_gradients(logits: DeferredLogits, beside: Sequence[Tensor]) -> bool:
    """Whether a gradient would reach what stands beside detached logits, and not all that they were made of.

    Steps do not say what was computed without a gradient.
    """
    if logits.requires_grad or not torch.is_grad_enabled() or not any(t.requires_grad for t in beside):
        return False
    origin = logits._value.origin
    return origin is None or any(origin.head.needs) or any(e.tensor.requires_grad for e in origin.extras)


def _narrowed(argument: Any) -> Any:
    """A tensor that is expanded, as it was before; anything else as it is."""
    if type(argument) is not Tensor:
        return argument
    base = argument._base
    if base is not None and type(base) in (Tensor, torch.nn.Parameter) and _is_expanded(argument, base):
        return base  # where a gradient reaches it, too
    if argument.requires_grad:
        return argument
    for dim, (size, stride) in enumerate(zip(argument.size(), argument.stride(), strict=True)):
        argument = argument.narrow(dim, 0, 1) if stride == 0 and size > 1 else argument
    return argument


def _is_expanded(view: Tensor, base: Tensor) -> bool:
    """Whether a view is a tensor expanded, with the gradient that it has."""
    if view.numel() <= base.numel() or view.requires_grad != base.requires_grad or view.dtype != base.dtype:
        return False
    try:
        again = base.detach().expand(view.shape)
    except RuntimeError:
        return False
    return again.stride() == view.stride() and again.data_ptr() == view.data_ptr()


def _step_of(
    func: Any, args: list[Any], kwargs: dict[str, Any], given: Sequence[int], extras: Sequence[Extra | Spreadable]
) -> PendingValue | None:
    """The value that an operator makes of pending logits, which stand at `given` among its arguments."""
    values = [args[i]._value for i in given]
    if len(values) == 1:
        at, value = given[0], values[0]
        if func is aten.where.self and not all(isinstance(a, (Read, DeferredLogits)) for a in args):
            func = aten.where.ScalarSelf if at == 2 else aten.where.ScalarOther
        beside = moved((*args[:at], *args[at + 1 :]), 0, len(value.origin.extras))
        return value.copy(Step.of(func, beside, kwargs, at), extras)
    if kwargs:
        return None
    trains = _trains(args[i] for i in given)
    for part, i in enumerate(given):
        args[i] = Part(part)
    return PendingValue.joint(func, values, trains, tuple(args), extras)


def _trains(tensors: Iterable[Tensor]) -> list[bool]:
    """Which of the tensors a gradient reaches from what is computed of them now; comparisons follow the others."""
    given = [*tensors]
    reached = [t.requires_grad and torch.is_grad_enabled() for t in given]
    return [own or (not t.is_floating_point() and any(reached)) for t, own in zip(given, reached, strict=True)]


def _record_with_statistic(func: Any, args: Sequence[Any], logits: DeferredLogits, other: Tensor) -> Any:
    """An operator on logits and a statistic of them, which the program has: both are one function of the logits."""
    value = logits._value
    again = logits.head().known_as(other)
    if again is None or (torch.is_grad_enabled() and other.requires_grad != logits.requires_grad):
        return NotImplemented
    meta = _meta(func, args, {})
    beside = [get_gradient_edge(other).node] if other.requires_grad else []
    first, second = (value, again) if args[0] is logits else (again, value)
    trains = _trains((logits, logits))
    made = PendingValue.joint(func, (first, second), trains, beside=beside) if meta.shape == logits.shape else None
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


def _summed_up(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A log-sum-exp over another dimension than the last one: of tensors in a stack, a mixture of two heads."""
    dims, *_ = args
    over_classes = any(dim % logits.dim() == logits.dim() - 1 for dim in (dims if dims else range(logits.dim())))
    return NotImplemented if over_classes or not _recordable(logits) else _copied(logits, func, args, kwargs)


def _rearranged(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The same entries in other places, or several times, in memory of their own."""
    return _copied(logits, func, args, kwargs) if _recordable(logits) else NotImplemented


def _taken(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Rows or classes by one index, of one dimension; rows by a mask of all of them."""
    meta, value = logits._meta(), logits._value
    if func is aten.index_select.default:
        dim, index = args
    elif _is_mask_of_rows(args[0], logits):
        shape = (logits.shape[:-1].numel(), logits.shape[-1])
        meta, value = meta.view(shape), value.view(Step.of(aten.view.default, (shape,), {}))
        dim, index = 0, args[0][0].flatten().nonzero().squeeze(-1)
    else:
        found = [(i, index) for i, index in enumerate(args[0]) if index is not None]
        (dim, index), *more = found
        if more:
            return NotImplemented
    plain = type(index) is Tensor and index.dim() == 1 and index.dtype in (torch.int64, torch.int32)
    if not plain or not _recordable(logits) or (func is aten.index.Tensor and bool((index < 0).any())):
        return NotImplemented
    return _selected(value, meta, logits.device, dim, index)


def _selected(value: PendingValue, meta: Tensor, device: torch.device, dim: int, index: Tensor) -> DeferredLogits:
    assert value.origin is not None
    meta = aten.index_select.default(meta, dim, index.to("meta"))
    step = Step.of(aten.index_select.default, (dim, Read(len(value.origin.extras))), {})
    return DeferredLogits(value.copy(step, [Extra(index)]), meta, device)


def rows(logits: DeferredLogits, index: Tensor) -> DeferredLogits:
    """Some rows of pending logits, pending."""
    return _selected(logits._value, logits._meta(), logits.device, 0, index)


def _is_mask_of_rows(indices: Sequence[Any], logits: DeferredLogits) -> bool:
    """Whether an index is one mask, of all rows of what follows from two heads, or has numbers of its own for each row.

    (Others are for `EagerCalls`.)
    """
    origin = logits._value.origin
    if origin is None:
        return False
    beside = [*(operand.alias for operand in origin.head.operands[2:]), *(extra.tensor for extra in origin.extras)]
    if origin.other is None and all(t.dim() < 2 for t in beside):
        return False
    mask, *others = indices
    shaped = not others and type(mask) is Tensor and mask.dtype == torch.bool and mask.shape == logits.shape[:-1]
    return shaped and logits.is_contiguous() and _recordable(logits)


def _put_together(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Tensors that follow from the same logits, one behind the other or in a new dimension, and small ones beside them.

    Such as a positive class of its own for each row, in front of sampled negatives.
    """
    tensors, *dim = args
    pending = [t for t in tensors if isinstance(t, DeferredLogits)]
    beside = [t for t in tensors if not isinstance(t, DeferredLogits)]
    if not pending or kwargs or not all(_recordable(t, *tensors) for t in pending):
        return NotImplemented
    small = 2 * sum(t.numel() for t in beside) <= pending[0].numel()
    if not small or not all(type(t) in (Tensor, torch.nn.Parameter) for t in beside):
        return NotImplemented
    if len({t.dtype for t in tensors}) > 1 or any(_mixes_gradients(t, beside) for t in pending):
        return NotImplemented
    meta = _meta(func, args, {})
    parts, reads = map(Part, itertools.count()), map(Read, itertools.count())
    own = tuple(next(parts) if isinstance(t, DeferredLogits) else next(reads) for t in tensors)
    values = [t._value for t in pending]
    made = PendingValue.joint(func, values, _trains(pending), (own, *dim), [Extra(t) for t in beside])
    return NotImplemented if made is None else DeferredLogits(made, meta, pending[0].device)


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


# operator -> the function of torch that moves rows along dimensions as it does.
ALONG: dict[Any, Callable] = {
    getattr(aten, name).default: function_of(name) for name, row in NAMES.items() if row.rules == (spellings.ALONG,)
}
RULES.lazy |= {
    aten.detach.default: _aliased,
    aten.alias.default: _aliased,
    aten.clone.default: _copied,
    aten._to_copy.default: _copied,
    aten._log_softmax.default: _normalised,
    aten._softmax.default: _normalised,
    aten.logsumexp.default: _summed_up,
    aten.gather.default: _gathered,
    **dict.fromkeys(ALONG, _rearranged),
    aten.repeat.default: _rearranged,
    aten.index_select.default: _taken,
    aten.index.Tensor: _taken,
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


# What the tracer has no rule for but where it makes the entry of a target, the cosine of an angle and a margin, or a
# divergence.
_WITHOUT_A_RULE = ("function", "scatter", "scatter_add", "xlogy", "entr", "logaddexp", "lerp")


def _entrywise() -> Iterator[tuple[Any, Callable]]:
    """The operators on every entry that the tracer has a rule for, each with the function of torch that it is."""
    for function, (name, _) in FUNCTIONS.items():
        row, called = NAMES[name], getattr(function, "__name__", "")
        packet = getattr(aten, called, None)
        ruled = row.rules and row.facts & Fact.ENTRYWISE and not row.facts & Fact.VIEW
        known = ruled or row.beside or name in _WITHOUT_A_RULE
        if packet is not None and known and getattr(torch, called, None) is function:
            for operator in (getattr(packet, overload) for overload in packet.overloads()):
                schema = operator._schema
                if not schema.is_mutable and any(isinstance(a.type, torch.TensorType) for a in schema.arguments):
                    yield operator, function


def _rsub(logits: Any, other: Any, alpha: Any = 1) -> Any:
    return other - (logits if alpha == 1 else alpha * logits)


# operator -> the function of torch that a program calls for it. A number less a tensor is an operator of its own.
_COMPARISONS = {*(getattr(aten, name).Scalar for name in ("gt", "ge", "lt", "le"))}
_COMPARISONS |= {*(getattr(aten, name).Tensor for name in ("gt", "ge", "lt", "le"))}
WRITTEN: dict[Any, Callable] = {**dict(_entrywise()), aten.rsub.Scalar: _rsub, aten.rsub.Tensor: _rsub}
RULES.entrywise, RULES.record = frozenset(WRITTEN), _record
RULES.joined |= {aten.cat.default: _put_together, aten.stack.default: _put_together}
