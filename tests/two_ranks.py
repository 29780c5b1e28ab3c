"""What `test_two_ranks` runs in each of two processes: every wrapper around a compiled model, and without us."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from capture import THROUGH_AOT
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import cce_inductor
from cce_inductor import eager_heads
from cce_inductor.deferred import DeferredLogits, DeferredLogitsError

D, V = 8, 40
RANKS = 2


class Model(nn.Module):
    """Logits, and their loss where there are targets, as Hugging Face models give them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, x: Tensor, t: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.trunk(x)))
        return {"logits": logits} if t is None else {"loss": loss_of(logits, t), "logits": logits}


def loss_of(logits: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), t.flatten())


def _fsdp2(model: nn.Module, **options: Any) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)), **options)


def _fsdp1(model: nn.Module, **options: Any) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"), **options)


def _apart(model: Any) -> Any:
    _fsdp2(model.head)
    return model


def _with_head_kept(model: Any, **options: Any) -> Any:
    """As torchtitan does it: the head is a group of its own, which keeps its weight until the backward."""
    _fsdp2(model.head, reshard_after_forward=False, **options)
    return _fsdp2(model, **options)


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "ddp_static": lambda m: DistributedDataParallel(m, static_graph=True),
    "fsdp2": _fsdp2,
    "fsdp2_mixed": lambda m: _fsdp2(m, mp_policy=BF16),
    "fsdp2_head_apart": lambda m: _fsdp2(_apart(m)),
    "fsdp2_head_kept": _with_head_kept,
    "fsdp2_head_kept_mixed": lambda m: _with_head_kept(m, mp_policy=BF16),
    "fsdp2_reshard": lambda m: _fsdp2(m, reshard_after_forward=True),
    "fsdp1": _fsdp1,
    "fsdp1_mixed": lambda m: _fsdp1(m, mixed_precision=MixedPrecision(torch.bfloat16, torch.float32)),
}
COMPILED = ("wrap(compile)", "compile(wrap)")
OF_HEADS = ("wrap(defer_head)", "defer_head(wrap)", "wrap(blocks)")
INSIDE = ("loss_inside", "loss_in_another_graph")
# Wrappers with what is compiled, and in which order; those of heads that run eagerly where they tell something new.
CASES = [(w, order) for w in WRAPPERS if "head_kept" not in w for order in COMPILED]
CASES += [("fsdp2_head_kept", order) for order in ("wrap(compile)", *OF_HEADS)]
CASES += [(w, "wrap(defer_head)") for w in ("ddp_static", "fsdp2_head_kept_mixed", "fsdp2_reshard")]
CASES += [("fsdp2", "wrap(blocks)")]


def made(wrapper: str, order: str | None) -> Any:
    model: Any = Model()
    options = {"backend": cce_inductor.cce_backend, "options": THROUGH_AOT}
    if order == "wrap(compile)":
        model.compile(**options)
    head = model.head
    if order == "wrap(blocks)":  # as torchtitan compiles
        model.trunk.compile(**options)
    if order in ("wrap(defer_head)", "wrap(blocks)"):
        cce_inductor.defer_head(head)
    model = WRAPPERS[wrapper](model)
    if order == "defer_head(wrap)":
        cce_inductor.defer_head(head)
    return torch.compile(model, **options) if order == "compile(wrap)" else model


@contextlib.contextmanager
def whole(model: Any) -> Iterator[None]:
    """Where FSDP1 shows whole parameters."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            yield
    else:
        yield


def gradients(model: Any) -> list[Tensor]:
    with whole(getattr(model, "_orig_mod", model)):
        grads = [p.grad for p in model.parameters()]
        return [(g.full_tensor() if isinstance(g, DTensor) else g).clone() for g in grads]


def case(wrapper: str, order: str | None, inside: bool, x: Tensor, t: Tensor) -> dict[str, Any]:
    """Three steps: the logits are not read, read before the backward, and read after the optimizer's step."""
    eager_heads._calls.clear()  # a loss is counted when it is rewritten
    before = dict(counters["cce_inductor"])
    model, loss_fn = made(wrapper, order), loss_of
    if order == "wrap(blocks)":
        loss_fn = torch.compile(loss_of, backend=cce_inductor.cce_backend, options=THROUGH_AOT)
    found: dict[str, Any] = {}

    def step(read: bool) -> Any:
        model.zero_grad(set_to_none=True)
        out = model(x, t) if inside else model(x)
        loss = out["loss"] if inside else loss_fn(out["logits"], t)
        if read:
            found["logits"] = attempt(lambda: out["logits"].detach() + 0)
        loss.backward()
        return loss.detach(), out["logits"]

    found["loss"], logits = step(False)
    found["lazy"] = isinstance(logits, DeferredLogits)
    found["grads"] = gradients(model)
    found["counts"] = {k: counters["cce_inductor"][k] - before.get(k, 0) for k in ("fused", "deferred_materialized")}
    found["loss_of_read"], _ = step(True)
    found["grads_of_read"] = gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    _, logits = step(False)
    optimizer.step()
    found["late"] = attempt(lambda: logits.detach() + 0)
    return found


def attempt(read: Callable[[], Tensor]) -> Tensor | str:
    """What is read, or the error that says why it cannot be."""
    try:
        return read()
    except DeferredLogitsError as error:
        return str(error)


def programs(mesh: DeviceMesh, folder: str) -> dict[Any, Callable[[], Any]]:
    gen = torch.Generator().manual_seed(1 + mesh.get_local_rank())
    x, t = torch.randn(2, 6, D, generator=gen), torch.randint(0, V, (2, 6), generator=gen)
    return {
        (wrapper, order, where): functools.partial(case, wrapper, order, where == "loss_inside", x, t)
        for wrapper, order in [*((w, None) for w in WRAPPERS), *CASES]
        for where in INSIDE
    }
