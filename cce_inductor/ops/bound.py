"""The bound that the forward leaves to a backward under a budget, and what the backward keeps by it.

For each block of 128 rows (counted among the active ones) and each column j, M_j is at least the mass that the
softmaxes of the block's rows give to j, their own targets left out: the forward adds up exp(z_ij - r_i) with r_i =
max(running log-sum-exp including this tile, z_target), and r_i is never above the final log-sum-exp. One byte holds it,
on a log scale, rounded up.

The contract (docs/design.md): in each block, what is dropped of the dense gradient, in the L1 norm over rows and
columns, is at most the budget times the block's whole dense gradient. As |g_i| p_ij <= max|g| p_ij, it is enough that
max|g| * (sum of M_j over the dropped columns) <= budget * sum_i |g_i| (1 - p_target).
"""

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


def kept(codes: Tensor, allowed: Tensor) -> Tensor:
    """Which columns each block keeps, (blocks, V) bool, so that the others' bounds add up to at most `allowed`.

    codes: (blocks, V). allowed: (blocks,) fp64; where it is NaN all are kept. Columns are dropped from the least bound
    on, those of equal bound in their order.
    """
    value = values(codes.device)
    number = torch.zeros(codes.shape[0], LAST + 1, dtype=torch.float64, device=codes.device)
    number.scatter_add_(1, codes.long(), torch.ones_like(codes, dtype=torch.float64))
    through = torch.where(number > 0, number * value, 0).cumsum(1)  # of all codes up to this one
    # How many codes are dropped whole, and how many columns of the next one.
    whole = ((through <= allowed[:, None]) & through.isfinite()).cumprod(1).sum(1)
    before = torch.where(whole > 0, through.gather(1, (whole - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    edge = whole.clamp(max=LAST)
    some = ((allowed - before) / value[edge]).floor().nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
    at_edge = codes == edge[:, None]
    return (codes > edge[:, None]) | (at_edge & (at_edge.cumsum(1) > some[:, None]) & (whole <= LAST)[:, None])
