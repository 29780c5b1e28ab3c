"""PyTorch's GEMMs as operators that write into a buffer, for the kernels of a GPU that leave products to them."""

import functools

import torch
from torch import Tensor

# A library of its own, so that whatever registers the operators registers these.
_library = torch.library.Library("cce_inductor", "FRAGMENT")
for _name in ("mm_", "add_mm_"):
    _library.define(f"{_name}(Tensor(a!) out, Tensor a, Tensor b) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
MM = torch.ops.cce_inductor.mm_.default
ADD_MM = torch.ops.cce_inductor.add_mm_.default


def gives_float32() -> bool:
    """Whether a GEMM of 16 bits can give float32 on a GPU: it is not rounded in between."""
    return torch.version.hip is None and "dtype_out" in torch.ops.aten.mm.overloads()


@functools.cache
def _adds_to_float32(device: torch.device) -> bool:
    """Whether it can add to float32 in place. Some versions of torch want to be given the sum in 16 bits."""
    a, out = (torch.zeros(16, 16, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.ops.aten.addmm.dtype_out(out, a, a, torch.float32, out=out)
    except (AttributeError, RuntimeError):
        return False
    return True


def multiply(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, (m, k) and (k, n) of one dtype. `out`, (m, n), has it too, or is float32 where they have 16 bits."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        out.copy_(a.to(out.dtype) @ b.to(out.dtype))


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, shapes and dtypes as in `multiply`."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif out.is_cuda and _adds_to_float32(out.device):
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        product = torch.empty_like(out)
        multiply(product, a, b)
        out.add_(product)


def _fake(out: Tensor, a: Tensor, b: Tensor) -> None:
    return None


for _name, _run in (("mm_", multiply), ("add_mm_", add_product)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cce_inductor::{_name}", _fake, lib=_library)
