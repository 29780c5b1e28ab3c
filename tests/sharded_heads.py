"""What `test_sharded_heads` runs on each of several ranks: heads that no rank has whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from allocations import Allocations
from capture import THROUGH_AOT
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cce_inductor
from cce_inductor import config, eager_heads
from cce_inductor.backend import compile_graph
from cce_inductor.ops.call import Attributes
from cce_inductor.ops.library import FORWARD
from cce_inductor.ops.sharded import Shards, gathered, statistics
from cce_inductor.record import collect
from cce_inductor.rewrite import sharded_heads as rewrite_of_heads

N, D = 36, 16


class Model(nn.Module):
    def __init__(self, vocab: int, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(D, D)
        self.head = nn.Linear(D, vocab, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.trunk(x)))


class Gathered(nn.Module):
    """A linear layer in the way of SimpleFSDP: its parameters are gathered in the graph."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__()
        for name, p in linear.named_parameters():
            own = distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=None)
            self.register_parameter(name, nn.Parameter(own))

    def whole(self, p: Any, dtype: torch.dtype) -> Tensor | None:
        if p is None:
            return None
        cast = {} if p.dtype == dtype else {"forward_dtype": dtype, "backward_dtype": torch.float32}
        return p.redistribute(placements=[Replicate()], **cast).to_local(grad_placements=[Partial("avg")])

    def forward(self, x: Tensor) -> Tensor:
        bias = self._parameters.get("bias")
        return F.linear(x, self.whole(self.weight, x.dtype), self.whole(bias, x.dtype))


def mean(z: Tensor, t: Tensor, **how: Any) -> Tensor:
    return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), t, **how)


def with_z_loss(z: Tensor, t: Tensor) -> Tensor:
    return mean(z, t) + 1e-2 * z.logsumexp(-1).square().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": mean,
    "sum": lambda z, t: 0.1 * mean(z, t, reduction="sum"),
    "smoothed": lambda z, t: mean(z, t, label_smoothing=0.1),
    "z-loss": with_z_loss,
    "softcap": lambda z, t: mean(5.0 * torch.tanh(z / 5.0), t),
    "written out": lambda z, t: (z.logsumexp(-1) - z.gather(-1, t.clamp(min=0)[:, None])[:, 0]).mean(),
    "entropy": lambda z, t: mean(z, t) - 0.1 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
}
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WAYS = ("inside", "another graph", "eager", "SimpleFSDP")
# What is tried: the way, the schedule, the loss, classes, bias, dtype.
CASES = [
    ("inside", "swap", "mean", 81, False, torch.float64),
    ("another graph", "stream", "mean", 81, False, torch.float64),
    ("eager", "swap", "mean", 81, False, torch.float64),
    ("SimpleFSDP", "stream", "written out", 81, True, torch.float64),
    ("SimpleFSDP", "swap", "mean", 80, True, torch.bfloat16),
    ("inside", "stream", "smoothed", 81, True, torch.float64),
    ("inside", "swap", "entropy", 81, False, torch.float64),
]
# On more ranks, in their place.
MORE = [
    *((way, how, "mean", 80, True, torch.bfloat16) for way in ("inside", "SimpleFSDP") for how in ("swap", "stream")),
    *(("inside", how, name, 81, True, torch.float64) for how in ("swap", "stream") for name in ("smoothed", "z-loss")),
    *((way, "auto", "mean", v, False, torch.float64) for way in ("inside", "SimpleFSDP") for v in (70, 400)),
    ("SimpleFSDP", "gather", "mean", 81, False, torch.float64),
    *((way, how, "mean", 81, True, torch.float64) for way in WAYS for how in ("swap", "stream")),
    *(("SimpleFSDP", how, name, 81, True, torch.float64) for how in ("swap", "stream") for name in ("sum", "softcap")),
    *(("SimpleFSDP", how, "smoothed", 5, True, torch.float64) for how in ("swap", "stream")),  # rank 3 of 4 has none
]


def data(ranks: int, vocab: int) -> tuple[Tensor, Tensor]:
    """The tokens of every rank. The targets of rank 1 are of the first classes alone, and some of no class."""
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(ranks, N, D, generator=generator), torch.randint(vocab, (ranks, N), generator=generator)
    t[1] %= 2
    t[:, :2], t[1, :25] = -100, -100
    return x, t


def wrapped(model: Any, way: str, how: str, mesh: DeviceMesh, policy: MixedPrecisionPolicy | None) -> Any:
    if way == "SimpleFSDP":
        model.head, model.trunk = Gathered(model.head, mesh), Gathered(model.trunk, mesh)
        return model
    cce_inductor.shard_head(model.head, mesh, how)
    options = {} if policy is None else {"mp_policy": policy}
    fully_shard(model.trunk, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def exact(vocab: int, bias: bool, name: str, ranks: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The loss of each rank and the gradients of their mean, in one process; the head's operands are of `dtype`."""
    model = Model(vocab, bias).to(dtype)
    x, t = data(ranks, vocab)
    losses = [LOSSES[name](model(x[r].to(dtype)), t[r]) for r in range(ranks)]
    grads = torch.autograd.grad(torch.stack(losses).double().mean(), list(model.parameters()))
    return [loss.detach() for loss in losses], list(grads)


def case(way: str, how: str, name: str, vocab: int, bias: bool, dtype: torch.dtype, mesh: DeviceMesh) -> dict[str, Any]:
    """Two steps of training, and what was found at the second."""
    eager_heads._calls.clear()  # a loss is counted when it is rewritten
    counters["cce_inductor"].clear()
    low = dtype == torch.bfloat16
    model = Model(vocab, bias).to(torch.float32 if low else dtype)
    model = wrapped(model, way, how, mesh, BF16 if low else None)
    x, t = (part[mesh.get_local_rank()] for part in data(mesh.size(), vocab))
    x = x if low else x.to(dtype)
    options = {"backend": "cce", "options": run_options(how if way == "SimpleFSDP" else "gather")}
    loss_of = LOSSES[name]

    def step(x: Tensor, t: Tensor) -> Tensor:
        if low and way == "SimpleFSDP":
            return loss_of(model.head(torch.tanh(model.trunk(x)).bfloat16()), t)
        return loss_of(model(x), t)

    if way == "another graph":
        head, apart = torch.compile(model, **options), torch.compile(loss_of, **options)
        run: Callable = lambda x, t: apart(head(x), t)  # noqa: E731
    else:
        run = step if way == "eager" else torch.compile(step, **options)
    with collect() as found:
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            loss = run(x, t)
            loss.backward()
    ours = dict(counters["cce_inductor"])
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return {
        "loss": loss.detach(),
        "grads": grads,
        "fused": ours.get("fused", 0),
        "read": ours.get("deferred_materialized", 0),
        "kernels": [site.kernel for graph in found for site in graph.sites],
        "sites": [str(site) for graph in found for site in graph.sites],
    }


def attempt(function: Callable[..., Any], *args: Any) -> str:
    """The error of a call, as text, or ""."""
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refused(mesh: DeviceMesh) -> dict[str, str]:
    """What `shard_head` does not take."""
    tied = nn.ModuleDict({"embed": nn.Embedding(80, D), "head": nn.Linear(D, 80, bias=False)})
    tied["head"].weight = tied["embed"].weight
    square = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("replicas", "shards"))
    head = nn.Linear(D, 80)
    shard = cce_inductor.shard_head
    return {
        "tied": attempt(shard, tied["head"], mesh),
        "conv": attempt(shard, nn.Conv1d(D, 80, 1), mesh),
        "two": attempt(shard, head, square),
        "how": attempt(shard, head, mesh, "ring"),
        "one dimension": attempt(shard, head, square["shards"]),
        "twice": attempt(shard, head, mesh),
    }


def different_rows(mesh: DeviceMesh) -> dict[str, Any]:
    """The last rank has fewer rows than the others."""
    found: dict[str, Any] = {}
    x, t = data(mesh.size(), 81)
    rows = [N - 4 * (r == mesh.size() - 1) for r in range(mesh.size())]
    reference = Model(81, True).double()
    losses = [mean(reference(x[r, :n].double()), t[r, :n]) for r, n in enumerate(rows)]
    found["exact"] = torch.autograd.grad(torch.stack(losses).mean(), list(reference.parameters()))
    r = mesh.get_local_rank()
    for how in ("swap", "stream"):
        for compiled in (False, True):
            torch._dynamo.reset()
            model = wrapped(Model(81, True).double(), "inside", how, mesh, None)
            run = torch.compile(model, backend="cce", options=THROUGH_AOT) if compiled else model
            given = x[r, : rows[r]].double(), t[r, : rows[r]]
            found[how, compiled] = attempt(lambda run=run, given=given: mean(run(given[0]), given[1]).backward())
            if how == "stream":
                found["grads", compiled] = [p.grad.full_tensor() for p in model.parameters()]
    return found


def without_target(mesh: DeviceMesh) -> dict[str, Any]:
    """The last rank has no target: its loss is NaN, its gradients are 0. Then other numbers of rows, in one graph."""
    found: dict[str, Any] = {}
    x, t = data(mesh.size(), 81)
    t[-1] = -100
    r = mesh.get_local_rank()
    for rows in (N, N - 5, N - 9):
        reference = Model(81, True).double()
        losses = [mean(reference(x[i, :rows].double()), t[i, :rows]) for i in range(mesh.size())]
        found["exact", rows] = torch.autograd.grad(torch.stack(losses).mean(), list(reference.parameters()))
    for how in ("swap", "stream"):
        torch._dynamo.reset()
        model = wrapped(Model(81, True).double(), "SimpleFSDP", how, mesh, None)
        step = functools.partial(lambda model, x, t: mean(model(x), t), model)
        run = torch.compile(step, backend="cce", dynamic=True, options=run_options(how))
        for rows in (N, N - 5, N - 9):
            model.zero_grad()
            loss = run(x[r, :rows].double(), t[r, :rows])
            loss.backward()
            found[how, rows] = loss.isnan().item(), [p.grad.full_tensor() for p in model.parameters()]
    return found


def training(mesh: DeviceMesh) -> dict[str, Any]:
    """Steps of AdamW with clipped gradients: what FSDP2 alone makes of the parameters, and what it does with us."""

    def train(how: str | None) -> dict[str, Tensor]:
        torch._dynamo.reset()
        model: Any = Model(81, True).double()
        if how is not None:
            cce_inductor.shard_head(model.head, mesh, how)
        # The head in a group with another layer, as torchtitan has it, and below the root.
        fully_shard([model.trunk, model.head], mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(mesh.get_local_rank())
        run = torch.compile(model, backend="cce", options=THROUGH_AOT)
        for _ in range(3):
            x, t = torch.randn(N, D, generator=generator).double(), torch.randint(81, (N,), generator=generator)
            for part in range(2):  # gradients are accumulated
                z = run(x[part::2])
                (mean(z, t[part::2]) / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return {name: p.full_tensor() for name, p in model.state_dict().items()}

    return {str(how): train(how) for how in (None, "swap", "stream")}


def read(mesh: DeviceMesh) -> dict[str, Any]:
    """Logits that all ranks read: before the loss, behind it, without a gradient, and as the loss of another kind."""
    x, t = (part[mesh.get_local_rank()] for part in data(mesh.size(), 81))
    exact = Model(81, True).double()
    found: dict[str, Any] = {"z": exact(x.double()).detach()}
    every, _ = data(mesh.size(), 81)
    losses = [exact(part.double()).square().mean() for part in every]
    found["exact"] = torch.autograd.grad(torch.stack(losses).mean(), list(exact.parameters()))
    for way in ("inside", "eager", "SimpleFSDP"):
        torch._dynamo.reset()
        model = wrapped(Model(81, True).double(), way, "swap", mesh, None)
        run = model if way == "eager" else torch.compile(model, backend="cce", options=THROUGH_AOT)
        z = run(x.double())
        mean(z, t)
        found[way, "lazy"] = type(z).__name__ == "DeferredLogits" and not z.is_materialized
        found[way, "before"] = z.detach() + 0
        z.square().mean().backward()
        found[way, "grads"] = [p.grad.full_tensor() for p in model.parameters()]
        with torch.no_grad():
            found[way, "evaluation"] = model.eval()(x.double()) + 0
    return found


def lonely(mesh: DeviceMesh) -> list[str]:
    """The errors of reads that the first rank does alone."""
    errors = []
    for way in ("eager", "SimpleFSDP"):
        torch._dynamo.reset()
        model = wrapped(Model(81, True), way, "gather", mesh, None)
        run = model if way == "eager" else torch.compile(model, backend="cce", options=THROUGH_AOT)
        with config.patch(defer_timeout=1):
            z = run(data(mesh.size(), 81)[0][mesh.get_local_rank()])
            if mesh.get_local_rank() == 0:
                errors.append(attempt(z.sum))
            dist.barrier()
    return errors


def faulty(mesh: DeviceMesh) -> str:
    """An error within the pass: other ranks may have rewritten the graph."""

    def fail(*args: Any) -> str:
        raise AssertionError("as a test")

    model = wrapped(Model(81, False), "SimpleFSDP", "swap", mesh, None)
    before, rewrite_of_heads.localise = rewrite_of_heads.localise, fail
    try:
        x, t = (part[0] for part in data(2, 81))
        step = torch.compile(lambda x, t: mean(model(x), t), backend="cce", options=run_options("swap"))
        return attempt(step, x, t)
    finally:
        rewrite_of_heads.localise = before


class Traffic(TorchDispatchMode):
    """Counts what this rank sends in collectives, in bytes, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("_c10d_functional::")
        if name != function._schema.name and name != "wait_tensor":
            sent = args[0].numel() * args[0].itemsize
            if name == "all_gather_into_tensor":
                sent *= args[1] - 1
            elif name == "reduce_scatter_tensor":
                sent -= sent // args[2]
            else:
                own = args[2][dist.get_rank()]
                sent -= sent * own // max(sum(args[2]), 1)
            self.calls.setdefault(name, []).append(sent)
        return function(*args, **(kwargs or {}))


# Large enough for what is counted: logits, all of the weight and all tokens differ.
SIZES = {"n": 512, "d": 128, "v": 8192}


def counted(mesh: DeviceMesh) -> dict[str, Any]:
    """Bytes sent by each rank in forward and backward; what is allocated; float32 hidden states and weights."""
    n, d, v = SIZES.values()
    shards = Shards(v, mesh.get_group().group_name, True)
    generator = torch.Generator().manual_seed(mesh.get_local_rank())
    x, t = torch.randn(n, d, generator=generator), torch.randint(v, (n,), generator=generator)
    w = torch.randn(shards.count(shards.rank), d, generator=generator)
    attributes = Attributes(compute_dtype=torch.float32, workspace=1 << 20).args()
    found: dict[str, Any] = {}
    for how in ("gather", "swap", "stream"):

        def run(how: str = how) -> tuple[Tensor, Any]:
            own, hidden = w.clone().requires_grad_(), x.clone().requires_grad_()
            given, names = [hidden, own, t], "input weight target"
            if how == "gather":
                given[1] = gathered(own, v, shards.group, True)
                lse, z = FORWARD(given, names, None, "lse target_logit", True, *attributes)
            else:
                split = v, shards.group, True, how
                lse, z = statistics(given, names, None, "lse target_logit", attributes, *split)
            return (lse - z).mean(), (hidden, own)

        run()  # what is allocated once
        with Allocations() as memory:
            loss, _leaves = run()  # they hold the gradients
            loss.backward()
        traffic = Traffic()
        with traffic:
            loss, _ = run()
            forward, traffic.calls = traffic.calls, {}
            loss.backward()
        found[how] = {"forward": forward, "backward": traffic.calls, "largest": memory.largest, "peak": memory.peak}
    return found


def graphs(mesh: DeviceMesh) -> dict[str, Any]:
    """The collectives in the graphs that a compiler is given, of the forward and of the backward, and all shapes."""
    found: dict[str, Any] = {}
    for how in ("gather", "swap", "stream"):
        torch._dynamo.reset()
        head = Gathered(nn.Linear(D, 80, bias=False), mesh)
        seen: dict[str, Any] = {}

        def counting(name: str, seen: dict[str, Any] = seen) -> Callable:
            def keep(gm: torch.fx.GraphModule, inputs: Any) -> Callable:
                called = [str(getattr(node.target, "_opname", "")) for node in gm.graph.nodes]
                seen[name] = {op: called.count(op) for op in COLLECTIVES if op in called}
                values = [node.meta.get("val") for node in gm.graph.nodes if node.op == "call_function"]
                seen["shapes"] = seen.get("shapes", []) + [tuple(z.shape) for z in values if isinstance(z, Tensor)]
                return make_boxed_func(gm.forward)

            return keep

        compiler = aot_autograd(fw_compiler=counting("forward"), bw_compiler=counting("backward"))
        settings = replace(config.current(), sharded_head=how)
        run = torch.compile(
            lambda x, t, head=head: mean(head(x), t),
            backend=functools.partial(compile_graph, settings=settings, compiler=compiler),
        )
        x, t = (part[mesh.get_local_rank()] for part in data(mesh.size(), 80))
        run(x.requires_grad_(), t).backward()
        found[how] = seen
    return found


COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "all_reduce", "broadcast")


def run_options(how: str) -> dict[str, Any]:
    return {**THROUGH_AOT, "sharded_head": how}


OTHERS: dict[str, Callable[[DeviceMesh], Any]] = {
    "refused": refused,
    "different rows": different_rows,
    "without target": without_target,
    "training": training,
    "read": read,
    "lonely": lonely,
    "faulty": faulty,
    "counted": counted,
    "graphs": graphs,
}


# Of them, those of two ranks, which are quick.
OF_TWO = ("refused", "different rows", "training", "read", "lonely", "faulty", "graphs")


def programs(mesh: DeviceMesh, folder: str) -> dict[Any, Callable[[], Any]]:
    few = mesh.size() == 2
    cases = {given: functools.partial(case, *given, mesh) for given in (CASES if few else MORE)}
    return cases | {name: functools.partial(OTHERS[name], mesh) for name in (OF_TWO if few else OTHERS)}
