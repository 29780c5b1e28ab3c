"""Real inputs of a head: SmolLM2-135M's last hidden states over English text, its own head, the tokens that come next.

    python -m cce_inductor.bench.smollm2 JOB_JSON REQUESTS_FD ANSWERS_FD

A process of its own makes them once, into a file that every contender reads: loading the model takes longer than
measuring it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..demo.data import DemoError, english_text, find_model, load_model, load_tokens
from .protocol import Handlers, main

if TYPE_CHECKING:
    import torch

SEQ = 512  # tokens that the model reads at once
NEEDS = ("transformers", "gguf")


def missing() -> str:
    """Why there are none here, or ""."""
    for name in NEEDS:
        if importlib.util.find_spec(name) is None:
            return f"not installed: pip install {name}"
    try:
        find_model(None)
    except DemoError as error:
        return str(error)
    return ""


def _file(folder: str | Path, rows: int) -> Path:
    return Path(folder) / f"smollm2-{rows}.pt"


def write(folder: str | Path, rows: int, device: str) -> None:
    """Make the file that `read` reads, unless it is there. Raises DemoError if the text is too short."""
    import torch

    if _file(folder, rows).exists():
        return
    path = find_model(None)
    tokens = load_tokens(path, english_text())
    if len(tokens) <= rows:
        raise DemoError(f"the text has {len(tokens)} tokens, too few for {rows} rows")
    model = load_model(path, torch.float32).eval().to(device)
    with torch.no_grad():
        ids = tokens[:rows].to(device).split(SEQ)
        x = torch.cat([model.model(input_ids=chunk[None]).last_hidden_state[0] for chunk in ids])
    torch.save([t.cpu() for t in (x, model.lm_head.weight.detach(), tokens[1 : rows + 1])], _file(folder, rows))


def read(folder: str | Path, rows: int) -> tuple[torch.Tensor, ...]:
    """x (rows, 576) and W (49152, 576) in fp32, targets (rows,), on the CPU."""
    import torch

    return tuple(torch.load(_file(folder, rows)))


def handlers(job: dict[str, Any]) -> Handlers:
    def make() -> dict[str, Any]:
        write(job["cache"], job["rows"], job["device"])
        return {}

    return {"make": make}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], handlers))
