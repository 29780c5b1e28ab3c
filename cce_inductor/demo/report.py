"""The demo's table and picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..instruments.memory import MIB, envelope
from .check import TOLERANCES
from .launch import PAGE
from .run import Run

CAPTION = """\
Resident set of each process, from the kernel, with an allocator that returns freed memory at once.
"at rest" is read between steps, when only weights, gradients and optimizer state are alive; beyond their
exact size it holds the interpreter, the libraries and the compiled code. The peak of the further steps
above that level is what a step needs besides: activations, and the logits with their gradients."""


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"


def _rows(plain: Run, fused: Run) -> list[tuple[str, str, str]]:
    """A label and one cell for each contender, row by row."""
    rows = [
        (f"loss, step {i}", f"{a:.6f}", f"{b:.6f}")
        for i, (a, b) in enumerate(zip(plain.losses, fused.losses, strict=True))
    ]

    def both(label: str, cell: Callable[[Run], str]) -> None:
        rows.append((label, cell(plain), cell(fused)))

    both("first step, both compiling at once", lambda run: f"{run.seconds[0]:.1f} s")
    both("each further step, median", lambda run: f"{run.seconds_per_step:.2f} s")
    both("weights, gradients, optimizer state", lambda run: _mib(run.state_bytes))
    both("at rest, the process included", lambda run: _mib(run.rest))
    both("peak of the whole run", lambda run: _mib(run.whole_peak))
    both("peak of the further steps", lambda run: _mib(run.peak))
    both("  above the level at rest", lambda run: _mib(run.peak_above))
    both("  that in logits tensors", lambda run: f"{run.peak_above / run.logits_bytes:.2f}")
    both("losses fused", lambda run: str(run.counters.get("fused", 0)))
    both("logits deferred", lambda run: str(run.counters.get("deferred", 0)))
    both("  of these computed after all", lambda run: str(run.counters.get("deferred_materialized", 0)))
    return rows


def table(plain: Run, fused: Run) -> str:
    """Both runs side by side, and the sentences that sum them up."""
    head = ("", plain.spec.contender, fused.spec.contender)
    rows = _rows(plain, fused)
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(3)]
    lines = [f"{label:<{widths[0]}}  {a:>{widths[1]}}  {b:>{widths[2]}}" for label, a, b in [head, *rows]]
    lines.insert(1, "-" * len(lines[0]))

    relative = [abs(a - b) / abs(a) for a, b in zip(plain.losses, fused.losses, strict=True)]
    worst = max(range(len(relative)), key=relative.__getitem__)
    allowed = TOLERANCES[plain.spec.dtype].at(worst)
    difference = abs(plain.losses[worst] - fused.losses[worst])
    saved = plain.peak_above - fused.peak_above
    lines += [
        "",
        f"largest difference of the losses: {difference:.2e} in step {worst}, "
        f"{relative[worst]:.1e} of the loss (rounding: up to {allowed:.1e})",
        f"peak memory saved: {_mib(saved)} = {saved / plain.logits_bytes:.2f} logits tensors "
        f"of {plain.rows} x {plain.vocab} {plain.spec.dtype} ({_mib(plain.logits_bytes)})",
        "",
        CAPTION,
    ]
    return "\n".join(lines)


def in_words(plain: Run, fused: Run, out: Path) -> str:
    """What came out of two runs that agree, and where to look next, for whoever reads nothing else."""
    saved, last = plain.peak_above - fused.peak_above, len(plain.losses) - 1
    lines = [
        f"Both trained alike: the loss of step {last} is {plain.losses[last]:.5f} with {plain.spec.contender} alone "
        f"and {fused.losses[last]:.5f} with {fused.spec.contender}.",
    ]
    if saved > 0:
        lines.append(
            f"A step took {_mib(saved)} less memory, {_mib(fused.peak_above)} instead of {_mib(plain.peak_above)} "
            f"above the level at rest: {saved / plain.logits_bytes:.1f} tensors of logits, each of {plain.rows} x "
            f"{plain.vocab}, were never written."
        )
    else:
        lines.append(f"No memory was saved: a step took {_mib(-saved)} more.")
    pages = ((PAGE, "the model's graph before and after"), ("demo.png", "losses and memory over time"))
    lines += [
        "Look next:",
        *(f"  {out / name}: {what}" for name, what in pages if (out / name).exists()),
        '  torch.compile(model, backend="cce"): the same for a model of yours',
        "  python -m cce_inductor explain --html report.html train.py: what becomes of the losses of your script",
    ]
    return "\n".join(lines)


def plot(plain: Run, fused: Run, path: Path) -> None:
    """Three panels into a PNG: the losses, memory over the whole run, memory over two steps from their start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, whole, steps) = pyplot.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    styles = [(plain, {"color": "tab:orange"}), (fused, {"color": "tab:blue"})]
    begin = min(run.times[0] for run in (plain, fused))
    for run, style in styles:
        points = {"marker": "o", "linestyle": "-"} if run is plain else {"marker": "x", "linestyle": "--"}
        losses.plot(run.losses, label=run.spec.contender, **points, **style)
        times, values = envelope(run.times, run.rss)
        whole.plot([t - begin for t in times], [v / (1024 * MIB) for v in values], label=run.spec.contender, **style)
        _plot_steps(steps, run, style)
    losses.set(title="Loss", xlabel="step", ylabel="loss of the batch")
    whole.set(title="Memory, whole run", xlabel="seconds", ylabel="resident set, GiB")
    losses.xaxis.get_major_locator().set_params(integer=True)
    title = f"Two steps (one logits tensor: {_mib(plain.logits_bytes)})"
    steps.set(title=title, xlabel="seconds", ylabel="resident set above the level at rest, MiB")
    for axes in (losses, whole, steps):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_steps(axes: Any, run: Run, style: dict[str, str]) -> None:
    """The last two steps, one behind the other, above the level at rest in MiB."""
    label, behind = run.spec.contender, 0.0
    for begin, seconds in list(zip(run.starts, run.seconds, strict=True))[1:][-2:]:
        inside = [(t, v) for t, v in zip(run.times, run.rss, strict=True) if begin <= t <= begin + seconds]
        axes.plot(
            [t - begin + behind for t, _ in inside], [(v - run.rest) / MIB for _, v in inside], label=label, **style
        )
        label, behind = "_", behind + seconds  # one of the two in the legend
