"""The eager implementation, which is also the specification: every kernel is tested against it.

Plain tensor algebra over tiles of (block of rows) x (slab of columns), so that the scratch memory stays within the
call's `workspace` whatever N and V are. The backward is slab-major: the logits of a slab are recomputed block by
block, its rows of dW are finished, and dx is added to. Accumulation is in fp32 (fp64 for fp64) and rounded once.

Notation: N rows, D width, V vocabulary; `input` (N, D), `weight` (V, D), `bias` (V,), `target` (N,).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .bound import BLOCK, ROW_CAP, blocks, encode, kept
from .call import Call
from .statistics import TABLE, Statistic, Tile, finish_lse

# A tile at most: enough for a GEMM to run at its rate, and small enough for the passes over it to run in cache.
BLOCK_ROWS, SLAB_COLUMNS = 1024, 2048


def tile_shape(call: Call, temporaries: int, slab_accumulator: bool) -> tuple[int, int]:
    """(rows, columns) of a tile whose scratch fits the call's workspace.

    temporaries: how many (rows, columns) tensors live at once. slab_accumulator: whether a (columns, D) accumulator is
    needed besides the casts of the operands.
    """
    (n, d), v = call.input.shape, call.weight.shape[0]
    budget = call.attributes.workspace // call.accumulate_dtype.itemsize
    copies = (call.weight.dtype != call.compute_dtype) + (call.compute_dtype != call.accumulate_dtype)
    rows = max(1, min(n, BLOCK_ROWS, budget // (4 * d + 1)))
    columns = (budget - 2 * rows * d) // (rows * temporaries + d * (copies + slab_accumulator))
    return rows, max(1, min(v, SLAB_COLUMNS, columns))


# A slab of columns, or a list of them.
Columns: TypeAlias = slice | Tensor


class Operands:
    """The operands of a call, cast tile by tile and restricted to the active rows."""

    def __init__(self, call: Call):
        self.call = call
        # The positions of the active rows, None where that is all of them.
        self.index = None if call.active is None or call.active.all() else call.active.nonzero()[:, 0]
        self.n = call.input.shape[0] if self.index is None else self.index.shape[0]
        target = call.operands.get("target")
        self.target = None if target is None else self.rows(target, slice(0, self.n))

    def rows(self, tensor: Tensor, block: slice) -> Tensor:
        """Rows `block` (counted among the active ones) of a tensor whose first dimension is N."""
        return tensor[block] if self.index is None else tensor[self.index[block]]

    def cast(self, tensor: Tensor) -> Tensor:
        """Rounds to the compute dtype, then widens to the accumulation dtype: products of the two are exact."""
        return tensor.to(self.call.compute_dtype).to(self.call.accumulate_dtype)

    def input(self, block: slice) -> Tensor:
        return self.cast(self.rows(self.call.input, block))

    def weight(self, slab: Columns) -> Tensor:
        return self.cast(self.call.weight[slab])

    def column(self, name: str, slab: Columns) -> Tensor | None:
        """A (V,) operand's entries of the slab in accumulation dtype, or None."""
        tensor = self.call.operands.get(name)
        return None if tensor is None else tensor[slab].to(self.call.accumulate_dtype)

    def tile(self, x: Tensor, w: Tensor, block: slice, slab: Columns) -> Tile:
        """The logits of one tile before the softcap. In a list of columns, ascending, targets become positions."""
        z = F.linear(x, w, self.column("bias", slab))
        if self.call.attributes.scale != 1.0:
            z *= self.call.attributes.scale
        target = None if self.target is None else self.target[block]
        start = 0
        if isinstance(slab, slice):
            start = slab.start
        elif target is not None:
            place = torch.searchsorted(slab, target).clamp(max=max(slab.shape[0] - 1, 0))
            target = torch.where(slab[place] == target, place, -1) if slab.shape[0] else torch.full_like(target, -1)
        return Tile(z, start, target, self.column("column_weight", slab))


def _blocks(length: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, length)) for i in range(0, length, step))


def check_targets(operands: Operands) -> None:
    """Raises IndexError for a target of an active row outside the vocabulary, as F.cross_entropy does on a CPU.

    On an accelerator the check is a device-side assertion: reading the values would wait for the device.
    """
    target, v = operands.target, operands.call.weight.shape[0]
    if target is None or target.numel() == 0:
        return
    if target.device.type != "cpu":
        torch._assert_async(((target >= 0) & (target < v)).all())
        return
    low, high = target.aminmax()
    if low < 0 or high >= v:
        wrong = int(low if low < 0 else high)
        raise IndexError(f"Target {wrong} is out of bounds: the vocabulary has {v} classes, 0 to {v - 1}.")


def forward(call: Call) -> list[Tensor]:
    """The statistics of every row, (N,) each, in accumulation dtype (argmax: int64); 0 in rows that are not active."""
    return _forward(call, with_bound=False)


def forward_with_bound(call: Call) -> list[Tensor]:
    """What `forward` gives, and behind it the bound (bound.py), (blocks of N rows, V) uint8."""
    return _forward(call, with_bound=True)


def _forward(call: Call, with_bound: bool) -> list[Tensor]:
    rows = call.rows
    operands = Operands(call)
    check_targets(operands)
    n = call.input.shape[0]
    out = [call.input.new_zeros(n, dtype=torch.int64 if row.integer else call.accumulate_dtype) for row in rows]
    block_rows, columns = tile_shape(call, temporaries=4 if with_bound else 3, slab_accumulator=False)
    bound = None
    if with_bound:
        bound = call.input.new_zeros((blocks(n), call.weight.shape[0]), dtype=torch.uint8)
        block_rows = max(block_rows // BLOCK, 1) * BLOCK
    for block in _blocks(operands.n, block_rows):
        states: list = [None] * len(rows)
        x = operands.input(block)
        target_logit = None if bound is None else _target_logits(operands, x, block)
        for slab in _blocks(call.weight.shape[0], columns):
            tile = _capped_tile(operands, x, block, slab)
            states = [row.update(state, tile) for row, state in zip(rows, states, strict=True)]
            if bound is not None:
                running = states[call.statistics.split().index("lse")]
                first = block.start // BLOCK
                codes = _mass_codes(tile, finish_lse(running), target_logit)
                bound[first : first + codes.shape[0], slab] = codes
        where = block if operands.index is None else operands.index[block]
        for result, row, state in zip(out, rows, states, strict=True):
            result[where] = row.finish(state)
    return out if bound is None else [*out, bound]


def _capped_tile(operands: Operands, x: Tensor, block: slice, slab: Columns) -> Tile:
    """One tile of logits."""
    tile = operands.tile(x, operands.weight(slab), block, slab)
    cap = operands.call.attributes.softcap
    if cap:
        tile.z.div_(cap).tanh_().mul_(cap)
    return tile


def _target_logits(operands: Operands, x: Tensor, block: slice) -> Tensor | None:
    """(rows,): the logits of the block's targets, before any other."""
    if operands.target is None:
        return None
    call, target = operands.call, operands.target[block]
    z = (x * operands.cast(call.weight[target])).sum(1)
    bias = call.operands.get("bias")
    if bias is not None:
        z += bias[target]
    z *= call.attributes.scale
    cap = call.attributes.softcap
    return (z / cap).tanh() * cap if cap else z


def _mass_codes(tile: Tile, running: Tensor, target_logit: Tensor | None) -> Tensor:
    """The bound of one tile's columns in each block of its rows: exp(z - r) added up, own targets left out."""
    r = running if target_logit is None else torch.maximum(running, target_logit)
    p = (tile.z - r[:, None]).exp_()
    if tile.target is not None:
        inside, column = tile.target_position()
        p.scatter_(1, column[:, None], torch.where(inside, 0, p.gather(1, column[:, None])[:, 0])[:, None])
    return encode(torch.stack([part.sum(0) for part in p.split(BLOCK)]))


@dataclass
class Gradients:
    """The accumulators of the backward. dx is its own accumulator where it has the accumulation dtype."""

    call: Call
    needs: frozenset[str]

    def __post_init__(self) -> None:
        call, acc = self.call, self.call.accumulate_dtype
        x, w, b = call.input, call.weight, call.operands.get("bias")
        self.dx = x.new_zeros(x.shape, dtype=acc) if "input" in self.needs else None
        self.dw = w.new_empty(w.shape) if "weight" in self.needs else None
        self.db = b.new_empty(b.shape) if b is not None and "bias" in self.needs else None

    def result(self, name: str) -> Tensor:
        tensor = {"input": self.dx, "weight": self.dw, "bias": self.db}[name]
        assert tensor is not None
        return tensor.to(self.call.operands[name].dtype)


def backward(call: Call, tangents: dict[str, Tensor], saved: dict[str, Tensor], needs: list[str]) -> list[Tensor]:
    """The gradients of the operands named in `needs`, in their own dtypes.

    tangents: (N,) for each statistic that has one. saved: the forward's results by name; with "bound", and where the
    tangents are of what it is proved for, columns are dropped by it.
    """
    operands = Operands(call)
    rows = [row for row in TABLE.values() if row.differentiable and row.name in tangents]
    if operands.n == 0 or not rows:
        return [call.operands[name].new_zeros(call.operands[name].shape) for name in needs]
    grads = Gradients(call, frozenset(needs))
    temporaries = 5 if any(row.kind == "signed" for row in rows) else 3
    slab_accumulator = "weight" in needs and call.weight.dtype != call.accumulate_dtype
    block_rows, columns = tile_shape(call, temporaries, slab_accumulator)
    keep, bound = None, saved.get("bound")
    saved = {name: t for name, t in saved.items() if name != "bound"}
    if bound is not None and all(row.budget for row in rows) and "lse" in tangents:
        keep = kept_columns(operands, tangents, saved, bound, columns)
        block_rows = BLOCK
    for slab in _blocks(call.weight.shape[0], columns):
        _backward_slab(operands, grads, rows, tangents, saved, slab, block_rows, keep)
    return [grads.result(name) for name in needs]


def _backward_slab(
    operands: Operands,
    grads: Gradients,
    rows: list[Statistic],
    tangents: dict[str, Tensor],
    saved: dict[str, Tensor],
    slab: slice,
    block_rows: int,
    keep: Tensor | None,
) -> None:
    """Finishes dW and db of one slab of columns and adds the slab's share to dx. keep: (blocks, V), or all columns."""
    acc = operands.call.accumulate_dtype
    w = operands.weight(slab)
    in_place = grads.dw is not None and grads.dw.dtype == acc
    dw = None if grads.dw is None else grads.dw[slab] if in_place else torch.empty_like(w)
    db = None if grads.db is None else w.new_zeros(w.shape[0])
    if keep is not None and dw is not None:
        dw.zero_()
    for block in _blocks(operands.n, block_rows):
        x = operands.input(block)
        columns: Columns = slab
        if keep is not None:
            columns = keep[block.start // BLOCK, slab].nonzero()[:, 0] + slab.start
        part = w if keep is None else w[columns - slab.start]
        dacc = _dacc(operands, x, part, rows, tangents, saved, block, columns)
        if dw is not None:
            if keep is None:
                dw.addmm_(dacc.t(), x, beta=0 if block.start == 0 else 1)
            else:
                dw[columns - slab.start] += dacc.t() @ x
        if db is not None:
            if keep is None:
                db += dacc.sum(0)
            else:
                db[columns - slab.start] += dacc.sum(0)
        if grads.dx is not None:
            if operands.index is None:
                grads.dx[block].addmm_(dacc, part)
            else:
                grads.dx.index_add_(0, operands.index[block], dacc @ part)
        del dacc  # before the next tile is allocated
    if grads.dw is not None and dw is not None and not in_place:
        grads.dw[slab] = dw
    if grads.db is not None and db is not None:
        grads.db[slab] = db


def kept_columns(
    operands: Operands, tangents: dict[str, Tensor], saved: dict[str, Tensor], bound: Tensor, columns: int
) -> Tensor:
    """Which columns each block of rows keeps, (blocks, V) bool: by the bound, the targets, and the check of every row.

    A row may lose at most ROW_CAP times the budget of its own gradient; a block with one that would is done in full.
    """
    budget = operands.call.filter.value
    every = slice(0, operands.n)
    g = operands.rows(tangents["lse"], every).abs()
    rest = torch.ones_like(g)
    if operands.target is not None:
        rest = -torch.expm1(operands.rows(saved["target_logit"], every) - operands.rows(saved["lse"], every))
    largest = torch.stack([part.amax() for part in g.split(BLOCK)]).double()
    total = torch.stack([part.sum() for part in (g.double() * rest).split(BLOCK)])
    keep = kept(bound[: blocks(operands.n)], torch.where(largest > 0, budget * total / largest, torch.inf))
    if operands.target is not None:
        keep[torch.arange(operands.n, device=g.device) // BLOCK, operands.target] = True
    for index, block in enumerate(_blocks(operands.n, BLOCK)):
        mass = torch.zeros_like(rest[block])
        x = operands.input(block)
        for slab in _blocks(keep.shape[1], columns):
            part = keep[index, slab].nonzero()[:, 0] + slab.start
            tile = _capped_tile(operands, x, block, part)
            p = (tile.z - operands.rows(saved["lse"], block)[:, None]).exp_()
            if tile.target is not None:
                inside, column = tile.target_position()
                p.masked_fill_((torch.arange(p.shape[1], device=p.device) == column[:, None]) & inside[:, None], 0)
            mass += p.sum(1)
        # lse itself is known to half a unit of its last place.
        slack = torch.finfo(mass.dtype).eps * (2 + operands.rows(saved["lse"], block).abs())
        lost = rest[block] - mass
        fine = (lost <= ROW_CAP * budget * rest[block] + slack) | (g[block] == 0)
        keep[index] |= ~fine.all()
    return keep


def _dacc(
    operands: Operands,
    x: Tensor,
    w: Tensor,
    rows: list[Statistic],
    tangents: dict[str, Tensor],
    saved: dict[str, Tensor],
    block: slice,
    slab: Columns,
) -> Tensor:
    """d loss / d (x Wᵀ + b) of one tile, in accumulation dtype."""
    scale, cap = operands.call.attributes.scale, operands.call.attributes.softcap
    tile = operands.tile(x, w, block, slab)
    tanh = None
    if cap:
        tanh = tile.z.div_(cap).tanh_()
        tile.z = tanh * cap
    known = {name: operands.rows(value, block) for name, value in saved.items()}
    if any(row.uses_softmax for row in rows):
        log_p = known["log_p"] = tile.z.sub_(known["lse"][:, None])
        keep = any(row.kind == "signed" for row in rows)
        known["p"] = log_p.exp() if keep else log_p.exp_()
    dz: Tensor | None = None
    for row in rows:
        assert row.add_gradient is not None
        dz = row.add_gradient(dz, tile, operands.rows(tangents[row.name], block) * scale, known)
    assert dz is not None
    # d z / d acc = scale * (1 - tanh(u / cap)²); the scale is in the tangents already.
    return dz if tanh is None else torch.ops.aten.tanh_backward.grad_input(dz, tanh, grad_input=dz)
