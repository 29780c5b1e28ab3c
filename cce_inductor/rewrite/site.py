"""What became of one loss: the record that `explain`, the counters, the log and the dumps show."""

import re
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from . import vocabulary
from .values import Head, Refusal, example

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def location(node: Node) -> str:
    """``file:line`` of the user's code that recorded a node, or "" where Dynamo kept none."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""


@dataclass(frozen=True)
class Site:
    """One loss over a vocabulary in a compiled graph.

    fused: whether the fused operator computes it. reason: "" if so, else why not. cure: what would make it fuse.
    loss, node, location: the loss as written, its name in the graph, and file:line. at, at_location: the node that is
    the reason, where it is another one. rows, vocab, width: N, V and D as text (symbolic sizes have names).
    logits_bytes: size of the logits in their own dtype, None if a size is symbolic. deferred: graph outputs made lazy.
    kernel: what runs in its place.
    """

    fused: bool
    reason: str
    cure: str
    loss: str
    node: str
    location: str
    at: str = ""
    at_location: str = ""
    rows: str = "?"
    vocab: str = "?"
    width: str = "?"
    logits_bytes: int | None = None
    deferred: int = 0
    kernel: str = ""

    def __str__(self) -> str:
        place = f" at {self.location}" if self.location else ""
        what = f"{self.loss}{place}, {self.rows} rows, {self.vocab} classes"
        if self.fused:
            return f"fused: {what}" + (f"; {self.kernel}" if self.kernel else "")
        fault = f" (%{self.at}{', ' + self.at_location if self.at_location else ''})" if self.at else ""
        cure = f"; to fuse it, {self.cure}" if self.cure else ""
        return f"declined: {what}: {self.reason}{fault}{cure}"


def make(loss: Node, head: Head | None, refusal: Refusal | None, deferred: int = 0, kernel: str = "") -> Site:
    """The record of a loss node."""
    sizes: dict[str, Any] = {}
    if head is not None:
        z = example(head.node)
        rows = z.numel() // head.vocab if head.vocab else 0
        known = all(isinstance(s, int) for s in z.shape)
        sizes = dict(
            rows=str(rows),
            vocab=str(head.vocab),
            width=str(head.width),
            logits_bytes=int(z.numel()) * z.element_size() if known else None,
        )
    at = refusal.node if refusal is not None else None
    return Site(
        fused=refusal is None,
        reason=refusal.reason if refusal else "",
        cure=refusal.cure if refusal else "",
        loss=vocabulary.describe(loss),
        node=loss.name,
        location=location(loss),
        at=at.name if at is not None and at is not loss else "",
        at_location=location(at) if at is not None and at is not loss else "",
        deferred=deferred,
        kernel=kernel,
        **sizes,
    )
