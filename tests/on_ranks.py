"""Runs a function on several ranks, once for each number of them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def results_of(work: Callable[[int, int, str], None], folder: Path) -> Callable[[int], list[dict[Any, Any]]]:
    """(ranks) -> what each rank has found: `work(rank, ranks, folder)` saves it in the folder, as `ranks-rank.pt`."""

    @functools.cache
    def results(n: int) -> list[dict[Any, Any]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            torch.multiprocessing.spawn(work, (n, str(folder)), nprocs=n)
        return [torch.load(folder / f"{n}-{rank}.pt", weights_only=True) for rank in range(n)]

    return results
