"""Logits of a few classes of each row: rows of the weight are gathered and multiplied, without a product of matrices.

They are those of the statistics `target_logit`, one class a row, and `entry_logits`, K classes a row. The forward goes
by blocks of rows. The backward does too, for dx and for what each logit sends back; then, slab of columns by slab, it
adds the rows of x to dW in the order of their classes. So the share of dW goes into the accumulators of the slab,
before they are rounded, and twice gives the same bits. Between the two a few numbers are kept for each class picked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .call import Call, cut
from .softcap import capped, capped_and_inner, times_slope
from .statistics import Statistic

# What `reference`, which imports this, reads a call through, and adds its gradients to.
Operands: TypeAlias = Any
Gradients: TypeAlias = Any

# From one class in so many on, a place in the tiles of all logits costs less.
FEWEST = 8


def picked(call: Call, rows: list[Statistic], beside_tiles: bool = False) -> list[Statistic]:
    """Which of the statistics are computed here, and not in the tiles of logits that the others need.

    beside_tiles: where a filter leaves out tiles, all entries are.
    """
    sparse = [row for row in rows if row.kind == "sparse"]
    entries = [row for row in sparse if "entries" in row.requires]
    few = all(FEWEST * call.shape(row)[1] <= call.weight.shape[0] for row in entries)
    if not few and not beside_tiles:
        return []
    return sparse if len(sparse) == len(rows) else entries


def _classes(operands: Operands, name: str) -> Tensor:
    """(rows, K) class indices of the active rows."""
    classes = operands.target if name == "target_logit" else operands.entries
    assert classes is not None
    return classes[:, None] if classes.dim() == 1 else classes


@dataclass
class _Part:
    """Some classes of a block of rows, (rows, k), and what their logits are made of."""

    block: slice
    which: slice  # of the K classes
    x: Tensor  # (rows, D)
    w: Tensor  # (rows, k, D), the classes' rows of the weight
    row_scale: Tensor | None  # (rows, 1)
    column_scale: Tensor | None  # (rows, k)
    product: Tensor  # x . w
    shifted: Tensor  # column_scale * product + bias
    u: Tensor  # the logits before the softcap


def _parts(operands: Operands, classes: Tensor) -> Iterator[_Part]:
    """The classes, (n, K), part by part: three copies of the gathered rows fit in the workspace."""
    call, d = operands.call, operands.call.input.shape[1]
    budget = call.workspace // call.accumulate_dtype.itemsize
    few = max(1, min(classes.shape[1], budget // (4 * d + 8)))
    block_rows = max(1, budget // (few * (4 * d + 8) + 2 * d))
    for block in cut(operands.n, block_rows):
        x, row_scale = operands.input(block), operands.row_scale(block)
        for which in cut(classes.shape[1], few):
            own = classes[block, which]
            w = operands.cast(call.weight[own])
            product = shifted = (w @ x[:, :, None])[:, :, 0]
            column_scale, bias = operands.column("column_scale", own), operands.column("bias", own)
            if column_scale is not None:
                shifted = product * column_scale
            if bias is not None:
                shifted = shifted + bias
            u = shifted * call.attributes.scale
            if row_scale is not None:
                u = u * row_scale
            yield _Part(block, which, x, w, row_scale, column_scale, product, shifted, u)


def picked_logits(operands: Operands, results: dict[str, Tensor]) -> None:
    """Writes the logits of statistics, by name, into results of shape (N,) or (N, K), in the rows that are active."""
    attributes = operands.call.attributes
    for name, result in results.items():
        out = result[:, None] if result.dim() == 1 else result
        for part in _parts(operands, _classes(operands, name)):
            z = capped(part.u, attributes.softcap, attributes.softcap_form)
            out[operands.where(part.block), part.which] = z


class Picked:
    """The gradients of statistics that are computed here.

    Adds what the rows get to the accumulators of `grads` at once; `add` gives the columns of a slab theirs. tangents:
    (N,) or (N, K), by the statistic's name.
    """

    def __init__(self, operands: Operands, grads: Gradients, tangents: dict[str, Tensor]):
        self.operands = operands
        classes = torch.cat([_classes(operands, name) for name in tangents], 1)
        tangent = torch.cat([t[:, None] if t.dim() == 1 else t for t in tangents.values()], 1)
        # Of each logit: what reaches the bias, x . w and the row of x.
        self.of_bias = torch.empty(classes.shape, dtype=operands.call.accumulate_dtype, device=classes.device)
        self.of_weight = torch.empty_like(self.of_bias) if "column_scale" in operands.call.operands else self.of_bias
        self.of_scale = torch.empty_like(self.of_bias) if "column_scale" in grads.columns else None
        for part in _parts(operands, classes):
            self._add_to_rows(grads, part, tangent)
        self.classes, order = classes.flatten().sort(stable=True)
        self.row = order // max(classes.shape[1], 1)
        self.of_bias, self.of_weight = (t.flatten()[order] for t in (self.of_bias, self.of_weight))
        self.of_scale = None if self.of_scale is None else self.of_scale.flatten()[order]

    def _add_to_rows(self, grads: Gradients, part: _Part, tangent: Tensor) -> None:
        """dx and the gradient of row_scale, and what the columns will be given."""
        attributes, at = self.operands.call.attributes, (part.block, part.which)
        where = self.operands.where(part.block)
        dz = tangent[where, part.which].to(part.u.dtype) * attributes.scale
        if attributes.softcap:
            _, inner = capped_and_inner(part.u, attributes.softcap, attributes.softcap_form)
            dz = times_slope(dz, inner, attributes.softcap_form)
        if grads.row_scale is not None:
            grads.row_scale[where] += (dz * part.shifted).sum(1)
        if part.row_scale is not None:
            dz = dz * part.row_scale
        self.of_bias[at] = dz
        if self.of_scale is not None:
            self.of_scale[at] = dz * part.product
        if part.column_scale is not None:
            dz = dz * part.column_scale
            self.of_weight[at] = dz
        if grads.dx is not None:
            grads.dx[where] += (dz[:, None] @ part.w)[:, 0]

    def add(self, slab: slice, dw: Tensor | None, columns: dict[str, Tensor]) -> None:
        """Adds to dW and to the gradients of (V,) operands of a slab, which are in accumulation dtype."""
        edges = torch.tensor([slab.start, slab.stop], device=self.classes.device)
        first, last = torch.searchsorted(self.classes, edges).tolist()
        d = self.operands.call.input.shape[1]
        step = max(1, self.operands.call.workspace // self.of_bias.itemsize // (4 * d + 4))
        for piece in cut(last, step, first):
            column = self.classes[piece] - slab.start
            if dw is not None:
                _add_at(dw, column, self.of_weight[piece, None] * self.operands.input(self.row[piece]))
            if "bias" in columns:
                _add_at(columns["bias"], column, self.of_bias[piece])
            if self.of_scale is not None:
                _add_at(columns["column_scale"], column, self.of_scale[piece])


def _add_at(total: Tensor, place: Tensor, terms: Tensor) -> None:
    """total[place] += terms, in their order."""
    if total.device.type == "cpu":
        total.index_add_(0, place, terms)
    else:
        total.index_put_((place,), terms, accumulate=True)  # where index_add_ would use atomics
