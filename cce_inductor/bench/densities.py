"""How sparse a softmax is: what a backward that leaves columns out could leave out."""

from __future__ import annotations

from typing import Any

ROWS = 128  # of a block, for which columns are chosen together
BLOCKS = 4  # that are looked at: evenly spread over the rows
ALIVE = 2.0**-12  # the least entry that counts: what bf16 gradients notice
BUDGETS = (1e-2, 1e-3)
COLUMNS = 4096  # of W that are in fp32 at a time


def densities(x: Any, weight: Any) -> dict[str, float]:
    """Fractions of the columns of softmax(x Wᵀ) per block of rows, averaged over blocks.

    "alive": with an entry of at least `ALIVE`. By budget: kept when the smallest are dropped, as long as their mass,
    averaged over the block's rows, adds up to at most the budget.
    """
    blocks = x.detach().float().split(ROWS)
    blocks = blocks[:: -(-len(blocks) // BLOCKS)]
    found = dict.fromkeys(["alive", *map(str, BUDGETS)], 0.0)
    for block in blocks:
        p = block.new_empty(len(block), len(weight))
        for part, w in zip(p.split(COLUMNS, 1), weight.detach().split(COLUMNS), strict=True):
            part.copy_(block @ w.float().T)
        p = p.softmax(1)
        found["alive"] += float((p >= ALIVE).any(0).double().mean()) / len(blocks)
        mass = p.mean(0).double().sort().values.cumsum(0)
        for budget in BUDGETS:
            found[str(budget)] += float((mass > budget).double().mean()) / len(blocks)
    return found


def sentence(found: dict[str, float]) -> str:
    """What `densities` found, for people."""
    kept = ", ".join(f"{found[str(budget)]:.1%} hold all but {budget:g} of the mass" for budget in BUDGETS)
    return (
        f"Of the columns, in blocks of {ROWS} rows, {found['alive']:.1%} have an entry of the softmax of at least "
        f"2⁻¹²; {kept}."
    )
