"""The benchmark from its arguments to its report."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ..instruments.data import CannotRun, find_model
from ..instruments.training import Spec
from . import compile_time, factors, headline, plots, reads, report, step, sweep, tradeoff
from .arguments import PRESETS, parse
from .cases import Case, Shape, cases
from .docs import Section, publish
from .rounds import Options, Result, references, run_case, say

Sections = Iterator[Section]


def _headline(args: argparse.Namespace, options: Options) -> Sections:
    shape: Shape = args.shape[0]
    case = Case(*shape, args.dtype[0])
    yield headline.run(case, replace(options, timeout=headline.TIMEOUT), headline.default_limit())


def _step(args: argparse.Namespace, options: Options) -> Sections:
    model = find_model(args.model[0] if args.model else None).resolve()
    yield step.run(Spec("", str(model), args.dtype[0], batch=step.BATCH, seq=step.SEQ), options)


def _table(args: argparse.Namespace, options: Options) -> Sections:
    """A table, with one of the cases with ignored rows, and one of the GEMMs' rates."""
    results: list[Result] = []
    with references() as reference:
        for case in cases(args.shape, args.dtype, PRESETS[args.preset].ignored, args.quick, args.device):
            results.append(run_case(case, options, reference))
            say("\n" + report.case_section(results[-1]) + "\n")  # hours may follow: show what there is
    main = args.preset == "table"
    parts = {args.device if main else args.preset: False, "ignored": True}
    for name, ignored in parts.items():
        part = [result for result in results if bool(result.case.ignored) == ignored]
        if part:
            picture = args.out / f"{name}.png"
            drawn = plots.cases(part, picture)
            text = f"{report.about(options.contenders)}\n\n{report.table(part)}"
            yield Section(name, text, [r.summary() for r in part], picture if drawn else None)
    if rates := report.gemm_table(results):
        data = [{"case": r.case.label, "seconds": r.gemm} for r in results]
        text = f"What `torch.mm` reaches at the same sizes, in the same run.\n\n{rates}"
        yield Section("gemm" if main else f"{args.preset}-gemm", text, data)


def _sweep(args: argparse.Namespace, options: Options) -> Sections:
    yield sweep.run(options, args.dtype[0], args.quick)


def _sweep_budget(args: argparse.Namespace, options: Options) -> Sections:
    yield tradeoff.run(options, args.dtype, args.quick)


def _compile_time(args: argparse.Namespace, options: Options) -> Sections:
    yield compile_time.run(options, args.quick)


def _reads(args: argparse.Namespace, options: Options) -> Sections:
    yield reads.run(options, args.quick)


def _factors(args: argparse.Namespace, options: Options) -> Sections:
    yield factors.run(options, args.quick, two_heads=args.preset == "two-heads")


RUN: dict[str, Callable[[argparse.Namespace, Options], Sections]] = {
    "table": _table,
    "large": _table,
    "ignored": _table,
    "headline": _headline,
    "step": _step,
    "sweep": _sweep,
    "sweep-budget": _sweep_budget,
    "compile-time": _compile_time,
    "factors": _factors,
    "two-heads": _factors,
    "reads": _reads,
}


def _command(argv: list[str]) -> str:
    """How the results were made, without where they were put."""
    places = {i for i, a in enumerate(argv) if a in ("--out", "--docs")}
    kept = [a for i, a in enumerate(argv) if not {i, i - 1} & places and not a.startswith(("--out=", "--docs="))]
    return shlex.join(["python", "-m", "cce_inductor", "bench", *kept])


def main(argv: list[str]) -> int:
    """Runs a preset; the exit status, which is 2 where it can not run."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    repeat = 1 if args.quick else PRESETS[args.preset].repeat
    with tempfile.TemporaryDirectory(prefix="cce-bench-") as cache:
        options = Options(args.out, Path(cache), args.contender, args.device, repeat)
        try:
            publish(RUN[args.preset](args, options), _command(argv), args.device, args.out, args.docs)
        except (CannotRun, ValueError) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
    say(f"written to {args.out}" + (f" and {args.docs}" if args.docs else ""))
    return 0
