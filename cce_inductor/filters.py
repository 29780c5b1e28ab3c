"""What `grad_filter` says: which columns of the softmax the backward computes. No torch: the settings read it."""

from dataclasses import dataclass, replace
from typing import Any

KINDS = ("exact", "budget", "unbiased", "eps")
SPELLINGS = (
    "must be 'exact', a budget in (0, 1) such as 0.002, ('unbiased', <budget>), ('eps', <number in (0, 1)>) or "
    "('eps', <number>, 'sorted'); as text: 'exact', '0.002', 'unbiased 0.002', 'eps 0.0002', 'eps 0.0002 sorted'"
)


@dataclass(frozen=True)
class Filter:
    """Which columns a backward computes, and of what kind its error is.

    kind: "exact" for all of them. "budget": in each block of rows those of least mass are left out, and `value` is the
    share of the block's dense gradient that they may make up. "unbiased": a sample of them is taken instead. "eps": a
    tile is left out where every |softmax - onehot| is below `value`, with the columns in their own order or `sorted`.

    group: how many columns share a bound, and are computed or not as one. It is no setting: the forward in training
    chooses it for the problem (bound.py).

    Its text is how settings, graphs and operators carry it: "exact", "budget 0.002", "unbiased 0.002", "eps 0.0002",
    "eps 0.0002 sorted"; in the operators also "budget 0.002 by 4", with groups of 4 columns.
    """

    kind: str = "exact"
    value: float = 0.0
    sorted: bool = False
    group: int = 1

    @staticmethod
    def of(value: Any) -> "Filter":
        """From what a user sets, or any filter's text. Raises ValueError, which says what is possible."""
        if isinstance(value, Filter):
            return value
        words = value.split() if isinstance(value, str) else value
        words = list(words) if isinstance(words, (tuple, list)) else [words]
        if words == ["exact"]:
            return Filter()
        if len(words) == 1:
            words = ["budget", *words]
        in_order = len(words) == 3 and words[0] == "eps" and words[2] == "sorted"
        if (len(words) == 2 or in_order) and words[0] in KINDS[1:]:
            number = _number(words[1])
            if number is not None and 0.0 < number < 1.0:
                return Filter(words[0], number, in_order)
        raise ValueError(SPELLINGS)

    @staticmethod
    def read(text: str) -> "Filter":
        """From the text that an operator is given. Raises ValueError."""
        plain, by, group = text.partition(" by ")
        try:
            filter = Filter.of(plain)
            if by and (filter.kind not in ("budget", "unbiased") or group not in ("2", "4", "8")):
                raise ValueError("cannot be: a budget and an unbiased filter may be grouped, by 2, 4 or 8 columns")
        except ValueError as error:
            raise ValueError(f"grad_filter {text!r} {error}") from None
        return replace(filter, group=int(group)) if by else filter

    def __str__(self) -> str:
        if self.kind == "exact":
            return self.kind
        by = f" by {self.group}" if self.group > 1 else ""
        return f"{self.kind} {self.value!r}" + (" sorted" if self.sorted else "") + by


def _number(word: Any) -> float | None:
    try:
        return None if isinstance(word, bool) else float(word)
    except (TypeError, ValueError, OverflowError):
        return None
