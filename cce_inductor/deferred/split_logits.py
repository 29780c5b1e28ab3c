"""Deferred logits of a head that is spread over ranks: each has the operands of its own classes.

A program that wants all classes on a rank reads them together with the others: each rank says in the store that it has
come, and where all have, they send each other their parts. Where one reads alone, as in ``if rank == 0:
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
    shape = deferral.shape(operands)
    made = defer(
        Gathered(deferral.compute, split) if split.gathered else deferral.compute,
        operands,
        shape=shape,
        dtype=deferral.dtype,
        requires_grad=deferral.requires_grad,
        meeting=Meeting(split.shards.group, timeout) if split.gathered else None,
    )
    if split.placements is None:
        return made
    whole = [*shape]
    whole[deferral.compute.class_dim] = split.classes
    strides = torch.empty(whole, device="meta").stride()
    size = torch.Size(whole)
    return DTensor.from_local(made, split.mesh, split.placements, run_check=False, shape=size, stride=strides)


def meeting(compute: Logits, timeout: int) -> Meeting | None:
    """What has to come before logits are computed: nothing, where a rank can do that alone."""
    return None if compute.group is None else Meeting(compute.group, timeout)


class Gathered:
    """Computes the logits of all classes, on every rank of a mesh, from each rank's operands: `own`, of its classes."""

    def __init__(self, own: Logits, split: Split) -> None:
        self.own, self.split = own, split

    def __call__(self, operands: Sequence[Tensor]) -> Tensor:
        """(..., V) with V at `class_dim`."""
        return _Gather.apply(self.own(operands), self.own.class_dim, self.split)


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


class Meeting:
    """Returns where all ranks of a group have called it; a :class:`DeferredLogitsError` where not all do in time.

    One for each deferred logits, made in the same order on all ranks, which call it equally often. group: its name.
    timeout: in seconds.
    """

    def __init__(self, group: str, timeout: int) -> None:
        self.group, self.timeout = group, timeout
        self.name, self.times = f"cce_inductor/{group}/{next(_MADE[group])}", itertools.count()

    def __call__(self) -> None:
        everyone, rank = dist.get_process_group_ranks(ranks.process_group(self.group)), dist.get_rank()
        store = dist.PrefixStore(f"{self.name}/{next(self.times)}", ranks.default_store())
        store.set(str(rank), "")
        if store.add("arrived", 1) == len(everyone):
            store.compare_set("decision", "", "go")
        why = "another one has given up waiting"
        try:
            store.wait(["decision"], datetime.timedelta(seconds=self.timeout))
        except RuntimeError:  # the time is over
            absent = [r for r in everyone if not store.check([str(r)])]
            why = f"ranks {absent} did not within {self.timeout} seconds"
        if store.compare_set("decision", "", "gone") == b"go":
            return
        raise DeferredLogitsError(
            f"rank {rank} reads logits of a head that is spread over ranks {everyone}, and {why}. Each has a part of "
            "it, so all have to read them at the same place of the program. Do so, or have the model return plain "
            "logits: set cce_inductor.config.defer_logits = False, or pass options={'defer_logits': False} to "
            "torch.compile. cce_inductor.config.defer_timeout is how long to wait."
        )
