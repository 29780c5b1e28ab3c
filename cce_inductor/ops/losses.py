"""Losses as arithmetic on row statistics.

Plain PyTorch on (N,) vectors, written once: the direct calls run it on tensors, and the rewrite runs it on FX proxies
to put the same arithmetic into a graph. So it uses only operators and functions that FX records, and no Python `if` on
tensor values.
"""

from dataclasses import dataclass
from typing import Any

import torch

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class CrossEntropy:
    """The arguments of `F.cross_entropy` that are not tensors, and the weight of z-loss (PaLM, arXiv 2204.02311)."""

    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {self.reduction!r}")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be between 0.0 and 1.0, got {self.label_smoothing}")

    @property
    def statistics(self) -> str:
        """What it asks of the logits."""
        return "lse lse_low target_logit logit_sum" if self.label_smoothing else "lse lse_low target_logit"


def computed(row_mask: Any, input: Any, bias: Any, row_scale: Any = None, column_scale: Any = None) -> Any:
    """Which rows the operators compute for a loss: (N,) bool.

    row_mask: those that count, (N,) bool. input: (N, D). bias, column_scale: (V,) or None. row_scale: (N,) or None. The
    others have no part in the loss, but
    `log_softmax` gives a row whose logits are NaN, or +inf, the gradient NaN whatever its tangent is: 0 * NaN. So rows
    that are not finite are computed like those that count. A sum is finite only if its terms are; one that overflows
    makes a row be computed that need not be. A bias of -inf is usual, as a mask.
    """
    row_mask = row_mask | ~input.sum(-1).isfinite()
    if row_scale is not None:
        row_mask = row_mask | ~row_scale.isfinite()
    if column_scale is not None:
        row_mask = row_mask | ~column_scale.abs().amax().isfinite()
    return row_mask if bias is None else row_mask | ~bias.amax().isfinite()


def normalizer(lse: Any) -> Any:
    """What `log_softmax` subtracts from the logits: `lse`, or NaN, as its gradient is too, where that is not finite.

    A logit of +inf, or all of -inf, make NaN of a whole row of `log_softmax`, and of its gradient even where the
    tangent is 0. `torch.logsumexp` gives infinity.
    """
    # Not lse + 0 * lse: Inductor takes 0 * x for 0.
    return lse * torch.where(lse.isfinite(), 1.0, torch.nan).to(lse)  # its dtype


def cross_entropy(
    stats: dict[str, Any], target: Any, row_mask: Any, class_weight: Any, vocab: int, loss: CrossEntropy
) -> Any:
    """Cross-entropy from `lse`, `lse_low`, `target_logit` and, with label smoothing, `logit_sum`, all (N,).

    target: (N,) int64. row_mask: (N,) bool, the rows whose target is not `ignore_index`. class_weight: (V,) or
    None; with label smoothing, `logit_sum` is weighted by it. Returns the loss in the statistics' dtype: a scalar,
    or (N,) for reduction "none". Follows torch.nn.CrossEntropyLoss: the mean divides by the sum of the weights of
    the targets, and no row at all gives NaN. z-loss is not weighted by class: its mean is over the active rows.
    """
    lse, low = normalizer(stats["lse"]), stats["lse_low"]
    nll = (lse - stats["target_logit"]) + low
    if class_weight is None:
        weight = None
    else:
        class_weight = class_weight.detach().to(lse)  # its dtype
        weight = torch.where(row_mask, class_weight[torch.where(row_mask, target, 0)], 0)
        nll = nll * weight
    if loss.label_smoothing:
        total_weight = vocab if class_weight is None else class_weight.sum()
        smooth = (lse * total_weight - stats["logit_sum"]) + low * total_weight
        nll = nll * (1.0 - loss.label_smoothing) + smooth * (loss.label_smoothing / vocab)
    nll = torch.where(row_mask, nll, 0)
    squared = torch.where(row_mask, lse * lse * loss.z_loss, 0) if loss.z_loss else None
    if loss.reduction == "none":
        return nll if squared is None else nll + squared
    value = nll.sum()
    if loss.reduction == "mean":
        value = value / (row_mask.sum() if weight is None else weight.sum())
    if squared is None:
        return value
    extra = squared.sum()
    return value + (extra / row_mask.sum() if loss.reduction == "mean" else extra)
