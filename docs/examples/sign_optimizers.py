"""Optimizers that step by the sign of a momentum, and the rows of words that do not occur.

Sources: Lion (Chen et al., arXiv 2302.06675; the package `lion-pytorch`) and Tiger (Su,
https://kexue.fm/archives/9512): m = beta m + (1 - beta) g; w = w - lr sign(m). A momentum that decays keeps its
sign, so the embedding of a word that occurred once goes on by a full step in every step to come. Two remedies:
update only the rows of words that occur in the batch, or make the step as large as the row's own norm (root mean
square) says.

A head's row gets a gradient from every token, however small its probability: exact gradients move the rows of words
that never occur, too. A budget leaves the smallest columns out, the unbiased filter samples them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from common import Claim, Effect, Effort, Panel, Program, Task, adam, compiled, main, mean, renew, spread
from torch import Tensor, nn

VOCAB, WIDTH, BATCH, CONTEXT = 8192, 64, 512, 3
USED = 4096  # words that the batches are made of, but for ONCE more in the first one; the others never occur
ONCE = 64
UNLIKELY = -8.0  # the logit that words which never occur start with
RATE, BETA = 1e-3, 0.965
FILTERS: dict[str, Any] = {"exact": "exact", "budget": 2**-9, "unbiased": ("unbiased", 2**-9)}


class Words(nn.Module):
    """Predicts a word from the three before it: embeddings side by side, an MLP, a head of its own weight.

    The head's bias is fixed to what is known of the words' frequencies, so that those that never occur are unlikely.
    """

    prior: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.up, self.down = nn.Linear(CONTEXT * WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.register_buffer("prior", torch.zeros(VOCAB).index_fill(0, torch.arange(USED, VOCAB), UNLIKELY))
        nn.init.normal_(self.embedding.weight, std=0.1)
        nn.init.normal_(self.head.weight, std=0.1)

    def forward(self, context: Tensor, target: Tensor) -> Tensor:
        x = self.down(F.gelu(self.up(self.embedding(context).flatten(1))))
        return F.cross_entropy(F.linear(F.rms_norm(x, (WIDTH,)), self.head.weight, self.prior), target)


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Contexts (batch, 3) with Zipf's frequencies and their sums as targets; ONCE words come in the first only."""
    generator, first = torch.Generator().manual_seed(seed), True
    while True:
        context = (USED ** torch.rand(BATCH, CONTEXT, generator=generator)).long().clamp(1, USED) - 1
        target = context.sum(1) % USED
        if first:
            context[:ONCE, 0] = USED + torch.arange(ONCE)
        first = False
        yield context, target


class Tiger(torch.optim.Optimizer):
    """Su's rule. remedy: "" for none, "rows" updates those with a gradient only, "norm" scales by their own norm.

    Which words occur is read off `seen`, a mask of words (V,), since a head's rows have a gradient all the time.
    """

    def __init__(self, params: Any, lr: float, remedy: str = "") -> None:
        super().__init__(params, {"lr": lr})
        self.remedy, self.seen = remedy, torch.ones(VOCAB, dtype=torch.bool)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step. Vectors and matrices that are no table of words move by the plain rule."""
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - BETA)
                move = momentum.sign() * group["lr"]
                if weight.shape[0] == VOCAB and self.remedy == "rows":
                    move *= self.seen[:, None]
                elif weight.shape[0] == VOCAB and self.remedy == "norm":
                    move *= weight.square().mean(1, keepdim=True).sqrt()
                weight -= move


def lion(params: Any) -> Any:
    from lion_pytorch import Lion

    return Lion(params, lr=RATE, betas=(0.9, 0.99))


OPTIMIZERS: dict[str, Callable] = {
    "Adam": lambda params: adam(params, RATE),
    "Lion": lion,
    "Tiger": lambda params: Tiger(params, RATE),
    "Tiger, rows that occur": lambda params: Tiger(params, RATE, "rows"),
    "Tiger, by the row's norm": lambda params: Tiger(params, RATE, "norm"),
}
FILTERED = ("Adam", "Lion", "Tiger")  # with every filter


def task(seed: int) -> Task:
    torch.manual_seed(seed)
    model = Words()
    return Task(model, batches(seed), OPTIMIZERS["Tiger"](model.parameters()), BATCH * VOCAB * 4)


def walked(now: Tensor, before: Tensor) -> float:
    """How far rows have come, in steps of the learning rate in every component: root mean square."""
    return float((now - before).square().mean().sqrt()) / RATE


def run(model: Words, step: Callable, optimizer: Any, seed: int, steps: int) -> dict[str, list[float]]:
    """By step: how far embeddings of words that came once, and the head's rows of words that never come, have gone."""
    once, never = slice(USED, USED + ONCE), slice(USED + ONCE, None)
    found: dict[str, list[float]] = {"once": [], "never": [], "loss": []}
    stream = batches(seed)
    for _ in range(steps):
        context, target = next(stream)
        if isinstance(optimizer, Tiger):
            optimizer.seen.zero_()
            optimizer.seen[context] = optimizer.seen[target] = True
        loss = step(context, target)
        loss.backward()
        if not found["loss"]:
            never_before = model.head.weight[never].detach().clone()
        optimizer.step()
        if not found["loss"]:
            once_before = model.embedding.weight[once].detach().clone()
        optimizer.zero_grad()
        found["once"].append(walked(model.embedding.weight[once].detach(), once_before))
        found["never"].append(walked(model.head.weight[never].detach(), never_before))
        found["loss"].append(float(loss.detach()))
    return found


def effect(effort: Effort) -> Effect:
    """Every optimizer with every filter."""
    steps = effort.choose(40, 400)
    model = Words()
    found: dict[tuple[str, str], list[dict[str, list[float]]]] = {}
    for filter_name, grad_filter in FILTERS.items():
        step = compiled(model, grad_filter=grad_filter)
        for name, make in OPTIMIZERS.items():
            if filter_name != "exact" and name not in FILTERED:
                continue
            found[name, filter_name] = []
            for seed in effort.seeds:
                renew(model, Words, seed)
                found[name, filter_name].append(run(model, step, make(model.parameters()), seed, steps))
    return told(found, steps)


def told(found: dict[tuple[str, str], list[dict[str, list[float]]]], steps: int) -> Effect:
    """Distances in steps of the learning rate."""

    def ends(name: str, filter_name: str, what: str) -> list[float]:
        return [run[what][-1] for run in found[name, filter_name]]

    head = ["optimizer", "embedding of a word that came once", *(f"head, never: {f}" for f in FILTERS), "loss"]
    table = [head]
    for name in OPTIMIZERS:
        far = [
            spread(ends(name, "exact", "once"), 1),
            *("" if (name, f) not in found else spread(ends(name, f, "never"), 1) for f in FILTERS),
        ]
        table.append([name, *far, spread([mean(run["loss"][-10:]) for run in found[name, "exact"]])])

    def compare(
        a: str, b: str, what: str = "once", f: str = "exact", g: str = "exact", factor: float = 2.0
    ) -> list[bool]:
        pairs = zip(ends(a, f, what), ends(b, g, what), strict=True)
        return [x > factor * y for x, y in pairs]

    all_steps = [
        min(a, b) > 0.9 * steps
        for a, b in zip(ends("Tiger", "exact", "once"), ends("Lion", "exact", "once"), strict=True)
    ]
    claims = [
        Claim(
            f"the embedding of a word that came once goes on by a full step in each of {steps} steps (Tiger and Lion)",
            all_steps,
        ),
        Claim("under Adam it stops: less than half of that", compare("Tiger", "Adam")),
        Claim("updating only the rows that occur stops it", compare("Tiger", "Tiger, rows that occur", factor=10)),
        Claim(
            "steps by the row's norm slow it down tenfold, at these norms of 0.1",
            compare("Tiger", "Tiger, by the row's norm", factor=5),
        ),
        Claim(
            "a budget leaves the head's rows of words that never occur in place, exact gradients move them (Tiger)",
            compare("Tiger", "Tiger", "never", "exact", "budget", 10),
        ),
        Claim(
            "the unbiased filter moves them less than exact gradients (Tiger)",
            compare("Tiger", "Tiger", "never", "exact", "unbiased", 1.0),
        ),
    ]
    x = list(range(1, steps + 1))

    def curve(name: str, filter_name: str, what: str) -> tuple[str, list[int], list[float]]:
        label = name if what == "once" else f"{name}, {filter_name}"
        return label, x, [mean(values) for values in zip(*(run[what] for run in found[name, filter_name]), strict=True)]

    panels = [
        Panel(
            "Embedding of a word that came once",
            "step",
            "steps walked",
            [curve(n, "exact", "once") for n in OPTIMIZERS],
        ),
        Panel(
            "Head, words that never come",
            "step",
            "steps walked",
            [curve(n, f, "never") for n in ("Adam", "Tiger") for f in FILTERS],
        ),
    ]
    return Effect(
        table,
        claims,
        panels,
        [
            "Distances are root mean squares over components, in learning rates. "
            "The loss is the mean of the last 10 steps with exact gradients."
        ],
    )


NEEDS = {"lion_pytorch": "pip install lion-pytorch"}

if __name__ == "__main__":
    sys.exit(main(Program(__file__, __doc__ or "", task, effect, NEEDS)))
