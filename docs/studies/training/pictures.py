"""The runs as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cce_inductor.bench.plots import load_pyplot

from .specs import EXACT
from .tables import KNOWN, Run, by_mode


def _mean(curves: Sequence[Sequence[float]]) -> list[float]:
    return [sum(at) / len(at) for at in zip(*curves, strict=True)]


def _panel(axis: Any, steps: Sequence[float], curves: Mapping[str, Mapping[int, Sequence[float]]], gap: bool) -> None:
    """The mean of each mode's curves; or of their gaps to exact's of the same seed, and each seed's, thin."""
    for number, (mode, seeds) in enumerate(curves.items()):
        color = f"C{number}"
        if not gap:
            axis.plot(steps, _mean(list(seeds.values())), color=color, label=mode, lw=1.2)
            continue
        base = curves[EXACT]
        gaps = [[a - b for a, b in zip(c, base[s], strict=True)] for s, c in seeds.items() if s in base]
        if mode == EXACT or not gaps:
            continue
        for one in gaps:
            axis.plot(steps, one, color=color, alpha=0.3, lw=0.8)
        axis.plot(steps, _mean(gaps), color=color, label=mode, lw=1.8)
    axis.set_xlabel("steps")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def curves(panels: Sequence[tuple[str, Sequence[float], Mapping[str, Any]]], path: Path, level: bool = False) -> None:
    """For each panel (title, steps, curves by mode and seed) the curves and their gaps to exact."""
    plt = load_pyplot()
    figure, axes = plt.subplots(len(panels), 2, figsize=(12, 4 * len(panels)), squeeze=False, layout="constrained")
    for (title, steps, found), (left, right) in zip(panels, axes, strict=True):
        _panel(left, steps, found, gap=False)
        _panel(right, steps, found, gap=True)
        left.set_title(title, fontsize=10)
        right.set_title("gap to exact: mean, and each seed", fontsize=10)
        right.axhline(0, color="black", lw=0.8)
        left.set_ylabel("loss")
        if level:
            left.set_yscale("log")
            left.axhline(KNOWN, color="black", lw=0.8, ls=":")
    figure.savefig(path)
    plt.close(figure)


def pretraining(parts: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Held-out losses over the steps, a panel for each optimizer."""
    panels = []
    for name, runs in parts.items():
        steps = [step for step, _ in runs[0]["curve"]]
        found = {
            mode: {seed: [loss for _, loss in run["curve"]] for seed, run in seeds.items()}
            for mode, seeds in by_mode(runs).items()
        }
        panels.append((f"held-out loss, {name}", steps, found))
    curves(panels, path)


def finetuning(runs: Sequence[Run], path: Path) -> None:
    """Losses of the texts over the steps."""
    found = {mode: {s: run["losses"] for s, run in seeds.items()} for mode, seeds in by_mode(runs).items()}
    curves([("loss of the texts learned", range(len(runs[0]["losses"])), found)], path, level=True)
