"""Results as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..instruments.memory import MIB
from ..instruments.meters import ITERATIONS
from .calibrated import SOURCE
from .cases import Case
from .contenders import CONTENDERS, EAGER
from .densities import sentence as densities_sentence
from .measure import MODES, Stats, speedup
from .rounds import Result, Row

CAPTION = {
    "cpu": """\
Milliseconds: median (least-most). "x eager": how many times faster than eager, the median of the rounds' ratios.
"of GEMM": the flops that have to be done, per second, as a share of what `torch.mm` reaches at the same sizes in the
same rounds. MiB: peak above inputs and gradients. Error: relative to float64, on the same inputs.""",
    "cuda": f"""\
Milliseconds, of the device: median (least-most) over the rounds, each of which is the median of {ITERATIONS} calls
between CUDA events. "x eager": how many times faster than eager, the median of the rounds' ratios. TFLOP/s: the flops
that have to be done, 2·N·D·V for the loss and 6·N·D·V with the gradients, per second, whatever else a contender
computes; "of GEMM": as a share of what `torch.mm` reaches at the same sizes in the same rounds. MiB: the most that
PyTorch's allocator had given out, above inputs and gradients. Error: relative to float64, on the same inputs.

Activations: `normal` are random; `calibrated` are synthetic, with a softmax as sparse as that of trained models
({SOURCE}); `smollm2` are SmolLM2-135M's own over English text, with its head.""",
}
_COST = {"cpu": ("x eager", "of GEMM", "MiB"), "cuda": ("x eager", "TFLOP/s", "of GEMM", "MiB")}


def head(device: str) -> tuple[str, ...]:
    """The columns of a device's table."""
    cost = _COST[device]
    return ("contender", "loss, ms", *cost, "loss + gradients, ms", *cost, "error of loss", "of dx", "of dW")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; the first column is text, the others are figures."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def milliseconds(samples: Sequence[float] | None) -> str:
    """Median (least-most) of seconds, in milliseconds; "" without any."""
    if not samples:
        return ""
    stats = Stats.of([1000 * s for s in samples])
    digits = 0 if stats.median >= 100 else 1 if stats.median >= 10 else 2
    return f"{stats.median:,.{digits}f} ({stats.least:,.{digits}f}-{stats.most:,.{digits}f})"


def mib(count: int | None) -> str:
    """Bytes in MiB."""
    return "" if count is None else f"{count / MIB:,.0f}" if count >= 10 * MIB else f"{count / MIB:.1f}"


def ratio(base: Sequence[float] | None, samples: Sequence[float] | None) -> str:
    """How many times faster than `base`, both in seconds by round; "" without either."""
    value = speedup(base, samples) if base and samples else None
    return "" if value is None else f"{value:.2f}"


def gemm_share(case: Case, mode: str, samples: Sequence[float] | None, gemm: Sequence[float] | None) -> str:
    """Rate of the necessary flops, relative to the GEMMs' rate on all rows, round by round."""
    value = speedup(gemm, samples) if gemm and samples else None
    return "" if value is None else f"{value * case.counted / case.n:.0%}"


def teraflops(case: Case, mode: str, samples: Sequence[float] | None) -> str:
    """Rate of the necessary flops at the median time."""
    return f"{case.flops(mode) / Stats.of(samples).median / 1e12:,.0f}" if samples else ""


def _cells(result: Result, row: Row) -> list[str]:
    case, eager = result.case, result.row(EAGER)
    if not row.seconds:
        return [row.contender, row.failure, *[""] * (len(head(case.device)) - 2)]
    cells = [row.contender]
    for mode in MODES:
        samples = row.seconds.get(mode)
        cells += [milliseconds(samples), ratio(eager.seconds.get(mode) if eager else None, samples)]
        if case.device == "cuda":
            cells.append(teraflops(case, mode, samples))
        cells += [gemm_share(case, mode, samples, result.gemm.get(mode)), mib(row.memory.get(mode))]
    return cells + [f"{row.error[key]:.1e}" if key in row.error else "" for key in ("loss", "dx", "dW")]


def notes(result: Result) -> list[str]:
    """What does not fit into the table."""
    found = [f"{row.contender}: {row.note}" for row in result.rows if row.note]
    found += [f"{row.contender} did not finish: {row.failure}" for row in result.rows if row.seconds and row.failure]
    if not result.interleaved:
        found.append("the contenders ran in groups, one after the other: they would not fit into memory together")
    return found


def case_section(result: Result) -> str:
    """One case's table, and what does not fit into it."""
    columns = head(result.case.device)
    parts = [f"### {result.case.label}", markdown(columns, [_cells(result, row) for row in result.rows])]
    if result.densities:
        parts.append(densities_sentence(result.densities))
    if notes(result):
        parts.append("\n".join(f"* {note}" for note in notes(result)))
    return "\n\n".join(parts)


def table(results: Sequence[Result]) -> str:
    """Every case's table."""
    return "\n\n".join([CAPTION[results[0].case.device], *(case_section(result) for result in results)])


def gemm_table(results: Sequence[Result]) -> str:
    """What `torch.mm` reaches at each case's sizes."""
    scale, unit = {"cpu": (1e9, "GFLOP/s"), "cuda": (1e12, "TFLOP/s")}[results[0].case.device]
    rows = []
    for result in results:
        case = result.case
        if all(result.gemm.get(mode) for mode in MODES):
            flops = [2 * case.n * case.d * case.v * gemms for gemms in (1, 3)]
            rates = [f / Stats.of(result.gemm[m]).median / scale for f, m in zip(flops, MODES, strict=True)]
            rows.append([case.label, "fp32" if case.dtype == "fp32" else "bf16", *(f"{r:,.0f}" for r in rates)])
    return markdown(["case", "dtype", f"x Wᵀ, {unit}", f"all three GEMMs, {unit}"], rows) if rows else ""


def sweep_table(results: Sequence[Result]) -> str:
    """Loss and gradients, a line per size: time and memory of each contender."""
    names = [row.contender for row in results[0].rows]
    columns = ["N", "D", "V", *(f"{name}, ms" for name in names), *(f"{name}, MiB" for name in names)]
    rows = []
    for result in results:
        case = result.case
        times = [milliseconds(row.seconds.get("gradients")) or row.failure for row in result.rows]
        rows.append(
            [str(case.n), str(case.d), str(case.v), *times, *(mib(row.memory.get("gradients")) for row in result.rows)]
        )
    return markdown(columns, rows)


def about(names: Iterable[str]) -> str:
    """What the contenders' names stand for."""
    return "\n".join(f"* {name}: {CONTENDERS[name].about}" for name in names)
