"""Differences between runs that share their seed, and how well a few of them fix their mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

# Student's t: 97.5 % lie below it, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T_MANY = 2.131  # for more: a little too wide


@dataclass(frozen=True)
class Gap:
    """The mean of paired differences, its standard error, and half of its 95 % interval; count: how many pairs.

    One pair has no error bar: NaN.
    """

    mean: float
    error: float
    half: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval; never with one pair."""
        return abs(self.mean) > self.half


def gap(values: Mapping[int, float], base: Mapping[int, float]) -> Gap | None:
    """Of the seeds that both have; None without any."""
    differences = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
    if not differences:
        return None
    count, mean = len(differences), statistics.fmean(differences)
    if count == 1:
        return Gap(mean, math.nan, math.nan, 1)
    error = statistics.stdev(differences) / math.sqrt(count)
    quantile = _T[count - 2] if count - 2 < len(_T) else _T_MANY
    return Gap(mean, error, quantile * error, count)


def spread(values: Mapping[int, float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds; the latter NaN for one."""
    numbers = list(values.values())
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else math.nan
