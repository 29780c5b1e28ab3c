"""Did the demo show what it set out to show?  The losses agree, and something was fused.

**How far rounding may part the losses.** In fp32 they differ at once because PyTorch adds the 49152 exponentials
of a row into a few running sums, in which the small ones are partly lost: on this model its loss, eager or
compiled, is 6e-6 of itself below the float64 one, where blockwise sums are 1e-8 off. In bf16 the difference at
once is the rounding of the logits, which the fused loss does without. From then on the weights differ too: Adam
divides a gradient by its own size, which turns rounding in a small gradient into a whole step of that weight,
and a step adds to the differences of all steps before it. So the allowance is relative to the loss and grows
with the steps taken:

    |a - b| <= (first + growth · step) · |a|         step = 0, 1, 2, ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..instruments.training import FUSED, PLAIN
from .run import Run


@dataclass(frozen=True)
class Tolerance:
    """Relative to the loss: what the first step may differ by, and what every further step adds."""

    first: float
    growth: float

    def at(self, step: int) -> float:
        """The relative difference that is allowed in a step, counted from 0."""
        return self.first + self.growth * step


TOLERANCES = {
    "fp32": Tolerance(first=2e-5, growth=1e-5),
    "bf16": Tolerance(first=2e-3, growth=2e-3),
}


def parted(plain: Run, fused: Run) -> list[str]:
    """One sentence for the first step whose losses differ by more than rounding, none if all agree."""
    tolerance = TOLERANCES[plain.spec.dtype]
    for step, (a, b) in enumerate(zip(plain.losses, fused.losses, strict=True)):
        if not (math.isfinite(a) and math.isfinite(b)):
            return [f"the loss of step {step} is not finite: {a} and {b}"]
        if abs(a - b) > tolerance.at(step) * abs(a):
            return [
                f"the losses part by more than rounding: step {step} gives {a:.7f} and {b:.7f}, which differ by "
                f"{abs(a - b) / abs(a):.1e} of the loss where {plain.spec.dtype} allows {tolerance.at(step):.1e}"
            ]
    return []


def problems(plain: Run, fused: Run) -> list[str]:
    """Every reason, as a sentence, why this run does not show what the demo claims."""
    found = []
    if not fused.counters.get("fused"):
        found.append(f"{FUSED} fused nothing: `python -m cce_inductor explain` and CCE_INDUCTOR_DUMP_DIR say why")
    if plain.counters:
        found.append(f"{PLAIN} ran with cce_inductor in it: {plain.counters}")
    return found + parted(plain, fused)
