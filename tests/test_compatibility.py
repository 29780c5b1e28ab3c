"""docs/compatibility.md: that the command says what it ran, and what it did not."""

import sys
from pathlib import Path

import compatibility
from compatibility import Environment, counts, not_run, outcome, syntax

TESTS = """
import pytest

def test_right(): pass
def test_also_right(): pass
def test_wrong(): assert False
@pytest.fixture
def broken(): raise RuntimeError
def test_with_a_broken_fixture(broken): pass
def test_skipped(): pytest.skip("not here")
"""


def test_results_are_those_of_pytest(tmp_path):
    for folder in ("ops", "gpu"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test_some.py").write_text(TESTS)
    (tmp_path / "ops" / "test_more.py").write_text("def test_more(): pass")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib")
    results = outcome(Path(sys.executable), tmp_path, 0, tmp_path / "home")
    result = {"passed": 2, "skipped": 1, "failed": ["test_wrong", "test_with_a_broken_fixture"]}
    assert results == {"operators": result | {"passed": 3}, "everything else": result}
    assert counts(result) == "2 passed, 2 failed, 1 skipped" and counts(None) == "not run"
    [broken] = outcome(Path(sys.executable), tmp_path / "none", 0, tmp_path / "home").values()
    assert broken["failed"]


def environment(torch, python="3.11.7", **more):
    about = {"torch": torch, "python": python, "triton": "3.9.0", "gpus": [], "supported": True, "span": "2.11 to 2.15"}
    return Environment(about | more, {"kernels": {"passed": 1, "skipped": 0, "failed": []}})


def test_what_was_not_run_is_named():
    untried = Environment(environment("2.15.0", "3.13.0").about, {})
    text = "\n".join(not_run([environment("2.11.0"), environment("2.15.0+cpu", "3.12.1", triton="none"), untried]))
    assert "torch 2.12, 2.13, 2.14: no environment" in text
    assert "Python 3.10, 3.13, 3.14" in text
    assert "no Triton" in text and "on a GPU: there is none" in text and "next release" in text
    everything = [environment(f"2.{m}.0", f"3.{m - 1}.0", gpus=["one"]) for m in range(11, 16)]
    text = "\n".join(not_run([*everything, environment("2.16.0.dev1", supported=False)]))
    assert "no environment" not in text and "with Python" not in text and "there is none" not in text


def test_syntax_of_another_python_is_wrong(tmp_path, monkeypatch):
    path = tmp_path / "newer.py"
    path.write_text("type Pair[T] = tuple[T, T]\n")  # Python 3.12's
    monkeypatch.setattr(compatibility, "files", lambda: [path])
    monkeypatch.setattr(compatibility, "interpreter", lambda minor: sys.executable if minor == 11 else None)
    assert syntax(10).startswith("WRONG") and syntax(14).startswith("right")
    if sys.version_info[:2] == (3, 11):
        assert syntax(11).startswith("WRONG") and "compiled by 3.11" in syntax(11)
