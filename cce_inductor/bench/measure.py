"""Time, memory and error of one contender; statistics over several calls. Bytes and seconds throughout."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..instruments.meters import Cpu, Meter

MODES = ("loss", "gradients")  # the loss alone, and the loss with both gradients


@dataclass(frozen=True)
class Stats:
    """Several samples in three numbers."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(samples: Sequence[float]) -> Stats:
        """Of at least one sample."""
        return Stats(statistics.median(samples), min(samples), max(samples))


def speedup(base: Sequence[float], samples: Sequence[float]) -> float | None:
    """How many times faster than `base`: the median over the rounds of each round's ratio.

    Within a round the two ran next to each other, so a machine that slows down for a while slows both.
    """
    ratios = [b / s for b, s in zip(base, samples, strict=False) if s > 0]
    return statistics.median(ratios) if ratios else None


class Head:
    """A contender with its inputs: runs the loss alone, or the loss and fresh gradients."""

    def __init__(self, call: Callable, x: Any, weight: Any, target: Any, meter: Meter | None = None) -> None:
        self.call, self.x, self.weight, self.target = call, x, weight, target
        self.meter = meter or Cpu()

    def clear(self) -> None:
        """Drops the gradients."""
        self.x.grad = self.weight.grad = None

    def loss(self) -> Any:
        """The loss alone, a scalar tensor, without a graph for a backward."""
        import torch

        with torch.no_grad():
            return self._loss_of(self.call(self.x, self.weight, self.target))

    def gradients(self) -> Any:
        # What else the call returned stays alive until after the backward, as a model's outputs do.
        result = self.call(self.x, self.weight, self.target)
        loss = self._loss_of(result)
        loss.backward()
        return loss.detach()

    @staticmethod
    def _loss_of(result: Any) -> Any:
        return result[0] if isinstance(result, tuple) else result

    def run(self, mode: str) -> Any:
        """The loss, from inputs without gradients."""
        self.clear()
        return self.loss() if mode == "loss" else self.gradients()

    def timed(self, mode: str) -> float:
        """Seconds of one run, after which nothing but the inputs is left."""
        seconds = self.meter.seconds(lambda: self.run(mode))
        self.rest()
        return seconds

    def rest(self) -> None:
        """Hold nothing but the inputs while others run."""
        self.clear()
        self.meter.trim()

    def gradient_bytes(self) -> int:
        """Of the gradients that are there."""
        return sum(t.grad.untyped_storage().nbytes() for t in (self.x, self.weight) if t.grad is not None)

    def peak(self, mode: str) -> dict[str, Any]:
        """One call: its peak above the inputs and gradients, the peak itself, its time, the loss."""
        self.rest()
        before = self.meter.level()
        with self.meter.peak() as peak:
            start = time.perf_counter()
            loss = self.run(mode)
            seconds = time.perf_counter() - start
        above = max(peak.value - before - self.gradient_bytes(), 0)
        return {"above": above, "peak": peak.value, "seconds": seconds, "loss": float(loss)}


QUANTILES = (0.5, 0.9, 0.99, 0.999)


def row_errors(value: Any, reference: Any, rows: int = 4096) -> Any:
    """(V,) float64: the norm of each row's difference, relative to that of the reference's row, block by block.

    0 where both rows are zero, infinite where the reference's alone is.
    """
    import torch

    found = []
    for a, b in zip(value.detach().split(rows), reference.split(rows), strict=True):
        b = b.to(a.device, dtype=torch.float64)
        difference = (a.double() - b).norm(dim=1)
        found.append(torch.where(difference == 0, 0.0, difference / b.norm(dim=1)))
    return torch.cat(found)


def row_summary(value: Any, reference: Any) -> dict[str, float]:
    """Of the relative errors of a gradient's rows the `QUANTILES`; "zero": the share of rows that are exactly zero."""
    import torch

    errors = row_errors(value, reference)
    quantiles = errors.quantile(torch.tensor(QUANTILES, dtype=errors.dtype, device=errors.device))
    found = {str(q): float(error) for q, error in zip(QUANTILES, quantiles, strict=True)}
    return found | {"zero": float((value.detach() == 0).all(1).double().mean())}


def relative_error(value: Any, reference: Any, rows: int = 4096) -> float:
    """Frobenius norm of the difference, relative to the reference's; block by block in float64."""
    import torch

    difference = norm = 0.0
    for a, b in zip(value.detach().split(rows), reference.split(rows), strict=True):
        b = b.to(a.device, dtype=torch.float64)
        difference += float((a.double() - b).square_().sum())
        norm += float(b.square().sum())
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)
