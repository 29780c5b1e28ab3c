"""DDP and FSDP2 around a compiled model, or compiled themselves: the loss in the model's graph and in another one.

One process with gloo: what these wrappers do to a model's outputs and gradients does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from capture import THROUGH_AOT
from test_other_graphs import Counted, D, V, data, same
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import cce_inductor
from cce_inductor.deferred import DeferredLogits, DeferredLogitsError

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(autouse=True, scope="module")
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Model(nn.Module):
    """Logits, and their loss where there are targets, as Hugging Face models give them."""

    def __init__(self, width: int = D, classes: int = V) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(width, width)
        self.head = nn.Linear(width, classes, bias=False)

    def forward(self, x: Tensor, t: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.trunk(x)))
        return {"logits": logits} if t is None else {"loss": loss_of(logits, t), "logits": logits}


def loss_of(logits: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), t.flatten())


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend=cce_inductor.cce_backend, options=THROUGH_AOT)


def steps(model: Any, inside: bool, x: Tensor, t: Tensor, n: int = 3) -> tuple[list[Tensor], Tensor]:
    """Loss and gradients of the last of `n` steps, and its logits."""
    for _ in range(n):
        model.zero_grad(set_to_none=True)
        out = model(x, t) if inside else model(x)
        loss = out["loss"] if inside else loss_of(out["logits"], t) + out.get("value", 0.0)
        loss.backward()
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return [loss.detach(), *(g.clone() for g in grads)], out["logits"]


# ------------------------------------------------------------------------------------------------------------ DDP

DDP = {
    "plain": {},
    "static_graph": {"static_graph": True},
    "find_unused": {"find_unused_parameters": True},
    "bucket_view": {"gradient_as_bucket_view": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [True, False], ids=["loss_inside", "loss_in_another_graph"])
@pytest.mark.parametrize("order", ["ddp(compile)", "compile(ddp)"])
@pytest.mark.parametrize("name", DDP)
def test_ddp(name: str, order: str, inside: bool) -> None:
    x, t = data()
    expected, logits = steps(DistributedDataParallel(Model(), **DDP[name]), inside, x, t)
    if order == "ddp(compile)":
        model: Any = DistributedDataParallel(compiled(Model()), **DDP[name])
    else:
        model = compiled(DistributedDataParallel(Model(), **DDP[name]))
    with Counted() as c:
        got, lazy = steps(model, inside, x, t)
    same(got, expected)
    assert isinstance(lazy, DeferredLogits)
    same([lazy.detach()], [logits.detach()])
    # Two of them put a function with side effects behind the outputs, which the gradient passes.
    assert c.fused >= 1 and c.reads == 0


class TwoHeads(nn.Module):
    """Large enough for DDP to use several buckets of 1 MB, and Dynamo to cut the graph at their ends."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(*(nn.Linear(300, 300) for _ in range(4)))
        self.head = nn.Linear(300, 1500)
        self.behind = nn.Sequential(*(nn.Linear(300, 300) for _ in range(4)))
        self.last = last

    def forward(self, x: Tensor, t: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.trunk(x)
        if self.last:
            hidden = self.behind(hidden)
        logits = self.head(hidden)
        value = hidden.mean() if self.last else self.behind(hidden).mean()
        out = {"logits": logits, "value": value}
        return out if t is None else {"loss": loss_of(logits, t) + value, **out}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("last", [True, False], ids=["head_last", "head_amid"])
@pytest.mark.parametrize("inside", [True, False], ids=["loss_inside", "loss_in_another_graph"])
def test_a_graph_that_ddp_has_cut_into_parts(inside: bool, last: bool) -> None:
    x, t = torch.randn(2, 5, 300), torch.randint(0, 1500, (2, 5))
    expected, _ = steps(TwoHeads(last), inside, x, t, n=1)
    model = DistributedDataParallel(TwoHeads(last), bucket_cap_mb=1)
    with Counted() as c:
        got, _ = steps(compiled(model), inside, x, t)
    same(got, expected, 1e-4)
    if last:
        assert (c.fused, c.reads) == (1, 0)


# ---------------------------------------------------------------------------------------------------------- FSDP2


def sharded(model: Model, *, mixed: bool = False, reshard: bool | None = None, inner: str = "") -> Model:
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (1,))}
    if mixed:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if inner:
        fully_shard(getattr(model, inner), **options)
    fully_shard(model, reshard_after_forward=reshard, **options)
    return model


FSDP: dict[str, dict[str, Any]] = {
    "root": {},
    "mixed": {"mixed": True},
    "reshard": {"reshard": True},
    "trunk_apart": {"inner": "trunk"},
    "head_apart": {"inner": "head", "mixed": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [True, False], ids=["loss_inside", "loss_in_another_graph"])
@pytest.mark.parametrize("order", ["shard(compile)", "compile(shard)"])
@pytest.mark.parametrize("name", FSDP)
def test_fsdp2(name: str, order: str, inside: bool) -> None:
    x, t = data()
    expected, _ = steps(sharded(Model(), **FSDP[name]), inside, x, t)
    model: Any = Model()
    if order == "shard(compile)":
        model.compile(backend=cce_inductor.cce_backend, options=THROUGH_AOT)
    model = sharded(model, **FSDP[name])
    if order == "compile(shard)":
        model = compiled(model)
    with Counted() as c:
        got, logits = steps(model, inside, x, t)
    same(got, expected, 3e-2 if FSDP[name].get("mixed") else 1e-5)
    # FSDP's hooks on the outputs have run: they bring the parameters back into shards.
    assert all(isinstance(p, DTensor) and isinstance(p.grad, DTensor) for p in model.parameters())
    if inside and name != "head_apart":  # a module of its own is called behind hooks that Dynamo does not trace
        assert (c.fused, c.reads) == (1, 0)
        with pytest.raises(DeferredLogitsError, match="freed|modified|overwritten"):
            logits.argmax(-1)
    if not inside and name == "reshard":
        assert type(logits) is Tensor  # nothing could be computed from a weight that is gone after the forward
