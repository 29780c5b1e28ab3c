"""Pretraining on a task's own inputs, before the task: ListOps.

Source: Amos, Berant, Gupta, "Never Train from Scratch", arXiv 2310.02980: transformers that are first pretrained on
the task's own inputs gain 20 points and more on the Long Range Arena, and come close to state-space models.

Expressions such as [MAX 4 [MIN 2 9 ] 7 ] are made on the spot; the task is their value, one of ten. A bidirectional
transformer is trained on it from scratch, and after predicting masked symbols of the same expressions. Symbols are
masked in groups of three and predicted together, as one of 17^3 = 4913 classes: a head that is large enough to be
worth fusing.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from common import (
    Claim,
    Effect,
    Effort,
    Panel,
    Program,
    Task,
    adam,
    compiled,
    main,
    mean,
    renew,
    smoothed,
    spread,
    train,
)
from model import Transformer, both_ways
from torch import Tensor, nn

OPS: dict[str, Callable[[list[int]], int]] = {
    "[MAX": max,
    "[MIN": min,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
SYMBOLS = [str(i) for i in range(10)] + [*OPS, "]", "pad", "mask"]
CODE = {symbol: i for i, symbol in enumerate(SYMBOLS)}
GROUP, CLASSES = 3, len(SYMBOLS) ** 3
LENGTH, BATCH, WIDTH, LAYERS, HIDDEN = 36, 64, 64, 2, 0.25  # HIDDEN: the share of the groups that are masked
TRAINING, HELD_OUT = 4096, 1024


def expression(chance: random.Random, depth: int) -> tuple[list[str], int]:
    """Symbols and value of an operation on two to four digits or, above depth 0, operations."""
    op = chance.choice(list(OPS))
    symbols, values = [op], []
    for _ in range(chance.randint(2, 4)):
        if depth and chance.random() < 0.35:
            inner, value = expression(chance, depth - 1)
        else:
            value = chance.randrange(10)
            inner = [str(value)]
        symbols += inner
        values.append(value)
    return [*symbols, "]"], OPS[op](values)


def expressions(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids (count, LENGTH) and values (count,) of expressions that fit."""
    chance = random.Random(seed)
    ids: list[list[int]] = []
    values: list[int] = []
    while len(ids) < count:
        symbols, value = expression(chance, 2)
        if len(symbols) <= LENGTH:
            ids.append([CODE[s] for s in symbols + ["pad"] * (LENGTH - len(symbols))])
            values.append(value)
    return torch.tensor(ids), torch.tensor(values)


class Reader(nn.Module):
    """A transformer over the symbols and their places, with a head for groups of symbols and one for values."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Transformer(len(SYMBOLS), WIDTH, [both_ways] * LAYERS, classes=CLASSES)
        self.answer = nn.Linear(WIDTH, 10)

    def masked(self, shown: Tensor, groups: Tensor) -> Tensor:
        """The loss of masked groups (batch, LENGTH / 3): classes, or -100 where nothing is hidden."""
        hidden = self.trunk(shown).unflatten(1, (-1, GROUP)).mean(2)
        return F.cross_entropy(self.trunk.head(hidden).flatten(0, 1), groups.flatten())

    def values(self, ids: Tensor) -> Tensor:
        """Logits (batch, 10)."""
        there = (ids != CODE["pad"])[..., None]
        return self.answer((self.trunk(ids) * there).sum(1) / there.sum(1))

    def task(self, ids: Tensor, values: Tensor) -> Tensor:
        return F.cross_entropy(self.values(ids), values)


def picked(ids: Tensor, values: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches for the task."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(ids), (BATCH,), generator=generator)
        yield ids[chosen], values[chosen]


def hiding(ids: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches for pretraining: ids with groups masked, and the classes of those groups."""
    generator = torch.Generator().manual_seed(seed)
    for some, _ in picked(ids, ids, seed):
        parts = some.unflatten(1, (-1, GROUP))
        hide = torch.rand(parts.shape[:2], generator=generator) < HIDDEN
        classes = (parts * torch.tensor([len(SYMBOLS) ** 2, len(SYMBOLS), 1])).sum(-1)
        shown = parts.masked_fill(hide[..., None], CODE["mask"]).flatten(1)
        yield shown, classes.masked_fill(~hide | (parts == CODE["pad"]).all(-1), -100)


def task(seed: int) -> Task:
    torch.manual_seed(seed)
    model = Reader()
    ids, _ = expressions(TRAINING, seed)
    rows = BATCH * LENGTH // GROUP
    return Task(model.masked, hiding(ids, seed), adam(model.parameters(), 2e-3), rows * CLASSES * 4)


@torch.no_grad()
def accuracy(model: Reader, ids: Tensor, values: Tensor) -> float:
    """The share of values that are right."""
    return float((model.values(ids).argmax(-1) == values).float().mean())


def effect(effort: Effort) -> Effect:
    """From scratch and after pretraining, with the same fine-tuning."""
    before, after = effort.choose((150, 150), (3000, 1500))
    model = Reader()
    masked, solve = compiled(model.masked), compiled(model.task)
    held_out = expressions(HELD_OUT, 10_000)
    scratch: list[tuple[float, list[float]]] = []
    pretrained: list[tuple[float, list[float]]] = []
    pretraining = []
    for seed in effort.seeds:
        ids, values = expressions(TRAINING, seed)
        for found, first in ((scratch, 0), (pretrained, before)):
            renew(model, Reader, seed)
            if first:
                pretraining.append(train(masked, adam(model.parameters(), 2e-3), hiding(ids, seed), first))
            losses = train(solve, adam(model.parameters(), 2e-3), picked(ids, values, seed), after)
            found.append((accuracy(model, *held_out), losses))
    table = [["", "accuracy on unseen expressions", "loss of the last 20 steps of fine-tuning"]]
    for name, found in (("from scratch", scratch), ("after pretraining", pretrained)):
        table.append([name, spread([a for a, _ in found]), spread([mean(losses[-20:]) for _, losses in found])])
    gains = [p - s for (p, _), (s, _) in zip(pretrained, scratch, strict=True)]
    start, end = mean(run[0] for run in pretraining), mean(mean(run[-10:]) for run in pretraining)
    claim = Claim(
        "the same fine-tuning ends with a higher accuracy after pretraining on the task's inputs",
        [gain > 0 for gain in gains],
        f"by {100 * mean(gains):.1f} points; the paper gains 20 and more on the Long Range Arena's tasks",
    )
    notes = [
        f"Fine-tuning: {after} steps of {BATCH} expressions out of {TRAINING}; pretraining: {before} steps, in which "
        f"the loss of masked groups goes from {start:.2f} to {end:.2f}.",
        "Tried besides: smaller batches with twice the steps of pretraining, which gained nothing either.",
    ]
    lines = [
        (f"{name}, seed {seed}", *smoothed(found[i][1], 10))
        for name, found in (("scratch", scratch), ("pretrained", pretrained))
        for i, seed in enumerate(effort.seeds)
    ]
    return Effect(table, [claim], [Panel("Fine-tuning", "step", "loss", lines)], notes)


if __name__ == "__main__":
    sys.exit(main(Program(__file__, __doc__ or "", task, effect)))
