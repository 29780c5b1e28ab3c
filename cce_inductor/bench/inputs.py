"""The inputs of a case: x (N, D), W (V, D) and targets (N,), on its device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import calibrated, smollm2
from .cases import FLAT, IGNORE_INDEX, REAL, Case

if TYPE_CHECKING:
    import torch

LOGITS_STD = 2.5  # of the normal logits: what a half-trained model has
FLAT_STD = 0.01  # ... of a model at its initialisation
BLOCK = 4096  # rows that are made at a time, so that nothing larger than the inputs themselves is ever alive


def make_inputs(case: Case, folder: str | Path = "") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x and W, which require gradients, and the targets. `folder` is where `smollm2.write` has been."""
    import torch

    generator = torch.Generator(case.device).manual_seed(case.seed)
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    if case.activations == REAL:
        x, weight, target = (t.to(case.device) for t in smollm2.read(folder, case.n))
        x, weight = x.to(dtype), weight.to(dtype)
    else:
        make = {"normal": normal, "calibrated": calibrated.make, FLAT: normal}[case.activations]
        x, weight, target = make(case, dtype, generator)
        if case.activations == FLAT:
            weight *= FLAT_STD / LOGITS_STD
    order = torch.randperm(case.n, generator=generator, device=case.device)
    target[order[case.counted :]] = IGNORE_INDEX
    return x.requires_grad_(), weight.requires_grad_(), target


def normal(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, Any, Any]:
    """Random normal x and W, uniform targets."""
    import torch

    def filled(rows: int, scale: float) -> Any:
        made = torch.empty(rows, case.d, dtype=dtype, device=case.device)
        for block in made.split(BLOCK):
            block.copy_(torch.randn(block.shape, generator=generator, device=case.device).mul_(scale))
        return made

    x, weight = filled(case.n, LOGITS_STD), filled(case.v, 1 / math.sqrt(case.d))
    return x, weight, torch.randint(case.v, (case.n,), generator=generator, device=case.device)
