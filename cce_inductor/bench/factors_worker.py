"""The process of one contender with one loss of `factored`."""

from __future__ import annotations

import sys
from typing import Any

from ..instruments.protocol import Handlers, main


def handlers(job: dict[str, Any]) -> Handlers:
    """`step` is the loss and its gradients: how many seconds; `peak`, how many bytes above operands and gradients."""
    import torch

    from .. import config
    from .factored import LOOPS, Loss, dtype_of, in_the_loop
    from .measure import Head

    n, d, v = job["shape"]
    config.min_vocab = 0  # type: ignore[attr-defined]
    torch.manual_seed(0)
    x, weight = (t.to(dtype_of(job["loss"])).requires_grad_() for t in (torch.randn(n, d), torch.randn(v, d) / d**0.5))
    target = torch.randint(0, v, (n,))
    backend = {"eager": None, "compile": "inductor", "ours": "cce"}[job["contender"]]
    if job["loss"] in LOOPS:
        call = in_the_loop(backend, LOOPS[job["loss"]])
    else:
        made = Loss(job["loss"], (n, d, v), dtype_of(job["loss"]))
        call = made if backend is None else torch.compile(made, backend=backend)
    head = Head(call, x, weight, target)
    return {
        "step": lambda: {"seconds": head.timed("gradients")},
        "peak": lambda: {"above": head.peak("gradients")["above"]},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], handlers))
