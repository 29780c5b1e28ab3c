"""Trains the small language model once, with one way of computing the head's gradient."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from cce_inductor import config, linear_cross_entropy
from cce_inductor.bench.rounds import say
from cce_inductor.instruments.data import batches

from .losses import loss_of
from .model import Model
from .optimizers import make
from .specs import PERMUTED, Pretraining

LOOK = 20  # steps between looks at the gradient
RARE = 3  # a word seen at most this often is rare
GROUPS = ("never", "rare", "frequent")


def split(tokens: Tensor, held_out: int, seq: int) -> tuple[Tensor, Tensor]:
    """Rows (n, seq + 1) to train on, and `held_out` tokens' rows from all over the text."""
    rows = tokens[: len(tokens) // (seq + 1) * (seq + 1)].view(-1, seq + 1)
    count = held_out // seq
    chosen = torch.zeros(len(rows), dtype=torch.bool)
    chosen[torch.linspace(0, len(rows) - 1, count).long()] = True
    return rows[~chosen], rows[chosen]


def groups(seen: Tensor) -> dict[str, Tensor]:
    """Which words (V,) were a target how often."""
    return dict(zip(GROUPS, (seen == 0, (seen > 0) & (seen <= RARE), seen > RARE), strict=True))


@torch.no_grad()
def evaluate(model: Model, rows: Tensor, dtype: torch.dtype) -> float:
    """The mean loss of rows of tokens."""
    with torch.autocast("cpu", dtype), config.patch(grad_filter="exact"):
        total = sum(float(linear_cross_entropy(model(r[:, :-1]), model.head, r[:, 1:])) * len(r) for r in rows.split(8))
    return total / len(rows)


@torch.no_grad()
def word_logits(model: Model, rows: Tensor, members: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Of each group of words, over all positions of `rows`: means of the logit, of log p and of the summed p."""
    sums = {name: {"logit": 0.0, "log p": 0.0, "p": 0.0} for name in members}
    for row in rows:
        z = model(row[None, :-1])[0] @ model.head.T
        lse = z.logsumexp(1, keepdim=True)
        for name, member in members.items():
            part = z[:, member]
            sums[name]["logit"] += float(part.mean())
            sums[name]["log p"] += float((part - lse).mean())
            sums[name]["p"] += float((part - lse).exp().sum(1).mean())
    return {name: {key: value / len(rows) for key, value in group.items()} for name, group in sums.items()}


def second_moments(optimizer: torch.optim.Optimizer, head: Tensor, members: dict[str, Tensor]) -> dict[str, float]:
    """The mean of Adam's second moment over the rows of each group; nothing for an optimizer without."""
    state = optimizer.state[head]
    if "exp_avg_sq" not in state:
        return {}
    return {name: float(state["exp_avg_sq"][member].double().mean()) for name, member in members.items()}


def run(spec: Pretraining, tokens: Tensor) -> dict[str, Any]:
    """What is known of the run in the end, for JSON."""
    dtype, head_loss = torch.bfloat16, loss_of(spec.mode, spec.compiled)
    vocab, tokens = spec.vocab, tokens % spec.vocab
    torch.manual_seed(spec.seed)
    model = Model(vocab, spec.width, spec.layers, spec.seq)
    if spec.mode == PERMUTED:
        order = torch.randperm(vocab, generator=torch.Generator().manual_seed(spec.seed))
        model.permute(order)
        tokens = order.argsort()[tokens]
    train, held_out = split(tokens, spec.held_out, spec.seq)
    optimizer = make(spec.optimizer, model.parameters(), spec.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, spec.steps))
    stream = batches(train.flatten(), spec.batch, spec.seq + 1, spec.seed)
    seen = torch.zeros(vocab, dtype=torch.int64)
    curve, losses, zero, seconds = [], [], [], 0.0
    for step in range(1, spec.steps + 1):
        start = time.perf_counter()
        ids = next(stream)
        seen += torch.bincount(ids[:, 1:].flatten(), minlength=vocab)
        with torch.autocast("cpu", dtype):
            loss = head_loss(model(ids[:, :-1]), model.head, ids[:, 1:])
        loss.backward()
        if step % LOOK == 0 or spec.steps < LOOK:
            assert model.head.grad is not None
            zero.append(float((model.head.grad == 0).all(1).float().mean()))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
        seconds += time.perf_counter() - start
        if step % spec.every == 0:
            curve.append([step, evaluate(model, held_out, dtype)])
            say(f"  step {step}: held-out loss {curve[-1][1]:.3f}, {zero[-1] if zero else 0.0:.1%} of dW's rows are 0")
    members = groups(seen)
    return {
        "spec": asdict(spec),
        "curve": curve,
        "training loss": [
            sum(p) / len(p) for p in (losses[i : i + spec.every] for i in range(0, len(losses), spec.every))
        ],
        "zero rows": zero,
        "words": {name: int(member.sum()) for name, member in members.items()},
        "logits": word_logits(model, held_out[:8], members),
        "second moments": second_moments(optimizer, model.head, members),
        "seconds": seconds,
        "text": {"train": train[:, 1:].numel(), "held out": held_out[:, 1:].numel(), "vocab": vocab},
    }


def _rate(step: int, steps: int) -> float:
    """Of the learning rate: up for a twentieth of the steps, level, and down to a tenth over the last half."""
    return min((step + 1) / (steps / 20), 1.0, max(0.1, 1 - 0.9 * (2 * step / steps - 1)))
