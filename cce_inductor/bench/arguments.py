"""The command line of the benchmark: a preset, and what of it is to be another."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import step
from .cases import DTYPES, HEADLINE, IGNORED, QUICK_SHAPES, Shape, parse_shape
from .contenders import COMPILE, CONTENDERS, EAGER, OURS, names_on

SUMMARY = "The head and its loss, by every way there is to compute them: time, memory, error."
DETAILS = """\
Each contender has a process of its own; they take turns, so that a machine that slows down slows all of them. Markdown,
JSON and pictures go to --out, and with --docs into the documentation too. OMP_NUM_THREADS sets the threads of all.
"""
FEW = (EAGER, COMPILE, OURS)
MANY = 1000
TABLE = {"shape": MANY, "dtype": MANY, "contender": MANY}
BOTH = ("cpu", "cuda")


@dataclass(frozen=True)
class Preset:
    """What is measured under a name.

    takes: the options that may change it, and how many values each may have. shapes, dtypes, contenders: what it has
    where none is given; without any, all of the device. allowed: the dtypes and the contenders that it can do, where
    those are not all. ignored: the fraction of the rows whose target is ignored. repeat: rounds.
    """

    about: str
    takes: Mapping[str, int] = field(default_factory=dict)
    devices: Sequence[str] = ("cpu",)
    shapes: tuple[Shape, ...] = ()
    dtypes: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    allowed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    ignored: float | None = None
    repeat: int = 5


PRESETS = {
    "table": Preset("every contender at every shape in every dtype", TABLE, BOTH),
    "large": Preset(
        "the larger vocabularies", TABLE, BOTH, ((2048, 576, 49152), (512, 640, 262144)), ("fp32", "bf16"), FEW
    ),
    "ignored": Preset(
        f"a head of which {IGNORED:.0%} of the rows are ignored",
        TABLE,
        BOTH,
        ((1024, 1024, 32768),),
        ("fp32", "bf16"),
        FEW,
        ignored=IGNORED,
    ),
    "headline": Preset(
        "Gemma 2 2B's head under a memory limit: who fits",
        {"shape": 1, "dtype": 1, "contender": MANY},
        shapes=(HEADLINE,),
        dtypes=("bf16",),
        contenders=FEW,
    ),
    "step": Preset(
        "a whole training step of the demo's model",
        {"dtype": 1, "contender": MANY, "model": 1},
        dtypes=("fp32",),
        contenders=tuple(step.CONTENDERS),
        allowed={"dtype": tuple(step.ITEMSIZE), "contender": tuple(step.CONTENDERS)},
    ),
    "sweep": Preset(
        "how cost grows with rows and with the vocabulary",
        {"dtype": 1, "contender": MANY},
        dtypes=("fp32",),
        contenders=FEW,
    ),
    "sweep-budget": Preset(
        "cost against error of every gradient filter", {"dtype": MANY}, BOTH, dtypes=("fp32", "bf16")
    ),
    "compile-time": Preset("what the pass takes of the time to compile a model", repeat=1),
    "factors": Preset("losses with factors and margins, in the graph and in the training loop", repeat=3),
    "two-heads": Preset("losses over two heads: divergences from a frozen one, and EMO", repeat=3),
    "reads": Preset("losses that have to read deferred logits, against plain torch.compile"),
}


def _shape(text: str) -> Shape:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    """All options; which of them go with which preset, `parse` knows."""
    presets = "\n".join(f"  {name:13} {preset.about}" for name, preset in PRESETS.items())
    made = argparse.ArgumentParser(
        "python -m cce_inductor bench",
        description=SUMMARY,
        epilog=f"presets:\n{presets}\n\n{DETAILS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("preset", nargs="?", choices=list(PRESETS), default="table", metavar="PRESET", help="see below [%(default)s]")
    add("--device", choices=BOTH, default="cpu", help="[%(default)s]")
    add("--shape", action="append", type=_shape, metavar="N,D,V", help="or a model's name; repeatable")
    add("--dtype", action="append", choices=DTYPES, help="repeatable; autocast: fp32 weights under bf16")
    known = dict.fromkeys((*CONTENDERS, *step.CONTENDERS))
    names = "; ".join(known)
    add("--contender", action="append", choices=list(known), metavar="NAME", help=f"repeatable; of {names}")
    add("--model", action="append", metavar="PATH", help="for step: checkpoint directory or GGUF file [SmolLM2-135M]")
    add("--quick", action="store_true", help="one round at a tiny size: does everything run?")
    add("--out", type=Path, default=Path("bench-out"), metavar="DIR", help="[%(default)s]")
    add("--docs", type=Path, metavar="DIR", help="write into DIR/benchmarks.md too; cuda: DIR/benchmarks-gpu.md")
    return made


def _missing(device: str) -> str:
    """Why nothing can be measured here, or ""."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return f"--device cuda: torch {torch.__version__} finds no CUDA GPU here"
    if device == "cpu" and not Path("/proc/self/statm").exists():
        return "--device cpu: memory is measured through /proc, which only Linux has"
    if importlib.util.find_spec("matplotlib") is None:
        return "not installed: matplotlib; `pip install 'cce-inductor[bench]'` brings it"
    return ""


def _unfit(args: argparse.Namespace) -> str:
    """What of the arguments does not go with their preset, or ""."""
    preset = PRESETS[args.preset]
    if args.device not in preset.devices:
        return f"{args.preset} goes with --device {' or '.join(preset.devices)}"
    allowed = {"contender": names_on(args.device), **preset.allowed}
    for option in ("shape", "dtype", "contender", "model"):
        given, most = getattr(args, option) or [], preset.takes.get(option, 0)
        if len(given) > most:
            return f"{args.preset} takes {'one' if most else 'no'} --{option}"
        other = [value for value in given if value not in allowed.get(option, given)]
        if other:
            return f"{args.preset} on {args.device} has no {option} {other[0]}, it has {', '.join(allowed[option])}"
    return ""


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, with the preset's values where none are given: `shape`, `dtype` and `contender` are tuples.

    Ends the process with a message where the arguments, or what is installed, will not do.
    """
    made = parser()
    args = made.parse_args(argv)
    reason = _missing(args.device) or _unfit(args)
    if reason:
        made.error(reason)
    preset = PRESETS[args.preset]
    args.shape = tuple(args.shape or (preset.shapes and (QUICK_SHAPES if args.quick else preset.shapes)))
    args.dtype = tuple(args.dtype or preset.dtypes)
    chosen = args.contender or preset.contenders or names_on(args.device)
    args.contender = tuple(name for name in names_on(args.device) if name in chosen)
    return args
