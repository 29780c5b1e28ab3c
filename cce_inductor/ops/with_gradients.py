"""Registers the operators for a loss whose gradients are formed in the forward pass.

`linear_statistics_with_gradients` is `linear_statistics` followed by `linear_statistics_backward`, for tangents that
are known beforehand up to one common factor, as those of a mean or a sum are. A kernel that does both need not compute
the logits twice. Those tangents cannot depend on the statistics, so the operator does to them what arithmetic on the
statistics would: the tangent of lse is NaN in rows whose lse is not finite (`losses.normalizer`), and lse_low counts
(`statistics.with_all_digits`). Statistics of two heads are given the tangents of their values, and p and q are formed
with lse_low. The parts `.own` and `.other` of a divergence have no tangents, but must be asked for. `attach_gradients`
ties such gradients to the loss: its backward multiplies them by its tangent.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .call import saved_names
from .library import (
    ATTRIBUTES,
    autocast_off,
    backward_flops,
    eager_backward,
    eager_forward,
    fake_backward,
    fake_forward,
    library,
    must_be_saved,
)
from .statistics import with_all_digits

# The gradients, of the operands named in `needs`, come behind the statistics in the result.
library.define(
    "linear_statistics_with_gradients(Tensor[] tangents, str tangent_names, Tensor[] operands, str names, "
    f"Tensor? row_mask, str statistics, str needs, {ATTRIBUTES}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
library.define(
    "attach_gradients(Tensor value, Tensor[] operands, Tensor[] gradients) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

WITH_GRADIENTS = torch.ops.cce_inductor.linear_statistics_with_gradients.default
ATTACH = torch.ops.cce_inductor.attach_gradients.default


def _eager(tangents, tangent_names, operands, names, row_mask, statistics, needs, *attributes) -> list[Tensor]:
    saved = eager_forward(operands, names, row_mask, statistics, True, *attributes)
    given = dict(zip(tangent_names.split(), tangents, strict=True))
    results = dict(zip(saved_names(statistics, saved), saved, strict=True))
    if "lse" in given:
        given["lse"] = torch.where(results["lse"].isfinite(), given["lse"], torch.nan)
    given, results = with_all_digits(given, results)
    call = (operands, names, row_mask, statistics, needs, *attributes)
    gradients = eager_backward(list(given.values()), tangent_names, list(results.values()), *call)
    return saved[: len(statistics.split())] + gradients


def _autograd(tangents, tangent_names, operands, *rest) -> list[Tensor]:
    """Its results are constants to autograd; `attach_gradients` is what is differentiated."""
    return must_be_saved(WITH_GRADIENTS, tangents, tangent_names, operands, *rest)


library.impl("linear_statistics_with_gradients", _eager, "CompositeExplicitAutograd")
library.impl("linear_statistics_with_gradients", _autograd, "Autograd")
autocast_off("linear_statistics_with_gradients", WITH_GRADIENTS)


@torch.library.register_fake("cce_inductor::linear_statistics_with_gradients", lib=library)
def _fake(tangents, tangent_names, operands, names, row_mask, statistics, needs, *attributes) -> list[Tensor]:
    saved = fake_forward(operands, names, row_mask, statistics, True, *attributes)
    return saved[: len(statistics.split())] + fake_backward(
        tangents, tangent_names, saved, operands, names, row_mask, statistics, needs, *attributes
    )


@register_flop_formula(torch.ops.cce_inductor.linear_statistics_with_gradients)
def _flops(tangents, tangent_names, operands, names, row_mask, statistics, needs, *args, **kwargs) -> int:
    """2 N V D for the logits, and as much again for each of dx and dW that is wanted."""
    return backward_flops(tangents, tangent_names, (), operands, names, row_mask, statistics, needs)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        # The operator itself: in a traced graph the loss then depends on the gradients, which is what makes them
        # results of the forward that can be saved.
        with torch._C._AutoDispatchBelowAutograd():
            return ATTACH(value, list(operands), gradients)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor):
        # 0-dimensional tensors do not promote: each gradient keeps its dtype, and a tangent of 1 every bit of it.
        return (None, None, *(gradient * tangent for gradient in ctx.saved_tensors))


def _attach(value: Tensor, operands: list[Tensor], gradients: list[Tensor]) -> Tensor:
    return _Attach.apply(value, gradients, *operands)


library.impl("attach_gradients", _attach, "Autograd")
library.impl("attach_gradients", lambda value, operands, gradients: value.clone(), "CompositeExplicitAutograd")


@torch.library.register_fake("cce_inductor::attach_gradients", lib=library)
def _fake_attach(value, operands, gradients) -> Tensor:
    return torch.empty_like(value)
