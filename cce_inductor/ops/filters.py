"""What `grad_filter` says: which columns of the softmax the backward computes."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Filter:
    """kind: "exact" or "budget". value: of a budget, the share of a block's dense gradient that may be dropped.

    As a string, which is how the operators carry it: "exact", "budget 0.001953125".
    """

    kind: str = "exact"
    value: float = 0.0

    @staticmethod
    def read(text: str) -> "Filter":
        kind, _, value = text.partition(" ")
        if kind == "exact" and not value:
            return Filter()
        try:
            return Filter.of(float(value)) if kind == "budget" else Filter.of(text)
        except ValueError:
            raise ValueError(f"grad_filter {text!r}: expected 'exact' or 'budget <number>'") from None

    @staticmethod
    def of(value: Any) -> "Filter":
        """From what a user sets: "exact", or a budget in (0, 1). Raises ValueError."""
        if value == "exact":
            return Filter()
        number = float(value)
        if not 0.0 < number < 1.0:
            raise ValueError("a budget must be between 0 and 1")
        return Filter("budget", number)

    def __str__(self) -> str:
        return self.kind if self.kind == "exact" else f"{self.kind} {self.value!r}"
