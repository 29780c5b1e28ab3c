"""Synthetic inputs whose softmax is as sparse as a trained model's, for any shape.

Random normal inputs have a softmax that no trained model has: a kernel that skips what does not matter finds less to
skip in them than in practice. Here, with a unit vector e that all rows share, the logits are

    z_ij = b_j + noise_ij + [j = k_i] height_i      b_j = -slope · ln(rank_j + shift), less its mean

* b: some words are frequent everywhere (Zipf's law, flattened for the first `shift` words): sqrt(D)·e in every row
  of x, against b_j / sqrt(D) · e in every row of W, where W's noise along e blurs it;
* noise: what is likely depends on the row: normal, of standard deviation `spread`, from independent normal x and W; of
  its variance the rows of a document share the part `topic`;
* peaks: each row knows one word, drawn by b, that it raises by up to `height`: the part of W's row across e.

The parameters are fitted to the densities of `SOURCE`, as densities.py measures them, at the vocabularies of `FITTED`;
between these two they change with ln V.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .cases import Case

SOURCE = "SmolLM2-135M, V = 49152, and a model of V = 262144"
DOCUMENT = 512  # rows
BLOCK = 4096  # rows of W, or columns of the logits, that are made at a time


@dataclass(frozen=True)
class Parameters:
    """The numbers of the module's formula for one vocabulary."""

    slope: float
    shift: float
    spread: float
    topic: float
    height: float


FITTED = {49152: Parameters(1.72, 11.8, 3.55, 0.043, 2.5), 262144: Parameters(2.3, 176.0, 4.5, 0.145, 5.4)}


def parameters(vocab: int) -> Parameters:
    """Between the fitted vocabularies, along ln V; beyond them, of the nearer one."""
    (low, first), (high, last) = FITTED.items()
    part = min(max(math.log(vocab / low) / math.log(high / low), 0.0), 1.0)
    return Parameters(*(a ** (1 - part) * b**part for a, b in zip(astuple(first), astuple(last), strict=True)))


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, Any, Any]:
    """x (N, D), W (V, D), and targets (N,) drawn from the softmax, on the generator's device."""
    import torch

    how, device, root = parameters(case.v), generator.device, math.sqrt(case.d)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    shared = (2 * torch.randint(2, (case.d,), generator=generator, device=device) - 1) / root
    rank = torch.randperm(case.v, generator=generator, device=device)
    bias = -how.slope * torch.log(rank + how.shift)
    bias -= bias.mean()
    weight = torch.empty(case.v, case.d, dtype=dtype, device=device)
    for rows, b in zip(weight.split(BLOCK), bias.split(BLOCK), strict=True):
        rows.copy_((normal(*rows.shape) + b[:, None] * shared) / root)

    known = torch.multinomial(bias.softmax(0), case.n, replacement=True, generator=generator)
    height = how.height * torch.rand(case.n, 1, generator=generator, device=device)
    peak = _across(weight[known].float(), shared)
    topics = normal(-(-case.n // DOCUMENT), case.d).repeat_interleave(DOCUMENT, 0)[: case.n]
    noise = math.sqrt(how.topic) * topics + math.sqrt(1 - how.topic) * normal(case.n, case.d)
    x = _across(how.spread * noise, shared) + height * peak / peak.square().sum(1, keepdim=True)
    x = (x + root * shared).to(dtype)
    return x, weight, draw(x, weight, generator)


def _across(rows: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """`rows` without their part along a unit vector."""
    return rows - (rows @ direction)[:, None] * direction


def draw(x: torch.Tensor, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One column for each row, by the row's softmax: the largest of the logits less the logs of exponential numbers."""
    import torch

    best = torch.full((len(x),), -torch.inf, device=x.device)
    drawn = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for first in range(0, len(weight), BLOCK):
        z = x.float() @ weight[first : first + BLOCK].float().T
        z -= torch.empty_like(z).exponential_(generator=generator).log_()
        value, column = z.max(1)
        drawn = torch.where(value > best, column + first, drawn)
        best = torch.maximum(best, value)
    return drawn
