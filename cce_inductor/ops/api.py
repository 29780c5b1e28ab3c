"""The direct calls: the fused loss and its statistics as functions, eager or inside torch.compile."""

from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor

from .. import compat, config, version
from . import diagnostics
from .call import SEEDS, Attributes, filtered, sampled
from .library import FORWARD
from .losses import CrossEntropy, computed, cross_entropy
from .workspace import workspace


@torch.compiler.assume_constant_result
def _settings(device: torch.device) -> tuple[str, int, str]:
    """The operators' attributes that the process-wide settings decide; constants while torch.compile traces."""
    settings = config.current()
    return settings.grad_filter, workspace(settings.workspace_mb, device), version.source_hash()


@torch.compiler.assume_constant_result
def _slot(name: str, grad_filter: str, device: torch.device) -> torch.nn.Parameter | None:
    """Where the backward of one call leaves its numbers (diagnostics.py); None if nobody asked for them."""
    if not config.current().diagnostics:
        return None
    package = str(Path(__file__).parent.parent)
    stack = [(file, line) for file, line in compat.user_stack() if not file.startswith(package)]
    place = f" at {stack[-1][0]}:{stack[-1][1]}" if stack else ""
    return diagnostics.meter(f"cce_inductor.{name}{place}", grad_filter, device).slot()


def statistics_of(
    name: str,
    operands: dict[str, Tensor],
    row_mask: Tensor | None,
    statistics: str,
    scale: float,
    softcap: float | None,
) -> dict[str, Tensor]:
    """Calls the operator for the function `name`; gives the statistics by name.

    A filter that samples columns gets its seed here, and one whose numbers are wanted a slot for them.
    """
    grad_filter, scratch, source = _settings(operands["input"].device)
    attributes = Attributes(float(scale), _softcap(softcap), grad_filter=grad_filter, workspace=scratch, version=source)
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in operands.values())
    if differentiated and sampled(statistics, attributes):
        operands["seed"] = torch.randint(SEEDS, (1,), device=operands["input"].device)
    if differentiated and filtered(statistics, attributes):
        slot = _slot(name, attributes.grad_filter, operands["input"].device)
        if slot is not None:
            operands["diagnostics"] = slot
    out = FORWARD(list(operands.values()), " ".join(operands), row_mask, statistics, False, *attributes.args())
    return dict(zip(statistics.split(), out, strict=True))


def _softcap(softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    if not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for no softcap, got {softcap}")
    return float(softcap)


def flatten(input: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """input as (N, D) and target as (N,), or an error that names what does not fit."""
    if input.dim() == 0 or weight.dim() != 2:
        raise ValueError(
            f"input must be (..., D) and weight (V, D), got {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input {tuple(input.shape)} and weight {tuple(weight.shape)} differ in their last dimension; weight is "
            "(V, D), as in torch.nn.functional.linear"
        )
    if target.is_floating_point():
        raise TypeError(
            f"target must hold class indices (int64), got {target.dtype}; class probabilities need all logits: use "
            "torch.nn.functional.cross_entropy(torch.nn.functional.linear(input, weight), target)"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"target must hold class indices of dtype torch.int64, got {target.dtype}: use target.long()")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must have one class per row of input, {tuple(input.shape[:-1])}, got {tuple(target.shape)}"
        )
    return input.reshape(target.numel(), input.shape[-1]), target.reshape(-1)


@overload
def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = ...,
    class_weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    scale: float = ...,
    softcap: float | None = ...,
    z_loss: float = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = ...,
    class_weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    scale: float = ...,
    softcap: float | None = ...,
    z_loss: float = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of the logits ``softcap * tanh(scale * (input @ weight.T + bias) / softcap)``, without the logits.

    Equals ``F.cross_entropy(F.linear(input, weight, bias), target, ...)`` with logits kept in fp32, plus
    ``z_loss * logsumexp**2`` per row. Memory besides the result: ``cce_inductor.config.workspace_mb``.

    Args:
        input: hidden states, (..., D), any floating dtype.
        weight: the head, (V, D); int8 is read as it is, and has no gradient.
        target: class indices, (...), int64 in [0, V) or equal to `ignore_index`.
        bias: (V,), added before `scale`.
        class_weight: (V,), not differentiated; as `weight` of `F.cross_entropy`.
        ignore_index, reduction, label_smoothing: as in `F.cross_entropy`.
        scale: factor of the logits. softcap: bound of the logits (Gemma 2), None for none.
        z_loss: weight of the squared log-sum-exp (PaLM, arXiv 2204.02311, section 5).
        return_lse: whether to give the log-sum-exp of each row as well, from the same pass over the vocabulary.

    Returns:
        A scalar, or (...) for reduction "none"; fp32 (fp64 for fp64 inputs). Gradients have their operands' dtypes
        and are accumulated in fp32. Under autocast the operands are rounded to its dtype, as in `F.linear`.
        With `return_lse` a pair: this, and the log-sum-exps, (...) in the same dtype, which are differentiable too.
        Rows whose target is `ignore_index` have 0 there, and no gradient.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit. IndexError: a target outside the vocabulary (CPU).
        RuntimeError: on a second derivative.
    """
    loss = CrossEntropy(ignore_index, reduction, label_smoothing, z_loss)
    x, t = flatten(input, weight, target)
    row_mask = t != ignore_index
    # Rows that do not count, but are computed, need some class.
    operands = {"input": x, "weight": weight, "target": torch.where(row_mask, t, 0)}
    if bias is not None:
        operands["bias"] = bias
    if class_weight is not None:
        _check_class_weight(class_weight, weight)
        if label_smoothing:
            operands["column_weight"] = class_weight.detach()
    rows = computed(row_mask, x, bias)
    stats = statistics_of("linear_cross_entropy", operands, rows, loss.statistics, scale, softcap)
    value = cross_entropy(stats, t, row_mask, class_weight, weight.shape[0], loss)
    if reduction == "none":
        value = value.reshape(target.shape)
    if not return_lse:
        return value
    return value, torch.where(row_mask, stats["lse"], 0).reshape(target.shape)


def _check_class_weight(class_weight: Tensor, weight: Tensor) -> None:
    if class_weight.shape != weight.shape[:1]:
        raise ValueError(f"class_weight must be ({weight.shape[0]},), got {tuple(class_weight.shape)}")


def linear_logsumexp(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each row of logits and the logit of its target: `lse - target_logit` is the cross-entropy.

    Args and errors are those of `linear_cross_entropy`. Both results have the shape ``input.shape[:-1]``, are fp32
    (fp64 for fp64 inputs) and differentiable in input, weight and bias. Rows whose target is `ignore_index` are not
    computed: both are 0 there, and they have no gradient. None says that there are no such rows.
    """
    x, t = flatten(input, weight, target)
    row_mask = None
    if ignore_index is not None:
        row_mask = t != ignore_index
        t = torch.where(row_mask, t, 0)
    operands = {"input": x, "weight": weight, "target": t}
    if bias is not None:
        operands["bias"] = bias
    stats = statistics_of("linear_logsumexp", operands, row_mask, "lse lse_low target_logit", scale, softcap)
    return stats["lse"].reshape(target.shape), stats["target_logit"].reshape(target.shape)
