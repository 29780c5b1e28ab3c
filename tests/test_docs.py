"""The docs name files and commands that exist, and the changelog's newest version is the package's."""

import re
import shlex
from pathlib import Path

import pytest

import cce_inductor
from cce_inductor.bench.arguments import parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Where a page may leave the front of a path out.
FOLDERS = ("", "cce_inductor", "docs", "templates")
# What commands write, a user's own script, and where a loss of Hugging Face's stands.
WRITTEN = {"before.py", "after.py", "sites.json", "train.py", "demo.json", "transformers/loss/loss_utils.py"}
WRITTEN |= {"cce_inductor_before.py", "…_after.py", "…_sites.json"}

CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
A_PATH = re.compile(
    r"(?<![\w/.<>:*-])\.?(?:[\w-]+/)*[\w…-]+(?:\.cpp|\.py)?\.(?:py|md|toml|yaml|jinja|json)(?![\w.(/-])"
)
A_TARGET = re.compile(r"(?<![\w-])make ([a-z][a-z-]*)")
A_COMMAND = re.compile(r"python -m cce_inductor ([a-z]+)")
A_BENCHMARK = re.compile(r'BENCH_ARGS="([^"\n]*)"|BENCH_ARGS=([^"`\s]+)|cce_inductor bench([^`\n#]*)')
A_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")


def code(page: Path) -> str:
    """What stands in backticks on a page, and its blocks of code."""
    return "\n".join(CODE.findall(page.read_text()))


def exists(path: str) -> bool:
    if "/" in path:
        return any((ROOT / folder / path).exists() for folder in FOLDERS)
    return (ROOT / path).exists() or any(
        found for folder in ("cce_inductor", "docs", "templates", "tests") for found in (ROOT / folder).rglob(path)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    found = {m[0] for m in A_PATH.finditer(code(page))} - WRITTEN
    assert {path for path in found if not exists(path)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    assert [link for link in A_LINK.findall(page.read_text()) if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_exist(page):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set(re.findall(r'"([a-z]+)"', (ROOT / "cce_inductor" / "__main__.py").read_text()))
    assert set(A_TARGET.findall(code(page))) <= targets
    assert set(A_COMMAND.findall(code(page))) <= commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_benchmarks_of_a_page_can_be_asked_for(page):
    for given in A_BENCHMARK.findall(code(page)):
        try:
            parser().parse_args(shlex.split("".join(given)))
        except SystemExit as left:
            assert not left.code, given


def test_what_the_guide_names_is_somewhere():
    """Functions, classes and tables in backticks, but for the op that is the example."""
    folders = [ROOT / folder for folder in ("cce_inductor", "templates", "tests")]
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".jinja")]
    names = set(
        re.findall(
            r"\w+", "".join(p.read_text() for p in paths if p != Path(__file__)) + (ROOT / "Makefile").read_text()
        )
    )
    guide = (ROOT / "docs" / "contributing.md").read_text()
    assert set(re.findall(r"`(\w+)`", guide)) - names <= {"flipud"}


def test_what_these_tests_look_for():
    """That the patterns find what is wrong."""
    assert A_PATH.findall("`tests/nothing.py`") == ["tests/nothing.py"] and not exists("tests/nothing.py")
    assert exists("lowering/schedules.py") and exists(".pre-commit-config.yaml") and not exists("vocabulary.py")
    assert A_PATH.findall("`.x.yaml`, `a.cpp.jinja`, `t/a.py.jinja`") == [".x.yaml", "a.cpp.jinja", "t/a.py.jinja"]
    assert A_BENCHMARK.findall('`make bench BENCH_ARGS=x`, BENCH_ARGS="y z"') == [("", "x", ""), ("y z", "", "")]
    assert A_TARGET.findall("`make bench BENCH_ARGS=x`, `make no-such`") == ["bench", "no-such"]


def test_the_version_is_the_same_everywhere():
    """A release is a heading in docs/changelog.md, the version in pyproject.toml and a tag of that name."""
    headings = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "docs" / "changelog.md").read_text(), re.MULTILINE)
    (project,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert headings[0] == project == cce_inductor.__version__
