"""What the check of every row costs: how much of its own gradient the worst row of each block loses under a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from cce_inductor.ops import bound, filtered, reference
from cce_inductor.ops.call import Attributes, Call

CAPS = (16, 64, 256, None)  # of budgets; None: rows are not looked at


@torch.no_grad()
def examine(x: Tensor, weight: Tensor, target: Tensor, budget: float, dtype: torch.dtype) -> list[dict[str, float]]:
    """Of each block of rows of a mean loss: the share of columns that the budget keeps, and its rows' losses.

    worst, middle: what the row that loses most, and the median row, lose of their own gradient, in budgets.
    confidence: the median of 1 - p_target.
    """
    attributes = Attributes(compute_dtype=dtype, grad_filter=f"budget {budget!r}")
    call = Call.read([x, weight, target], "input weight target", None, "lse target_logit", attributes.args())
    lse, target_logit, codes = filtered.forward(call)
    rest = -torch.expm1(target_logit - lse)
    total = torch.stack([part.sum() for part in rest.double().split(bound.BLOCK)])
    edge, start = bound.edges(codes, budget * total, codes.shape[1])
    keep = bound.beyond(codes, torch.arange(codes.shape[1]), edge[:, None], start[:, None])
    rows = torch.arange(len(x))
    keep[rows // bound.BLOCK, target] = True
    found = []
    operands = reference.Operands(call)
    for kept, block in zip(keep, rows.split(bound.BLOCK), strict=True):
        dropped = (~kept).nonzero()[:, 0]
        z = operands.input(slice(int(block[0]), int(block[-1]) + 1)) @ operands.weight(dropped).T
        lost = (z - lse[block, None]).exp().sum(1)
        slack = torch.finfo(lost.dtype).eps * (2 + lse[block].abs())  # as in the backward's own check
        share = ((lost - slack).clamp(min=0) / rest[block].clamp(min=1e-30)) / budget
        found.append(
            {
                "kept": float(kept.float().mean()),
                "worst": float(share.max()),
                "middle": float(share.median()),
                "confidence": float(rest[block].median()),
            }
        )
    return found


def under(blocks: list[dict[str, float]], cap: int | None) -> tuple[float, float]:
    """With such a cap: the share of the blocks that are done in full, and of the columns that are computed."""
    full = [cap is not None and block["worst"] > cap for block in blocks]
    columns = [1.0 if f else block["kept"] for f, block in zip(full, blocks, strict=True)]
    return sum(full) / len(blocks), sum(columns) / len(blocks)
