"""The wheel: what is in it, and that a fresh environment with only torch and the wheel fuses a loss."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.xdist_group("package")  # one worker builds and installs for all

# A user's script: it knows torch and nothing of cce_inductor, and prints what happened as JSON.
TRAIN = """
import json, sys
import torch
import torch.nn.functional as F

loaded = "cce_inductor.backend" in sys.modules
torch.manual_seed(0)
hidden, weight = torch.randn(24, 16), torch.randn(5000, 16, requires_grad=True)
target = torch.randint(0, 5000, (24,))

def loss_of(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight), target)

expected = loss_of(hidden, weight, target)
(expected_grad,) = torch.autograd.grad(expected, weight)
loss = torch.compile(loss_of, COMPILE)(hidden, weight, target)
(grad,) = torch.autograd.grad(loss, weight)

package = sys.modules.get("cce_inductor")
print(json.dumps({
    "loaded": loaded,
    "loss_error": abs(loss - expected).item(),
    "grad_error": (grad - expected_grad).abs().max().item(),
    "fused": torch._dynamo.utils.counters["cce_inductor"]["fused"],
    "file": package and package.__file__,
}))
"""
BY_NAME = 'backend="cce", options={"min_vocab": 0, "compiler": "aot_eager"}'

# What the hook of `import torch` costs, in seconds: the best of many, each from a cold start of the package.
HOOK_COST = """
import sys, time
from importlib.metadata import entry_points
(hook,) = entry_points(group="torch.backends", name="cce_inductor")
costs = []
for _ in range(20):
    for name in [name for name in sys.modules if name.startswith("cce_inductor")]:
        del sys.modules[name]
    start = time.perf_counter()
    hook.load()()
    costs.append(time.perf_counter() - start)
print(min(costs))
"""


def run(*command, cwd, **env):
    """Run a command outside the checkout, with none of this process's paths or settings; its last line of output."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("CCE_INDUCTOR")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited | env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command[:4]} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip().rpartition("\n")[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the checkout without a network."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a fresh environment that has the wheel, and sees torch where this process has it."""
    home = tmp_path_factory.mktemp("fresh") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=home.parent)
    (site,) = home.glob("lib/python*/site-packages")
    # A path in a .pth file comes after the environment's own packages, and .pth files in it are not read: an
    # editable install of the checkout stays out of sight.
    elsewhere = {sysconfig.get_paths()["purelib"], str(Path(torch.__file__).parents[1])}
    (site / "torch_elsewhere.pth").write_text("".join(f"{path}\n" for path in sorted(elsewhere)))
    return python


@pytest.fixture
def train(python, tmp_path):
    """Runs the user's script in the fresh environment; what it printed."""

    def train(compile_arguments="", **env):
        script = tmp_path / "train.py"
        script.write_text(TRAIN.replace(", COMPILE", f", {compile_arguments}" if compile_arguments else ""))
        result = json.loads(run(python, script, cwd=tmp_path, **env))
        if result["file"] is not None:
            assert Path(result["file"]).is_relative_to(python.parents[1]), "not the wheel's cce_inductor"
        assert result["loss_error"] < 1e-5
        assert result["grad_error"] < 1e-6
        return result

    return train


def test_wheel_holds_every_module_and_template(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "cce_inductor").rglob("*.py")}
    templates = {f"cce_inductor/{path.relative_to(ROOT)}" for path in (ROOT / "templates").rglob("*.*")}
    assert templates
    assert (modules | templates | {"cce_inductor/py.typed"}) - names == set()
    assert not [name for name in names if name.startswith(("tests/", "templates/", "docs/"))]


def test_wheel_declares_its_entry_points_and_requirements(wheel):
    archive = zipfile.ZipFile(wheel)
    texts = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
    points = ConfigParser()
    points.read_string(archive.read(texts["entry_points.txt"]).decode())
    assert points["torch_dynamo_backends"]["cce"] == "cce_inductor.backend:cce_backend"
    assert points["torch.backends"]["cce_inductor"] == "cce_inductor._autoload:autoload"
    metadata = archive.read(texts["METADATA"]).decode()
    assert "Requires-Dist: torch>=2.11\n" in metadata
    assert {line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")} >= {
        "demo",
        "bench",
        "dev",
    }
    assert "LICENSE" in texts


def test_backend_by_name_needs_no_import(train):
    result = train(BY_NAME)
    assert not result["loaded"]
    assert result["fused"] == 1


def test_environment_variable_fuses_an_unmodified_script(train):
    result = train(CCE_INDUCTOR="1", CCE_INDUCTOR_COMPILER="aot_eager")
    assert result["fused"] == 1


def test_unset_variable_changes_nothing(train):
    result = train('backend="aot_eager"')
    assert not result["loaded"]
    assert result["fused"] == 0


def test_hook_of_import_torch_costs_under_2_ms(python, tmp_path):
    cost = float(run(python, "-c", HOOK_COST, cwd=tmp_path))
    assert cost < 2e-3


def test_hook_never_makes_import_torch_fail(python, tmp_path):
    out = run(
        python, "-W", "ignore", "-c", "import torch; print(torch.ones(1).item())",
        cwd=tmp_path, CCE_INDUCTOR="1", CCE_INDUCTOR_MIN_VOCAB="nonsense",
    )  # fmt: skip
    assert out == "1.0"
