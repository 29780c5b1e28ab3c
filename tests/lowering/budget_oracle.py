"""What a training step under a budget must agree with."""

import torch
from gpu_cases import Case
from head_oracle import check_error_rule, error, logits

from cce_inductor.ops import filtered, reference
from cce_inductor.ops.bound import BLOCK, values
from cce_inductor.ops.call import Attributes, Call


def check_budget(case: Case, data: list, out: tuple, ours: dict) -> None:
    """The bound is never below the mass, the contract holds, and the gradients are those of the columns kept by it."""
    x, w, b, t = data
    row_mask = t >= 0
    exact, eager = case.eager(data, torch.float64), case.eager(data, case.dtype)
    if case.not_a_number:
        for name, value in exact.items():
            assert torch.equal(ours[name].isnan(), value.isnan()), name
        return
    bounds = [value for value in out if isinstance(value, torch.Tensor) and value.dtype == torch.uint8]
    if not bounds or not row_mask.any():  # nothing may be dropped, or there is nothing to drop
        check_error_rule("", ours, eager, exact, case.compute)
        return
    (bound,) = bounds
    wide = [tensor.to(case.compute).double() for tensor in (x, w)]
    how = {"scale": 0.7, "softcap": 5.0} if case.softcap else {}
    z = logits(wide[0], wide[1], b.double(), **how, form=case.softcap)
    p = z.softmax(1)
    others = p.scatter(1, t.clamp(min=0)[:, None], 0)
    # What the backward reads, as the forward left it.
    wanted = {"lse": z.logsumexp(1), "target_logit": z.gather(1, t.clamp(min=0)[:, None])[:, 0]}
    floats = [v for v in out if isinstance(v, torch.Tensor) and v.shape == t.shape and v.dtype == torch.float32]
    near = {name: [v for v in floats if (v - value)[row_mask].abs().max() < 1e-3] for name, value in wanted.items()}
    saved = {name: found[0] for name, found in near.items()}
    g = case.tangent(t)
    how |= {"softcap_form": case.softcap} if case.softcap else {}
    attributes = Attributes(grad_filter=f"budget {case.budget!r}", compute_dtype=case.compute, **how)
    given = dict(zip(["input", "weight", "bias", "target"], data, strict=True))
    call = Call(given, None if case.reference else row_mask, "lse target_logit", attributes)
    operands = reference.Operands(call)
    chosen = filtered.select(operands, {"lse": g}, saved | {"bound": bound}, BLOCK, 512)
    rows, every = row_mask.nonzero()[:, 0], slice(0, w.shape[0])
    keep = torch.stack([chosen.certain(block, every) for block in range(-(-len(rows) // BLOCK))])
    for block, own in enumerate(rows.split(BLOCK)):
        stands_for = values(bound.device)[bound[block].long()]
        assert (stands_for >= others[own].sum(0) * (1 - 1e-6)).all(), "the bound is too low"
        weight = g[own].double().abs()
        dropped = (weight @ (others[own] * ~keep[block])).sum()
        assert dropped <= case.budget * (weight @ others[own]).sum() * (1 + 1e-5), "too much is dropped"
    if case.confident:
        assert keep[0].all() and not keep[1:].all(1).any(), "one block is to be done again"
    else:
        share = keep.double().mean().item()
        assert share > 0.9 if case.sharp < 0.1 else share < 0.95, f"{share} kept"
    dense = torch.zeros_like(p)
    dense[rows] = p[rows] * keep[torch.arange(len(rows)) // BLOCK] * g[rows, None]
    dense[rows, t[rows]] -= g[rows]
    if case.softcap:
        dense *= (1 - (z / 5.0) ** 2) ** {"tanh": 1.0, "rsqrt": 1.5}[case.softcap] * 0.7
    kept = {"loss": exact["loss"], "dx": dense @ wide[1], "dw": dense.T @ wide[0], "db": dense.sum(0)}
    # p is exp(logit - lse) with an lse of fp32: half a unit of its last place is an error that a row's entries share.
    shared = wanted["lse"][row_mask].abs().max().item() * torch.finfo(torch.float32).eps / 2
    for name, value in kept.items():
        allowed = 1.25 * error(eager[name], exact[name]) + 2 * torch.finfo(case.compute).eps + shared
        assert error(ours[name], value) <= allowed, f"{name} is off by {error(ours[name], value):.2e} of {allowed:.2e}"
