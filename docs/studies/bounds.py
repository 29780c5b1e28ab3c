"""What the forward keeps for a filtered backward: the size of the bound, by rows and vocabulary."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from cce_inductor import config
from cce_inductor.bench import report
from cce_inductor.bench.docs import Section
from cce_inductor.ops.bound import BLOCK, bound_bytes, group
from cce_inductor.ops.workspace import workspace

ROWS = (1024, 2048, 8192, 32768, 131072)
VOCABULARIES = (32000, 49152, 128256, 262144)


@dataclass(frozen=True)
class Size:
    """bytes of the bound, columns that share one of them, bytes of bf16 logits for comparison."""

    rows: int
    vocab: int
    bytes: int
    group: int
    logits: int


def sizes(workspace: int) -> list[Size]:
    """For each of `ROWS` and `VOCABULARIES`, with a workspace of so many bytes."""
    return [
        Size(n, v, bound_bytes(n, v, workspace), group(n, v, workspace, "cpu"), 2 * n * v)
        for n in ROWS
        for v in VOCABULARIES
    ]


def run() -> Section:
    """The table of the sizes, with the workspace of this process."""
    scratch = workspace(config.current().workspace_mb, torch.device("cpu"))
    found = sizes(scratch)
    text = f"""\
MiB of the bound that a budget and the unbiased filter keep from the forward to the backward: a byte for {BLOCK} rows
and a column. Where that is more than half of workspace_mb={scratch >> 20}, two, four or eight neighbouring
columns share a byte, if N and V are known when the graph is compiled; in brackets, how many do. A bf16 tensor of logits
takes {2 * BLOCK} times the bytes of a bound without groups."""
    lines = [
        [f"N={n}", *(report.mib(s.bytes) + (f" ({s.group})" if s.group > 1 else "") for s in found if s.rows == n)]
        for n in ROWS
    ]
    table = report.markdown(["", *(f"V={v}" for v in VOCABULARIES)], lines)
    return Section("bound", f"{text}\n\n{table}", [asdict(size) for size in found])
