"""What a process really holds: its resident set, sampled over time and its exact peak.

The figures are the kernel's, in bytes, read from ``/proc`` (Linux only).  They follow what the program has
allocated only if the C library gives freed memory back at once: start the process to be measured with
`ALLOCATOR_ENV` in its environment, and call `trim` before reading a level that should hold nothing else.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MIB = 1 << 20

# glibc: blocks from 1 MiB come from mmap and go back when freed; so does the top of the heap.  (Unset, the
# threshold grows to 32 MiB with use, and freed activations stay in the resident set.)  One arena per process
# keeps threads from holding heaps of their own.
ALLOCATOR_ENV = {
    "MALLOC_MMAP_THRESHOLD_": str(MIB),
    "MALLOC_TRIM_THRESHOLD_": str(MIB),
    "MALLOC_ARENA_MAX": "1",
}

_PAGE = os.sysconf("SC_PAGE_SIZE")


def rss(pid: int | str = "self") -> int:
    """Resident set of a process now, in bytes. Raises OSError once the process is gone."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def peak_rss(pid: int | str = "self") -> int:
    """Highest resident set, in bytes, since the process began or since `reset_peak`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc has no VmHWM: peak memory can not be measured here")


def reset_peak(pid: int | str = "self") -> bool:
    """Start a new peak from the present level. False where the kernel does not let us: sampling must do then."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def trim() -> None:
    """Free what nothing refers to and hand the C library's unused memory back to the kernel."""
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if malloc_trim is not None:
        malloc_trim(0)


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each storage once (tied weights share one)."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class RssSampler:
    """Samples a process's resident set every `interval` seconds, in a thread, as a context manager.

    Sampling another process rather than one's own keeps its interpreter lock out of the measurement.
    `times` are `time.monotonic()` seconds, comparable between processes; `values` are bytes.
    """

    def __init__(self, pid: int | str = "self", interval: float = 0.005) -> None:
        self.pid = pid
        self.interval = interval
        self.times: list[float] = []
        self.values: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rss-sampler", daemon=True)

    def __enter__(self) -> RssSampler:
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def sample(self) -> bool:
        """Take one sample; False when the process is gone."""
        try:
            value = rss(self.pid)
        except OSError:
            return False
        self.times.append(time.monotonic())
        self.values.append(value)
        return True

    def _run(self) -> None:
        while not self._stop.wait(self.interval) and self.sample():
            pass

    def peak(self, start: float = float("-inf"), end: float = float("inf")) -> int:
        """Highest sample, in bytes, with `start <= time <= end`; 0 without any."""
        return max((v for t, v in zip(self.times, self.values, strict=True) if start <= t <= end), default=0)


def envelope(times: list[float], values: list[int], bins: int = 2000) -> tuple[list[float], list[int]]:
    """At most `bins` samples that keep every peak: the highest of each equal span of time, at its own time."""
    if len(times) <= bins:
        return times, values
    span = (times[-1] - times[0]) / bins or 1.0
    highest: dict[int, int] = {}
    for index, t in enumerate(times):
        slot = min(int((t - times[0]) / span), bins - 1)
        if slot not in highest or values[index] > values[highest[slot]]:
            highest[slot] = index
    kept = sorted(highest.values())
    return [times[i] for i in kept], [values[i] for i in kept]
