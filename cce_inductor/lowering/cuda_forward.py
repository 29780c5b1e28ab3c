"""The statistics on a GPU: one pass over the logits, with the vocabulary in splits that are merged at the end."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch._inductor.utils import ceildiv

from ..filters import Filter
from ..ops import statistics as table
from ..ops.bound import BLOCK, INFLATION, LAST, LOWERING, OFFSET, STEPS
from ..ops.call import LABELS, SCALES, Attributes
from .buffers import in_memory, numbers, op, part, zeros
from .cuda_call import LEAST_SPLIT, PARTS, KernelCall
from .cuda_library import alone, products
from .schedules import full_waves, rounds, slab_columns, whole_tiles
from .unsupported import Unsupported


def forward(
    operands: dict[str, Any],
    row_mask: Any,
    statistics: list[str],
    attributes: Attributes,
    bounded: bool,
    rest: bool = False,
) -> list[Any]:
    call = KernelCall(operands, row_mask, attributes, rest)
    if not bounded:
        return exact(call, statistics)
    chosen = Filter.read(attributes.grad_filter)
    if chosen.group > 1:
        raise Unsupported("no Triton template has groups of columns")
    if chosen.kind == "unbiased":
        # Nothing is sampled here: the exact gradient is unbiased. Should another backward read the bound, it says so.
        every = op("full", [ceildiv(call.n, BLOCK), call.v], LAST, dtype=torch.uint8, device=call.device)
        return [*exact(call, statistics), every]
    return _statistics_and_bound(call, statistics)


def exact(call: KernelCall, statistics: list[str], kept: dict[str, Any] | None = None, pitch: int = 0) -> list[Any]:
    """The forward. `kept`: where it is to leave the logits, (N, pitch)."""
    if kept is None and alone(call):
        columns = slab_columns(call.hint, call.v, 4, call.attributes.workspace)
        return of_products(call, statistics, columns, products(call, columns))
    split, splits = cut(call)
    names = dict.fromkeys(name for statistic in statistics for name in PARTS[statistic])
    size = [splits * call.n]
    parts = {name: call.empty(size, torch.int64 if name == "ARGMAX" else torch.float32) for name in names}
    inputs = call.named("input", "weight", "bias", *SCALES, "target", *LABELS, "column_weight") | call.rows
    wanted = repr(" ".join(statistics))
    outputs = parts | (kept or {})
    call.launch("linear_statistics", inputs, outputs, [call.n, splits], SPLIT=split, STATISTICS=wanted, PITCH=pitch)
    return _results(call, statistics, parts, splits)


def of_products(call: KernelCall, statistics: list[str], columns: int, made: Iterable[Any]) -> list[Any]:
    """The forward from products of PyTorch's GEMM, (N, columns), slab by slab in the order of the columns."""
    sms = torch.cuda.get_device_properties(call.device).multi_processor_count
    # A program has few rows: as a rule there are enough of them.
    width = whole_tiles(columns / full_waves(math.ceil(call.hint / 8), 4 * sms, columns // LEAST_SPLIT))
    slabs = [(begin, min(begin + columns, call.v)) for begin in range(0, call.v, columns)]
    splits = [math.ceil((end - begin) / width) for begin, end in slabs]
    names = dict.fromkeys(name for statistic in statistics for name in PARTS[statistic])
    size = [sum(splits) * call.n]
    parts = {name: call.empty(size, torch.int64 if name == "ARGMAX" else torch.float32) for name in names}
    call.examples["ROUND"] = lambda _: torch.tensor([0, width, slabs[0][1], 0], device=call.device)
    inputs = call.named("input", "weight", "bias", "target", *LABELS, "column_weight")
    constants = {"STATISTICS": repr(" ".join(statistics)), "PITCH": columns}
    for i, ((begin, end), slab) in enumerate(zip(slabs, made, strict=True)):
        given = {"PRODUCTS": slab, "ROUND": numbers([begin, width, end, sum(splits[:i])], call.device)}
        call.launch("linear_statistics", inputs | given, parts, [call.n, splits[i]], **constants)
    return _results(call, statistics, parts, sum(splits))


def cut(call: KernelCall) -> tuple[int, int]:
    """Columns of a split of the vocabulary, and how many there are: as many as keep every multiprocessor busy."""
    sms = torch.cuda.get_device_properties(call.device).multi_processor_count
    blocks = max(1, math.ceil(call.hint / 128))
    splits = full_waves(blocks, sms, call.v // LEAST_SPLIT)
    split = whole_tiles(call.v / splits)
    return split, math.ceil(call.v / split)


def _results(call: KernelCall, statistics: list[str], parts: dict[str, Any], splits: int) -> list[Any]:
    """The statistics, from those of the splits."""
    return of_rows(
        call, statistics, merge({name: op("view", t, [splits, call.n]) for name, t in parts.items()}, splits)
    )


def of_rows(call: KernelCall, statistics: list[str], merged: dict[str, Any]) -> list[Any]:
    """The statistics by name, 0 in rows that do not count."""
    results = []
    for name in statistics:
        value = merged[name]
        if call.row_mask is not None:
            value = op("where.self", call.row_mask, value, 0 if table.TABLE[name].integer else 0.0)
        results.append(value)
    return results


def _statistics_and_bound(call: KernelCall, statistics: list[str]) -> list[Any]:
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
        call.launch("linear_statistics_early", given, {"EARLY": early}, [call.n], LOWERING=LOWERING)
    wanted = repr(" ".join(statistics))
    before = op("full", [call.n], -math.inf, dtype=torch.float32, device=call.device)
    for each in found:
        position = numbers([each.begin, each.width, each.end, each.before], call.device)
        given = inputs | {"BEFORE": in_memory(before), "ROUND": position}
        constants = {"OFFSET": OFFSET, "STEPS": float(STEPS), "INFLATION": INFLATION}
        outputs = parts | {"BOUND": bound}
        call.launch("linear_statistics", given, outputs, [call.n, each.splits], STATISTICS=wanted, PITCH=0, **constants)
        done = each.before + each.splits
        if done < splits:
            lse = part(op("view", parts["LSE"], [splits, call.n]), 0, 0, done)
            before = merge({"LSE": lse}, done)["lse"]
    return [*_results(call, statistics, parts, splits), bound]


def merge(parts: dict[str, Any], splits: int) -> dict[str, Any]:
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
