"""A CLIP-style loss with 8192 pairs in a batch, over both directions of one similarity matrix.

Sources: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020,
whose batch has 32 768 pairs; Wijmans et al., arXiv 2411.09009, who name contrastive learning as a further use of
the loss without logits. Neither gives a figure that compares batches.

A pair is two lines of the standard library's source and the two lines behind them. Either side is a bag of its
three-letter pieces, embedded and put through an MLP. The loss asks for each half which of the 8192 others belongs
to it, and the same the other way round. Nobody writes the 8192 x 8192 matrix, nor its transpose.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator

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
    shared,
    smoothed,
    spread,
    train,
)
from model import sources
from torch import Tensor, nn

PAIRS, SMALL, WIDTH, HASHES, PIECES, HELD_OUT = 8192, 256, 64, 8192, 64, 1024


def pieces(text: str) -> list[int]:
    """Hashes of at most PIECES three-letter pieces, spread over the text, filled up with 0."""
    text = text.strip()
    every = max((len(text) - 2) // PIECES, 1)
    found = [1 + zlib.crc32(text[i : i + 3].encode()) % (HASHES - 1) for i in range(0, len(text) - 2, every)][:PIECES]
    return found + [0] * (PIECES - len(found))


def pairs() -> Tensor:
    """All pairs, (count, 2, PIECES), in an order that is always the same."""
    lines = [line for line in sources(4_600_000).splitlines() if len(line.strip()) > 8]
    halves = [
        [pieces("\n".join(lines[i : i + 2])), pieces("\n".join(lines[i + 2 : i + 4]))]
        for i in range(0, len(lines) - 4, 4)
    ]
    found = torch.tensor(halves, dtype=torch.int32)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


class Tower(nn.Module):
    """A bag of pieces (batch, PIECES) to a vector of norm 1."""

    def __init__(self, bag: nn.Embedding) -> None:
        super().__init__()
        self.bag = bag
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.bag(ids).sum(1) / (ids != 0).sum(1, keepdim=True).sqrt()
        return F.normalize(x + self.down(F.gelu(self.up(x))), dim=-1)


class Both(nn.Module):
    """Two towers over the same embeddings, and a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        bag = nn.Embedding(HASHES, WIDTH, padding_idx=0)
        self.first, self.second = Tower(bag), Tower(bag)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        similarity = self.log_scale.exp() * self.first(first) @ self.second(second).T
        own = torch.arange(len(first))
        return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2


def batches(size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of pairs that are not held out, none twice in a batch."""
    every = shared("pairs", pairs)[HELD_OUT:]
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = every[torch.randperm(len(every), generator=generator)[:size]].long()
        yield chosen[:, 0], chosen[:, 1]


def task(seed: int) -> Task:
    torch.manual_seed(seed)
    model = Both()
    return Task(model, batches(PAIRS, seed), adam(model.parameters(), 1e-2), PAIRS * PAIRS * 4)


@torch.no_grad()
def found(model: Both) -> float:
    """The share of held-out halves whose other half is the most similar of all held-out ones."""
    held_out = shared("pairs", pairs)[:HELD_OUT].long()
    similarity = model.first(held_out[:, 0]) @ model.second(held_out[:, 1]).T
    return float((similarity.argmax(1) == torch.arange(HELD_OUT)).float().mean())


def effect(effort: Effort) -> Effect:
    """The same number of steps with a large and a small batch."""
    steps = effort.choose(12, 200)
    model = Both()
    loss = compiled(model)
    runs: dict[int, list[list[float]]] = {}
    ends: dict[int, list[float]] = {}
    before = []
    for size in (PAIRS, SMALL):
        runs[size], ends[size] = [], []
        for seed in effort.seeds:
            renew(model, Both, seed)
            if size == PAIRS:
                before.append(found(model))
            runs[size].append(train(loss, adam(model.parameters(), 1e-2), batches(size, seed), steps))
            ends[size].append(found(model))
    table = [["pairs in a batch", f"other half found among {HELD_OUT}", "last loss"]]
    table.append(["before training", spread(before), ""])
    for size in (PAIRS, SMALL):
        table.append([str(size), spread(ends[size]), spread([run[-1] for run in runs[size]])])
    claims = [
        Claim(
            f"after {steps} steps more halves are found with {PAIRS} pairs in a batch than with {SMALL}",
            [a > b for a, b in zip(ends[PAIRS], ends[SMALL], strict=True)],
        ),
        Claim("more are found than before training", [e > b for e, b in zip(ends[PAIRS], before, strict=True)]),
    ]
    lines = [(f"{size} pairs", *smoothed([mean(step) for step in zip(*runs[size], strict=True)], 1)) for size in runs]
    return Effect(table, claims, [Panel("Training", "step", "loss", lines)])


if __name__ == "__main__":
    sys.exit(main(Program(__file__, __doc__ or "", task, effect)))
