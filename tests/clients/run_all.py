"""Runs the programs of this folder without and with cce_inductor, and compares losses, memory and what was fused.

    python tests/clients/run_all.py [--docs docs/trainers.md] [NAME ...]

A program names the environment that turns us on in its first line. The exit status is 1 if one of them failed, if its
losses part, if nothing was fused, or if it took more memory with us.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cce_inductor.instruments.memory import ALLOCATOR_ENV

HERE = Path(__file__).parent
PROGRAMS = sorted(p.stem for p in HERE.glob("*.py") if p.read_text().startswith("# with: "))
TOLERANCE = 2e-3  # of losses, relative: they are trained on, in fp32
LOGITS = 4 * 256 * 32000 * 4 / 2**20  # MiB, of `client`'s sizes


def environment(name: str) -> dict[str, str]:
    """What turns us on for a program."""
    first = (HERE / f"{name}.py").read_text().splitlines()[0]
    return dict(pair.split("=", 1) for pair in first.removeprefix("# with: ").split())


def run(name: str, ours: dict[str, str]) -> dict[str, Any]:
    """What one run of a program wrote down; its last lines under "error" if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ,
            **ALLOCATOR_ENV,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "WANDB_MODE": "disabled",
            "CUDA_VISIBLE_DEVICES": "",
            "CLIENT_FOLDER": folder,
            **ours,
        }
        command = [sys.executable, str(HERE / f"{name}.py")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    for line in done.stdout.splitlines():
        if line.startswith("CLIENT "):
            return json.loads(line.removeprefix("CLIENT ")) | {"log": done.stderr}
    return {"error": "\n".join((done.stdout + done.stderr).splitlines()[-12:])}


def verdict(name: str, plain: dict[str, Any], ours: dict[str, Any]) -> str:
    """ "ok", or what is wrong."""
    for found in (plain, ours):
        if "error" in found:
            return found["error"]
    pairs = zip(plain["losses"], ours["losses"], strict=True)
    if any(abs(a - b) > TOLERANCE * max(abs(a), 1e-2) for a, b in pairs):
        return f"the losses part: {plain['losses']} without us, {ours['losses']}"
    counts, expected = ours["counts"], "# fuses nothing: " not in (HERE / f"{name}.py").read_text()
    if expected and not counts.get("fused") and not counts.get("statistics"):
        return f"nothing was fused: {counts}"
    if ours["peak"] > 1.03 * plain["peak"] + 8:
        return f"{ours['peak']:.0f} MiB instead of {plain['peak']:.0f}"
    return "ok"


def row(name: str, plain: dict[str, Any], ours: dict[str, Any]) -> str:
    """A line of the table."""
    title = (HERE / f"{name}.py").read_text().split('"""')[1].split(":")[0].split(".")[0]
    line = " ".join(f"{k}={v}" for k, v in environment(name).items())
    if "error" in plain or "error" in ours:
        return f"| {title} | `{line}` | failed | | | | |"
    c = ours["counts"]
    fused = f"{c.get('fused', 0)} / {c.get('statistics', 0)}"
    saved = (plain["peak"] - ours["peak"]) / LOGITS
    reads = c.get("deferred_materialized", 0)
    return f"| {title} | `{line}` | {fused} | {reads} | {plain['peak']:,.0f} | {ours['peak']:,.0f} | {saved:.1f} |"


HEADER = """\
| trainer | one line | losses / statistics fused | reads | peak without, MiB | with | logits tensors saved |
|---|---|---|---|---|---|---|"""


def main() -> int:
    parser = argparse.ArgumentParser("python tests/clients/run_all.py", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="programs [all]")
    parser.add_argument("--docs", type=Path, metavar="PATH", help="write the table into this page too")
    args = parser.parse_args()
    failed, rows = False, []
    for name in args.names or PROGRAMS:
        plain, ours = run(name, {"CCE_INDUCTOR": "0"}), run(name, environment(name))
        said = verdict(name, plain, ours)
        failed |= said != "ok"
        rows.append(row(name, plain, ours))
        print(f"{name}: {said}\n{rows[-1]}", flush=True)
        for line in ours.get("log", "").splitlines():
            if line.startswith("cce_inductor:"):
                print(f"  {line}", flush=True)
    if args.docs is not None:
        from cce_inductor.bench.docs import replaced

        args.docs.write_text(replaced(args.docs.read_text(), "clients", "\n".join([HEADER, *rows])))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
