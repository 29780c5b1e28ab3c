"""PyTorch's GEMMs among the kernels of a GPU: which calls they can take, and the logits' products of slabs of columns.

They multiply whole matrices, so rows stay in their own order, and those that do not count have dlogits of 0. Of the
hidden states' rows that do not count they are given zeros: 0 times NaN would be NaN.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._inductor.lowering import fallback_handler

from ..ops.call import SCALES
from ..ops.gemm import ADD_MM, MM, gives_float32
from .buffers import op, part
from .cuda_call import KernelCall
from .schedules import Library


def of_call(call: KernelCall, needs: Sequence[str]) -> Library | None:
    """What PyTorch's GEMMs can do for the gradients `needs` of a call, None if they cannot multiply its operands."""
    if not multiplies(call):
        return None
    # With 16 bits the copy lies where dx will, which is rounded when all is done.
    beside = call.row_mask is not None and not ("input" in needs and call.compute.itemsize == 2)
    copied = call.hint * call.d * call.compute.itemsize if beside and "weight" in needs else 0
    return Library(gives_float32(), copied, alone(call))


def multiplies(call: KernelCall) -> bool:
    """Whether the operands are multiplied as they are, in the dtype that they have."""
    if call.compute == torch.float16 or {*SCALES} & {*call.operands}:
        return False
    bias = [call.operands["bias"].get_dtype()] if "bias" in call.operands else []
    return {*call.dtypes, *bias} == {call.compute}


def alone(call: KernelCall) -> bool:
    """Whether our kernels would do without matrix instructions: fp32, unless PyTorch is told to use tf32."""
    return call.compute == torch.float32 and call.precision == "ieee" and multiplies(call)


def mm(out: Any, a: Any, b: Any) -> None:
    fallback_handler(MM, add_to_fallback_set=False)(out, a, b)


def add_mm(out: Any, a: Any, b: Any) -> None:
    fallback_handler(ADD_MM, add_to_fallback_set=False)(out, a, b)


def product(call: KernelCall, out: Any, column: int) -> None:
    """The products of all rows with the columns from `column` on, into `out`, (N, columns). What is beyond V stays."""
    last = min(column + int(out.get_size()[1]), call.v)
    weight = part(call.given["weight"], 0, column, last)
    mm(part(out, 1, 0, last - column), call.given["input"], op("permute", weight, [1, 0]))


def products(call: KernelCall, columns: int) -> Iterator[Any]:
    """The products, slab by slab of so many columns, in one buffer, (N, columns)."""
    out = call.empty([call.n, columns], torch.float32)
    for column in range(0, call.v, columns):
        product(call, out, column)
        yield out


def counted_input(call: KernelCall) -> Any:
    """The hidden states with zeros in the rows that do not count, (N, D)."""
    if call.row_mask is None:
        return call.given["input"]
    made = op("where.self", op("unsqueeze", call.row_mask, 1), call.given["input"], 0.0)
    made.realize()
    return made
