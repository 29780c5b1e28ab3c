"""Starts a contender's process, samples its memory from outside and collects what it reports."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .data import DemoError
from .memory import ALLOCATOR_ENV, RssSampler
from .run import Run, Spec

Listener = Callable[[dict[str, Any] | None], None]


def environment(cache_dir: str) -> dict[str, str]:
    """The worker's environment: the same for both contenders, offline, with a compile cache of its own."""
    env = dict(os.environ)
    env.pop("CCE_INDUCTOR", None)  # would put cce_inductor into plain torch.compile as well
    return env | {
        **ALLOCATOR_ENV,
        "TORCHINDUCTOR_CACHE_DIR": cache_dir,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [env.get("PYTHONPATH")])]),
    }


def run_contender(spec: Spec, log: Path, listen: Listener) -> Run:
    """Run one contender to its end.

    Its prints go to `log`. `listen` gets every event, and None twice a second while nothing happens. Raises
    DemoError with the end of the log if the process fails.
    """
    run = Run(spec)
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "cce_inductor.demo.worker", json.dumps(asdict(spec)), str(writer)]
    with tempfile.TemporaryDirectory(prefix="cce-demo-") as cache, log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(cache), pass_fds=[writer]
        )
        os.close(writer)
        try:
            with RssSampler(process.pid) as sampler, os.fdopen(reader, "rb", buffering=0) as pipe:
                _listen(pipe.fileno(), run, listen)
            status = process.wait()
        finally:
            process.kill()  # whatever ended us early must not leave it running
            process.wait()
    if status != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise DemoError(f"{spec.contender} ended with status {status}; the end of {log}:\n{tail}")
    run.times, run.rss = sampler.times, sampler.values
    for i, (start, seconds) in enumerate(zip(run.starts, run.seconds, strict=True)):
        run.peaks[i] = max(run.peaks[i], sampler.peak(start, start + seconds))
    return run


def _listen(descriptor: int, run: Run, listen: Listener) -> None:
    """Pass the worker's lines on until it closes the pipe."""
    pending = b""
    while True:
        if not select.select([descriptor], [], [], 0.5)[0]:
            listen(None)
            continue
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            event = json.loads(line)
            run.record(event)
            listen(event)
