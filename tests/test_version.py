"""Versions: ours, a string that keeps compiled kernels from going stale, and the torch that we support."""

import json
import subprocess
import sys

import pytest
import torch

from cce_inductor import compat, version


@pytest.fixture
def tree(tmp_path):
    for name in ("package/a.py", "package/ops/b.py", "templates/kernel.jinja"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    return tmp_path


def hash_of(tree) -> str:
    return version.hash_files(tree / "package", tree / "templates")


@pytest.mark.parametrize("name", ["package/a.py", "package/ops/b.py", "templates/kernel.jinja"])
def test_an_edit_changes_it(tree, name):
    before = hash_of(tree)
    assert before == hash_of(tree) and len(before) == 16
    path = tree / name
    text = path.read_text()
    path.write_text(text + " ")
    assert hash_of(tree) != before
    path.write_text(text)
    assert hash_of(tree) == before


def test_a_new_a_renamed_and_a_removed_file_change_it(tree):
    seen = {hash_of(tree)}
    (tree / "templates/new.jinja").write_text("")
    seen.add(hash_of(tree))
    (tree / "templates/new.jinja").rename(tree / "templates/other.jinja")
    seen.add(hash_of(tree))
    (tree / "package/a.py").unlink()
    seen.add(hash_of(tree))
    assert len(seen) == 4


def test_other_files_do_not_count(tree):
    before = hash_of(tree)
    (tree / "package/notes.txt").write_text("x")
    (tree / "package/a.pyc").write_bytes(b"x")
    assert hash_of(tree) == before


@pytest.mark.parametrize("folder", version.TOOLS)
def test_the_tools_do_not_count(tree, folder):
    before = hash_of(tree)
    (tree / "package" / folder / "deeper").mkdir(parents=True)
    (tree / "package" / folder / "deeper" / "c.py").write_text("# c\n")
    assert hash_of(tree) == before
    (tree / "package" / "ops" / folder).mkdir()  # of the same name, but elsewhere
    (tree / "package" / "ops" / folder / "c.py").write_text("# c\n")
    assert hash_of(tree) != before


def test_it_does_not_depend_on_the_place(tree, tmp_path_factory):
    import shutil

    copy = shutil.copytree(tree, tmp_path_factory.mktemp("copy") / "tree")
    assert hash_of(copy) == hash_of(tree)


def test_the_hash_of_this_package_covers_its_sources():
    assert version.source_hash.__wrapped__() == version.hash_files(version.PACKAGE, version.templates_dir())
    assert (version.PACKAGE / "ops" / "reference.py").is_file()


def test_every_operator_carries_it(monkeypatch):
    import torch

    import cce_inductor
    from cce_inductor.ops import reference

    seen = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda call: seen.append(call.attributes.version) or forward(call))
    cce_inductor.linear_cross_entropy(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([1, 4]))
    assert seen == [version.source_hash()]


# A program that runs with a torch that calls itself `VERSION`, turns the pass on in every way, and prints what it was
# warned of and what was fused.
UNDER_ANOTHER_TORCH = """
import json, sys, warnings
import torch
import torch.nn.functional as F

torch.__version__ = sys.argv[1]
hidden, weight = torch.randn(12, 8), torch.randn(40, 8, requires_grad=True)
target = torch.randint(0, 40, (12,))

def loss(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight), target)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import cce_inductor
    from cce_inductor import doctor

    for _ in range(2):
        torch._dynamo.reset()
        options = {"min_vocab": 0, "compiler": "aot_eager"}
        value = torch.compile(loss, backend="cce", options=options)(hidden, weight, target)
    cce_inductor.enable()
    direct = cce_inductor.linear_cross_entropy(hidden, weight, target)
    torch_line = next(line for line in doctor.report().splitlines() if line.split()[0] == "torch")
print(json.dumps({
    "warnings": [str(w.message) for w in caught if "cce_inductor" in str(w.message)],
    "right": all(abs(x.item() - loss(hidden, weight, target).item()) < 1e-5 for x in (value, direct)),
    "doctor": torch_line,
}))
"""


def under(name: str) -> dict:
    command = [sys.executable, "-c", UNDER_ANOTHER_TORCH, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().rpartition("\n")[2])


def test_another_torch_is_warned_of_once_and_named():
    result = under("2.16.0.dev20270101+cpu")
    (warning,) = result["warnings"]
    assert "2.11 to 2.15" in warning and "2.16.0.dev20270101+cpu" in warning
    assert result["right"]
    assert "2.16.0.dev20270101+cpu (outside 2.11 to 2.15)" in result["doctor"]


def test_a_supported_torch_is_not():
    result = under("2.15.3+cu132")
    assert result["warnings"] == [] and "2.15.3+cu132 (supported)" in result["doctor"]


@pytest.mark.parametrize(
    ("name", "supported"),
    [("2.10.1", False), ("2.11.0", True), ("2.13.0a0+git1234567", True), ("2.15.3", True), ("3.0.0", False)],
)
def test_which_torch_is_supported(monkeypatch, name, supported):
    monkeypatch.setattr(torch, "__version__", name)
    assert compat.is_supported() == supported
