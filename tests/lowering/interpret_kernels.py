"""Runs whole training graphs' GPU code in Triton's interpreter, and prints for each case what differs from eager.

A process of its own, with TRITON_INTERPRET=1, which Triton reads when it is imported, and PYTHONPATH as in the
Makefile's target `kernels`. Arguments: names of cases, or none for all. Prints one line of JSON per case.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import rendered
import torch
import torch.nn.functional as F
from gpu_graphs import SMALL, generate
from head_oracle import check_error_rule

from cce_inductor.lowering.schedules import Sweep
from cce_inductor.lowering.triton_configs import KEPT_TILE
from cce_inductor.lowering.triton_template import Tiles
from cce_inductor.ops.choice import Choice


@dataclass(frozen=True)
class Case:
    """One graph: sizes, dtype of the operands, and the loss as a function of (x, w, b, t)."""

    loss: Callable
    n: int = 70
    d: int = 40
    v: int = 333
    dtype: torch.dtype = torch.float32
    transposed: bool = False
    sharp: float = 1.0
    dynamic: bool = False
    autocast: bool = False
    sweeps: tuple[Sweep, ...] = ()  # the schedule of the backward
    tiles: Tiles = SMALL
    early: bool = False  # gradients formed in the forward


def plain(x, w, b, t):
    return F.cross_entropy(F.linear(x, w, b).float(), t)


def softcapped(x, w, b, t):
    z = 5.0 * torch.tanh(F.linear(x, w, b) * 0.7 / 5.0)
    return F.cross_entropy(z.float(), t, label_smoothing=0.1)


def weighted_rows(x, w, b, t):
    loss = F.cross_entropy(F.linear(x, w, b).float(), t, reduction="none")
    return (loss * torch.linspace(-1, 2, loss.shape[0])).sum()


def class_weights(x, w, b, t):
    return F.cross_entropy(F.linear(x, w, b).float(), t, weight=torch.linspace(0.5, 2, w.shape[0]), label_smoothing=0.2)


def scaled(x, w, b, t):
    return plain(x, w, b, t) * 1024  # as a GradScaler does


EVERY = ("input", "weight", "bias")
# The forward keeps logits in tiles of this many columns.
KEEPING = replace(SMALL, block_n=KEPT_TILE)
CASES = {
    "float32": Case(plain),
    "bfloat16": Case(plain, dtype=torch.bfloat16),
    "float16": Case(scaled, dtype=torch.float16),
    "float32 in bfloat16": Case(plain, autocast=True),
    "softcap, scale and smoothing": Case(softcapped),
    "tangents of both signs": Case(weighted_rows),
    "class weights": Case(class_weights),
    "peaked": Case(plain, sharp=8.0, dtype=torch.bfloat16),
    "one row": Case(plain, n=1),
    "one step of everything": Case(plain, n=32, d=16, v=256),
    "weight stored (D, V)": Case(plain, transposed=True),
    "vocabulary in splits": Case(plain, n=33, v=4500, d=20),
    "blocks": Case(plain, dtype=torch.bfloat16, sweeps=(Sweep(32, 256, EVERY),)),
    "chunk": Case(softcapped, sweeps=(Sweep(32, 512, EVERY),)),
    "chunk of float32 weights in bfloat16": Case(plain, autocast=True, sweeps=(Sweep(32, 512, EVERY),)),
    "separate": Case(plain, dtype=torch.bfloat16, sweeps=(Sweep(32, 512, EVERY[:1]), Sweep(0, 256, EVERY[1:]))),
    "blocks in float16": Case(scaled, dtype=torch.float16, sweeps=(Sweep(32, 256, EVERY),)),
    "TMA": Case(plain, dtype=torch.bfloat16, tiles=replace(SMALL, tma=True)),
    "TMA, in blocks": Case(class_weights, tiles=replace(SMALL, tma=True), sweeps=(Sweep(32, 256, EVERY),)),
    "gradients in the forward, float32": Case(softcapped, early=True, tiles=KEEPING),
    "gradients in the forward, bfloat16": Case(plain, dtype=torch.bfloat16, early=True, tiles=KEEPING),
    "gradients in the forward, peaked": Case(plain, dtype=torch.bfloat16, sharp=8.0, early=True, tiles=KEEPING),
    "gradients in the forward, autocast": Case(plain, autocast=True, early=True, tiles=KEEPING),
}


def run(case: Case) -> dict[str, int]:
    """Compares one case with eager; gives the launches of every kernel. Raises AssertionError beyond the error rule."""
    torch.manual_seed(0)
    x, w, b = torch.randn(case.n, case.d), torch.randn(case.v, case.d) / 4 * case.sharp, torch.randn(case.v)
    t = torch.randint(0, case.v, (case.n,))
    t[2::5] = -100
    leaves = [tensor.to(case.dtype) for tensor in (x, w, b)]
    if case.transposed:
        leaves[1] = leaves[1].t().contiguous().t()

    def loss(x, w, b, t):
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            return case.loss(x, w, b, t)

    def eager(dtype):
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in leaves]
        function = case.loss if dtype == torch.float64 else loss
        value = function(*inputs, t)
        return dict(zip(["loss", "dx", "dw", "db"], [value.detach(), *torch.autograd.grad(value, inputs)], strict=True))

    inputs = [tensor.detach().requires_grad_() for tensor in leaves]
    how = {"tiles": case.tiles, "sweeps": case.sweeps, "workspace": 1 << 14}
    choose = (lambda problem: Choice("test", gradients_in_forward=True)) if case.early else None
    forward, backward = generate(loss, [*inputs, t], dynamic=case.dynamic, choose=choose, **how)
    order = rendered.arguments(forward)
    by_shape = [*leaves, t]
    with torch.no_grad():
        out, first = rendered.execute(forward, by_shape[: len(order)])
        tangent = torch.ones((), dtype=out[0].dtype)
        gradients, second = rendered.execute(backward, [*out[1:], tangent])
    ours = dict(zip(["loss", "dx", "dw", "db"], [out[0], *gradients], strict=False))
    compute = torch.bfloat16 if case.autocast else case.dtype
    check_error_rule("", ours, eager(case.dtype), eager(torch.float64), compute)
    return {**first, **second}


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        try:
            print(json.dumps({"case": name, "launches": run(CASES[name])}), flush=True)
        except Exception as error:  # reported per case: the others still run
            print(json.dumps({"case": name, "error": f"{type(error).__name__}: {error}"}), flush=True)
