import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from cce_inductor import version
from cce_inductor.lowering.register import register

# The oracle of the operators' tests serves the compiled operators as well.
sys.path.insert(0, str(Path(__file__).parent.parent / "ops"))


@pytest.fixture
def lowerings():
    """The kernels registered, and nothing compiled or counted before."""
    register()
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def edit_template(tmp_path, monkeypatch) -> Callable[[str, str, str], None]:
    """edit(file, old, new): from then on, kernels are rendered from templates with that one place edited."""
    folder = tmp_path / "templates"
    shutil.copytree(version.templates_dir(), folder)
    monkeypatch.setattr(version, "templates_dir", lambda: folder)

    def edit(file: str, old: str, new: str) -> None:
        text = (folder / file).read_text()
        assert text.count(old) == 1
        (folder / file).write_text(text.replace(old, new))

    return edit


@pytest.fixture
def three_threads(edit_template, capfd) -> Iterator[Callable[[], set[tuple[int, int]]]]:
    """Compiles and runs on three threads, whatever OMP_NUM_THREADS says; gives (tasks, threads) of every parallel loop.

    The kernels count the threads that took part. Their version, a hash of the edited templates, keeps them apart in
    Inductor's cache from those that were compiled for another number.
    """
    report = 'std::fprintf(stderr, "%ld tasks on %ld threads\\n", long(tasks), long(workers));'
    edit_template("tiles.cpp.jinja", "#endif\n  });\n}", "#endif\n  });\n  " + report + "\n}")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield lambda: {(int(a), int(b)) for a, b in re.findall(r"(\d+) tasks on (\d+) threads", capfd.readouterr().err)}
    torch.set_num_threads(before)
