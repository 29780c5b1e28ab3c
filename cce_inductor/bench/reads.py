"""Time of losses that have to read deferred logits, against plain torch.compile of the same model."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from . import report
from .docs import Section
from .measure import speedup
from .readers import READERS
from .rounds import Options, say

SHAPE, QUICK = (512, 576, 16384), (32, 16, 4096)  # rows, width, vocabulary
LIMIT = 1.03  # of plain's time
PAIR = ("compile", "ours")


@dataclass
class Reads:
    """One loss: seconds of a training step, round by round."""

    loss: str
    compile: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Ours as a share of plain's: the median of the rounds' ratios."""
        return 1 / (speedup(self.compile, self.ours) or 1.0)


def run(options: Options, quick: bool = False) -> Section:
    """The two take turns in processes of their own; a step is forward and backward."""
    shape = QUICK if quick else SHAPE
    found = []
    with ExitStack() as stack:
        children = {
            name: stack.enter_context(
                options.child("bench.reads_worker", {"contender": name, "shape": shape}, f"reads-{name}")
            )
            for name in PAIR
        }
        for loss in READERS:
            say(f"reads: {loss}")
            found.append(Reads(loss))
            for turn in range(-1, options.repeat):  # the first warms up
                for name, child in children.items():
                    seconds = child.ask("step", 10 * options.timeout, loss=loss)["seconds"]
                    if turn >= 0:
                        getattr(found[-1], name).append(seconds)
    return conclude(found, shape)


def conclude(found: list[Reads], shape: tuple[int, int, int]) -> Section:
    """The times as a section."""
    rows = [
        [one.loss, report.milliseconds(one.compile), report.milliseconds(one.ours), f"{one.ratio:.3f}"] for one in found
    ]
    middle, worst = statistics.median(one.ratio for one in found), max(found, key=lambda one: one.ratio)
    text = (
        "A model without its loss, compiled; the loss is called eagerly on its logits, which are deferred and which it "
        f"has to read. N, D, V = {shape[0]}, {shape[1]}, {shape[2]}, fp32, forward and backward. The ratio is the "
        f"median over the rounds; over the losses its median is {middle:.3f}, and the largest is {worst.ratio:.3f} "
        f"({worst.loss}). The aim is at most {LIMIT}."
    )
    table = report.markdown(("loss", "compile, ms", "ours, ms", "ours / compile"), rows)
    return Section("reads", f"{text}\n\n{table}", [asdict(one) for one in found])
