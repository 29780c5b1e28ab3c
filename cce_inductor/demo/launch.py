"""Runs contenders in processes of their own, samples their memory from outside and collects what they report."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..instruments.child import Child, ChildError
from ..instruments.data import CannotRun
from ..instruments.process import environment
from ..instruments.training import FUSED, Spec
from .run import Run

# Is told who does something ("" for all of them) and what; None twice a second while nothing happens.
Listener = Callable[[str, "dict[str, Any] | None"], None]

PAGE = "report.html"


class Contender:
    """A contender's process, and what it has reported by now. A context manager."""

    def __init__(self, spec: Spec, log: Path, env: dict[str, str], listen: Listener) -> None:
        self.run, self.log, self._listen = Run(spec), log, listen
        self._child = Child("instruments.training", {"spec": asdict(spec)}, log, env, sample=True)

    def __enter__(self) -> Contender:
        self._child.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._child.__exit__(*exc)

    def load(self) -> None:
        """Makes the model and the text."""
        self._ask("load", "start")

    def begin(self) -> None:
        """Takes the first step, which compiles; then reads the level at rest."""
        self.step()
        self._ask("rest", "resting")

    def step(self) -> None:
        """Takes a step."""
        self._ask("step", "step")

    def end(self) -> None:
        """Asks for the counters, ends the process and takes over the samples."""
        self._ask("counters", "end")
        self._child.close()
        sampler, run = self._child.watch, self.run
        assert sampler is not None
        alive = [i for i, value in enumerate(sampler.values) if value]  # the last may be of a process that is gone
        run.times, run.rss = [sampler.times[i] for i in alive], [sampler.values[i] for i in alive]
        for i, (start, seconds) in enumerate(zip(run.starts, run.seconds, strict=True)):
            run.peaks[i] = max(run.peaks[i], sampler.peak(start, start + seconds))

    def _ask(self, do: str, event: str) -> None:
        name = self.run.spec.contender
        try:
            told = {"event": event, **self._child.ask(do, waiting=lambda: self._listen(name, None))}
        except ChildError as error:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
            raise CannotRun(f"{name} {error.how}; the end of {self.log}:\n{tail}") from error
        self.run.record(told)
        self._listen(name, told)


def run_contenders(specs: Sequence[Spec], out: Path, listen: Listener) -> list[Run]:
    """Runs contenders to their end. They load and compile at the same time, and then take turns, step by step.

    What compiles alike is compiled once: they share a cache. `out` gets what they print, in a log each, and the page of
    what cce_inductor did to its graph. Raises CannotRun with the end of the log if a process fails.
    """
    with tempfile.TemporaryDirectory(prefix="cce-demo-") as cache, ExitStack() as stack:
        contenders = []
        for spec in specs:
            dumps = {"CCE_INDUCTOR_DUMP_DIR": cache} if spec.contender == FUSED else {}
            made = Contender(spec, out / f"{spec.contender}.log", environment(cache) | dumps, listen)
            contenders.append(stack.enter_context(made))
        with ThreadPoolExecutor(len(contenders)) as pool:
            for phase, do in (("loading", Contender.load), ("compiling", Contender.begin)):
                listen("", {"event": "phase", "phase": phase})
                list(pool.map(do, contenders))
        listen("", {"event": "phase", "phase": "training"})
        for _ in range(1, specs[0].steps):
            for contender in contenders:
                contender.step()
        for contender in contenders:
            contender.end()
        _keep_page(Path(cache), out / PAGE)
    return [contender.run for contender in contenders]


def _keep_page(dumps: Path, page: Path) -> None:
    """Copies the page of the graph with the loss out of a dump folder."""
    for sites in sorted(dumps.glob("cce_inductor/*/sites.json")):
        if json.loads(sites.read_text()):
            shutil.copyfile(sites.with_name(PAGE), page)
            return
