"""Timing, memory and error of one call; statistics over several. Bytes and seconds throughout."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..demo import memory

MODES = ("loss", "gradients")  # the loss alone, and the loss with both gradients


@dataclass(frozen=True)
class Stats:
    """Several samples in three numbers."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(samples: Sequence[float]) -> Stats:
        return Stats(statistics.median(samples), min(samples), max(samples))


def speedup(base: Sequence[float], samples: Sequence[float]) -> float | None:
    """How many times faster than `base`: the median over the rounds of each round's ratio.

    Within a round the two ran next to each other, so a machine that slows down for a while slows both.
    """
    ratios = [b / s for b, s in zip(base, samples, strict=False) if s > 0]
    return statistics.median(ratios) if ratios else None


class Head:
    """A contender with its inputs: runs the loss alone, or the loss and fresh gradients."""

    def __init__(self, call: Callable, x: Any, weight: Any, target: Any) -> None:
        self.call, self.x, self.weight, self.target = call, x, weight, target

    def clear(self) -> None:
        self.x.grad = self.weight.grad = None

    def loss(self) -> Any:
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
        return self.loss() if mode == "loss" else self.gradients()

    def timed(self, mode: str) -> float:
        self.clear()
        start = time.perf_counter()
        self.run(mode)
        seconds = time.perf_counter() - start
        self.rest()
        return seconds

    def rest(self) -> None:
        """Hold nothing but the inputs while others run."""
        self.clear()
        memory.trim()

    def gradient_bytes(self) -> int:
        return sum(t.grad.untyped_storage().nbytes() for t in (self.x, self.weight) if t.grad is not None)

    def peak(self, mode: str) -> dict[str, Any]:
        """One call: its peak above the inputs and gradients, the peak itself, its time, the loss."""
        self.rest()
        before = memory.rss()
        with Peak() as peak:
            start = time.perf_counter()
            loss = self.run(mode)
            seconds = time.perf_counter() - start
        above = max(peak.value - before - self.gradient_bytes(), 0)
        return {"above": above, "peak": peak.value, "seconds": seconds, "loss": float(loss)}


class Peak(AbstractContextManager):
    """This process's highest resident set inside a ``with`` block: the kernel's own, or sampled where it won't."""

    value = 0

    def __enter__(self) -> Peak:
        self._sampler = None if memory.reset_peak() else memory.RssSampler(interval=0.001).__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._sampler is None:
            self.value = memory.peak_rss()
        else:
            self._sampler.__exit__()
            self.value = self._sampler.peak()


def relative_error(value: Any, reference: Any, rows: int = 4096) -> float:
    """Frobenius norm of the difference, relative to the reference's; block by block in float64."""
    difference = norm = 0.0
    for a, b in zip(value.detach().split(rows), reference.split(rows), strict=True):
        b = b.double()
        difference += float((a.double() - b).square_().sum())
        norm += float(b.square().sum())
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)
