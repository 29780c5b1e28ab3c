"""Deferred logits of a head that is split over ranks: each has the operands of its own classes.

A program that wants all classes on every rank reads them together with the others: each rank says in the store that
it has come, and where all have, they send each other their parts. Where one reads alone, as in ``if rank == 0:
print(logits)``, it stops waiting after a while with an error that names the others. Only one thing can be decided of
each read: the last rank to come says "go", the first whose time is over "gone", and the store keeps what was first.
"""

from __future__ import annotations

import datetime
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from .. import ranks
from ..rewrite.outputs import Deferral, Split
from ..rewrite.recipe import Logits
from .autograd import defer
from .staleness import DeferredLogitsError

# How many deferred logits of all ranks each group has made, which all of its ranks agree on.
_MADE: dict[str, Iterator[int]] = defaultdict(itertools.count)


def of(deferral: Deferral, operands: Sequence[Tensor], timeout: int) -> Tensor:
    """The deferred logits of one run, as the program expects them. timeout: in seconds, of a read of all classes."""
    split = deferral.split
    assert split is not None
    compute = Gathered(deferral.compute, split, timeout) if split.gathered else deferral.compute
    shape = deferral.shape(operands)
    made = defer(compute, operands, shape=shape, dtype=deferral.dtype, requires_grad=deferral.requires_grad)
    if split.placements is None:
        return made
    whole = [*shape]
    whole[deferral.compute.class_dim] = split.classes
    strides = torch.empty(whole, device="meta").stride()
    size = torch.Size(whole)
    return DTensor.from_local(made, split.mesh, split.placements, run_check=False, shape=size, stride=strides)


class Gathered:
    """Computes the logits of all classes, on every rank of a mesh, from each rank's operands.

    For `own`, `split` and `timeout` see :func:`of`.
    """

    def __init__(self, own: Logits, split: Split, timeout: int) -> None:
        self.own, self.split, self.timeout = own, split, timeout
        group = split.mesh.get_group()
        self._name = f"{group.group_name}/{next(_MADE[group.group_name])}"
        self._times = itertools.count()

    def __call__(self, operands: Sequence[Tensor]) -> Tensor:
        """(..., V) with V at `class_dim`. A :class:`DeferredLogitsError` if not all ranks compute it."""
        logits = self.own(operands)
        if not isinstance(logits, FakeTensor):
            meet(self.split.mesh, f"{self._name}/{next(self._times)}", self.timeout)
        return _Gather.apply(logits, self.own.class_dim, self.split)


class _Gather(torch.autograd.Function):
    """The parts of all ranks, one behind the other. All compute the same of it, so the backward sends nothing."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, split: Split) -> Tensor:
        """Logits of some classes to those of all."""
        shards = split.shards
        ctx.dim, ctx.count, ctx.start = dim, part.shape[dim], shards.start(shards.rank)
        if isinstance(part, FakeTensor):
            return part.new_empty([split.classes if i == dim else size for i, size in enumerate(part.shape)])
        return shards.gather(shards.padded(part.movedim(dim, 0)))[: split.classes].movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """This rank's part of the gradient."""
        return grads[0].narrow(ctx.dim, ctx.start, ctx.count), None, None


def meet(mesh: Any, name: str, timeout: int) -> None:
    """Returns where all ranks of a mesh have come here; a :class:`DeferredLogitsError` where not all do in time.

    name: of the read, the same on all ranks. timeout: in seconds.
    """
    everyone, rank = dist.get_process_group_ranks(mesh.get_group()), dist.get_rank()
    store = dist.PrefixStore(f"cce_inductor/{name}", ranks.default_store())
    store.set(str(rank), "")
    if store.add("arrived", 1) == len(everyone):
        store.compare_set("decision", "", "go")
    why = "another one has given up waiting"
    try:
        store.wait(["decision"], datetime.timedelta(seconds=timeout))
    except RuntimeError:  # the time is over
        why = f"ranks {[r for r in everyone if not store.check([str(r)])]} did not within {timeout} seconds"
    if store.compare_set("decision", "", "gone") == b"go":
        return
    raise DeferredLogitsError(
        f"rank {rank} reads logits of a head that is split over ranks {everyone}, and {why}. Each has a part of them, "
        "so all have to read them at the same place of the program. Do so, or have the model return plain logits: set "
        "cce_inductor.config.defer_logits = False, or pass options={'defer_logits': False} to torch.compile. "
        "cce_inductor.config.defer_timeout is how long to wait."
    )
