"""Losses with factors, margins, several classes a row or two heads: time and memory, beside eager and torch.compile."""

from __future__ import annotations

import math
import statistics
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from . import report
from .docs import Section
from .factored import FACTORED, LOOPS, QUICK, TWO_HEADS, Shape
from .measure import speedup
from .rounds import Options, say

CONTENDERS = ("eager", "compile", "ours")


@dataclass
class Factored:
    """One loss with its gradients: by contender seconds, round by round, and bytes at the peak above all operands."""

    loss: str
    base: str
    shape: Shape
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)


def run(options: Options, quick: bool = False, two_heads: bool = False) -> Section:
    """The contenders of a loss take turns in processes of their own, and with them ours without the factor.

    two_heads: the losses of two heads.
    """
    found = []
    for loss, base, shape in _cases(quick, two_heads):
        say(f"{'two heads' if two_heads else 'factors'}: {loss}")
        made = Factored(loss, base, shape)
        jobs = {name: (name, loss) for name in CONTENDERS} | ({"base": ("ours", base)} if base else {})
        with ExitStack() as stack:
            children = {
                key: stack.enter_context(
                    options.child(
                        "bench.factors_worker", {"contender": name, "loss": own, "shape": shape}, f"factors-{key}"
                    )
                )
                for key, (name, own) in jobs.items()
            }
            # Turns below 0 warm up: a loss in a loop is compiled when it comes for the third time.
            for turn in range(-3 if loss in LOOPS else -1, options.repeat):
                for key, child in children.items():
                    seconds = child.ask("step", 10 * options.timeout)["seconds"]
                    if turn >= 0:
                        made.seconds.setdefault(key, []).append(seconds)
            made.peak = {key: child.ask("peak", 10 * options.timeout)["above"] for key, child in children.items()}
        found.append(made)
    return of_two_heads(found) if two_heads else conclude(found)


def _cases(quick: bool, two_heads: bool) -> list[tuple[str, str, Shape]]:
    losses = TWO_HEADS if two_heads else FACTORED
    listed = [(name, base, shape) for name, (_, base, shape) in losses.items()]
    if not two_heads:
        listed += [(name, "cross_entropy", FACTORED["cross_entropy"][2]) for name in LOOPS]
    if not quick:
        return listed
    wide = [one for one in listed if "D = 576" not in one[0]]  # at one size they are the others once more
    return [(name, base, QUICK) for name, base, _ in wide]


def conclude(found: list[Factored]) -> Section:
    """The measurements as a section."""
    rows = []
    for one in found:
        cells = [f"{report.milliseconds(one.seconds[c])}, {one.peak[c] / 2**20:,.0f}" for c in CONTENDERS]
        times = [_ratio(one.seconds[c], one.seconds["ours"]) for c in ("compile", "base") if c in one.seconds]
        rows.append([one.loss, ", ".join(map(str, one.shape)), *cells, *times, *[""] * (2 - len(times))])
    text = (
        "Loss and gradients, fp32 where nothing else is said: the time in ms with least and most, and the peak above "
        "operands and gradients in MiB. The ratios are medians over the rounds; the last is ours to ours of the same "
        "loss without the factor or margin, or with one class a row, in one graph with its head. A loss in the "
        "training loop is called on the logits that a compiled head returns."
    )
    header = ("loss", "N, D, V", "eager", "compile", "ours", "ours / compile", "ours / without")
    return Section("factors", f"{text}\n\n{report.markdown(header, rows)}", [asdict(one) for one in found])


def of_two_heads(found: list[Factored]) -> Section:
    """The measurements of losses over two heads as a section."""
    rows = []
    for one in found:
        cells = [f"{report.milliseconds(one.seconds[c])}, {one.peak[c] / 2**20:,.0f}" for c in CONTENDERS]
        # Two products forward and the two of the gradients of the first head; EMO has as many, of other shapes.
        flops = 8 * math.prod(one.shape)
        rate = flops / statistics.median(one.seconds["ours"]) / 1e9
        ratio = _ratio(one.seconds["compile"], one.seconds["ours"])
        rows.append([one.loss, ", ".join(map(str, one.shape)), *cells, ratio, f"{flops / 1e9:,.0f}", f"{rate:,.0f}"])
    text = (
        "A loss over a head and a frozen one of the same size, with the first one's gradients: the time in ms with "
        "least and most, and the peak above operands and gradients in MiB. GFLOP are those of the products that have "
        "to be computed, 8 NVD, and the rate is ours."
    )
    header = ("loss", "N, D, V", "eager", "compile", "ours", "ours / compile", "GFLOP", "GFLOP/s")
    return Section("two-heads", f"{text}\n\n{report.markdown(header, rows)}", [asdict(one) for one in found])


def _ratio(base: list[float], own: list[float]) -> str:
    return f"{1 / (speedup(base, own) or 1.0):.2f}"
