"""Runs whole training graphs' GPU code in Triton's interpreter, and prints for each case what differs from eager.

A process of its own, with TRITON_INTERPRET=1, which Triton reads when it is imported, and PYTHONPATH as in the
Makefile's target `kernels`. Arguments: names of cases, or none for all. Prints one line of JSON per case.
"""

import json
import sys

import rendered
import torch
from gpu_cases import CASES, Case, named
from gpu_graphs import generate
from head_oracle import check_error_rule, error

from cce_inductor.ops import reference
from cce_inductor.ops.bound import BLOCK, values
from cce_inductor.ops.call import Attributes, Call
from cce_inductor.ops.choice import Choice


def check_budget(case: Case, data: list, out: tuple, ours: dict) -> None:
    """The bound is never below the mass, the contract holds, and the gradients are those of the columns kept by it."""
    x, w, b, t = data
    active = t >= 0
    exact, eager = case.eager(data, torch.float64), case.eager(data, case.dtype)
    bounds = [value for value in out if isinstance(value, torch.Tensor) and value.dtype == torch.uint8]
    if not bounds or not active.any():  # nothing may be dropped, or there is nothing to drop
        check_error_rule("", ours, eager, exact, case.compute)
        return
    (bound,) = bounds
    wide = [tensor.to(case.compute).double() for tensor in (x, w)]
    u = wide[0] @ wide[1].T + b.double()
    z = 5.0 * torch.tanh(u * 0.7 / 5.0) if case.capped else u
    p = z.softmax(1)
    others = p.scatter(1, t.clamp(min=0)[:, None], 0)
    # What the backward reads, as the forward left it.
    wanted = {"lse": z.logsumexp(1), "target_logit": z.gather(1, t.clamp(min=0)[:, None])[:, 0]}
    floats = [v for v in out if isinstance(v, torch.Tensor) and v.shape == t.shape and v.dtype == torch.float32]
    near = {name: [v for v in floats if (v - value)[active].abs().max() < 1e-3] for name, value in wanted.items()}
    saved = {name: found[0] for name, found in near.items()}
    g = case.tangent(t)
    how = {"scale": 0.7, "softcap": 5.0} if case.capped else {}
    attributes = Attributes(grad_filter=f"budget {case.budget!r}", compute_dtype=case.compute, **how)
    given = dict(zip(["input", "weight", "bias", "target"], data, strict=True))
    call = Call(given, None if case.reference else active, "lse target_logit", attributes)
    operands = reference.Operands(call)
    keep = reference.kept_columns(operands, {"lse": g}, saved, bound, 512)
    rows = active.nonzero()[:, 0]
    for block, own in enumerate(rows.split(BLOCK)):
        stands_for = values(bound.device)[bound[block].long()]
        assert (stands_for >= others[own].sum(0) * (1 - 1e-6)).all(), "the bound is too low"
        weight = g[own].double().abs()
        dropped = (weight @ (others[own] * ~keep[block])).sum()
        assert dropped <= case.budget * (weight @ others[own]).sum() * (1 + 1e-5), "too much is dropped"
    blocks = keep[: -(-len(rows) // BLOCK)]
    if case.confident:
        assert blocks[0].all() and not blocks[1:].all(1).any(), "one block is to be done again"
    else:
        share = blocks.double().mean().item()
        assert share > 0.9 if case.sharp < 0.1 else share < 0.9, f"{share} kept"
    dense = torch.zeros_like(p)
    dense[rows] = p[rows] * keep[torch.arange(len(rows)) // BLOCK] * g[rows, None]
    dense[rows, t[rows]] -= g[rows]
    if case.capped:
        dense *= (1 - (z / 5.0) ** 2) * 0.7
    kept = {"loss": exact["loss"], "dx": dense @ wide[1], "dw": dense.T @ wide[0], "db": dense.sum(0)}
    for name, value in kept.items():
        allowed = 1.25 * error(eager[name], exact[name]) + 2 * torch.finfo(case.compute).eps
        assert error(ours[name], value) <= allowed, f"{name} is off by {error(ours[name], value):.2e} of {allowed:.2e}"


def run(case: Case) -> dict[str, int]:
    """Compares one case with eager; gives the launches of every kernel. Raises AssertionError beyond the error rule."""
    *leaves, t = data = case.data()
    inputs = [tensor.detach().requires_grad_() for tensor in leaves]
    how = {"tiles": case.tiles, "sweeps": case.sweeps, "workspace": 1 << 14, "rounds": case.rounds}
    if case.budget:
        how |= {"grad_filter": f"budget {case.budget!r}", "workspace": 3 << 19}
    for tensor in (inputs[0], t) if case.dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 0)
    choose = (lambda problem: Choice("test", gradients_in_forward=True)) if case.early else None
    forward, *_, backward = wrappers = generate(case.function(), [*inputs, t], choose=choose, **how)
    uses_tma = {k.constants()["TMA"] for w in wrappers for k in rendered.kernels(w) if k.ours} == {"True"}
    assert uses_tma == (case.tiles.tma and not case.transposed)
    sizes = [case.n] if case.dynamic else []
    assert ("early" if "with_gradients" in forward else "late") == ("early" if case.early else "late")
    with torch.no_grad():
        out, first = rendered.execute(forward, [*sizes, *data][: len(rendered.arguments(forward))])
        tangent = torch.ones((), dtype=out[0].dtype)
        saved = sorted(out[1:], key=lambda value: isinstance(value, torch.Tensor))  # sizes first
        gradients, second = rendered.execute(backward, [*saved, tangent])
    gradients = [gradient for gradient in gradients if gradient is not None]  # a size has none
    if case.budget:
        check_budget(case, data, out, named(out[0], gradients))
        return {**first, **second}
    exact = case.eager(data, torch.float64)
    check_error_rule("", named(out[0], gradients), case.eager(data, case.dtype), exact, case.compute)
    return {**first, **second}


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        try:
            print(json.dumps({"case": name, "launches": run(CASES[name])}), flush=True)
        except Exception as failure:  # reported per case: the others still run
            print(json.dumps({"case": name, "error": f"{type(failure).__name__}: {failure}"}), flush=True)
