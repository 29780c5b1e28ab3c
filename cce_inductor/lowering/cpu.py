"""Lowerings for the CPU: which calls the C++ templates can take, and what the templates are given.

A call that they cannot take runs the operator's eager implementation inside the compiled graph; `Unsupported` says why.
"""

import logging
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch._inductor import cpu_vec_isa, ir
from torch._inductor.lowering import fallback_handler
from torch._inductor.virtualized import V

from ..ops import statistics as table
from ..ops.call import Attributes
from ..ops.library import BACKWARD, FORWARD
from .cpu_template import Spec, emit

log = logging.getLogger(__name__)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Unsupported(Exception):
    """The templates cannot take a call; the message says why."""


def forward(operands, names, active, statistics, training, *attributes) -> Sequence[Any]:
    """Lowering of ``cce_inductor::linear_statistics``."""
    call = operands, names, active, statistics, training, *attributes
    try:
        return _forward(_named(names, operands), active, statistics.split(), Attributes(*attributes))
    except Unsupported as reason:
        log.info("linear_statistics runs its eager implementation: %s", reason)
        return fallback_handler(FORWARD, add_to_fallback_set=False)(*call)


def backward(tangents, tangent_names, saved, operands, names, active, statistics, needs, *attributes) -> Sequence[Any]:
    """Lowering of ``cce_inductor::linear_statistics_backward``."""
    call = tangents, tangent_names, saved, operands, names, active, statistics, needs, *attributes
    try:
        return _backward(
            _named(tangent_names, tangents),
            _named(statistics, saved),
            _named(names, operands),
            active,
            needs.split(),
            Attributes(*attributes),
        )
    except Unsupported as reason:
        log.info("linear_statistics_backward runs its eager implementation: %s", reason)
        return fallback_handler(BACKWARD, add_to_fallback_set=False)(*call)


def _forward(operands: dict[str, Any], active: Any, statistics: list[str], attributes: Attributes) -> Sequence[Any]:
    element, compute = _dtypes(operands, attributes)
    n, device = operands["input"].get_size()[0], operands["input"].get_device()
    given = {**operands, **({} if active is None else {"active": active})}
    layouts = {
        name: _contiguous(device, torch.int64 if table.TABLE[name].integer else torch.float32, [n])
        for name in statistics
    }
    constants = {
        "statistics": statistics,
        "scale": attributes.scale,
        "softcap": attributes.softcap,
        "workspace": attributes.workspace,
    }
    spec = Spec("linear_statistics", element, compute, _realize(given), _ABSENT, layouts, constants)
    return list(emit(spec, device).values())


def _backward(
    tangents: dict[str, Any],
    saved: dict[str, Any],
    operands: dict[str, Any],
    active: Any,
    needs: list[str],
    attributes: Attributes,
) -> Sequence[Any]:
    element, compute = _dtypes(operands, attributes)
    if attributes.grad_filter != "exact":
        raise Unsupported(f"there is no template for grad_filter={attributes.grad_filter!r}")
    tangents = {name: t for name, t in tangents.items() if table.TABLE[name].differentiable}
    for name, tangent in tangents.items():
        if tangent.get_dtype() != torch.float32:
            raise Unsupported(f"the tangent of {name} is {tangent.get_dtype()}")
    device = operands["input"].get_device()
    given = dict(operands)
    if active is not None:
        given["active"] = active
    if "lse" in tangents or "entropy" in tangents:
        given |= {name: saved[name] for name in ("lse", "entropy") if name in saved}
    given |= {f"g_{name}": tangent for name, tangent in tangents.items()}
    layouts = {name: _contiguous(device, operands[name].get_dtype(), operands[name].get_size()) for name in needs}
    constants = {
        "tangents": list(tangents),
        "scale": attributes.scale,
        "softcap": attributes.softcap,
        "workspace": attributes.workspace,
    }
    absent = _ABSENT | dict.fromkeys(("lse", "entropy", *(f"g_{name}" for name in table.TABLE)), torch.float32)
    spec = Spec("linear_statistics_backward", element, compute, _realize(given), absent, layouts, constants)
    return list(emit(spec, device).values())


# Operands that a call may leave out. The templates mention them all.
_ABSENT = {
    "bias": torch.float32,
    "target": torch.int64,
    "column_weight": torch.float32,
    "active": torch.bool,
}


def _named(names: str, values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(names.split(), values, strict=True))


def _dtypes(operands: dict[str, Any], attributes: Attributes) -> tuple[torch.dtype, torch.dtype]:
    """(element, compute): the dtype of the GEMMs' operands, and the one that operands are rounded to before."""
    x, weight = operands["input"], operands["weight"]
    if x.get_device().type != "cpu":
        raise Unsupported(f"there is no template for {x.get_device().type}")
    for name, operand in operands.items():
        if name != "target" and operand.get_dtype() not in FLOATS:
            raise Unsupported(f"{name} is {operand.get_dtype()}")
    compute = attributes.compute_dtype or x.get_dtype()
    if compute not in FLOATS:
        raise Unsupported(f"the compute dtype is {compute}")
    if not cpu_vec_isa.pick_vec_isa():
        raise Unsupported("Inductor has no vector instructions for this CPU, or is told not to use them")
    if V.graph.sizevars.statically_known_equals(weight.get_size()[0], 0):
        raise Unsupported("the vocabulary is empty")
    return (torch.bfloat16 if compute == torch.bfloat16 and multiplies_bfloat16() else torch.float32), compute


def multiplies_bfloat16() -> bool:
    """Whether oneDNN's brgemm multiplies bfloat16 natively here, and Inductor compiles for AVX-512."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native and cpu_vec_isa.pick_vec_isa().bit_width() == 512


def _contiguous(device: torch.device, dtype: torch.dtype, size: Sequence[Any]) -> ir.FixedLayout:
    return ir.FixedLayout(device, dtype, list(size), ir.FlexibleLayout.contiguous_strides(size))


def _realize(operands: dict[str, Any]) -> dict[str, Any]:
    """The operands as buffers or strided views of buffers, in memory before the kernel runs."""
    nodes = {}
    for name, operand in operands.items():
        node = ir.ExternKernel.realize_input(operand)
        node.freeze_layout()
        (nodes[name],) = ir.InputsKernel.unwrap_storage([node])
        assert isinstance(nodes[name].get_layout().offset, (int, sympy.Expr))
    return nodes
