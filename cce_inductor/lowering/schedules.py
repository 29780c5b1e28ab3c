"""The schedules of the exact backward on a GPU: in which order it goes over the logits, and what that takes.

A sweep cuts the logits into regions of rows x columns. For each region one kernel computes dlogits into the workspace,
and one for each gradient its share of it. Sums that go on from region to region are kept in fp32.

| schedule | regions              | GEMM work | fp32 sums besides the workspace's dlogits                  |
|----------|----------------------|-----------|---------------------------------------------------------|
| slab     | all rows x columns   | 8 NVD     | N D of dx (none if x is fp32)                           |
| blocks   | rows x columns       | 8 NVD     | as slab, and columns x D of dW, small enough for the L2 |
| chunk    | rows x all columns   | 8 NVD     | V D of dW, out of the workspace (none if W is fp32)     |
| separate | dx by chunk, dW by slab | 10 NVD | none                                                    |
| library  | all rows x columns   | 8 NVD     | as slab; with 16 bits the products of a region, fp32    |

Where operands are multiplied as they are, PyTorch's library of GEMMs may read dlogits in the place of our kernels: slab
and separate come in that form too, and in `library` it makes the logits as well, of which a kernel makes dlogits. It
takes rows in their own order, and those that do not count with dlogits of 0.

The logits are computed once more than in the forward; with gradients formed there (6 NVD) nothing is swept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

# FLOP/s of our GEMMs and of PyTorch's, bytes/s of memory, seconds of a launch: assumed of an H100 in bfloat16. None of
# them was measured; they order what cannot be timed.
OWN, LIBRARY, MEMORY, LAUNCH = 500e12, 730e12, 3e12, 4e-6
# Sizes of regions are multiples of the largest tile.
STEP = 256
# More launches than this take longer to prepare, and to compile, than they can win.
MOST_LAUNCHES = 256
# Under a budget, where a slab is eight launches, most of them of kernels that find nothing to do.
MOST_SLABS = 128
# Rows of a region whose dW is to stay in the L2 cache, and the part of that cache it may fill.
BLOCK_ROWS = 2048
L2_SHARE = 0.5
# A split of the vocabulary in a round of the forward should be worth a program of its own.
LEAST_SPLIT = 512
# Where the rounds end, in parts of the vocabulary.
ROUNDS = (1 / 16, 1 / 4, 1)


@dataclass(frozen=True)
class Sweep:
    """One pass over the logits in regions of rows (0: all, however many) x columns, for the gradients of `makes`."""

    rows: int
    columns: int
    makes: tuple[str, ...]
    library: bool = False  # the GEMMs that read dlogits are PyTorch's
    products: bool = False  # and so is the one that makes the logits

    def launches(self, n: int, v: int) -> int:
        kernels = 1 + self.products + ("input" in self.makes) + ("weight" in self.makes or "bias" in self.makes)
        return kernels * math.ceil(n / (self.rows or n)) * math.ceil(v / self.columns)

    def seconds(self, n: int, d: int, v: int, item: int) -> float:
        """Predicted, on an H100: which of two is the faster one."""
        regions = math.ceil(n / (self.rows or n)), math.ceil(v / self.columns)
        gemm = 2 * n * d * self.columns * regions[1]
        made = gemm * len({*self.makes} & {"input", "weight"}) / (LIBRARY if self.library else OWN)
        logits = gemm / (LIBRARY if self.products else OWN)
        moved = n * v * (2 * item + (8 if self.products and item == 2 else 0))
        # What is read and written again for each region: sums of dx, and of dW.
        moved += n * d * 8 * regions[1] * ("input" in self.makes and regions[1] > 1)
        moved += v * d * 8 * regions[0] * ("weight" in self.makes and regions[0] > 1)
        return made + logits + moved / MEMORY + self.launches(n, v) * LAUNCH


@dataclass(frozen=True)
class Schedule:
    name: str
    sweeps: tuple[Sweep, ...]

    def by_library(self) -> "Schedule":
        return Schedule(f"{self.name}, library", tuple(replace(sweep, library=True) for sweep in self.sweeps))

    def launches(self, n: int, v: int) -> int:
        return sum(s.launches(n, v) for s in self.sweeps)

    def seconds(self, n: int, d: int, v: int, item: int) -> float:
        return sum(s.seconds(n, d, v, item) for s in self.sweeps)


@dataclass(frozen=True)
class Library:
    """What PyTorch's GEMMs can do for a call.

    wide: whether they give float32 of 16 bits, and add to it. copied: bytes that a copy of the hidden states takes out
    of the workspace. alone: whether our kernels have no matrix instructions for these operands, and are not tried.
    """

    wide: bool = True
    copied: int = 0
    alone: bool = False


def schedules(
    n: int,
    d: int,
    v: int,
    compute: torch.dtype,
    weight: torch.dtype,
    needs: Sequence[str],
    workspace: int,
    l2: int,
    static: bool,
    library: Library | None,
    processors: int = 132,
) -> list[Schedule]:
    """Those that fit in `workspace` bytes, from the most to the least promising.

    n: rows, a guess unless `static`: then only schedules that take any number of rows. l2: bytes of that cache.
    library: what PyTorch's GEMMs can do, if they can multiply these operands.
    """
    item, whole, needed = compute.itemsize, whole_tiles(v), tuple(needs)
    workspace = min(workspace, max(n, 1) * whole * item)
    slab = slab_columns(n, v, item, workspace)
    found = [Schedule("slab", (Sweep(0, slab, needed),))]
    with_dw = "weight" in needs or "bias" in needs
    if static and slab < whole:
        if with_dw:
            rows = min(BLOCK_ROWS, n)
            columns = int(min(workspace, l2 * L2_SHARE)) // (d * 4 + rows * item) // STEP * STEP
            if columns and rows < n:
                found.append(Schedule("blocks", (Sweep(rows, min(columns, whole), needed),)))
        sums = v * d * 4 if "weight" in needs and weight != torch.float32 else 0
        rows = (workspace - sums) // (whole * item) // 128 * 128
        if rows > 0:
            found.append(Schedule("chunk", (Sweep(min(rows, n), whole, needed),)))
        rows = workspace // (whole * item) // 128 * 128
        # A grid for dx that leaves multiprocessors without work takes longer than all it saves.
        if rows // 128 * math.ceil(d / STEP) >= processors and with_dw and "input" in needs:
            dw = tuple(name for name in needed if name != "input")
            found.append(Schedule("separate", (Sweep(min(rows, n), whole, ("input",)), Sweep(0, slab, dw))))
    by_library = _by_library(library, found, n, v, item, workspace) if library else []
    if library and library.alone and by_library:
        return by_library[-1:]
    found += by_library
    found = [s for s in found if s.name == "slab" or s.launches(n, v) <= MOST_LAUNCHES]
    return sorted(found, key=lambda s: s.seconds(n, d, v, item))


def _by_library(
    library: Library, found: Sequence[Schedule], n: int, v: int, item: int, workspace: int
) -> list[Schedule]:
    """The schedules that use PyTorch's GEMMs, last the one in which they make the logits too if they can."""
    room = workspace - library.copied
    if room < workspace // 2:
        return []
    (slab,), columns = found[0].sweeps, slab_columns(n, v, item, room)
    made = [Schedule(found[0].name, (replace(slab, columns=columns),)).by_library()]
    made += [s.by_library() for s in found[1:] if s.name == "separate" and not library.copied]
    if library.wide or item == 4:
        products = 0 if item == 4 else 4  # in float32 dlogits takes their place
        sweep = Sweep(0, slab_columns(n, v, item + products, room), slab.makes, library=True, products=True)
        made.append(Schedule("library", (sweep,)))
    return made


def slab_columns(n: int, v: int, item: int, workspace: int) -> int:
    """Columns of a slab of all rows: whole tiles of them, at least one. item: bytes of dlogits for each entry.

    As few slabs as fit, and all alike: what the last one has beyond V columns is computed in vain.
    """
    most = max(workspace // (max(n, 1) * item) // STEP, 1) * STEP
    return whole_tiles(v / math.ceil(v / most))


@dataclass(frozen=True)
class Round:
    """Columns of the forward that are computed at once, in splits: the later ones know of `before` others."""

    begin: int
    width: int  # of a split
    end: int
    before: int

    @property
    def splits(self) -> int:
        return math.ceil((self.end - self.begin) / self.width)


def full_waves(blocks: int, processors: int, most: int = 1 << 20) -> int:
    """How many splits of the vocabulary, `most` of them, keep a GPU busy for which a program fills a multiprocessor.

    The least number that takes no more than 5 % longer than the best does.
    """

    def waves(splits: int) -> float:
        return math.ceil(blocks * splits / processors) / splits

    candidates = range(1, max(1, min(most, max(4, 2 * math.ceil(processors / blocks)))) + 1)
    best = min(waves(s) for s in candidates)
    return next(s for s in candidates if waves(s) <= 1.05 * best)


def rounds(blocks: int, v: int, processors: int) -> list[Round]:
    """How a forward that leaves a bound goes over the vocabulary, for so many blocks of rows.

    A split knows the log-sum-exp of the rounds before it and of its own columns. The bound keeps little more than that
    of one split (docs/design.md).
    """

    splits = full_waves(blocks, processors)
    found: list[Round] = []
    begin = before = 0
    for share in ROUNDS:
        end = min(max(whole_tiles(v * share), begin + splits * LEAST_SPLIT), v)
        if v - end < splits * LEAST_SPLIT:
            end = v
        found.append(Round(begin, whole_tiles((end - begin) / splits), end, before))
        begin, before = end, before + found[-1].splits
        if end == v:
            break
    return found


def budget_slabs(n: int, v: int, item: int, workspace: int) -> tuple[int, int]:
    """How many slabs cuda_budget.py has in `workspace` bytes, and the slots for each block.

    item: bytes of a number in the compute dtype. 0 slabs where too little fits.
    """
    blocks, whole = max(math.ceil(n / 128), 1), math.ceil(v / 128) * 128
    tables = v * (3 * 8 + blocks * (3 / 8 + 1 / 32))  # keys and their sort, masks, blocks of tiles
    slot = 128 * item + 12  # dlogits, its column, masses
    width = min(int(workspace - tables) // (blocks * slot) // 128 * 128, whole + 2 * 128)
    # One tile may come on top of the capacity, and what pads the lists.
    slabs = math.ceil(whole / (width - 2 * 128)) if width > 2 * 128 else 0
    return (slabs, width) if slabs <= MOST_SLABS else (0, 0)


def whole_tiles(v: float) -> int:
    """The least number of columns that is at least `v` and a multiple of every kernel's tile."""
    return math.ceil(v / STEP) * STEP
