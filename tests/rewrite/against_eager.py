"""Runs a program in eager mode and rewritten, and compares outputs and gradients.

The rewritten graph is run as it is, without a compiler: what is compared is the pass, its operators and the deferred
logits.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from capture import FUSE_ALL
from grammar import GRAMMAR, Program
from head_oracle import error
from torch._dynamo.utils import counters

from cce_inductor import backend, config, record
from cce_inductor.deferred import DeferredLogitsError

SETTINGS = config.Settings(min_vocab=0, compiler="eager")
# Of the largest entry. A gradient in fp16, of a weight that is stored so, is rounded once per use.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 4e-3}


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
    reasons: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the logits are gone."""
        return self.fused > 0 and self.declined == 0


def outcome(
    program: Program, dynamic: bool | None = None, apart: bool = False, rest_compiled: bool = False
) -> Outcome | None:
    """Runs a program in eager mode and rewritten; None for one that eager refuses, or makes NaN of.

    apart: whether its head is compiled alone, and the rest called on pending logits, or, with `rest_compiled`, in
    graphs of its own. `fused` is then 1 if logits were deferred and not read, `declined` 1 if they were read, and
    `reasons` say why.
    """
    try:
        want = run(program.function(), program)
    except RuntimeError:  # a tensor that the backward needs was written to
        return None
    if any(x is not None and x.isnan().any() for x in want.parts().values()):
        return None
    torch._dynamo.reset()

    def rewriting(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        return backend.compile_graph(gm, inputs, SETTINGS, lambda rewritten, _: rewritten.forward)

    def compiled(fn: Callable) -> Callable:
        return torch.compile(fn, backend=rewriting, dynamic=dynamic)

    ours = counters["cce_inductor"]
    before = dict(ours)
    with record.collect() as graphs, reads() as why:
        try:
            fn = program.with_head_apart(compiled, rest_compiled) if apart else compiled(program.function())
            got = run(fn, program)
        except DeferredLogitsError:  # the weight was written to in between: a documented error
            return None
        except Exception as error:
            return Outcome(wrong=f"{type(error).__name__}: {error}")
    sites = [site for graph in graphs for site in graph.sites]
    fused = [site.fused for site in sites]
    reasons = tuple(site.reason for site in sites if not site.fused)
    wrong = difference(want, got, TOLERANCE[program.choices.dtype])
    # What stands behind a break of the graph, at a mask, keeps no loss in front of it from being fused.
    if not wrong and not apart and program.verdict == "barrier" and any(fused) and len(graphs) == 1:
        wrong = "fused, though it cannot be"
    wrong = wrong or next((reason for reason in reasons if "internal error" in reason), "")
    if apart:
        deferred, read = (ours[name] > before.get(name, 0) for name in ("deferred", "deferred_materialized"))
        return Outcome(
            int(deferred and not read), int(read), wrong, tuple(dict.fromkeys([*why, *reasons])) if read else ()
        )
    return Outcome(sum(fused), len(fused) - sum(fused), wrong, reasons)


@contextlib.contextmanager
def reads() -> Iterator[list[str]]:
    """Collects why deferred logits are read, from the log."""
    found: list[str] = []

    class Reasons(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            text = entry.getMessage()
            if text.startswith("deferred logits are read"):
                found.append(text.removeprefix("deferred logits are read").lstrip(": "))

    logger, handler = logging.getLogger("cce_inductor.deferred"), Reasons()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Tally:
    """How many programs that can fuse did, whole, and by production."""

    def __init__(self) -> None:
        self.programs = self.fused = self.skipped = 0
        self.by_production: dict[tuple[str, str], list[int]] = {}

    def add(self, program: Program, result: Outcome) -> None:
        if program.verdict != "fuse":
            return
        self.programs += 1
        self.fused += result.whole
        for part, name, _ in program.choices.steps:
            entry = self.by_production.setdefault((part, name), [0, 0])
            entry[0] += result.whole
            entry[1] += 1

    def __str__(self) -> str:
        lines = [f"{self.fused} of {self.programs} programs fused ({self.fused / max(1, self.programs):.0%})"]
        for part in GRAMMAR:
            rates = sorted((f / n, name, f, n) for (p, name), (f, n) in self.by_production.items() if p == part)
            lines += [f"  {part:10} {name:45} {f:4} of {n:4}" for _, name, f, n in rates]
        return "\n".join(lines)


def assert_error_rule(fn, given, dtype):
    """Compares the losses of rows that `fn` gives, and the gradients of their mean, with float64: one site, fused.

    given: tensors in float64, which it is given in `dtype`. Ours is at most 1.25 times as far off as eager, and 2 ulp.
    """

    def results(fn, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in given]
        loss = fn(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss.mean(), leaves)]

    counters.clear()
    fused = results(torch.compile(fn, backend="cce", options=FUSE_ALL), dtype)
    assert counters["cce_inductor"]["fused"] == 1
    for ours, eager, exact in zip(fused, results(fn, dtype), results(fn, torch.float64), strict=True):
        assert error(ours, exact) <= 1.25 * error(eager, exact) + 2 * torch.finfo(dtype).eps
