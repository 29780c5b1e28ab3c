"""Lowerings for the CPU: which calls the C++ templates can take, and what the templates are given."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._inductor import cpu_vec_isa, ir
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import CeilDiv

from ..filters import Filter
from ..ops import bound, diagnostics
from ..ops import statistics as table
from ..ops.call import Attributes
from .cpu_template import Spec, launch
from .limits import CACHED_SHARE, LEAST_CHUNK, sixteen_bits_hold
from .unsupported import Apart, Unsupported, unsupported_dtype


def forward(
    operands: dict[str, Any],
    row_mask: Any,
    statistics: list[str],
    attributes: Attributes,
    bounded: bool,
    rest: bool = False,
) -> Sequence[Any]:
    if "entries" in operands and rest:
        raise Apart("the target is left out of the tiles that entries would be read from")
    element, compute = dtypes(operands, attributes)
    given = realize(operands | mask(row_mask))
    layouts = statistics_layouts(operands, statistics)
    constants = constants_of(attributes, compute) | {"statistics": statistics, "bounded": bounded, "rest": rest}
    if bounded:
        (n, _), (v, _) = operands["input"].get_size(), operands["weight"].get_size()
        size = [CeilDiv(n, bound.BLOCK), CeilDiv(v, Filter.read(attributes.grad_filter).group)]
        layouts["bound"] = contiguous(operands["input"].get_device(), torch.uint8, size)
    spec = Spec("linear_statistics", element, compute, given, ABSENT, layouts, constants)
    return list(launch(spec, operands["input"].get_device()).values())


def backward(
    tangents: dict[str, Any],
    saved: dict[str, Any],
    operands: dict[str, Any],
    row_mask: Any,
    needs: list[str],
    attributes: Attributes,
    rest: bool = False,
) -> Sequence[Any]:
    """rest: whether `lse` is without the target."""
    filtered = "bound" in saved and "lse" in tangents
    if "entry_logits" in tangents and (filtered or rest):
        raise Apart("a backward that computes some columns only has no entries")
    if "entry_logits" not in tangents:
        operands = {name: t for name, t in operands.items() if name != "entries"}
    element, compute = dtypes(operands, attributes)
    needed = {"target_logit"} if rest else {"target_logit"} & set(tangents)
    needed |= {"entry_logits"} & set(tangents) if attributes.softcap else set()
    if "lse" in tangents or "entropy" in tangents:
        needed |= {"lse", "entropy"}
    if filtered:
        needed |= {"bound", "target_logit"}
    given = operands | mask(row_mask) | {name: t for name, t in saved.items() if name in needed} | prefixed(tangents)
    constants = constants_of(attributes, compute) | {"tangents": list(tangents), "needs": needs, "rest": rest}
    if filtered:
        constants |= _filter(tangents, attributes)
    absent = ABSENT | dict.fromkeys(("lse", "target_logit", "entropy", *prefixed(table.TABLE)), torch.float32)
    layouts = gradient_layouts(operands, needs)
    template = "linear_statistics_filtered_backward" if filtered else "linear_statistics_backward"
    spec = Spec(template, element, compute, realize(given), absent, layouts, constants)
    return list(launch(spec, operands["input"].get_device()).values())


def _filter(tangents: dict[str, Any], attributes: Attributes) -> dict[str, Any]:
    """What the template of a filtered backward is told of the filter. The part that is exact stands apart there."""
    grad_filter = Filter.read(attributes.grad_filter)
    return {
        "tangents": [name for name in tangents if name != "logit_sum"],
        "has_rank_one": "logit_sum" in tangents,
        "tau": repr(grad_filter.value),
        "row_cap": bound.ROW_CAP,
        "sampled": grad_filter.kind == "unbiased",
        "thresholds": ", ".join(map(str, bound.THRESHOLDS)),
        "sample_bits": bound.SAMPLE_BITS,
        "hash_block": bound.HASH_BLOCK,
        "hash_column": bound.HASH_COLUMN,
        "hash_mix": bound.HASH_MIX,
    }


def with_gradients(
    tangents: dict[str, Any],
    operands: dict[str, Any],
    row_mask: Any,
    statistics: list[str],
    needs: list[str],
    attributes: Attributes,
    bounded: bool,
) -> Sequence[Any]:
    element, compute = dtypes(operands, attributes)
    bounded = bounded and "lse" in tangents
    constants = constants_of(attributes, compute) | {
        "statistics": statistics,
        "tangents": list(tangents),
        "needs": needs,
        "kept_share": CACHED_SHARE if element == torch.float32 or sixteen_bits_hold(attributes.softcap) else 0.0,
        "least_chunk": LEAST_CHUNK[element],
        "bounded": bounded,
        "rest": False,
    }
    if bounded:
        constants |= _filter(tangents, attributes)
    given = realize(operands | mask(row_mask) | prefixed(tangents))
    absent = ABSENT | dict.fromkeys(prefixed(table.TABLE), torch.float32)
    layouts = statistics_layouts(operands, statistics) | gradient_layouts(operands, needs)
    spec = Spec("linear_statistics_with_gradients", element, compute, given, absent, layouts, constants)
    return list(launch(spec, operands["input"].get_device()).values())


def prefixed(tangents: Mapping[str, Any]) -> dict[str, Any]:
    """Tangents by the names the templates know them by."""
    return {f"g_{name}": tangent for name, tangent in tangents.items()}


def mask(row_mask: Any) -> dict[str, Any]:
    return {} if row_mask is None else {"row_mask": row_mask}


def constants_of(attributes: Attributes, compute: torch.dtype) -> dict[str, Any]:
    return {
        "scale": attributes.scale,
        "softcap": attributes.softcap,
        "softcap_form": attributes.softcap_form,
        "workspace": attributes.workspace,
        "logit_bytes": compute.itemsize,
        # Of the bound: how many rows and columns share a code, and what it stands for.
        "code_rows": bound.BLOCK,
        "code_columns": Filter.read(attributes.grad_filter).group,
        "code_steps": bound.STEPS,
        "code_offset": bound.OFFSET,
        "code_last": bound.LAST,
        "code_inflation": bound.INFLATION,
        "code_lowering": bound.LOWERING,
    }


def statistics_layouts(operands: dict[str, Any], statistics: list[str]) -> dict[str, ir.Layout]:
    n, device = operands["input"].get_size()[0], operands["input"].get_device()
    dtypes = {name: torch.int64 if table.TABLE[name].integer else torch.float32 for name in statistics}
    sizes = {name: operands["entries"].get_size() for name in statistics if name == "entry_logits"}
    return {name: contiguous(device, dtype, sizes.get(name, [n])) for name, dtype in dtypes.items()}


def gradient_layouts(operands: dict[str, Any], needs: list[str]) -> dict[str, ir.Layout]:
    device = operands["input"].get_device()
    numbers = contiguous(device, torch.float32, [len(diagnostics.NAMES)])
    return {
        name: numbers
        if name == diagnostics.OPERAND
        else contiguous(device, operands[name].get_dtype(), operands[name].get_size())
        for name in needs
    }


# Operands that a call may leave out. The templates mention them all.
ABSENT = {
    "bias": torch.float32,
    "target": torch.int64,
    "row_label": torch.int64,
    "class_label": torch.int64,
    "column_weight": torch.float32,
    "row_scale": torch.float32,
    "column_scale": torch.float32,
    "row_mask": torch.bool,
}


def dtypes(operands: dict[str, Any], attributes: Attributes) -> tuple[torch.dtype, torch.dtype]:
    """(element, compute): the dtype of the GEMMs' operands, and the one that operands are rounded to before."""
    x, weight = operands["input"], operands["weight"]
    compute = attributes.compute_dtype or x.get_dtype()
    reason = unsupported([t.get_dtype() for t in operands.values() if t.get_dtype() != torch.int64], compute)
    if reason:
        raise Unsupported(reason)
    if V.graph.sizevars.statically_known_equals(weight.get_size()[0], 0):
        raise Unsupported("the vocabulary is empty")
    if V.graph.sizevars.statically_known_equals(weight.get_size()[1], 0):
        raise Unsupported("the hidden states have no width")
    return element_dtype(compute), compute


def unsupported(dtypes: Iterable[torch.dtype], compute: torch.dtype) -> str:
    """Why the templates cannot take operands of these dtypes, multiplied in `compute`, on this CPU; or ""."""
    reason = unsupported_dtype([*dtypes, compute])
    if not reason and not cpu_vec_isa.pick_vec_isa():
        reason = "Inductor has no vector instructions for this CPU, or is told not to use them"
    return reason


def element_dtype(compute: torch.dtype) -> torch.dtype:
    """The dtype of the GEMMs' operands for a compute dtype."""
    return torch.bfloat16 if compute == torch.bfloat16 and multiplies_bfloat16() else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether oneDNN's brgemm multiplies bfloat16 natively here, and Inductor compiles for AVX-512."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native and cpu_vec_isa.pick_vec_isa().bit_width() == 512


def contiguous(device: torch.device, dtype: torch.dtype, size: Sequence[Any]) -> ir.FixedLayout:
    return ir.FixedLayout(device, dtype, list(size), ir.FlexibleLayout.contiguous_strides(size))


def realize(operands: dict[str, Any]) -> dict[str, Any]:
    """The operands as buffers or strided views of buffers, in memory before the kernel runs."""
    nodes = {}
    for name, operand in operands.items():
        node: Any = ir.ExternKernel.realize_input(operand)
        node.freeze_layout()
        (stored,) = ir.InputsKernel.unwrap_storage([node])
        assert isinstance(stored, ir.IRNode) and isinstance(stored.get_layout().offset, (int, sympy.Expr))
        nodes[name] = stored
    return nodes
