"""How far the gradients of each filter are from float64's, beside what rounding to the dtype costs anyway."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cce_inductor.bench.measure import relative_error

from .losses import direct
from .specs import EAGER, FILTERS

QUANTILES = (0.5, 0.99)


@torch.no_grad()
def reference(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dW of the mean loss in float64, block by block of rows."""
    w = weight.double()
    dx, dw = torch.empty(x.shape, dtype=torch.float64), torch.zeros_like(w)
    for block in torch.arange(len(x)).split(128):
        rows = x[block].double()
        dz = (rows @ w.T).softmax(1)
        dz[torch.arange(len(block)), target[block]] -= 1
        dz /= len(x)
        dx[block] = dz @ w
        dw.addmm_(dz.T, rows)
    return dx, dw


def measure(x: Tensor, weight: Tensor, target: Tensor, modes: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """By mode: relative error of dx and dW, quantiles of the errors of single rows of dW, rows that are exactly zero.

    The operands are rounded to `dtype` first, so that what is measured is the computation and its own rounding.
    """
    x, weight = x.detach().to(dtype), weight.detach().to(dtype)
    dx, dw = reference(x, weight, target)
    norms = dw.norm(dim=1).clamp(min=1e-300)
    found = {}
    for mode in modes:
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        direct(mode)(a, w, target).backward()
        assert a.grad is not None and w.grad is not None
        rows = (w.grad.double() - dw).norm(dim=1) / norms
        found[mode] = {
            "dx": relative_error(a.grad, dx),
            "dW": relative_error(w.grad, dw),
            "rows": [float(q) for q in torch.quantile(rows, torch.tensor(QUANTILES, dtype=torch.float64))],
            "zero": float((w.grad == 0).all(1).float().mean()),
        }
    return found


def modes_for(supported: Any) -> list[str]:
    """The names of eager and of the filters that this version has, as `supported` says of a name."""
    return [EAGER, *(mode for mode in FILTERS if supported(mode))]
