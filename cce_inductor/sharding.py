"""A head that FSDP does not gather: its classes are spread over the ranks, each of which has tokens of its own.

:func:`shard_head` takes the head of a model out of FSDP and shards it in the same way. Its forward stands for the
logits of the whole head; a loss over them is fused without it, in the same graph, in another one or in eager mode.
"""

from __future__ import annotations

import gc
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from . import backend as backend  # it computes the losses on what eager heads give
from . import compat, config, eager_heads, ranks
from .ops.sharded import SCHEDULES, gathered
from .rewrite.sharded_heads import Whole

M = TypeVar("M", bound=nn.Linear)

# One node in Dynamo's graphs, which the pass knows.
torch.compiler.allow_in_graph(gathered)


def shard_head(module: M, mesh: DeviceMesh, schedule: str = "swap") -> M:
    """Spreads the classes of a head over the ranks of a mesh, and has its loss computed without the whole weight.

    `module` is an ``nn.Linear``, weight (V, D) and maybe a bias (V,), that is called with hidden states (..., D) of
    this rank's own tokens; it is changed in place and returned. Call it before ``fully_shard``, which then leaves the
    head alone, and before the optimizer is made: the parameters become DTensors, ``Shard(0)`` over `mesh`, of what each
    rank has of them already, so all have to hold the same. Their gradients are the mean over ranks, as FSDP's are.

    schedule: "swap" (the tokens of all ranks travel; every rank must have the same number of rows), "stream" (the
    shards travel in a ring), "auto" ("swap" where those tokens are fewer than the classes, else the whole weight is
    gathered) or "gather". Forward and backward are collectives of all ranks. So is whatever reads the logits
    themselves: the weight is gathered for it.

    Raises TypeError for another module; ValueError for a mesh of more than one dimension, an unknown schedule, a weight
    that is sharded already, and one that another module has too, such as a tied embedding.
    """
    if isinstance(getattr(module, "weight", None), DTensor):
        raise ValueError("the head's weight is sharded already: call shard_head once, and before fully_shard")
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        raise TypeError(f"shard_head takes a torch.nn.Linear, the head of a model, and not {type(module).__name__}")
    if schedule not in (*SCHEDULES, "auto"):
        raise ValueError(f"schedule must be one of {', '.join(map(repr, (*SCHEDULES, 'auto')))}, got {schedule!r}")
    if mesh.ndim != 1:
        raise ValueError(f"shard_head needs a mesh of one dimension, got one of {mesh.ndim}: take mesh['name']")
    if (owner := _other_owner(module)) is not None:
        raise ValueError(
            f"the head's weight is tied: {owner} has it too, and needs it in one piece. Untie them "
            "(head.weight = torch.nn.Parameter(head.weight.detach().clone()), tie_word_embeddings=False), or leave the "
            "head to FSDP"
        )
    classes = module.out_features
    for name, parameter in list(module.named_parameters(recurse=False)):
        own = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        setattr(module, name, nn.Parameter(own, requires_grad=parameter.requires_grad))
    ranks.leave_to_itself(module)
    module.forward = Sharded(module, classes, mesh.get_group().group_name, schedule)  # type: ignore[method-assign]
    return module


def _other_owner(module: nn.Module) -> str | None:
    """The type of another module that has one of the module's parameters, or None. Looks at all that there are."""
    own = {id(p) for p in module.parameters(recurse=False)}
    for other in gc.get_objects():
        if not issubclass(type(other), nn.Module) or other is module:
            continue
        if any(id(p) in own for p in vars(other).get("_parameters", {}).values()):
            return type(other).__name__
    return None


class Sharded:
    """The forward of a head whose parameters are shards. It is copied and pickled with its module."""

    def __init__(self, module: nn.Linear, classes: int, group: str, schedule: str) -> None:
        self.module, self.classes, self.group, self.schedule = module, classes, group, schedule

    def __call__(self, input: Tensor) -> Tensor:
        made = None if torch.compiler.is_compiling() else self._pending(input)
        if made is not None:
            return made
        weight, bias = self._whole(self.module.weight, input), None
        if self.module.bias is not None:
            bias = self._whole(self.module.bias, input)
        return F.linear(input, weight, bias)

    def _whole(self, parameter: Any, input: Tensor) -> Tensor:
        """A parameter in one piece, in the dtype of the hidden states unless autocast sees to that."""
        shard = parameter.to_local()
        if shard.dtype != input.dtype and not compat.is_autocast(input):
            shard = shard.to(input.dtype)
        return gathered(shard, self.classes, self.group, True, self.schedule)

    @torch.compiler.disable
    def _pending(self, input: Tensor) -> Tensor | None:
        """The logits in training, which a loss needs no values of."""
        if not self.module.training:
            return None
        parameters: list[Any] = [self.module.weight, self.module.bias]
        weight, *rest = [p.to_local() for p in parameters if p is not None]
        cast = weight.dtype != input.dtype and not compat.is_autocast(input)
        bias = rest[0] if rest else None
        whole = Whole(self.classes, self.group, True, self.schedule, (input.dtype,) if cast else ())
        return eager_heads.logits_of_shards(input, weight, bias, whole, settings=config.current())
