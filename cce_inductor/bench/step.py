"""A whole training step of the demo's model: what the head and the loss are worth beside the rest."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..instruments.child import Child, ChildError
from ..instruments.machine import total_ram
from ..instruments.training import ITEMSIZE, Spec
from . import plots, report
from .docs import Section
from .measure import Stats
from .rounds import RAM_SHARE, Options, say

CONTENDERS = {
    "eager": "the model in eager mode, its outputs with the logits",
    "ours+head": "the same behind `cce_inductor.defer_head`: nothing is compiled but the loss, from its third call on",
    "compile": "torch.compile, returning the loss only",
    "compile+logits": "torch.compile(model), its outputs with the logits",
    "ours+logits": 'torch.compile(model, backend="cce"), its outputs with the logits, deferred',
}
BATCH, SEQ = 4, 256


@dataclass
class Steps:
    """One contender's steps after the warm-up. Bytes and seconds."""

    contender: str
    seconds: list[float] = field(default_factory=list)
    above: list[int] = field(default_factory=list)  # peak above weights, gradients, optimizer state
    losses: list[float] = field(default_factory=list)
    state: int = 0
    warm_up: float | None = None
    failure: str = ""


def run(spec: Spec, options: Options) -> Section:
    """All contenders in turns if they fit into memory together, else one after the other."""
    say(f"training step: {Path(spec.model).name}, {spec.batch} x {spec.seq} tokens, {spec.dtype}")
    runs = [Steps(name) for name in CONTENDERS if name in options.contenders]
    vocab = 0
    waiting = list(runs)
    while waiting:
        with ExitStack() as stack:
            group: list[tuple[Steps, Child]] = []
            rest = 0
            while waiting and RAM_SHARE * total_ram() > (len(group) + 2) * rest:  # the next, and a running one's peak
                steps = waiting.pop(0)
                job = {"spec": asdict(replace(spec, contender=steps.contender))}
                child = stack.enter_context(options.child("instruments.training", job, f"step-{steps.contender}"))
                say(f"  {steps.contender}: compiling")
                try:
                    vocab = child.ask("load", options.timeout)["vocab"]
                    steps.warm_up = child.ask("step", 3 * options.timeout)["seconds"]  # compiles
                    for _ in range(2):  # a loss that is called eagerly is compiled when it comes for the third time
                        child.ask("step", options.timeout)
                    answer = child.ask("rest", options.timeout)
                except ChildError as error:
                    _fail(steps, error)
                    continue
                steps.state, rest = answer["state_bytes"], answer["rest"]
                group.append((steps, child))
            for turn in range(options.repeat):
                say(f"  round {turn + 1} of {options.repeat}")
                for steps, child in group:
                    _step(steps, child, options.timeout)
    return conclude(spec, runs, vocab, options.output)


def _step(steps: Steps, child: Child, timeout: float) -> None:
    if steps.failure:
        return
    try:
        rest = child.ask("rest", timeout)["rest"]
        answer = child.ask("step", timeout)
    except ChildError as error:
        _fail(steps, error)
        return
    steps.seconds.append(answer["seconds"])
    steps.above.append(answer["peak"] - rest)
    steps.losses.append(answer["loss"])


def _fail(steps: Steps, error: ChildError) -> None:
    steps.failure = str(error)
    say(f"  {steps.contender}: {error}")


def conclude(spec: Spec, runs: list[Steps], vocab: int, output: Path) -> Section:
    """The steps as a section, with a picture of those that finished."""
    head = (
        "contender",
        "step, ms",
        "x faster than compile+logits",
        "peak above weights, gradients, optimizer state, MiB",
        "last loss",
    )
    base = next((steps.seconds for steps in runs if steps.contender == "compile+logits"), None)
    rows = [
        [
            steps.contender,
            report.milliseconds(steps.seconds) or steps.failure,
            report.ratio(base, steps.seconds),
            report.mib(max(steps.above)) if steps.above else "",
            f"{steps.losses[-1]:.5f}" if steps.losses else "",
        ]
        for steps in runs
    ]
    tokens = spec.batch * spec.seq
    logits = tokens * vocab * ITEMSIZE[spec.dtype]
    text = "\n\n".join(
        [
            f"{Path(spec.model).name}, {spec.batch} x {spec.seq} tokens, {spec.dtype}: forward, backward and AdamW. "
            f"One logits tensor is {logits / (1 << 20):,.0f} MiB.",
            report.markdown(head, rows),
            "\n".join(f"* {steps.contender}: {CONTENDERS[steps.contender]}" for steps in runs),
        ]
    )
    finished = [(s.contender, 1000 * Stats.of(s.seconds).median, max(s.above) / (1 << 20)) for s in runs if s.seconds]
    picture = None
    if finished:
        picture = output / "step.png"
        plots.bars([(Path(spec.model).name, finished)], picture, ("training step, ms", "peak above the state, MiB"))
    data = {"spec": asdict(spec) | {"model": Path(spec.model).name}, "runs": [asdict(steps) for steps in runs]}
    return Section("step", text, data, picture)
