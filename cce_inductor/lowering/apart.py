"""A call whose kernels do not know the logits of entries, as two: those, which the eager implementation gathers, and
all the rest.

The gradients of the two are added up, which in 16 bits rounds them twice more than one kernel would.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ..ops.call import OF_HEAD, saved_names
from .buffers import op

ENTRIES = "entry_logits"
# What their own call reads: no target, and nothing that is for a filter.
_READ = (*OF_HEAD, "entries")

Run = Callable[..., Sequence[Any]]


def forward(gather: Run, rest: Run, operands, names, row_mask, statistics, training, *attributes) -> list[Any]:
    """The results of the forward operator. gather, rest: run it, for entries and for all else."""
    (own,) = gather(*_own(names, operands), row_mask, ENTRIES, False, *attributes)
    others = [name for name in statistics.split() if name != ENTRIES]
    made = rest(*_others(names, operands), row_mask, " ".join(others), training, *attributes)
    by_name = dict(zip(others, made, strict=False)) | {ENTRIES: own}
    return [*(by_name[name] for name in statistics.split()), *made[len(others) :]]


def backward(
    gather: Run, rest: Run, tangents, tangent_names, saved, operands, names, row_mask, statistics, needs, *attributes
) -> list[Any]:
    """The results of the backward operator. gather, rest: run it, for entries and for all else."""
    given = dict(zip(tangent_names.split(), tangents, strict=True))
    results = dict(zip(saved_names(statistics, saved), saved, strict=True))
    differentiable = [name for name in needs.split() if name in OF_HEAD]
    tangent, result = given.pop(ENTRIES, None), results.pop(ENTRIES)
    own: Sequence[Any] = ()
    if tangent is not None:
        named = *_own(names, operands), row_mask, ENTRIES, " ".join(differentiable)
        own = gather([tangent], ENTRIES, [result], *named, *attributes)
    others = [name for name in statistics.split() if name != ENTRIES]
    made = rest(
        *(list(given.values()), " ".join(given), list(results.values())),
        *(*_others(names, operands), row_mask, " ".join(others), needs, *attributes),
    )
    by_name = dict(zip(differentiable, own, strict=False))
    return [
        op("add.Tensor", value, by_name[name]) if name in by_name else value
        for name, value in zip(needs.split(), made, strict=True)
    ]


def _own(names: str, operands: Sequence[Any]) -> tuple[list[Any], str]:
    return _some(names, operands, lambda name: name in _READ)


def _others(names: str, operands: Sequence[Any]) -> tuple[list[Any], str]:
    return _some(names, operands, lambda name: name != "entries")


def _some(names: str, operands: Sequence[Any], wanted: Callable[[str], bool]) -> tuple[list[Any], str]:
    """The operands whose name is wanted, and those names."""
    kept = {name: t for name, t in zip(names.split(), operands, strict=True) if wanted(name)}
    return list(kept.values()), " ".join(kept)
