import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import pytest
import torch

# Helper modules of the tests (capture.py) are imported by name from any folder below.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_finish():
    """A fifth of the time of a test that captures a graph.

    What stays is not looked through again and again for garbage, and freed memory is not handed back in between.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        for setting in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL("libc.so.6").mallopt(setting, 1 << 30)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers whatever ran before in this process."""
    torch.manual_seed(0)
