"""An image classifier with 50 000 classes and a convolutional trunk.

Source: Wijmans et al., arXiv 2411.09009, who name image classification with many classes as a further use of the
loss without logits; they give no figure for it.

An image shows a number from 0 to 49 999 in five small digits under noise; its class is the number. The head is a
linear layer over all 50 000, of which only 1000 ever occur.
"""

from __future__ import annotations

import math
import sys
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
    smoothed,
    spread,
    train,
)
from torch import Tensor, nn

CLASSES, WIDTH, BATCH = 50_000, 128, 512
SHOWN = 1000  # numbers that occur
HEIGHT, BREADTH = 8, 24
NOISE = 0.2


def glyphs() -> Tensor:
    """The ten digits, (10, 5, 3); a row of dots is an octal digit."""
    lines = ["75557", "26227", "71747", "71717", "55711", "74717", "74757", "71111", "75757", "75717"]
    bits = [[[int(row) >> 2 & 1, int(row) >> 1 & 1, int(row) & 1] for row in digit] for digit in lines]
    return torch.tensor(bits, dtype=torch.float32)


def images(classes: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (batch, 1, HEIGHT, BREADTH) of numbers (batch,), with noise."""
    digits = classes[:, None] // torch.tensor([10_000, 1_000, 100, 10, 1]) % 10
    strip = F.pad(glyphs()[digits], (0, 1)).permute(0, 2, 1, 3).flatten(2)
    canvas = F.pad(strip, (2, BREADTH - 22, 1, HEIGHT - 6))
    return (canvas + NOISE * torch.randn(canvas.shape, generator=generator))[:, None]


class Classifier(nn.Module):
    """Three convolutions, a hidden layer, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(64 * HEIGHT * BREADTH // 16, WIDTH), nn.LayerNorm(WIDTH),
        )  # fmt: skip
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, pictures: Tensor, classes: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.trunk(pictures)), classes)


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless new pictures of the numbers that occur, which are always the same."""
    shown = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(0))[:SHOWN]
    generator = torch.Generator().manual_seed(seed)
    while True:
        classes = shown[torch.randint(SHOWN, (BATCH,), generator=generator)]
        yield images(classes, generator), classes


def task(seed: int) -> Task:
    torch.manual_seed(seed)
    model = Classifier()
    return Task(model, batches(seed), adam(model.parameters(), 3e-3), BATCH * CLASSES * 4)


@torch.no_grad()
def right_digits(model: Classifier) -> tuple[float, float]:
    """Of unseen pictures: the share whose class is found, and the share of the digits that are right in it."""
    pictures, classes = next(batches(10_000))
    best = model.head(model.trunk(pictures)).argmax(1)
    places = torch.tensor([10_000, 1_000, 100, 10, 1])
    same = best[:, None] // places % 10 == classes[:, None] // places % 10
    return float((best == classes).float().mean()), float(same.float().mean())


def effect(effort: Effort) -> Effect:
    """Trains with every seed."""
    steps = effort.choose(70, 1000)
    model = Classifier()
    loss = compiled(model)
    runs, ends = [], []
    for seed in effort.seeds:
        renew(model, Classifier, seed)
        runs.append(train(loss, adam(model.parameters(), 3e-3), batches(seed), steps))
        ends.append(right_digits(model))
    table = [
        ["after training", "value", "by chance"],
        ["loss of the last 10 steps", spread([mean(run[-10:]) for run in runs]), f"{math.log(CLASSES):.3f}"],
        ["share of numbers that are right", spread([e[0] for e in ends]), f"{1 / CLASSES:.5f}"],
        ["share of digits that are right", spread([e[1] for e in ends]), "0.12"],
    ]
    claims = [
        Claim(
            f"the loss falls below {math.log(SHOWN):.2f}, what knowing which {SHOWN} classes occur would give",
            [mean(run[-10:]) < math.log(SHOWN) for run in runs],
        ),
        Claim("more than one number in ten is read right", [e[0] > 0.1 for e in ends]),
    ]
    lines = [(f"seed {seed}", *smoothed(run, 5)) for seed, run in zip(effort.seeds, runs, strict=True)]
    note = f"{steps} steps of {BATCH} new pictures: {steps * BATCH / SHOWN:.0f} of each class that occurs."
    return Effect(table, claims, [Panel("Training", "step", "loss", lines)], [note])


if __name__ == "__main__":
    sys.exit(main(Program(__file__, __doc__ or "", task, effect)))
