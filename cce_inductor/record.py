"""Where the record of a rewritten graph goes: the log, the structured trace, the dump folders, and open collectors."""

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from torch.fx import GraphModule

from . import compat, notice
from .config import Settings
from .page.graphs import GraphRecord, Pair, pairs
from .rewrite.result import Rewritten
from .rewrite.site import Site

log = logging.getLogger("cce_inductor")


class DeclinedError(RuntimeError):
    """Raised under ``strict``: a loss over a vocabulary was not fused."""


_collectors: list[list[GraphRecord]] = []
_numbers = itertools.count()
_latest: GraphRecord | None = None  # the graph that was recorded last
_folders: list[Path] = []  # where it is dumped


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
    global _latest
    entry = _latest = GraphRecord(next(_numbers), result.sites, len(result.deferrals))
    folders = [Path(folder) for folder in (settings.dump_dir, compat.debug_folder()) if folder is not None]
    if _collectors or folders:
        entry.pairs = _pairs(gm, result)
    for collector in _collectors:
        collector.append(entry)
    notice.saw_graph(result.sites, len(result.deferrals))
    for site in result.sites:
        log.info("%s", site)
    if not result.sites:
        log.debug("graph %d: no loss over a vocabulary", entry.number)
    artifacts = {
        "before.py": lambda: compat.readable(gm),
        "after.py": lambda: compat.readable(result.graph_module),
        "sites.json": lambda: json.dumps([asdict(site) for site in result.sites], indent=1),
    }
    for name, text in artifacts.items() if result.sites else ():
        compat.trace_artifact(f"cce_inductor_{name}", text)
    # Several processes (ranks) may share a dump folder.
    _folders[:] = [folder / "cce_inductor" / f"graph_{entry.number}_pid_{os.getpid()}" for folder in folders]
    for target in _folders:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in artifacts.items():
            (target / name).write_text(text())
    _write_page()


def forget() -> None:
    """Takes the graph that was recorded last out of the open collectors. What was logged and dumped of it stays."""
    for collector in _collectors:
        if collector and collector[-1] is _latest:
            collector.pop()


def outside(site: Site) -> None:
    """Writes down what runs outside of every graph, once where a collector is open."""
    log.info("%s", site)
    for collector in _collectors:
        if not any(site in entry.sites for entry in collector):
            collector.append(GraphRecord(next(_numbers), [site], 0))


def kernel(name: str, text: str) -> None:
    """Writes a rendered kernel beside the graph that is being compiled. A warm cache renders none."""
    compat.trace_artifact(f"cce_inductor_{name}", lambda: text)
    if _latest is not None:
        _latest.kernels[name] = text
    for folder in _folders:
        (folder / name).write_text(text)
    _write_page()


def _pairs(gm: GraphModule, result: Rewritten) -> list[Pair]:
    """The graph before and after for the page. A fault of ours in drawing one must not cost the compilation."""
    try:
        return pairs(gm, result.graph_module)
    except Exception:
        log.exception("cce_inductor could not draw a graph")
        return []


def _write_page() -> None:
    """The page of the graph that was recorded last, with what is known of it by now, into its folders."""
    if not _folders or _latest is None:
        return
    from .page import html

    try:
        page = html.render([_latest], f"graph {_latest.number}")
        for folder in _folders:
            (folder / "report.html").write_text(page)
    except Exception:
        log.exception("cce_inductor could not write the page of a graph")
