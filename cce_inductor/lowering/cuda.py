"""Lowerings for CUDA GPUs: the Triton templates of the forward and of the exact backward.

Forward: every program owns a block of rows and a split of the vocabulary; the splits are merged by ordinary reductions
that Inductor generates. Backward: region by region of the logits (schedules.py), dacc is written to the workspace, in
the compute dtype, and two GEMMs read it. No locks, no atomics, no size that depends on data: rows that do not count are
left out by a list of the others, made on the device.
"""

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import empty_strided, fallback_handler, lowerings, to_dtype
from torch._inductor.virtualized import V

from .. import compat
from ..ops import statistics as table
from ..ops.call import Attributes
from ..ops.library import BACKWARD, MM
from .schedule_choice import fastest
from .schedules import Schedule, Sweep, schedules, whole_tiles
from .triton_configs import KEPT_TILE, configurations
from .triton_template import DTYPES, emit
from .unsupported import Unsupported, unsupported_dtype

aten = torch.ops.aten
# A split of the vocabulary should be worth a program of its own.
LEAST_SPLIT = 2048
# What the kernel leaves behind for each statistic, by split.
PARTS = {
    "lse": ["LSE"],
    "target_logit": ["TARGET_LOGIT"],
    "logit_sum": ["LOGIT_SUM"],
    "entropy": ["LSE", "EXPECTED"],
    "argmax": ["BEST", "ARGMAX"],
}


def _op(name: str, *args: Any, **kwargs: Any) -> Any:
    """The lowering of an ATen operator, applied to buffers."""
    packet, _, overload = name.partition(".")
    return lowerings[getattr(getattr(aten, packet), overload or "default")](*args, **kwargs)


class Call:
    """What every kernel of a call needs: operands in memory, the rows that count, options."""

    def __init__(self, operands: dict[str, Any], active: Any, attributes: Attributes):
        self.attributes = attributes
        self.compute = attributes.compute_dtype or operands["input"].get_dtype()
        reason = unsupported_dtype([self.compute, *(t.get_dtype() for n, t in operands.items() if n != "target")])
        if reason:
            raise Unsupported(reason)
        self.given = operands
        self.operands = {name: _in_memory(t) for name, t in operands.items()}
        self.input, self.weight = self.operands["input"], self.operands["weight"]
        self.device = self.input.get_device()
        self.n = self.input.get_size()[0]
        # Kernels with symbolic D and V spill registers; N alone stays symbolic.
        self.d = V.graph.sizevars.guard_int(self.input.get_size()[1])
        self.v = V.graph.sizevars.guard_int(self.weight.get_size()[0])
        if not self.d or not self.v:
            raise Unsupported("the hidden states or the vocabulary are empty")
        self.active = active
        self.rows = {} if active is None else self._compacted(active)

    def _compacted(self, active: Any) -> dict[str, Any]:
        """INDEX, the active rows in order and then the others, and COUNT, how many are active."""
        rank = _op("cumsum", active, 0, dtype=torch.int64)
        rank.realize()
        count = _op("slice.Tensor", rank, 0, self.n - 1, self.n)
        rows = lowerings[torch.ops.prims.iota.default](
            self.n, start=0, step=1, dtype=torch.int64, device=self.device, requires_grad=False
        )
        behind = _op("sub.Tensor", _op("add.Tensor", rows, count), rank)
        place = _op("where.self", active, _op("sub.Tensor", rank, 1), behind)
        index = _op("full", [self.n], 0, dtype=torch.int64, device=self.device)
        return {"INDEX": _in_memory(_op("index_put", index, [place], rows)), "COUNT": _own(count)}

    def named(self, *names: str) -> dict[str, Any]:
        return {name.upper(): self.operands[name] for name in names if name in self.operands}

    @property
    def hint(self) -> int:
        return int(V.graph.sizevars.optimization_hint(self.n, fallback=8192))

    @property
    def static(self) -> bool:
        return isinstance(self.n, (int, sympy.Integer))

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [self.input.get_dtype(), self.weight.get_dtype()]

    def emit(self, kernel: str, inputs: dict, mutated: dict, sizes: Sequence[Any], **constants: Any) -> None:
        precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
        matrices = [self.weight] if "INDEX" in inputs else [self.input, self.weight]
        tma = compat.can_use_tma(*matrices)
        block_n = KEPT_TILE if "KEPT" in mutated else None
        variant = ", kept" * bool(block_n or constants.get("KEPT")) + ", added" * ("DW_SUM" in mutated)
        found = configurations(kernel + variant, self.dtypes, self.compute, self.device, tma, block_n)
        emit(
            kernel,
            inputs,
            mutated,
            self.device,
            sizes,
            found,
            lambda step: self.d % step == 0,
            {
                "COUNT": lambda t: torch.full((1,), self.hint, dtype=torch.int64, device=self.device),
                "INDEX": lambda t: torch.arange(self.hint, device=self.device),
            },
            COMPUTE=DTYPES[self.compute],
            PRECISION=repr(precision),
            SCALE=float(self.attributes.scale),
            SOFTCAP=float(self.attributes.softcap),
            GROUP=8,
            **constants,
        )

    def empty(self, size: Sequence[Any], dtype: torch.dtype) -> Any:
        buffer = empty_strided(list(size), None, dtype=dtype, device=self.device)
        buffer.realize()
        return buffer


def _in_memory(operand: Any) -> Any:
    node = ir.ExternKernel.realize_input(operand)
    node.freeze_layout()
    return node


def _own(operand: Any) -> Any:
    """A buffer of its own: the offset of a view would be part of the kernel's text."""
    copy = _op("clone", operand)
    copy.realize()
    return _in_memory(copy)


def forward(
    operands: dict[str, Any], active: Any, statistics: list[str], attributes: Attributes, bounded: bool
) -> list[Any]:
    if bounded:
        raise Unsupported("no template leaves a bound")
    return _statistics(Call(operands, active, attributes), statistics)


def _statistics(call: Call, statistics: list[str], kept: dict[str, Any] | None = None, pitch: int = 0) -> list[Any]:
    """The forward. `kept`: where it is to leave the logits, (N, pitch)."""
    sms = torch.cuda.get_device_properties(call.device).multi_processor_count
    blocks = max(1, math.ceil(call.hint / 128))
    splits = max(1, min(math.ceil(2 * sms / blocks), call.v // LEAST_SPLIT))
    split = whole_tiles(call.v / splits)
    splits = math.ceil(call.v / split)

    names = dict.fromkeys(name for statistic in statistics for name in PARTS[statistic])
    size = [splits * call.n]
    parts = {name: call.empty(size, torch.int64 if name == "ARGMAX" else torch.float32) for name in names}
    inputs = call.named("input", "weight", "bias", "target", "column_weight") | call.rows
    wanted = repr(" ".join(statistics))
    outputs = parts | (kept or {})
    call.emit("linear_statistics", inputs, outputs, [call.n, splits], SPLIT=split, STATISTICS=wanted, PITCH=pitch)
    merged = _merge({name: _op("view", t, [splits, call.n]) for name, t in parts.items()}, splits)
    results = []
    for name in statistics:
        value = merged[name]
        if call.active is not None:
            value = _op("where.self", call.active, value, 0 if table.TABLE[name].integer else 0.0)
        results.append(value)
    return results


def _merge(parts: dict[str, Any], splits: int) -> dict[str, Any]:
    """Statistics of whole rows from those of the splits, (splits, N)."""

    def total(t: Any) -> Any:
        return _op("select.int", t, 0, 0) if splits == 1 else _op("sum.dim_IntList", t, [0])

    merged = {name.lower(): total(parts[name]) for name in ("TARGET_LOGIT", "LOGIT_SUM") if name in parts}
    share = None
    if "LSE" in parts and splits == 1:
        merged["lse"] = total(parts["LSE"])
    elif "LSE" in parts:
        top = _op("amax", parts["LSE"], [0])
        shift = _op("where.self", _op("isinf", top), 0.0, top)
        power = _op("exp", _op("sub.Tensor", parts["LSE"], _op("unsqueeze", shift, 0)))
        whole = total(power)
        merged["lse"] = _op("add.Tensor", _op("log", whole), shift)
        share = _op("div.Tensor", power, _op("unsqueeze", whole, 0))
    if "EXPECTED" in parts:
        expected = parts["EXPECTED"] if share is None else _op("mul.Tensor", share, parts["EXPECTED"])
        merged["entropy"] = _op("sub.Tensor", merged["lse"], total(expected))
    if "BEST" in parts:
        split = _op("argmax", parts["BEST"], 0, True)
        merged["argmax"] = _op("squeeze.dim", _op("gather", parts["ARGMAX"], 0, split), 0)
    return merged


class Backward:
    """The gradients of a call, made region by region."""

    def __init__(self, call: Call, tangents: dict[str, Any], saved: dict[str, Any], needs: list[str]):
        self.call, self.needs = call, needs
        given = call.named("input", "weight", "bias", "target", "column_weight") | call.rows
        if "lse" in tangents or "entropy" in tangents:
            given |= {name.upper(): _in_memory(saved[name]) for name in ("lse", "entropy") if name in saved}
        given |= {f"G_{name.upper()}": _in_memory(t) for name, t in tangents.items()}
        self.factor = _factor(tangents, call.active) if call.compute == torch.float16 else None
        if self.factor is not None:
            given["FACTOR"] = _in_memory(self.factor)
        self.given = given
        self.results: dict[str, Any] = {}

    def sweep(self, sweep: Sweep, kept: dict[str, Any] | None = None) -> None:
        """One pass over the logits, or over those that the forward `kept`."""
        call = self.call
        rows = sweep.rows if 0 < sweep.rows < call.hint else 0
        add_dx, add_dw = sweep.columns < call.v, bool(rows)
        outputs = self._outputs(sweep.makes, add_dx)
        sums = self._sums(sweep) if add_dw else {}
        # Which gradients our own kernels make.
        dx = {name: t for name, t in outputs.items() if name == "DX" and (add_dx or not sweep.library)}
        dw = {name: t for name, t in outputs.items() if name == "DB" or (name == "DW" and not sweep.library)}
        size = [rows or call.n, sweep.columns]
        dacc = kept["KEPT"] if kept else call.empty(size, call.compute)
        # Where a region begins, in a buffer and not in the kernel's text: one kernel serves all regions.
        for column in range(0, call.v, sweep.columns):
            for position in range(0, call.hint if rows else 1, rows or 1):
                begin = {"BEGIN": _in_memory(_pair(column, position, call.device))}
                region = {"ROWS": rows, "SLAB": sweep.columns}
                inputs = self.given | ({"TOPS": kept["TOPS"]} if kept and "TOPS" in kept else {}) | begin
                keeping = {"KEPT": KEPT_TILE if kept else 0}
                call.emit("linear_statistics_dacc", inputs, {"DACC": dacc}, size, **keeping, **region)
                if sweep.library:
                    others = {name: t for name, t in outputs.items() if name not in dx | dw}
                    self._by_library(dacc, others, column, position, rows)
                inputs = {"DACC": dacc} | call.named("input", "weight") | call.rows | begin
                if dw:
                    given = inputs | ({"FACTOR": self.given["FACTOR"]} if self.factor is not None else {})
                    call.emit("linear_statistics_dw", given, dw | sums, [sweep.columns, call.d], ADD=add_dw, **region)
                if dx:
                    call.emit("linear_statistics_dx", inputs, dx, [rows or call.n, call.d], ADD=add_dx, **region)
        self._finish(outputs)

    def _by_library(self, dacc: Any, outputs: dict[str, Any], column: int, position: int, rows: int) -> None:
        """These gradients of a region, by PyTorch's GEMM."""
        call = self.call
        last, end = min(column + dacc.get_size()[1], call.v), min(position + (rows or call.hint), call.hint)
        dacc = _part(_part(dacc, 0, 0, end - position), 1, 0, last - column)
        if "DW" in outputs:
            x = _part(call.given["input"], 0, position, end)
            _mm(_part(outputs["DW"], 0, column, last), _op("permute", dacc, [1, 0]), x)
        if "DX" in outputs:
            _mm(_part(outputs["DX"], 0, position, end), dacc, _part(call.given["weight"], 0, column, last))

    def _outputs(self, makes: Sequence[str], add_dx: bool) -> dict[str, Any]:
        call, outputs = self.call, {}
        if "weight" in makes:
            outputs["DW"] = call.empty([call.v, call.d], call.weight.get_dtype())
        if "bias" in makes:
            outputs["DB"] = call.empty([call.v], call.operands["bias"].get_dtype())
        if "input" in makes:
            # Multiplied by the factor until the end: no dtype but fp32 will do.
            dtype = torch.float32 if add_dx or self.factor is not None else call.input.get_dtype()
            if call.active is None:
                outputs["DX"] = call.empty([call.n, call.d], dtype)
            else:  # the kernel does not touch the other rows
                outputs["DX"] = _op("full", [call.n, call.d], 0.0, dtype=dtype, device=call.device)
                outputs["DX"].realize()
        return outputs

    def _sums(self, sweep: Sweep) -> dict[str, Any]:
        """What dW and db are added up in over regions of the same columns."""
        call, sums = self.call, {}
        if "weight" in sweep.makes and call.weight.get_dtype() != torch.float32:
            sums["DW_SUM"] = call.empty([sweep.columns, call.d], torch.float32)
        if "bias" in sweep.makes:
            sums["DB_SUM"] = call.empty([sweep.columns], torch.float32)
        return sums

    def _finish(self, outputs: dict[str, Any]) -> None:
        if "DX" in outputs:
            dx = outputs["DX"] if self.factor is None else _op("div.Tensor", outputs["DX"], self.factor)
            self.results["input"] = to_dtype(dx, self.call.input.get_dtype())
        self.results |= {name: outputs[key] for name, key in (("weight", "DW"), ("bias", "DB")) if key in outputs}

    def gradients(self) -> list[Any]:
        return [self.results[name] for name in self.needs]


def _part(t: Any, dim: int, begin: int, end: int) -> Any:
    return _op("slice.Tensor", t, dim, begin, end)


def _mm(out: Any, a: Any, b: Any) -> None:
    fallback_handler(MM, add_to_fallback_set=False)(out, a, b)


def _pair(column: int, position: int, device: torch.device) -> Any:
    """(2,) int64 on the device."""
    rows = lowerings[torch.ops.prims.iota.default](
        2, start=column, step=position - column, dtype=torch.int64, device=device, requires_grad=False
    )
    rows.realize()
    return rows


def backward(
    tangents: dict[str, Any],
    saved: dict[str, Any],
    operands: dict[str, Any],
    active: Any,
    needs: list[str],
    attributes: Attributes,
) -> list[Any]:
    if "bound" in saved:
        raise Unsupported("no template reads a bound")
    call = Call(operands, active, attributes)
    l2 = torch.cuda.get_device_properties(call.device).L2_cache_size
    found = schedules(
        call.hint,
        call.d,
        call.v,
        call.compute,
        call.weight.get_dtype(),
        needs,
        attributes.workspace,
        l2,
        call.static,
        library=active is None and set(call.dtypes) == {call.compute} and call.compute != torch.float16,
    )

    def run(schedule: Schedule) -> list[Any]:
        made = Backward(call, tangents, saved, needs)
        for sweep in schedule.sweeps:
            made.sweep(sweep)
        return made.gradients()

    return fastest(found, run, BACKWARD, tangents, saved, operands, active, needs, attributes)


def _factor(tangents: dict[str, Any], active: Any) -> Any:
    """1 / max |tangent| of the active rows, (1,): dacc in float16 would lose what a mean makes small."""
    largest = None
    for tangent in tangents.values():
        size = _op("abs", tangent)
        size = size if active is None else _op("where.self", active, size, 0.0)
        top = _op("amax", size, [0], True)
        largest = top if largest is None else _op("maximum", largest, top)
    usable = _op("logical_and", _op("gt.Scalar", largest, 0.0), _op("lt.Scalar", largest, math.inf))
    return _op("where.self", usable, _op("reciprocal", largest), 1.0)


def with_gradients(
    tangents: dict[str, Any],
    operands: dict[str, Any],
    active: Any,
    statistics: list[str],
    needs: list[str],
    attributes: Attributes,
    bounded: bool,  # nothing is left out all the same: the logits are there
) -> list[Any]:
    call = Call(operands, active, attributes)
    pitch = whole_tiles(call.v)
    kept = {"KEPT": call.empty([call.n, pitch], call.compute)}
    if call.compute != torch.float32:
        kept["TOPS"] = call.empty([math.ceil(call.v / KEPT_TILE) * call.n], torch.float32)
    # What the second pass reads is needed even if it is no result.
    wanted = list(statistics)
    wanted += [name for name in ("lse", "entropy") if name not in wanted and {name, "entropy"} & set(tangents)]
    stats = dict(zip(wanted, _statistics(call, wanted, kept, pitch), strict=True))
    made = Backward(call, tangents, stats, needs)
    made.sweep(Sweep(0, pitch, tuple(needs)), kept)
    return [*(stats[name] for name in statistics), *made.gradients()]
