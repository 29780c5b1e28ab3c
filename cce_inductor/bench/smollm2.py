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

from ..instruments.data import CannotRun, batches, english_text, find_model, load_model, load_tokens
from ..instruments.protocol import Handlers, main

if TYPE_CHECKING:
    import torch

    Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x (N, D), W (V, D), targets (N,)

SEQ = 512  # tokens that the model reads at once
NEEDS = ("transformers", "gguf")


def missing() -> str:
    """Why there are none here, or ""."""
    for name in NEEDS:
        if importlib.util.find_spec(name) is None:
            return f"not installed: pip install {name}"
    try:
        find_model(None)
    except CannotRun as error:
        return str(error)
    return ""


def of_model(path: Path, rows: int, seq: int, seed: int, device: str = "cpu") -> Inputs:
    """x (rows, D), the head W (V, D) in fp32, targets (rows,) of English text in pieces of `seq` tokens; on `device`.

    Raises CannotRun if the text is too short.
    """
    import torch

    tokens = load_tokens(path, english_text()).to(device)
    if len(tokens) < -(-rows // seq) * (seq + 1):
        raise CannotRun(f"the text has {len(tokens)} tokens, too few for {rows} rows")
    model = load_model(path, torch.float32).eval().to(device)
    text = batches(tokens, 1, seq + 1, seed)
    hidden, target = [], []
    with torch.no_grad():
        for _ in range(-(-rows // seq)):
            ids = next(text)
            hidden.append(model.base_model(input_ids=ids[:, :-1]).last_hidden_state[0])
            target.append(ids[0, 1:])
    return torch.cat(hidden)[:rows], model.get_output_embeddings().weight.detach(), torch.cat(target)[:rows]


def _file(folder: str | Path, rows: int) -> Path:
    return Path(folder) / f"smollm2-{rows}.pt"


def write(folder: str | Path, rows: int, device: str) -> None:
    """Make the file that `read` reads, unless it is there. Raises CannotRun if the text is too short."""
    import torch

    if _file(folder, rows).exists():
        return
    made = of_model(find_model(None), rows, SEQ, seed=0, device=device)
    torch.save([t.cpu() for t in made], _file(folder, rows))


def read(folder: str | Path, rows: int) -> Inputs:
    """x (rows, 576) and W (49152, 576) in fp32, targets (rows,), on the CPU."""
    import torch

    x, weight, target = torch.load(_file(folder, rows))
    return x, weight, target


def handlers(job: dict[str, Any]) -> Handlers:
    """`make` writes the file of the job's rows into its cache."""

    def make() -> dict[str, Any]:
        write(job["cache"], job["rows"], job["device"])
        return {}

    return {"make": make}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], handlers))
