"""The bound that the forward leaves to a backward under a budget, and what the backward keeps by it.

For each block of 128 rows (counted among the active ones) and each column j, M_j is at least the mass that the
softmaxes of the block's rows give to j, their own targets left out: the forward adds up exp(z_ij - r_i) with r_i =
max(running log-sum-exp including this tile, z_target), and r_i is never above the final log-sum-exp. One byte holds it,
on a log scale, rounded up.

The contract (docs/design.md): in each block, what is dropped of the dense gradient, in the L1 norm over rows and
columns, is at most the budget times the block's whole dense gradient. As |g_i| p_ij <= max|g| p_ij, it is enough that
max|g| * (sum of M_j over the dropped columns) <= budget * sum_i |g_i| (1 - p_target).
"""

import math

import torch
from torch import Tensor

BLOCK = 128
# Code c stands for 2 ** (c / STEPS - OFFSET): 12 % from one to the next, from 2^-35 to more than BLOCK. The last: any.
STEPS, OFFSET, LAST = 6, 35.25, 255
# No row may lose more than this many budgets of its own gradient.
ROW_CAP = 64
# Over what an fp32 sum of 128 exponentials, and the logarithm of it, can be too small by.
INFLATION = 1.001


def blocks(rows: int) -> int:
    return -(-rows // BLOCK)


def size(rows: int, vocab: int) -> int:
    """Bytes of a bound: one for each column in each block of rows."""
    return blocks(rows) * vocab


def encode(mass: Tensor) -> Tensor:
    """The smallest code, uint8, that stands for at least `mass`, a sum of non-negative fp32 or fp64 numbers, or NaN."""
    exponent = (torch.log2(mass.double() * INFLATION) + OFFSET) * STEPS
    code = exponent.ceil().clamp(0, LAST)
    return torch.where(code.isnan(), LAST, code).to(torch.uint8)


def values(device: torch.device) -> Tensor:
    """What each code stands for, (256,) fp64. A mass of 0 has code 0, which stands for as little as there is."""
    code = torch.arange(LAST + 1, dtype=torch.float64, device=device)
    value = torch.exp2(code / STEPS - OFFSET)
    value[LAST] = torch.inf
    return value


def edges(codes: Tensor, allowed: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Where each block begins to keep columns, so that the others' bounds add up to at most `allowed`.

    codes: (blocks, V) uint8. allowed: (blocks,) fp64; where it is NaN all are kept. step: columns looked at at a time.

    Returns two (blocks,) int64: the edge, the smallest code that is not dropped whole, LAST + 1 where all of them are;
    and of the columns of that code the first one, in their order, that is kept (`beyond`).
    """
    value = values(codes.device)
    parts = range(0, codes.shape[1], step)
    number = torch.zeros(codes.shape[0], LAST + 1, dtype=torch.float64, device=codes.device)
    for first in parts:
        part = codes[:, first : first + step].long()
        number.scatter_add_(1, part, torch.ones_like(part, dtype=torch.float64))
    through = torch.where(number > 0, number * value, 0).cumsum(1)  # of all codes up to this one
    whole = ((through <= allowed[:, None]) & through.isfinite()).cumprod(1).sum(1)
    before = torch.where(whole > 0, through.gather(1, (whole - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    some = ((allowed - before) / value[whole.clamp(max=LAST)]).floor().nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
    start, seen = torch.zeros_like(whole), torch.zeros_like(whole)
    for first in parts:
        at_edge = codes[:, first : first + step].int() == whole[:, None]
        dropped = at_edge & (at_edge.cumsum(1) + seen[:, None] <= some[:, None])
        column = torch.arange(first + 1, first + 1 + dropped.shape[1], device=codes.device)
        start = torch.maximum(start, torch.where(dropped, column, 0).amax(1))
        seen += at_edge.sum(1)
    return whole, start


def beyond(codes: Tensor, column: Tensor, edge: Tensor, start: Tensor) -> Tensor:
    """Which columns are kept by what `edges` says, bool. Shapes broadcast."""
    codes = codes.int()
    return (codes > edge) | ((codes == edge) & (column >= start))


# An unbiased backward keeps every column from the edge on, and of the others each with a probability in proportion to
# its bound, but at least 1 / WEIGHT_CAP; its gradient is divided by that.
WEIGHT_CAP = 16
SAMPLE_BITS = 24
# By how many codes a column is below the edge, and for those further below the last: it is taken where the upper 24
# bits of its hash are less than this. The last as well where the edge is LAST or all codes may be dropped.
THRESHOLDS = tuple(
    math.ceil(2.0 ** (SAMPLE_BITS - c / STEPS)) for c in range(STEPS * (WEIGHT_CAP.bit_length() - 1) + 1)
)

HASH_BLOCK, HASH_COLUMN = 0x9E3779B9, 0x85EBCA6B
HASH_MIX = (0x7FEB352D, 0x846CA68B)  # lowbias32 (Chris Wellons, hash-prospector)
_WORD = 0xFFFFFFFF


def thresholds(codes: Tensor, edge: Tensor) -> Tensor:
    """The threshold of each column below the edge of its block, int64; its weight is 2 ** SAMPLE_BITS / threshold."""
    table = torch.tensor(THRESHOLDS, device=codes.device)
    last = len(THRESHOLDS) - 1
    return table[torch.where(edge >= LAST, last, (edge - codes.int()).clamp(0, last))]


def sampled(seed: Tensor, block: Tensor | int, column: Tensor, threshold: Tensor) -> Tensor:
    """Whether a column is taken: a function of the seed, int64 of which the low 32 bits count, block and column."""
    return (hashed(seed, block, column) >> (32 - SAMPLE_BITS)) < threshold


def hashed(seed: Tensor, block: Tensor | int, column: Tensor) -> Tensor:
    """32 bits for each (block, column), as int64; all arithmetic is that of unsigned 32-bit integers."""
    start = torch.as_tensor(block, dtype=torch.int64, device=column.device)
    h = _mix((seed & _WORD) ^ _times(start, HASH_BLOCK))
    return _mix(h ^ _times(column, HASH_COLUMN))


def _mix(h: Tensor) -> Tensor:
    h = _times(h ^ (h >> 16), HASH_MIX[0])
    h = _times(h ^ (h >> 15), HASH_MIX[1])
    return h ^ (h >> 16)


def _times(h: Tensor, factor: int) -> Tensor:
    """The low 32 bits of a product with h < 2 ** 32, in halves: no product here overflows an int64."""
    return (h * (factor & 0xFFFF) + ((h * (factor >> 16) & 0xFFFF) << 16)) & _WORD
