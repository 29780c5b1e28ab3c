"""A head that is split over ranks, when it runs: what each rank has of it, and the statistics of all put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from ..ops import sharded
from ..ops.sharded import Shards


def shards_of(weight: DTensor) -> Shards:
    """How the classes of a head lie on the ranks, which all have the same tokens."""
    return Shards(weight.shape[0], weight.device_mesh.get_group().group_name, average=False)


def local_input(tensor: DTensor, weight: DTensor) -> Tensor:
    """Hidden states, or targets, that all ranks have: of the former each rank computes a part of the gradient."""
    return tensor.to_local(grad_placements=(Partial(),))


def local_target(target: Tensor, weight: DTensor) -> tuple[Tensor, Tensor]:
    """(N,) classes among those of this rank, class 0 for the others; and which rows have theirs here."""
    return shards_of(weight).local_target(target, weight.device_mesh.get_local_rank())


def largest_of(classes: Tensor, negative: bool, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(N,) products of each row with the row of the weight of its own class, by which ranks are compared.

    What is done to all logits keeps their order, but for a factor that is negative.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad():
        z = (x.to(exact) * F.embedding(classes, weight).to(exact)).sum(-1)
        z = z if bias is None else z + bias[classes].to(exact)
        return -z if negative else z


def merged(
    statistics: Sequence[Tensor],
    names: Sequence[str],
    inside: Tensor | None,
    largest: Tensor | None,
    weight: DTensor,
) -> tuple[Tensor, ...]:
    """The statistics (N,) of all classes, from each rank's of its own; all ranks get the same bits.

    inside: which rows have their target on this rank. largest: the logit of `argmax`, or what has its order.
    """
    given = dict(zip(names, statistics, strict=True))
    if inside is not None and "target_logit" in given:
        given["target_logit"] = torch.where(inside, given["target_logit"], 0.0)
    shards = shards_of(weight)
    if largest is not None:
        given["argmax"] = given["argmax"] + shards.start(shards.rank)
        given["largest"] = largest
    made = Merge.apply(shards, tuple(given), *given.values())
    return tuple(made[: len(names)])


class Merge(torch.autograd.Function):
    """One all-gather. The tangents are the same on all ranks, whose losses are one, so the backward sends nothing."""

    @staticmethod
    def forward(ctx: Any, shards: Shards, names: tuple[str, ...], *local: Tensor) -> tuple[Tensor, ...]:
        """(N,) statistics of some classes to those of all. Classes are numbers up to 2^24."""
        ctx.names = names
        exact = torch.float64 if any(t.dtype == torch.float64 for t in local) else torch.float32
        rows = torch.stack([t.to(exact) for t in local])
        parts = dict(zip(names, shards.gather(rows).view(shards.ranks, *rows.shape).unbind(1), strict=True))
        made = sharded.merged({name: part for name, part in parts.items() if name not in _OTHERWISE})
        saved = []
        if "lse" in parts:
            lse, own = sharded.log_sum_exp(parts)[None], parts["lse"].double()
            # A rank all of whose logits are -inf has no share.
            shares = torch.exp(own - torch.where(lse == -torch.inf, 0.0, lse))
            saved = [shares[shards.rank].to(exact)]
        if "entropy" in parts:
            means = torch.where(shares == 0, 0.0, own - parts["entropy"])
            mean = (shares * means).sum(0)
            made["entropy"] = lse[0] - mean
            saved.append((mean - means[shards.rank]).to(exact))
        if "argmax" in parts:
            made["argmax"] = parts["argmax"].gather(0, parts["largest"].argmax(0, True))[0]
            made["largest"] = parts["largest"].amax(0)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        result = {name: made[name].to(t.dtype) for name, t in zip(names, local, strict=True)}
        ctx.mark_non_differentiable(*[result[n] for n in _CONSTANT if n in result])
        return tuple(result.values())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """The gradients of this rank's statistics."""
        given = {n: g for n, g in zip(ctx.names, grads, strict=True) if g is not None and n not in _CONSTANT}
        found = dict(given)
        share, *rest = ctx.saved_tensors or (None,)
        if "lse" in given:
            found["lse"] = given["lse"] * share
        if "entropy" in given:
            found["entropy"] = given["entropy"] * share
            of_lse = found["entropy"] * rest[0]
            found["lse"] = found["lse"] + of_lse if "lse" in found else of_lse
        return None, None, *(found.get(name) for name in ctx.names)


_CONSTANT = ("lse_low", "argmax", "largest")
# What is neither a sum over ranks nor a log-sum-exp.
_OTHERWISE = ("entropy", "argmax", "largest")


def as_dtensor(tensor: Tensor, weight: DTensor) -> DTensor:
    """A tensor that all ranks have computed, as one of their mesh."""
    return DTensor.from_local(tensor, weight.device_mesh, (Replicate(),), run_check=False)
