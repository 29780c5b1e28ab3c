"""Lowerings for CUDA GPUs of a loss over two heads: as cuda.py, with the other head's operands beside.

Forward: one kernel forms tiles of both logits on the same rows and classes, and folds them into running sums.
Backward, for each slab of columns: one kernel writes the dlogits of each head that has gradients to the workspace,
and the kernels for the products of one head read them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor.lowering import to_dtype

from ..ops import diagnostics
from ..ops.call import OF_HEAD, OTHER, Attributes
from ..ops.statistics import LSE_OF_BOTH, PAIRS, TABLE
from .buffers import in_memory, op
from .cuda_backward import Backward, Making, made_by_kernels
from .cuda_call import PARTS, KernelCall, launch_for
from .cuda_forward import cut, merge, of_rows
from .schedules import Sweep, slab_columns
from .unsupported import Unsupported

# Statistics of the first head that the kernel has in the form that it has without a second one.
OF_ONE = ("target_logit", "logit_sum", "argmax")


class TwoHeads:
    """The calls of both heads, over the same rows."""

    def __init__(self, operands: dict[str, Any], row_mask: Any, attributes: Attributes):
        theirs = {name.removeprefix(OTHER): t for name, t in operands.items() if name.startswith(OTHER)}
        operands = {name: t for name, t in operands.items() if not name.startswith(OTHER)}
        self.own = KernelCall(operands, row_mask, attributes)
        self.other = KernelCall(theirs, row_mask, attributes.of_other, rows=self.own.rows)

    @property
    def calls(self) -> dict[str, KernelCall]:
        return {"": self.own, OTHER: self.other}

    def launch(self, kernel: str, inputs: dict, mutated: dict, sizes: Sequence[Any], **constants: Any) -> None:
        """Adds a kernel for both to the graph. inputs: what it reads besides the operands."""
        heads = {prefix.upper(): call for prefix, call in self.calls.items()}
        operands = {prefix + name: t for prefix, call in heads.items() for name, t in call.named(*OF_HEAD).items()}
        inputs = operands | self.own.named("target", "column_weight") | self.own.rows | inputs
        launch_for(heads, kernel, inputs, mutated, sizes, **constants)


def forward(
    operands: dict[str, Any],
    row_mask: Any,
    statistics: list[str],
    attributes: Attributes,
    bounded: bool,
) -> list[Any]:
    heads = TwoHeads(operands, row_mask, attributes)
    call = heads.own
    split, splits = cut(call)
    of_one = [name for name in statistics if name in OF_ONE]
    sums = [name for name in statistics if name in ("entropy", *PAIRS)]
    # An expected value of the other logits takes none of their exponentials.
    needs_other = any(name not in (*OF_ONE, "lse", "lse_low", "entropy", "expected_other") for name in statistics)
    names = ["TOP", "TOTAL", *["OTHER_TOP", "OTHER_TOTAL"] * needs_other, *map(str.upper, sums)]
    names += dict.fromkeys(part for name in of_one for part in PARTS[name])
    size = [splits * call.n]
    parts = {name: call.empty(size, torch.int64 if name == "ARGMAX" else torch.float32) for name in names}
    heads.launch("two_heads", {}, parts, [call.n, splits], SPLIT=split, STATISTICS=repr(" ".join(statistics)))
    parts = {name: op("view", t, [splits, call.n]) for name, t in parts.items()}
    merged = merge({part: parts[part] for name in of_one for part in PARTS[name]}, splits)
    return of_rows(call, statistics, merged | _merged(parts, sums))


class _Whole:
    """The log-sum-exp of a head over all splits. In float64: it is made of few numbers, and loses none of their digits.

    top, total: (splits, N), the maxima and the sums of exponentials relative to their shifts.
    """

    def __init__(self, top: Any, total: Any):
        top = to_dtype(top, torch.float64)
        whole = _shift(op("amax", top, [0]))
        # By how much the shift of each split lies above that of all.
        self.change = op("sub.Tensor", _shift(top), op("unsqueeze", whole, 0))
        self.rescale = op("where.self", op("eq.Scalar", top, -math.inf), 0.0, op("exp", self.change))
        self.shift, self.parts = whole, to_dtype(total, torch.float64)
        self.total = self.sum(self.parts)

    def sum(self, parts: Any) -> Any:
        """(N,), of what is relative to the shift of each split."""
        return op("sum.dim_IntList", op("mul.Tensor", parts, self.rescale), [0])

    def lse(self) -> tuple[Any, Any]:
        """The log-sum-exp in float32, and what rounding left of it (0 where that is not finite)."""
        exact = op("add.Tensor", op("log", self.total), self.shift)
        rounded = to_dtype(exact, torch.float32)
        lost = op("sub.Tensor", exact, to_dtype(rounded, torch.float64))
        finite = op("lt.Scalar", op("abs", rounded), math.inf)
        return rounded, to_dtype(op("where.self", finite, lost, 0.0), torch.float32)

    def mean(self, parts: Any, change: Any | None) -> Any:
        """Of what was weighed by this head's softmax. change: of the shifts that it is relative to, None if of none."""
        parts = to_dtype(parts, torch.float64)
        parts = parts if change is None else op("add.Tensor", parts, op("mul.Tensor", change, self.parts))
        return op("div.Tensor", self.sum(parts), self.total)


def _shift(top: Any) -> Any:
    return op("where.self", op("isinf", top), 0.0, top)


def _merged(parts: dict[str, Any], sums: list[str]) -> dict[str, Any]:
    """Statistics that are made of exponentials, by name: of whole rows, from what the splits left, (splits, N)."""
    whole = {p: _Whole(parts[f"{p}TOP"], parts[f"{p}TOTAL"]) for p in ("", OTHER.upper()) if f"{p}TOP" in parts}
    merged = {}
    for prefix, head in whole.items():
        merged[f"{prefix.lower()}lse"], merged[f"{prefix.lower()}lse_low"] = head.lse()
    for name in sums:
        # An entropy is the cross-entropy of a head with itself.
        function, by_other = TABLE[name].pair or ("cross_entropy", False)
        b = whole[OTHER.upper() * by_other]
        if function == "expected":
            merged[name] = to_dtype(b.mean(parts[name.upper()], None), torch.float32)
            continue
        a = b if name == "entropy" else whole[OTHER.upper() * (not by_other)]
        change, total = op("neg", a.change), a.total
        if function == "divergence":
            # Of the quotient, and not the difference of two logarithms: of equal heads it is 1.
            change, total = op("add.Tensor", b.change, change), op("div.Tensor", total, b.total)
        value = op("add.Tensor", op("log", total), b.mean(parts[name.upper()], change))
        merged[name] = to_dtype(value, torch.float32)
    return merged


class _Gradients:
    """Of one head."""

    def __init__(self, call: KernelCall, tangents: dict[str, Any], needs: list[str], slab: int):
        self.made = Backward(call, tangents, {}, needs)
        self.making = Making(self.made, Sweep(0, slab, made_by_kernels(needs)))
        self.dlogits = call.empty(self.making.size, call.compute)

    def finish(self) -> dict[str, Any]:
        """By name."""
        self.made.finish(self.making.outputs)
        return self.made.results


def backward(
    tangents: dict[str, Any],
    saved: dict[str, Any],
    operands: dict[str, Any],
    row_mask: Any,
    needs: list[str],
    attributes: Attributes,
) -> list[Any]:
    pairs = [name for name in PAIRS if name in tangents]
    if not pairs:
        raise Unsupported("no tangent of a function of both heads")
    if diagnostics.OPERAND in needs:
        raise Unsupported("no Triton template leaves diagnostics")
    heads = TwoHeads(operands, row_mask, attributes)
    needed = {"": [n for n in needs if not n.startswith(OTHER)], OTHER: [n for n in needs if n.startswith(OTHER)]}
    calls = {prefix: call for prefix, call in heads.calls.items() if needed[prefix]}
    item = sum(call.compute.itemsize for call in calls.values())
    slab = slab_columns(heads.own.hint, heads.own.v, item, attributes.workspace)
    both = {p: _Gradients(call, tangents, [n.removeprefix(p) for n in needed[p]], slab) for p, call in calls.items()}
    given = _of_rows(tangents, saved, pairs)
    given |= {f"{p}FACTOR".upper(): of.made.given["FACTOR"] for p, of in both.items() if of.made.factor is not None}
    dlogits = {f"{prefix}DLOGITS".upper(): of.dlogits for prefix, of in both.items()}
    making = next(iter(both.values())).making
    for region in making.regions():
        heads.launch("two_heads_dlogits", given | region.begin, dlogits, making.size, **making.of)
        for of in both.values():
            of.making.add(of.dlogits, region)
    results = {prefix + name: t for prefix, of in both.items() for name, t in of.finish().items()}
    return [results[name] for name in needs]


def _of_rows(tangents: dict[str, Any], saved: dict[str, Any], pairs: list[str]) -> dict[str, Any]:
    """What the kernel of the backward reads of the rows: statistics, and tangents."""
    one_sided = pairs == ["expected_other"]
    names = [*(name for name in LSE_OF_BOTH if not (one_sided and name.startswith(OTHER))), *pairs]
    names += ["entropy"] if "entropy" in tangents else []
    found = {name.upper(): in_memory(saved[name]) for name in names}
    return found | {f"G_{name.upper()}": in_memory(t) for name, t in tangents.items()}
