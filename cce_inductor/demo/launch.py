"""Runs a contender in a process of its own, samples its memory from outside and collects what it reports."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..instruments.child import Child, ChildError
from ..instruments.data import CannotRun
from ..instruments.process import environment
from ..instruments.training import Spec
from .run import Run

Listener = Callable[[dict[str, Any] | None], None]


def run_contender(spec: Spec, log: Path, listen: Listener) -> Run:
    """Run one contender to its end.

    Its prints go to `log`. `listen` gets every event, and None twice a second while nothing happens. Raises CannotRun
    with the end of the log if the process fails.
    """
    run = Run(spec)
    with tempfile.TemporaryDirectory(prefix="cce-demo-") as cache:
        job = {"spec": asdict(spec)}
        with Child("instruments.training", job, log, environment(cache), sample=True) as child:
            try:
                for event in _events(spec, lambda do: child.ask(do, waiting=lambda: listen(None))):
                    run.record(event)
                    listen(event)
            except ChildError as error:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
                raise CannotRun(f"{spec.contender} {error.how}; the end of {log}:\n{tail}") from error
    sampler = child.watch
    assert sampler is not None
    run.times, run.rss = sampler.times, sampler.values
    for i, (start, seconds) in enumerate(zip(run.starts, run.seconds, strict=True)):
        run.peaks[i] = max(run.peaks[i], sampler.peak(start, start + seconds))
    return run


def _events(spec: Spec, ask: Callable[[str], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What happens in a run, in order: what it turns to, and what the worker answers."""
    yield {"event": "phase", "phase": "loading"}
    yield {"event": "start", **ask("load")}
    yield {"event": "phase", "phase": "compiling"}
    for step in range(spec.steps):
        yield {"event": "step", **ask("step")}
        if step == 0:
            yield {"event": "resting", **ask("rest")}
            yield {"event": "phase", "phase": "training"}
    yield {"event": "end", **ask("counters")}
