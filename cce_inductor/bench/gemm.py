"""The ceiling: the GEMMs alone, at the case's own sizes, by `torch.mm`, in a process of its own.

One GEMM for the loss, x Wᵀ; with the gradients also dz W and dzᵀ x. The outputs are allocated beforehand: nobody
who computes a loss can be asked for more.
"""

from __future__ import annotations

import sys
from typing import Any

from ..instruments.meters import METERS
from ..instruments.protocol import Handlers, main
from .cases import Case
from .inputs import make_inputs


def handlers(job: dict[str, Any]) -> Handlers:
    """`inputs` first, then `warm_up`, then `timed`: seconds of the products of a mode of `MODES`."""
    import torch

    case = Case(**job["case"])
    meter = METERS[case.device]()
    made: dict[str, Any] = {}

    def inputs() -> dict[str, Any]:
        dtype = torch.float32 if case.dtype == "fp32" else torch.bfloat16
        x, weight, _ = (t.detach() for t in make_inputs(case, job["cache"]))
        made.update(x=x.to(dtype), weight=weight.to(dtype))
        made["z"] = made["x"].new_empty(case.n, case.v)
        made["dx"], made["dweight"] = torch.empty_like(made["x"]), torch.empty_like(made["weight"])
        return {}

    def multiply(mode: str) -> None:
        x, weight, z = made["x"], made["weight"], made["z"]
        torch.mm(x, weight.t(), out=z)
        if mode == "gradients":
            torch.mm(z, weight, out=made["dx"])
            torch.mm(z.t(), x, out=made["dweight"])

    def timed(mode: str) -> dict[str, Any]:
        return {"seconds": meter.seconds(lambda: multiply(mode))}

    def warm_up() -> dict[str, Any]:
        timed("gradients")
        return {}

    return {"inputs": inputs, "warm_up": warm_up, "timed": timed}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], handlers))
