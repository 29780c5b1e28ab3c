"""The ceiling: the GEMMs alone, at the case's own sizes, by `torch.mm`, in a process of its own.

One GEMM for the loss, x Wᵀ; with the gradients also dz W and dzᵀ x. The outputs are allocated beforehand: nobody
who computes a loss can be asked for more.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from .cases import Case, make_inputs
from .protocol import Handlers, main


def handlers(job: dict[str, Any]) -> Handlers:
    import torch

    case = Case(**job["case"])
    made: dict[str, Any] = {}

    def inputs() -> dict[str, Any]:
        dtype = torch.float32 if case.dtype == "fp32" else torch.bfloat16
        x, weight, _ = (t.detach() for t in make_inputs(case))
        made.update(x=x.to(dtype), weight=weight.to(dtype))
        made["z"] = torch.empty(case.n, case.v, dtype=dtype)
        made["dx"], made["dweight"] = torch.empty_like(made["x"]), torch.empty_like(made["weight"])
        return {}

    def timed(mode: str) -> dict[str, Any]:
        x, weight, z = made["x"], made["weight"], made["z"]
        start = time.perf_counter()
        torch.mm(x, weight.t(), out=z)
        if mode == "gradients":
            torch.mm(z, weight, out=made["dx"])
            torch.mm(z.t(), x, out=made["dweight"])
        return {"seconds": time.perf_counter() - start}

    def warm_up() -> dict[str, Any]:
        timed("gradients")
        return {}

    return {"inputs": inputs, "warm_up": warm_up, "timed": timed}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], handlers))
