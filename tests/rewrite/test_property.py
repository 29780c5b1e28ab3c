"""Random programs: the rewritten graph gives eager's outputs and gradients, whether anything was fused or not.

Fused graphs are run as they are, without a compiler: what is tested is the pass, its operators and the deferred logits.
`-s` prints how many programs fused, by production; `-m slow` runs thousands.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import productions  # noqa: F401 - fills the grammar
import pytest
import torch
from grammar import GRAMMAR, Program, alone, generate, shrink

from cce_inductor import backend, config, record

SETTINGS = config.Settings(min_vocab=0, compiler="eager")
# Of the largest entry. A gradient in fp16, of a weight that is stored so, is rounded once per use.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def quiet():
    """Pytest listens to every logger, and torch then writes its structured trace: a third of the time."""
    trace = logging.getLogger("torch.__trace")
    level = trace.level
    trace.setLevel(logging.CRITICAL)
    yield
    trace.setLevel(level)


@dataclass
class Run:
    """What a program gave: its outputs, and the gradients of the first of them alone and of all together."""

    outputs: list[torch.Tensor]
    differentiable: list[bool]
    first: list[torch.Tensor | None]
    all: list[torch.Tensor | None]

    def parts(self) -> dict[str, torch.Tensor | None]:
        named = {"output": self.outputs, "gradient of the first output": self.first, "gradient of all": self.all}
        return {f"{name} {i}": x for name, tensors in named.items() for i, x in enumerate(tensors)}


def run(fn: Callable, program: Program) -> Run:
    torch.manual_seed(0)
    arguments = program.arguments()
    outputs = fn(*arguments)
    leaves = [x for x in arguments if x.requires_grad]

    def gradients(of: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        generator = torch.Generator().manual_seed(1)
        total = torch.zeros((), dtype=torch.float64)
        for x in of:
            weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            if x.requires_grad:
                total = total + (x.double().nan_to_num(posinf=0.0, neginf=0.0) * weights).sum()
        if not total.requires_grad:
            return [None] * len(leaves)
        return list(torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True))

    # The first output alone: if it is a loss, deferred logits behind it are not read.
    first = gradients(outputs[:1])
    return Run([x.detach() + 0 for x in outputs], [x.requires_grad for x in outputs], first, gradients(outputs))


def difference(want: Run, got: Run, tolerance: float) -> str:
    """What is wrong with a run, or "" if nothing is."""
    if want.differentiable != got.differentiable:
        return f"requires_grad of the outputs: {got.differentiable} for {want.differentiable}"
    others = got.parts()
    for name, a in want.parts().items():
        b = others[name]
        if a is None or b is None:
            if a is not b:
                return f"{name}: {b} for {a}"
            continue
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{name}: {b.dtype}{list(b.shape)} for {a.dtype}{list(a.shape)}"
        if not torch.equal(a.isfinite(), b.isfinite()):
            return f"{name}: other entries are finite"
        if a.is_floating_point() and a.numel():
            dtype = a.dtype
            a, b = a.double().nan_to_num(0.0, 0.0, 0.0), b.double().nan_to_num(0.0, 0.0, 0.0)
            error, scale = (a - b).abs().max().item(), a.abs().max().item()
            if error > max(tolerance, TOLERANCE[dtype]) * (1 + scale):
                return f"{name}: off by {error:.2e} of {scale:.2e}"
        elif not torch.equal(a, b):
            return f"{name}: {b} for {a}"
    return ""


@dataclass(frozen=True)
class Outcome:
    """What the pass made of a program: its losses, and what is wrong ("" if nothing)."""

    fused: int = 0
    declined: int = 0
    wrong: str = ""


def outcome(program: Program, dynamic: bool | None = None) -> Outcome | None:
    """Runs a program in eager mode and rewritten; None for one that eager refuses, or makes NaN of."""
    try:
        want = run(program.function(), program)
    except RuntimeError:  # a tensor that the backward needs was written to
        return None
    if any(x is not None and x.isnan().any() for x in want.parts().values()):
        return None
    torch._dynamo.reset()

    def rewriting(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        return backend.compile_graph(gm, inputs, SETTINGS, lambda rewritten, _: rewritten.forward)

    with record.collect() as graphs:
        try:
            got = run(torch.compile(program.function(), backend=rewriting, dynamic=dynamic), program)
        except Exception as error:
            return Outcome(wrong=f"{type(error).__name__}: {error}")
    fused = [site.fused for graph in graphs for site in graph.sites]
    wrong = difference(want, got, TOLERANCE[program.choices.dtype])
    if not wrong and program.verdict == "barrier" and any(fused):
        wrong = "fused, though it cannot be"
    if any("internal error" in site.reason for graph in graphs for site in graph.sites):
        wrong = "the pass raised an error"
    return Outcome(sum(fused), len(fused) - sum(fused), wrong)


class Tally:
    """How many programs that can fuse did, whole, and by production."""

    def __init__(self) -> None:
        self.programs = self.fused = self.skipped = 0
        self.by_production: dict[tuple[str, str], list[int]] = {}

    def add(self, program: Program, result: Outcome) -> None:
        if program.verdict != "fuse":
            return
        whole = result.fused > 0 and result.declined == 0
        self.programs += 1
        self.fused += whole
        for part, name, _ in program.choices.steps:
            entry = self.by_production.setdefault((part, name), [0, 0])
            entry[0] += whole
            entry[1] += 1

    def __str__(self) -> str:
        lines = [f"{self.fused} of {self.programs} programs fused ({self.fused / max(1, self.programs):.0%})"]
        for part in GRAMMAR:
            rates = sorted((f / n, name, f, n) for (p, name), (f, n) in self.by_production.items() if p == part)
            lines += [f"  {part:10} {name:45} {f:4} of {n:4}" for _, name, f, n in rates]
        return "\n".join(lines)


def check(seeds: range, dtype: torch.dtype = torch.float64, dynamic: bool | None = None, only: Any = None) -> Tally:
    """Runs the programs of some seeds; a wrong one is made as short as it can be, and printed."""
    tally = Tally()
    for seed in seeds:
        program = generate(seed, dtype, only)
        result = outcome(program, dynamic)
        if result is None:
            tally.skipped += 1
            continue
        if result.wrong:

            def fails(candidate: Program) -> bool:
                again = outcome(candidate, dynamic)
                return again is not None and bool(again.wrong)

            program = shrink(program, fails)
            again = outcome(program, dynamic)
            pytest.fail(f"seed {seed}: {again.wrong if again else result.wrong}\n{program}", pytrace=False)
        tally.add(program, result)
    print(f"\n{dtype}, dynamic={dynamic}, seeds {seeds}, {tally.skipped} skipped by eager: {tally}")
    return tally


def fusing() -> set[tuple[str, str]]:
    """The productions that fuse in the plainest surroundings."""
    found = set()
    for part, named in GRAMMAR.items():
        for name in named:
            results = [outcome(program) for program in alone(part, name)]
            assert all(r is None or not r.wrong for r in results), (part, name, results)
            if any(r is not None and r.fused and not r.declined for r in results):
                found.add((part, name))
    return found


@pytest.mark.parametrize("first", [0, 100])
def test_random_programs(first):
    check(range(first, first + 100))


def test_what_fuses_alone_fuses_together():
    """The trace is an algebra: programs of what it has a rule for fuse whole, but for few pairs without a form."""
    tally = check(range(500, 620), only=fusing())
    assert tally.fused >= 0.85 * tally.programs > 80


def test_dynamic_shapes():
    check(range(400, 430), dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 4000, 500))
def test_thousands_of_random_programs(first):
    check(range(first, first + 500))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_thousands_of_programs_of_what_fuses(dtype, dynamic):
    check(range(4000, 4500), dtype, dynamic, only=fusing())
