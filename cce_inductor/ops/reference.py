"""The eager implementation, which is also the specification: every kernel is tested against it.

Plain tensor algebra over tiles of (block of rows) x (slab of columns), so that the scratch memory stays within the
call's `workspace` whatever N and V are. The backward is slab-major: the logits of a slab are recomputed block by
block, its rows of dW are finished, and dx is added to. Accumulation is in fp32 (fp64 for fp64) and rounded once.

Notation: N rows, D width, V vocabulary; `input` (N, D), `weight` (V, D), `bias` (V,), `target` (N,). With the factors
`row_scale` (N,) and `column_scale` (V,) a logit is `softcap(scale * row_scale * (column_scale * product + bias))`.
"""

import functools
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from . import diagnostics
from .call import OF_HEAD, OTHER, SCALES, Call, cut
from .pairs import Side, gradient_of_values, gradient_of_weights
from .picked import Picked, picked, picked_logits
from .softcap import capped, capped_and_inner, times_slope
from .statistics import TABLE, Statistic, Tile, fill_left_out, finish_all, in_order, update_all
from .strips import gradient, summed

# A tile at most: enough for a GEMM to run at its rate, and small enough for the passes over it to run in cache.
BLOCK_ROWS, SLAB_COLUMNS = 1024, 2048


def tile_shape(
    call: Call, temporaries: int, slab_tensors: int, workspace: int | None = None, most_rows: int | None = None
) -> tuple[int, int]:
    """(rows, columns) of a tile whose scratch fits the call's workspace, or that which is given.

    temporaries: how many (rows, columns) tensors live at once. slab_tensors: how many (columns, D) ones do besides the
    casts of the operands.
    """
    (n, d), v = call.input.shape, call.weight.shape[0]
    d += call.other.input.shape[1] if call.other is not None else 0
    budget = (call.workspace if workspace is None else workspace) // call.accumulate_dtype.itemsize
    per_row = 8 * max((call.shape(row)[-1] for row in call.rows if "entries" in row.requires), default=0)
    copies = (call.weight.dtype != call.compute_dtype) + (call.compute_dtype != call.accumulate_dtype)
    rows = max(1, min(n, BLOCK_ROWS if most_rows is None else most_rows, budget // (4 * d + 1 + per_row)))
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
        same_label = self.same_label(block, slab)
        return Tile(z, start, target, self.column("column_weight", slab), entries, same_label=same_label)

    def same_label(self, block: slice, slab: Columns) -> Tensor | None:
        """(rows, columns): where the class has the row's label, or None without labels."""
        if "class_label" not in self.call.operands:
            return None
        own = self.rows(self.call.operands["row_label"], block)
        return own[:, None] == self.call.operands["class_label"][slab]


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
    rows = [row for row in call.rows if row not in apart and row.divergence is None]
    if not rows:
        return out
    other = None if call.other is None else Operands(call.other)
    divergences = [row for row in call.rows if row.divergence is not None]
    block_rows, columns, keep = _forward_shape(call, bool(divergences))
    for block in cut(operands.n, block_rows):
        states: dict = {}
        logits = BlockOfRows(operands, other, block)
        kept = []
        for slab in cut(call.weight.shape[0], columns):
            tile = logits.tile(slab)
            update_all(rows, states, tile)
            if keep:
                kept.append(tile)
            del tile  # before the next one
        found = {row.name: value for row, value in zip(rows, finish_all(rows, states), strict=True)}
        if divergences:
            again = map(logits.tile, cut(call.weight.shape[0], columns))
            found |= summed(divergences, kept if keep else again, found)
        del kept  # before the next block
        for name, value in found.items():
            by_name[name][operands.where(block)] = value
    return out


# Rows at least whose logits of both heads are kept until divergences of them are summed.
_KEPT_ROWS = 128


def _forward_shape(call: Call, divergences: bool) -> tuple[int, int, bool]:
    """`tile_shape` of a forward, and whether all tiles of a block are kept: where that many rows of them fit."""
    two_heads, v = call.other is not None, call.weight.shape[0]
    temporaries = 12 if divergences else 8 if two_heads else 4 if "lse_rest" in call.statistics else 3
    fit = call.workspace * 3 // 4 // max(1, 2 * v * call.accumulate_dtype.itemsize)
    if not divergences or fit < min(call.input.shape[0], _KEPT_ROWS):
        return *tile_shape(call, temporaries, slab_tensors=0), False
    return *tile_shape(call, temporaries, 0, call.workspace // 4, min(fit, BLOCK_ROWS)), True


class BlockOfRows:
    """The logits of some rows, tile by tile."""

    def __init__(self, operands: Operands, other: Operands | None, block: slice) -> None:
        self.operands, self.other, self.block = operands, other, block
        self.x = operands.input(block)
        self.y = None if other is None else other.input(block)

    def tile(self, slab: slice) -> Tile:
        """The columns of a slab, of both heads."""
        tile = capped_tile(self.operands, self.x, self.operands.weight(slab), self.block, slab)
        if self.other is not None and self.y is not None:
            tile.other = capped_tile(self.other, self.y, self.other.weight(slab), self.block, slab).z
        return tile


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
    return [row for name in in_order(tangents) if (row := TABLE[name]).differentiable]


def backward(call: Call, tangents: dict[str, Tensor], saved: dict[str, Tensor], needs: list[str]) -> list[Tensor]:
    """The gradients of the operands named in `needs`, in their own dtypes, from every column.

    tangents: (N,) for each statistic that has one. saved: the forward's results by name.
    """
    operands = Operands(call)
    rows = differentiated(tangents)
    if operands.n == 0 or not rows:
        return [call.operands[name].new_zeros(call.operands[name].shape) for name in needs]
    pairs = any(row.of_both for row in rows)
    heads = [Head(operands, Gradients(call, frozenset(needs)))]
    of_other = frozenset(name.removeprefix(OTHER) for name in needs if name.startswith(OTHER))
    if pairs:
        assert call.other is not None
        heads.append(Head(Operands(call.other), Gradients(call.other, of_other)))
    apart = picked(call, rows)
    sparse = Picked(operands, heads[0].grads, {row.name: tangents[row.name] for row in apart}) if apart else None
    rows = [row for row in rows if row not in apart]
    signed, divergences = any(row.kind == "signed" for row in rows), any(row.has_divergence for row in rows)
    temporaries = 22 if divergences else 10 if pairs else 5 if signed else 3
    temporaries += 2 * any(name.removeprefix(OTHER) in SCALES for name in needs)
    slab_accumulator = any(call.operands[n].dtype != call.accumulate_dtype for n in needs if n.endswith("weight"))
    block_rows, columns = tile_shape(call, temporaries, int(slab_accumulator))
    for slab in cut(call.weight.shape[0], columns):
        _backward_slab(heads, rows, tangents, saved, slab, block_rows, sparse)
    heads[0].grads.numbers = diagnostics.of_exact(operands.n, call.input.device)
    results = {name: heads[0].grads.result(name) for name in needs if not name.startswith(OTHER)}
    if pairs:
        results |= {OTHER + name: heads[1].grads.result(name) for name in of_other}
    # Without a tangent that reaches the other head.
    return [results[n] if n in results else torch.zeros_like(call.operands[n]) for n in needs]


@dataclass
class Head:
    """One head of a backward: its operands, and the gradients that are added up."""

    operands: Operands
    grads: Gradients


class Slab:
    """What the columns of one slab, (V,) `columns`, add to the gradients of a head."""

    def __init__(self, head: Head, columns: slice) -> None:
        self.operands, self.grads, self.columns = head.operands, head.grads, columns
        acc, dw = self.operands.call.accumulate_dtype, self.grads.dw
        self.in_place = dw is not None and dw.dtype == acc
        self.dw = None if dw is None else dw[columns] if self.in_place else torch.empty_like(dw[columns], dtype=acc)
        width = columns.stop - columns.start
        self.sums = {name: t.new_zeros(width, dtype=acc) for name, t in self.grads.columns.items()}
        self.factor = self.operands.column("column_scale", columns)

    @functools.cached_property
    def w(self) -> Tensor:
        """(columns, D)."""
        return self.operands.weight(self.columns)

    def add(self, x: Tensor, block: slice, tile: Tensor) -> None:
        """Adds a block of rows. tile: what `dlogits` gave, (rows, columns), which is written over."""
        operands, grads = self.operands, self.grads
        row_scale = operands.row_scale(block)
        if grads.row_scale is not None:
            grads.row_scale[operands.where(block)] += (operands.product(x, self.w, self.columns) * tile).sum(1)
        if row_scale is not None:
            tile *= row_scale
        if "bias" in self.sums:
            self.sums["bias"] += tile.sum(0)
        if "column_scale" in self.sums:
            self.sums["column_scale"] += (F.linear(x, self.w) * tile).sum(0)
        if self.factor is not None:
            tile *= self.factor
        if self.dw is not None:
            self.dw.addmm_(tile.t(), x, beta=0 if block.start == 0 else 1)
        grads.add_to_dx(operands, block, tile, self.w)

    def finish(self) -> None:
        """Rounds what is complete with this slab: its rows of dW, and its part of the gradients of (V,) operands."""
        if self.grads.dw is not None and self.dw is not None and not self.in_place:
            self.grads.dw[self.columns] = self.dw
        for name, part in self.sums.items():
            self.grads.columns[name][self.columns] = part


def _backward_slab(
    heads: list[Head],
    rows: list[Statistic],
    tangents: dict[str, Tensor],
    saved: dict[str, Tensor],
    columns: slice,
    block_rows: int,
    sparse: Picked | None,
) -> None:
    """Finishes dW and the gradients of the (V,) operands of one slab of columns, and adds its share to the others."""
    slabs = [Slab(head, columns) for head in heads]
    if not rows and slabs[0].dw is not None:
        slabs[0].dw.zero_()
    for block in cut(heads[0].operands.n, block_rows) if rows else ():
        inputs = [head.operands.input(block) for head in heads]
        if len(heads) == 1:
            tile = dlogits(heads[0].operands, inputs[0], slabs[0].w, rows, tangents, saved, block, columns)
            slabs[0].add(inputs[0], block, tile)
            del tile  # before the next one is allocated
            continue
        tiles = dlogits_of_both(heads, inputs, slabs, rows, tangents, saved, block)
        for slab, x in zip(slabs, inputs, strict=True):
            tile_of_head = tiles.pop(0)
            if tile_of_head is not None:
                slab.add(x, block, tile_of_head)
    if sparse is not None:
        sparse.add(columns, slabs[0].dw, slabs[0].sums)
    for slab in slabs:
        slab.finish()


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
    tile, inner = _tile_and_inner(operands, x, w, block, slab)
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
            fill_left_out(tile, p, 0.0)
    dz: Tensor | None = None
    for row in rows:
        assert row.add_gradient is not None
        dz = row.add_gradient(dz, tile, operands.rows(tangents[row.name], block) * attributes.scale, known)
    assert dz is not None
    # d z / d acc = scale * (d z / d u); the scale is in the tangents already.
    return dz if inner is None else times_slope(dz, inner, attributes.softcap_form)


def _tile_and_inner(
    operands: Operands, x: Tensor, w: Tensor, block: slice, slab: Columns
) -> tuple[Tile, Tensor | None]:
    """The logits of one tile, and what `times_slope` needs where there is a softcap."""
    attributes, inner = operands.call.attributes, None
    tile = operands.tile(x, w, block, slab)
    if attributes.softcap:
        tile.z, inner = capped_and_inner(tile.z, attributes.softcap, attributes.softcap_form)
    return tile, inner


def dlogits_of_both(
    heads: list[Head],
    inputs: list[Tensor],
    slabs: list[Slab],
    rows: list[Statistic],
    tangents: dict[str, Tensor],
    saved: dict[str, Tensor],
    block: slice,
) -> list[Tensor | None]:
    """As `dlogits`, for two heads and statistics of both: None for a head of which no gradient is wanted."""
    operands = heads[0].operands
    known = {name: operands.rows(value, block) for name, value in saved.items()}
    tangents = {row.name: operands.rows(tangents[row.name], block) for row in rows}
    tiles, sides, inners = [], [], []
    for head, slab, x, prefix in zip(heads, slabs, inputs, ("", OTHER), strict=True):
        tile, inner = _tile_and_inner(head.operands, x, slab.w, block, slab.columns)
        lse, low = known.get(f"{prefix}lse"), known.get(f"{prefix}lse_low")
        log_p = tile.z if lse is None or low is None else (tile.z - lse[:, None]).sub_(low[:, None])
        tiles.append(tile)
        inners.append(inner)
        # The other head's softmax is not there where no statistic has it.
        sides.append(Side(tile.z, log_p if lse is None else log_p.exp(), log_p))
    known |= {"p": sides[0].p, "log_p": sides[0].log_p}
    found: list[Tensor | None] = []
    for i, head in enumerate(heads):
        if not head.grads.needs & {*OF_HEAD}:
            found.append(None)
            continue
        scale = head.operands.call.attributes.scale
        dz = torch.zeros_like(tiles[i].z)
        for row in rows:
            tangent = tangents[row.name] * scale
            if row.has_divergence:
                term = gradient(row, [side.log_p for side in sides], sides[i].p, known, bool(i))
                dz.addcmul_(term, tangent[:, None])
            elif row.pair is not None:
                function, by_other = row.pair
                a, b = sides if by_other else reversed(sides)
                averages = i == (0 if by_other else 1)
                if averages:
                    term = gradient_of_values(a, b, function)
                else:
                    term = gradient_of_weights(a, b, known[row.name], function)
                dz.addcmul_(term, tangent[:, None])
            elif i == 0:
                assert row.add_gradient is not None
                dz = row.add_gradient(dz, tiles[0], tangent, known)
        inner = inners[i]
        found.append(dz if inner is None else times_slope(dz, inner, head.operands.call.attributes.softcap_form))
    return found
