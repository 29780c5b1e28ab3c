"""What `test_tensor_parallel` runs on each of several ranks: heads that are split over them, with us and without."""

from __future__ import annotations

import datetime
import faulthandler
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from capture import THROUGH_AOT
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, loss_parallel, parallelize_module

from cce_inductor import config
from cce_inductor.backend import compile_graph
from cce_inductor.record import collect

B, S, D = 2, 6, 16


class Model(nn.Module):
    def __init__(self, vocab: int, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.head = nn.Linear(D, vocab, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.trunk(x))))


def flat(z: Any, t: Tensor, **how: Any) -> Any:
    z = z.flatten(0, 1)
    return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), t.flatten(), **how)


def with_z_loss(z: Any, t: Tensor) -> Any:
    return flat(z, t) + 1e-2 * z.flatten(0, 1).logsumexp(-1).square().mean()


def written_out(z: Any, t: Tensor) -> Any:
    return (z.logsumexp(-1) - z.gather(-1, t.clamp(min=0)[..., None]).squeeze(-1)).mean()


LOSSES: dict[str, Callable[[Any, Tensor], Any]] = {
    "mean": flat,
    "sum": lambda z, t: flat(z, t, reduction="sum"),
    "scaled": lambda z, t: 0.5 * flat(z / 0.7, t),
    "smoothed": lambda z, t: flat(z, t, label_smoothing=0.1),
    "z-loss": with_z_loss,
    "softcap": lambda z, t: flat(5.0 * torch.tanh(z / 5.0), t),
    "none": lambda z, t: flat(z, t, reduction="none").square().mean(),
    "written out": written_out,
    "returned": flat,  # beside the logits
}
# How the head hands its logits on; the last four losses need plain tensors, as PyTorch's own `loss_parallel` knows one.
PLANS: dict[str, dict[str, Any]] = {
    "split": {"output_layouts": Shard(-1), "use_local_output": False},
    "replicated": {"output_layouts": Replicate()},
    "sequence": {"output_layouts": Replicate(), "input_layouts": Shard(1)},
}
CASES = [
    ("split", "mean", 40, False),
    ("sequence", "mean", 40, False),
    *(("replicated", name, 41, True) for name in ("smoothed", "z-loss", "none", "written out", "returned")),
]
# On more ranks.
MORE = [
    *(("split", name, 40, False) for name in ("sum", "scaled")),
    *(("replicated", name, 41, True) for name in ("mean", "sum", "scaled", "softcap")),
    ("split", "mean", 41, True),
    ("replicated", "mean", 2, False),  # fewer classes than there are ranks
]


def data(vocab: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(B, S, D, generator=generator), torch.randint(vocab, (B, S), generator=generator)
    t[0] %= max(vocab // 4, 1)  # no class of some ranks
    t[1, 2] = -100
    return x, t


def parallel(model: Model, plan: str, mesh: DeviceMesh) -> Model:
    layers: dict[str, Any] = {"head": ColwiseParallel(**PLANS[plan])}
    if plan == "sequence":
        layers["norm"] = SequenceParallel(use_local_output=True)
    parallelize_module(model, mesh, layers)
    return model


def case(plan: str, name: str, vocab: int, bias: bool, mesh: DeviceMesh) -> dict[str, Any]:
    x, t = data(vocab)
    if name == "written out":
        t = t.clamp(min=0)
    exact = Model(vocab, bias).double()
    loss = LOSSES[name](exact(x.double()), t)
    expected = torch.autograd.grad(loss, list(exact.parameters()))
    torch._dynamo.reset()
    model = parallel(Model(vocab, bias), plan, mesh)
    counters["cce_inductor"].clear()

    def step(x: Tensor, t: Tensor) -> Any:
        z = model(x)
        return (LOSSES[name](z, t), z) if name == "returned" else LOSSES[name](z, t)

    run = torch.compile(step, backend="cce", options=THROUGH_AOT)
    given = x.chunk(mesh.size(), 1)[mesh.get_local_rank()] if plan == "sequence" else x
    if plan == "sequence":
        model.trunk.requires_grad_(False)  # each rank has its own part of the rows, before the norm
    with loss_parallel(), collect() as found:
        made = run(given, t)
        made = made[0] if name == "returned" else made
        made.backward()
    value = made.full_tensor() if isinstance(made, DTensor) else made
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return {
        "value": value.detach(),
        "exact": loss.detach(),
        "grads": [(g, e) for g, e in zip(grads, expected, strict=True) if g is not None],
        "fused": counters["cce_inductor"]["fused"],
        "reasons": [str(site) for graph in found for site in graph.sites],
    }


def graphs(mesh: DeviceMesh) -> dict[str, dict[str, int]]:
    """The collectives in the graphs that a compiler is given, of the forward and of the backward."""
    torch._dynamo.reset()
    model = parallel(Model(40, False), "split", mesh)
    x, t = data(40)
    seen: dict[str, dict[str, int]] = {}

    def counting(name: str) -> Callable:
        def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Callable:
            called = [str(getattr(node.target, "_opname", "")) for node in gm.graph.nodes]
            wanted = ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "all_to_all_single")
            seen[name] = {op: called.count(op) for op in wanted if op in called}
            return make_boxed_func(gm.forward)

        return compiler

    compiler = aot_autograd(fw_compiler=counting("forward"), bw_compiler=counting("backward"))
    settings = replace(config.current(), min_vocab=0, compiler="aot_eager")
    run = torch.compile(
        lambda x, t: flat(model(x), t), backend=lambda gm, inputs: compile_graph(gm, inputs, settings, compiler)
    )
    with loss_parallel():
        run(x, t).backward()
    return seen


def work(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(120, exit=True)
    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    mesh = init_device_mesh("cpu", (ranks,))
    results: dict[Any, Any] = {}
    for given in CASES if ranks == 2 else CASES + MORE:
        try:
            results[given] = case(*given, mesh)
        except Exception:
            results[given] = traceback.format_exc()
    try:
        results["collectives"] = graphs(mesh)
    except Exception:
        results["collectives"] = traceback.format_exc()
    torch.save(results, f"{folder}/{ranks}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
