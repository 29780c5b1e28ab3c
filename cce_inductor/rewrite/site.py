"""What became of one loss: the record that `explain`, the counters, the log and the dumps show."""

import os
import re
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..filters import Filter
from ..graph import nodes
from ..graph.fakes import example, fake
from ..graph.refusal import Refusal
from ..ops import bound
from ..ops.workspace import said, workspace
from ..trace.values import Head, SeveralHeads
from .reads import Read

EXACT = Filter()
BOUNDED = ("budget", "unbiased")  # kinds of filter that go by a bound
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+).*(?:\n +(?P<source>(?! *File ).*\S))?')


def name(loss: Node) -> str:
    """What a loss is called: where it stands in the user's code."""
    place = location(loss)
    return nodes.describe(loss) + (f" at {place}" if place else "")


def _frame(node: Node) -> tuple[str, str, str]:
    """File, line and text of the innermost of the calls that recorded a node, outside of PyTorch if one is."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    return (own or frames or [("", "", "")])[-1]


def location(node: Node) -> str:
    """``file:line`` of the user's code that recorded a node, or "" where Dynamo kept none."""
    file, line, _ = _frame(node)
    return f"{file}:{line}" if file else ""


def source(node: Node) -> str:
    """The text of that line, or "" where it is not known."""
    return _frame(node)[2]


@dataclass(frozen=True)
class Site:
    """One loss over a vocabulary in a compiled graph.

    fused: whether the fused operator computes it. reason: "" if so, else why not. cure: what would make it fuse.
    loss, node, location: the loss as written, its name in the graph, and file:line. at, at_location: the node that
    is the reason, where it is another one. source, at_source: the text of those lines. rows, vocab, width: N, V and
    D as text (symbolic sizes have names). logits_bytes: size of the logits in their own dtype, None if a size is
    symbolic. deferred: graph outputs made lazy. kernel: what runs in its place. name: under which
    `cce_inductor.diagnostics` has its numbers. filter: which columns its backward computes, a `grad_filter` as
    text: "exact" too where the one that is set has no bound for this loss. bound_bytes: what the forward leaves to
    the backward for that, a byte for 128 rows and `bound_group` columns; None if a size is symbolic. workspace_mb: the
    scratch of the operator, as the loss was compiled with. scratch: the same in words. reads: what the logits of its
    head are read for.
    """

    fused: bool
    reason: str
    cure: str
    loss: str
    node: str
    location: str
    at: str = ""
    at_location: str = ""
    source: str = ""
    at_source: str = ""
    rows: str = "?"
    vocab: str = "?"
    width: str = "?"
    logits_bytes: int | None = None
    deferred: int = 0
    kernel: str = ""
    name: str = ""
    filter: str = "exact"
    bound_bytes: int | None = 0
    bound_group: int = 1
    workspace_mb: int = 0
    scratch: str = ""
    reads: tuple[Read, ...] = ()

    def __str__(self) -> str:
        place = f" at {self.location}" if self.location else ""
        what = f"{self.loss}{place}, {self.rows} rows, {self.vocab} classes"
        if self.fused:
            return f"fused: {what}" + (f"; {self.kernel}" if self.kernel else "")
        fault = f" (%{self.at}{', ' + self.at_location if self.at_location else ''})" if self.at else ""
        cure = f"; to fuse it, {self.cure}" if self.cure else ""
        return f"declined: {what}: {self.reason}{fault}{cure}"


def _read_by(loss: Node) -> tuple[Tensor | None, Any]:
    """The logits that a loss over classes reads, and how many classes they have, where no head was found."""
    op = nodes.read(loss)
    node = op.args.get("input") if op is not None else None
    z = example(node) if isinstance(node, Node) else None
    if not isinstance(z, Tensor) or z.dim() == 0:
        return None, 0
    return z, z.shape[1 if z.dim() > 1 else 0]


def make(
    loss: Node,
    head: Head | SeveralHeads | None,
    refusal: Refusal | None,
    deferred: int = 0,
    kernel: str = "",
    name: str = "",
    filter: Filter = EXACT,
    workspace_mb: int | str | None = 0,
) -> Site:
    """The record of a loss node. workspace_mb: the knob."""
    sizes: dict[str, Any] = {}
    scratch = 0
    z, vocab = (fake(head.node), head.vocab) if head is not None else _read_by(loss)
    if z is not None:
        rows = z.numel() // vocab if vocab else 0
        known = all(isinstance(s, int) for s in z.shape)
        sizes = dict(
            rows=str(rows),
            vocab=str(vocab),
            width=str(head.width) if head is not None else "?",
            logits_bytes=int(z.numel()) * z.element_size() if known else None,
        )
        scratch = workspace(workspace_mb, z.device)
        sizes["scratch"] = said(workspace_mb, z.device, sizes["logits_bytes"])
        if head is not None and filter.kind in BOUNDED:
            sizes["bound_group"] = bound.group(rows, head.vocab, scratch, z.device.type)
            fixed = isinstance(rows, int) and isinstance(head.vocab, int)
            sizes["bound_bytes"] = bound.bound_bytes(rows, head.vocab, scratch, z.device.type) if fixed else None
    at = refusal.node if refusal is not None else None
    return Site(
        fused=refusal is None,
        reason=refusal.reason if refusal else "",
        cure=refusal.cure if refusal else "",
        loss=nodes.describe(loss),
        node=loss.name,
        location=location(loss),
        at=at.name if at is not None and at is not loss else "",
        at_location=location(at) if at is not None and at is not loss else "",
        source=source(loss),
        at_source=source(at) if at is not None and at is not loss else "",
        deferred=deferred,
        kernel=kernel,
        name=name,
        filter=str(filter),
        workspace_mb=scratch >> 20,
        **sizes,
    )


def moved(made: Site, stack: Iterable[traceback.FrameSummary]) -> Site:
    """The record of what stands elsewhere than in the graph: where `stack` is, outside of PyTorch if it is."""
    frames = list(stack)
    own = [frame for frame in frames if not frame.filename.startswith(_TORCH)]
    for frame in (own or frames)[-1:]:
        made = replace(made, location=f"{frame.filename}:{frame.lineno}", source=frame.line or "")
    return made
