"""How cost grows: over N and over V at a fixed D."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from . import plots, report
from .cases import Case, Shape
from .docs import Section
from .rounds import Options, Result, run_case

OVER_N: tuple[Shape, ...] = tuple((n, 512, 32768) for n in (256, 512, 1024, 2048, 4096))
OVER_V: tuple[Shape, ...] = tuple((512, 512, v) for v in (8192, 16384, 32768, 65536, 131072, 262144))
QUICK_N: tuple[Shape, ...] = tuple((n, 64, 4096) for n in (32, 64))
QUICK_V: tuple[Shape, ...] = tuple((32, 64, v) for v in (4096, 8192))


def run(options: Options, dtype: str, quick: bool) -> Section:
    """Both sweeps, in a dtype mode, of time and memory alone: this is about growth."""
    options = replace(options, error=False, gemm=False)

    def over(shapes: tuple[Shape, ...]) -> list[Result]:
        return [run_case(Case(*shape, dtype=dtype), options) for shape in shapes]

    return conclude(over(QUICK_N if quick else OVER_N), over(QUICK_V if quick else OVER_V), options.output)


def conclude(over_n: list[Result], over_v: list[Result], output: Path) -> Section:
    """Both sweeps as a section, with a picture."""
    picture = output / "sweep.png"
    plots.sweeps(
        [("N", lambda result: result.case.n, over_n), ("V", lambda result: result.case.v, over_v)],
        picture,
    )
    dtype = over_n[0].case.dtype
    text = "\n\n".join(
        [
            f"Loss and gradients, {dtype}; median (least-most), and the peak above inputs and gradients.",
            f"### Over N\n\n{report.sweep_table(over_n)}",
            f"### Over V\n\n{report.sweep_table(over_v)}",
        ]
    )
    data = {"over_n": [r.summary() for r in over_n], "over_v": [r.summary() for r in over_v]}
    return Section("sweep", text, data, picture)
