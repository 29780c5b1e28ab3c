"""The gradients on a GPU."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.lowering import to_dtype
from torch._inductor.utils import ceildiv

from ..filters import Filter
from ..ops import diagnostics
from ..ops.call import LABELS, SCALES, Attributes
from ..ops.gemm import gives_float32
from ..ops.library import BACKWARD
from . import cuda_budget, cuda_library
from .buffers import in_memory, numbers, op, part, zeros
from .cuda_call import KernelCall
from .cuda_forward import exact, of_products
from .limits import sixteen_bits_hold
from .schedule_choice import fastest
from .schedules import Schedule, Sweep, schedules, whole_tiles
from .triton_configs import CACHED_TILE
from .unsupported import Unsupported

# The outputs of the kernel that goes through the columns of each row, and of the one that goes through the rows.
OF_ROWS, OF_COLUMNS = ("DX", "DROW_SCALE"), ("DW", "DB", "DCOLUMN_SCALE")
# The gradient of a factor is a sum over the width, of what the gradient beside it is made of.
MADE_OF = {"row_scale": "input", "column_scale": "weight"}


class Backward:
    """The gradients of a call, made region by region."""

    def __init__(
        self,
        call: KernelCall,
        tangents: dict[str, Any],
        saved: dict[str, Any],
        needs: list[str],
        in_order: bool = False,
    ):
        """in_order: the rows as they are, so that PyTorch's GEMMs can take them, and not only those that count."""
        self.call, self.needs = call, needs
        self.rows = {} if in_order else call.rows
        given = call.named("input", "weight", "bias", *SCALES, "target", *LABELS, "column_weight")
        given |= call.counted if in_order else call.rows
        if "lse" in tangents or "entropy" in tangents:
            given |= {name.upper(): in_memory(saved[name]) for name in ("lse", "entropy") if name in saved}
        given |= {f"G_{name.upper()}": in_memory(t) for name, t in tangents.items()}
        self.factor = factor(tangents, call.row_mask) if call.compute == torch.float16 else None
        if self.factor is not None:
            given["FACTOR"] = in_memory(self.factor)
        self.given = given
        self.results: dict[str, Any] = {}

    def sweep(self, sweep: Sweep, kept: dict[str, Any] | None = None) -> None:
        """One pass over the logits, or over those that the forward `kept`, or its products."""
        call, making = self.call, Making(self, sweep)
        kept = kept or {}
        dlogits = kept["CACHED"] if "CACHED" in kept else kept.get("PRODUCTS") or call.empty(making.size, call.compute)
        # Where it has their dtype, dlogits takes the place of the products.
        made = None
        if sweep.products and not kept:
            made = dlogits if call.compute == torch.float32 else call.empty(making.size, torch.float32)
        of_kind = {"CACHED": CACHED_TILE * ("CACHED" in kept), "IN_PLACE": made is dlogits or "PRODUCTS" in kept}
        reads = {"TOPS": kept["TOPS"]} if "TOPS" in kept else {}
        reads |= {"PRODUCTS": made} if made is not None and made is not dlogits else {}
        for region in making.regions():
            if made is not None:
                cuda_library.product(call, made, region.column)
            inputs, out = self.given | reads | region.begin, {"DLOGITS": dlogits}
            call.launch("linear_statistics_dlogits", inputs, out, making.size, **of_kind, **making.of)
            making.add(dlogits, region)
        self.finish(making.outputs)

    def outputs(self, makes: Sequence[str], add_dx: bool) -> dict[str, Any]:
        call, outputs = self.call, {}
        # In fp32 it is what sums over regions are kept in, too.
        if "weight" in makes and ("weight" in self.needs or call.weight.get_dtype() == torch.float32):
            outputs["DW"] = call.empty([call.v, call.d], call.weight.get_dtype())
        if "bias" in makes:
            outputs["DB"] = call.empty([call.v], call.operands["bias"].get_dtype())
        if "input" in makes:
            # Multiplied by the factor until the end: no dtype but fp32 will do.
            dtype = torch.float32 if add_dx or self.factor is not None else call.input.get_dtype()
            if not self.rows:
                outputs["DX"] = call.empty([call.n, call.d], dtype)
            else:  # the kernel does not touch the other rows
                outputs["DX"] = zeros([call.n, call.d], dtype, call.device)
        # Of each tile of the width its part. A kernel with wider tiles leaves the last ones as they are.
        tiles = ceildiv(call.d, call.narrowest("linear_statistics_dw", "linear_statistics_dx"))
        if "weight" in makes and "column_scale" in self.needs:
            outputs["DCOLUMN_SCALE"] = zeros([tiles, call.v], torch.float32, call.device)
        if "input" in makes and "row_scale" in self.needs:
            outputs["DROW_SCALE"] = zeros([tiles, call.n], torch.float32, call.device)
        return outputs

    def sums(self, sweep: Sweep) -> dict[str, Any]:
        """What dW and db are added up in over regions of the same columns."""
        call, sums = self.call, {}
        if "weight" in sweep.makes and call.weight.get_dtype() != torch.float32:
            sums["DW_SUM"] = call.empty([sweep.columns, call.d], torch.float32)
        if "bias" in sweep.makes:
            sums["DB_SUM"] = call.empty([sweep.columns], torch.float32)
        return sums

    def finish(self, outputs: dict[str, Any]) -> None:
        for name, key in (("input", "DX"), ("row_scale", "DROW_SCALE")):
            if key in outputs:
                made = outputs[key] if key == "DX" else op("sum.dim_IntList", outputs[key], [0])
                made = made if self.factor is None else op("div.Tensor", made, self.factor)
                self.results[name] = to_dtype(made, self.call.operands[name].get_dtype())
        if "DCOLUMN_SCALE" in outputs:
            made = op("sum.dim_IntList", outputs["DCOLUMN_SCALE"], [0])
            self.results["column_scale"] = to_dtype(made, self.call.operands["column_scale"].get_dtype())
        self.results |= {name: outputs[key] for name, key in (("weight", "DW"), ("bias", "DB")) if key in outputs}

    def gradients(self) -> list[Any]:
        return [self.results[name] for name in self.needs]


@dataclass(frozen=True)
class Region:
    """Where one begins. begin: the same in a buffer and not in a kernel's text: one kernel serves all regions."""

    column: int
    position: int
    begin: dict[str, Any]


class Making:
    """The gradients that a sweep makes of one head, region by region from its dlogits."""

    def __init__(self, made: Backward, sweep: Sweep):
        self.made, self.sweep, call = made, sweep, made.call
        self.rows = rows = sweep.rows if 0 < sweep.rows < call.hint else 0
        # Whether a region's share is added to others'.
        self.add_dx, self.add_dw = sweep.columns < call.v, bool(rows)
        self.outputs = outputs = made.outputs(sweep.makes, self.add_dx)
        self.sums = made.sums(sweep) if self.add_dw else {}
        # What is added up in fp32 is our kernel's where PyTorch's GEMM of 16 bits gives 16.
        ours = not sweep.library or (self.add_dx and call.compute != torch.float32 and not gives_float32())
        self.dx = {name: t for name, t in outputs.items() if name in OF_ROWS and ours}
        self.dw = {name: t for name, t in outputs.items() if name in OF_COLUMNS and not sweep.library}
        # Of what the library multiplies dlogits with.
        self.x = cuda_library.counted_input(call) if sweep.library and "DW" in outputs else None
        self.ones = None
        if sweep.library and "DB" in outputs:
            self.ones = op("full", [call.n, 1], 1.0, dtype=call.compute, device=call.device)
            self.ones.realize()
        self.size = [rows or call.n, sweep.columns]
        self.of = {"ROWS": rows, "SLAB": sweep.columns}

    def regions(self) -> Iterator[Region]:
        call, rows = self.made.call, self.rows
        for column in range(0, call.v, self.sweep.columns):
            for position in range(0, call.hint if rows else 1, rows or 1):
                yield Region(column, position, {"BEGIN": numbers([column, position], call.device)})

    def add(self, dlogits: Any, region: Region) -> None:
        """A region's share."""
        made, call = self.made, self.made.call
        if self.sweep.library:
            others = {name: t for name, t in self.outputs.items() if name not in self.dx | self.dw}
            self._by_library(dlogits, others, region)
        inputs = {"DLOGITS": dlogits} | call.named("input", "weight", *SCALES) | made.rows | region.begin
        if self.dw:
            given = inputs | ({"FACTOR": made.given["FACTOR"]} if made.factor is not None else {})
            results, size = self.dw | self.sums, [self.sweep.columns, call.d]
            call.launch("linear_statistics_dw", given, results, size, ADD=self.add_dw, **self.of)
        if self.dx:
            inputs |= call.named("bias") if "DROW_SCALE" in self.dx else {}
            size = [self.size[0], call.d]
            call.launch("linear_statistics_dx", inputs, self.dx, size, ADD=self.add_dx, **self.of)

    def _by_library(self, dlogits: Any, outputs: dict[str, Any], region: Region) -> None:
        """These gradients of a region, by PyTorch's GEMM."""
        call, column, position = self.made.call, region.column, region.position
        last = min(column + self.sweep.columns, call.v)
        dlogits = part(dlogits, 1, 0, last - column)

        def rows(t: Any) -> Any:
            return part(t, 0, position, min(position + self.rows, call.hint)) if self.rows else t

        if self.rows:
            dlogits = part(dlogits, 0, 0, min(self.rows, call.hint - position))
        transposed = op("permute", dlogits, [1, 0])
        if "DW" in outputs:
            cuda_library.mm(part(outputs["DW"], 0, column, last), transposed, rows(self.x))
        if "DB" in outputs:
            cuda_library.mm(op("unsqueeze", part(outputs["DB"], 0, column, last), 1), transposed, rows(self.ones))
        if "DX" in outputs:
            multiply = cuda_library.add_mm if self.add_dx and column else cuda_library.mm
            multiply(rows(outputs["DX"]), dlogits, part(call.given["weight"], 0, column, last))


def backward(
    tangents: dict[str, Any],
    saved: dict[str, Any],
    operands: dict[str, Any],
    row_mask: Any,
    needs: list[str],
    attributes: Attributes,
    rest: bool = False,
) -> list[Any]:
    bound = saved.get("bound")
    saved = {name: t for name, t in saved.items() if name != "bound"}
    call = KernelCall(operands, row_mask, attributes, rest)
    if diagnostics.OPERAND in needs:
        raise Unsupported("no Triton template leaves diagnostics")
    chosen = Filter.read(attributes.grad_filter)
    if bound is not None and chosen.kind == "budget" and "lse" in tangents and {*tangents} <= {"lse", "target_logit"}:
        made = Backward(call, tangents, saved, needs)
        if cuda_budget.run(made, saved, bound, chosen.value):
            return made.gradients()
    properties = torch.cuda.get_device_properties(call.device)
    found = schedules(
        call.hint,
        call.d,
        call.v,
        call.compute,
        call.weight.get_dtype(),
        made_by_kernels(needs),
        attributes.workspace,
        properties.L2_cache_size,
        call.static,
        library=cuda_library.of_call(call, needs),
        processors=properties.multi_processor_count,
    )

    def run(schedule: Schedule) -> list[Any]:
        made = Backward(call, tangents, saved, needs, in_order=schedule.sweeps[0].library)
        for sweep in schedule.sweeps:
            made.sweep(sweep)
        return made.gradients()

    return fastest(found, run, BACKWARD, tangents, saved, operands, row_mask, needs, attributes)


def made_by_kernels(needs: Sequence[str]) -> tuple[str, ...]:
    """The gradients of input, weight and bias that are made: some for those of factors only."""
    return tuple(dict.fromkeys(MADE_OF.get(name, name) for name in needs))


def factor(tangents: dict[str, Any], row_mask: Any) -> Any:
    """1 / max |tangent| of the active rows, (1,): dlogits in float16 would lose what a mean makes small."""
    largest = None
    for tangent in tangents.values():
        size = op("abs", tangent)
        size = op("where.self", op("lt.Scalar", size, math.inf), size, 0.0)  # a row of NaN, of any factor
        size = size if row_mask is None else op("where.self", row_mask, size, 0.0)
        top = op("amax", size, [0], True)
        largest = top if largest is None else op("maximum", largest, top)
    return op("where.self", op("gt.Scalar", largest, 0.0), op("reciprocal", largest), 1.0)


def _by_statistics(tangents: dict[str, Any], stats: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ops/with_gradients.py does to tangents that are known before the statistics are, and to those."""
    tangents, stats = dict(tangents), dict(stats)
    if "lse" in tangents:
        finite = op("lt.Scalar", op("abs", stats["lse"]), math.inf)
        tangents["lse"] = op("where.self", finite, tangents["lse"], math.nan)
    if "lse_low" in stats:
        factor = op("exp", op("neg", stats["lse_low"]))
        for name in {"lse", "entropy"} & set(tangents):
            tangents[name] = op("mul.Tensor", tangents[name], factor)
        if "entropy" in stats:
            stats["entropy"] = op("sub.Tensor", stats["entropy"], stats["lse_low"])
    return tangents, stats


def with_gradients(
    tangents: dict[str, Any],
    operands: dict[str, Any],
    row_mask: Any,
    statistics: list[str],
    needs: list[str],
    attributes: Attributes,
    bounded: bool,  # nothing is left out all the same: the logits are there
) -> list[Any]:
    call = KernelCall(operands, row_mask, attributes)
    pitch = whole_tiles(call.v)
    kept = None
    by_library = cuda_library.multiplies(call)
    if by_library:
        kept = {"PRODUCTS": call.empty([call.n, pitch], call.compute)}
    elif call.compute == torch.float32 or sixteen_bits_hold(attributes.softcap):
        kept = {"CACHED": call.empty([call.n, pitch], call.compute)}
    if kept is not None and "CACHED" in kept and call.compute != torch.float32:
        kept["TOPS"] = call.empty([math.ceil(call.v / CACHED_TILE) * call.n], torch.float32)
    # What the second pass reads is needed even if it is no result.
    wanted = list(statistics)
    wanted += [name for name in ("lse", "entropy") if name not in wanted and {name, "entropy"} & set(tangents)]
    if kept is not None and by_library:
        cuda_library.product(call, kept["PRODUCTS"], 0)
        found = of_products(call, wanted, pitch, [kept["PRODUCTS"]])
    else:
        found = exact(call, wanted, kept, pitch)
    stats = dict(zip(wanted, found, strict=True))
    results = [stats[name] for name in statistics]
    tangents, stats = _by_statistics(tangents, stats)
    if kept is None:
        return [*results, *backward(tangents, stats, operands, row_mask, needs, attributes)]
    made = Backward(call, tangents, stats, needs, in_order=by_library)
    made.sweep(Sweep(0, pitch, made_by_kernels(needs), by_library, by_library), kept)
    return [*results, *made.gradients()]
