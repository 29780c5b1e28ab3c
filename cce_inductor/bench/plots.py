"""Results as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..demo.memory import MIB
from .measure import Stats
from .rounds import Result


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def bars(panels: Sequence[tuple[str, Sequence[tuple[str, float, float]]]], path: Path, units: tuple[str, str]) -> None:
    """For each panel (title, [(name, time, memory)]) a row of two pictures: time, and memory."""
    plt = pyplot()
    heights = [max(len(entries), 1) * 0.32 + 0.9 for _, entries in panels]
    figure, axes = plt.subplots(
        len(panels),
        2,
        figsize=(12, sum(heights)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    for (title, entries), pair in zip(panels, axes, strict=True):
        names = [name for name, *_ in entries]
        for column, (axis, unit) in enumerate(zip(pair, units, strict=True)):
            colors = ["tab:blue" if name.startswith("ours") else "tab:orange" for name in names]
            drawn = axis.barh(names, [entry[column + 1] for entry in entries], color=colors)
            axis.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=8)
            axis.margins(x=0.15)
            axis.invert_yaxis()
            axis.set_xlabel(unit)
            axis.grid(alpha=0.3, axis="x")
        pair[0].set_title(title, loc="left", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def cases(results: Sequence[Result], path: Path) -> bool:
    """Loss and gradients of every case; False, and no file, if nobody finished any."""
    panels = []
    for result in results:
        entries = [
            (row.contender, 1000 * Stats.of(row.seconds["gradients"]).median, row.memory.get("gradients", 0) / MIB)
            for row in result.rows
            if row.seconds.get("gradients")
        ]
        if entries:
            panels.append((result.case.label, entries))
    if panels:
        bars(panels, path, ("loss + gradients, ms", "peak above inputs and gradients, MiB"))
    return bool(panels)


def sweeps(series: Sequence[tuple[str, Callable[[Result], int], Sequence[Result]]], path: Path) -> None:
    """For each series (name of the size, its value, results): time and memory over that size."""
    plt = pyplot()
    figure, axes = plt.subplots(len(series), 2, figsize=(11, 4.2 * len(series)), squeeze=False, layout="constrained")
    for (size, value, results), (times, peaks) in zip(series, axes, strict=True):
        for name in [row.contender for row in results[0].rows]:
            points = [(value(r), row) for r in results if (row := r.row(name)) and row.seconds.get("gradients")]
            stats = [Stats.of([1000 * s for s in row.seconds["gradients"]]) for _, row in points]
            sizes = [at for at, _ in points]
            (line,) = times.plot(sizes, [s.median for s in stats], marker="o", label=name)
            times.fill_between(
                sizes, [s.least for s in stats], [s.most for s in stats], alpha=0.2, color=line.get_color()
            )
            held = [(at, row.memory["gradients"] / MIB) for at, row in points if "gradients" in row.memory]
            peaks.plot([at for at, _ in held], [max(m, 1.0) for _, m in held], marker="o", label=name)
        case = results[0].case
        fixed = f"D={case.d}, " + (f"V={case.v}" if size == "N" else f"N={case.n}") + f", {case.dtype}"
        times.set(title=f"Loss + gradients over {size} ({fixed})", xlabel=size, ylabel="ms")
        peaks.set(title="Peak above inputs and gradients", xlabel=size, ylabel="MiB")
        for axis in (times, peaks):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.grid(alpha=0.3)
            axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
