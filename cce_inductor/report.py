"""`explain`: what the pass would do to a function, without compiling it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from . import config, record
from .page import words
from .rewrite.site import Site as Site


@dataclass(frozen=True)
class Report:
    """What became of every loss over a vocabulary: `html` and ``print(report)`` are for people, `sites` for programs.

    of: what was compiled, as a title. records: the graphs it was captured in.
    """

    of: str = ""
    records: list[record.GraphRecord] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        """The losses of all graphs."""
        return [site for graph in self.records for site in graph.sites]

    @property
    def graphs(self) -> int:
        """How many there are."""
        return len(self.records)

    @property
    def deferred(self) -> int:
        """How many outputs are lazy logits."""
        return sum(graph.deferred for graph in self.records)

    def __str__(self) -> str:
        sites = self.sites
        lines = [words.headline(self.graphs, sites, self.deferred)]
        if not sites:
            return "\n".join([*lines, words.nothing(self.deferred)])
        lines += ["", *_table([words.COLUMNS, *(words.row(i, site) for i, site in enumerate(sites, 1))])]
        for i, site in enumerate(sites, 1):
            lines += ["", f"{i}. {words.line(site.location, site.source) or site.loss}"]
            lines += [f"   {text}" for text in (words.cost(site) if site.fused else words.fault(site))]
        return "\n".join(lines)

    def html(self, path: str | PathLike[str]) -> None:
        """Writes the report as one page that needs nothing else: the losses, and each graph before and after."""
        from .page import html

        Path(path).write_text(html.render(self.records, self.of), encoding="utf-8")


def of(graphs: list[record.GraphRecord], title: str = "") -> Report:
    """The report of graphs that `record.collect` has collected. title: what was compiled."""
    return Report(title, graphs)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rule = "  ".join("-" * width for width in widths[:-1])
    return [lines[0], rule, *lines[1:]]


def explain(fn: Callable, *args: Any, **kwargs: Any) -> Report:
    """Runs ``fn(*args, **kwargs)`` once, in eager mode but captured and rewritten as under the backend, and reports.

    `fn` is a function or a module, not compiled yet. Its forward runs for real, so it has its usual side effects;
    nothing is compiled and no compiled code of yours is touched.
    """
    from . import eager_heads
    from .backend import COUNTERS, compile_graph, counters

    fn = getattr(fn, "_orig_mod", getattr(fn, "_torchdynamo_orig_callable", fn))
    before = dict(counters[COUNTERS])

    settings = replace(config.current(), strict=False)

    def backend(gm: Any, inputs: Any) -> Any:
        return compile_graph(gm, inputs, settings, lambda rewritten, _: rewritten.forward)

    backend.settings_of = lambda kwargs: settings  # type: ignore[attr-defined]

    with record.collect() as graphs, eager_heads.enabled():
        torch.compile(fn, backend=backend)(*args, **kwargs)
    counters[COUNTERS].clear()
    counters[COUNTERS].update(before)
    return of(graphs, getattr(fn, "__qualname__", type(fn).__name__))
