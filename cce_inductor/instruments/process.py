"""The environment of a process that is measured."""

from __future__ import annotations

import os
from pathlib import Path

from .memory import ALLOCATOR_ENV

COMPILERS = 4  # of Triton kernels at once


def environment(cache_dir: str | Path, device: str | None = None) -> dict[str, str]:
    """This process's environment for a child: offline, freed memory given back at once, compiled code in `cache_dir`.

    device: "cpu" or "cuda" also says how many kernels are compiled at once. On a CPU that is one: a pool of compilers
    per child would be in the way of the others. None leaves it to Inductor.
    """
    env = dict(os.environ)
    env.pop("CCE_INDUCTOR", None)  # would put cce_inductor into plain torch.compile as well
    if device is not None:
        compilers = 1 if device == "cpu" else min(COMPILERS, os.cpu_count() or 1)
        env["TORCHINDUCTOR_COMPILE_THREADS"] = str(compilers)
    return env | {
        **ALLOCATOR_ENV,
        "TORCHINDUCTOR_CACHE_DIR": str(cache_dir),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [env.get("PYTHONPATH")])]),
    }
