"""The version string that keeps compiled kernels from going stale: it changes with every source file and template."""

import pytest

from cce_inductor import version


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
