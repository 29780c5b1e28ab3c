"""docs/compatibility.md: which versions of torch and of Python were tried, and how. `make compatibility` writes it.

All tests but the slow ones are run in every environment that `make setup TORCH=...` has made. What came out is kept
there, and is not run again while package, templates and tests stay what they are. For each Python the command uses what
it finds: an environment, an interpreter, or only what a linter and a type checker know of that version.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PYTHONS = (10, 11, 12, 13, 14)

# area -> its folder of `tests/`; the last has what lies in none of the others.
AREAS = {"rewrite": "rewrite", "operators": "ops", "kernels": "lowering", "everything else": ""}

# Run by the interpreter of an environment: what it consists of.
ABOUT = """
import importlib.metadata, json, platform, torch
from cce_inductor import compat

def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"

print(json.dumps({
    "torch": torch.__version__, "triton": version("triton"), "numpy": version("numpy"),
    "python": platform.python_version(), "supported": compat.is_supported(), "span": compat.supported_span(),
    "cpu": torch.backends.cpu.get_cpu_capability(),
    "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
}))
"""


@dataclass
class Environment:
    """An environment of `make setup`, what it consists of, and what its tests came to: counts and failures by area."""

    about: dict
    results: dict[str, dict]

    @property
    def release(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.about["torch"].split("+")[0].split(".")[:2])

    @property
    def minor(self) -> int:
        return int(self.about["python"].split(".")[1])


def run(*command: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    whole = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=whole, capture_output=True, text=True)


def sources() -> str:
    """A hash of everything that a result depends on beside the environment."""
    digest = hashlib.sha256()
    for folder in ("cce_inductor", "templates", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".jinja"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def environments(jobs: int) -> Iterator[Environment]:
    """Every environment that is there, its tests run."""
    for home in sorted(ROOT.glob(".venv-*")):
        if not (home / ".stamp").exists():
            continue
        python = home / "bin" / "python"
        asked = run(python, "-W", "ignore", "-c", ABOUT)
        if asked.returncode:
            raise SystemExit(f"{home} cannot load the package:\n{asked.stderr}")
        about = json.loads(asked.stdout.strip().rpartition("\n")[2])
        kept = home / "compatibility.json"
        known = json.loads(kept.read_text()) if kept.exists() else {}
        key = f"{sources()} {sorted(about.items())}"
        if known.get("key") != key:
            print(f"torch {about['torch']}", file=sys.stderr, flush=True)
            known = {"key": key, "results": outcome(python, ROOT / "tests", jobs, home)}
            kept.write_text(json.dumps(known, indent=1))
        yield Environment(about, known["results"])


def outcome(python: Path, tests: Path, jobs: int, home: Path) -> dict[str, dict]:
    """What pytest says of a folder of tests, for each area: how many passed and were skipped, and which failed."""
    cache = home / "inductor-cache"
    shutil.rmtree(cache, ignore_errors=True)  # as `make test` does
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ("-q", "-n", jobs, "--dist", "loadgroup", f"--junitxml={report}")
        done = run(python, "-m", "pytest", *options, tests, env={"TORCHINDUCTOR_CACHE_DIR": str(cache)})
        if done.returncode not in (0, 1) or not report.exists():  # not even the tests were found
            return {list(AREAS)[-1]: {"passed": 0, "skipped": 0, "failed": [f"pytest itself, exit {done.returncode}"]}}
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    results: dict[str, dict] = {}
    for case in cases:
        folders = case.get("classname", "").split(".")
        area = next(area for area, folder in AREAS.items() if folder in folders or not folder)
        result = results.setdefault(area, {"passed": 0, "skipped": 0, "failed": []})
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            result["failed"].append(case.get("name"))
        else:
            result["skipped" if "skipped" in kinds else "passed"] += 1
    return results


def counts(result: dict | None) -> str:
    if result is None:
        return "not run"
    parts = [f"{result['passed']} passed"]
    parts += [f"{len(result['failed'])} failed"] if result["failed"] else []
    parts += [f"{result['skipped']} skipped"] if result["skipped"] else []
    return ", ".join(parts)


# ---- Python versions


def interpreter(minor: int) -> str | None:
    """An interpreter of Python 3.`minor`: on the path, or one of pyenv's."""
    found = [
        shutil.which(f"python3.{minor}") or "",
        *map(str, Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python")),
    ]
    for candidate in found:
        # One of pyenv's shims is on the path whether or not there is an interpreter behind it.
        if (
            candidate
            and run(candidate, "-c", f"import sys; assert sys.version_info[:2] == (3, {minor})").returncode == 0
        ):
            return candidate
    return None


def files() -> list[Path]:
    return sorted([*(ROOT / "cce_inductor").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])


COMPILE = "import sys\nfor path in sys.argv[1:]: compile(open(path, encoding='utf-8').read(), path, 'exec')"


def syntax(minor: int) -> str:
    """How the syntax of every file was checked for a Python, and what came out."""
    python = interpreter(minor)
    if python is not None:
        done = run(python, "-W", "error::SyntaxWarning", "-c", COMPILE, *files())
        version = run(python, "-c", "import platform; print(platform.python_version())").stdout.strip()
        return f"{_verdict(done)}: compiled by {version}"
    done = run(BIN / "ruff", "check", "--isolated", "--select=E9", f"--target-version=py3{minor}", *files())
    return f"{_verdict(done)}: parsed by ruff for this version, no interpreter found"


def types(minor: int) -> str:
    return _verdict(run(BIN / "mypy", "--python-version", f"3.{minor}"))


def _verdict(done: subprocess.CompletedProcess) -> str:
    if done.returncode == 0:
        return "right"
    last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-1:]
    return "WRONG (" + "".join(last) + ")"


# ---- the document

INTRODUCTION = """\
# Compatibility

`make compatibility` writes this file, from what it finds on the machine where it is run: in each environment that
`make setup TORCH=...` has made there it runs what `make test` runs, and for each Python it says how far it was tried.
One wheel serves all versions.
"""


def document(found: list[Environment]) -> str:
    """The text of docs/compatibility.md."""
    machine = f"{platform.system()} on {platform.machine()}"
    cpus = ", ".join(sorted({one.about["cpu"] for one in found}))
    lines = [INTRODUCTION, f"Run on {machine}, CPU kernels for {cpus}; sources `{sources()}`.\n", "## torch\n"]
    lines += [f"Supported: torch {found[0].about['span']}. Any other one is warned of once.\n"]
    lines += [
        "| torch | Triton | numpy | Python | " + " | ".join(AREAS) + " |",
        "|---|---|---|---|" + "---|" * len(AREAS),
    ]
    for one in sorted(found, key=lambda one: one.release):
        cells = [one.about["torch"], one.about["triton"], one.about["numpy"], one.about["python"]]
        lines.append("| " + " | ".join([*cells, *(counts(one.results.get(area)) for area in AREAS)]) + " |")
    lines += ["", f"Where the tests lie: {', '.join(f'{a} in `tests/{f}`' for a, f in AREAS.items() if f)}.", ""]
    failures = [(one, name) for one in found for result in one.results.values() for name in result["failed"]]
    if failures:
        lines += ["Failed:\n", *(f"* torch {one.about['torch']}: `{name}`" for one, name in failures), ""]
    lines += ["## Python\n", "| Python | tests | syntax | types |", "|---|---|---|---|"]
    for minor in PYTHONS:
        ran = ", ".join(one.about["torch"] for one in found if one.minor == minor and one.results)
        lines.append(f"| 3.{minor} | {f'with torch {ran}' if ran else 'not run'} | {syntax(minor)} | {types(minor)} |")
    return "\n".join([*lines, "", "## Not run\n", *(f"* {line}" for line in not_run(found)), ""])


def not_run(found: list[Environment]) -> Iterator[str]:
    """What this machine could not try, or what nobody has set up on it."""
    low, high = (tuple(int(n) for n in end.split(".")) for end in found[0].about["span"].split(" to "))
    missing = [f"2.{minor}" for minor in range(low[1], high[1] + 1) if (2, minor) not in {one.release for one in found}]
    if missing:
        yield f"torch {', '.join(missing)}: no environment here."
    if all(one.about["supported"] for one in found):
        yield "torch's next release: no environment here; `make nightly` makes one where its index can be reached."
    pythons = [f"3.{minor}" for minor in PYTHONS if minor not in {one.minor for one in found if one.results}]
    if pythons:
        yield (
            f"Any test with Python {', '.join(pythons)}: syntax and types only, as the table says. "
            "`make setup PYTHON=... VENV=.venv-...` makes an environment with another Python."
        )
    if not any(one.about["gpus"] for one in found):
        yield "Anything on a GPU: there is none here. The tests of kernels run those for GPUs in Triton's interpreter."
    else:
        yield "`make gpu-check`: a GPU is here, and this command does not use it."
    without = [one.about["torch"] for one in found if one.about["triton"] == "none"]
    if without:
        yield f"The GPU kernels with torch {', '.join(without)}: no Triton in its environment."
    yield "Other operating systems and processors than the one named above."
    yield "The slow tests (`make test-all`)."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="worker processes of pytest")
    arguments = parser.parse_args()
    found = list(environments(arguments.jobs))
    if not found:
        raise SystemExit("no environment here: `make setup TORCH=...` makes one")
    print(document(found), end="")


if __name__ == "__main__":
    main()
