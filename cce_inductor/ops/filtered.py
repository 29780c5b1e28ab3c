"""The eager implementation of the filters (filters.py): which columns each block of rows computes, and their gradients.

As in reference.py, the scratch memory stays within the call's `workspace`, to which "eps sorted" adds a few vectors of
length V. What is left out, or sampled, is the dense part of the gradient of lse alone: a block's own targets are always
computed by a filter with a bound, and the rank-1 part of `logit_sum`, like the logits of entries, is formed exactly
beside it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .bound import (
    BLOCK,
    LOWERING,
    ROW_CAP,
    SAMPLE_BITS,
    beyond,
    blocks,
    edges,
    encode,
    groups,
    sampled,
    thresholds,
)
from .call import Call, cut
from .picked import Picked, picked, picked_logits
from .reference import (
    Gradients,
    Operands,
    capped_tile,
    check_targets,
    differentiated,
    dlogits,
    empty_statistics,
    tile_shape,
)
from .softcap import capped
from .statistics import Statistic, Tile, finish_all, finish_lse, update_all

TILE = 128  # columns of a tile under "eps"


def forward(call: Call) -> list[Tensor]:
    """The statistics, as `reference.forward` gives them, and the bound (bound.py): (blocks of N, groups of V) uint8."""
    operands = Operands(call)
    check_targets(operands)
    out = empty_statistics(call)
    by_name = dict(zip(call.statistics.split(), out, strict=True))
    apart = picked(call, call.rows, beside_tiles=True)
    picked_logits(operands, {row.name: by_name[row.name] for row in apart})
    rows = [row for row in call.rows if row not in apart]
    n, v = call.input.shape[0], call.weight.shape[0]
    group = call.filter.group
    bound = call.input.new_zeros((blocks(n), groups(v, group)), dtype=torch.uint8)
    piece_rows, columns = tile_shape(call, temporaries=4, slab_tensors=0)
    columns = max(columns // group, 1) * group
    for block in cut(operands.n, max(piece_rows // BLOCK, 1) * BLOCK):
        # More than one where the rows of a block do not fit in the workspace at once.
        pieces = list(cut(block.stop, piece_rows, block.start)) if piece_rows < BLOCK else [block]
        states: list[dict] = [{} for _ in pieces]
        own = [_target_logits(operands, operands.input(piece), piece) for piece in pieces]
        for slab in cut(v, columns):
            w, mass = operands.weight(slab), None
            for i, piece in enumerate(pieces):
                tile = capped_tile(operands, operands.input(piece), w, piece, slab)
                update_all(rows, states[i], tile)
                part = _mass(tile, finish_lse(states[i]["lse"]), own[i], group)
                mass = part if mass is None else mass + part
            assert mass is not None
            b, j = block.start // BLOCK, slab.start // group
            bound[b : b + mass.shape[0], j : j + mass.shape[1]] = encode(mass)
        for piece, state in zip(pieces, states, strict=True):
            for row, value in zip(rows, finish_all(rows, state), strict=True):
                by_name[row.name][operands.where(piece)] = value
    return [*out, bound]


def _target_logits(operands: Operands, x: Tensor, block: slice) -> Tensor | None:
    """(rows,): the logits of the block's targets, before any other, and not above what the tiles will give."""
    if operands.target is None:
        return None
    call, target = operands.call, operands.target[block]
    z = (x * operands.cast(call.weight[target])).sum(1)
    bias = call.operands.get("bias")
    if bias is not None:
        z += bias[target]
    z *= call.attributes.scale
    z = capped(z, call.attributes.softcap, call.attributes.softcap_form)
    return z - LOWERING * z.abs()


def _mass(tile: Tile, running: Tensor, target_logit: Tensor | None, group: int) -> Tensor:
    """(blocks, groups): exp(z - r) of a tile added up over each block of its rows, own targets left out."""
    r = running if target_logit is None else torch.maximum(running, target_logit)
    p = (tile.z - r[:, None]).exp_()
    if tile.target is not None:
        inside, column = tile.target_position()
        p.scatter_(1, column[:, None], torch.where(inside, 0, p.gather(1, column[:, None])[:, 0])[:, None])
    mass = torch.stack([part.sum(0) for part in p.split(BLOCK)])
    return mass if group == 1 else F.pad(mass, (0, -mass.shape[1] % group)).unflatten(1, (-1, group)).sum(2)


class Selection(Protocol):
    """What a filter computes."""

    def columns(self, block: int, slab: slice) -> tuple[Tensor, Tensor | None]:
        """The columns of the slab that a block computes, ascending, and their weights in the gradient, None for 1."""
        ...


def backward(call: Call, tangents: dict[str, Tensor], saved: dict[str, Tensor], needs: list[str]) -> list[Tensor]:
    """The gradients of the operands named in `needs`, in their own dtypes, from the columns that the filter takes.

    tangents: (N,) for each statistic that has one, of which "lse" must. saved: the forward's results by name, with
    "bound" where the filter goes by one.
    """
    operands = Operands(call)
    if operands.n == 0 or call.weight.shape[0] == 0:
        return [call.operands[name].new_zeros(call.operands[name].shape) for name in needs]
    grads = Gradients(call, frozenset(needs))
    # Per slab: dW, the kept rows of W, their gradients in one block.
    piece_rows, columns = tile_shape(call, temporaries=4, slab_tensors=3)
    piece_rows = min(piece_rows, BLOCK)
    rows = [row for row in differentiated(tangents) if row.kind != "linear"]
    apart = picked(call, rows, beside_tiles=True)
    sparse = Picked(operands, grads, {row.name: tangents[row.name] for row in apart}) if apart else None
    rows = [row for row in rows if row not in apart]
    selection = select(operands, tangents, saved, piece_rows, columns)
    saved = {name: tensor for name, tensor in saved.items() if name != "bound"}
    rank_one = RankOne(operands, tangents["logit_sum"], piece_rows) if "logit_sum" in tangents else None
    for slab in cut(call.weight.shape[0], columns):
        _backward_slab(operands, grads, rows, tangents, saved, slab, piece_rows, selection, rank_one, sparse)
    if rank_one is not None:
        rank_one.add_to_dx(grads)
    if "diagnostics" in needs:
        grads.numbers = _numbers(operands, selection, tangents["lse"], saved, piece_rows, columns)
    return [grads.result(name) for name in needs]


def _backward_slab(
    operands: Operands,
    grads: Gradients,
    rows: list[Statistic],
    tangents: dict[str, Tensor],
    saved: dict[str, Tensor],
    slab: slice,
    piece_rows: int,
    selection: Selection,
    rank_one: "RankOne | None",
    sparse: Picked | None,
) -> None:
    """Finishes dW and db of one slab of columns and adds the slab's share to dx."""
    w = operands.weight(slab)
    in_place = grads.dw is not None and grads.dw.dtype == w.dtype
    dw = None if grads.dw is None else grads.dw[slab].zero_() if in_place else torch.zeros_like(w)
    db = w.new_zeros(w.shape[0]) if "bias" in grads.columns else None
    for index, block in enumerate(cut(operands.n, BLOCK)):
        columns, weight = selection.columns(index, slab)
        if columns.shape[0] == 0:
            continue
        place = columns - slab.start
        part = w[place]
        for piece in cut(block.stop, piece_rows, block.start):
            x = operands.input(piece)
            tile = dlogits(operands, x, part, rows, tangents, saved, piece, columns)
            if weight is not None:
                tile *= weight.to(tile.dtype)
            if dw is not None:
                dw.index_add_(0, place, tile.t() @ x)
            if db is not None:
                db.index_add_(0, place, tile.sum(0))
            grads.add_to_dx(operands, piece, tile, part)
            del tile  # before the next one is allocated
    if rank_one is not None:
        rank_one.add(slab, w, dw, db)
    if sparse is not None:
        sparse.add(slab, dw, {} if db is None else {"bias": db})
    if grads.dw is not None and dw is not None and not in_place:
        grads.dw[slab] = dw
    if db is not None:
        grads.columns["bias"][slab] = db


class RankOne:
    """The gradient of logit_sum without a softcap, h_i c_j for row i and column j: never filtered, never a matrix."""

    def __init__(self, operands: Operands, tangent: Tensor, piece_rows: int):
        self.operands, self.piece_rows = operands, piece_rows
        d = operands.call.input.shape[1]
        self.h = operands.rows(tangent, slice(0, operands.n)) * operands.call.attributes.scale
        self.hx = self.h.new_zeros(d)  # sum_i h_i x_i
        self.cw = self.h.new_zeros(d)  # sum_j c_j W_j, of the slabs so far
        for piece in cut(operands.n, piece_rows):
            self.hx += self.h[piece] @ operands.input(piece)

    def add(self, slab: slice, w: Tensor, dw: Tensor | None, db: Tensor | None) -> None:
        """Adds the share of one slab to its dW and db."""
        c = self.operands.column("column_weight", slab)
        c = w.new_ones(w.shape[0]) if c is None else c
        self.cw += c @ w
        if dw is not None:
            dw.addr_(c, self.hx)
        if db is not None:
            db += c * self.h.sum()

    def add_to_dx(self, grads: Gradients) -> None:
        """Adds its share to dx, after every slab."""
        for piece in cut(self.operands.n, self.piece_rows):
            grads.add_to_dx(self.operands, piece, self.h[piece, None], self.cw[None])


def select(
    operands: Operands, tangents: dict[str, Tensor], saved: dict[str, Tensor], piece_rows: int, columns: int
) -> Selection:
    """What the call's filter computes; piece_rows, columns: the shape of a tile."""
    if operands.call.filter.kind == "eps":
        return _by_tile(operands, saved["lse"], "target_logit" in tangents, piece_rows, columns)
    return _by_bound(operands, tangents["lse"], saved, piece_rows, columns)


@dataclass
class ByBound:
    """A block computes the columns that `bound.beyond` keeps, and its own targets; `full` blocks compute all.

    With a seed, each of the others is taken with a known probability, and weighs as much more.
    """

    operands: Operands
    bound: Tensor  # (blocks, groups of V) uint8
    edge: Tensor  # (blocks,)
    start: Tensor  # (blocks,)
    full: Tensor  # (blocks,) bool
    seed: Tensor | None
    group: int

    def _groups(self, slab: slice) -> Tensor:
        """The group of each column."""
        return torch.arange(slab.start, slab.stop, device=self.bound.device) // self.group

    def certain(self, block: int, slab: slice) -> Tensor:
        """Which columns of the slab are computed for sure, bool; those have weight 1."""
        group = self._groups(slab)
        keep = beyond(self.bound[block, group], group, self.edge[block], self.start[block]) | self.full[block]
        if self.operands.target is not None:
            own = self.operands.target[block * BLOCK : (block + 1) * BLOCK]
            keep |= torch.isin(group, own // self.group)
        return keep

    def columns(self, block: int, slab: slice) -> tuple[Tensor, Tensor | None]:
        keep = self.certain(block, slab)
        if self.seed is None or self.full[block]:
            return keep.nonzero()[:, 0] + slab.start, None
        group = self._groups(slab)
        threshold = thresholds(self.bound[block, group], self.edge[block])
        taken = (keep | sampled(self.seed, block, group, threshold)).nonzero()[:, 0]
        weight = torch.where(keep, 1.0, 2.0**SAMPLE_BITS / threshold.double())
        return taken + slab.start, weight[taken]


def _by_bound(operands: Operands, tangent: Tensor, saved: dict[str, Tensor], piece_rows: int, columns: int) -> ByBound:
    """The contract of bound.py, and the check of every row.

    A row may lose at most ROW_CAP times the budget of its own gradient; a block with one that would is done in full.
    """
    call, every = operands.call, slice(0, operands.n)
    budget, unbiased = call.filter.value, call.filter.kind == "unbiased"
    lse = operands.rows(saved["lse"], every)
    g = operands.rows(tangent, every).abs()
    rest, slack = _own_mass(operands, saved)
    largest = torch.stack([part.amax() for part in g.split(BLOCK)]).double()
    total = torch.stack([part.sum() for part in (g.double() * rest).split(BLOCK)])
    allowed = torch.where((largest == 0) & ~total.isnan(), torch.inf, budget * total / largest)
    bound = saved["bound"][: blocks(operands.n)]
    edge, start = edges(bound, allowed, max(1, call.attributes.workspace // (64 * bound.shape[0])))
    seed = call.operands["seed"] if unbiased else None
    start = torch.zeros_like(start) if unbiased else start  # of the edge's own none is dropped
    chosen = ByBound(operands, bound, edge, start, torch.zeros_like(edge, dtype=torch.bool), seed, call.filter.group)
    for index, block in enumerate(cut(operands.n, BLOCK)):
        mass = torch.zeros_like(rest[block])
        for slab in cut(call.weight.shape[0], columns):
            part = chosen.certain(index, slab).nonzero()[:, 0] + slab.start
            w = operands.weight(part)
            for piece in cut(block.stop, piece_rows, block.start):
                p = _dense_softmax(operands, piece, w, part, lse[piece])
                mass[piece.start - block.start : piece.stop - block.start] += p.sum(1)
        lost = rest[block] - mass
        fine = (lost <= ROW_CAP * budget * rest[block] + slack[block]) | (g[block] == 0)
        chosen.full[index] = ~fine.all()
    return chosen


def _own_mass(operands: Operands, saved: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of each active row, (n,): 1 - p_target, the mass of its dense gradient, and by how much that may be wrong.

    NaN where lse is not finite: nothing is known of such a row, and its block is done in full.
    """
    every = slice(0, operands.n)
    lse = operands.rows(saved["lse"], every)
    rest = torch.ones_like(lse)
    if operands.target is not None:
        rest = -torch.expm1(operands.rows(saved["target_logit"], every) - lse)
    rest = torch.where(lse.isfinite(), rest, torch.nan)
    # lse itself is known to half a unit of its last place.
    return rest, torch.finfo(lse.dtype).eps * (2 + lse.abs())


def _numbers(
    operands: Operands,
    selection: Selection,
    tangent: Tensor,
    saved: dict[str, Tensor],
    piece_rows: int,
    columns: int,
) -> Tensor:
    """What a selection computes and leaves out, as diagnostics.py defines it: (5,) fp32."""
    every, v = slice(0, operands.n), operands.call.weight.shape[0]
    lse, g = operands.rows(saved["lse"], every), operands.rows(tangent, every).abs()
    rest, slack = _own_mass(operands, saved)
    lost = rest.clone()
    computed, full = 0, 0
    for index, block in enumerate(cut(operands.n, BLOCK)):
        certain = 0
        for slab in cut(v, columns):
            column, weight = selection.columns(index, slab)
            computed += column.shape[0]
            column = column if weight is None else column[weight == 1]
            certain += column.shape[0]
            w = operands.weight(column)
            for piece in cut(block.stop, piece_rows, block.start):
                lost[piece] -= _dense_softmax(operands, piece, w, column, lse[piece]).sum(1)
        if certain == v:
            full += 1
            lost[block] = 0
    number = blocks(operands.n)
    mass, total = (g.double() * lost.clamp(min=0)).sum(), (g.double() * rest).sum()
    share = torch.where((g != 0) & (lost > slack), (lost - slack) / rest, 0)
    result = torch.tensor([computed / (number * v), full / number, 0, 0, number], dtype=torch.float32, device=g.device)
    result[2], result[3] = torch.where(total > 0, mass / total, 0), share.amax()
    return result


def _dense_softmax(operands: Operands, block: slice, w: Tensor, columns: Tensor, lse: Tensor) -> Tensor:
    """exp(z - lse) of some columns, 0 at the rows' own targets."""
    tile = capped_tile(operands, operands.input(block), w, block, columns)
    p = tile.z.sub_(lse[:, None]).exp_()
    if tile.target is not None:
        inside, column = tile.target_position()
        p.masked_fill_((torch.arange(p.shape[1], device=p.device) == column[:, None]) & inside[:, None], 0)
    return p


@dataclass
class ByTile:
    """The rule of Cut Cross-Entropy (arXiv 2411.09009, section 4.3): tiles of BLOCK rows and TILE columns.

    A tile is left out, the entries of targets with it, where every |softmax - onehot| is below a threshold.
    """

    computed: Tensor  # (blocks, tiles) bool
    place: Tensor | None  # (V,) position of each column in the sorted order; None: their own

    def tile_of(self, column: Tensor) -> Tensor:
        return (column if self.place is None else self.place[column]) // TILE

    def columns(self, block: int, slab: slice) -> tuple[Tensor, Tensor | None]:
        column = torch.arange(slab.start, slab.stop, device=self.computed.device)
        return column[self.computed[block, self.tile_of(column)]], None


def _by_tile(operands: Operands, lse: Tensor, one_hot: bool, piece_rows: int, columns: int) -> ByTile:
    """one_hot: whether the gradient has a part at the target, without which its rule is about the softmax alone."""
    call, v = operands.call, operands.call.weight.shape[0]
    device = call.weight.device
    place = None
    if call.filter.sorted:
        place = torch.empty(v, dtype=torch.int64, device=device)
        place[_mean_logits(operands, piece_rows, columns).argsort(descending=True, stable=True)] = torch.arange(
            v, device=device
        )
    shape = (blocks(operands.n), -(-v // TILE))
    chosen = ByTile(torch.zeros(shape, dtype=torch.bool, device=device), place)
    for index, block in enumerate(cut(operands.n, BLOCK)):
        for slab in cut(v, columns):
            w, column = operands.weight(slab), torch.arange(slab.start, slab.stop, device=device)
            for piece in cut(block.stop, piece_rows, block.start):
                tile = capped_tile(operands, operands.input(piece), w, piece, slab)
                p = tile.z.sub_(operands.rows(lse, piece)[:, None]).exp_()
                if one_hot:
                    inside, at = tile.target_position()
                    p.scatter_add_(1, at[:, None], -inside.to(p.dtype)[:, None])
                large = ~(p.abs_() < call.filter.value).all(0)
                chosen.computed[index, chosen.tile_of(column[large])] = True
    return chosen


def _mean_logits(operands: Operands, piece_rows: int, columns: int) -> Tensor:
    """(V,) fp64: the mean logit of every column over the active rows."""
    total = torch.zeros(operands.call.weight.shape[0], dtype=torch.float64, device=operands.call.weight.device)
    for slab in cut(total.shape[0], columns):
        w = operands.weight(slab)
        for piece in cut(operands.n, piece_rows):
            total[slab] += capped_tile(operands, operands.input(piece), w, piece, slab).z.sum(0)
    return total / operands.n
