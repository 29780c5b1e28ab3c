"""What the programs of this folder have in common: a tiny model, tokens, and what a run writes down of itself.

A program trains by a package as its users do, and knows nothing of cce_inductor. `run_all` starts it twice, without and
with the environment that its first lines name.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from cce_inductor.instruments import memory

VOCAB, WIDTH = 32000, 64
ROWS, LENGTH = 4, 256
STEPS = 6
MEASURED = 3  # the step from whose end on the peak is measured: all is compiled then

_state: dict[str, Any] = {"steps": 0, "level": 0, "peak": 0}


def watch(steps: int = STEPS) -> None:
    """Begins to count the steps of optimizers, and measures the peak of memory in the last ones."""
    torch.manual_seed(0)

    def after_step(*_: Any) -> None:
        _state["steps"] += 1
        if _state["steps"] == MEASURED:
            memory.trim()
            memory.reset_peak()
            _state["level"] = memory.rss()
        if _state["steps"] == steps:
            _state["peak"] = memory.peak_rss() - _state["level"]

    register_optimizer_step_post_hook(after_step)


def done(losses: list[float]) -> None:
    """Prints what `run_all` compares: losses, the peak above the level between steps, our counters."""
    from torch._dynamo.utils import counters

    found = {"losses": losses, "peak": _state["peak"] / memory.MIB, "counts": dict(counters["cce_inductor"])}
    print("CLIENT " + json.dumps(found), flush=True)


def llama(**options: Any) -> Any:
    """A tiny causal language model of Hugging Face's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2 * LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(LlamaConfig(**(sizes | options)))


def tokens(rows: int = 2 * ROWS * STEPS, length: int = LENGTH) -> torch.Tensor:
    """Token numbers (rows, length), by a rule that can be learned: each is the one before plus a number of the row."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(3, VOCAB, (rows, 1), generator=generator)
    step = torch.randint(1, 5, (rows, 1), generator=generator)
    return (first + step * torch.arange(length)) % (VOCAB - 3) + 3


def rows(n: int = 2 * ROWS * STEPS, length: int = LENGTH) -> list[dict[str, torch.Tensor]]:
    """The same as a dataset of Hugging Face's trainers."""
    return [{"input_ids": row, "labels": row} for row in tokens(n, length)]


def tokenizer() -> Any:
    """A tokenizer of one word a token, ``w3`` and so on, made here: nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    return wrapped


def text(n: int, length: int = LENGTH) -> list[str]:
    """Texts of that tokenizer."""
    return [" ".join(f"w{i}" for i in row) for row in tokens(n, length).tolist()]


def arguments(**others: Any) -> dict[str, Any]:
    """What the trainers of Hugging Face and of TRL are given alike."""
    return {
        "output_dir": folder(),
        "per_device_train_batch_size": ROWS,
        "max_steps": STEPS,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        **others,
    }


def history(trainer: Any, *names: str) -> list[float]:
    """What such a trainer has logged under these names, step by step."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry[name] for entry in steps for name in names if name in entry]


def folder() -> str:
    """Where a program may write."""
    return os.environ["CLIENT_FOLDER"]
