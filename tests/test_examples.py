"""The programs of docs/examples: each says what it follows, the page holds what they printed, and they run."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "examples"
PAGE = (ROOT / "docs" / "examples.md").read_text()
SHARED = {"common", "model", "run_all"}
NEEDED = {"bytepiece": ["ahocorasick"], "sign_optimizers": ["lion_pytorch"], "emo": ["gguf"]}
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import common

    return common


def run_of(losses, fused=()):
    """What a backend's process reports."""
    sites = [
        {"fused": done, "loss": "cross_entropy", "rows": "8", "vocab": "9", "kernel": "C++", "reason": "too small"}
        for done in fused
    ]
    return {"losses": losses, "seconds": [1.0] * len(losses), "peak": 8, "rest": 4, "logits": 4, "sites": sites}


def conclude(common, tmp_path, plain, ours, failures=()):
    """The exit status that these results lead to, and the report."""
    program = common.Program(str(tmp_path / "made.py"), "", None, None)
    claim = {"text": "it grows", "seen": [True, False], "note": ""}
    effect = {"table": [["a"], ["1"]], "claims": [claim], "panels": [], "notes": [], "failures": list(failures)}
    results = {common.PLAIN: plain, common.FUSED: ours, common.EFFECT: effect}
    args = common._parser(program).parse_args(["--out", str(tmp_path)])
    status = common._conclude(program, results, args, 1.0)
    return status, json.loads((tmp_path / "made.json").read_text())["text"]


def test_the_verdict(common, tmp_path):
    same = [2.0, 1.5, 1.25]
    status, text = conclude(common, tmp_path, run_of(same), run_of(same, [True]))
    assert status == 0 and "seen in part, 1 of 2 seeds: it grows" in text
    assert (tmp_path / "made.png").stat().st_size > 1000
    assert conclude(common, tmp_path, run_of(same), run_of(same, [False]))[0] == 1
    assert conclude(common, tmp_path, run_of(same, [True]), run_of(same, [True]))[0] == 1
    assert conclude(common, tmp_path, run_of(same), run_of([2.0, 1.5, 1.2505], [True]))[0] == 1
    assert conclude(common, tmp_path, run_of(same), run_of([2.0, 1.5, float("nan")], [True]))[0] == 1
    assert conclude(common, tmp_path, run_of(same), run_of(same, [True]), ["a check failed"])[0] == 1


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_says_what_it_follows(name):
    """Its docstring names the source; the page and the list of programs name it."""
    doc = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    assert re.search(r"^Sources?: .*(arXiv\s\d{4}\.\d{5}|kexue\.fm/archives/\d+)", doc, re.MULTILINE | re.DOTALL)
    assert f"| `{name}.py` |" in PAGE
    assert f'"{name}"' in (FOLDER / "run_all.py").read_text()


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.json")))
def test_the_page_holds_what_a_program_printed(name):
    """Text, picture and figures on docs/examples.md are those of one run."""
    found = json.loads((FOLDER / f"{name}.json").read_text())
    assert found["text"] in PAGE and not found["failures"]
    assert f"](examples/{name}.png)" in PAGE and (FOLDER / f"{name}.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs(name, tmp_path):
    """With one seed; `make examples` takes three."""
    for package in NEEDED.get(name, ()):
        pytest.importorskip(package)
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--seeds", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / f"{name}.png").exists()
