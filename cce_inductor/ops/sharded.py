"""Heads whose rows are spread over ranks that each have tokens of their own, as under FSDP.

Three schedules give each rank the statistics of its own rows:

gather  the whole weight is put together on every rank (:func:`gathered`), and the operator runs on it.
swap    the tokens travel: every rank is given those of all ranks and does its own classes for them. What it finds goes
        back to the rank of each row, and so do the parts of the gradient of the hidden states.
stream  the shards travel, in a ring: at any time a rank has its own and two that pass by. In the backward they pass by
        once more, each with its gradient, which ends at its owner.

The collectives are functional ones, so a compiler may move them, and their order is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import compat, ranks
from .call import Attributes
from .library import BACKWARD, FORWARD, library, must_save
from .statistics import with_all_digits

SCHEDULES = ("gather", "swap", "stream")
# Statistics that the ranks can put together of the classes that each has, and the operands that they may have.
STATISTICS = frozenset(("lse", "lse_low", "target_logit", "logit_sum"))
OPERANDS = frozenset(("input", "weight", "bias", "target"))
# The collectives of PyTorch that take the name of a group.
_all_gather = torch.ops._c10d_functional.all_gather_into_tensor.default
_reduce_scatter = torch.ops._c10d_functional.reduce_scatter_tensor.default
_all_to_all = torch.ops._c10d_functional.all_to_all_single.default
_wait = torch.ops._c10d_functional.wait_tensor.default


@dataclass(frozen=True)
class Shards:
    """How the classes of a head lie on the ranks of a group: in order, as DTensor's ``Shard(0)`` has them.

    group: the name of the process group. average: whether the gradient of a shard is the mean of what the ranks'
    losses give, as under FSDP, or their sum.
    """

    classes: int
    group: str
    average: bool

    @cached_property
    def ranks(self) -> int:
        return dist.get_world_size(ranks.process_group(self.group))

    @cached_property
    def rank(self) -> int:
        return dist.get_rank(ranks.process_group(self.group))

    @property
    def all_have_some(self) -> bool:
        """Whether there is a class on every rank."""
        return self.count(self.ranks - 1) > 0

    @property
    def most(self) -> int:
        """The rows of the largest shard: all but the last ones are that large."""
        return -(-self.classes // self.ranks)

    def start(self, rank: int) -> int:
        """The first class of a rank."""
        return min(self.classes, self.most * rank)

    def count(self, rank: int) -> int:
        """How many classes a rank has: none, where there are fewer than ranks."""
        return self.start(rank + 1) - self.start(rank)

    def padded(self, shard: Tensor) -> Tensor:
        """A shard (V/P, ...) with zeros behind it, in the size of the largest."""
        missing = self.most - shard.shape[0]
        return F.pad(shard, (0, 0) * (shard.dim() - 1) + (0, missing)) if missing else shard.contiguous()

    def gather(self, tensor: Tensor) -> Tensor:
        """(n, ...) of each rank as (P n, ...)."""
        return _wait(_all_gather(tensor.contiguous(), self.ranks, self.group))

    def scatter(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of (P n, ...), of which each rank gets its own (n, ...)."""
        return _wait(_reduce_scatter(tensor.contiguous(), "sum", self.ranks, self.group))

    def exchange(self, tensor: Tensor) -> Tensor:
        """(P, ...), a part for each rank, as a part from each."""
        sizes = [1] * self.ranks
        return _wait(_all_to_all(tensor.contiguous(), sizes, sizes, self.group))

    def pass_on(self, tensor: Tensor) -> Tensor:
        """Sends a tensor to the next rank and gives what the one before sends, for which `_wait` has to wait."""
        sizes = tensor.shape[0]
        to, since = (self.rank + 1) % self.ranks, (self.rank - 1) % self.ranks
        sent, received = ([sizes * (k == other) for k in range(self.ranks)] for other in (to, since))
        return _all_to_all(tensor.contiguous(), received, sent, self.group)

    def local_target(self, target: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """(N,) classes among those of a rank, class 0 for the others; and which rows have theirs there."""
        own = target - self.start(rank)
        inside = (own >= 0) & (own < self.count(rank))
        return torch.where(inside, own, 0), inside

    def mean(self, grad: Tensor, like: Tensor) -> Tensor:
        """The gradient of a parameter, from the sum of what the ranks have found."""
        return (grad / self.ranks if self.average else grad).to(like.dtype)


# ------------------------------------------------------------------------------------------------------------ gather


def gathered(shard: Tensor, classes: int, group: str, average: bool, schedule: str = "") -> Tensor:
    """The rows of all ranks, (V, ...), from this rank's, (V/P, ...). Differentiable.

    schedule: what the pass puts in its place where it is the weight of a head; "" is what the knob `sharded_head` says.
    """
    if has_torch_function_unary(shard):  # a proxy: recorded as one node
        return handle_torch_function(gathered, (shard,), shard, classes, group, average, schedule)
    return _Gathered.apply(shard, Shards(classes, group, average))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, shards: Shards) -> Tensor:
        ctx.shards, ctx.dtype = shards, shard.dtype
        return shards.gather(shards.padded(shard))[: shards.classes]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """A reduce-scatter, in fp32 at least."""
        (grad,), shards = grads, ctx.shards
        whole = F.pad(_wide(grad), (0, 0) * (grad.dim() - 1) + (0, shards.most * shards.ranks - shards.classes))
        own = shards.scatter(whole)[: shards.count(shards.rank)]
        return (own / shards.ranks if shards.average else own).to(ctx.dtype), None


# ----------------------------------------------------------------------------------------------------- swap and stream


def statistics(
    operands: Sequence[Tensor],
    names: str,
    row_mask: Tensor | None,
    wanted: str,
    attributes: Sequence[Any],
    classes: int,
    group: str,
    average: bool,
    schedule: str,
) -> tuple[Tensor, ...]:
    """The statistics (N,) of this rank's rows over the classes of all ranks, without the whole weight. Differentiable.

    operands: as `names` say, input (N, D), weight (V/P, D), bias (V/P,) and target (N,), classes among all V.
    row_mask: (N,) bool, the rows that are computed; the others give 0. wanted: names out of `STATISTICS`. attributes:
    those of the operators, exact. schedule: "swap" or "stream". Every rank of the group has to call it, and to have a
    class. Raises RuntimeError under "swap", on all ranks alike, where they have different numbers of rows.
    """
    given = dict(zip(names.split(), operands, strict=True))
    head = _Head(names, wanted, _with_autocast(attributes, given["input"]), Shards(classes, group, average))
    mask = torch.ones(given["input"].shape[:1], dtype=torch.bool, device=given["input"].device)
    function = _Swap if schedule == "swap" else _Stream
    return function.apply(head, mask if row_mask is None else row_mask, *operands)


def _with_autocast(attributes: Sequence[Any], x: Tensor) -> Attributes:
    """The attributes, with the dtype that the products are computed in: the backward may run outside of autocast."""
    made = Attributes(*attributes)
    dtype = compat.autocast_dtype(x) if made.compute_dtype is None else made.compute_dtype
    return replace(made, compute_dtype=dtype)


@dataclass(frozen=True)
class _Head:
    """What is not a tensor of one call. names: of its operands. wanted: of the statistics."""

    names: str
    wanted: str
    attributes: Attributes
    shards: Shards

    def named(self, operands: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names.split(), operands, strict=True))

    def kept(self, saved: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """What a forward has saved, by name: the operands, the statistics over all classes, and those of its own."""
        tensors, wanted = iter(saved), self.wanted.split()
        return [dict(zip(names, tensors, strict=False)) for names in (self.names.split(), wanted, wanted)]

    def forward(self, given: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """The statistics of one rank's classes."""
        out = FORWARD([*given.values()], " ".join(given), mask, self.wanted, False, *self.attributes.args())
        return dict(zip(self.wanted.split(), out, strict=True))

    def backward(
        self,
        tangents: dict[str, Tensor],
        saved: dict[str, Tensor],
        given: dict[str, Tensor],
        mask: Tensor,
        needs: Sequence[str],
    ) -> dict[str, Tensor]:
        """The gradients from one rank's classes, of the dtype of each operand. saved: its statistics, lse of all."""
        out = BACKWARD(
            [*tangents.values()],
            " ".join(tangents),
            [saved[name] for name in self.wanted.split()],
            [*given.values()],
            " ".join(given),
            mask,
            self.wanted,
            " ".join(needs),
            *self.attributes.args(),
        )
        return dict(zip(needs, out, strict=True))

    def merged(self, parts: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """The statistics (N,) of all classes, from (P, N) of each rank's; 0 where no row is computed."""
        return {name: torch.where(mask, t, 0.0) for name, t in merged(parts).items()}

    def needs(self, wanted: Sequence[bool]) -> list[str]:
        """The operands whose gradients somebody needs."""
        return [name for name, needed in zip(self.names.split(), wanted, strict=True) if needed and name != "target"]


def merged(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The statistics (N,) of all classes, from (P, N) of each rank's own. Sums are in the order of the ranks."""
    made = {name: part.sum(0) for name, part in parts.items() if name not in ("lse", "lse_low")}
    if "lse" in parts:
        lse = log_sum_exp(parts)
        made["lse"] = lse.to(parts["lse"].dtype)
        if "lse_low" in parts:
            low = (lse - made["lse"].double()).nan_to_num(0.0, 0.0, 0.0)
            made["lse_low"] = low.to(parts["lse_low"].dtype)
    return {name: made[name] for name in parts}


def log_sum_exp(parts: dict[str, Tensor]) -> Tensor:
    """(N,) in fp64, over all classes."""
    return torch.logsumexp(parts["lse"].double() + (parts["lse_low"].double() if "lse_low" in parts else 0.0), 0)


def _wide(t: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is that."""
    return t if t.dtype == torch.float64 else t.float()


def _saved(stats: dict[str, Tensor], lse: Tensor | None) -> dict[str, Tensor]:
    """The statistics of one rank's classes, with the log-sum-exp over all of them."""
    return stats if lse is None else stats | {"lse": lse}


def _finish(ctx: Any, head: _Head, made: dict[str, Tensor]) -> tuple[Tensor, ...]:
    ctx.head = head
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*[made[name] for name in ("lse_low",) if name in made])
    return tuple(made.values())


def _tangents(ctx: Any, grads: Sequence[Tensor | None], made: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tangents of the statistics over all classes, for the operators' backward on some of them."""
    given = {n: g for n, g in zip(ctx.head.wanted.split(), grads, strict=True) if g is not None}
    return with_all_digits(given, made)[0]


class _Swap(torch.autograd.Function):
    """The tokens of all ranks come to each rank's classes."""

    @staticmethod
    def forward(ctx: Any, head: _Head, mask: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        """Collectives: how many rows each rank has, targets, hidden states; then the statistics go back."""
        shards, given = head.shards, head.named(operands)
        n, target = mask.shape[0], given.get("target")
        counts = shards.gather(torch.full((1,), n, dtype=torch.int64, device=mask.device))
        ints = SAME_ROWS(torch.stack([mask.long(), mask.long() if target is None else target]), counts)
        active, classes = shards.gather(ints).view(shards.ranks, 2, n).unbind(1)
        active = active.reshape(-1) > 0
        given["input"] = shards.gather(given["input"])
        inside = torch.zeros_like(active)
        if target is not None:
            given["target"], inside = shards.local_target(classes.reshape(-1), shards.rank)
        own = head.forward(given, active)
        sent = own if "target_logit" not in own else own | {"target_logit": torch.where(inside, own["target_logit"], 0)}
        parts = shards.exchange(torch.stack([t.view(shards.ranks, n) for t in sent.values()], 1)).unbind(1)
        made = head.merged(dict(zip(own, parts, strict=True)), mask)
        kept = must_save([*made.values(), *own.values()])
        made, own = dict(zip(own, kept, strict=False)), dict(zip(own, kept[len(own) :], strict=True))
        ctx.save_for_backward(*given.values(), *made.values(), *own.values(), active, inside)
        return _finish(ctx, head, made)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Collectives: the tangents and log-sum-exps of all rows; then the hidden states' gradient goes back."""
        head, shards = ctx.head, ctx.head.shards
        *saved, active, inside = ctx.saved_tensors
        given, made, own = head.kept(saved)
        tangents = _tangents(ctx, grads, made)
        needs = head.needs(ctx.needs_input_grad[2:])
        if not tangents or not needs:
            return (None,) * (2 + len(given))
        sent = [*tangents.values(), *([made["lse"]] if "lse" in made else [])]
        rows = shards.gather(torch.stack(sent)).view(shards.ranks, len(sent), -1).transpose(0, 1).reshape(len(sent), -1)
        everywhere = dict(zip(tangents, rows.unbind(0), strict=False))
        if "target_logit" in everywhere:
            everywhere["target_logit"] = torch.where(inside, everywhere["target_logit"], 0)
        found = head.backward(everywhere, _saved(own, rows[-1] if "lse" in made else None), given, active, needs)
        if "input" in found:
            found["input"] = shards.scatter(_wide(found["input"])).to(given["input"].dtype)
        for name in ("weight", "bias"):
            if name in found:
                found[name] = shards.mean(found[name], given[name])
        return None, None, *(found.get(name) for name in given)


class _Stream(torch.autograd.Function):
    """The shards come to each rank's tokens, one after the other."""

    @staticmethod
    def forward(ctx: Any, head: _Head, mask: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        """P - 1 steps of the ring. A bias, a number for each class, is gathered."""
        shards, given = head.shards, head.named(operands)
        biases = _biases(shards, given)
        passing = shards.padded(given["weight"].to(head.attributes.compute_dtype))
        found: dict[int, dict[str, Tensor]] = {}
        for step in range(shards.ranks):
            k = (shards.rank - step) % shards.ranks
            coming = shards.pass_on(passing) if step + 1 < shards.ranks else passing
            part, _ = _part(head, given, passing, biases, k)
            found[k] = head.forward(part, mask)
            passing = _wait(coming) if step + 1 < shards.ranks else coming
        own = [torch.stack([found[k][name] for k in range(shards.ranks)]) for name in head.wanted.split()]
        parts = dict(zip(head.wanted.split(), own, strict=True))
        if "target_logit" in parts:
            inside = [shards.local_target(given["target"], k)[1] for k in range(shards.ranks)]
            parts["target_logit"] = torch.where(torch.stack(inside), parts["target_logit"], 0)
        made = head.merged(parts, mask)
        kept = must_save([*made.values(), *own])
        made = dict(zip(made, kept, strict=False))
        ctx.save_for_backward(*operands, *kept, mask)
        return _finish(ctx, head, made)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """P - 1 steps of the ring with a shard, and P - 1 with the gradient of one, in fp32."""
        head, shards = ctx.head, ctx.head.shards
        *saved, mask = ctx.saved_tensors
        given, made, own = head.kept(saved)
        tangents = _tangents(ctx, grads, made)
        needs = head.needs(ctx.needs_input_grad[2:])
        if not tangents or not needs:
            return (None,) * (2 + len(given))
        found = _Ring(head, given, made.get("lse"), own, mask, tangents, needs).run()
        for name in ("weight", "bias"):
            if name in found:
                found[name] = shards.mean(found[name], given[name])
        if "input" in found:
            found["input"] = found["input"].to(given["input"].dtype)
        return None, None, *(found.get(name) for name in given)


@dataclass
class _Ring:
    """The backward of `_Stream`. lse: of all classes. own: the statistics (P, N) of each rank's classes."""

    head: _Head
    given: dict[str, Tensor]
    lse: Tensor | None
    own: dict[str, Tensor]
    mask: Tensor
    tangents: dict[str, Tensor]
    needs: list[str]

    def run(self) -> dict[str, Tensor]:
        """The gradients, in fp32 or wider: of the hidden states, this rank's shard and its biases.

        The gradient of a shard begins at the rank behind its owner and is added to at each; the owner is the last.
        """
        shards, given = self.head.shards, self.given
        biases = _biases(shards, given)
        given = given | {"input": _wide(given["input"])}
        own = shards.padded(given["weight"].to(self.head.attributes.compute_dtype))
        passing = _wait(shards.pass_on(own)) if shards.ranks > 1 else own
        dx: Tensor | None = None
        dw: Tensor | None = None
        db: dict[int, Tensor] = {}
        for step in range(1, shards.ranks + 1):
            k, last = (shards.rank - step) % shards.ranks, step == shards.ranks
            # The last one is the rank's own.
            coming = shards.pass_on(passing) if step + 1 < shards.ranks else None
            made = self._gradients(given, passing, biases, k)
            passing = own if coming is None else _wait(coming)
            if "input" in made:
                dx = made["input"] if dx is None else dx.add_(made["input"])
            if "bias" in made:
                db[k] = shards.padded(made["bias"])
            if "weight" in made:
                add = shards.padded(made.pop("weight"))
                dw = add if dw is None else dw.add_(add)
                del add
                dw = dw if last else _wait(shards.pass_on(dw))
        found = {"input": dx, "weight": None if dw is None else dw[: shards.count(shards.rank)]}
        if db:
            whole = torch.cat([db[k] for k in range(shards.ranks)])
            found["bias"] = shards.scatter(whole)[: shards.count(shards.rank)]
        return {name: t for name, t in found.items() if t is not None}

    def _gradients(self, given: dict[str, Tensor], passing: Tensor, biases: Tensor | None, k: int) -> dict[str, Tensor]:
        """What the classes of rank k add to each gradient."""
        part, inside = _part(self.head, given, passing, biases, k)
        wide = {n: t if n in ("input", "target") else _wide(t) for n, t in part.items()}
        tangents = dict(self.tangents)
        if inside is not None and "target_logit" in tangents:
            tangents["target_logit"] = torch.where(inside, tangents["target_logit"], 0)
        saved = _saved({name: t[k] for name, t in self.own.items()}, self.lse)
        return self.head.backward(tangents, saved, wide, self.mask, self.needs)


def _biases(shards: Shards, given: dict[str, Tensor]) -> Tensor | None:
    return shards.gather(shards.padded(given["bias"])) if "bias" in given else None


def _part(
    head: _Head, given: dict[str, Tensor], passing: Tensor, biases: Tensor | None, k: int
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The operands of rank k's classes, whose shard passes by; and which rows have their target among them."""
    shards, part, inside = head.shards, dict(given), None
    part["weight"] = passing[: shards.count(k)]
    if biases is not None:
        part["bias"] = biases[shards.start(k) : shards.start(k) + shards.count(k)]
    if "target" in part:
        part["target"], inside = shards.local_target(part["target"], k)
    return part, inside


# ---------------------------------------------------------------------------------------------- how many rows each has

library.define("same_rows(Tensor value, Tensor counts) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
SAME_ROWS = torch.ops.cce_inductor.same_rows.default
_DIFFERENT = (
    "cce_inductor: the ranks have different numbers of rows{}, and the schedule 'swap' of a sharded head takes the "
    "same number from each. Pad them with the target that is ignored, or use the schedule 'stream'"
)


def _same_rows(value: Tensor, counts: Tensor) -> Tensor:
    """A copy of `value`, where the numbers of rows of all ranks, (P,), are the same; an error on all of them if not."""
    if counts.is_cuda:  # nothing waits for the device, and the collectives behind it do not begin
        torch._assert_async((counts == counts[0]).all(), _DIFFERENT.format(""))
    elif len({*counts.tolist()}) > 1:
        raise RuntimeError(_DIFFERENT.format(f", {counts.tolist()}"))
    return value.clone()


library.impl("same_rows", _same_rows, "CompositeExplicitAutograd")


@torch.library.register_fake("cce_inductor::same_rows", lib=library)
def _fake_same_rows(value: Tensor, counts: Tensor) -> Tensor:
    return torch.empty_like(value)
