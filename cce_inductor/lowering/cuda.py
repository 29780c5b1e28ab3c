"""Lowerings for CUDA GPUs: the Triton templates of the forward and of the exact backward.

Forward: every program owns a block of rows and a split of the vocabulary; the splits are merged by ordinary reductions
that Inductor generates. Backward: region by region of the logits (schedules.py), dacc is written to the workspace, in
the compute dtype, and two GEMMs read it. No locks, no atomics, no size that depends on data: rows that do not count are
left out by a list of the others, made on the device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._inductor.lowering import empty_strided, fallback_handler, to_dtype
from torch._inductor.utils import ceildiv
from torch._inductor.virtualized import V

from .. import compat
from ..ops import diagnostics
from ..ops import statistics as table
from ..ops.bound import BLOCK, INFLATION, LAST, LOWERING, OFFSET, STEPS
from ..ops.call import Attributes
from ..ops.filters import Filter
from ..ops.library import BACKWARD, MM
from . import budget
from .buffers import in_memory, iota, numbers, op, own, part, zeros
from .choose import sixteen_bits_hold
from .schedule_choice import fastest
from .schedules import Schedule, Sweep, rounds, schedules, whole_tiles
from .triton_configs import KEPT_TILE, configurations
from .triton_template import DTYPES, emit
from .unsupported import Unsupported, unsupported_dtype

# A split of the vocabulary should be worth a program of its own.
LEAST_SPLIT = 2048
# What the kernel leaves behind for each statistic, by split.
PARTS = {
    "lse": ["LSE"],
    "lse_low": ["LSE", "LSE_LOW"],
    "target_logit": ["TARGET_LOGIT"],
    "logit_sum": ["LOGIT_SUM"],
    "entropy": ["LSE", "ENTROPY"],
    "argmax": ["BEST", "ARGMAX"],
}


class Call:
    """What every kernel of a call needs: operands in memory, the rows that count, options."""

    def __init__(self, operands: dict[str, Any], active: Any, attributes: Attributes):
        self.attributes = attributes
        self.compute = attributes.compute_dtype or operands["input"].get_dtype()
        reason = unsupported_dtype([self.compute, *(t.get_dtype() for n, t in operands.items() if n != "target")])
        if reason:
            raise Unsupported(reason)
        self.given = operands
        self.operands = {name: in_memory(t) for name, t in operands.items()}
        self.input, self.weight = self.operands["input"], self.operands["weight"]
        self.device = self.input.get_device()
        self.n = self.input.get_size()[0]
        # Kernels with symbolic D and V spill registers; N alone stays symbolic.
        self.d = V.graph.sizevars.guard_int(self.input.get_size()[1])
        self.v = V.graph.sizevars.guard_int(self.weight.get_size()[0])
        if not self.d or not self.v:
            raise Unsupported("the hidden states or the vocabulary are empty")
        self.active = active
        # How the autotuner is to fill inputs that cannot hold anything.
        self.examples: dict[str, Callable[[Any], torch.Tensor]] = {}
        self.rows = {} if active is None else self._compacted(active)

    def _compacted(self, active: Any) -> dict[str, Any]:
        """INDEX, the active rows in order and then the others, and COUNT, how many are active."""
        rank = op("cumsum", active, 0, dtype=torch.int64)
        rank.realize()
        count = op("slice.Tensor", rank, 0, self.n - 1, self.n)
        rows = iota(self.n, self.device)
        behind = op("sub.Tensor", op("add.Tensor", rows, count), rank)
        place = op("where.self", active, op("sub.Tensor", rank, 1), behind)
        index = op("full", [self.n], 0, dtype=torch.int64, device=self.device)
        return {"INDEX": in_memory(op("index_put", index, [place], rows)), "COUNT": own(count)}

    def named(self, *names: str) -> dict[str, Any]:
        return {name.upper(): self.operands[name] for name in names if name in self.operands}

    @property
    def precision(self) -> str:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"

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
        matrices = [self.weight] if "INDEX" in inputs else [self.input, self.weight]
        tma = compat.can_use_tma(*matrices)
        block_n = KEPT_TILE if "KEPT" in mutated else None
        variant = ", kept" * bool("KEPT" in mutated or constants.get("KEPT")) + ", added" * ("DW_SUM" in mutated)
        variant += ", bound" * ("BOUND" in mutated)
        block_m = BLOCK if "BOUND" in mutated else None
        if kernel == "budget_dacc":
            block_n = constants["CHUNK"]
        found = configurations(kernel + variant, self.dtypes, self.compute, self.device, tma, block_n, block_m)
        emit(
            kernel,
            inputs,
            mutated,
            self.device,
            sizes,
            found,
            lambda step: self.d % step == 0,
            {
                **self.examples,
                "COUNT": lambda t: torch.full((1,), self.hint, dtype=torch.int64, device=self.device),
                "INDEX": lambda t: torch.arange(self.hint, device=self.device),
                "ROUND": lambda t: torch.tensor([0, min(whole_tiles(self.v), 4096), self.v, 0], device=self.device),
            },
            KERNEL=repr(kernel + variant),
            COMPUTE=DTYPES[self.compute],
            PRECISION=repr(self.precision),
            SCALE=float(self.attributes.scale),
            SOFTCAP=float(self.attributes.softcap),
            SOFTCAP_FORM=repr(self.attributes.softcap_form),
            GROUP=8,
            **constants,
        )

    def empty(self, size: Sequence[Any], dtype: torch.dtype) -> Any:
        buffer = empty_strided(list(size), None, dtype=dtype, device=self.device)
        buffer.realize()
        return buffer


def forward(
    operands: dict[str, Any], active: Any, statistics: list[str], attributes: Attributes, bounded: bool
) -> list[Any]:
    call = Call(operands, active, attributes)
    if not bounded:
        return _statistics(call, statistics)
    chosen = Filter.read(attributes.grad_filter)
    if chosen.group > 1:
        raise Unsupported("no Triton template has groups of columns")
    if chosen.kind == "unbiased":
        # Nothing is sampled here: the exact gradient is unbiased. Should another backward read the bound, it says so.
        every = op("full", [ceildiv(call.n, BLOCK), call.v], LAST, dtype=torch.uint8, device=call.device)
        return [*_statistics(call, statistics), every]
    return _statistics_and_bound(call, statistics)


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
    return _results(call, statistics, parts, splits)


def _results(call: Call, statistics: list[str], parts: dict[str, Any], splits: int) -> list[Any]:
    """The statistics, 0 in rows that do not count."""
    merged = _merge({name: op("view", t, [splits, call.n]) for name, t in parts.items()}, splits)
    results = []
    for name in statistics:
        value = merged[name]
        if call.active is not None:
            value = op("where.self", call.active, value, 0 if table.TABLE[name].integer else 0.0)
        results.append(value)
    return results


def _statistics_and_bound(call: Call, statistics: list[str]) -> list[Any]:
    """The forward in rounds, and the bound that it leaves (ops/bound.py)."""
    sms = torch.cuda.get_device_properties(call.device).multi_processor_count
    found = rounds(max(1, math.ceil(call.hint / BLOCK)), call.v, sms)
    splits = sum(each.splits for each in found)
    names = dict.fromkeys(name for statistic in statistics for name in PARTS[statistic])
    size = [splits * call.n]
    parts = {name: call.empty(size, torch.int64 if name == "ARGMAX" else torch.float32) for name in names}
    bound = zeros([ceildiv(call.n, BLOCK), call.v], torch.uint8, call.device)
    # Only where the backward knows its logit is the target left out.
    with_target = "target" in call.operands and "target_logit" in statistics
    inputs = call.named("input", "weight", "bias", "column_weight", *["target"] * with_target) | call.rows
    # Products in tf32 are not those of the early logits.
    if with_target and (call.compute != torch.float32 or call.precision == "ieee"):
        given = call.named("input", "weight", "bias", "target")
        inputs["EARLY"] = early = call.empty([call.n], torch.float32)
        call.emit("linear_statistics_early", given, {"EARLY": early}, [call.n], LOWERING=LOWERING)
    wanted = repr(" ".join(statistics))
    before = op("full", [call.n], -math.inf, dtype=torch.float32, device=call.device)
    for each in found:
        position = numbers([each.begin, each.width, each.end, each.before], call.device)
        given = inputs | {"BEFORE": in_memory(before), "ROUND": position}
        constants = {"OFFSET": OFFSET, "STEPS": float(STEPS), "INFLATION": INFLATION}
        outputs = parts | {"BOUND": bound}
        call.emit("linear_statistics", given, outputs, [call.n, each.splits], STATISTICS=wanted, PITCH=0, **constants)
        done = each.before + each.splits
        if done < splits:
            lse = part(op("view", parts["LSE"], [splits, call.n]), 0, 0, done)
            before = _merge({"LSE": lse}, done)["lse"]
    return [*_results(call, statistics, parts, splits), bound]


def _merge(parts: dict[str, Any], splits: int) -> dict[str, Any]:
    """Statistics of whole rows from those of the splits, (splits, N)."""

    def total(t: Any) -> Any:
        return op("select.int", t, 0, 0) if splits == 1 else op("sum.dim_IntList", t, [0])

    merged = {name.lower(): total(parts[name]) for name in ("TARGET_LOGIT", "LOGIT_SUM") if name in parts}
    share = None
    if splits == 1:
        merged |= {name.lower(): total(parts[name]) for name in ("LSE", "LSE_LOW", "ENTROPY") if name in parts}
    elif "LSE" in parts:
        top = op("amax", parts["LSE"], [0])
        shift = op("where.self", op("isinf", top), 0.0, top)
        below = op("sub.Tensor", parts["LSE"], op("unsqueeze", shift, 0))
        below = op("add.Tensor", below, parts["LSE_LOW"]) if "LSE_LOW" in parts else below
        power = op("exp", below)
        whole = total(power)
        log = op("log", whole)
        merged["lse"] = op("add.Tensor", log, shift)
        if "LSE_LOW" in parts:
            merged["lse_low"] = _lost(log, shift, merged["lse"])
        log_share = op("sub.Tensor", below, op("unsqueeze", log, 0))
        share = op("exp", log_share)
    if "ENTROPY" in parts and share is not None:
        # Of which split a class is in, and of the classes within it. A share of 0 has none of either.
        each = op("mul.Tensor", share, op("sub.Tensor", parts["ENTROPY"], log_share))
        merged["entropy"] = total(op("where.self", op("eq.Scalar", share, 0), 0.0, each))
    if "BEST" in parts:
        split = op("argmax", parts["BEST"], 0, True)
        merged["argmax"] = op("squeeze.dim", op("gather", parts["ARGMAX"], 0, split), 0)
    return merged


def _lost(a: Any, b: Any, whole: Any) -> Any:
    """What rounding left of whole = a + b (Knuth's TwoSum); 0 where that is not finite."""
    of_b = op("sub.Tensor", whole, a)
    lost = op("add.Tensor", op("sub.Tensor", a, op("sub.Tensor", whole, of_b)), op("sub.Tensor", b, of_b))
    return op("where.self", op("lt.Scalar", op("abs", whole), math.inf), lost, 0.0)


class Backward:
    """The gradients of a call, made region by region."""

    def __init__(self, call: Call, tangents: dict[str, Any], saved: dict[str, Any], needs: list[str]):
        self.call, self.needs = call, needs
        given = call.named("input", "weight", "bias", "target", "column_weight") | call.rows
        if "lse" in tangents or "entropy" in tangents:
            given |= {name.upper(): in_memory(saved[name]) for name in ("lse", "entropy") if name in saved}
        given |= {f"G_{name.upper()}": in_memory(t) for name, t in tangents.items()}
        self.factor = _factor(tangents, call.active) if call.compute == torch.float16 else None
        if self.factor is not None:
            given["FACTOR"] = in_memory(self.factor)
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
                begin = {"BEGIN": numbers([column, position], call.device)}
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
        dacc = part(part(dacc, 0, 0, end - position), 1, 0, last - column)
        if "DW" in outputs:
            x = part(call.given["input"], 0, position, end)
            _mm(part(outputs["DW"], 0, column, last), op("permute", dacc, [1, 0]), x)
        if "DX" in outputs:
            _mm(part(outputs["DX"], 0, position, end), dacc, part(call.given["weight"], 0, column, last))

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
                outputs["DX"] = zeros([call.n, call.d], dtype, call.device)
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
            dx = outputs["DX"] if self.factor is None else op("div.Tensor", outputs["DX"], self.factor)
            self.results["input"] = to_dtype(dx, self.call.input.get_dtype())
        self.results |= {name: outputs[key] for name, key in (("weight", "DW"), ("bias", "DB")) if key in outputs}

    def gradients(self) -> list[Any]:
        return [self.results[name] for name in self.needs]


def _mm(out: Any, a: Any, b: Any) -> None:
    fallback_handler(MM, add_to_fallback_set=False)(out, a, b)


def backward(
    tangents: dict[str, Any],
    saved: dict[str, Any],
    operands: dict[str, Any],
    active: Any,
    needs: list[str],
    attributes: Attributes,
) -> list[Any]:
    bound = saved.get("bound")
    saved = {name: t for name, t in saved.items() if name != "bound"}
    call = Call(operands, active, attributes)
    if diagnostics.OPERAND in needs:
        raise Unsupported("no Triton template leaves diagnostics")
    chosen = Filter.read(attributes.grad_filter)
    if bound is not None and chosen.kind == "budget" and "lse" in tangents and {*tangents} <= {"lse", "target_logit"}:
        made = Backward(call, tangents, saved, needs)
        if budget.run(made, saved, bound, chosen.value):
            return made.gradients()
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
        size = op("abs", tangent)
        size = op("where.self", op("lt.Scalar", size, math.inf), size, 0.0)  # a row of NaN, of any factor
        size = size if active is None else op("where.self", active, size, 0.0)
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
    active: Any,
    statistics: list[str],
    needs: list[str],
    attributes: Attributes,
    bounded: bool,  # nothing is left out all the same: the logits are there
) -> list[Any]:
    call = Call(operands, active, attributes)
    pitch = whole_tiles(call.v)
    kept = None
    if call.compute == torch.float32 or sixteen_bits_hold(attributes.softcap):
        kept = {"KEPT": call.empty([call.n, pitch], call.compute)}
    if kept is not None and call.compute != torch.float32:
        kept["TOPS"] = call.empty([math.ceil(call.v / KEPT_TILE) * call.n], torch.float32)
    # What the second pass reads is needed even if it is no result.
    wanted = list(statistics)
    wanted += [name for name in ("lse", "entropy") if name not in wanted and {name, "entropy"} & set(tangents)]
    stats = dict(zip(wanted, _statistics(call, wanted, kept, pitch), strict=True))
    results = [stats[name] for name in statistics]
    tangents, stats = _by_statistics(tangents, stats)
    if kept is None:
        return [*results, *backward(tangents, stats, operands, active, needs, attributes)]
    made = Backward(call, tangents, stats, needs)
    made.sweep(Sweep(0, pitch, tuple(needs)), kept)
    return [*results, *made.gradients()]
