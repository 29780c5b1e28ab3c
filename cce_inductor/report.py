"""`explain`: what the pass would do to a function, without compiling it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import config, record
from .ops import diagnostics
from .ops.bound import BLOCK
from .rewrite.site import Site as Site


@dataclass(frozen=True)
class Report:
    """What became of every loss over a vocabulary. ``print(report)`` is for people, `sites` for programs."""

    sites: list[Site] = field(default_factory=list)
    graphs: int = 0
    deferred: int = 0

    def __str__(self) -> str:
        fused = sum(site.fused for site in self.sites)
        lines = [
            f"{self.graphs} graph(s), {len(self.sites)} loss(es) over a vocabulary: {fused} fused, "
            f"{len(self.sites) - fused} declined; {self.deferred} output(s) deferred"
        ]
        if not self.sites:
            later = "Logits were deferred; no loss over them was captured: one that comes later has its own record."
            nothing = "No loss over a vocabulary was captured: are the head and the loss in one compiled region?"
            lines.append(later if self.deferred else nothing)
            return "\n".join(lines)
        lines += ["", *_table([COLUMNS, *(_row(i, site) for i, site in enumerate(self.sites, 1))])]
        for i, site in enumerate(self.sites, 1):
            lines += ["", f"{i}. {_line(site.location, site.source) or site.loss}"]
            lines += [f"   {text}" for text in (self._cost(site) if site.fused else _fault(site))]
        return "\n".join(lines)

    def _cost(self, site: Site) -> list[str]:
        """What a fused site takes instead of its logits."""
        scratch = f"scratch: workspace_mb={site.workspace_mb}"
        if site.logits_bytes is not None:
            accumulator = int(site.rows) * int(site.width) * 4
            scratch += f", and for 16-bit types {_mib(accumulator)} to accumulate the hidden gradient in fp32"
        gathered = [f"gathered: {diagnostics.sentence(numbers)}" for numbers in diagnostics.of_site(site.name)]
        return [scratch, f"grad_filter: {site.filter}; {_bound(site)}", *gathered]


COLUMNS = ("#", "place", "loss", "N × V", "D", "logits", "")


def _row(number: int, site: Site) -> tuple[str, ...]:
    """A site as a row of the table. Logits are those of one tensor in the dtype that the head computes in."""
    size = "" if site.logits_bytes is None else f"{_mib(site.logits_bytes)} "
    logits = "" if site.vocab == "?" else size + ("saved" if site.fused else "held")
    became = f"fused: {site.kernel}" if site.kernel else "fused" if site.fused else f"declined: {site.reason}"
    loss = site.loss.rpartition(".")[2]
    place = _short(site.location)
    return str(number), place, loss, f"{site.rows} × {site.vocab}", site.width, logits, became


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rule = "  ".join("-" * width for width in widths[:-1])
    return [lines[0], rule, *lines[1:]]


def _fault(site: Site) -> list[str]:
    """Where the reason of a declined site is, and what would make it fuse."""
    lines = []
    if site.at:
        lines.append(
            f"because of %{site.at}" + (f" in {at}" if (at := _line(site.at_location, site.at_source)) else "")
        )
    if site.cure:
        lines.append(f"to fuse it, {site.cure}")
    return lines


def _short(location: str) -> str:
    """``file:line``, from the current folder on where the file is below it."""
    here = os.path.join(os.getcwd(), "")
    return location.removeprefix(here)


def _line(location: str, source: str) -> str:
    """A line of the user's code with its place: ``train.py:41: loss = F.cross_entropy(z, t)``."""
    return ": ".join(text for text in (_short(location), source) if text)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _bound(site: Site) -> str:
    if site.bound_bytes == 0:
        return "no bound is kept"
    columns = site.vocab if site.bound_group == 1 else f"⌈{site.vocab}/{site.bound_group}⌉"
    size = f"⌈{site.rows}/{BLOCK}⌉·{columns} bytes"
    mib = "" if site.bound_bytes is None else f", {_mib(site.bound_bytes)},"
    return f"a bound of {size}{mib} is kept from the forward to the backward"


def of(graphs: list[record.GraphRecord]) -> Report:
    """The report over some compiled graphs."""
    return Report(
        [site for graph in graphs for site in graph.sites],
        len(graphs),
        sum(graph.deferred for graph in graphs),
    )


def explain(fn: Callable, *args: Any, **kwargs: Any) -> Report:
    """Runs ``fn(*args, **kwargs)`` once, in eager mode but captured and rewritten as under the backend, and reports.

    `fn` is a function or a module, not compiled yet. Its forward runs for real, so it has its usual side effects;
    nothing is compiled and no compiled code of yours is touched.
    """
    from .backend import COUNTERS, compile_graph, counters

    fn = getattr(fn, "_orig_mod", getattr(fn, "_torchdynamo_orig_callable", fn))
    before = dict(counters[COUNTERS])

    settings = replace(config.current(), strict=False)

    def backend(gm: Any, inputs: Any) -> Any:
        return compile_graph(gm, inputs, settings, lambda rewritten, _: rewritten.forward)

    with record.collect() as graphs:
        torch.compile(fn, backend=backend)(*args, **kwargs)
    counters[COUNTERS].clear()
    counters[COUNTERS].update(before)
    return of(graphs)
