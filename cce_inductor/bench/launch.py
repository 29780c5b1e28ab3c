"""Starts a child process, talks to it, and ends it when it takes too long or too much memory."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..demo.launch import environment as demo_environment
from ..demo.memory import RssSampler

GIB = 1 << 30
COMPILERS = 4  # of Triton kernels at once
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class ChildError(Exception):
    """A child did not do what it was asked; the message is the reason for the report."""


def environment(cache_dir: str | Path, threads: int | None = None, device: str = "cpu") -> dict[str, str]:
    """The same for every child.

    On a CPU each compiles in its own process: a pool of compilers per child would be in the way.
    """
    compilers = 1 if device == "cpu" else min(COMPILERS, os.cpu_count() or 1)
    env = demo_environment(str(cache_dir)) | {"TORCHINDUCTOR_COMPILE_THREADS": str(compilers)}
    return env | {name: str(threads) for name in THREAD_VARIABLES} if threads else env


class Watch(RssSampler):
    """Samples a child's resident set and kills it above `limit` bytes.

    The limit of the address space would count what PyTorch reserves and never touches.
    """

    def __init__(self, process: subprocess.Popen, limit: int, interval: float = 0.005) -> None:
        super().__init__(process.pid, interval)
        self._process = process
        self.limit = limit
        self.killed = False

    def sample(self) -> bool:
        alive = super().sample()
        if alive and self.values[-1] > self.limit:
            self.killed = True
            self._process.kill()
            return False
        return alive


class Child:
    """``python -m cce_inductor.bench.MODULE``, answering requests one at a time. A context manager."""

    def __init__(
        self, module: str, job: dict[str, Any], log: Path, env: dict[str, str], memory_limit: int | None = None
    ) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        job = job | {"memory_limit": memory_limit}
        command = [sys.executable, "-m", f"cce_inductor.bench.{module}", json.dumps(job), str(requests), str(answers)]
        self.log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=env, pass_fds=[requests, answers]
            )
        os.close(requests)
        os.close(answers)
        self.watch = Watch(self._process, memory_limit) if memory_limit else None
        if self.watch:
            self.watch.__enter__()
        self._pending = b""

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def peak(self) -> int:
        """Highest resident set that the watch saw; 0 without a limit."""
        return self.watch.peak() if self.watch else 0

    def ask(self, do: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """The answer to one request. Raises ChildError, and ends the child, if there is none."""
        try:
            try:
                os.write(self._requests, json.dumps({"do": do, **arguments}).encode() + b"\n")
            except BrokenPipeError:
                self._gone()
            answer = json.loads(self._read_line(time.monotonic() + timeout, timeout))
        except ChildError:
            self.close()
            raise
        if "error" in answer:
            self.close()
            raise ChildError(answer["error"])
        return answer

    def _read_line(self, deadline: float, timeout: float) -> bytes:
        while b"\n" not in self._pending:
            if not select.select([self._answers], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise ChildError(f"no answer within {timeout:.0f} s")
            chunk = os.read(self._answers, 1 << 16)
            if not chunk:
                self._gone()
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        return line

    def _gone(self) -> Any:
        """The process is dead or dying: say of what."""
        status = self._process.wait()
        if self.watch and self.watch.killed:
            raise ChildError(f"needs more than {self.watch.limit / GIB:.1f} GiB")
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        how = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise ChildError(f"{how}: {lines[-1]}" if lines else how)

    def close(self) -> None:
        """End the child, whatever it does."""
        for name in ("_requests", "_answers"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)
        self._process.kill()
        self._process.wait()
        if self.watch:
            self.watch.__exit__()
