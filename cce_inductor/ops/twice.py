"""The gradients of the fused statistics by plain PyTorch, for a backward that is to be differentiated itself.

The kernels have no second derivative. Here the logits are computed in full, and autograd knows every step.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import SCALES, Call
from .divergences import LEAST
from .pairs import Function
from .softcap import softcapped
from .statistics import TABLE


def gradients(call: Call, tangents: dict[str, Tensor], needs: list[str]) -> list[Tensor]:
    """The gradients of the operands named in `needs`, in their own dtypes, as differentiable functions of all.

    tangents: in the shape of the statistic, for each that has one.
    """
    with torch.enable_grad():
        # Aliases: what the gradients are taken of ends here, and the operands' own hooks are not run.
        own = {name: call.operands[name].view_as(call.operands[name]) for name in needs}
        values = _statistics(call, call.operands | own, list(tangents))
        total = torch.stack([(value * tangents[name]).sum() for name, value in values.items()]).sum()
        found = torch.autograd.grad(total, list(own.values()), create_graph=True, allow_unused=True)
    return [t.new_zeros(t.shape) if g is None else g for g, t in zip(found, own.values(), strict=True)]


def _statistics(call: Call, operands: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The differentiable statistics named, from all logits: 0 in rows that are not active."""
    exact = call.accumulate_dtype
    z = _logits(replace(call, operands=operands))
    other = replace(call, operands=operands).other
    r = None if other is None else _logits(other)
    found: dict[str, Tensor] = {}
    for name in names:
        if name == "lse":
            found[name] = z.logsumexp(1)
        elif name == "lse_rest":
            inside = operands["target"] if call.row_mask is None else operands["target"] * call.row_mask
            rest = z.scatter(1, inside[:, None], -torch.inf)
            if "row_label" in operands:
                rest = rest.masked_fill(operands["row_label"][:, None] == operands["class_label"], -torch.inf)
            found[name] = rest.logsumexp(1)
        elif name == "target_logit":
            inside = operands["target"] if call.row_mask is None else operands["target"] * call.row_mask
            found[name] = z.gather(1, inside[:, None])[:, 0]
        elif name == "entry_logits":
            own = operands["entries"]
            found[name] = z.gather(1, own if call.row_mask is None else own * call.row_mask[:, None])
        elif name == "logit_sum":
            weight = operands.get("column_weight")
            found[name] = z.sum(1) if weight is None else z @ weight.to(exact)
        elif (pair := TABLE[name].pair) is not None:
            assert r is not None
            found[name] = _of_two(*((z, r) if pair[1] else (r, z)), pair[0])
        elif (divergence := TABLE[name].divergence) is not None:
            assert r is not None
            found[name] = divergence.entries(*(t.log_softmax(1).clamp(min=LEAST) for t in (z, r))).sum(1)
        else:
            assert name == "entropy"
            log_p = z.log_softmax(1)
            p = log_p.exp()
            found[name] = -(p * torch.where(p == 0, 0, log_p)).sum(1)  # p log p tends to 0
    if call.row_mask is None:
        return found
    return {
        name: torch.where(call.row_mask if value.dim() == 1 else call.row_mask[:, None], value, 0)
        for name, value in found.items()
    }


def _logits(call: Call) -> Tensor:
    """(N, V)."""
    attributes, exact, operands = call.attributes, call.accumulate_dtype, call.operands
    x, w = (operands[name].to(call.compute_dtype).to(exact) for name in ("input", "weight"))
    given = {name: operands[name].to(exact) for name in ("bias", *SCALES) if name in operands}
    z = F.linear(x, w) * given.get("column_scale", 1.0) + given.get("bias", 0.0)
    z = z * attributes.scale
    if "row_scale" in given:
        z = z * given["row_scale"][:, None]
    return softcapped(z, attributes.softcap, attributes.softcap_form, exact) if attributes.softcap else z


def _of_two(a: Tensor, b: Tensor, function: Function) -> Tensor:
    """A function of pairs.py, (N,), from all logits."""
    log_b = b.log_softmax(1)
    p_b, log_a = log_b.exp(), a.log_softmax(1)
    values = {"expected": a, "cross_entropy": -log_a, "divergence": log_b - log_a}[function]
    return torch.where(p_b == 0, 0, p_b * torch.where(p_b == 0, 0, values)).sum(1)
