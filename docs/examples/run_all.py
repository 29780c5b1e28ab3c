"""Runs the programs of this folder one after the other, and writes what they print into the documentation if asked.

    python docs/examples/run_all.py [--full] [--docs docs] [--finished] [NAME ...]

The exit status is 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from cce_inductor.bench.docs import replaced
from cce_inductor.instruments import machine

# In the order of docs/examples.md.
PROGRAMS = (
    "batch_growth",
    "emo",
    "hwfa_rerope",
    "parallel_rnn",
    "sign_optimizers",
    "self_pretraining",
    "image_classifier",
    "contrastive",
    "bytepiece",
    "continuation",
)
HERE = Path(__file__).parent


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python docs/examples/run_all.py", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="programs [all]")
    parser.add_argument("--full", action="store_true", help="up to 20 minutes each, not 3")
    parser.add_argument("--finished", action="store_true", help="run nothing: take what lies in --out")
    parser.add_argument("--out", type=Path, default=Path("examples-out"), metavar="DIR", help="[%(default)s]")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write tables, pictures and JSON into DIR too")
    return parser


def section(name: str, out: Path, command: str) -> str:
    """What docs/examples.md says between the markers of a program."""
    found = json.loads((out / f"{name}.json").read_text())
    about = machine.sentence(found["machine"])
    head = f"## {name}\n\n`{command}`\n\n{about}; {found['seconds']:.0f} s."
    return f"{head}\n\n{found['text']}\n\n![{name}](examples/{name}.png)"


def publish(name: str, out: Path, docs: Path, full: bool) -> None:
    """Put a program's results into docs/examples.md and docs/examples/."""
    command = shlex.join(["python", f"docs/examples/{name}.py", *(["--full"] if full else [])])
    for ending in ("png", "json"):
        shutil.copyfile(out / f"{name}.{ending}", docs / "examples" / f"{name}.{ending}")
    page = docs / "examples.md"
    page.write_text(replaced(page.read_text(), name, section(name, out, command)))


def main(argv: list[str]) -> int:
    """Runs the programs; 1 if one failed."""
    parser = _parser()
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(PROGRAMS):
        parser.error(f"no program {', '.join(sorted(unknown))}; there are {', '.join(PROGRAMS)}")
    failed = []
    for name in args.names or PROGRAMS:
        print(f"\n## {name}\n", flush=True)
        options = ["--out", str(args.out), *(["--full"] if args.full else [])]
        command = [sys.executable, str(HERE / f"{name}.py"), *options]
        status = 0 if args.finished else subprocess.run(command).returncode
        if status:
            failed.append(f"{name} (status {status})")
        elif args.docs:
            publish(name, args.out, args.docs, args.full)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall programs passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
