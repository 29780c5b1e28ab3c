"""The runs as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cce_inductor.bench import report

from . import caps
from .errors import QUANTILES
from .paired import Gap, gap, spread
from .pretrain import GROUPS
from .specs import EXACT

Run = Mapping[str, Any]
LAST = 5  # evaluations, or steps of fine-tuning, whose mean is a run's final loss
KNOWN = 0.1  # a loss below which the texts are known by heart


def by_mode(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Runs by mode and seed, in the order they come in."""
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        found.setdefault(run["spec"]["mode"], {})[run["spec"]["seed"]] = run
    return found


def values(runs: Mapping[int, Run], value: Callable[[Run], float]) -> dict[int, float]:
    """A number of each run, by seed."""
    return {seed: value(run) for seed, run in runs.items()}


def final(run: Run) -> float:
    """The held-out loss of a pretraining run: the mean of its last evaluations."""
    return _mean([loss for _, loss in run["curve"][-LAST:]])


def final_training(run: Run) -> float:
    """The mean training loss over the last quarter of the steps."""
    losses = run["training loss"]
    return _mean(losses[-max(len(losses) // 4, 1) :])


def learned(run: Run) -> float:
    """The loss of a fine-tuning run in the end."""
    return _mean(run["losses"][-LAST:])


def steps_needed(run: Run) -> float:
    """Steps until the loss is below KNOWN; infinite if it never is."""
    return next((step for step, loss in enumerate(run["losses"]) if loss < KNOWN), math.inf)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _gap(found: Gap | None, digits: int = 4) -> str:
    if found is None:
        return ""
    if math.isnan(found.half):
        return f"{found.mean:+.{digits}f}"
    return f"{found.mean:+.{digits}f} ± {found.half:.{digits}f}{' *' if found.excludes_zero else ''}"


def _spread(numbers: Mapping[int, float], digits: int = 4) -> str:
    mean, deviation = spread(numbers)
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ({deviation:.{digits}f})")


def pretraining(runs: Sequence[Run]) -> str:
    """Losses by mode, and their gaps to exact."""
    modes = by_mode(runs)
    head = ["gradient of the head", "seeds", "held-out loss", "gap to exact", "curve", "training loss", "gap to exact"]
    rows = []
    for mode, seeds in modes.items():
        cells = [mode, str(len(seeds))]
        for value in (final, final_training):
            mine, base = values(seeds, value), values(modes.get(EXACT, {}), value)
            cells += [_spread(mine), "" if mode == EXACT else _gap(gap(mine, base))]
            if value is final:
                cells.append("" if mode == EXACT else outside(seeds, modes.get(EXACT, {})))
        rows.append(cells)
    return report.markdown(head, rows)


def outside(mine: Mapping[int, Run], base: Mapping[int, Run]) -> str:
    """At how many evaluations, of how many, the interval of the gap leaves out 0."""
    count = len(next(iter(mine.values()))["curve"])
    gaps = [gap(*(values(runs, lambda run, i=i: run["curve"][i][1]) for runs in (mine, base))) for i in range(count)]  # type: ignore[misc]
    return f"{sum(found is not None and found.excludes_zero for found in gaps)}/{count}"


def _ratio(found: float) -> str:
    return f"{found:.2f}" if found < 100 else f"{found:,.0f}"


def words(runs: Sequence[Run]) -> str:
    """What became of words that are never a target, and of the rows of dW: relative to exact, by seed."""
    modes = by_mode(runs)
    moments = any(run["second moments"] for run in runs)
    head = ["gradient of the head", "rows of dW exactly 0, %", "never seen: log p", "never seen: their probability, %"]
    head += ["rare: log p", "frequent: log p"]
    if moments:
        head += [f"second moment, {group}" for group in GROUPS]
    rows = []
    for mode, seeds in modes.items():
        zero = _mean([100 * _mean(run["zero rows"]) for run in seeds.values()])
        cells = [mode, f"{zero:.1f}"]

        def compare(group: str, key: str, scale: float = 1.0, seeds: Any = seeds, mode: str = mode) -> str:
            mine, base = (
                {s: scale * run["logits"][group][key] for s, run in of.items()} for of in (seeds, modes.get(EXACT, {}))
            )
            return _spread(mine, 3) if mode == EXACT else _gap(gap(mine, base), 3)

        cells += [compare("never", "log p"), compare("never", "p", 100.0), compare("rare", "log p")]
        cells += [compare("frequent", "log p")]
        if moments:
            for group in GROUPS:
                mine = values(seeds, lambda run, group=group: run["second moments"][group])  # type: ignore[misc]
                base = values(modes.get(EXACT, {}), lambda run, group=group: run["second moments"][group])  # type: ignore[misc]
                ratios = [mine[seed] / base[seed] for seed in mine.keys() & base.keys()]
                cells.append(f"{_mean(list(mine.values())):.1e}" if mode == EXACT else _ratio(_mean(ratios)))
        rows.append(cells)
    return report.markdown(head, rows)


def finetuning(runs: Sequence[Run]) -> str:
    """Steps needed and losses by mode, and their gaps to exact."""
    modes = by_mode(runs)
    head = ["gradient of the head", "seeds", f"steps to a loss < {KNOWN}", "final loss", "gap to exact"]
    head += ["loss on other texts", "gap to exact"]
    rows = []
    for mode, seeds in modes.items():
        needed = ", ".join("never" if math.isinf(n) else f"{n:.0f}" for n in values(seeds, steps_needed).values())
        cells = [mode, str(len(seeds)), needed]
        for value in (learned, lambda run: run["others"]):
            mine, base = values(seeds, value), values(modes.get(EXACT, {}), value)
            cells += [_spread(mine), "" if mode == EXACT else _gap(gap(mine, base))]
        rows.append(cells)
    return report.markdown(head, rows)


def errors(found: Mapping[str, Any]) -> str:
    """What errors.measure found, by mode."""
    head = ["gradient of the head", "error of dx", "error of dW"]
    head += [f"rows of dW: {'median' if q == 0.5 else f'{q:.0%} quantile'}" for q in QUANTILES]
    head += ["rows of dW exactly 0, %"]
    rows = [
        [mode, f"{e['dx']:.1e}", f"{e['dW']:.1e}", *(f"{q:.1e}" for q in e["rows"]), f"{100 * e['zero']:.1f}"]
        for mode, e in found.items()
    ]
    return report.markdown(head, rows)


def row_caps(before: Sequence[Mapping[str, float]], runs: Sequence[Run]) -> str:
    """Blocks by how confident their rows are: before training, and while texts are learned by heart."""
    looks: dict[str, list] = {"before": list(before)}
    for run in runs:
        for step, blocks in run["blocks"]:
            loss = run["losses"][step]
            name = next(text for text, most in PHASES if loss < most)
            looks.setdefault(name, []).extend(blocks)
    head = ["loss", "blocks", "median 1 - p", "kept, %", "worst row, τ", "median row, τ"]
    for cap in caps.CAPS[:-1]:
        head += [f"full at {cap} τ, %", f"computed at {cap} τ, %"]
    rows = []
    for name in ["before", *(text for text, _ in PHASES)]:
        blocks = looks.get(name)
        if not blocks:
            continue
        cells = [name, str(len(blocks)), f"{_mean([b['confidence'] for b in blocks]):.1e}"]
        cells += [f"{100 * _mean([b['kept'] for b in blocks]):.1f}", f"{max(b['worst'] for b in blocks):.0f}"]
        cells += [f"{_mean([b['middle'] for b in blocks]):.2f}"]
        for cap in caps.CAPS[:-1]:
            cells += [f"{100 * share:.1f}" for share in caps.under(blocks, cap)]
        rows.append(cells)
    return report.markdown(head, rows)


PHASES = (("below 0.01", 0.01), ("0.01 to 0.1", 0.1), ("0.1 to 1", 1.0), ("above 1", math.inf))
