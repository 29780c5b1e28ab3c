"""Operators of Inductor applied to the buffers that our kernels read and write."""

from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings

aten = torch.ops.aten


def op(name: str, *args: Any, **kwargs: Any) -> Any:
    """The lowering of an ATen operator, applied to buffers."""
    packet, _, overload = name.partition(".")
    return lowerings[getattr(getattr(aten, packet), overload or "default")](*args, **kwargs)


def in_memory(operand: Any) -> Any:
    node = ir.ExternKernel.realize_input(operand)
    node.freeze_layout()
    return node


def own(operand: Any) -> Any:
    """A buffer of its own: the offset of a view would be part of the kernel's text."""
    copy = op("clone", operand)
    copy.realize()
    return in_memory(copy)


def part(t: Any, dim: int, begin: int, end: int) -> Any:
    return op("slice.Tensor", t, dim, begin, end)


def iota(n: Any, device: torch.device, start: int = 0, step: int = 1) -> Any:
    """(n,) int64: start, start + step, ..."""
    return lowerings[torch.ops.prims.iota.default](
        n, start=start, step=step, dtype=torch.int64, device=device, requires_grad=False
    )


def zeros(size: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
    buffer = op("full", list(size), 0, dtype=dtype, device=device)
    buffer.realize()
    # Or Inductor pads the rows.
    buffer.freeze_layout_with_exact_strides(ir.FlexibleLayout.contiguous_strides(buffer.get_size()))
    return buffer


def numbers(values: Sequence[int], device: torch.device) -> Any:
    """int64 in a buffer and not in a kernel's text: one kernel serves all."""
    if len(values) <= 2:
        return in_memory(iota(len(values), device, values[0], values[-1] - values[0]))
    result = op("full", [len(values)], values[0], dtype=torch.int64, device=device)
    for i, value in enumerate(values[1:], 1):
        result = op("where.self", op("eq.Scalar", iota(len(values), device), i), value, result)
    return in_memory(result)


def argsort(keys: Any) -> Any:
    """The order of ascending keys, those that are equal in theirs: by PyTorch's own sort."""
    sort = fallback_handler(aten.sort.stable, add_to_fallback_set=False)
    return in_memory(sort(keys, stable=True, dim=0, descending=False)[1])
