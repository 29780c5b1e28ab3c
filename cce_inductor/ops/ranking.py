"""Registers the operator for statistics of the order of logits: the largest ones, and where a row's target stands.

`linear_ranking` gives for each row of logits, which it never holds as a whole: "values", the `k` largest, and
"indices", their classes, (N, k) both, in descending order as by `torch.topk`; "gt", "ge", "lt" and "le", (N,), how many
logits are larger than a number of the row, at least as large, and so on. The number is an operand, "threshold", or the
logit of the operand "target": that is then read off the very logits that are counted, so that it is as large as itself.

They are for logging and have no gradient. The logits are eager's, rounded where it rounds them: in 16 bits many are
equal, and they are counted. All is computed by PyTorch's own kernels, tile by tile within the workspace:

    z = scale * ((input @ weight.T + bias) * factor + shift)       rounded to `compute_dtype` in front of `factor`
    z = softcap * tanh(z / softcap)                                or another softcap; in `dtype` from `factor` on
    z_j = filled_j                                                 where that is not NaN
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .call import MIB, cut
from .library import autocast_off, library, must_be_saved
from .reference import check_classes
from .softcap import capped

# "bias", "shift" and "filled" are (V,), "factor" is one number, "target" and "threshold" are (N,).
library.define(
    "linear_ranking(Tensor[] operands, str names, str results, int k, float scale, float softcap, str softcap_form, "
    "ScalarType compute_dtype, ScalarType dtype, int workspace, str version) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
RANKING = torch.ops.cce_inductor.linear_ranking.default

COMPARISONS = {"gt": torch.gt, "ge": torch.ge, "lt": torch.lt, "le": torch.le}
LARGEST = ("values", "indices")
RESULTS = (*LARGEST, *COMPARISONS)
# With fewer rows, or columns, to a tile a GEMM is far from its rate.
ROWS, COLUMNS = 128, 512


@dataclass(frozen=True)
class Ranking:
    """The arguments of a call."""

    operands: dict[str, Tensor]
    results: list[str]
    k: int
    scale: float
    softcap: float
    softcap_form: str
    compute_dtype: torch.dtype
    dtype: torch.dtype
    workspace: int

    @staticmethod
    def read(operands: list[Tensor], names: str, results: str, *rest: Any) -> "Ranking":
        return Ranking(dict(zip(names.split(), operands, strict=True)), results.split(), *rest[:-1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, V, D."""
        x, w = self.operands["input"], self.operands["weight"]
        return x.shape[0], w.shape[0], w.shape[1]

    @property
    def counts(self) -> list[str]:
        return [name for name in self.results if name in COMPARISONS]

    def check(self) -> None:
        """Raises RuntimeError for a call that says nothing of what it should."""
        unknown = [name for name in self.results if name not in RESULTS]
        given = [name for name in ("target", "threshold") if name in self.operands]
        if unknown or not self.results:
            raise RuntimeError(f"cce_inductor: results {self.results}: expected some of {', '.join(RESULTS)}")
        if len(given) != bool(self.counts):
            raise RuntimeError(f"cce_inductor: {self.results} needs a target or a threshold, and one only to count")

    def empty(self) -> dict[str, Tensor]:
        x = self.operands["input"]
        shapes = {name: (x.shape[0], self.k) if name in LARGEST else (x.shape[0],) for name in self.results}
        return {
            name: x.new_empty(shape, dtype=self.dtype if name == "values" else torch.int64)
            for name, shape in shapes.items()
        }

    def tile(self) -> tuple[int, int]:
        """(rows, columns) of a tile whose scratch fits the workspace.

        A tile has all columns where a target is given and enough rows fit: else its logit is computed beforehand.
        """
        n, v, d = self.shape
        x, w = self.operands["input"], self.operands["weight"]
        size, narrow = self.compute_dtype.itemsize, self.dtype.itemsize < 4
        workspace = min(
            self.workspace, max(n * v * self.dtype.itemsize, MIB)
        )  # not more than the logits, as in call.py
        entry = size + (self.dtype.itemsize if self.dtype != self.compute_dtype else 0)
        # Comparisons are written over the last use of a tile; PyTorch adds up 16 bits on a CPU in a copy.
        entry += (len(self.counts) > 1) * self.dtype.itemsize + (4 if narrow and x.device.type == "cpu" else 0)
        entry += (2 * 4 if narrow else self.dtype.itemsize) * (self.softcap_form == "rsqrt" and self.softcap > 0)
        row = size * d if x.dtype != self.compute_dtype else 0
        column = size * d if w.dtype != self.compute_dtype else 0
        if "target" in self.operands and not column:
            rows = workspace // (v * entry + row)
            if rows >= min(n, ROWS):
                return max(1, min(n, rows)), v
        rows = max(n, 1)
        while rows > 1 and workspace - rows * row < min(v, COLUMNS) * (rows * entry + column):
            rows = -(-rows // 2)
        columns = (workspace - rows * row) // (rows * entry + column)
        return rows, max(1, min(v, columns))

    def logits(self, x: Tensor, slab: slice) -> Tensor:
        """The logits of some rows and columns."""
        part = {name: self.operands[name][slab] for name in ("bias", "shift", "filled") if name in self.operands}
        bias = part["bias"].to(self.compute_dtype) if "bias" in part else None
        z = F.linear(x, self.operands["weight"][slab].to(self.compute_dtype), bias).to(self.dtype)
        if "factor" in self.operands:
            z.mul_(self.operands["factor"])
        if "shift" in part:
            z.add_(part["shift"])
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap:
            wide = z.float() if self.softcap_form == "rsqrt" and z.dtype.itemsize < 4 else z
            z = capped(wide, self.softcap, self.softcap_form).to(z.dtype)
        if "filled" in part:
            fill = part["filled"].to(z.dtype)
            torch.where(fill.isnan(), z, fill, out=z)
        return z


def _eager(*arguments: Any) -> list[Tensor]:
    call = Ranking.read(*arguments)
    call.check()
    n, v, _ = call.shape
    if "target" in call.operands:
        check_classes(call.operands["target"], v)
    out = call.empty()
    rows, columns = call.tile()
    for block in cut(n, rows):
        x = call.operands["input"][block].to(call.compute_dtype)
        found = _block(call, x, block, [*cut(v, columns)])
        for name, result in out.items():
            result[block] = found[name]
    return list(out.values())


def _block(call: Ranking, x: Tensor, block: slice, slabs: list[slice]) -> dict[str, Tensor]:
    """The results of some rows."""
    whole = call.logits(x, slabs[0]) if len(slabs) == 1 else None
    threshold = call.operands["threshold"][block] if "threshold" in call.operands else None
    if "target" in call.operands:
        threshold = _logits_of(call, x, call.operands["target"][block], slabs, whole)
    largest: tuple[Tensor, Tensor] | None = None
    counts = {name: x.new_zeros(x.shape[0], dtype=torch.int64) for name in call.counts}
    for slab in slabs:
        z = call.logits(x, slab) if whole is None else whole
        if call.k:
            largest = _larger(largest, z, slab.start, call.k)
        for name in call.counts:
            assert threshold is not None
            passes = COMPARISONS[name](z, threshold[:, None], out=z if name == call.counts[-1] else torch.empty_like(z))
            # In fp32 and fp64 integers are added up exactly, up to 2^24 of them.
            counts[name] += passes.sum(1, dtype=torch.promote_types(z.dtype, torch.float32)).to(torch.int64)
            del passes
        del z  # in front of the next one
    return counts if largest is None else {**counts, **dict(zip(LARGEST, largest, strict=True))}


def _logits_of(call: Ranking, x: Tensor, target: Tensor, slabs: list[slice], whole: Tensor | None) -> Tensor:
    """The entry of each row's target; NaN in rows without one."""
    found = x.new_full((x.shape[0],), torch.nan, dtype=call.dtype)
    for slab in slabs:
        z = call.logits(x, slab) if whole is None else whole
        column = target - slab.start
        inside = (column >= 0) & (column < z.shape[1])
        found = torch.where(inside, z.gather(1, torch.where(inside, column, 0)[:, None])[:, 0], found)
        del z
    return found


def _larger(largest: tuple[Tensor, Tensor] | None, z: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of `largest` and the columns of a tile, or all where there are not so many yet."""
    values, indices = z.topk(min(k, z.shape[1]))
    indices += start
    if largest is None:
        return values, indices
    values, indices = torch.cat([largest[0], values], 1), torch.cat([largest[1], indices], 1)
    values, places = values.topk(min(k, values.shape[1]))
    return values, indices.gather(1, places)


def _autograd(*arguments: Any) -> list[Tensor]:
    return must_be_saved(RANKING, *arguments)


library.impl("linear_ranking", _eager, "CompositeExplicitAutograd")
library.impl("linear_ranking", _autograd, "Autograd")
autocast_off("linear_ranking", RANKING)


@torch.library.register_fake("cce_inductor::linear_ranking", lib=library)
def _fake(*arguments: Any) -> list[Tensor]:
    call = Ranking.read(*arguments)
    call.check()
    return list(call.empty().values())


@register_flop_formula(torch.ops.cce_inductor.linear_ranking)
def _flops(operands, names, *args, **kwargs) -> int:
    """2 N V D: one GEMM over the logits. `operands` are shapes."""
    shapes = dict(zip(names.split(), operands, strict=True))
    (n, d), v = shapes["input"], shapes["weight"][0]
    return 2 * n * v * d
