"""What docs/design.md says of the rooms: which imports from which, that no arrow runs back, how large things are.

A room is a folder of the package or a module beside them.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cce_inductor"
LONGEST_MODULE, LONGEST_FUNCTION = 500, 60
# Why something is longer.
LONGER: dict[str, str] = {}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str) -> set[str]:
    """The modules of the package that a module imports, inside functions and for its types as well."""
    if not name:
        return set()  # the package itself hands names on, and imports each when it is asked for
    path = MODULES[name]
    tree = ast.parse(path.read_text())
    folder = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [part for part in folder[: len(folder) - node.level + 1] if part]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                found.add(whole if whole in MODULES else ".".join(base))
    return found - {name}


IMPORTS = {name: imported(name) for name in MODULES}


def room(module: str) -> str:
    return module.split(".")[0] or "__init__"


def arrows() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module, others in IMPORTS.items():
        found.setdefault(room(module), set()).update(room(other) for other in others if room(other) != room(module))
    return found


def documented() -> list[tuple[str, set[str]]]:
    """The lines of the picture: a room, and those that it imports from."""
    text = (ROOT / "docs" / "design.md").read_text()
    picture = re.search(r"```arrows\n(.*?)```", text, re.DOTALL)
    assert picture is not None
    lines = [line.split() for line in picture[1].splitlines()]
    return [(line[0], set(line[1:]) - {"<-"}) for line in lines]


def test_the_picture_is_what_is_imported():
    assert dict(documented()) == arrows()


def test_no_arrow_runs_back():
    """Every room imports from those above it in the picture only."""
    above: set[str] = set()
    for name, others in documented():
        assert others <= above, f"{name} imports from {others - above}, which stand below it"
        above.add(name)


def test_no_modules_import_each_other():
    left = {name: set(others) for name, others in IMPORTS.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left


@pytest.mark.parametrize("name", MODULES)
def test_a_module_can_be_seen_across(name):
    text = MODULES[name].read_text()
    if name not in LONGER:
        assert len(text.splitlines()) <= LONGEST_MODULE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and f"{name}.{node.name}" not in LONGER:
            assert (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, node.name
