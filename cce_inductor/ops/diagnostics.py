"""What a gradient filter did: numbers that every filtered backward can leave, for a training loop to log.

The backward operator gives them as one more result: "diagnostics" at the end of `needs`, a (5,) fp32 tensor on the
input's device, in the order of `NAMES`. They are defined here, for one backward over its active rows, with p the
softmax, t a row's own target, g_i the tangent of its log-sum-exp, and blocks of 128 active rows:

* kept: share of the columns that are computed, on average over the blocks; a sampled column counts. Under eps: share
  of the tiles.
* full: share of the blocks of which nothing was left out: those that the check of every row did in full, too.
* dropped: sum_i |g_i| lost_i / sum_i |g_i| (1 - p_t,i), where lost_i, the mass of what row i lost, is (1 - p_t,i) less
  the mass of the other columns that were kept; it is exact, not the bound. Under "unbiased" the columns of weight 1 are
  the kept ones: it is the share that was left to sampling.
* worst: the largest lost_i / (1 - p_t,i) of a row with g_i != 0; how far the row's log-sum-exp is known is subtracted
  from lost_i first, as for the check of every row (bound.py), so that rows without a gradient of their own do not lead.
* blocks: how many there were. Without any the other numbers are 0.

Where the log-sum-exp has no tangent nothing is left out: 1, 1, 0, 0, blocks.

How they reach the user: the operand "diagnostics", a slot of (5,) fp32 zeros, has them as its gradient. A gradient is
what autograd, AOTAutograd, activation checkpoints and CUDA graphs carry already; nothing is mutated inside a graph and
nothing waits for the device. When autograd accumulates it into the slot, a hook adds it to the site's `Meter`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .bound import BLOCK, blocks

NAMES = ("kept", "full", "dropped", "worst", "blocks")
OPERAND = "diagnostics"


def of_exact(rows: int, device: torch.device) -> Tensor:
    """The numbers of a backward over so many active rows that leaves nothing out."""
    number = blocks(rows)
    return torch.tensor([bool(number), bool(number), 0, 0, number], dtype=torch.float32, device=device)


@dataclass
class Meter:
    """The numbers of one site, added up on its device until somebody reads them.

    totals (6,) fp64: kept, full and dropped times blocks; the largest worst; blocks; backwards.
    """

    site: str
    filter: str
    totals: Tensor = field(default_factory=lambda: torch.zeros(len(NAMES) + 1, dtype=torch.float64))

    def slot(self) -> torch.nn.Parameter:
        """What one call of the operators is given as its operand. A call needs its own: gradients are added up."""
        slot = torch.nn.Parameter(torch.zeros(len(NAMES), dtype=torch.float32, device=self.totals.device))
        slot.register_post_accumulate_grad_hook(self._add)
        return slot

    @torch.no_grad()
    def _add(self, slot: Tensor) -> None:
        assert slot.grad is not None
        values, slot.grad = slot.grad.double(), None
        number = values[4]
        self.totals[:3] += values[:3] * number
        self.totals[3] = torch.maximum(self.totals[3], values[3])
        self.totals[4] += number
        self.totals[5] += 1

    def read(self) -> dict[str, Any] | None:
        """Averages over the blocks of all backwards; None before the first. Waits for the device."""
        *sums, worst, number, backwards = self.totals.tolist()
        if not backwards:
            return None
        shares = (total / number if number else 0.0 for total in sums)
        named = dict(zip(NAMES, (*shares, worst, int(number)), strict=True))
        return {"site": self.site, "filter": self.filter, **named, "backwards": int(backwards)}


_meters: dict[tuple[str, str, torch.device], Meter] = {}


def meter(site: str, filter: str, device: torch.device) -> Meter:
    """The meter of a site: the same for every graph that has the site, as when shapes make torch.compile do it anew."""
    key = site, filter, device
    if key not in _meters:
        _meters[key] = Meter(site, filter, torch.zeros(len(NAMES) + 1, dtype=torch.float64, device=device))
    return _meters[key]


def diagnostics(*, reset: bool = False) -> list[dict[str, Any]]:
    """What the gradient filters did since the last reset: a dict for every site that ran a backward. Needs the knob
    ``diagnostics``, and a ``grad_filter`` that leaves something out.

    Each has "site", "filter", "kept", "full" and "dropped" (shares, averaged over the blocks of 128 rows of all its
    backwards), "worst" (the largest share that a row has lost of its own gradient), "blocks" and "backwards" (counts);
    the numbers are defined in cce_inductor/ops/diagnostics.py. Reading them waits for the device, gathering them does
    not: call it when you log. They arrive when `backward()` accumulates gradients; `torch.autograd.grad` leaves none.

    Args:
        reset: start anew after this.
    """
    found = [numbers for one in _meters.values() if (numbers := one.read()) is not None]
    if reset:
        for one in _meters.values():
            one.totals.zero_()
    return found


def of_site(site: str) -> list[dict[str, Any]]:
    """The numbers gathered for one site, on every device and by every filter."""
    return [numbers for numbers in diagnostics() if numbers["site"] == site]


def sentence(numbers: dict[str, Any]) -> str:
    """The numbers of a site for people."""
    unit = "tiles" if numbers["filter"].startswith("eps") else "columns"
    left = "left to sampling" if numbers["filter"].startswith("unbiased") else "dropped"
    return (
        f"{numbers['filter']}: {numbers['kept']:.1%} of the {unit} computed, {numbers['full']:.1%} of the blocks in "
        f"full, {numbers['dropped']:.2e} of the gradient's mass {left}, {numbers['worst']:.2e} in the worst row "
        f"({numbers['backwards']} backward(s), {numbers['blocks']} blocks of {BLOCK} rows)"
    )
