"""The benchmark from its arguments to its report."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from . import bounds, columns, compile_time, headline, machine, plots, reads, report, step, sweep, tradeoff
from .arguments import parse, table_cases
from .cases import HEADLINE, QUICK_SHAPES, Case, Shape
from .contenders import names_on
from .docs import Section, file_name, save, write
from .launch import GIB
from .rounds import Options, Result, references, run_case, say


def _options(args: argparse.Namespace, cache: Path) -> Options:
    return Options(
        output=args.output,
        cache=cache,
        contenders=tuple(name for name in names_on(args.device) if not args.contender or name in args.contender),
        device=args.device,
        repeat=args.repeat,
        threads=args.threads,
        timeout=args.timeout or 300.0,
        error=not args.no_error,
        gemm=not args.no_gemm,
    )


def _headline(args: argparse.Namespace, options: Options) -> Section:
    shape: Shape = args.shape[0] if args.shape else QUICK_SHAPES[0] if args.quick else HEADLINE
    dtype = args.dtype[0] if args.dtype else "bf16"
    limit = int(args.memory_limit_gib * GIB) if args.memory_limit_gib else headline.default_limit()
    chosen = options.contenders if args.contender else headline.DEFAULT_CONTENDERS
    case = Case(*shape, dtype, args.ignored or 0.0, args.seed)
    return headline.run(case, replace(options, contenders=chosen, timeout=args.timeout or 3600.0), limit)


def _step(args: argparse.Namespace, options: Options) -> Section:
    from ..demo.data import find_model
    from ..demo.run import Spec

    model = str(find_model(args.model).resolve())
    dtype = args.dtype[0] if args.dtype else "fp32"
    spec = Spec("", model, dtype, batch=args.batch, seq=args.seq, seed=args.seed)
    return step.run(spec, options)


def _columns(args: argparse.Namespace) -> Section:
    from ..demo.data import find_model

    return columns.run(None if args.quick else find_model(args.model).resolve(), args.seq, args.seed)


def _training(args: argparse.Namespace) -> Iterator[Section]:
    import torch

    from ..demo.data import find_model
    from .training.sections import run

    if args.threads:
        torch.set_num_threads(args.threads)
    model = None if args.quick else find_model(args.model).resolve()
    return run(model, args.output / "runs", args.output, args.seed, not args.finished)


def _table(args: argparse.Namespace, options: Options) -> Iterator[Section]:
    """The main table, the cases with ignored rows, and the GEMMs' rates."""
    results: list[Result] = []
    with references() as reference:
        for case in table_cases(args):
            results.append(run_case(case, options, reference if options.error else None))
            say("\n" + report.case_section(results[-1]) + "\n")  # hours may follow: show what there is
    for name, part in ((args.device, [r for r in results if not r.case.ignored]), ("ignored", _ignored(results))):
        if part:
            picture = args.output / f"{name}.png"
            drawn = plots.cases(part, picture)
            text = f"{report.about(options.contenders)}\n\n{report.table(part)}"
            yield Section(name, text, [r.summary() for r in part], picture if drawn else None)
    if rates := report.gemm_table(results):
        data = [{"case": r.case.label, "seconds": r.gemm} for r in results]
        yield Section("gemm", f"What `torch.mm` reaches at the same sizes, in the same run.\n\n{rates}", data)


def _ignored(results: list[Result]) -> list[Result]:
    return [result for result in results if result.case.ignored]


def _sections(args: argparse.Namespace, options: Options) -> Iterator[Section]:
    if args.sweep:
        dtype = args.dtype[0] if args.dtype else "fp32"
        chosen = options.contenders if args.contender else sweep.CONTENDERS
        yield sweep.run(sweep.options_for(options, chosen), dtype, args.seed, args.quick)
    if args.sweep_budget:
        yield tradeoff.run(options, args.dtype or tradeoff.DTYPES, args.seed, args.quick)
    if args.headline:
        yield _headline(args, options)
    if args.step:
        yield _step(args, options)
    if args.compile_time:
        yield compile_time.run(options, args.quick)
    if args.reads:
        yield reads.run(options, args.quick)
    if args.columns:
        yield _columns(args)
    if args.bound:
        yield bounds.run()
    if args.training:
        yield from _training(args)
    cpu = args.sweep or args.headline or args.step or args.columns or args.compile_time or args.training or args.reads
    if not (cpu or args.sweep_budget or args.bound):
        yield from _table(args, options)


def _command(argv: list[str]) -> str:
    """How the results were made, without where they were put."""
    places = {i for i, a in enumerate(argv) if a in ("--output", "--docs")}
    kept = [a for i, a in enumerate(argv) if not {i, i - 1} & places and not a.startswith(("--output=", "--docs="))]
    return shlex.join(["python", "-m", "cce_inductor", "bench", *kept])


def _name(section: str, args: argparse.Namespace) -> str:
    if not args.section:
        return section
    return args.section if section == args.device else f"{args.section}-{section}"


def main(argv: list[str]) -> int:
    from ..demo.data import DemoError

    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    about = machine.describe(args.threads, args.device)
    command = _command(argv)
    with tempfile.TemporaryDirectory(prefix="cce-bench-") as cache:
        try:
            for section in _sections(args, _options(args, Path(cache))):
                finished = replace(
                    section,
                    name=_name(section.name, args),
                    text=f"{machine.sentence(about)}\n\n{section.text}",
                    data={"command": command, "machine": about, section.name: section.data},
                )
                print(f"## {finished.name}\n\n{finished.text}\n", flush=True)
                (args.output / f"{finished.name}.md").write_text(finished.text + "\n")
                save(finished, args.output / file_name(args.device, finished.name))
                if args.docs:
                    write(finished, args.docs, args.device, command)
        except (DemoError, ValueError) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
    say(f"written to {args.output}" + (f" and {args.docs}" if args.docs else ""))
    return 0
