"""How time and memory of a call are measured on each kind of device. Bytes and seconds.

On a CPU time is the wall's and memory the process's resident set. On a GPU both are the device's: CUDA events, and
PyTorch's allocator, where every tensor and every workspace of a contender comes from.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from . import memory

ITERATIONS = 5  # of a repetition on a GPU


class Cpu:
    """Wall time, and this process's resident set."""

    def seconds(self, call: Callable[[], Any]) -> float:
        """How long one call took, in seconds."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def trim(self) -> None:
        """Give back what nothing refers to."""
        memory.trim()

    def level(self) -> int:
        """Bytes that are in use now."""
        return memory.rss()

    def peak(self) -> RssPeak:
        """A context manager whose `value` is the most bytes in use inside."""
        return RssPeak()


class RssPeak(AbstractContextManager):
    """This process's highest resident set inside a ``with`` block: the kernel's own, or sampled where it won't."""

    value = 0

    def __enter__(self) -> RssPeak:
        self._sampler = None if memory.reset_peak() else memory.RssSampler(interval=0.001).__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._sampler is None:
            self.value = memory.peak_rss()
        else:
            self._sampler.__exit__()
            self.value = self._sampler.peak()


class Cuda:
    """Time between CUDA events, and what PyTorch's allocator has given out."""

    def seconds(self, call: Callable[[], Any]) -> float:
        """Median over `ITERATIONS` calls behind each other, after one that allocates again what `trim` gave back."""
        import torch

        call()
        marks = []
        for _ in range(ITERATIONS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            marks.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in marks) / 1000

    def trim(self) -> None:
        """Give back what nothing refers to, to the device: other processes share it."""
        import torch

        memory.trim()
        torch.cuda.empty_cache()

    def level(self) -> int:
        """Bytes that are in use now."""
        import torch

        return torch.cuda.memory_allocated()

    def peak(self) -> AllocatorPeak:
        """A context manager whose `value` is the most bytes in use inside."""
        return AllocatorPeak()


class AllocatorPeak(AbstractContextManager):
    """The most that PyTorch's allocator had given out inside a ``with`` block."""

    value = 0

    def __enter__(self) -> AllocatorPeak:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *exc: object) -> None:
        import torch

        torch.cuda.synchronize()
        self.value = torch.cuda.max_memory_allocated()


Meter = Cpu | Cuda
METERS: dict[str, type[Cpu] | type[Cuda]] = {"cpu": Cpu, "cuda": Cuda}
