"""One contender's run as data: what it was asked to do, and what it reported."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from ..instruments.training import ITEMSIZE, Spec


@dataclass
class Run:
    """What a worker reported, and the samples of its resident set. Bytes and seconds throughout.

    `peaks[i]` is the highest resident set during step i, which for step 0 includes compilation. `rest` is the
    resident set after step 0 with nothing alive but the process itself and `state_bytes`: weights, gradients
    and optimizer state.
    """

    spec: Spec
    rows: int = 0  # batch · seq
    vocab: int = 0
    state_bytes: int = 0
    rest: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)  # monotonic time at which each step began
    counters: dict[str, int] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)  # monotonic times of `rss`
    rss: list[int] = field(default_factory=list)

    def record(self, event: dict[str, Any]) -> None:
        """Take one of the worker's answers: a `step` adds to the lists, anything else sets fields."""
        if event["event"] == "step":
            self.losses.append(event["loss"])
            self.seconds.append(event["seconds"])
            self.peaks.append(event["peak"])
            self.starts.append(event["start"])
        else:
            for name in event.keys() & {"rows", "vocab", "state_bytes", "rest", "counters"}:
                setattr(self, name, event[name])

    @property
    def logits_bytes(self) -> int:
        """One logits tensor: batch · seq · V elements of the weights' dtype."""
        return self.rows * self.vocab * ITEMSIZE[self.spec.dtype]

    @property
    def seconds_per_step(self) -> float:
        """Median over the steps after the first."""
        return statistics.median(self.seconds[1:])

    @property
    def peak(self) -> int:
        """Highest resident set of the steps after the first."""
        return max(self.peaks[1:])

    @property
    def peak_above(self) -> int:
        """`peak` above the resting level: above weights, gradients, optimizer state and the process itself."""
        return self.peak - self.rest

    @property
    def process_bytes(self) -> int:
        """Interpreter, libraries and compiled code: the resting level less weights, gradients, optimizer state."""
        return self.rest - self.state_bytes

    @property
    def whole_peak(self) -> int:
        """Highest resident set from start to end, loading and compilation included."""
        return max(*self.peaks, *self.rss, 0)

    def summary(self) -> dict[str, Any]:
        """Everything but the samples, as plain JSON."""
        everything = asdict(self)
        del everything["times"], everything["rss"]
        derived = ("logits_bytes", "seconds_per_step", "peak", "peak_above", "process_bytes", "whole_peak")
        return everything | {name: getattr(self, name) for name in derived}
