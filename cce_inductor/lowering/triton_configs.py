"""Which configurations of the Triton kernels the autotuner tries.

Those that spill registers, or need more shared memory than there is, are left out:
`python tests/lowering/ahead_of_time.py` compiles them all without a GPU and says so (docs/kernels.md).
"""

import torch

from .triton_template import Tiles

# Columns of a tile of logits that the forward keeps: their largest is kept beside them.
KEPT_TILE = 128

# kernel, with its variant -> bytes of the largest operand's elements -> configurations, the most promising first.
# "kept": the forward keeps the logits; "added": dW is added up over regions. Both need more registers.
Table = dict[str, dict[int, list[Tiles]]]
# dacc of kept logits is no GEMM: it has no step.
_POINTWISE = [Tiles(16, 128, 16, 1, 4), Tiles(32, 128, 16, 1, 8)]


def _table(by_kernel: dict[str, list[Tiles]], wide: list[Tiles]) -> Table:
    """by_kernel: for 16-bit operands. wide: for fp32 ones, whatever the kernel."""
    gemms = {kernel: {2: tiles, 4: wide} for kernel, tiles in by_kernel.items()}
    return {**gemms, "linear_statistics_dacc, kept": {2: _POINTWISE, 4: _POINTWISE}}


_LARGE = Tiles(128, 256, 64, 3, 8)
_LARGE_TMA = Tiles(128, 256, 64, 3, 8, tma=True)
_MIDDLE = Tiles(128, 128, 64, 4, 8)
_MIDDLE_TMA = Tiles(128, 128, 64, 4, 8, tma=True)
_SPECIALISED = Tiles(128, 128, 64, 4, 4, tma=True, warp_specialize=True)
_SMALL = Tiles(64, 128, 64, 4, 4)
_WIDE = [Tiles(128, 64, 32, 3, 8), Tiles(64, 64, 32, 3, 4)]

_AMPERE = _table(
    {
        "linear_statistics": [_MIDDLE, _SMALL],
        "linear_statistics, kept": [_MIDDLE, _SMALL],
        "linear_statistics_dacc": [_MIDDLE, _SMALL],
        "linear_statistics_dw": [_MIDDLE, _SMALL],
        "linear_statistics_dw, added": [_MIDDLE, _SMALL],
        "linear_statistics_dx": [_MIDDLE, _SMALL],
    },
    _WIDE,
)
_HOPPER = _table(
    {
        "linear_statistics": [_LARGE_TMA, _LARGE, _MIDDLE_TMA, _MIDDLE, _SMALL],
        "linear_statistics, kept": [_MIDDLE_TMA, _MIDDLE, _SMALL],
        "linear_statistics_dacc": [_LARGE_TMA, _LARGE, _MIDDLE_TMA, _MIDDLE, _SMALL],
        "linear_statistics_dw": [_LARGE_TMA, _LARGE, _MIDDLE_TMA, _MIDDLE, _SMALL],
        "linear_statistics_dw, added": [_MIDDLE_TMA, _MIDDLE, _SMALL],
        "linear_statistics_dx": [_LARGE_TMA, _LARGE, _MIDDLE_TMA, _MIDDLE, _SMALL],
    },
    [Tiles(128, 64, 32, 3, 8, tma=True), *_WIDE],
)
_BLACKWELL = _table(
    {
        "linear_statistics": [_LARGE_TMA, _MIDDLE_TMA, _MIDDLE, _SMALL],
        "linear_statistics, kept": [_MIDDLE_TMA, Tiles(64, 128, 64, 4, 8, tma=True), Tiles(64, 128, 64, 4, 8)],
        "linear_statistics_dacc": [_LARGE_TMA, _SPECIALISED, _MIDDLE, _SMALL],
        "linear_statistics_dw": [_LARGE_TMA, _SPECIALISED, _MIDDLE, _SMALL],
        "linear_statistics_dw, added": [_MIDDLE_TMA, _MIDDLE, _SMALL],
        "linear_statistics_dx": [_MIDDLE_TMA, _MIDDLE, _SMALL],
    },
    [Tiles(128, 64, 32, 3, 8, tma=True), *_WIDE],
)
# compute capability -> kernel -> ...
TABLE: dict[int, Table] = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL}


def configurations(
    kernel: str, dtypes: list[torch.dtype], device: torch.device, tma: bool, block_n: int | None = None
) -> list[Tiles]:
    """What to try for a kernel whose operands have these dtypes, on this device.

    tma: whether the operands' strides allow it. block_n: the only tile of columns that will do.
    """
    major, minor = torch.cuda.get_device_capability(device)
    architecture = max((sm for sm in TABLE if sm <= major * 10 + minor), default=min(TABLE))
    found = TABLE[architecture][kernel][max(dtype.itemsize for dtype in dtypes)]
    return [t for t in found if (tma or not t.tma) and block_n in (None, t.block_n)]
