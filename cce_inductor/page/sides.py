"""A graph before and after the pass, side by side."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from .graphs import Line, Pair

CONTEXT = 3  # unchanged rows that stay in sight around what is of interest
SHORT = 24  # a graph of so many rows is shown whole


@dataclass(frozen=True)
class Cell:
    """A node on one side. mark: "same", "changed" (its arguments), "moved", "removed" or "added"."""

    line: Line
    mark: str


@dataclass(frozen=True)
class Row:
    """What stands beside each other: a node on both sides, or what was removed beside what was put in its place."""

    left: tuple[Cell, ...]
    right: tuple[Cell, ...]

    @property
    def same(self) -> bool:
        return all(cell.mark == "same" for cell in (*self.left, *self.right))


@dataclass(frozen=True)
class Stretch:
    """Rows that follow each other; folded: whether nothing of interest is among them."""

    rows: tuple[Row, ...]
    folded: bool


def rows(pair: Pair) -> list[Row]:
    """The nodes of both sides in order. Those of the same name and kind of op are the same node."""
    before, after = ([(line.name, line.called) for line in side] for side in (pair.before, pair.after))
    both = set(before) & set(after)
    found: list[Row] = []
    for tag, i, j, k, l in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag == "equal":
            for a, b in zip(pair.before[i:j], pair.after[k:l], strict=True):
                mark = "same" if a.text == b.text else "changed"
                found.append(Row((Cell(a, mark),), (Cell(b, mark),)))
            continue
        left = (Cell(pair.before[n], "moved" if before[n] in both else "removed") for n in range(i, j))
        right = (Cell(pair.after[n], "moved" if after[n] in both else "added") for n in range(k, l))
        found.append(Row(tuple(left), tuple(right)))
    return found


def folded(found: Sequence[Row], of_interest: set[str]) -> list[Stretch]:
    """The rows in stretches that are worth a look, and those that are not. of_interest: nodes of the left side."""
    if len(found) <= SHORT:
        return [Stretch(tuple(found), False)]
    shown: set[int] = set()
    for i, row in enumerate(found):
        if not row.same or any(cell.line.name in of_interest for cell in row.left):
            shown.update(range(i - CONTEXT, i + CONTEXT + 1))
    stretches = groupby(range(len(found)), key=lambda i: i not in shown)
    return [Stretch(tuple(found[i] for i in numbers), fold) for fold, numbers in stretches]
