"""Runs a study again, from the repository: ``python docs/studies/run.py STUDY``. README.md says what each one asks."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import bounds
from training import sections

from cce_inductor.bench.docs import Section, publish
from cce_inductor.instruments.data import CannotRun, find_model

STUDIES = ("bound", "training")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python docs/studies/run.py", description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument(
        "--model", metavar="PATH", help="for training: checkpoint directory or GGUF file [SmolLM2-135M]"
    )
    parser.add_argument("--finished", action="store_true", help="for training: report the runs that are done, no more")
    parser.add_argument("--quick", action="store_true", help="for training: tiny models: does everything run?")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), metavar="DIR", help="[%(default)s]")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write into the pages in DIR too")
    return parser


def _sections(args: argparse.Namespace) -> Iterable[Section]:
    if args.study == "bound":
        return [bounds.run()]
    model = None if args.quick else find_model(args.model).resolve()
    return sections.run(model, args.out / "runs", args.out, not args.finished)


def main(argv: list[str]) -> int:
    """Runs a study; the exit status, which is 2 where it can not run."""
    args = _parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [f"--{name}" for name in ("finished", "quick") if getattr(args, name)]
    command = shlex.join(["python", "docs/studies/run.py", args.study, *chosen])
    try:
        publish(_sections(args), command, "cpu", args.out, args.docs)
    except (CannotRun, ValueError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
