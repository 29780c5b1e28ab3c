"""Fine-tunes a Hugging Face model twice, under torch.compile and under cce_inductor, and compares.

Same weights, same batches, same optimizer; each contender in a process of its own. They load and compile at the same
time, then take turns. Prints a table, writes `report.html` (the graph before and after), `demo.png` (losses, memory
over time), `demo.json` (the figures) and the contenders' logs. The exit status is 1 if nothing was fused or the losses
part by more than rounding, and 2 if the demo could not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..instruments.data import CannotRun, find_model
from ..instruments.training import FUSED, ITEMSIZE, PLAIN, Spec
from .check import problems
from .launch import run_contenders
from .report import in_words, plot, table
from .run import Run

REQUIRED = ("transformers", "accelerate", "gguf", "matplotlib", "tqdm")


def _parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser("python -m cce_inductor demo", description=summary, epilog=details)
    parser.add_argument("--steps", type=int, default=Spec.steps, help="optimizer steps, at least 2 [%(default)s]")
    parser.add_argument("--batch", type=int, default=Spec.batch, help="rows of text per step [%(default)s]")
    parser.add_argument("--seq", type=int, default=Spec.seq, help="tokens per row [%(default)s]")
    parser.add_argument("--model", metavar="PATH", help="checkpoint directory or GGUF file [SmolLM2-135M]")
    parser.add_argument(
        "--dtype",
        choices=list(ITEMSIZE),
        default=Spec.dtype,
        help="of the weights; bf16 is very slow on a CPU without bf16 instructions [%(default)s]",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="[%(default)s]")
    return parser


def _check_requirements() -> None:
    """Raise CannotRun naming what is not installed, before minutes are spent."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRun(f"not installed: {', '.join(missing)}; `pip install 'cce-inductor[demo]'` brings them")
    if not Path("/proc/self/statm").exists():
        raise CannotRun("memory is measured through /proc, which only Linux has")


class Lines:
    """Says what the contenders turn to, and every step, in a line of its own: for a pipe or a file."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._taken: Counter[str] = Counter()

    def __call__(self, contender: str, event: dict[str, Any] | None) -> None:
        if event is not None and event["event"] == "phase":
            self._say(f"{event['phase']} ...")
        elif event is not None and event["event"] == "step":
            self._taken[contender] += 1
            step = f"step {self._taken[contender]} of {self._steps}"
            self._say(f"{contender}: {step}, loss {event['loss']:.4f}, {event['seconds']:.1f} s")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """There is nothing to end."""


class Bar:
    """One bar over the steps of all contenders; says what they are doing, and the last loss."""

    def __init__(self, steps: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=2 * steps, unit="step", dynamic_ncols=True)

    def __call__(self, contender: str, event: dict[str, Any] | None) -> None:
        if event is None:
            self._bar.refresh()
        elif event["event"] == "phase":
            self._bar.set_description(event["phase"])
        elif event["event"] == "step":
            self._bar.set_postfix({contender: f"{event['loss']:.4f}"}, refresh=False)
            self._bar.update()

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def compare(spec: Spec, out: Path) -> tuple[Run, Run]:
    """Both contenders: (plain, fused). Their prints go to a log each in `out`."""
    progress = (Bar if sys.stderr.isatty() else Lines)(spec.steps)
    try:
        plain, fused = run_contenders([replace(spec, contender=name) for name in (PLAIN, FUSED)], out, progress)
    finally:
        progress.close()
    return plain, fused


def main(argv: list[str]) -> int:
    """Runs the demo; the exit status that the module describes."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.steps < 2 or args.batch < 1 or args.seq < 2:
        parser.error("needs --steps 2, --batch 1 and --seq 2 at least")
    begin = time.monotonic()
    try:
        model = find_model(args.model)
        _check_requirements()
        args.out.mkdir(parents=True, exist_ok=True)
        spec = Spec(PLAIN, str(model.resolve()), args.dtype, args.steps, args.batch, args.seq)
        print(f"{model.name}: {args.steps} steps of {args.batch} x {args.seq} tokens, {args.dtype}")
        plain, fused = compare(spec, args.out)
    except CannotRun as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return conclude(plain, fused, args.out, time.monotonic() - begin)


def conclude(plain: Run, fused: Run, out: Path, seconds: float) -> int:
    """Print and save the results; the exit status."""
    found = problems(plain, fused)
    print(f"\n{table(plain, fused)}\n")
    plot(plain, fused, out / "demo.png")
    results = {"plain": plain.summary(), "fused": fused.summary(), "problems": found}
    (out / "demo.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{out / 'demo.png'} and {out / 'demo.json'} written; {seconds / 60:.1f} minutes in all")
    if not found:
        print(f"\n{in_words(plain, fused, out)}")
    for problem in found:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if found else 0
