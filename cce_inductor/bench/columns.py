"""Which schedule of dW carries column lists that differ from block to block: counts on the lists of real softmaxes.

Every block of rows keeps the columns that the budget of the gradient does not let it drop. dW of a column is a sum
over the blocks that keep it. Counted are the multiply-adds with all padding, bytes, scratch and launches.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import report
from .cases import Shape
from .docs import Section
from .masses import BLOCK, Masses, made, measure, of_model
from .rounds import say

if TYPE_CHECKING:
    import torch

    from .masses import Inputs

BUDGETS = {"2⁻⁹": 2**-9, "4e-3": 4e-3, "1e-2": 1e-2}
MIDDLE = "4e-3"
WIDTHS = (16, 32, 64, 128)
WORKSPACE = 64 << 20  # bytes of dlogits at a time
L2_SLAB = 16 << 20  # bytes of fp32 rows of dW that stay in the cache
REGROUPED = 16  # blocks after which an order of columns may change
MMA = 128  # columns that a list is padded to
ROWS = (2048, 4096, 8192)  # of the model
MADE: tuple[Shape, ...] = ((8192, 4096, 128256), (8192, 2304, 256000))
QUICK: tuple[Shape, ...] = ((512, 64, 4096),)
SPLITS = (2, 4, 8, 16)

CAPTION = f"""\
Blocks of {BLOCK} rows. dW: multiply-adds with all padding, in % of the dense dW's. In all: forward, logits again, dx
and dW in NVD, where exact is 8: 2 + 4·(kept) + 2·(dW). At τ = {MIDDLE}: "sums" is what is written to and read from dW
and its fp32 partial sums, over the bytes of a 16-bit dW; "operands" is what tiles read of dlogits and x, over the dense
dW's in tiles of 128 x 128; scratch is at most {WORKSPACE >> 20} MiB of 16-bit dlogits at a time, partial sums and
lists; launches form dlogits and dW, if the lists' lengths are known (if not, the dense one's, of which the last find
nothing to do). All are deterministic without atomics: what adds to an element is one program, or launches in order."""

ABOUT = """\
* dense: every block with every column
* tiles: a program owns a tile of columns and goes over the blocks that keep any of them; sums stay in registers. The
  columns are in their natural order, or sorted: by how many blocks keep them, by their largest mass in a block, or by
  which blocks keep them (a Gray code of one bit per block, the block with the shortest list first)
* scatter in the tile: a program owns 128 columns; each block's, padded to 16, are added to an fp32 slab in the L2 cache
* scatter in the slab: the same with a launch per block and lists padded to 128
* union of g: columns that any of g blocks keeps, padded to 128, added to an fp32 dW; g = 1 is a chunk of rows with its
  own columns; with all blocks nothing is added up"""

BOUNDS = """\
### The forward's bound

Columns kept, in % of V, in the first case, by what they are chosen by: mass in the final softmax, or the bound left by
one pass whose running lse starts anew in each part of the vocabulary: a range of tiles, or every n-th (interleaved). It
starts from the logit of the row's target, or from those of all targets of the block or of the batch, which are
{distinct:.1f} % of V."""


# ---- the keep rule, and what the lists cost


def keep(masses: Masses, budget: float) -> torch.Tensor:
    """(B, V) bool. A block drops its least columns while their mass is at most `budget` times its dense gradient."""
    import torch

    values, columns = masses.mass.sort(1)
    kept = values.double().cumsum(1) > budget * masses.gradient.double()[:, None]
    return torch.empty_like(kept).scatter_(1, columns, kept)


def tile_work(kept: torch.Tensor, order: torch.Tensor, width: int) -> float:
    """Pairs of a block and a tile of `width` columns, in `order`, with a kept column; in columns, over B·V."""
    from torch.nn.functional import pad

    tiles = pad(kept[:, order], (0, -kept.shape[1] % width)).unflatten(1, (-1, width))
    return int(tiles.any(2).sum()) * width / kept.numel()


def unions(kept: torch.Tensor, group: int) -> torch.Tensor:
    """(⌈B/group⌉, V) bool: what any of `group` consecutive blocks keeps."""
    import torch

    return torch.stack([blocks.any(0) for blocks in kept.split(group)])


def list_work(kept: torch.Tensor, group: int, owned: int, multiple: int) -> float:
    """Lists of `group` blocks' unions, cut every `owned` columns, padded to a `multiple`; times blocks, over B·V."""
    from torch.nn.functional import pad

    union = unions(kept, group)
    counts = pad(union, (0, -kept.shape[1] % owned)).unflatten(1, (-1, owned)).sum(2)
    padded = (counts + multiple - 1).div(multiple, rounding_mode="floor").sum(1) * multiple
    return sum(int(p) * len(blocks) for p, blocks in zip(padded, kept.split(group), strict=True)) / kept.numel()


def by_blocks(kept: torch.Tensor) -> torch.Tensor:
    """Columns sorted by the set of blocks that keep them, in Gray code: neighbours differ in few blocks."""
    import torch

    key = torch.zeros(kept.shape[1], dtype=torch.int64)
    bit = torch.zeros(kept.shape[1], dtype=torch.bool)
    for block in kept[kept.sum(1).argsort(stable=True)][:63]:
        bit = bit ^ block
        key = 2 * key + bit
    return key.argsort(stable=True)


def orders(kept: torch.Tensor, masses: Masses) -> dict[str, torch.Tensor]:
    import torch

    return {
        "natural": torch.arange(kept.shape[1]),
        "by count": kept.sum(0).argsort(stable=True),
        "by mass": masses.mass.amax(0).argsort(stable=True),
        "by blocks": by_blocks(kept),
    }


# ---- the schedules


@dataclass(frozen=True)
class Count:
    """One schedule at one budget: shares of the dense dW, NVD, bytes, launches."""

    schedule: str
    work: float
    total: float
    sums: float
    operands: float
    scratch: int
    launches: int


def schedules(kept: torch.Tensor, ordered: dict[str, torch.Tensor], d: int) -> list[Count]:
    """Every schedule of dW for these lists and hidden states of width `d`."""
    blocks, v = kept.shape
    share = list_work(kept, 1, v, MMA)
    entries = int(kept.sum())
    slab = min(max(L2_SLAB // (4 * d) // MMA, 1) * MMA, v)  # columns
    slabs = -(-v // slab)

    def parts(k: float) -> int:
        return -(-round(2 * BLOCK * kept.numel() * k) // WORKSPACE)

    def count(name: str, work: float, width: int = 128, k: float = share, lists: int = 4 * entries) -> Count:
        """Without partial sums."""
        scratch = min(round(2 * BLOCK * kept.numel() * k), WORKSPACE) + lists
        across = 128 if width >= 128 else 256  # of D: what registers have room for
        operands = 64 * work * (width + across) / (width * across)
        return Count(name, work, 2 + 4 * k + 2 * work, 1.0, operands, scratch, 2 * parts(k))

    def tiles(name: str, width: int) -> Count:
        work = tile_work(kept, ordered[name], width)
        pairs = round(work * kept.numel() / width)  # each with its block, where its columns begin, which they are
        lists = 4 * entries + 4 * v + pairs * (8 + width // 8)
        return count(f"tiles of {width}, {name}", work, width, lists=lists)

    def adding(name: str, work: float, visits: int, held: int, launches: int) -> Count:
        """`visits`: columns whose fp32 partial sums are read and written; `held`: how many there is room for."""
        plain = count(name, work)
        sums = (8 * visits + 10 * v) / (2 * v)  # zeros, visits, read in the end, dW
        return replace(plain, sums=sums, scratch=plain.scratch + 4 * d * held, launches=launches)

    found = [
        count("dense", 1.0, k=1.0, lists=0),
        *(tiles(name, 128) for name in ordered),
        tiles("by blocks", 64),
        tiles("by blocks", 32),
        adding("scatter in the tile", list_work(kept, 1, 128, 16), entries, slab, 2 * slabs),
        adding("scatter in the slab", list_work(kept, 1, slab, MMA), entries, slab, (1 + blocks) * slabs),
    ]
    if blocks > REGROUPED:
        work = (
            sum(tile_work(part, by_blocks(part), 128) * part.numel() for part in kept.split(REGROUPED)) / kept.numel()
        )
        visits = int(unions(kept, REGROUPED).sum())
        launches = 2 * max(parts(share), -(-blocks // REGROUPED))
        found.append(adding(f"tiles of 128, by blocks, anew every {REGROUPED} blocks", work, visits, v, launches))
    group = 1
    while group < blocks:
        work, visits = list_work(kept, group, v, MMA), int(unions(kept, group).sum())
        found.append(adding(f"union of {group}", work, visits, v, 2 * max(parts(share), -(-blocks // group))))
        group *= 2
    return [*found, count("union of all", list_work(kept, blocks, v, MMA))]


# ---- the report


@dataclass(frozen=True)
class Result:
    """One set of rows: by budget the columns kept, the tiles' work by order and width, the schedules."""

    label: str
    kept: dict[str, float]
    tiles: dict[str, dict[str, list[float]]]
    schedules: dict[str, list[Count]]


def examine(label: str, masses: Masses, d: int) -> Result:
    result = Result(label, {}, {}, {})
    for name, budget in BUDGETS.items():
        kept = keep(masses, budget)
        result.kept[name] = float(kept.float().mean())
        ordered = orders(kept, masses)
        result.tiles[name] = {
            order: [tile_work(kept, columns, width) for width in WIDTHS] for order, columns in ordered.items()
        }
        result.schedules[name] = schedules(kept, ordered, d)
    return result


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def result_section(result: Result) -> str:
    kept = ", ".join(f"{_percent(share)} % at {name}" for name, share in result.kept.items())
    tiles = [
        [order, *(_percent(share) for name in BUDGETS for share in result.tiles[name][order])]
        for order in result.tiles[MIDDLE]
    ]
    rows = []
    for same in zip(*(result.schedules[name] for name in BUDGETS), strict=True):
        middle = same[list(BUDGETS).index(MIDDLE)]
        rows.append(
            [
                middle.schedule,
                *(_percent(count.work) for count in same),
                *(f"{count.total:.2f}" for count in same),
                f"{middle.sums:.1f}",
                f"{middle.operands:.2f}",
                report.mib(middle.scratch),
                str(middle.launches),
            ]
        )
    each = list(BUDGETS)
    head = ["schedule", *(f"dW, %, {b}" for b in each), *(f"in all, {b}" for b in each)]
    return "\n\n".join(
        [
            f"### {result.label}\n\nKept: {kept}. Columns of the tiles that a block takes, in % of V:",
            report.markdown(["order", *(f"{b}, {width}" for b in each for width in WIDTHS)], tiles),
            report.markdown([*head, "sums", "operands", "scratch, MiB", "launches"], rows),
        ]
    )


def bounds(inputs: Inputs) -> dict[str, dict[str, float]]:
    """Columns kept with the bound of a forward in one pass, by how the vocabulary is split and what is known before."""
    ways: dict[str, tuple] = {"mass": (0,), "1 part": (1,)}
    for splits in SPLITS:
        ways[f"{splits} parts"] = (splits,)
        ways[f"{splits} parts, interleaved"] = (splits, True)
        ways[f"{splits} parts, targets of the block"] = (splits, False, "block")
        ways[f"{splits} parts, targets of the batch"] = (splits, False, "batch")
    found = {}
    for name, way in ways.items():
        masses = measure(*inputs, *way)
        found[name] = {budget: float(keep(masses, value).float().mean()) for budget, value in BUDGETS.items()}
    return found


def run(model: Path | None, seq: int, seed: int) -> Section:
    """On the model's text and on made softmaxes of larger vocabularies; without a model a tiny made one alone."""
    results = []
    first: Inputs | None = None
    if model is not None:
        say(f"columns: {model.name}")
        x, weight, target = of_model(model, max(ROWS), seq, seed)
        first = x[: ROWS[0]], weight, target[: ROWS[0]]
        whole = measure(x, weight, target)
        for n in ROWS:
            blocks = n // BLOCK
            v, d = weight.shape
            masses = Masses(whole.mass[:blocks], whole.gradient[:blocks])
            say(f"columns: {n} rows")
            results.append(examine(f"{model.name}, {seq} tokens a text: N={n}, D={d}, V={v}", masses, d))
    for n, d, v in MADE if model is not None else QUICK:
        say(f"columns: made, {n} rows, V={v}")
        inputs = made(n, v, seed)
        first = first or inputs
        results.append(examine(f"Made: N={n}, V={v}, counted for D={d}", measure(*inputs), d))
    assert first is not None
    say("columns: the forward's bound")
    return conclude(results, bounds(first), len(first[2].unique()) / len(first[1]))


def conclude(results: list[Result], bounded: dict[str, dict[str, float]], distinct: float) -> Section:
    rows = [[name, *(_percent(share) for share in shares.values())] for name, shares in bounded.items()]
    text = [CAPTION, ABOUT, *(result_section(result) for result in results)]
    text += [BOUNDS.format(distinct=100 * distinct), report.markdown(["chosen by", *BUDGETS], rows)]
    return Section("columns", "\n\n".join(text), {"cases": [asdict(result) for result in results], "bounds": bounded})
