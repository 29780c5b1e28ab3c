"""Where the record of a rewritten graph goes: the log, the structured trace, the dump folders, and open collectors."""

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.fx import GraphModule

from . import compat
from .config import Settings
from .rewrite.result import Rewritten
from .rewrite.site import Site

log = logging.getLogger("cce_inductor")

_collectors: list[list["GraphRecord"]] = []
_numbers = itertools.count()
_folders: list[Path] = []  # where the graph that was recorded last is dumped


@dataclass(frozen=True)
class GraphRecord:
    """One compiled graph: its number in the process, its sites, and how many outputs were deferred."""

    number: int
    sites: list[Site]
    deferred: int


@contextlib.contextmanager
def collect() -> Iterator[list[GraphRecord]]:
    """Collects the records of the graphs compiled inside a ``with`` block."""
    found: list[GraphRecord] = []
    _collectors.append(found)
    try:
        yield found
    finally:
        _collectors.remove(found)


def record(gm: GraphModule, result: Rewritten, settings: Settings) -> None:
    """Writes down what the pass did to `gm`."""
    number = next(_numbers)
    entry = GraphRecord(number, result.sites, len(result.deferrals))
    for collector in _collectors:
        collector.append(entry)
    for site in result.sites:
        log.info("%s", site)
    if not result.sites:
        log.debug("graph %d: no loss over a vocabulary", number)
        return
    artifacts = {
        "before.py": lambda: compat.readable(gm),
        "after.py": lambda: compat.readable(result.graph_module),
        "sites.json": lambda: json.dumps([asdict(site) for site in result.sites], indent=1),
    }
    for name, text in artifacts.items():
        compat.trace_artifact(f"cce_inductor_{name}", text)
    _folders.clear()
    for folder in (settings.dump_dir, compat.debug_folder()):
        if folder is not None:
            # Several processes (ranks) may share a dump folder.
            target = Path(folder, "cce_inductor", f"graph_{number}_pid_{os.getpid()}")
            target.mkdir(parents=True, exist_ok=True)
            _folders.append(target)
            for name, text in artifacts.items():
                (target / name).write_text(text())


def kernel(name: str, text: str) -> None:
    """Writes a rendered kernel beside the graph that is being compiled. A warm cache renders none."""
    compat.trace_artifact(f"cce_inductor_{name}", lambda: text)
    for folder in _folders:
        (folder / name).write_text(text)
