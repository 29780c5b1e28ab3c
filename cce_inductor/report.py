"""`explain`: what the pass would do to a function, without compiling it."""

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
    workspace_mb: int = 0

    def __str__(self) -> str:
        fused = sum(site.fused for site in self.sites)
        lines = [
            f"{self.graphs} graph(s), {len(self.sites)} loss(es) over a vocabulary: {fused} fused, "
            f"{len(self.sites) - fused} declined; {self.deferred} output(s) deferred"
        ]
        for site in self.sites:
            lines.append(f"- {site}")
            if site.fused and site.logits_bytes is not None:
                lines.append(f"  logits of {site.logits_bytes / 2**20:.1f} MiB are not held; {self._scratch(site)}")
            if site.fused:
                lines.append(f"  grad_filter: {site.filter}; {_bound(site)}")
                lines += [f"  gathered: {diagnostics.sentence(numbers)}" for numbers in diagnostics.of_site(site.name)]
        if not self.sites:
            lines.append("No cross_entropy or nll_loss was captured: are the head and the loss in one compiled region?")
        return "\n".join(lines)

    def _scratch(self, site: Site) -> str:
        rows, width = int(site.rows), int(site.width)
        return (
            f"scratch: workspace_mb={self.workspace_mb}, and for 16-bit types {rows * width * 4 / 2**20:.1f} MiB to "
            "accumulate the hidden gradient in fp32"
        )


def _bound(site: Site) -> str:
    if site.bound_bytes == 0:
        return "no bound is kept"
    size = f"⌈{site.rows}/{BLOCK}⌉·{site.vocab} bytes"
    mib = "" if site.bound_bytes is None else f", {site.bound_bytes / 2**20:.1f} MiB,"
    return f"a bound of {size}{mib} is kept from the forward to the backward"


def of(graphs: list[record.GraphRecord]) -> Report:
    """The report over some compiled graphs."""
    return Report(
        [site for graph in graphs for site in graph.sites],
        len(graphs),
        sum(graph.deferred for graph in graphs),
        config.current().workspace_mb,
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
