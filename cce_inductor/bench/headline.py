"""One large model's head under a limit on memory: who fits, and what they used.

Gemma 2 2B's own head does not fit beside its logits into a small machine. Each contender computes the loss and
the gradients once, in a process that may not grow beyond the limit: an allocation that would go beyond it fails,
and a process that gets there in another way is killed.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from ..instruments.child import GIB, ChildError
from ..instruments.machine import total_ram
from . import plots, report
from .cases import Case
from .contenders import CONTENDERS
from .docs import Section
from .measure import Stats
from .rounds import Options, say

TIMEOUT = 3600.0  # seconds for one contender


def default_limit() -> int:
    """Bytes: 70 % of the memory there is, at most 16 GiB."""
    return min(16 * GIB, int(0.7 * total_ram()))


@dataclass
class Outcome:
    """What became of one contender. Bytes and seconds."""

    contender: str
    peak: int = 0  # resident set of the whole process, up to its end
    above: int | None = None  # ... above inputs and gradients
    seconds: float | None = None
    loss: float | None = None
    note: str = ""
    failure: str = ""

    def sentence(self, limit: int) -> str:
        """The outcome under a limit in bytes, for people."""
        if not self.failure:
            return "fits"
        if self.out_of_memory:
            asked = re.search(r"tried to allocate (\d+) bytes", self.failure)
            more = f" and asked for {int(asked[1]) / GIB:.1f} more" if asked else ""
            return f"does not fit in {limit / GIB:.1f} GiB (reached {self.peak / GIB:.1f}{more})"
        return self.failure

    @property
    def out_of_memory(self) -> bool:
        """Whether the failure is one of memory, by its message."""
        signs = ("needs more than", "not enough memory", "can't allocate memory", "MemoryError", "bad_alloc")
        return any(sign in self.failure for sign in signs)


def run_contender(name: str, case: Case, options: Options, limit: int) -> Outcome:
    """One contender in a process of at most `limit` bytes."""
    outcome = Outcome(name, failure=CONTENDERS[name].missing() or "")
    if outcome.failure:
        return outcome
    job = {"case": asdict(case), "contender": name}
    with options.child("bench.worker", job, f"headline-{name}", memory_limit=limit) as child:
        try:
            child.ask("inputs", options.timeout)
            answer = child.ask("once", options.timeout)
            outcome.above, outcome.seconds, outcome.loss = answer["above"], answer["seconds"], answer["loss"]
            outcome.note = answer["note"]
        except ChildError as error:
            outcome.failure = str(error)
        outcome.peak = child.peak
    return outcome


def run(case: Case, options: Options, limit: int) -> Section:
    """All contenders of `options`, one after the other, each in a process of at most `limit` bytes."""
    outcomes = []
    say(f"{case.label}, in {limit / GIB:.1f} GiB")
    for name in options.contenders:
        say(f"  {name}")
        outcomes.append(run_contender(name, case, options, limit))
        say(f"    {outcomes[-1].sentence(limit)}")
    return conclude(case, outcomes, options, limit)


def conclude(case: Case, outcomes: list[Outcome], options: Options, limit: int) -> Section:
    """The outcomes as a section, with a picture of those that fit."""
    head = ("contender", "outcome", "peak of the process, MiB", "above inputs and gradients, MiB", "seconds", "loss")
    rows = [
        [
            o.contender,
            o.sentence(limit) + (f" ({o.note})" if o.note else ""),
            report.mib(o.peak),
            report.mib(o.above),
            "" if o.seconds is None else f"{Stats.of([o.seconds]).median:.1f}",
            "" if o.loss is None else f"{o.loss:.5f}",
        ]
        for o in outcomes
    ]
    text = (
        f"{case.label}: loss and gradients, once, with compilation, in a process limited to {limit / GIB:.1f} GiB. "
        f"One logits tensor is {case.logits_bytes / GIB:.2f} GiB, inputs and gradients are "
        f"{2 * case.input_bytes / GIB:.2f} GiB.\n\n{report.markdown(head, rows)}"
    )
    picture = None
    finished = [(o.contender, o.seconds, o.peak / (1 << 20)) for o in outcomes if o.seconds is not None]
    if finished:
        picture = options.output / "headline.png"
        plots.bars([(case.label, finished)], picture, ("loss + gradients, s", "peak of the process, MiB"))
    data: dict[str, Any] = {"case": asdict(case), "limit": limit, "outcomes": [asdict(o) for o in outcomes]}
    return Section("headline", text, data, picture)
