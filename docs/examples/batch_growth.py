"""The largest batch that trains under a memory limit: GPT-2's width and vocabulary, two layers.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009. Its headline is
that without the logits much larger batches fit; for Gemma 2 (2B) the memory of the head and its loss falls from 28
GB to 1 GB.

Here a limit is set on what weights, gradients, Adam's state and a step's tensors take together, and the largest
batch is searched for eager mode, torch.compile and cce_inductor, each in a process of its own. With --full the
losses are compared over 100 steps.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from common import FUSED, PLAIN, Claim, Effect, Effort, Panel, Program, Task, adam, compiled, main
from model import Transformer, causal

from cce_inductor.instruments import memory
from cce_inductor.instruments.meters import RssPeak

VOCAB, WIDTH, HEADS, LAYERS, SEQ = 50257, 768, 12, 2, 64
EAGER = "eager"
FIRST = (4, 8)  # the batches that the search starts with


def make() -> Transformer:
    """GPT-2's width, heads and vocabulary, with the head tied to the embedding."""
    model = Transformer(VOCAB, WIDTH, [causal] * LAYERS, HEADS)
    model.head.weight = model.embedding.weight
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model


def ids(batch: int, seq: int, generator: torch.Generator) -> torch.Tensor:
    """Words (batch, seq) with Zipf's frequencies: word k is drawn in proportion to 1 / k."""
    uniform = torch.rand(batch, seq, generator=generator)
    return (VOCAB**uniform).long().clamp(max=VOCAB) - 1


def task(seed: int) -> Task:
    """Steps of 2 x 32 tokens."""
    torch.manual_seed(seed)
    model, generator = make(), torch.Generator().manual_seed(seed)
    batches = iter(lambda: (ids(2, 33, generator),), None)
    return Task(model.next_loss, batches, adam(model.parameters(), 1e-4), 64 * VOCAB * 4)


class Steps:
    """Training steps of any batch by one contender, and the memory that each needs in bytes."""

    def __init__(self, contender: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model, self.generator = make(), torch.Generator().manual_seed(seed)
        self.optimizer = adam(self.model.parameters(), 1e-4)
        loss = self.model.next_loss
        self.loss: Callable = loss if contender == EAGER else compiled(loss, contender, dynamic=True)
        self.step(2)
        self.state = 4 * memory.tensor_bytes(self.model.parameters())  # with gradients and Adam's two moments

    def step(self, batch: int) -> tuple[int, float]:
        """What one step takes above the state, and its seconds."""
        words = ids(batch, SEQ + 1, self.generator)
        memory.trim()
        rest, start = memory.rss(), time.perf_counter()
        with RssPeak() as peak:
            self.loss(words).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)
        return peak.value - rest, time.perf_counter() - start


def largest(contender: str, limit: int, seed: int) -> dict[str, Any]:
    """The largest batch whose step stays within the limit, to an eighth of it.

    By bisection that starts at a line through two sizes.
    """
    steps = Steps(contender, seed)
    room = limit - steps.state
    taken = {batch: steps.step(batch)[0] for batch in FIRST}
    slope = (taken[FIRST[1]] - taken[FIRST[0]]) / (FIRST[1] - FIRST[0])
    low, high = 0, 0  # the largest known to fit, the smallest known not to
    guess = min(max(int(FIRST[1] + (room - taken[FIRST[1]]) / max(slope, 1)), 1), 8 * FIRST[1])
    while not high or high - low > max(low // 8, 1):
        taken[guess], _ = steps.step(guess)
        if taken[guess] <= room:
            low = guess
        else:
            high = guess
        guess = (low + high) // 2 if high else low + max(low // 8, 1)
    seconds = steps.step(low)[1]
    return {"batch": low, "taken": sorted(taken.items()), "tokens per second": low * SEQ / seconds, "room": room}


def fits(contender: str, limit: int, seeds: tuple[int, ...], batch: int) -> list[bool]:
    """Whether this batch stays within the limit with other weights and words."""
    found = []
    for seed in seeds:
        steps = Steps(contender, seed)
        found.append(steps.step(batch)[0] <= limit - steps.state)
    return found


def alone(fn: Callable, *args: Any) -> Any:
    """What fn gives in a process of its own, whose allocator returns freed memory at once."""
    os.environ.update(memory.ALLOCATOR_ENV)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(fn, *args).result()


def effect(effort: Effort) -> Effect:
    """Searches for the largest batches, and tries ours again with the other seeds."""
    limit = effort.choose(1400, 2048) << 20
    found = {}
    for name in (EAGER, PLAIN, FUSED):
        found[name] = alone(largest, name, limit, effort.seeds[0])
        print(name, found[name], flush=True)
    again = alone(fits, FUSED, limit, effort.seeds[1:], found[FUSED]["batch"]) if effort.seeds[1:] else []
    batch = {name: one["batch"] for name, one in found.items()}
    table = [["", "largest batch", "tokens", "of eager's", "tokens per second"]]
    for name, one in found.items():
        growth = one["batch"] / batch[EAGER]
        tokens = str(one["batch"] * SEQ)
        table.append([name, f"{one['batch']} x {SEQ}", tokens, f"{growth:.1f}", f"{one['tokens per second']:.0f}"])
    claim = Claim(
        "a larger batch trains in the same memory than with eager mode and with torch.compile",
        [batch[FUSED] > max(batch[EAGER], batch[PLAIN]), *again],
        f"{batch[FUSED] / batch[PLAIN]:.1f} times torch.compile's; paper: Gemma 2's head from 28 GB to 1 GB",
    )
    lines = [
        (name, [n for n, _ in one["taken"]], [size / 2**20 for _, size in one["taken"]]) for name, one in found.items()
    ]
    room = found[FUSED]["room"] / 2**20
    lines.append(("limit", [0, max(max(x) for _, x, _ in lines)], [room, room]))
    notes = [
        f"Limit: {limit >> 20} MiB, {(limit - found[FUSED]['room']) >> 20} of them weights, gradients, Adam's state. "
        "The process itself (interpreter, libraries, compiled code) is not counted."
    ]
    return Effect(table, [claim], [Panel("Memory of a step", f"batch, rows of {SEQ} tokens", "MiB", lines)], notes)


if __name__ == "__main__":
    sys.exit(main(Program(__file__, __doc__ or "", task, effect, full_steps=100)))
