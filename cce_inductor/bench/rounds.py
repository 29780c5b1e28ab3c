"""Runs the contenders of one case in turns, so that a machine that slows down slows all of them.

Every contender has a process; all of them wait, asleep, while one of them runs. In a round each does one
repetition of everything. Where their memory would not fit, they run one after the other instead.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .cases import Case
from .contenders import CONTENDERS
from .launch import Child, ChildError, environment
from .machine import total_ram
from .measure import MODES

PROCESS_BYTES = 600 << 20  # interpreter, libraries, compiled code
RAM_SHARE = 0.6  # of the machine's memory that a round may take


@dataclass(frozen=True)
class Options:
    """What applies to every case of a run."""

    output: Path
    cache: Path
    contenders: tuple[str, ...]
    repeat: int = 5
    threads: int | None = None
    timeout: float = 300.0
    error: bool = True
    gemm: bool = True

    def child(self, module: str, job: dict[str, Any], name: str, memory_limit: int | None = None) -> Child:
        logs = self.output / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{name.replace('/', '_')}.log"
        return Child(module, job, log, environment(self.cache, self.threads), memory_limit)


@dataclass
class Row:
    """One contender: what was measured before it failed, if it did."""

    contender: str
    seconds: dict[str, list[float]] = field(default_factory=dict)  # by mode, round by round
    memory: dict[str, int] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    warm_up: float | None = None
    note: str = ""
    failure: str = ""  # why it is not complete


@dataclass
class Result:
    case: Case
    rows: list[Row]
    interleaved: bool = True
    gemm: dict[str, list[float]] = field(default_factory=dict)  # seconds, by mode

    def row(self, contender: str) -> Row | None:
        return next((row for row in self.rows if row.contender == contender), None)

    def summary(self) -> dict[str, Any]:
        return asdict(self) | {"label": self.case.label}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fits_together(case: Case, processes: int, ram: int) -> bool:
    """Whether that many processes can wait with their inputs while the largest runs."""
    idle = processes * (case.input_bytes + PROCESS_BYTES)
    running = case.input_bytes + 4 * case.n * case.v * 4
    return idle + running <= RAM_SHARE * ram


class Reference:
    """The float64 reference of the latest inputs, kept until other inputs come."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key: Case | None = None
        self._loss: float | None = None

    def of(self, case: Case, options: Options) -> float | None:
        """The loss, with the gradients in `folder`; None if it could not be computed."""
        if self._key != case.inputs_key:
            self._key, self._loss = case.inputs_key, None
            for file in self.folder.iterdir():
                file.unlink()
            say("  float64 reference")
            job = {"case": asdict(case), "folder": str(self.folder)}
            try:
                with options.child("reference", job, "reference") as child:
                    self._loss = child.ask("compute", max(options.timeout, 1800.0))["loss"]
            except ChildError as error:
                say(f"  no reference: {error}")
        return self._loss


@contextmanager
def references() -> Iterator[Reference]:
    with tempfile.TemporaryDirectory(prefix="cce-bench-reference-") as folder:
        yield Reference(Path(folder))


def run_case(case: Case, options: Options, reference: Reference | None = None) -> Result:
    """All contenders of `options` at one case."""
    say(case.label)
    loss = reference.of(case, options) if reference else None
    result = Result(case, [Row(name) for name in options.contenders])
    able = []
    for row in result.rows:
        row.failure = CONTENDERS[row.contender].missing() or ""
        if not row.failure:
            able.append(row)
    result.interleaved = fits_together(case, len(able) + options.gemm, total_ram())
    if not result.interleaved:
        say("  too large to keep all processes at once: one after the other")
    folder = str(reference.folder) if reference else ""
    groups = [able] if result.interleaved else [[row] for row in able]
    for i, group in enumerate(groups):
        _run_group(result, group, options, folder, loss, gemm=options.gemm and i == 0)
    return result


def _run_group(result: Result, rows: list[Row], options: Options, folder: str, loss: float | None, gemm: bool) -> None:
    """Start and warm up all of `rows`, time them in turns, then measure memory and error of each."""
    case = result.case
    children: dict[str, Child] = {}
    ceiling: Child | None = None
    try:
        for row in rows:
            say(f"  {row.contender}: compiling")
            job = {"case": asdict(case), "contender": row.contender}
            child = children[row.contender] = options.child("worker", job, row.contender)
            _attempt(row, lambda row=row, child=child: _prepare(row, child, options.timeout))
        if gemm:
            ceiling = _start_gemm(case, options)
        for turn in range(options.repeat):
            say(f"  round {turn + 1} of {options.repeat}")
            if ceiling is not None and not _gemm_round(ceiling, result.gemm, options.timeout):
                ceiling = None
            start = turn % max(len(rows), 1)
            for row in rows[start:] + rows[:start]:  # nobody always runs behind the same other
                if not row.failure:
                    _attempt(row, lambda row=row: _time(row, children[row.contender], options.timeout))
        for row in rows:
            if not row.failure:
                _attempt(row, lambda row=row: _examine(row, children[row.contender], options, folder, loss))
            children[row.contender].close()
    finally:
        for child in [*children.values(), *filter(None, [ceiling])]:
            child.close()


def _attempt(row: Row, action: Any) -> None:
    try:
        action()
    except ChildError as error:
        row.failure = str(error)
        say(f"  {row.contender}: {row.failure}")


def _prepare(row: Row, child: Child, timeout: float) -> None:
    child.ask("inputs", timeout)
    answer = child.ask("warm_up", 3 * timeout)  # two repetitions, and compiling them
    row.warm_up, row.note = answer["seconds"], answer["note"]


def _time(row: Row, child: Child, timeout: float) -> None:
    for mode in MODES:
        seconds = child.ask("timed", timeout, mode=mode)["seconds"]
        row.seconds.setdefault(mode, []).append(seconds)


def _examine(row: Row, child: Child, options: Options, folder: str, loss: float | None) -> None:
    say(f"  {row.contender}: memory{' and error' if loss is not None else ''}")
    row.memory = child.ask("peaks", 2 * options.timeout)
    if loss is not None:
        row.error = child.ask("error", 2 * options.timeout, folder=folder, loss=loss)


def _start_gemm(case: Case, options: Options) -> Child | None:
    child = options.child("gemm", {"case": asdict(case)}, "gemm")
    try:
        child.ask("inputs", options.timeout)
        child.ask("warm_up", options.timeout)
    except ChildError as error:
        say(f"  torch.mm: {error}")
        return None
    return child


def _gemm_round(child: Child, seconds: dict[str, list[float]], timeout: float) -> bool:
    try:
        for mode in MODES:
            seconds.setdefault(mode, []).append(child.ask("timed", timeout, mode=mode)["seconds"])
    except ChildError as error:
        say(f"  torch.mm: {error}")
        return False
    return True
