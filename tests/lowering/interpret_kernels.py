"""Runs whole training graphs' GPU code in Triton's interpreter, and prints for each case what differs from eager.

A process of its own, with TRITON_INTERPRET=1, which Triton reads when it is imported, and PYTHONPATH as in the
Makefile's target `kernels`. Arguments: names of cases, or none for all. Prints one line of JSON per case.
"""

import json
import sys

import rendered
import torch
from budget_oracle import check_budget
from gpu_cases import CASES, Case, named
from gpu_graphs import generate
from head_oracle import check_error_rule

from cce_inductor.ops.choice import Choice


def run(case: Case) -> dict[str, int]:
    """Compares one case with eager; gives the launches of every kernel. Raises AssertionError beyond the error rule."""
    *leaves, t = data = case.data()
    inputs = [tensor.detach().requires_grad_() for tensor in leaves]
    how = {"tiles": case.tiles, "sweeps": case.sweeps, "workspace": 1 << 14, "rounds": case.rounds}
    how |= {"library": case.library}
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
        tangent = torch.ones_like(out[0])
        saved = sorted(out[1:], key=lambda value: isinstance(value, torch.Tensor))  # sizes first
        gradients, second = rendered.execute(backward, [*saved, tangent])
    gradients = [gradient for gradient in gradients if gradient is not None]  # a size has none
    if case.budget:
        check_budget(case, data, out, named(out[0], gradients))
        return {**first, **second}
    if case.zero:
        assert not any(tensor.any() for tensor in (out[0], *gradients))
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
