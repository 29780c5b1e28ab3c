"""EMO, a bound on the earth mover's distance of the softmax to the target (arXiv 2310.04691), without the logits."""

from typing import Literal, get_args

import torch
from torch import Tensor

from .api import flatten, statistics_of
from .losses import REDUCTIONS, normalizer

Mode = Literal["emo", "adaptive", "sum"]
# Keeps quotients of losses finite, as in the published code.
_TINY = 1e-10
# Rows of a matrix whose norms are taken at once: what is cast for that is no copy of it.
_ROWS = 4096


def emo_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    mode: Mode = "adaptive",
    limit: float | None = 3.0,
    detach_target: bool = False,
    cost: Tensor | None = None,
) -> Tensor:
    """EMO of the logits ``softcap * tanh(scale * (input @ weight.T + bias) / softcap)``, beside their cross-entropy.

    For a row with the softmax q and the target y, ``emo = 1 - sum_v q_v cos(cost_v, cost_y)``: what it costs to move
    the mass of q to the target, if moving it between two classes costs one minus their cosine. ``mle`` is the
    cross-entropy. One pass over the vocabulary gives both.

    Args:
        input, weight, target, bias, ignore_index, reduction, scale, softcap: as in `linear_cross_entropy`.
        mode: "emo" alone; "adaptive", the mean ``(ratio * emo + mle) / 2`` with the ratio ``mle / emo``, no gradient
            through it and no more than `limit` (None for no limit, as in the paper); or "sum",
            ``(emo / mle) * mle + emo`` with no gradient through the quotient.
        detach_target: whether the target's own probability is taken out of q as a constant, as in the first version of
            the authors' code: the value is larger by q_y, the gradient is the same.
        cost: (V, D'), the vectors that the cosines are of; the weight itself by default. No gradient reaches it.

    Returns:
        A scalar, or (...) for reduction "none"; fp32 (fp64 for fp64 inputs). Without a row that counts the mean is 0.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as `linear_cross_entropy`, and for options that do not fit.
    """
    for name, value, known in (("mode", mode, get_args(Mode)), ("reduction", reduction, REDUCTIONS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    x, t = flatten(input, weight, target)
    cost = (weight if cost is None else cost).detach()
    if cost.dim() != 2 or cost.shape[0] != weight.shape[0]:
        raise ValueError(f"cost must be (V, D') with V = {weight.shape[0]} classes, got {tuple(cost.shape)}")
    row_mask = t != ignore_index
    t = torch.where(row_mask, t, 0)
    operands = {"input": x, "weight": weight, "target": t}
    if bias is not None:
        operands["bias"] = bias
    inverse = _inverse_norms(cost)
    operands |= {"other_input": cost[t], "other_weight": cost}
    operands |= {"other_row_scale": inverse[t], "other_column_scale": inverse}
    stats = statistics_of("emo_loss", operands, row_mask, "lse lse_low target_logit expected_other", scale, softcap)
    log_p = (stats["target_logit"] - normalizer(stats["lse"])) - stats["lse_low"]
    mle = torch.where(row_mask, -log_p, 0)
    emo = 1 - stats["expected_other"]
    emo = torch.where(row_mask, emo + log_p.exp().detach() if detach_target else emo, 0)
    rows = _combined(emo, mle, mode, limit)
    if reduction == "none":
        return rows.reshape(target.shape)
    return rows.sum() if reduction == "sum" else rows.sum() / row_mask.sum().clamp(min=1)


def _combined(emo: Tensor, mle: Tensor, mode: Mode, limit: float | None) -> Tensor:
    """What a row contributes, (N,): see `mode` above."""
    if mode == "emo":
        return emo
    if mode == "sum":
        return (emo / (mle + _TINY)).detach() * mle + emo
    ratio = (mle / (emo + _TINY)).detach()
    return ((ratio if limit is None else ratio.clamp(max=limit)) * emo + mle) / 2


def _inverse_norms(matrix: Tensor) -> Tensor:
    """One over the norm of each row, (V,), in fp32 (fp64 for fp64)."""
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    parts = [torch.linalg.vector_norm(part, dim=1, dtype=dtype) for part in matrix.split(_ROWS)]
    return torch.cat(parts).clamp(min=1e-12).reciprocal()
