"""Starts a child process, talks to it, and ends it when it takes too long or too much memory."""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .memory import RssSampler

GIB = 1 << 30
PATIENCE = 0.5  # seconds between two calls of `waiting`


class ChildError(Exception):
    """A child did not do what it was asked; the message is the reason for the report. how: its process ended."""

    def __init__(self, reason: str, how: str = "ended with status 1") -> None:
        super().__init__(reason)
        self.how = how


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
        """Takes one sample, and kills the child if it is above the limit; False when the process is gone."""
        alive = super().sample()
        if alive and self.values[-1] > self.limit:
            self.killed = True
            self._process.kill()
            return False
        return alive


class Child:
    """``python -m cce_inductor.MODULE``, answering requests one at a time (protocol.py). A context manager.

    job: for the module, must be possible to write as JSON. log: the file that gets what the process prints. env: its
    environment. memory_limit: in bytes, beyond which it is killed. Its resident set is sampled if there is a limit, or
    if `sample` is set: `watch` has the samples.
    """

    def __init__(
        self,
        module: str,
        job: dict[str, Any],
        log: Path,
        env: dict[str, str],
        memory_limit: int | None = None,
        sample: bool = False,
    ) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        job = job | {"memory_limit": memory_limit}
        command = [sys.executable, "-m", f"cce_inductor.{module}", json.dumps(job), str(requests), str(answers)]
        self.log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=env, pass_fds=[requests, answers]
            )
        os.close(requests)
        os.close(answers)
        self.watch = Watch(self._process, memory_limit or sys.maxsize) if memory_limit or sample else None
        if self.watch:
            self.watch.__enter__()
        self._pending = b""

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def peak(self) -> int:
        """Highest resident set that was sampled, in bytes; 0 if nobody sampled."""
        return self.watch.peak() if self.watch else 0

    def ask(
        self, do: str, timeout: float = math.inf, waiting: Callable[[], Any] = lambda: None, **arguments: Any
    ) -> dict[str, Any]:
        """The answer to one request, within `timeout` seconds. `waiting` is called twice a second until it is there.

        Raises ChildError, and ends the child, if there is none.
        """
        try:
            try:
                os.write(self._requests, json.dumps({"do": do, **arguments}).encode() + b"\n")
            except BrokenPipeError:
                self._gone()
            answer = json.loads(self._read_line(timeout, waiting))
        except ChildError:
            self.close()
            raise
        if "error" in answer:
            self.close()
            raise ChildError(answer["error"])
        return answer

    def _read_line(self, timeout: float, waiting: Callable[[], Any]) -> bytes:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if not select.select([self._answers], [], [], min(max(left, 0), PATIENCE))[0]:
                if left <= PATIENCE:
                    raise ChildError(f"no answer within {timeout:.0f} s")
                waiting()
                continue
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
        raise ChildError(f"{how}: {lines[-1]}" if lines else how, how)

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
