"""Hidden states and a head that are made, for trying the harness out without a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 128  # rows whose targets are drawn at a time
# Logits = -ZIPF ln(rank) + normal parts with these deviations, one per text and one per row.
ZIPF, TEXT, ROW, WIDTH = 1.78, 1.6, 3.5, 64
TEXT_ROWS = 512


def made(rows: int, v: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, D), W (v, D) and targets (rows,) of words with Zipf's frequencies, drawn from the head's own softmax."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    texts = -(-rows // TEXT_ROWS)
    x = (TEXT * normal(texts, 1, WIDTH) + ROW * normal(texts, TEXT_ROWS, WIDTH)).view(-1, WIDTH)[:rows]
    rank = torch.randperm(v, generator=generator) + 1.0
    weight = torch.cat([-ZIPF * rank.log()[:, None], normal(v, WIDTH) / math.sqrt(WIDTH)], 1)
    x = torch.cat([torch.ones(rows, 1), x], 1)
    drawn = torch.rand(rows, 1, generator=generator)
    target = [
        torch.searchsorted((part @ weight.T).softmax(1).cumsum(1), at)[:, 0].clamp_(max=v - 1)
        for part, at in zip(x.split(BLOCK), drawn.split(BLOCK), strict=True)
    ]
    return x, weight, torch.cat(target)
