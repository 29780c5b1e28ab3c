"""Training steps of a compiled model whose loss is outside and reads the logits."""

from __future__ import annotations

import sys
import time
from typing import Any

from ..instruments.protocol import Handlers, main


def handlers(job: dict[str, Any]) -> Handlers:
    """`step` is forward and backward with one of `READERS`: how many seconds."""
    import torch

    from .. import config
    from .readers import READERS, model

    rows, width, vocab = job["shape"]
    config.min_vocab = 0  # type: ignore[attr-defined]
    torch.manual_seed(0)
    made = model("plain", width, vocab)
    compiled = torch.compile(made, backend="cce" if job["contender"] == "ours" else "inductor")
    x, t = torch.randn(4, rows // 4, width), torch.randint(1, vocab, (4, rows // 4))

    def step(loss: str) -> dict[str, Any]:
        torch.manual_seed(0)
        start = time.perf_counter()
        READERS[loss](compiled(x), t).backward()
        seconds = time.perf_counter() - start
        made.zero_grad()
        return {"seconds": seconds}

    return {"step": step}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], handlers))
