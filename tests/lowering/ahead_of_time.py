"""Compiles every configuration of the Triton kernels for every architecture, without a GPU; prints docs/kernels.md.

`make kernels`, or with PYTHONPATH as there: python tests/lowering/ahead_of_time.py [float32 | bfloat16 | ...]...
"""

import itertools
import sys
from collections.abc import Iterator, Sequence

import rendered
import torch
import torch.nn.functional as F
from gpu_graphs import generate
from torch._subclasses.fake_tensor import FakeTensorMode

from cce_inductor.lowering.schedules import Sweep
from cce_inductor.lowering.triton_configs import CACHED_TILE, TABLE, holds_factors, kind
from cce_inductor.lowering.triton_template import Tiles
from cce_inductor.ops.choice import Choice

SHAPE = (8192, 4096, 128256)  # Llama 3 8B
ARCHITECTURES = (80, 90, 100, "gfx942")
DTYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "autocast": (torch.float32, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
    "int8": (torch.int8, torch.bfloat16),  # the weight; hidden states are bfloat16
}


ALL = ("input", "weight")
# name: how the graph is made. Each kernel is a variant of its own in each.
VARIANTS = {
    "slab": {"sweeps": (Sweep(0, 65536, ALL),)},
    "blocks": {"sweeps": (Sweep(4096, 65536, ALL),)},
    # Room for all columns at once: one slab.
    "budget": {"grad_filter": "budget 0.004", "workspace": 3 << 30},
    "kept": {"choose": lambda problem: Choice("test", gradients_in_forward=True)},
    # All GEMMs are PyTorch's: what is left, of which statistics of products are the forward's that keeps them.
    "library": {"sweeps": (Sweep(0, 16384, ALL, True, True),), "library": True},
    "kept by the library": {"choose": lambda problem: Choice("test", gradients_in_forward=True), "library": True},
    # Both trained, divergences both ways beside the cross-entropy, in two slabs.
    "two heads": {"workspace": 3 << 30},
}
# The same with a factor for each row and each class, all with gradients; no filter applies to them.
FACTORS = ", factors"
VARIANTS |= {f"{name}{FACTORS}": VARIANTS[name] for name in ("slab", "blocks", "kept", "two heads")}


def compiled(
    dtype: str,
    variants: Sequence[str] = tuple(VARIANTS),
    architectures: Sequence = ARCHITECTURES,
    of_each: int | None = None,
) -> Iterator[dict]:
    """One row of the table for each kernel, configuration and architecture.

    of_each: only the first so many configurations of each kernel.
    """
    stored, compute = DTYPES[dtype]
    n, d, v = SHAPE

    codes = stored == torch.int8

    def logits(x, w, rows=None, classes=None):
        with torch.autocast("cpu", compute, enabled=stored != compute and not codes):
            z = F.linear(x, w.to(x.dtype) if codes else w)
            return (z if rows is None else z * classes * rows).float()

    def loss(x, w, t, *factors):
        return F.cross_entropy(logits(x, w, *factors), t)

    def of_two(x, w, t, y, u, *factors):
        z, r = logits(x, w, *factors), logits(y, u, *factors)
        log_p, log_q = z.log_softmax(1), r.log_softmax(1)
        both = F.kl_div(log_p, log_q, log_target=True) + F.kl_div(log_q, log_p, log_target=True)
        return both + F.cross_entropy(z, t)

    with FakeTensorMode():
        x, y = (torch.empty(n, k, dtype=compute if codes else stored, requires_grad=True) for k in (d, d // 2))
        w, u = (torch.empty(v, k, dtype=stored, requires_grad=not codes) for k in (d, d // 2))
        t = torch.empty(n, dtype=torch.int64)
        factors = [torch.empty(size, requires_grad=True) for size in ((n, 1), (v,))]
    column = kind([stored], compute)
    seen = set()
    for architecture, variant in itertools.product(architectures, variants):
        table, factored = TABLE[architecture], FACTORS * variant.endswith(FACTORS)

        def wanted(name: str, architecture=architecture, table=table, factored=factored) -> list[Tiles]:
            found = table[name][column]
            return [t for t in found if not factored or holds_factors(architecture, name, t)][:of_each]

        for tiles in dict.fromkeys(tiles for name in table for tiles in wanted(name)):
            if variant in ("kept", "kept, factors") and tiles.block_n != CACHED_TILE:
                continue
            # PyTorch's GEMMs multiply operands of one dtype. Of their variants nothing else is new.
            alike = stored == compute != torch.float16
            if "library" in variant and not (
                alike and any(tiles in wanted(name) for name in table if name.endswith("products"))
            ):
                continue
            # What Inductor writes for AMD differs in nothing that our kernels use.
            capability = architecture if isinstance(architecture, int) else 80
            of = of_two if variant.startswith("two heads") else loss
            given = [x, w, t, *[y, u] * (of is of_two), *factors * bool(factored)]
            for wrapper in generate(of, given, capability, tiles, **VARIANTS[variant]):
                for kernel in rendered.kernels(wrapper):
                    name = kernel.ours
                    key = (architecture, tiles, name, factored)
                    if name and key not in seen and tiles in wanted(name):
                        seen.add(key)
                        about = {"kernel": name + factored, "dtype": dtype, "sm": architecture, "tiles": tiles}
                        yield about | rendered.compile_ahead(kernel, architecture)


TITLE = """\
# Resources of the Triton kernels

`make kernels` prints this: every configuration that the autotuner may try, compiled ahead of time for the shape
N={}, D={}, V={}. Stack is what spills; shared memory may be 163 KiB on sm_80, 227 KiB on sm_90 and sm_100, 64 KiB on
gfx942.
None of it was run on a GPU.
"""

if __name__ == "__main__":
    print(TITLE.format(*SHAPE))
    print("| kernel | dtype | sm | tiles | registers | stack, B | shared, B | instruction |")
    print("|---|---|---|---|---|---|---|---|")
    plain = [name for name in VARIANTS if not name.endswith(FACTORS)]
    every = [(dtype, names) for names in (plain, VARIANTS) for dtype in sys.argv[1:] or DTYPES]
    for dtype, names in every:
        for row in compiled(dtype, [name for name in names if names is plain or name not in plain]):
            print(
                f"| {row['kernel']} | {dtype} | {row['sm']} | {row['tiles']} | {row['registers']} "
                f"| {row['stack']} | {row['shared']} | {row['instruction']} |",
                flush=True,
            )
