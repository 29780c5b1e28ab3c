"""Writes the page: what the template is given, made of the records of graphs."""

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2  # torch requires it, for its own templates
import torch

from .. import version
from ..rewrite.reads import RETURNED
from ..rewrite.site import Site
from . import sides, words
from .graphs import GraphRecord, Line, Pair, shown
from .highlight import highlight
from .places import short

LARGEST = 3  # so many of the largest tensors are of interest in a graph without a loss


@dataclass(frozen=True)
class Bar:
    """An amount of memory as a bar. kind: "held" or "saved", of logits; "ours", of what is there in their place."""

    label: str
    bytes: int
    kind: str


@dataclass(frozen=True)
class Loss:
    """A site for the page: its number there, and its memory as bars."""

    number: int
    site: Site

    @property
    def cells(self) -> tuple[str, ...]:
        return words.row(self.number, self.site)

    @property
    def bars(self) -> list[Bar]:
        """One tensor of logits, and what the fused operator takes at most in its place."""
        site = self.site
        if site.logits_bytes is None or site.vocab == "?":
            return []
        if not site.fused:
            return [Bar("one tensor of logits, held", site.logits_bytes, "held")]
        made = [
            Bar("one tensor of logits, never written", site.logits_bytes, "saved"),
            Bar("scratch, at most", min(site.workspace_mb << 20, site.logits_bytes), "ours"),
        ]
        if site.logits_bytes == 2 * int(site.rows) * int(site.vocab):
            made.append(Bar("hidden gradient in fp32, for 16-bit types", words.accumulator(site), "ours"))
        if site.bound_bytes:
            made.append(Bar("bound of the gradient filter", site.bound_bytes, "ours"))
        return made


class Drawing:
    """A graph before and after for the page. key: begins the ids of its nodes. losses: those of the whole graph."""

    def __init__(self, key: str, pair: Pair, losses: Sequence[Loss]) -> None:
        self.key, self.name, self.losses = key, pair.name, losses
        self.before, self.after = pair.before, pair.after
        found = sides.rows(pair)
        self.changed = not all(row.same for row in found)
        self.badges = self._badges()
        self.stretches = sides.folded(found, set(self.badges) | self._largest())
        self.most = max((line.bytes or 0 for line in (*pair.before, *pair.after)), default=0)
        self._own = {  # nodes of the right side with an id of their own: where nothing is rewritten the left one serves
            cell.line.name for part in self.stretches if not part.folded for row in part.rows for cell in row.right
        }
        self._places: dict[str, str] = {}

    def _badges(self) -> dict[str, list[tuple[str, str]]]:
        """Words beside nodes of the left side, with a class for their colour."""
        found: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for loss in self.losses:
            site = loss.site
            found[site.node].append((f"loss {loss.number}", "fused" if site.fused else "declined"))
            if site.at:
                found[site.at].append((f"why loss {loss.number} is declined", "declined"))
            for read in site.reads:
                if read.node not in (site.node, site.at) and ("reads the logits", "reads") not in found[read.node]:
                    found[read.node].append((RETURNED if read.what == RETURNED else "reads the logits", "reads"))
        return {line.name: found[line.name] for line in self.before if line.name in found}

    def _largest(self) -> set[str]:
        if self.losses:
            return set()
        made = [line for line in self.before if line.kind == "" and line.bytes]
        return {line.name for line in sorted(made, key=lambda line: line.bytes or 0)[-LARGEST:]}

    @property
    def nodes(self) -> int:
        return len(self.before)

    def bars(self) -> list[Bar]:
        """The results of nodes that take as much as the logits of a loss, or more: all, and those that are left."""
        sizes = [loss.site.logits_bytes for loss in self.losses if loss.site.logits_bytes]
        if not sizes or not self.changed:
            return []
        kept = {line.name for line in self.after}
        large = [line for line in self.before if line.kind != "input" and (line.bytes or 0) >= min(sizes)]
        left = [line for line in large if line.name in kept]
        return [
            Bar(f"{label}: {len(some)} tensor(s)", sum(line.bytes or 0 for line in some), "held")
            for label, some in (("before", large), ("after", left))
        ]

    def anchor(self, side: str, name: str) -> str:
        """The id of a node."""
        return f"{self.key}-{side if side == 'before' or name in self._own else 'before'}-{name}"

    def is_new_place(self, side: str, line: Line) -> bool:
        """Whether a line of code is another one than that of the node above on this side; asked once, in order."""
        before, self._places[side] = self._places.get(side), line.location
        return bool(line.location) and before != line.location

    def share(self, line: Line) -> float:
        """What a node takes, as a percentage of the largest."""
        return 100 * (line.bytes or 0) / self.most if self.most else 0


@dataclass(frozen=True)
class Graph:
    """A compiled graph for the page."""

    record: GraphRecord
    drawings: list[Drawing]
    losses: list[Loss]


def render(records: Sequence[GraphRecord], title: str = "") -> str:
    """The whole page, self-contained. title: what was compiled."""
    numbers = iter(range(1, 1 + sum(len(record.sites) for record in records)))
    graphs = []
    for record in records:
        losses = [Loss(next(numbers), site) for site in record.sites]
        drawings = [Drawing(f"g{record.number}-{i}", pair, losses) for i, pair in enumerate(record.pairs)]
        graphs.append(Graph(record, drawings, losses))
    every = [loss for graph in graphs for loss in graph.losses]
    sites, deferred = [loss.site for loss in every], sum(record.deferred for record in records)
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            title=title,
            headline=words.headline(len(records), sites, deferred),
            nothing="" if sites else words.nothing(deferred),
            graphs=graphs,
            losses=every,
            columns=words.COLUMNS,
            torch=torch.__version__,
        )
    )


@functools.cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(version.templates_dir() / "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {"short": short, "shown": shown, "mib": words.mib, "code": highlight, "share": _share}
    made.globals |= {"cost": words.cost, "fault": words.fault}
    return made


def _share(bar: Bar, bars: Iterable[Bar]) -> Any:
    """A bar's length as a percentage of the longest."""
    most = max(other.bytes for other in bars)
    return 100 * bar.bytes / most if most else 0
