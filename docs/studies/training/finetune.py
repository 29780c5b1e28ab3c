"""Fine-tunes a model on a handful of texts until it knows them by heart: confident rows test a filter."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cce_inductor.instruments.data import load_model

from . import caps, errors
from .losses import direct, loss_of
from .model import Model
from .specs import EXACT, Finetuning

BUDGET = 2**-9  # under which blocks are examined


class Subject(Protocol):
    """What is trained: hidden states of ids, a head (V, D) of its own, and the parameters that learn."""

    head: nn.Parameter

    def hidden(self, ids: Tensor) -> Tensor: ...

    def parameters(self) -> list[nn.Parameter]: ...


class Small:
    """The small language model, for trying the harness out."""

    def __init__(self, vocab: int, width: int, seq: int) -> None:
        self.model = Model(vocab, width, 1, seq)
        self.head = self.model.head

    def hidden(self, ids: Tensor) -> Tensor:
        return self.model(ids)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())


class Checkpoint:
    """A Hugging Face model of which the `layers` uppermost layers and the head, untied from the embedding, learn."""

    def __init__(self, path: Path, layers: int) -> None:
        model = load_model(path, torch.float32)
        self.base = model.base_model.requires_grad_(False)
        for layer in self.base.layers[-layers:]:
            layer.requires_grad_(True)
        self.base.norm.requires_grad_(True)
        self.head = nn.Parameter(model.get_output_embeddings().weight.detach().clone())

    def hidden(self, ids: Tensor) -> Tensor:
        return self.base(input_ids=ids, use_cache=False).last_hidden_state

    def parameters(self) -> list[nn.Parameter]:
        return [self.head, *(p for p in self.base.parameters() if p.requires_grad)]


def texts(tokens: Tensor, spec: Finetuning) -> Tensor:
    """The rows to learn, (batch, seq + 1), that the seed chooses, and behind them as many that are not learned."""
    rows = tokens[: len(tokens) // (spec.seq + 1) * (spec.seq + 1)].view(-1, spec.seq + 1)
    generator = torch.Generator().manual_seed(spec.seed)
    return rows[torch.randperm(len(rows), generator=generator)[: 2 * spec.batch]]


def run(spec: Finetuning, make: Callable[[], Subject], tokens: Tensor, modes: list[str]) -> dict[str, Any]:
    """What is known of the run in the end, for JSON. modes: whose gradient errors to measure after an exact run."""
    dtype, head_loss = torch.bfloat16, loss_of(spec.mode, spec.compiled)
    torch.manual_seed(spec.seed)
    subject = make()
    ids, others = texts(tokens, spec).split(spec.batch)
    target = ids[:, 1:]
    optimizer = torch.optim.AdamW(subject.parameters(), spec.lr, weight_decay=0.0, fused=True)
    losses: list[float] = []
    blocks: list[tuple[int, list[dict[str, float]]]] = []
    seconds = 0.0
    for step in range(spec.steps + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype):
            hidden = subject.hidden(ids[:, :-1])
            loss = head_loss(hidden, subject.head, target)
        losses.append(float(loss.detach()))
        if step % spec.look == 0:
            x = hidden.detach().float().flatten(0, 1)
            blocks.append((step, caps.examine(x, subject.head.detach(), target.flatten(), BUDGET, dtype)))
        if step == spec.steps:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
    with torch.autocast("cpu", dtype), torch.no_grad():
        other = direct(EXACT)(subject.hidden(others[:, :-1]), subject.head, others[:, 1:])
    found = {"spec": asdict(spec), "losses": losses, "others": float(other), "blocks": blocks, "seconds": seconds}
    if spec.mode == EXACT:
        found["errors"] = errors.measure(x, subject.head, target.flatten(), modes, dtype)
    return found
