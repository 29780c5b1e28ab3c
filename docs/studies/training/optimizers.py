"""The optimizers of the small language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv 2302.06675, algorithm 2: every step is as large as the learning rate, or nothing.

    A gradient that is exactly zero at every step leaves a weight where it is; one of any other size moves it.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; weights without a gradient stay."""
        for group in self.param_groups:
            first, second = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["exp_avg"] = torch.zeros_like(weight)
                mean = state["exp_avg"]
                weight.sub_(mean.lerp(weight.grad, 1 - first).sign_(), alpha=group["lr"])
                mean.lerp_(weight.grad, 1 - second)


def make(name: str, params: Iterable[Any], lr: float) -> torch.optim.Optimizer:
    """lr: of AdamW; Lion takes a tenth of it, as its authors recommend. No weight decay: it would hide what is dropped.

    Adam's eps is far below any gradient: PyTorch's 1e-8 would hold back the rows of words that never occur, which are
    what a filter drops.
    """
    if name == "Lion":
        return Lion(params, lr / 10)
    return torch.optim.AdamW(params, lr, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0, fused=True)
