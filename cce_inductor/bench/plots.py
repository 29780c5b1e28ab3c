"""Results as pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..instruments.memory import MIB
from .measure import Stats
from .rounds import Result


def load_pyplot() -> Any:
    """matplotlib.pyplot, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def bars(panels: Sequence[tuple[str, Sequence[tuple[str, float, float]]]], path: Path, units: tuple[str, str]) -> None:
    """For each panel (title, [(name, time, memory)]) a row of two pictures: time, and memory."""
    pyplot = load_pyplot()
    heights = [max(len(entries), 1) * 0.32 + 0.9 for _, entries in panels]
    figure, axes = pyplot.subplots(
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
    pyplot.close(figure)


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
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(len(series), 2, figsize=(11, 4.2 * len(series)), squeeze=False, layout="constrained")
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
    pyplot.close(figure)


def tradeoff(panels: Mapping[str, Mapping[str, Sequence[Mapping[str, float | None]]]], path: Path) -> None:
    """For each title the points of every series: errors of dx and dW over the work in NVD and over the time."""
    import matplotlib

    pyplot = load_pyplot()
    costs = {"work": "multiply-adds / NVD, counted", "time": "time / eager's"}
    with matplotlib.rc_context({"svg.hashsalt": "tradeoff"}):  # the same picture for the same points
        figure, axes = pyplot.subplots(
            len(panels), len(costs), figsize=(12, 4.6 * len(panels)), squeeze=False, layout="constrained"
        )
        for (title, series), pair in zip(panels.items(), axes, strict=True):
            for axis, (cost, label) in zip(pair, costs.items(), strict=True):
                for i, (name, points) in enumerate(series.items()):
                    known = [p for p in points if p.get(cost) is not None]
                    for of, fill in (("dx", "full"), ("dW", "none")):
                        at = sorted((p[cost], p[of]) for p in known)
                        axis.plot(
                            [x for x, _ in at],
                            [y for _, y in at],
                            color=f"C{i}",
                            marker="o",
                            fillstyle=fill,
                            linestyle="-" if of == "dx" else "--",
                            label=f"{name}, {of}" if at else None,
                        )
                axis.set(title=title, xlabel=label, ylabel="relative error", yscale="log", xlim=(0, None))
                axis.grid(alpha=0.3)
            pair[0].legend(fontsize=7, ncols=2)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
