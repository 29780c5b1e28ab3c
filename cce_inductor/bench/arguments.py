"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

from . import step
from .cases import ACTIVATIONS, DTYPES, HEADLINE, SHAPES, Case, Shape, cases, parse_shape
from .contenders import CONTENDERS, names_on

SUMMARY = "The head and its loss, by every way there is to compute them: time, memory, error."
DETAILS = """\
Without --bound, --columns, --compile-time, --headline, --reads, --step, --sweep, --sweep-budget or --training: a table
of every contender at every shape.
Each contender has a process of its own; they take turns, so that a machine that slows down slows all of them. Markdown,
JSON and pictures go to --output, and with --docs into the documentation too."""


def _number(kind: Callable, least: float, below: float = math.inf) -> Callable:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < below:
            span = f"at least {least}" if below == math.inf else f"at least {least} and below {below}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {span}")
        return value

    return parse


def _shape(text: str) -> Shape:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m cce_inductor bench", description=SUMMARY, epilog=DETAILS)
    add = made.add_argument
    shapes = "; ".join(f"{device}: {' '.join(','.join(map(str, s)) for s in of)}" for device, of in SHAPES.items())
    add("--device", choices=["cpu", "cuda"], default="cpu", help="[%(default)s]")
    add("--shape", action="append", type=_shape, metavar="N,D,V", help=f"or a model's name; repeatable [{shapes}]")
    add("--dtype", action="append", choices=DTYPES, help="repeatable; autocast: fp32 weights [all; cuda: bf16]")
    add("--activations", action="append", choices=ACTIVATIONS, help="repeatable [normal; cuda: all that apply]")
    names = "; ".join(CONTENDERS)
    add("--contender", action="append", choices=list(CONTENDERS), metavar="NAME", help=f"repeatable [all of {names}]")
    add("--ignored", type=_number(float, 0, 1), metavar="F", help="fraction of the rows whose target is ignored")
    add("--repeat", type=_number(int, 1), default=5, metavar="K", help="repetitions [%(default)s]")
    add("--seed", type=_number(int, 0), default=0, help="of the inputs [%(default)s]")
    add("--threads", type=_number(int, 1), metavar="K", help="of every contender [PyTorch's choice]")
    add("--timeout", type=_number(float, 1), metavar="S", help="seconds for a repetition [300; --headline 3600]")
    add("--no-error", action="store_true", help="do not compute the float64 reference")
    add("--no-gemm", action="store_true", help="do not measure the GEMMs' rate")
    add("--quick", action="store_true", help="tiny shapes: does everything run?")
    add("--output", type=Path, default=Path("bench-out"), metavar="DIR", help="[%(default)s]")
    add("--docs", type=Path, metavar="DIR", help="write into DIR/benchmarks.md too; cuda: DIR/benchmarks-gpu.md")
    add("--section", metavar="NAME", help="what to call the table, so that another one keeps its place in --docs")
    add("--sweep", action="store_true", help="how cost grows with N and with V")
    add("--sweep-budget", action="store_true", help="cost against error of every gradient filter")
    add("--bound", action="store_true", help="bytes that a gradient filter keeps between the passes, by N and V")
    add("--compile-time", action="store_true", help="what the pass takes of the time to compile a model")
    add("--reads", action="store_true", help="losses that have to read deferred logits, against plain torch.compile")
    add("--columns", action="store_true", help="schedules of dW for column lists, counted on a model's softmax")
    add("--finished", action="store_true", help="for --training: report the runs that are done, and do no more")
    add("--training", action="store_true", help="what gradient filters do to training: hours; goes on where it was")
    headline = ",".join(map(str, HEADLINE))
    add("--headline", action="store_true", help=f"{headline} under a memory limit: who fits")
    add("--memory-limit-gib", type=_number(float, 0.1), metavar="G", help="for --headline [70 %% of RAM, at most 16]")
    add("--step", action="store_true", help="a whole training step of the demo's model")
    add(
        "--model",
        metavar="PATH",
        help="for --step, --columns, --training: checkpoint directory or GGUF file [SmolLM2-135M]",
    )
    add("--batch", type=_number(int, 1), default=step.BATCH, help="for --step: rows of text [%(default)s]")
    add("--seq", type=_number(int, 2), default=step.SEQ, help="for --step, --columns: tokens per row [%(default)s]")
    return made


def _cuda_missing() -> str:
    import torch

    return "" if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA GPU here"


def _cpu_missing() -> str:
    return "" if Path("/proc/self/statm").exists() else "memory is measured through /proc, which only Linux has"


def table_cases(args: argparse.Namespace) -> list[Case]:
    """The cases of the main table."""
    return cases(args.shape, args.dtype, args.ignored, args.seed, args.quick, args.device, args.activations)


def parse(argv: list[str]) -> argparse.Namespace:
    """Ends with a message where the arguments, or what is installed, will not do."""
    made = parser()
    args = made.parse_args(argv)
    only_cpu = (
        args.columns or args.compile_time or args.headline or args.reads or args.step or args.sweep or args.training
    )
    special = only_cpu or args.sweep_budget or args.bound
    reason = _cuda_missing() if args.device == "cuda" else _cpu_missing()
    if reason:
        made.error(f"--device {args.device}: {reason}")
    if args.device == "cuda" and only_cpu:
        made.error(
            "--columns, --compile-time, --headline, --reads, --step, --sweep and --training go with --device cpu"
        )
    elsewhere = set(args.contender or ()) - set(names_on(args.device))
    if elsewhere:
        made.error(f"--device {args.device} has no contender {', '.join(sorted(elsewhere))}")
    if special and args.activations:
        made.error("--activations goes with the table")
    if not special and not table_cases(args):
        made.error("--activations smollm2 goes with --shape N,576,49152")
    if importlib.util.find_spec("matplotlib") is None:
        made.error("not installed: matplotlib; `pip install 'cce-inductor[bench]'` brings it")
    if special and args.ignored is not None and not args.headline:
        made.error("--ignored goes with the table and with --headline")
    if args.shape and special and not args.headline:
        made.error("--shape goes with the table and with --headline")
    if args.headline and args.shape and len(args.shape) > 1:
        made.error("--headline takes one --shape")
    if only_cpu and args.dtype and len(args.dtype) > 1:
        made.error("--headline, --step and --sweep take one --dtype")
    if args.sweep_budget and args.contender:
        made.error("--contender does not go with --sweep-budget: its contenders are the filters")
    if args.sweep_budget and args.no_error:
        made.error("--no-error does not go with --sweep-budget: errors are half of what it shows")
    if args.step and args.dtype == ["autocast"]:
        made.error("--step takes fp32 or bf16: the dtype of the model's weights")
    if args.step and args.contender and not set(args.contender) <= set(step.CONTENDERS):
        made.error(f"--step has {', '.join(step.CONTENDERS)} as contenders")
    if args.memory_limit_gib and not args.headline:
        made.error("--memory-limit-gib goes with --headline")
    return args
