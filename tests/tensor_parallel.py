"""What `test_tensor_parallel` runs on each of several ranks: heads that are split over them, with us and without."""

from __future__ import annotations

import functools
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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, loss_parallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from cce_inductor import DeferredLogitsError, config
from cce_inductor.backend import compile_graph
from cce_inductor.record import collect
from cce_inductor.rewrite import split_heads

B, S, D = 2, 6, 16


class Model(nn.Module):
    def __init__(self, vocab: int, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.head = nn.Linear(D, vocab, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.trunk(x))))


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def flat(z: Any, t: Tensor, **how: Any) -> Any:
    z = z.flatten(0, 1)
    return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), t.flatten(), **how)


def with_z_loss(z: Any, t: Tensor) -> Any:
    return flat(z, t) + 1e-2 * z.flatten(0, 1).logsumexp(-1).square().mean()


def with_entropy(z: Any, t: Tensor) -> Any:
    log_p = z.flatten(0, 1).log_softmax(-1)
    return flat(z, t) + 0.1 * (log_p.exp() * log_p).sum(-1).mean()


def with_accuracy(z: Any, t: Tensor) -> Any:
    return flat(z, t) + (z.argmax(-1) == t).float().mean() + (-0.5 * z).argmax(-1).sum()


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
    "entropy": with_entropy,
    "accuracy": with_accuracy,
    "returned": flat,  # beside the logits, which are read
    "returned, trained through": flat,
}
# How the head hands its logits on. The losses that `loss_parallel` does not know are given plain tensors.
PLANS: dict[str, dict[str, Any]] = {
    "split": {"output_layouts": Shard(-1), "use_local_output": False},
    "replicated": {"output_layouts": Replicate()},
    "sequence": {"output_layouts": Replicate(), "input_layouts": Shard(1)},
}
CASES = [
    ("split", "mean", 40, False),
    *(("replicated", name, 41, True) for name in ("smoothed", "entropy", "accuracy")),
    ("sequence", "returned", 40, False),
    ("replicated", "returned, trained through", 41, True),
    ("split", "returned, trained through", 40, False),
]
# On more ranks.
MORE = [
    *(("split", name, 40, False) for name in ("sum", "scaled")),
    *(("replicated", name, 41, True) for name in ("mean", "sum", "scaled", "softcap", "none", "z-loss", "written out")),
    ("split", "mean", 41, True),
    ("split", "returned", 41, True),
    ("sequence", "mean", 40, False),
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
    if plan == "replicated":  # another layer that is split in the same way is no head
        layers["trunk"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, layers)
    return model


def case(plan: str, name: str, vocab: int, bias: bool, mesh: DeviceMesh) -> dict[str, Any]:
    x, t = data(vocab)
    if name == "written out":
        t = t.clamp(min=0)
    exact = Model(vocab, bias).double()
    logits = exact(x.double())
    loss = LOSSES[name](logits, t)
    through = 0.1 * logits.square().mean() if name == "returned, trained through" else 0.0
    expected = torch.autograd.grad(loss + through, list(exact.parameters()))
    model = parallel(Model(vocab, bias), plan, mesh)
    counters["cce_inductor"].clear()

    returned = name.startswith("returned")

    def step(x: Tensor, t: Tensor) -> Any:
        z = model(x)
        return (LOSSES[name](z, t), z) if returned else LOSSES[name](z, t)

    run = torch.compile(step, backend="cce", options=THROUGH_AOT)
    given = x.chunk(mesh.size(), 1)[mesh.get_local_rank()] if plan == "sequence" else x
    if plan == "sequence":
        model.trunk.requires_grad_(False)  # each rank has its own part of the rows, before the norm
    with loss_parallel(), collect() as found:
        made = run(given, t)
        made, z = made if returned else (made, None)
        total = made
        if name == "returned, trained through":
            total = whole(made) + 0.1 * whole(z).square().mean()
        total.backward()
    reads = counters["cce_inductor"]["deferred_materialized"]
    grads = [whole(p.grad) for p in model.parameters() if p.grad is not None]
    wanted = [e for p, e in zip(model.parameters(), expected, strict=True) if p.grad is not None]
    return {
        "value": whole(made).detach(),
        "exact": loss.detach(),
        "grads": [*zip(grads, wanted, strict=True), *([] if z is None else [(whole(z.detach()), logits.detach())])],
        "reads": reads,
        "fused": counters["cce_inductor"]["fused"],
        "reasons": [str(site) for graph in found for site in graph.sites],
    }


def graphs(mesh: DeviceMesh) -> dict[str, dict[str, int]]:
    """The collectives in the graphs that a compiler is given, of the forward and of the backward."""
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


def lonely(mesh: DeviceMesh) -> list[str]:
    """The errors of ranks that read logits, of which each has a part, when others do not."""
    model = parallel(Model(41, True), "replicated", mesh)
    x, t = data(41)
    errors = []

    def step(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        z = model(x)
        return flat(z, t), z

    with config.patch(defer_timeout=1):
        run = torch.compile(step, backend="cce", options=THROUGH_AOT)
        for _ in range(2):  # the second one meets as if nothing had been
            z = run(x, t)[1]
            for reader in range(mesh.size()):
                if dist.get_rank() == reader:
                    try:
                        z.sum()
                    except DeferredLogitsError as error:
                        errors.append(str(error))
                dist.barrier()
        run(x, t)[1].sum()
    return errors


def failing(mesh: DeviceMesh) -> str:
    """The error where our pass fails: the graph as it was would wait for ranks on which it has not failed."""
    model = parallel(Model(41, True), "replicated", mesh)
    x, t = data(41)

    def broken(*_: Any) -> bool:
        raise ArithmeticError

    before, split_heads.localise = split_heads.localise, broken
    try:
        torch.compile(lambda x, t: flat(model(x), t), backend="cce", options=THROUGH_AOT)(x, t)
    except Exception as error:
        return str(error)
    finally:
        split_heads.localise = before
    return "none"


def hugging_face(mesh: DeviceMesh, folder: str) -> dict[str, Any]:
    """A model that its own plan has split, unmodified: it returns its logits beside the loss."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    configuration = LlamaConfig(vocab_size=130, hidden_size=32, intermediate_size=64, **sizes)
    torch.manual_seed(0)
    exact = LlamaForCausalLM(configuration)
    if dist.get_rank() == 0:
        exact.save_pretrained(folder)
    dist.barrier()
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", device_mesh=mesh).train()
    ids = torch.randint(130, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = exact.double()(input_ids=ids, labels=ids)
    expected.loss.backward()
    counters["cce_inductor"].clear()
    made = torch.compile(model, backend="cce", options=THROUGH_AOT)(input_ids=ids, labels=ids)
    made.loss.backward()
    pairs = [(made.loss, expected.loss)]
    pairs += [(whole(p.grad), q.grad) for p, q in zip(model.parameters(), exact.parameters(), strict=True)]
    reads = counters["cce_inductor"]["deferred_materialized"]
    pairs.append((made.logits, expected.logits))
    return {
        "pairs": [(g.detach(), e.detach()) for g, e in pairs],
        "fused": counters["cce_inductor"]["fused"],
        "reads": reads,
    }


def programs(mesh: DeviceMesh, folder: str) -> dict[Any, Callable[[], Any]]:
    few = mesh.size() == 2
    found: dict[Any, Callable[[], Any]] = {
        given: functools.partial(case, *given, mesh) for given in (CASES if few else CASES + MORE)
    }
    others = {"collectives": graphs, "lonely": lonely, "failing": failing}
    found |= {name: functools.partial(other, mesh) for name, other in others.items()}
    return found | ({"hugging face": lambda: hugging_face(mesh, f"{folder}/model")} if few else {})
