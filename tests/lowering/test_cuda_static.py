"""What can be read off the generated GPU kernels and their grids: full waves, little waste, no two-byte loads."""

import math
import re
from types import SimpleNamespace

import mock_cuda
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

import rendered
from gpu_graphs import generate

from cce_inductor.lowering.cuda_forward import cut
from cce_inductor.lowering.schedules import Library, Sweep, full_waves, schedules
from cce_inductor.lowering.triton_configs import TABLE
from cce_inductor.lowering.triton_template import Tiles
from cce_inductor.ops.choice import Choice

MIDDLE = Tiles(128, 128, 64, 4, 8)


@pytest.mark.parametrize(("n", "v"), [(8192, 128256), (8192, 256000), (4096, 128256), (16384, 128256), (2048, 128256)])
def test_waves_of_the_forward_are_full(n, v):
    """One program of 255 registers and 256 threads fits on a multiprocessor: 90 % of them are busy, on average."""
    with mock_cuda.device(90):
        split, splits = cut(SimpleNamespace(device=mock_cuda.CUDA, hint=n, v=v))
    assert split % 256 == 0 and (splits - 1) * split < v <= splits * split
    programs = math.ceil(n / 128) * splits
    assert programs / 132 / math.ceil(programs / 132) >= 0.9
    # The split with the fewest columns has nearly as many as the others.
    assert v - (splits - 1) * split > 0.9 * split


def test_few_rows_have_as_many_splits_as_are_worth_a_program():
    assert full_waves(1, 132, 62) == 60 and full_waves(1, 132, 0) == 1
    assert full_waves(200, 132) == 3


@pytest.mark.parametrize(
    ("n", "v", "mib"),
    [
        *((256, 152064, 64), (512, 152064, 64), (1024, 201088, 64)),
        *((8192, 256000, 2560), (8192, 152064, 2048), (8192, 128256, 64), (8192, 128256, 512), (8192, 256000, 512)),
    ],
)
def test_slabs_waste_little(n, v, mib):
    """Every slab is computed whole: what is beyond V is in vain."""
    of = dict(compute=torch.bfloat16, weight=torch.bfloat16, needs=["input", "weight"], l2=50 << 20)
    for schedule in schedules(n, 4096, v, **of, workspace=mib << 20, static=True, library=Library()):
        for sweep in schedule.sweeps:
            slabs = math.ceil(v / sweep.columns)
            assert slabs * sweep.columns <= 1.03 * v
            entry = 6 if sweep.products else 2
            assert (sweep.rows or n) * sweep.columns * entry <= mib << 20
            # No more of them than there have to be.
            assert sweep.rows or (slabs - 1) * ((mib << 20) // (n * entry) // 256 * 256) < v


@pytest.mark.parametrize(
    ("architecture", "how"),
    [
        (80, {"sweeps": (Sweep(0, 4096, ("input", "weight")),)}),
        pytest.param(90, {"grad_filter": "budget 0.004", "workspace": 3 << 30}, marks=pytest.mark.slow),
        pytest.param(90, {"sweeps": (Sweep(0, 4096, ("input", "weight")),)}, marks=pytest.mark.slow),
    ],
    ids=["Ampere", "a budget on Hopper", "Hopper without TMA"],
)
def test_products_load_no_number_by_itself(architecture, how):
    """dlogits are read 16 bytes at a time: a mask along them would have every number loaded alone, and waited for."""
    seen = narrow_loads(architecture, MIDDLE, ("_dw", "_dx"), how)
    assert len(seen) == 2 and not any(seen.values()), seen


@pytest.mark.parametrize("architecture", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_kernels_of_the_librarys_products_load_no_number_by_itself(architecture):
    early = {"choose": lambda problem: Choice("test", gradients_in_forward=True), "library": True}
    seen = {}
    for name in ("linear_statistics, products", "linear_statistics_dlogits, products"):
        for tiles in TABLE[architecture][name]["16 bits"][:1]:
            seen |= narrow_loads(architecture, tiles, (name,), early)
    assert len(seen) == 2 and not any(seen.values()), seen


def narrow_loads(architecture: int, tiles: Tiles, kernels: tuple[str, ...], how: dict) -> dict[str, int]:
    """How many loads of two bytes there are in each of our kernels whose name ends so."""
    with FakeTensorMode():
        x, w = (torch.empty(n, 4096, dtype=torch.bfloat16, requires_grad=True) for n in (8192, 128256))
        t = torch.empty(8192, dtype=torch.int64)
    seen = {}
    for wrapper in generate(lambda x, w, t: F.cross_entropy(F.linear(x, w), t), [x, w, t], architecture, tiles, **how):
        for kernel in rendered.kernels(wrapper):
            if kernel.ours and kernel.ours.endswith(kernels):
                seen[kernel.ours] = len(re.findall(r"ld\.global\S*\.b16", rendered.assembly(kernel, architecture)))
    return seen
