"""The sums and derivatives of divergences (divergences.py) in the eager implementation, tile by tile."""

from collections.abc import Iterable

from torch import Tensor

from .divergences import LEAST, OTHER, OWN, Divergence
from .statistics import Statistic, Tile


def summed(rows: list[Statistic], tiles: Iterable[Tile], known: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts of divergences that `rows` are, (rows,) each, from the tiles of some rows, which are written over.

    known: the finished log-sum-exps of both heads, by name.
    """
    parts: dict[Divergence, list[Statistic]] = {}
    for row in rows:
        assert row.divergence is not None
        parts.setdefault(row.divergence, []).append(row)
    sums: dict[str, Tensor] = {}
    for tile in tiles:
        assert tile.other is not None
        log_p = _normalised(tile.z, known["lse"], known["lse_low"])
        log_q = _normalised(tile.other, known["other_lse"], known["other_lse_low"])
        for divergence, own in parts.items():
            entries = divergence.parts(log_p, log_q, [row.part for row in own])
            for row in own:
                total = entries.pop(0).sum(1)
                sums[row.name] = sums[row.name].add_(total) if row.name in sums else total
    return sums


def _normalised(z: Tensor, lse: Tensor, low: Tensor) -> Tensor:
    """The logarithm of the softmax of logits, no less than `LEAST`, in their place."""
    return z.sub_(lse[:, None]).sub_(low[:, None]).clamp_(min=LEAST)


def gradient(row: Statistic, logs: list[Tensor], p: Tensor, known: dict[str, Tensor], other: bool) -> Tensor:
    """d value / d z, or d r if `other`, of a tile, (rows, columns).

    logs: log p and log q. p: the softmax of the head that is differentiated. known: the finished parts of the
    divergence, (rows,) each, by name.
    """
    assert row.divergence is not None
    part = OTHER if other else OWN
    log_p, log_q = (log.clamp(min=LEAST) for log in logs)
    (entries,) = row.divergence.parts(log_p, log_q, [part])
    # Where a row is not finite, neither is its sum, and all of the gradient is NaN as that of log_softmax is.
    return entries.masked_fill_(p == 0, 0).addcmul_(p, known[f"{row.name}{part}"][:, None], value=-1)
