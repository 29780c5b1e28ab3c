import sys
from pathlib import Path

import pytest
import torch

# Helper modules of the tests (capture.py) are imported by name from any folder below.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers whatever ran before in this process."""
    torch.manual_seed(0)
