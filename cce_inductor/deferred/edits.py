"""Edits of pending logits in place, recorded as what they make of them.

``z /= 2``, ``z[:, unused] = -inf`` and the like before a loss: the logits have a new value from there on, which is
pending too, and what was copied of them before follows from the old one. Every tensor that shares their memory is given
the new value, as far as it goes. Where the gradient of one of them would not be the others', as with an edit under
``no_grad`` or of a detached alias, nothing is recorded, and the logits are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import compat
from .lazy import WRITTEN, is_literal
from .pending import PendingValue
from .tensor import RULES, DeferredLogits

aten = torch.ops.aten


def _edited(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operator on every entry, in place."""
    beside = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    whole = _whole(logits, beside)
    if whole is None or not _has_the_same_rows(logits, whole):
        return NotImplemented
    if logits is not whole and any(x.dim() > 1 or (x.dim() == 1 and len(x) != whole.shape[-1]) for x in beside):
        return NotImplemented  # of the rows, whose dimensions are others
    return _put(logits, whole, _OUT_OF_PLACE[func], func, args, kwargs)


def _filled(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A number put into columns: ``z[..., 5:] = 0``, which fills a view of them."""
    whole = _whole(logits, args)
    number = _number(args[0] if args else 0)
    if whole is None or number is None or kwargs:
        return NotImplemented
    columns = _columns(logits, whole)
    return NotImplemented if columns is None else _fill(logits, whole, columns, number)


def _filled_at(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``z[:, unused] = 0``, a number put into columns by an index; ``z[range(N), t] = x``, one entry of each row."""
    indices, values, *rest = args
    whole = _whole(logits, [*indices, values])
    if whole is None or any(rest) or kwargs or len(indices) != logits.dim():
        return NotImplemented
    *others, index = indices
    if index is None or index.dim() != 1:
        return NotImplemented
    if logits is whole and len(others) == 1 and others[0] is not None and _are_all_rows(others[0], logits):
        if index.dtype != torch.int64 or values.shape not in (index.shape, ()) or values.dtype != logits.dtype:
            return NotImplemented
        values = values.to(logits.device).repeat(index.shape) if values.dim() == 0 else values
        return _put(logits, logits, at_classes, at_classes_, (index, values), {})
    number = _number(values)
    if number is None or any(i is not None for i in others) or not _has_the_same_rows(logits, whole):
        return NotImplemented
    return _fill(logits, whole, index, number)


def _are_all_rows(index: Tensor, logits: Tensor) -> bool:
    """Whether an index takes each row of (N, V) logits once, in order."""
    n = len(logits)
    return index.shape == (n,) and torch.equal(index, torch.arange(n, device=index.device, dtype=index.dtype))


def at_classes(logits: Any, classes: Any, values: Any) -> Any:
    """(N, V) logits with other entries at one class of each row."""
    return logits.scatter(-1, classes.unsqueeze(-1), values.unsqueeze(-1))


def at_classes_(logits: Tensor, classes: Tensor, values: Tensor) -> Tensor:
    """The same in place."""
    return logits.scatter_(-1, classes.unsqueeze(-1), values.unsqueeze(-1))


def _filled_along(logits: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A number put into columns by ``index_fill_``."""
    dim, index, value = args
    number = _number(value)
    whole = _whole(logits, [index])
    if whole is None or number is None or dim % logits.dim() != logits.dim() - 1:
        return NotImplemented
    return _fill(logits, whole, index, number) if _has_the_same_rows(logits, whole) else NotImplemented


# ---- which logits are edited, and which of their columns


def _whole(logits: DeferredLogits, beside: Sequence[Any]) -> DeferredLogits | None:
    """The tensor that holds all of the memory in which `logits` are edited; None where that cannot be recorded."""
    value = logits._value
    if not value.pending or value.origin is None or value.fake or value.functional or value.given is not None:
        return None
    if torch.is_inference_mode_enabled() or logits.is_inference() or compat.is_transforming():
        return None
    tensors = [x for x in beside if isinstance(x, Tensor)]
    if any(isinstance(x, DeferredLogits) and x._value.memory is value.memory for x in tensors):
        return None
    whole = _owner(logits)
    found = isinstance(whole, DeferredLogits) and not whole._value.steps_from_memory()
    return whole if found and _is_recorded_for_all(list(_holders(logits)), tensors) else None  # type: ignore[return-value]


def _is_recorded_for_all(holders: Sequence[DeferredLogits], beside: Sequence[Tensor]) -> bool:
    """Whether autograd records an edit, which reads what is `beside`, for all tensors in a memory, or needs none."""
    needs = {u.requires_grad for u in holders}
    if needs == {True}:
        return torch.is_grad_enabled() and len({id(_owner(u)) for u in holders}) == 1
    return needs == {False} and not any(x.requires_grad for x in beside)


def _holders(logits: DeferredLogits) -> Iterator[DeferredLogits]:
    """All tensors in the memory of `logits`."""
    memory = logits._value.memory
    return (u for u in memory.tensors if u._value.memory is memory)


def _owner(logits: DeferredLogits) -> Tensor:
    """The tensor that autograd takes `logits` for a view of, or themselves."""
    base = Tensor._base.__get__(logits)  # type: ignore[union-attr]
    return logits if base is None else base


def _has_the_same_rows(logits: DeferredLogits, whole: DeferredLogits) -> bool:
    """Whether `logits` are `whole`, or a view of all of it that has the same rows one after the other."""
    in_order = logits.is_contiguous() and whole.is_contiguous() and logits.storage_offset() == whole.storage_offset()
    same = in_order and logits.numel() == whole.numel() and logits.shape[-1:] == whole.shape[-1:]
    return logits is whole or same


def _columns(logits: DeferredLogits, whole: DeferredLogits) -> slice | None:
    """The classes of `whole` that `logits` are a view of, in all of its rows."""
    classes, start = whole.shape[-1], logits.storage_offset() - whole.storage_offset()
    rows = logits.shape[:-1], logits.stride()[:-1]
    step, count = (logits.stride()[-1], logits.shape[-1]) if logits.dim() == whole.dim() else (1, 1)
    if logits.dim() == whole.dim() - 1:
        rows = logits.shape, logits.stride()
    if rows != (whole.shape[:-1], whole.stride()[:-1]) or not whole.is_contiguous() or not 0 <= start < classes:
        return None
    return slice(start, start + step * (count - 1) + 1, step) if 0 < count <= classes else None


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value.item()) if is_literal(value) else None
    return float(value) if isinstance(value, (int, float)) else None


# ---- the new value


def _fill(logits: DeferredLogits, whole: DeferredLogits, columns: Any, number: float) -> Any:
    """Fills columns of `whole`, a slice or an index, by way of `logits`."""
    with torch.no_grad():
        mask = torch.zeros(whole.shape[-1], dtype=torch.bool, device=whole.device)
        mask[columns] = True
    if not isinstance(columns, slice) and mask.all():
        return NotImplemented  # nothing is left of the logits
    fill = aten.masked_fill.Scalar, aten.masked_fill_.Scalar
    return _put(logits, whole, *fill, (mask, number), {})


def _put(
    logits: DeferredLogits, whole: DeferredLogits, func: Any, in_place: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Gives all tensors in the memory of `whole` the value that `func` makes of it, and hands `logits` on."""
    assert RULES.record is not None
    made = RULES.record(func, (whole, *args), kwargs)
    if made is NotImplemented or made.dtype != whole.dtype or made.shape != whole.shape:
        return NotImplemented
    holders = list(_holders(logits))
    new = made._value.instead_of(whole._value, in_place)
    known: dict[PendingValue, PendingValue] = {whole._value: new}
    for tensor in holders:
        value = tensor._value
        if value not in known:
            known[value] = new
            for step in value.steps_from_memory():
                known[value] = known[value].view(step)
        tensor._value = known[value]
        new.memory.tensors[tensor] = None
    return logits


def _in_place_pairs() -> Iterator[tuple[Any, Any]]:
    """The operators that are edits, with those that give the same in a tensor of their own."""
    for operator in WRITTEN:
        packet = getattr(aten, f"{operator.overloadpacket.__name__}_", None)
        if packet is not None and operator._overloadname in packet.overloads():
            yield getattr(packet, operator._overloadname), operator


_OUT_OF_PLACE: dict[Any, Any] = dict(_in_place_pairs())
WRITTEN[at_classes] = at_classes
RULES.lazy |= dict.fromkeys(_OUT_OF_PLACE, _edited)
RULES.lazy |= {
    aten.fill_.Scalar: _filled,
    aten.fill_.Tensor: _filled,
    aten.zero_.default: _filled,
    aten.index_put_.default: _filled_at,
    aten.index_fill_.int_Scalar: _filled_along,
}
