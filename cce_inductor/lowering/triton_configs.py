"""Which configurations of the Triton kernels the autotuner tries.

Those that spill registers, or need more shared memory than there is, are left out:
`python tests/lowering/ahead_of_time.py` compiles them all without a GPU and says so (docs/kernels.md).
"""

from collections.abc import Sequence

import torch

from .triton_template import Tiles

# Columns of a tile of logits that the forward keeps: their largest is kept beside them.
CACHED_TILE = 128

# kernel, with its variant -> kind of operands -> configurations, the most promising first.
# "products": PyTorch's GEMM has made them; "kept": the forward keeps the logits; "bound": it leaves the bound, in
# blocks of 128 rows; "added": dW is added up over regions. The last three need more registers.
Table = dict[str, dict[str, list[Tiles]]]
# dlogits of kept logits is no GEMM: it has no step.
_POINTWISE = [Tiles(16, 128, 16, 1, 4), Tiles(32, 128, 16, 1, 8)]
# Nor is what makes statistics of products. Slabs are whole tiles of 256 columns.
_ROWS = [Tiles(8, 256, 16, 1, 4)]
_EARLY = [Tiles(16, 16, 256, 1, 4)]
# What chooses the columns of a backward under a budget: 128 of them to a tile.
_SMALL_STEPS = [Tiles(128, 128, 16, 1, 8)]


def _table(by_kernel: dict[str, list[Tiles]], cast: list[Tiles]) -> Table:
    """by_kernel: for 16-bit operands. cast: for fp32 ones that are rounded to 16 bits, whatever the kernel."""
    gemms = {kernel: {"16 bits": tiles, "cast": cast, "fp32": _FP32} for kernel, tiles in by_kernel.items()}
    alike = {"linear_statistics_dlogits, kept": _POINTWISE, "linear_statistics_early": _EARLY}
    alike |= {"linear_statistics, products": _ROWS, "linear_statistics_dlogits, products": _POINTWISE}
    alike |= {f"budget_{name}": _SMALL_STEPS for name in ("select", "mask", "bits", "tiles", "plan", "list", "check")}
    gemms["linear_statistics, bound"] |= {"cast": _CAST_BLOCKS, "fp32": _FP32_BLOCKS}
    gemms["budget_dx"]["cast"] = [tiles for tiles in cast if tiles.block_n == 64]
    gemms["budget_dlogits"] |= {"cast": _CAST_BLOCKS, "fp32": _FP32_BLOCKS}
    for name in ("two_heads", "two_heads_dlogits"):
        gemms[name] |= {"cast": [tiles for tiles in cast if not tiles.tma], "fp32": _FP32_PAIRS}
    return gemms | {kernel: dict.fromkeys(("16 bits", "cast", "fp32"), tiles) for kernel, tiles in alike.items()}


def kind(operands: Sequence[torch.dtype], compute: torch.dtype) -> str:
    """Which column of the table: what the kernels load and multiply."""
    if compute == torch.float32:
        return "fp32"
    return "16 bits" if all(dtype.itemsize == 2 for dtype in operands) else "cast"


# Without matrix instructions, unless PyTorch is told to use tf32.
_FP32 = [Tiles(64, 64, 32, 3, 4), Tiles(64, 128, 32, 2, 8)]
_FP32_BLOCKS = [Tiles(128, 64, 32, 2, 8)]
_LARGE = Tiles(128, 256, 64, 3, 8)
_LARGE_TMA = Tiles(128, 256, 64, 3, 8, tma=True)
_TALL_TMA = Tiles(256, 128, 64, 3, 8, tma=True)
_MIDDLE = Tiles(128, 128, 64, 4, 8)
_MIDDLE_TMA = Tiles(128, 128, 64, 4, 8, tma=True)
_SPECIALISED = Tiles(128, 128, 64, 4, 4, tma=True, warp_specialize=True)
_SMALL = Tiles(64, 128, 64, 4, 4)
_EIGHT_WARPS = Tiles(64, 128, 64, 4, 8)  # of kernels that need many registers
_CAST = [Tiles(128, 64, 32, 3, 8), Tiles(64, 128, 32, 2, 8), Tiles(64, 64, 32, 3, 4)]
_CAST_BLOCKS = [Tiles(128, 64, 32, 2, 8)]
# Of two heads, whose tiles are there at the same time.
_PAIRS = [Tiles(128, 64, 64, 4, 8), Tiles(64, 64, 64, 4, 4)]
_PAIRS_TMA = Tiles(128, 64, 64, 4, 8, tma=True)
_PAIRS_CDNA3 = [Tiles(128, 64, 64, 2, 8), Tiles(64, 64, 64, 2, 4)]
_FP32_PAIRS = [Tiles(64, 64, 32, 2, 8)]

_AMPERE = _table(
    {
        "linear_statistics": [_MIDDLE, _SMALL],
        "linear_statistics, kept": [_MIDDLE, _SMALL, _EIGHT_WARPS],
        "linear_statistics, bound": [_MIDDLE, Tiles(128, 64, 64, 4, 8)],
        "linear_statistics_dlogits": [_MIDDLE, _SMALL],
        "linear_statistics_dw": [_MIDDLE, _SMALL],
        "linear_statistics_dw, added": [_MIDDLE, _SMALL],
        "linear_statistics_dx": [_MIDDLE, _SMALL],
        "two_heads": _PAIRS,
        "two_heads_dlogits": _PAIRS,
        "budget_dlogits": [_MIDDLE, _SMALL],
        "budget_dw": [_MIDDLE, _SMALL],
        "budget_dx": [_MIDDLE, _SMALL],
    },
    _CAST,
)
_AMPERE["budget_dw"]["fp32"] = [Tiles(64, 64, 32, 2, 4)]  # a third stage and wider tiles spill under Triton 3.7
# Wider tiles spill under Triton 3.6.
_BOUND = [Tiles(128, 64, 64, 4, 8, tma=True), Tiles(128, 64, 64, 4, 8)]
_HOPPER = _table(
    {
        "linear_statistics": [_LARGE_TMA, _LARGE, _MIDDLE_TMA, _MIDDLE, _SMALL],
        "linear_statistics, kept": [_MIDDLE_TMA, _MIDDLE, _SMALL, _EIGHT_WARPS],
        "linear_statistics, bound": _BOUND,
        "linear_statistics_dlogits": [_TALL_TMA, _MIDDLE_TMA, _MIDDLE, _SMALL],
        "linear_statistics_dw": [_LARGE_TMA, _LARGE, _MIDDLE_TMA, _MIDDLE, _SMALL],
        "linear_statistics_dw, added": [_MIDDLE_TMA, _MIDDLE, _SMALL],
        # _LARGE spills under Triton 3.9.
        "linear_statistics_dx": [_LARGE_TMA, _MIDDLE_TMA, _MIDDLE, _SMALL],
        "two_heads": [_MIDDLE_TMA, _PAIRS_TMA, *_PAIRS],
        "two_heads_dlogits": [_PAIRS_TMA, *_PAIRS],
        "budget_dlogits": [_MIDDLE, _SMALL],
        "budget_dw": [_LARGE, _MIDDLE, _SMALL],
        "budget_dx": [_LARGE, _MIDDLE, _SMALL],
    },
    [Tiles(128, 64, 32, 3, 8, tma=True), *_CAST],
)
_HOPPER["linear_statistics, bound"]["fp32"] = [Tiles(128, 64, 16, 2, 8)]  # a step of 32 spills under Triton 3.7
_BLACKWELL = _table(
    {
        "linear_statistics": [_LARGE_TMA, _MIDDLE, _SMALL],
        "linear_statistics, kept": [_MIDDLE_TMA, _EIGHT_WARPS],
        "linear_statistics, bound": _BOUND,
        "linear_statistics_dlogits": [_LARGE_TMA, _MIDDLE_TMA, _MIDDLE, _SMALL],
        "linear_statistics_dw": [_LARGE_TMA, _SPECIALISED, _MIDDLE, _SMALL],
        "linear_statistics_dw, added": [_MIDDLE_TMA, _MIDDLE, _SMALL],
        "linear_statistics_dx": [_MIDDLE_TMA, _MIDDLE, _SMALL],
        "two_heads": [_MIDDLE_TMA, _PAIRS_TMA, *_PAIRS],
        "two_heads_dlogits": [_PAIRS_TMA, *_PAIRS],
        "budget_dlogits": [_SMALL],
        "budget_dw": [_LARGE, _MIDDLE, _SMALL],
        "budget_dx": [_MIDDLE, _SMALL],
    },
    [Tiles(128, 64, 32, 3, 8, tma=True), *_CAST],
)
# 64 KiB of shared memory, no TMA.
_TALL_CDNA3 = [Tiles(128, 128, 64, 2, 8), Tiles(128, 128, 32, 2, 8)]
_CDNA3 = _table(
    {name: _TALL_CDNA3 if name.endswith("bound") else [*_TALL_CDNA3, Tiles(64, 128, 64, 2, 4)] for name in _HOPPER}
    | dict.fromkeys(("two_heads", "two_heads_dlogits"), _PAIRS_CDNA3),
    [Tiles(128, 64, 32, 2, 8), Tiles(64, 128, 32, 2, 8), Tiles(64, 64, 32, 2, 4)],
)
# compute capability, or AMD's name of the architecture -> kernel -> ...
TABLE: dict[int | str, Table] = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL, "gfx942": _CDNA3}


# With factors of rows and classes a kernel needs more registers: larger tiles spill, and so do these.
_LARGEST_WITH_FACTORS = 128 * 128
_SPILL_WITH_FACTORS: dict[tuple[int | str, str], list[Tiles]] = {
    (80, "linear_statistics, kept"): [_MIDDLE, _SMALL],
    (80, "linear_statistics_dx"): [_MIDDLE],
    (80, "two_heads_dlogits"): _PAIRS[1:],
    (90, "linear_statistics"): _FP32[:1],
    (90, "linear_statistics, kept"): [_MIDDLE_TMA, _MIDDLE, _SMALL],
    (100, "linear_statistics_dw, added"): [_MIDDLE_TMA, _MIDDLE],
    (100, "two_heads"): [_MIDDLE_TMA],
    ("gfx942", "linear_statistics_dx"): _TALL_CDNA3[:1],
}


def holds_factors(architecture: int | str, kernel: str, tiles: Tiles) -> bool:
    """Whether a kernel whose logits have a factor for each row or class keeps its numbers in registers."""
    small = tiles.block_m * tiles.block_n <= _LARGEST_WITH_FACTORS
    return small and tiles not in _SPILL_WITH_FACTORS.get((architecture, kernel), [])


def chunk(operands: str) -> int:
    """Entries of a list that a tile of the backward under a budget takes, for that kind of operands."""
    return 128 if operands == "16 bits" else 64


def configurations(
    kernel: str,
    operands: Sequence[torch.dtype],
    compute: torch.dtype,
    device: torch.device,
    tma: bool,
    block_n: int | None = None,
    block_m: int | None = None,
    factors: bool = False,
) -> list[Tiles]:
    """What to try for a kernel whose operands, multiplied in `compute`, have these dtypes, on this device.

    tma: whether the operands' strides allow it. block_n, block_m: the only tile of columns, or of rows, that will do.
    factors: whether the logits have some for each row or class.
    """
    if torch.version.hip:
        architecture: int | str = "gfx942"
    else:
        major, minor = torch.cuda.get_device_capability(device)
        known = [sm for sm in TABLE if isinstance(sm, int)]
        architecture = max((sm for sm in known if sm <= major * 10 + minor), default=min(known))
    found = TABLE[architecture][kernel][kind(operands, compute)]
    found = [t for t in found if not factors or holds_factors(architecture, kernel, t)]
    return [t for t in found if (tma or not t.tma) and block_n in (None, t.block_n) and block_m in (None, t.block_m)]
