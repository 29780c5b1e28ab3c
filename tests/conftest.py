import contextlib
import ctypes
import gc
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import cpu_vec_isa

from cce_inductor.trace import heads

# Helper modules of the tests (capture.py) are imported by name from any folder below.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_finish():
    """A third of the time of a test that captures a graph.

    What stays is not looked through again and again for garbage, and freed memory is not handed back in between.
    pytest collects what loggers say that do not propagate, and torch's trace prints every graph if anybody listens.
    """
    logging.getLogger("torch.__trace").propagate = True
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        for setting in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL("libc.so.6").mallopt(setting, 1 << 30)


@pytest.fixture(autouse=True)
def known_instructions():
    """Each process finds out by loading libraries which vector instructions the CPU has, two seconds long.

    Once a test has done so here, children take the CPU at its word if that was true.
    """
    if "TORCHINDUCTOR_VEC_ISA_OK" in os.environ or not cpu_vec_isa.valid_vec_isa_list.cache_info().currsize:
        return
    said = cpu_vec_isa.x86_isa_checker()
    claimed = [isa for isa in cpu_vec_isa.supported_vec_isa_list if {*str(isa).split()} <= {*said}]
    if claimed == cpu_vec_isa.valid_vec_isa_list():
        os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers whatever ran before in this process."""
    torch.manual_seed(0)


@pytest.fixture
def a_mib_is_large(monkeypatch):
    """Deferred logits of more than a MiB are taken for large, as those of more than 64 MiB are otherwise."""
    monkeypatch.setattr(heads, "LARGE_LOGITS", 1 << 20)
