"""Runs programs on several ranks, all of a file once for each number of ranks."""

from __future__ import annotations

import datetime
import faulthandler
import functools
import multiprocessing
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cce_inductor import config

# What the ranks run, each under the name of what it finds: (mesh, folder) -> the programs.
Programs = Callable[[DeviceMesh, str], dict[Any, Callable[[], Any]]]
Results = Callable[[int], list[dict[Any, Any]]]


@functools.lru_cache(maxsize=1)
def _processes(ranks: int) -> list[ProcessPoolExecutor]:
    """One for each rank, for all files that run on this worker: what one has warmed up the next one needs too.

    A process stays the same rank: DTensor keeps what it has found out about the places of shards.
    """
    return [ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for _ in range(ranks)]


def _run(programs: Programs, rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(600, exit=True)
    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    results: dict[Any, Any] = {}
    with config.patch(min_vocab=0, compiler="aot_eager"):  # of heads that run eagerly
        for name, program in programs(init_device_mesh("cpu", (ranks,)), folder).items():
            torch._dynamo.reset()
            try:
                results[name] = program()
            except Exception:
                results[name] = traceback.format_exc()
    torch.save(results, f"{folder}/{ranks}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def results_of(programs: Programs, folder: Path) -> Results:
    """(ranks) -> what each rank has found, by the program's name; the error as text where one has failed."""

    @functools.cache
    def results(n: int) -> list[dict[Any, Any]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            runs = [pool.submit(_run, programs, rank, n, str(folder)) for rank, pool in enumerate(_processes(n))]
            for run in runs:
                run.result()
        return [torch.load(folder / f"{n}-{rank}.pt", weights_only=True) for rank in range(n)]

    return results
