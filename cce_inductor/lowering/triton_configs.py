"""Which configurations of the Triton kernels the autotuner tries.

Those that spill registers on sm_80, sm_90 or sm_100, or need more shared memory than there is, are left out:
`python tests/lowering/ahead_of_time.py` compiles them all without a GPU and says so (docs/kernels.md).
"""

import torch

from .triton_template import Tiles

# kernel -> size in bytes of the largest operand's elements -> configurations, from the most to the least promising.
TABLE: dict[str, dict[int, list[Tiles]]] = {
    "linear_statistics": {
        2: [Tiles(128, 128, 64, 4, 8), Tiles(64, 128, 64, 4, 4)],
        4: [Tiles(128, 128, 32, 3, 8), Tiles(64, 64, 32, 3, 4)],
    },
    "linear_statistics_dacc": {
        2: [Tiles(128, 128, 64, 4, 8), Tiles(64, 128, 64, 4, 4)],
        4: [Tiles(128, 64, 32, 3, 8), Tiles(64, 64, 32, 3, 4)],
    },
    "linear_statistics_gradients": {
        2: [Tiles(128, 128, 64, 4, 8), Tiles(64, 128, 64, 4, 4)],
        4: [Tiles(128, 64, 32, 3, 8), Tiles(64, 64, 32, 3, 4)],
    },
}


def configurations(kernel: str, dtypes: list[torch.dtype], device: torch.device) -> list[Tiles]:
    """What to try for a kernel whose operands have these dtypes, on this device."""
    return TABLE[kernel][max(dtype.itemsize for dtype in dtypes)]
