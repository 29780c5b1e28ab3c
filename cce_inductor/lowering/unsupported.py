"""Which calls no template can take, on any device."""

from collections.abc import Iterable
from typing import Any

import torch

from ..ops import statistics as table

# Of a weight, int8 too (`check` in ops/call.py): all its numbers are exact in each of the others.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
# The rows of `ops/statistics.py` that templates compute: of one head, those of every device.
STATISTICS = (
    *("lse", "lse_low", "lse_rest", "lse_rest_low"),
    *("target_logit", "entry_logits", "logit_sum", "entropy", "argmax"),
    *("other_lse", "other_lse_low", "expected_other", "cross_entropy", "other_cross_entropy"),
    *("divergence", "other_divergence"),
)


class Unsupported(Exception):
    """The templates cannot take a call; the message says why."""


class Apart(Unsupported):
    """The templates cannot take the entries of a call, but the rest of it."""


def unsupported_dtype(dtypes: Iterable[torch.dtype]) -> str:
    """Why operands of these dtypes, among them the compute dtype, fit no template; or ""."""
    other = [dtype for dtype in dtypes if dtype not in DTYPES]
    return f"{str(other[0]).removeprefix('torch.')} is none of float32, bfloat16 and float16" if other else ""


def check_statistics(names: str) -> None:
    """Raises Unsupported for a statistic that the templates do not compute: they would leave its result empty."""
    for name in names.split():
        if name not in STATISTICS and table.TABLE[name].divergence is None:
            raise Unsupported(f"the templates do not compute {name}")


def check_picked(names: Iterable[str]) -> None:
    """Raises Unsupported where all that is asked for are logits of classes that are given, K for each row.

    The eager implementation gathers rows of the weight for them: the templates would multiply all.
    """
    if "entry_logits" in names and all(table.TABLE[name].kind == "sparse" for name in names):
        raise Unsupported("rows of the weight are gathered, and no product of matrices is needed")


def as_lse(names: str) -> tuple[list[str], bool]:
    """Statistics as the templates know them, and whether the target is left out of their log-sum-exp."""
    return [name.replace("lse_rest", "lse") for name in names.split()], "lse_rest" in names.split()


def differentiable(tangents: dict[str, Any]) -> dict[str, Any]:
    """The tangents that a gradient flows through. Raises Unsupported."""
    tangents = {name: t for name, t in tangents.items() if table.TABLE[name].differentiable}
    for name, tangent in tangents.items():
        if tangent.get_dtype() != torch.float32:
            raise Unsupported(f"the tangent of {name} is {tangent.get_dtype()}")
    return tangents
