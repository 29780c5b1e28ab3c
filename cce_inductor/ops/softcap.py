"""The softcaps of `Attributes.softcap_form`, with t = u / cap and u the logit before the softcap.

| form  | logit                  | d logit / d u   |                                             |
|-------|------------------------|-----------------|---------------------------------------------|
| tanh  | cap * tanh(t)          | 1 - tanh(t)²    | Gemma 2                                     |
| rsqrt | cap * t / sqrt(1 + t²) | (1 + t²)^(-3/2) | u * rsqrt(u² + cap²) * cap, modded-nanogpt  |

Both grow with u between -cap and cap, no steeper than u does. An infinite u gives ± cap and the derivative 0; NaN
stays NaN.
"""

from typing import Any

import torch
from torch import Tensor

FORMS = ("tanh", "rsqrt")
# Where |t| is larger it is taken for this, by dtype: t² is finite, the logit ± cap, and the derivative so small that it
# is 0.
LARGEST = {torch.float32: 2.0**60, torch.float64: 2.0**500}


def _root(u: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """t, written over `u`, and 1 / sqrt(1 + t²)."""
    limit = LARGEST[u.dtype]
    t = u.div_(cap).clamp_(-limit, limit)
    return t, t.square().add_(1).rsqrt_()


def capped(u: Tensor, cap: float, form: str) -> Tensor:
    """The logits, written over `u`; `u` itself where `cap` is 0."""
    if not cap:
        return u
    if form == "tanh":
        return u.div_(cap).tanh_().mul_(cap)
    t, root = _root(u, cap)
    return t.mul_(root).mul_(cap)


def softcapped(u: Any, cap: float, form: str, dtype: torch.dtype) -> Any:
    """The logits of `u`, a tensor of this dtype or a proxy of one, by operations that autograd knows."""
    if form == "tanh":
        return (u / cap).tanh() * cap
    limit = LARGEST[dtype]
    t = (u / cap).clamp(-limit, limit)
    return t * (t.square() + 1).rsqrt() * cap


def capped_and_inner(u: Tensor, cap: float, form: str) -> tuple[Tensor, Tensor]:
    """The logits, and what `times_slope` needs: tanh(t), or 1 / sqrt(1 + t²). Both in accumulation dtype."""
    if form == "tanh":
        tanh = u.div_(cap).tanh_()
        return tanh * cap, tanh
    t, root = _root(u, cap)
    return t.mul_(root).mul_(cap), root


def times_slope(dz: Tensor, inner: Tensor, form: str) -> Tensor:
    """dz * d logit / d u, written over `dz`."""
    if form == "tanh":
        return torch.ops.aten.tanh_backward.grad_input(dz, inner, grad_input=dz)
    return dz.mul_(inner).mul_(inner).mul_(inner)
