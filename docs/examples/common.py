"""What the programs of this folder share: arguments, a process for each backend, the table, the picture, the verdict.

A program is a `Program`: a `task` that trains, and an `effect` that its source describes. `main` trains the task
for 20 steps under plain torch.compile and under cce_inductor, each in a process of its own, measures the effect in
a third one under cce_inductor alone, and prints and draws both. The exit status is 1 if the losses part by more
than rounding, nothing was fused, or the effect's own arithmetic failed a check, and 2 if the program could not run.
Whether the effect was seen is printed and does not change the status.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cce_inductor.demo.check import TOLERANCES
from cce_inductor.instruments import machine, memory
from cce_inductor.instruments.data import CannotRun
from cce_inductor.instruments.memory import ALLOCATOR_ENV, MIB
from cce_inductor.instruments.meters import RssPeak
from cce_inductor.instruments.process import environment
from cce_inductor.instruments.training import FUSED, PLAIN, optimizer_tensors

if TYPE_CHECKING:
    from torch import Tensor

EFFECT = "effect"
FOLDER = "EXAMPLES_FOLDER"  # the variable that names the folder of a run
SITE = ("loss", "rows", "vocab", "fused", "kernel", "reason")  # what is told of a site
SHOWN = (0, 1, 4, 9, 14, 19, 49, 99)  # steps whose losses are printed


@dataclass
class Task:
    """Something that trains. loss: of a batch's tensors, a scalar; it is what is compiled. logits: bytes of one tensor.

    dynamic: whether it is compiled for all sizes at once.
    """

    loss: Callable[..., Tensor]
    batches: Iterator[tuple[Tensor, ...]]
    optimizer: Any
    logits: int
    dynamic: bool = False


@dataclass(frozen=True)
class Effort:
    """How much to do: the seeds, and whether there is time for the long version."""

    seeds: tuple[int, ...]
    full: bool

    def choose(self, short: Any, full: Any) -> Any:
        """One of two sizes."""
        return full if self.full else short


@dataclass
class Claim:
    """What the source says, as it would show here, and whether it did, by seed. note: its figure, or what was tried."""

    text: str
    seen: list[bool]
    note: str = ""

    def __str__(self) -> str:
        count = sum(self.seen)
        verdict = "seen" if count == len(self.seen) else "not seen" if not count else "seen in part"
        note = f" ({self.note})" if self.note else ""
        return f"{verdict}, {count} of {len(self.seen)} seeds: {self.text}{note}"


@dataclass
class Panel:
    """One drawing: (label, x, y) for each line. bars: x are names."""

    title: str
    x: str
    y: str
    lines: list[tuple[str, list[Any], list[float]]]
    log: str = ""  # the axes that are logarithmic: "", "x", "y" or "xy"
    bars: bool = False


@dataclass
class Effect:
    """What was measured: a table whose first row is its head, claims, drawings, further sentences, failed checks."""

    table: list[list[str]]
    claims: list[Claim]
    panels: list[Panel]
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Program:
    """What a program is about. doc: its docstring. needs: modules, and how each is installed.

    tolerance: how far the losses may part, relative to them, as a multiple of what fp32 training may (demo/check.py).
    """

    file: str
    doc: str
    task: Callable[[int], Task]
    effect: Callable[[Effort], Effect]
    needs: dict[str, str] = field(default_factory=dict)
    tolerance: float = 1.0
    full_steps: int = 20  # of the comparison, with --full

    @property
    def name(self) -> str:
        """The file's, without its ending."""
        return Path(self.file).stem


def compiled(fn: Callable, backend: str = FUSED, dynamic: bool = False, **options: Any) -> Callable:
    """`fn` under a backend; options are cce_inductor's. Without `dynamic` every size is compiled for itself."""
    import torch

    import cce_inductor

    torch._dynamo.config.recompile_limit = 64  # variants of one program share its code
    if backend == PLAIN:
        return torch.compile(fn, dynamic=dynamic)
    return torch.compile(fn, backend=cce_inductor.cce_backend, dynamic=dynamic, options=options or None)


def train(
    loss: Callable, optimizer: Any, batches: Iterator[tuple], steps: int, each: Callable | None = None
) -> list[float]:
    """The losses of so many steps; each(step) is called after every one."""
    losses = []
    for step, batch in zip(range(steps), batches, strict=False):
        value = loss(*batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
        if each:
            each(step)
    return losses


def adam(parameters: Iterable, lr: float) -> Any:
    """AdamW without weight decay."""
    import torch

    return torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def renew(model: Any, make: Callable[[], Any], seed: int) -> None:
    """Gives a model the weights that `make` starts with under this seed: what is compiled for it stays valid."""
    import torch

    torch.manual_seed(seed)
    model.load_state_dict(make().state_dict())
    model.zero_grad()


def shared(name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, made once for all processes of a run; torch.save keeps it."""
    import torch

    path = Path(os.environ[FOLDER], f"{name}.pt")
    if not path.exists():
        torch.save(make(), path)
    return torch.load(path, weights_only=False)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean (least–most) over seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    return statistics.mean(values)


def smoothed(losses: Sequence[float], window: int) -> tuple[list[int], list[float]]:
    """Steps and mean losses of consecutive windows."""
    starts = range(0, len(losses) - window + 1, window)
    return [s + window // 2 for s in starts], [statistics.mean(losses[s : s + window]) for s in starts]


# One backend, in a process of its own.


def _compare(program: Program, backend: str, steps: int) -> dict[str, Any]:
    """Trains the task and tells its losses, its memory in bytes and what was fused."""
    from cce_inductor import record

    task = program.task(0)
    loss = compiled(task.loss, backend, task.dynamic)
    losses, seconds, peaks, rest = [], [], [], 0
    with record.collect() as graphs:
        for step, batch in zip(range(steps), task.batches, strict=False):
            start = time.monotonic()
            with RssPeak() as peak:
                value = loss(*batch)
                value.backward()
                task.optimizer.step()
                task.optimizer.zero_grad(set_to_none=False)
            losses.append(float(value.detach()))
            del value, batch
            seconds.append(time.monotonic() - start)
            peaks.append(peak.value)
            if step == 0:
                memory.trim()
                rest = memory.rss()
    state = memory.tensor_bytes(optimizer_tensors(task.optimizer))
    sites = [{name: getattr(site, name) for name in SITE} for graph in graphs for site in graph.sites]
    return {
        "losses": losses,
        "seconds": seconds,
        "peak": max(peaks[1:]),
        "rest": rest,
        "optimizer": state,
        "logits": task.logits,
        "sites": sites,
    }


def _work(program: Program, job: str, args: argparse.Namespace) -> int:
    """The child's side: does one job and writes its result down."""
    if job == EFFECT:
        result = asdict(program.effect(Effort(tuple(range(args.seeds)), args.full)))
    else:
        result = _compare(program, job, args.steps)
    args.result.write_text(json.dumps(result))
    return 0


def _run(program: Program, job: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Has a child do one job. Its prints go to a log in the output folder. Raises CannotRun with the log's end."""
    log, result = args.out / f"{program.name}-{job}.log", folder / f"{job}.json"
    # Threads that wait do not spin: this machine may have other work.
    env = environment(folder / "cache") | {FOLDER: str(folder), "OMP_WAIT_POLICY": "passive"}
    env["TOKENIZERS_PARALLELISM"] = "true"
    if job == EFFECT:
        for name in ALLOCATOR_ENV:  # it makes every allocation slower, and no memory is measured here
            env.pop(name)
    command = [sys.executable, program.file, "--job", job, "--result", str(result), *_passed(args)]
    with log.open("w") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=env).returncode
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise CannotRun(f"{job} ended with status {status}; the end of {log}:\n{tail}")
    return json.loads(result.read_text())


def _passed(args: argparse.Namespace) -> list[str]:
    return ["--steps", str(args.steps), "--seeds", str(args.seeds), *(["--full"] if args.full else [])]


# The parent: all of them, compared.


def _parser(program: Program) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"python docs/examples/{program.name}.py",
        description=program.doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--full", action="store_true", help="measure the effect for up to 20 minutes, not 3")
    parser.add_argument("--steps", type=int, default=20, help="of the comparison of the backends [%(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="that the effect is measured with [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("examples-out"), metavar="DIR", help="[%(default)s]")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser


def main(program: Program, argv: list[str] | None = None) -> int:
    """Runs a program; the exit status that the module describes."""
    args = _parser(program).parse_args(argv)
    if args.full:
        args.steps = max(args.steps, program.full_steps)
    if args.job:
        return _work(program, args.job, args)
    begin = time.monotonic()
    try:
        _check_requirements(program)
        args.out.mkdir(parents=True, exist_ok=True)
        results = {}
        with tempfile.TemporaryDirectory(prefix="cce-examples-") as folder:
            for job in (PLAIN, FUSED, EFFECT):
                start = time.monotonic()
                results[job] = _run(program, job, args, Path(folder))
                print(f"{program.name}: {job} took {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    except CannotRun as error:
        print(f"{program.name}: {error}", file=sys.stderr)
        return 2
    return _conclude(program, results, args, time.monotonic() - begin)


def _check_requirements(program: Program) -> None:
    """Raise CannotRun naming what is not installed, before minutes are spent."""
    needs = {"matplotlib": "pip install matplotlib", **program.needs}
    missing = {name: how for name, how in needs.items() if importlib.util.find_spec(name) is None}
    if missing:
        raise CannotRun("; ".join(f"{name} is not installed: {how}" for name, how in missing.items()))


def parted(plain: Sequence[float], ours: Sequence[float], factor: float) -> list[str]:
    """A sentence for the first step whose losses differ by more than rounding."""
    tolerance = TOLERANCES["fp32"]
    for step, (a, b) in enumerate(zip(plain, ours, strict=True)):
        allowed = factor * tolerance.at(step) * abs(a)
        if not (math.isfinite(a) and math.isfinite(b) and abs(a - b) <= allowed):
            return [f"the losses part: step {step} gives {a:.7f} and {b:.7f}, where {allowed:.1e} is allowed"]
    return []


def _conclude(program: Program, results: dict[str, Any], args: argparse.Namespace, seconds: float) -> int:
    plain, ours = results[PLAIN], results[FUSED]
    effect = Effect(**results[EFFECT] | {"claims": [Claim(**c) for c in results[EFFECT]["claims"]]})
    effect.panels = [Panel(**panel) for panel in results[EFFECT]["panels"]]
    failures = parted(plain["losses"], ours["losses"], program.tolerance) + effect.failures
    if not any(site["fused"] for site in ours["sites"]):
        failures.append(f"{FUSED} fused nothing: {[site['reason'] for site in ours['sites']]}")
    if plain["sites"]:
        failures.append(f"{PLAIN} ran with cce_inductor in it")
    text = report(plain, ours, effect)
    print(f"{text}\n\n{seconds:.0f} s in all")
    picture = args.out / f"{program.name}.png"
    _draw(plain, ours, effect, picture)
    about = machine.describe()
    saved = {"seconds": seconds, "machine": about, "text": text, "failures": failures, **results}
    (args.out / f"{program.name}.json").write_text(json.dumps(saved, indent=1) + "\n")
    print(f"{picture} written")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def markdown(rows: list[list[str]]) -> str:
    """A table whose columns line up; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def report(plain: dict[str, Any], ours: dict[str, Any], effect: Effect) -> str:
    """Both backends side by side, what was fused, and the effect."""
    steps = [step for step in SHOWN if step < len(plain["losses"])]
    rows = [["", PLAIN, FUSED]]
    rows += [[f"loss, step {s}", f"{plain['losses'][s]:.6f}", f"{ours['losses'][s]:.6f}"] for s in steps]
    above = [(run["peak"] - run["rest"]) for run in (plain, ours)]
    rows += [
        ["peak memory of a step above rest", *(f"{size / MIB:,.0f} MiB" for size in above)],
        ["… in tensors of logits", *(f"{size / plain['logits']:.2f}" for size in above)],
        ["first step, with compilation", *(f"{run['seconds'][0]:.1f} s" for run in (plain, ours))],
        ["further steps, median", *(f"{statistics.median(run['seconds'][1:]):.3f} s" for run in (plain, ours))],
    ]
    pairs = list(zip(plain["losses"], ours["losses"], strict=True))
    far = max(abs(a - b) / abs(a) for a, b in pairs)
    lines = [markdown(rows), "", f"Largest difference of the losses over {len(pairs)} steps: {far:.1e} of the loss."]
    sites = Counter(_site(site) for site in ours["sites"])
    lines += [f"{count} x {site}" if count > 1 else site for site, count in sites.items()]
    lines += ["", markdown(effect.table), ""]
    lines += [f"* {claim}" for claim in effect.claims] + [f"* {note}" for note in effect.notes]
    return "\n".join(lines)


def _site(site: dict[str, Any]) -> str:
    became = f"fused: {site['kernel']}" if site["fused"] else f"declined: {site['reason']}"
    return f"{site['loss'].rpartition('.')[2]} over {site['rows']} × {site['vocab']}: {became}."


def _draw(plain: dict[str, Any], ours: dict[str, Any], effect: Effect, path: Path) -> None:
    """The losses of both backends, then the effect's panels, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = list(range(len(plain["losses"])))
    first = Panel("Loss under both backends", "step", "loss", [])
    figure, axes = pyplot.subplots(
        1, 1 + len(effect.panels), figsize=(4.6 * (1 + len(effect.panels)), 3.8), layout="constrained"
    )
    axes = list(axes) if effect.panels else [axes]
    axes[0].plot(steps, plain["losses"], "o-", color="tab:orange", label=PLAIN)
    axes[0].plot(steps, ours["losses"], "x--", color="tab:blue", label=FUSED)
    for panel, axis in zip([first, *effect.panels], axes, strict=True):
        width = 0.8 / max(len(panel.lines), 1)
        for i, (label, x, y) in enumerate(panel.lines):
            if panel.bars:
                axis.bar([j + width * i for j in range(len(x))], y, width, label=label)
                axis.set_xticks(range(len(x)), x, fontsize=8)
            else:
                axis.plot(x, y, label=label, marker="." if len(x) < 40 else "")
        axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        for name in panel.log:
            getattr(axis, f"set_{name}scale")("log")
        if "x" in panel.log and panel.lines:
            axis.set_xticks(panel.lines[0][1], [f"{x:g}" for x in panel.lines[0][1]])
            axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=75)
    pyplot.close(figure)
