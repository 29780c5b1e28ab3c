"""What the gradient filters cost and how far off they are: every filter on the same hidden states.

A family of filters runs with eager and both exact schedules in rounds of its own, so that its ratios are to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from . import plots, report, smollm2
from .cases import CALIBRATED, FLAT, REAL, SMOLLM2, Case, Shape
from .contenders import COMPILE, EAGER, EXACT, FAMILIES, KNOWN, LATE, short
from .docs import Section
from .measure import QUANTILES, speedup
from .rounds import Options, Result, Row, references, run_case, say

SHAPE: Shape = (2048, *SMOLLM2[1:])
QUICK: Shape = (256, 64, 4096)
TARGETS = (2.0**-9, 1e-2)
BASELINES = (EAGER, EXACT, LATE)


def _members(*families: str) -> tuple[str, ...]:
    return tuple(contender.name for family in families for contender in FAMILIES[family])


Groups = tuple[tuple[str, ...], ...]
# What runs in the same rounds; eps, without a kernel, is not timed.
GROUPS: Groups = (
    (*BASELINES, COMPILE, *_members("budget")),
    (*BASELINES, *_members("unbiased")),
    _members("eps", "eps, sorted"),
)
FEW = (
    *(f"budget {short(tau)}" for tau in TARGETS),
    f"unbiased {short(2.0**-9)}",
    f"eps {short(2.0**-12)}",
    f"eps {short(2.0**-12)}, sorted",
)


def _few(group: tuple[str, ...]) -> tuple[str, ...]:
    """Without most of the filters."""
    return tuple(name for name in group if KNOWN[name].filter is None or name in FEW)


FLAT_GROUP = (*BASELINES, *_few(_members("budget", "unbiased")))

CAPTION = f"""\
N={{n}}, D={{d}}, V={{v}}, {{data}}; loss and gradients. Milliseconds: median (least-most). "÷": the time divided by
eager's, or by that of {EXACT} (which may form its gradients in the forward) or of {LATE}: the median of the rounds'
ratios, in the rounds of its own family. NVD: multiply-adds over N·V·D, counted: 6 for eager, 8 for exact gradients
whose logits are computed twice, for eps, which computes the logits of every tile, 4 + 4·(tiles alive), as published,
and 2 + 6·(columns kept) for lists of columns whose logits are computed again (where gradients are formed in the
forward, logits are kept, and it is 2·(columns kept) less). eps has no kernel here: its time would be that of an eager
implementation and is left out. Kept: columns per block of 128 rows (sampled ones included), for eps tiles of 128 x 128.
In full: blocks of which nothing is dropped. Dropped: its share of the dense gradient's mass, under "unbiased" what is
left to sampling; worst row: the largest share that a row loses of its own.

Errors are relative to float64 on the same inputs: of dx and dW as a whole (Frobenius), and quantiles over the rows of
dW, which are words, rare ones among them; zero: rows of dW that are exactly zero."""

Results = dict[str, list[Result]]  # by dtype, one for each of GROUPS


def run(options: Options, dtypes: Sequence[str], quick: bool) -> Section:
    """Every filter in every dtype, on the model's hidden states where the model is there, and on a flat softmax."""
    reason = smollm2.missing()
    shape = QUICK if quick else SHAPE
    kind = CALIBRATED if quick or reason else REAL
    if reason and not quick:
        say(f"  synthetic hidden states: {reason}")
    options = replace(options, gemm=False, filters=True)
    groups: Groups = (*GROUPS, FLAT_GROUP)
    if quick:
        groups = tuple(_few(group) for group in groups)
    found: Results = {}
    flat: list[Result] = []
    with references() as reference:
        for dtype in dtypes:
            case = Case(*shape, dtype, device=options.device, activations=kind)
            found[dtype] = [run_case(case, replace(options, contenders=names), reference) for names in groups[:-1]]
            # On the flat softmax time is all there is to see.
            plain = replace(options, error=False, filters=False, contenders=groups[-1])
            flat.append(run_case(replace(case, activations=FLAT), plain))
    return conclude(found, flat, options)


# ---- the report


def _over(result: Result, base: str, row: Row) -> float | None:
    """Time of a row over that of another contender, both with gradients."""
    other = result.row(base)
    samples, reference = row.seconds.get("gradients"), other.seconds.get("gradients") if other else None
    return speedup(samples, reference) if samples and reference else None


def work(row: Row) -> float | None:
    """In NVD, by what was kept."""
    name, kept = row.contender, row.filter.get("kept")
    if name in (EAGER, COMPILE, LATE):
        return 8.0 if name == LATE else 6.0
    if kept is None:
        return None
    return 2 + 6 * kept if KNOWN[name].kernel else 4 + 4 * kept


def rows_of(results: Sequence[Result]) -> list[tuple[Result, Row]]:
    """Every contender once, with the rounds that it ran in."""
    found: dict[str, tuple[Result, Row]] = {}
    for result in results:
        for row in result.rows:
            found.setdefault(row.contender, (result, row))
    return list(found.values())


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def cost_table(results: Sequence[Result]) -> str:
    """Time, work and what was kept, of every contender."""
    columns = ["contender", "ms", "÷ eager", f"÷ {EXACT}", "÷ late", "NVD", "kept", "in full", "dropped", "worst row"]
    lines = []
    for result, row in rows_of(results):
        if row.failure:
            lines.append([row.contender, row.failure, *[""] * (len(columns) - 2)])
            continue
        ratios = [_number(_over(result, base, row), ".2f") for base in BASELINES]
        shares = [_number(row.filter.get(name), form) for name, form in _NUMBERS.items()]
        time = report.milliseconds(row.seconds.get("gradients"))
        lines.append([row.contender, time, *ratios, _number(work(row), ".2f"), *shares])
    return report.markdown(columns, lines)


_NUMBERS = {"kept": ".1%", "full": ".1%", "dropped": ".1e", "worst": ".1e"}


def error_table(results: Sequence[Result]) -> str:
    """Errors of the gradients, and of single rows of dW."""
    columns = ["contender", "dx", "dW", *(f"rows of dW, {100 * q:g} %" for q in QUANTILES), "zero"]
    lines = []
    for _, row in rows_of(results):
        if row.error:
            errors = [row.error["dx"], row.error["dW"], *(row.rows.get(str(q)) for q in QUANTILES)]
            lines.append([row.contender, *(_number(e, ".1e") for e in errors), _number(row.rows.get("zero"), ".2%")])
    return report.markdown(columns, lines)


def target_table(found: Results) -> str:
    """The two budgets that are to be held against eager in one place."""
    columns = ["budget", "dtype", "÷ eager", f"÷ {EXACT}", "dx", "eager's own", "dW", "eager's own"]
    lines = []
    for tau in TARGETS:
        for dtype, results in found.items():
            result = results[0]
            row, eager = result.row(f"budget {short(tau)}"), result.row(EAGER)
            if row and eager:
                ratios = [_number(_over(result, base, row), ".2f") for base in (EAGER, EXACT)]
                errors = [_number(r.error.get(of), ".1e") for of in ("dx", "dW") for r in (row, eager)]
                lines.append([short(tau), dtype, *ratios, *errors])
    return report.markdown(columns, lines)


def flat_table(flat: Sequence[Result]) -> str:
    """Times on the flat softmax over those of the exact schedules."""
    columns = ["contender", *(f"÷ {base}, {result.case.dtype}" for result in flat for base in (EXACT, LATE))]
    lines = []
    for same in zip(*(result.rows for result in flat), strict=True):
        ratios = [_over(flat[i], base, row) for i, row in enumerate(same) for base in (EXACT, LATE)]
        lines.append([same[0].contender, *(_number(ratio, ".2f") for ratio in ratios)])
    return report.markdown(columns, lines)


def points(results: Sequence[Result]) -> dict[str, list[dict[str, Any]]]:
    """For the picture: by family each contender's work in NVD, time over eager's, and errors."""
    names = {name: (name,) for name in BASELINES} | {family: _members(family) for family in FAMILIES}
    by_name = {row.contender: (result, row) for result, row in rows_of(results)}
    found: dict[str, list[dict[str, Any]]] = {}
    for series, members in names.items():
        for result, row in (by_name[name] for name in members if name in by_name):
            if row.error:
                point = {"work": work(row), "time": _over(result, EAGER, row), **row.error}
                found.setdefault(series, []).append(point)
    return found


def conclude(found: Results, flat: list[Result], options: Options) -> Section:
    """Everything as a section, with a picture of errors over cost."""
    case = next(iter(found.values()))[0].case
    data = {REAL: "SmolLM2-135M's hidden states over English text"}.get(case.activations, "synthetic, `calibrated`")
    parts = [CAPTION.format(n=case.n, d=case.d, v=case.v, data=data)]
    parts.append(f"### Budgets against eager\n\n{target_table(found)}")
    for dtype, results in found.items():
        parts += [f"### {dtype}", cost_table(results), error_table(results)]
        notes = [note for result in results for note in report.notes(result)]
        parts += ["\n".join(f"* {note}" for note in dict.fromkeys(notes))] if notes else []
    parts.append(f"### A flat softmax, of which nothing can be dropped\n\n{flat_table(flat)}")
    picture = options.output / "sweep-budget.svg"
    plots.tradeoff({dtype: points(results) for dtype, results in found.items()}, picture)
    summary = {dtype: [result.summary() for result in results] for dtype, results in found.items()}
    return Section("sweep-budget", "\n\n".join(parts), {**summary, "flat": [r.summary() for r in flat]}, picture)
