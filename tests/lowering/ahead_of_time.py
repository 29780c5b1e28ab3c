"""Compiles every configuration of the Triton kernels for every architecture, without a GPU; prints docs/kernels.md.

`make kernels`, or with PYTHONPATH as there: python tests/lowering/ahead_of_time.py [float32 | bfloat16 | ...]...
"""

import sys
from collections.abc import Iterator

import rendered
import torch
import torch.nn.functional as F
from gpu_graphs import generate
from torch._subclasses.fake_tensor import FakeTensorMode

from cce_inductor.lowering.triton_configs import configurations

SHAPE = (8192, 4096, 128256)  # Llama 3 8B
ARCHITECTURES = (80, 90, 100)
KERNELS = ("linear_statistics", "linear_statistics_dacc", "linear_statistics_gradients")
DTYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "autocast": (torch.float32, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
}


def compiled(dtype: str, most: int = 99) -> Iterator[dict]:
    """One row of the table for each kernel, configuration (the first `most` of each kernel) and architecture."""
    stored, compute = DTYPES[dtype]
    n, d, v = SHAPE

    def loss(x, w, t):
        with torch.autocast("cpu", compute, enabled=stored != compute):
            return F.cross_entropy(F.linear(x, w).float(), t)

    with FakeTensorMode():
        x = torch.empty(n, d, dtype=stored, requires_grad=True)
        w = torch.empty(v, d, dtype=stored, requires_grad=True)
        t = torch.empty(n, dtype=torch.int64)
    seen = set()
    lists = {
        kernel: configurations(kernel, [stored, stored, compute], torch.device("cuda"))[:most] for kernel in KERNELS
    }
    for architecture in ARCHITECTURES:
        for tiles in dict.fromkeys(option for options in lists.values() for option in options):
            for wrapper in generate(loss, [x, w, t], architecture, tiles, workspace=64 << 20):
                for kernel in rendered.kernels(wrapper):
                    if kernel.kind != "template":
                        continue
                    name = next(k for k in reversed(KERNELS) if _is(k, kernel))
                    if tiles in lists[name] and (key := (architecture, tiles, name)) not in seen:
                        seen.add(key)
                        yield {"kernel": name, "dtype": dtype, "sm": architecture, "tiles": tiles} | (
                            rendered.compile_ahead(kernel, architecture)
                        )


def _is(name: str, kernel: rendered.Kernel) -> bool:
    constants = kernel.constants()
    if name == "linear_statistics":
        return "STATISTICS" in constants
    return ("GROUP" in constants) == (name == "linear_statistics_dacc") and "SLAB" in constants


TITLE = """\
# Resources of the Triton kernels

`make kernels` prints this: every configuration that the autotuner may try, compiled ahead of time for the shape
N={}, D={}, V={}. Stack is what spills; shared memory may be 163 KiB on sm_80 and 227 KiB on sm_90 and sm_100.
None of it was run on a GPU.
"""

if __name__ == "__main__":
    print(TITLE.format(*SHAPE))
    print("| kernel | dtype | sm | block m, n, k | stages | warps | registers | stack, B | shared, B | instruction |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for dtype in sys.argv[1:] or DTYPES:
        for row in compiled(dtype):
            t = row["tiles"]
            print(
                f"| {row['kernel']} | {dtype} | {row['sm']} | {t.block_m}, {t.block_n}, {t.block_k} | {t.num_stages} "
                f"| {t.num_warps} | {row['registers']} | {row['stack']} | {row['shared']} | {row['instruction']} |",
                flush=True,
            )
