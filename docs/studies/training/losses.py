"""The head's loss by each mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cce_inductor import cce_backend, config, linear_cross_entropy

from .specs import EAGER, EXACT, FILTERS, PERMUTED

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden states (..., D), head (V, D), targets (...)


def _plain(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float().flatten(0, -2), target.flatten())


def direct(mode: str) -> Loss:
    """By the operators' eager implementation, which is their specification."""
    if mode == EAGER:
        return _plain

    def loss(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
        with config.patch(grad_filter=_filter(mode)):
            return linear_cross_entropy(hidden, head, target)

    return loss


@cache
def compiled(mode: str) -> Loss:
    """By the kernels that torch.compile is given; "eager" is not compiled."""
    if mode == EAGER:
        return _plain
    options: dict[str, Any] = {"grad_filter": _filter(mode), "min_vocab": 0, "strict": True}
    made = torch.compile(_plain, backend=cce_backend, dynamic=False, options=options)
    return made  # type: ignore[no-any-return]


def loss_of(mode: str, by_compiler: bool) -> Loss:
    """The mean loss of a mode, a scalar in fp32."""
    return compiled(mode) if by_compiler else direct(mode)


def _filter(mode: str) -> object:
    return FILTERS[EXACT if mode == PERMUTED else mode]
