"""Does the runs that are not done yet: each leaves a file, so that whoever is interrupted goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cce_inductor import config
from cce_inductor.bench.rounds import say

from .specs import FILTERS


def supported(mode: str) -> bool:
    """Whether this version has the filter of that name, or it is none."""
    try:
        with config.patch(grad_filter=FILTERS.get(mode, "exact")):
            return True
    except ValueError:
        return False


def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `path` holds; made and written there if it is not."""
    if not path.exists():
        say(f"training: {path.stem}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(make()))
        partial.rename(path)
    return json.loads(path.read_text())


def finish(
    specs: Sequence[Any], run: Callable[[Any], dict[str, Any]], folder: Path, more: bool = True
) -> list[dict[str, Any]]:
    """The results of `specs`, read from `folder` or made and written there; without those not supported.

    more: False leaves out what is not done yet.
    """
    results = []
    for spec in specs:
        path = folder / spec.name
        if not path.exists() and not more:
            continue
        if not path.exists() and not supported(spec.mode):
            say(f"training: no filter {spec.mode}")
            continue
        results.append(once(path, lambda spec=spec: run(spec)))  # type: ignore[misc]
    return results
