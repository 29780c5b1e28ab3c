"""A non-linear recurrent language model, evaluated for all positions at once.

Sources: DEER (Lim et al., arXiv 2309.12252), quasi-DEER (Gonzalez et al., arXiv 2407.19115) and ParaRNN (arXiv
2510.21450). The states of h_t = f(h_{t-1}, x_t) are a root of equations that Newton's method solves: with a guess
of all states, f is replaced by its tangent, h_t = J_t h_{t-1} + b_t, and this linear recurrence is an associative
scan. At the root one more such step, with J held fixed, has the gradient of backpropagation through time.

The model is a GRU whose recurrent matrices are diagonal, as in ParaRNN, so J is a vector; the iteration is a
`while_loop` and the scan an `associative_scan`, higher-order operators that the pass leaves alone while the head
fuses. A GRU with full matrices (DEER's) is checked too, in float64.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Claim, Effect, Effort, Panel, Program, Task, adam, compiled, main, mean, renew, shared, spread, train
from model import bpe, rows, sources
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.while_loop import while_loop

VOCAB, WIDTH, BATCH, SEQ = 4096, 64, 8, 64
MOST, CLOSE = 50, 1e-6  # Newton's steps, and the change at which they end


def gates(h: Tensor, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The GRU's update gate, reset gate and candidate; x holds three parts, u (3, width) the recurrent diagonals."""
    a, b, c = x.chunk(3, -1)
    z, r = torch.sigmoid(a + u[0] * h), torch.sigmoid(b + u[1] * h)
    return z, r, torch.tanh(c + r * (u[2] * h))


def cell(h: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """The next state."""
    z, _, n = gates(h, x, u)
    return (1 - z) * n + z * h


def slope(h: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """The derivative of `cell` by h, a diagonal."""
    z, r, n = gates(h, x, u)
    inner = (1 - n * n) * (r * (1 - r) * u[1] * u[2] * h + r * u[2])
    return (1 - z) * inner + z + z * (1 - z) * u[0] * (h - n)


def shifted(h: Tensor) -> Tensor:
    """The state before each one, (seq, batch, width)."""
    return F.pad(h[:-1], (0, 0, 0, 0, 1, 0))


def scan(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t for all t."""

    def follow(first: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return then[0] * first[0], then[0] * first[1] + then[1]

    return associative_scan(follow, (a, b), dim=0, combine_mode="generic")[1]


def solve(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's number of steps, and the states (seq, batch, width)."""

    def going(step: Tensor, h: Tensor, change: Tensor) -> Tensor:
        return (change > CLOSE) & (step < MOST)

    def newton(step: Tensor, h: Tensor, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = shifted(h)
        j = slope(before, x, u)
        new = scan(j, cell(before, x, u) - j * before)
        return step + 1, new, (new - h).abs().amax()

    start = torch.zeros_like(x[..., : x.shape[-1] // 3])
    steps, h, _ = while_loop(going, newton, (torch.zeros((), dtype=torch.int64), start, start.new_ones(())))
    return steps, h


class Recurrent(nn.Module):
    """Embedding, GRU and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.input = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.recurrent = nn.Parameter(torch.randn(3, WIDTH) * 0.5)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def inputs(self, ids: Tensor) -> Tensor:
        """What the cells read, (seq, batch, 3 width)."""
        return self.input(self.embedding(ids)).transpose(0, 1).contiguous()

    def loss_of(self, h: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(h.transpose(0, 1)).flatten(0, 1), ids[:, 1:].flatten())

    def parallel(self, ids: Tensor) -> Tensor:
        """The loss, by Newton's method."""
        x, u = self.inputs(ids[:, :-1]), self.recurrent
        with torch.no_grad():
            _, h = solve(x.detach(), u.detach())
        before = shifted(h)
        j = slope(before, x, u).detach()
        return self.loss_of(scan(j, cell(before, x, u) - j * before), ids)

    def sequential(self, ids: Tensor) -> Tensor:
        """The loss, state by state."""
        return self.loss_of(one_by_one(cell, self.inputs(ids[:, :-1]), self.recurrent, WIDTH), ids)


def one_by_one(step: Callable, x: Tensor, u: Any, width: int) -> Tensor:
    """The recurrence as it is defined."""
    h, states = x.new_zeros(x.shape[1], width), []
    for one in x:
        h = step(h, one, u)
        states.append(h)
    return torch.stack(states)


def tokens() -> Tensor:
    text = sources(1_500_000)
    return torch.tensor(bpe(text, VOCAB).encode(text).ids)


def task(seed: int) -> Task:
    torch.manual_seed(seed)
    model = Recurrent()
    batches = rows(shared("tokens", tokens), BATCH, SEQ + 1, seed)
    return Task(model.parallel, batches, adam(model.parameters(), 3e-3), BATCH * SEQ * VOCAB * 4)


# The check in float64, for a full and a diagonal recurrence, by a scan of its own.


def doubling(a: Tensor, b: Tensor, product: Callable) -> Tensor:
    """The linear recurrence by doubling: after k rounds every state knows 2^k inputs."""
    reach = 1
    while reach < len(a):
        b = torch.cat([b[:reach], b[reach:] + product(a[reach:], b[:-reach])])
        a = torch.cat([a[:reach], product(a[reach:], a[:-reach])])
        reach *= 2
    return b


def full_cell(h: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """A GRU with full recurrent matrices u (3, width, width)."""
    a, b, c = x.chunk(3, -1)
    z, r = torch.sigmoid(a + h @ u[0]), torch.sigmoid(b + h @ u[1])
    return (1 - z) * torch.tanh(c + r * (h @ u[2])) + z * h


def newton(x: Tensor, u: Tensor, width: int, full: bool) -> tuple[Tensor, int]:
    """The states and the number of steps until they no longer change."""
    h, close = x.new_zeros(*x.shape[:2], width), 1e-10 if x.dtype == torch.float64 else CLOSE
    taken, change = 0, math.inf
    while change > close and taken < MOST:
        before = torch.cat([h.new_zeros(1, *h.shape[1:]), h[:-1]])
        if full:
            one = torch.func.jacrev(full_cell)
            j = torch.vmap(torch.vmap(one, (0, 0, None)), (0, 0, None))(before, x, u)
            moved = (j @ before[..., None])[..., 0]
            b = (full_cell(before, x, u) - moved)[..., None]
            new = doubling(j, b, torch.matmul)[..., 0]
        else:
            j = slope(before, x, u)
            new = doubling(j, cell(before, x, u) - j * before, torch.mul)
        change, h, taken = float((new - h).abs().amax()), new, taken + 1
    return h, taken


def check(length: int, full: bool, dtype: torch.dtype, seed: int) -> tuple[float, int, float, float]:
    """Of random inputs: the deviation, Newton's steps, seconds in parallel and one by one."""
    generator = torch.Generator().manual_seed(seed)
    width = 8 if full else WIDTH
    x = torch.randn(length, 1, 3 * width, generator=generator, dtype=dtype)
    size = (3, width, width) if full else (3, width)
    u = torch.randn(size, generator=generator, dtype=dtype) / (width**0.5 if full else 2)
    start = time.perf_counter()
    h, steps = newton(x, u, width, full)
    middle = time.perf_counter()
    exact = one_by_one(full_cell if full else cell, x, u, width)
    end = time.perf_counter()
    return float((h - exact).abs().max()), steps, middle - start, end - middle


def effect(effort: Effort) -> Effect:
    """Deviations and times by length, then training in parallel and one by one from the same weights."""
    lengths, steps, few = effort.choose(((256, 1024, 4096), 60, 8), ((256, 1024, 4096, 16384), 600, 40))
    kinds = {"diagonal, float64": (False, torch.float64), "full, float64": (True, torch.float64)}
    kinds["diagonal, float32"] = (False, torch.float32)
    for kind in kinds.values():
        check(16, *kind, 0)  # so that the first time is not that of imports
    checks = {
        (name, length): [check(length, *kind, seed) for seed in effort.seeds]
        for name, kind in kinds.items()
        for length in lengths
        if not (name.startswith("full") and length > 4096)
    }
    model, text = Recurrent(), shared("tokens", tokens)
    loss, runs, apart = compiled(model.parallel), [], []
    for seed in effort.seeds:
        both = []
        for one, count in ((model.sequential, few), (loss, steps)):
            renew(model, Recurrent, seed)
            batches = rows(text, BATCH, SEQ + 1, seed)
            both.append(train(one, adam(model.parameters(), 3e-3), batches, count))
        apart.append(max(abs(a - b) / a for a, b in zip(*both, strict=False)))
        with torch.no_grad():
            x = model.inputs(next(rows(text, BATCH, SEQ + 1, seed))[0][:, :-1])
            runs.append((both[1], newton(x, model.recurrent, WIDTH, False)[1]))
    return told(checks, runs, apart, lengths)


def told(checks: dict, runs: list[tuple[list[float], int]], apart: list[float], lengths: tuple[int, ...]) -> Effect:
    """By kind and length, and the training."""
    table = [["recurrence", "length", "deviation", "Newton steps", "in parallel, ms", "one by one, ms"]]
    for (name, length), found in checks.items():
        deviation = f"{max(one[0] for one in found):.0e}"
        times = [f"{1000 * mean(one[i] for one in found):.1f}" for i in (2, 3)]
        table.append([name, str(length), deviation, spread([one[1] for one in found], 1), *times])
    longest = [checks["diagonal, float32", lengths[-1]], checks["diagonal, float64", lengths[-1]]]
    exact = [one for (name, _), found in checks.items() if "64" in name for one in found]
    failures = [] if max(one[0] for one in exact) < 1e-8 else ["the parallel states are not the recurrence's"]
    failures += [] if max(apart) < 1e-3 else [f"trained in parallel the losses are off by {max(apart):.1e}"]
    claims = [
        Claim(
            f"in float32 the states deviate by less than 1e-5 at length {lengths[-1]}",
            [one[0] < 1e-5 for one in longest[0]],
            "DEER: 2.4e-7",
        ),
        Claim("Newton needs 10 steps at most, at any length", [
            all(found[i][1] <= 10 for found in checks.values()) for i in range(len(runs))
        ], "ParaRNN: 3 suffice for its models"),
        Claim(
            f"in parallel is faster at length {lengths[-1]}",
            [one[2] < one[3] for one in longest[0]],
            f"{mean(one[3] / one[2] for one in longest[0]):.1f} times here; DEER: 68 times on a V100, at 10000",
        ),
        Claim("the language model learns: its loss falls by a nat", [run[0] - mean(run[-5:]) > 1 for run, _ in runs]),
    ]  # fmt: skip
    notes = [
        f"Trained one by one and in parallel, the losses differ by {max(apart):.0e} at most. "
        f"After training the Newton iteration takes {spread([n for _, n in runs], 1)} steps at length {SEQ}."
    ]
    panels = [
        Panel("Time by length, float32", "length", "ms", [
            (label, list(lengths), [1000 * mean(one[i] for one in checks["diagonal, float32", n]) for n in lengths])
            for label, i in (("in parallel", 2), ("one by one", 3))
        ], log="xy"),
        Panel("Training in parallel", "step", "loss", [
            (f"seed {i}", list(range(len(run))), run) for i, (run, _) in enumerate(runs)
        ]),
    ]  # fmt: skip
    return Effect(table, claims, panels, notes, failures)


if __name__ == "__main__":
    sys.exit(main(Program(__file__, __doc__ or "", task, effect, {"tokenizers": "pip install tokenizers"})))
