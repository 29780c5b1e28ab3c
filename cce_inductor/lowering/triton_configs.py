"""Which configurations of the Triton kernels the autotuner tries, by architecture.

Pruned by hand by what `docs/kernels.md` shows: shared memory within the chip's, no spills.
"""

import torch

from .triton_template import Tiles

# kernel -> element size in bytes -> configurations, from the most to the least promising.
_LARGE: dict[str, dict[int, list[Tiles]]] = {
    "linear_statistics": {
        2: [Tiles(128, 128, 64, 4, 8), Tiles(128, 256, 64, 3, 8), Tiles(64, 128, 64, 4, 4)],
        4: [Tiles(128, 128, 32, 3, 8), Tiles(64, 64, 32, 3, 4)],
    },
    "linear_statistics_dacc": {
        2: [Tiles(128, 128, 64, 4, 8), Tiles(128, 256, 64, 3, 8), Tiles(64, 128, 64, 4, 4)],
        4: [Tiles(128, 64, 32, 3, 8), Tiles(64, 64, 32, 3, 4)],
    },
    "linear_statistics_gradients": {
        2: [Tiles(128, 128, 64, 4, 8), Tiles(128, 256, 64, 3, 8), Tiles(128, 128, 32, 4, 4)],
        4: [Tiles(128, 64, 32, 3, 8), Tiles(64, 64, 32, 3, 4)],
    },
}


def configurations(kernel: str, dtypes: list[torch.dtype], device: torch.device) -> list[Tiles]:
    """What to try for a kernel whose operands have these dtypes, on this device."""
    return _LARGE[kernel][max(dtype.itemsize for dtype in dtypes)]
