"""Runs the contenders of one case in turns, so that a machine that slows down slows all of them.

Every contender has a process; all of them wait, asleep, while one of them runs. In a round each does one
repetition of everything. Where not all of them fit into memory at once, they run in groups that do.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..instruments.child import Child, ChildError
from ..instruments.machine import memory_of
from ..instruments.process import environment
from . import smollm2
from .cases import REAL, Case
from .contenders import KNOWN
from .measure import MODES

PROCESS_BYTES = 600 << 20  # interpreter, libraries, compiled code; on a GPU its context
RAM_SHARE = 0.6  # of the machine's memory that a round may take
SHARES = {"cpu": RAM_SHARE, "cuda": 0.85}


@dataclass(frozen=True)
class Options:
    """What applies to every case of a run."""

    output: Path
    cache: Path  # of compiled kernels, and of inputs
    contenders: tuple[str, ...]
    device: str = "cpu"
    repeat: int = 5
    timeout: float = 300.0
    error: bool = True
    gemm: bool = True
    filters: bool = False  # what the gradient filters did, too

    def child(self, module: str, job: dict[str, Any], name: str, memory_limit: int | None = None) -> Child:
        """``cce_inductor.MODULE`` for a job, its prints in the log `name`; memory_limit: in bytes. See `Child`."""
        logs = self.output / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{name.replace('/', '_')}.log"
        env = environment(self.cache, self.device)
        return Child(module, job | {"cache": str(self.cache)}, log, env, memory_limit)


@dataclass
class Row:
    """One contender: what was measured before it failed, if it did."""

    contender: str
    seconds: dict[str, list[float]] = field(default_factory=dict)  # by mode, round by round
    memory: dict[str, int] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    rows: dict[str, float] = field(default_factory=dict)  # errors of dW, row by row: measure.row_summary
    filter: dict[str, Any] = field(default_factory=dict)  # cce_inductor.diagnostics()
    warm_up: float | None = None
    note: str = ""
    failure: str = ""  # why it is not complete


@dataclass
class Result:
    """One case: its contenders, the GEMMs' seconds by mode, how sparse its softmax is."""

    case: Case
    rows: list[Row]
    interleaved: bool = True
    gemm: dict[str, list[float]] = field(default_factory=dict)  # seconds, by mode
    densities: dict[str, float] = field(default_factory=dict)

    def row(self, contender: str) -> Row | None:
        """Of a contender, or None if it was not asked for."""
        return next((row for row in self.rows if row.contender == contender), None)

    def summary(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self) | {"label": self.case.label, "flops": {mode: self.case.flops(mode) for mode in MODES}}


def say(text: str) -> None:
    """Progress, to stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def at_once(case: Case, memory: int, gemm: bool = False) -> int:
    """How many contenders can wait with their inputs while the largest of them runs, beside `gemm`: one in any case."""
    taken = case.input_bytes + 4 * case.n * case.v * 4
    if gemm:
        taken += 2 * case.input_bytes + case.logits_bytes + PROCESS_BYTES
    return max(1, int((SHARES[case.device] * memory - taken) // (case.input_bytes + PROCESS_BYTES)))


class Reference:
    """The float64 reference of the latest inputs, kept until other inputs come."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key: Case | None = None
        self._answer: dict[str, Any] = {}

    def of(self, case: Case, options: Options) -> dict[str, Any]:
        """Its loss and its softmax's densities, with the gradients in `folder`; empty if it could not be computed."""
        if self._key != case.inputs_key:
            self._key, self._answer = case.inputs_key, {}
            for file in self.folder.iterdir():
                file.unlink()
            say("  float64 reference")
            job = {"case": asdict(case), "folder": str(self.folder)}
            try:
                with options.child("bench.reference", job, "reference") as child:
                    self._answer = child.ask("compute", max(options.timeout, 1800.0))
            except ChildError as error:
                say(f"  no reference: {error}")
        return self._answer


@contextmanager
def references() -> Iterator[Reference]:
    """A `Reference` with a folder that is removed in the end."""
    with tempfile.TemporaryDirectory(prefix="cce-bench-reference-") as folder:
        yield Reference(Path(folder))


def run_case(case: Case, options: Options, reference: Reference | None = None) -> Result:
    """All contenders of `options` at one case."""
    say(case.label)
    result = Result(case, [Row(name) for name in options.contenders])
    reason = _prepare_inputs(case, options)
    for row in result.rows:
        row.failure = reason or KNOWN[row.contender].missing() or ""
    able = [row for row in result.rows if not row.failure]
    if reason or not able:
        say(f"  nobody can run: {reason or 'nothing is installed'}")
        return result
    answer = reference.of(case, options) if reference else {}
    loss, result.densities = answer.get("loss"), answer.get("densities", {})
    groups = _parts(able, at_once(case, memory_of(case.device), options.gemm))
    result.interleaved = len(groups) == 1
    if not result.interleaved:
        say(f"  too large to keep all processes at once: {len(groups)} groups, one after the other")
    folder = str(reference.folder) if reference else ""
    for i, group in enumerate(groups):
        _run_group(result, group, options, folder, loss, gemm=options.gemm and i == 0)
    return result


def _parts(rows: list[Row], size: int) -> list[list[Row]]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _prepare_inputs(case: Case, options: Options) -> str:
    """Why the inputs of a case can not be had, or ""."""
    if case.activations != REAL:
        return ""
    reason = smollm2.missing()
    if reason:
        return reason
    say("  hidden states of the model")
    with options.child("bench.smollm2", {"rows": case.n, "device": case.device}, "smollm2") as child:
        try:
            child.ask("make", max(options.timeout, 600.0))
        except ChildError as error:
            return str(error)
    return ""


def _run_group(result: Result, rows: list[Row], options: Options, folder: str, loss: float | None, gemm: bool) -> None:
    """Start and warm up all of `rows`, time them in turns, then measure memory and error of each."""
    case = result.case
    children: dict[str, Child] = {}
    ceiling: Child | None = None
    try:
        for row in rows:  # all of them, so that the others import while one compiles
            job = {"case": asdict(case), "contender": row.contender}
            children[row.contender] = options.child("bench.worker", job, row.contender)
        for row in rows:
            say(f"  {row.contender}: compiling")
            _attempt(row, lambda row=row: _prepare(row, children[row.contender], options.timeout))
        if gemm:
            ceiling = _start_gemm(case, options)
        for turn in range(options.repeat):
            say(f"  round {turn + 1} of {options.repeat}")
            if ceiling is not None and not _gemm_round(ceiling, result.gemm, options.timeout):
                ceiling = None
            start = turn % max(len(rows), 1)
            for row in rows[start:] + rows[:start]:  # nobody always runs behind the same other
                if not row.failure and KNOWN[row.contender].kernel:
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
    if KNOWN[row.contender].kernel:
        answer = child.ask("warm_up", 3 * timeout)  # two repetitions, and compiling them
        row.warm_up, row.note = answer["seconds"], answer["note"]


def _time(row: Row, child: Child, timeout: float) -> None:
    for mode in MODES:
        seconds = child.ask("timed", timeout, mode=mode)["seconds"]
        row.seconds.setdefault(mode, []).append(seconds)


def _examine(row: Row, child: Child, options: Options, folder: str, loss: float | None) -> None:
    say(f"  {row.contender}: memory{' and error' if loss is not None else ''}")
    if KNOWN[row.contender].kernel:
        row.memory = child.ask("peaks", 2 * options.timeout)
    if loss is not None:
        row.error = child.ask("error", 3 * options.timeout, folder=folder, loss=loss)
    if options.filters:
        row.rows = child.ask("rows", options.timeout, folder=folder)
        row.filter = child.ask("diagnostics", 3 * options.timeout)


def _start_gemm(case: Case, options: Options) -> Child | None:
    child = options.child("bench.gemm", {"case": asdict(case)}, "gemm")
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
