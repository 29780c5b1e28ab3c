"""What a report says of losses, in words: the printed report and the page have the same."""

from collections.abc import Sequence

from ..ops import diagnostics
from ..ops.bound import BLOCK
from ..rewrite.site import Site
from .places import short

COLUMNS = ("#", "place", "loss", "N × V", "D", "logits", "")


def headline(graphs: int, sites: Sequence[Site], deferred: int) -> str:
    """How many graphs and losses there were, and what became of them."""
    fused = sum(site.fused for site in sites)
    return (
        f"{graphs} graph(s), {len(sites)} loss(es) over a vocabulary: {fused} fused, "
        f"{len(sites) - fused} declined; {deferred} output(s) deferred"
    )


def nothing(deferred: int) -> str:
    """What there is to say where no loss was found."""
    if deferred:
        return "Logits were deferred; no loss over them was captured: one that comes later has its own record."
    return "No loss over a vocabulary was captured: are the head and the loss in one compiled region?"


def row(number: int, site: Site) -> tuple[str, ...]:
    """A site under `COLUMNS`. Logits are those of one tensor in the dtype that the head computes in."""
    size = "" if site.logits_bytes is None else f"{mib(site.logits_bytes)} "
    logits = "" if site.vocab == "?" else size + ("saved" if site.fused else "held")
    became = f"fused: {site.kernel}" if site.kernel else "fused" if site.fused else f"declined: {site.reason}"
    loss = site.loss.rpartition(".")[2]
    return str(number), short(site.location), loss, f"{site.rows} × {site.vocab}", site.width, logits, became


def cost(site: Site) -> list[str]:
    """What a fused site takes instead of its logits."""
    scratch = f"scratch: workspace_mb={site.scratch}"
    if site.logits_bytes is not None:
        scratch += f", and for 16-bit types {mib(accumulator(site))} to accumulate the hidden gradient in fp32"
    gathered = [f"gathered: {diagnostics.sentence(numbers)}" for numbers in diagnostics.of_site(site.name)]
    return [scratch, f"grad_filter: {site.filter}; {_bound(site)}", *gathered]


def fault(site: Site) -> list[str]:
    """Where the reason of a declined site is, and what would make it fuse."""
    lines = []
    if site.at:
        lines.append(f"because of %{site.at}" + (f" in {at}" if (at := line(site.at_location, site.at_source)) else ""))
    if site.cure:
        lines.append(f"to fuse it, {site.cure}")
    return lines


def line(location: str, source: str) -> str:
    """A line of the user's code with its place: ``train.py:41: loss = F.cross_entropy(z, t)``."""
    return ": ".join(text for text in (short(location), source) if text)


def accumulator(site: Site) -> int:
    """Bytes of the hidden gradient in fp32, which the backward accumulates where the types have 16 bits."""
    return int(site.rows) * int(site.width) * 4


def mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _bound(site: Site) -> str:
    if site.bound_bytes == 0:
        return "no bound is kept"
    columns = site.vocab if site.bound_group == 1 else f"⌈{site.vocab}/{site.bound_group}⌉"
    size = f"⌈{site.rows}/{BLOCK}⌉·{columns} bytes"
    known = "" if site.bound_bytes is None else f", {mib(site.bound_bytes)},"
    return f"a bound of {size}{known} is kept from the forward to the backward"
