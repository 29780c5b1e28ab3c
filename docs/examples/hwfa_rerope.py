"""Attention that extrapolates: trained at 128 tokens, evaluated at 1024.

Sources: Su, "A new idea for global length extrapolation" (HWFA, https://kexue.fm/archives/9603) and "When HWFA
meets ReRoPE" (https://kexue.fm/archives/9731). HWFA: RoPE and a window in all layers but the last; there full
attention without positions, its logits scaled by log n. HWFA + ReRoPE: RoPE in the last layer too, and when it is
evaluated no distance counts as more than a window (ReRoPE), so that none is larger than those of the training.

Beside them the same model with RoPE and full attention in all layers. FlexAttention has no backward on a CPU, so
windows are plain masks. The text is the standard library's source, in a byte-pair vocabulary made on the spot.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Claim, Effect, Effort, Panel, Program, Task, adam, compiled, main, mean, renew, shared, spread, train
from model import Attend, Transformer, bpe, causal, rotated, rows, sources
from torch import Tensor

VOCAB, WIDTH, LAYERS, BATCH, RATE = 4096, 64, 3, 4, 5e-3
TRAINED, LONG, WINDOW = 128, 1024, 48
HELD_OUT = 16 * (LONG + 1)
EDGES = (0, 64, 128, 256, 512, 1024)


def distances(seq: int) -> Tensor:
    """How far each key lies behind each query, (seq, seq)."""
    at = torch.arange(seq)
    return at[:, None] - at


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """RoPE, and no key that is a window or more behind."""
    at, behind = torch.arange(q.shape[-2]), distances(q.shape[-2])
    mask = (behind >= 0) & (behind < WINDOW)
    return F.scaled_dot_product_attention(rotated(q, at), rotated(k, at), v, attn_mask=mask)


def scaled(q: Tensor) -> Tensor:
    """Queries times log n over the log of the trained length, n the number of keys that they see."""
    n = torch.arange(1, q.shape[-2] + 1).to(q.dtype)
    return q * (n.log() / math.log(TRAINED)).clamp(min=0.1)[:, None]


def without_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(scaled(q), k, v, is_causal=True)


def full_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(scaled(q), k, v)


def rectified(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ReRoPE: RoPE up to the window, and the window's own distance for everything farther away."""
    q, at, behind = scaled(q), torch.arange(q.shape[-2]), distances(q.shape[-2])
    near = rotated(q, at) @ rotated(k, at).mT
    far = rotated(q, torch.full_like(at, WINDOW)) @ k.mT
    z = torch.where(behind < WINDOW, near, far) / math.sqrt(q.shape[-1])
    return z.masked_fill(behind < 0, -math.inf).softmax(-1) @ v


# By name: attention of the first layers, of the last in training, and of the last in evaluation.
VARIANTS: dict[str, tuple[Attend, Attend, Attend]] = {
    "RoPE": (causal, causal, causal),
    "HWFA": (windowed, without_positions, without_positions),
    "HWFA + ReRoPE": (windowed, full_scaled, rectified),
}


def make(name: str) -> Transformer:
    first, last, _ = VARIANTS[name]
    return Transformer(VOCAB, WIDTH, [first] * (LAYERS - 1) + [last])


def tokens() -> Tensor:
    text = sources(1_500_000)
    return torch.tensor(bpe(text, VOCAB).encode(text).ids)


def task(seed: int) -> Task:
    torch.manual_seed(seed)
    model = make("HWFA")
    text = shared("tokens", tokens)[HELD_OUT:]
    batches = rows(text, BATCH, TRAINED + 1, seed)
    return Task(model.next_loss, batches, adam(model.parameters(), RATE), BATCH * TRAINED * VOCAB * 4)


@torch.no_grad()
def by_position(model: Transformer, name: str, text: Tensor) -> list[float]:
    """The mean loss between each two of EDGES, over held-out rows (n, LONG + 1)."""
    last: Any = model.layers[-1]
    before, last.attend = last.attend, VARIANTS[name][2]
    each = [F.cross_entropy(model.head(model(row[None, :-1]))[0], row[1:], reduction="none") for row in text]
    last.attend = before
    losses = torch.stack(each).mean(0)
    return [float(losses[a:b].mean()) for a, b in itertools.pairwise(EDGES)]


def effect(effort: Effort) -> Effect:
    """Trains all variants with all seeds."""
    steps = effort.choose(220, 2500)
    text = shared("tokens", tokens)
    held_out = text[:HELD_OUT].view(-1, LONG + 1)
    found: dict[str, list[list[float]]] = {}
    for name in VARIANTS:
        model = make(name)
        loss: Callable = compiled(model.next_loss)
        found[name] = []
        for seed in effort.seeds:
            renew(model, functools.partial(make, name), seed)
            optimizer = adam(model.parameters(), RATE)
            train(loss, optimizer, rows(text[HELD_OUT:], BATCH, TRAINED + 1, seed), steps)
            found[name].append(by_position(model, name, held_out))
    return told(found, steps)


def told(found: dict[str, list[list[float]]], steps: int) -> Effect:
    """Loss by position, and what becomes of it beyond the trained length."""
    names = [f"{a}–{b}" for a, b in itertools.pairwise(EDGES)]
    table = [["loss at positions", *names]]
    for name, runs in found.items():
        table.append([name, *(spread([run[i] for run in runs]) for i in range(len(names)))])

    def rise(name: str) -> list[float]:
        """From the second half of the trained length to the end of the long one."""
        return [run[-1] - run[1] for run in found[name]]

    rope, hwfa, both = (rise(name) for name in VARIANTS)
    source = "Llama 2 trained at 4k, loss at 4k and 8k: RoPE 1.4967 and 8.8615, ReRoPE 1.4996 and 1.4267"
    claims = [
        Claim("RoPE's loss rises beyond the trained length", [r > 0 for r in rope], source),
        Claim("HWFA's rises less or falls", [h < r for h, r in zip(hwfa, rope, strict=True)]),
        Claim("HWFA + ReRoPE's rises less or falls", [b < r for b, r in zip(both, rope, strict=True)]),
        Claim(
            "at the trained length HWFA loses little: less than 2 % of RoPE's loss",
            [h[1] < 1.02 * r[1] for h, r in zip(found["HWFA"], found["RoPE"], strict=True)],
        ),
    ]
    middle = [(a + b) / 2 for a, b in itertools.pairwise(EDGES)]
    lines = [(name, middle, [mean(run[i] for run in runs) for i in range(len(names))]) for name, runs in found.items()]
    note = (
        f"{steps} steps of {BATCH} x {TRAINED} tokens; from positions 64–128 to 512–1024 the loss changes by "
        + ", ".join(f"{spread(rise(name))} ({name})" for name in VARIANTS)
    )
    return Effect(table, claims, [Panel("Loss by position", "position", "loss", lines, log="x")], [note])


if __name__ == "__main__":
    sys.exit(main(Program(__file__, __doc__ or "", task, effect, {"tokenizers": "pip install tokenizers"})))
