"""The eager implementation, which is also the specification: every kernel is tested against it.

Plain tensor algebra over tiles of (block of rows) x (slab of columns), so that the scratch memory stays within the
call's `workspace` whatever N and V are. The backward is slab-major: the logits of a slab are recomputed block by
block, its rows of dW are finished, and dx is added to. Accumulation is in fp32 (fp64 for fp64) and rounded once.

Notation: N rows, D width, V vocabulary; `input` (N, D), `weight` (V, D), `bias` (V,), `target` (N,). With the factors
`row_scale` (N,) and `column_scale` (V,) a logit is `softcap(scale * row_scale * (column_scale * product + bias))`.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from . import diagnostics
from .call import SCALES, Call, cut
from .picked import Picked, picked, picked_logits
from .softcap import capped, capped_and_inner, times_slope
from .statistics import TABLE, Statistic, Tile, finish_all, update_all

# A tile at most: enough for a GEMM to run at its rate, and small enough for the passes over it to run in cache.
BLOCK_ROWS, SLAB_COLUMNS = 1024, 2048


def tile_shape(call: Call, temporaries: int, slab_tensors: int) -> tuple[int, int]:
    """(rows, columns) of a tile whose scratch fits the call's workspace.

    temporaries: how many (rows, columns) tensors live at once. slab_tensors: how many (columns, D) ones do besides the
    casts of the operands.
    """
    (n, d), v = call.input.shape, call.weight.shape[0]
    budget = call.workspace // call.accumulate_dtype.itemsize
    per_row = 8 * max((call.shape(row)[-1] for row in call.rows if "entries" in row.requires), default=0)
    copies = (call.weight.dtype != call.compute_dtype) + (call.compute_dtype != call.accumulate_dtype)
    rows = max(1, min(n, BLOCK_ROWS, budget // (4 * d + 1 + per_row)))
    columns = (budget - rows * (2 * d + per_row)) // (rows * temporaries + d * (copies + slab_tensors))
    return rows, max(1, min(v, SLAB_COLUMNS, columns))


# A slab of columns, or a list of them.
Columns: TypeAlias = slice | Tensor


class Operands:
    """The operands of a call, cast tile by tile and restricted to the active rows."""

    def __init__(self, call: Call):
        self.call = call
        # The positions of the active rows, None where that is all of them.
        self.index = None if call.row_mask is None or call.row_mask.all() else call.row_mask.nonzero()[:, 0]
        self.n = call.input.shape[0] if self.index is None else self.index.shape[0]
        target = call.operands.get("target")
        self.target = None if target is None else self.rows(target, slice(0, self.n))
        entries = call.operands.get("entries")
        self.entries = None if entries is None else self.rows(entries, slice(0, self.n))

    def where(self, block: slice | Tensor) -> slice | Tensor:
        """The rows `block`, counted among the active ones, counted among all."""
        return block if self.index is None else self.index[block]

    def rows(self, tensor: Tensor, block: slice | Tensor) -> Tensor:
        """Rows `block` (counted among the active ones) of a tensor whose first dimension is N."""
        return tensor[self.where(block)]

    def cast(self, tensor: Tensor) -> Tensor:
        """Rounds to the compute dtype, then widens to the accumulation dtype: products of the two are exact."""
        return tensor.to(self.call.compute_dtype).to(self.call.accumulate_dtype)

    def input(self, block: slice | Tensor) -> Tensor:
        return self.cast(self.rows(self.call.input, block))

    def weight(self, slab: Columns) -> Tensor:
        return self.cast(self.call.weight[slab])

    def column(self, name: str, slab: Columns) -> Tensor | None:
        """A (V,) operand's entries of the slab in accumulation dtype, or None."""
        tensor = self.call.operands.get(name)
        return None if tensor is None else tensor[slab].to(self.call.accumulate_dtype)

    def row_scale(self, block: slice) -> Tensor | None:
        """The factors of a block's rows, (rows, 1), in accumulation dtype, or None."""
        tensor = self.call.operands.get("row_scale")
        return None if tensor is None else self.rows(tensor, block).to(self.call.accumulate_dtype)[:, None]

    def product(self, x: Tensor, w: Tensor, slab: Columns) -> Tensor:
        """What is multiplied by the row's factor: column_scale * (x Wᵀ) + bias."""
        factor, bias = self.column("column_scale", slab), self.column("bias", slab)
        if factor is None:
            return F.linear(x, w, bias)
        z = F.linear(x, w).mul_(factor)
        return z if bias is None else z.add_(bias)

    def tile(self, x: Tensor, w: Tensor, block: slice, slab: Columns) -> Tile:
        """The logits of one tile before the softcap. In a list of columns, ascending, targets become positions."""
        z = self.product(x, w, slab)
        row_scale = self.row_scale(block)
        if row_scale is not None:
            z *= row_scale
        if self.call.attributes.scale != 1.0:
            z *= self.call.attributes.scale
        target = None if self.target is None else self.target[block]
        start = 0
        if isinstance(slab, slice):
            start = slab.start
        elif target is not None:
            place = torch.searchsorted(slab, target).clamp(max=max(slab.shape[0] - 1, 0))
            target = torch.where(slab[place] == target, place, -1) if slab.shape[0] else torch.full_like(target, -1)
        entries = None if self.entries is None else self.entries[block]
        return Tile(z, start, target, self.column("column_weight", slab), entries)


def check_targets(operands: Operands) -> None:
    """`check_classes` of the targets and the entries of active rows."""
    for classes in (operands.target, operands.entries):
        if classes is not None:
            check_classes(classes, operands.call.weight.shape[0])


def check_classes(target: Tensor, v: int) -> None:
    """Raises IndexError for a class outside the vocabulary, as F.cross_entropy does on a CPU.

    On an accelerator the check is a device-side assertion: reading the values would wait for the device.
    """
    if target.numel() == 0:
        return
    if target.device.type != "cpu":
        torch._assert_async(((target >= 0) & (target < v)).all())
        return
    low, high = target.aminmax()
    if low < 0 or high >= v:
        wrong = int(low if low < 0 else high)
        raise IndexError(f"Target {wrong} is out of bounds: the vocabulary has {v} classes, 0 to {v - 1}.")


def empty_statistics(call: Call) -> list[Tensor]:
    """What the forward fills in, `Call.shape` each, in accumulation dtype (argmax: int64): 0 in rows not active."""
    dtypes = [torch.int64 if row.integer else call.accumulate_dtype for row in call.rows]
    return [call.input.new_zeros(call.shape(row), dtype=dtype) for row, dtype in zip(call.rows, dtypes, strict=True)]


def forward(call: Call) -> list[Tensor]:
    """The statistics of every row, `Call.shape` each, in accumulation dtype (argmax: int64): 0 in rows not active."""
    operands = Operands(call)
    check_targets(operands)
    out = empty_statistics(call)
    by_name = dict(zip(call.statistics.split(), out, strict=True))
    apart = picked(call, call.rows)
    picked_logits(operands, {row.name: by_name[row.name] for row in apart})
    rows = [row for row in call.rows if row not in apart]
    if not rows:
        return out
    block_rows, columns = tile_shape(call, temporaries=4 if "lse_rest" in call.statistics else 3, slab_tensors=0)
    for block in cut(operands.n, block_rows):
        states: dict = {}
        x = operands.input(block)
        for slab in cut(call.weight.shape[0], columns):
            tile = capped_tile(operands, x, operands.weight(slab), block, slab)
            update_all(rows, states, tile)
        for row, value in zip(rows, finish_all(rows, states), strict=True):
            by_name[row.name][operands.where(block)] = value
    return out


def capped_tile(operands: Operands, x: Tensor, w: Tensor, block: slice, slab: Columns) -> Tile:
    """One tile of logits."""
    tile = operands.tile(x, w, block, slab)
    tile.z = capped(tile.z, operands.call.attributes.softcap, operands.call.attributes.softcap_form)
    return tile


@dataclass
class Gradients:
    """The accumulators of the backward. dx is its own accumulator where it has the accumulation dtype."""

    call: Call
    needs: frozenset[str]
    numbers: Tensor | None = None  # of diagnostics.py

    def __post_init__(self) -> None:
        call, acc = self.call, self.call.accumulate_dtype
        x, w, ops = call.input, call.weight, call.operands
        self.dx = x.new_zeros(x.shape, dtype=acc) if "input" in self.needs else None
        self.dw = w.new_empty(w.shape) if "weight" in self.needs else None
        # Of the (V,) operands, and of the (N,) one.
        of_columns: list[str] = [n for n in ("bias", "column_scale") if n in self.needs]
        self.columns = {n: ops[n].new_empty(ops[n].shape) for n in of_columns}
        self.row_scale = x.new_zeros(x.shape[0], dtype=acc) if "row_scale" in self.needs else None

    def add_to_dx(self, operands: Operands, block: slice, left: Tensor, right: Tensor) -> None:
        """dx of the rows `block` += left @ right."""
        if self.dx is None:
            return
        if operands.index is None:
            self.dx[block].addmm_(left, right)
        else:
            self.dx.index_add_(0, operands.index[block], left @ right)

    def result(self, name: str) -> Tensor:
        results = {"input": self.dx, "weight": self.dw, "row_scale": self.row_scale, "diagnostics": self.numbers}
        tensor = (results | self.columns)[name]
        assert tensor is not None
        return tensor.to(self.call.operands[name].dtype)


def differentiated(tangents: dict[str, Tensor]) -> list[Statistic]:
    """The rows of the table that have a tangent, in its order."""
    return [row for row in TABLE.values() if row.differentiable and row.name in tangents]


def backward(call: Call, tangents: dict[str, Tensor], saved: dict[str, Tensor], needs: list[str]) -> list[Tensor]:
    """The gradients of the operands named in `needs`, in their own dtypes, from every column.

    tangents: (N,) for each statistic that has one. saved: the forward's results by name.
    """
    operands = Operands(call)
    rows = differentiated(tangents)
    if operands.n == 0 or not rows:
        return [call.operands[name].new_zeros(call.operands[name].shape) for name in needs]
    grads = Gradients(call, frozenset(needs))
    apart = picked(call, rows)
    sparse = Picked(operands, grads, {row.name: tangents[row.name] for row in apart}) if apart else None
    rows = [row for row in rows if row not in apart]
    temporaries = 5 if any(row.kind == "signed" for row in rows) else 3
    temporaries += 2 * any(name in needs for name in SCALES)
    slab_accumulator = "weight" in needs and call.weight.dtype != call.accumulate_dtype
    block_rows, columns = tile_shape(call, temporaries, int(slab_accumulator))
    for slab in cut(call.weight.shape[0], columns):
        _backward_slab(operands, grads, rows, tangents, saved, slab, block_rows, sparse)
    grads.numbers = diagnostics.of_exact(operands.n, call.input.device)
    return [grads.result(name) for name in needs]


def _backward_slab(
    operands: Operands,
    grads: Gradients,
    rows: list[Statistic],
    tangents: dict[str, Tensor],
    saved: dict[str, Tensor],
    slab: slice,
    block_rows: int,
    sparse: Picked | None,
) -> None:
    """Finishes dW and the gradients of the (V,) operands of one slab of columns, and adds its share to the others."""
    acc, width = operands.call.accumulate_dtype, slab.stop - slab.start
    in_place = grads.dw is not None and grads.dw.dtype == acc
    dw = None if grads.dw is None else grads.dw[slab] if in_place else torch.empty_like(grads.dw[slab], dtype=acc)
    columns = {name: t.new_zeros(width, dtype=acc) for name, t in grads.columns.items()}
    if rows:
        _add_dense(operands, grads, rows, tangents, saved, slab, block_rows, dw, columns)
    elif dw is not None:
        dw.zero_()
    if sparse is not None:
        sparse.add(slab, dw, columns)
    if grads.dw is not None and dw is not None and not in_place:
        grads.dw[slab] = dw
    for name, part in columns.items():
        grads.columns[name][slab] = part


def _add_dense(
    operands: Operands,
    grads: Gradients,
    rows: list[Statistic],
    tangents: dict[str, Tensor],
    saved: dict[str, Tensor],
    slab: slice,
    block_rows: int,
    dw: Tensor | None,
    columns: dict[str, Tensor],
) -> None:
    """Writes dW of a slab, and adds to the gradients of the (V,) operands and to those of the rows."""
    w = operands.weight(slab)
    factor = operands.column("column_scale", slab)
    for block in cut(operands.n, block_rows):
        x = operands.input(block)
        tile = dlogits(operands, x, w, rows, tangents, saved, block, slab)
        row_scale = operands.row_scale(block)
        if grads.row_scale is not None:
            grads.row_scale[operands.where(block)] += (operands.product(x, w, slab) * tile).sum(1)
        if row_scale is not None:
            tile *= row_scale
        if "bias" in columns:
            columns["bias"] += tile.sum(0)
        if "column_scale" in columns:
            columns["column_scale"] += (F.linear(x, w) * tile).sum(0)
        if factor is not None:
            tile *= factor
        if dw is not None:
            dw.addmm_(tile.t(), x, beta=0 if block.start == 0 else 1)
        grads.add_to_dx(operands, block, tile, w)
        del tile  # before the next one is allocated


def dlogits(
    operands: Operands,
    x: Tensor,
    w: Tensor,
    rows: list[Statistic],
    tangents: dict[str, Tensor],
    saved: dict[str, Tensor],
    block: slice,
    slab: Columns,
) -> Tensor:
    """d loss / d (column_scale x Wᵀ + b) of one tile, in accumulation dtype; the row's factor is still to come."""
    attributes = operands.call.attributes
    tile = operands.tile(x, w, block, slab)
    inner = None
    if attributes.softcap:
        tile.z, inner = capped_and_inner(tile.z, attributes.softcap, attributes.softcap_form)
    known = {name: operands.rows(value, block) for name, value in saved.items()}
    if any(row.uses_softmax for row in rows):
        rest = "lse" not in known
        lse = known["lse_rest"] if rest else known["lse"]
        # Without any other class there is no mass: not that of -inf - -inf.
        lse = torch.where(lse == -torch.inf, torch.inf, lse) if rest else lse
        log_p = known["log_p"] = tile.z.sub_(lse[:, None])
        keep = any(row.kind == "signed" for row in rows)
        p = known["p"] = log_p.exp() if keep else log_p.exp_()
        if rest:
            inside, column = tile.target_position()
            own = torch.where(inside, 0, p.gather(1, column[:, None])[:, 0])
            p.scatter_(1, column[:, None], own[:, None])
    dz: Tensor | None = None
    for row in rows:
        assert row.add_gradient is not None
        dz = row.add_gradient(dz, tile, operands.rows(tangents[row.name], block) * attributes.scale, known)
    assert dz is not None
    # d z / d acc = scale * (d z / d u); the scale is in the tangents already.
    return dz if inner is None else times_slope(dz, inner, attributes.softcap_form)
