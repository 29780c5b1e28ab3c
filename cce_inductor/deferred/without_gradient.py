"""Pending logits without a gradient that a program keeps while their own weight is trained.

Logits with a gradient go into the loss of their step. Without one they may be another thing: a teacher's, whose weight
nobody changes, or the old policy's, which are read after the next update. So an optimizer that is about to change what
such logits are computed from has them computed before.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .pending import PendingValue

_kept: weakref.WeakSet[PendingValue] = weakref.WeakSet()
_hooks: list[Any] = []


def keep(value: PendingValue) -> None:
    """Has a value computed before an optimizer changes what it is computed from, if it is still pending then."""
    if value.fake:
        return
    _kept.add(value)
    if not _hooks:  # it stays: where hooks are called, their list must not change
        _hooks.append(register_optimizer_step_pre_hook(_before_step))


@torch.compiler.disable
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    changed = {_memory(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    for value in list(_kept):
        origin = value.origin
        if origin is None:
            _kept.discard(value)
        elif any(_memory(operand.alias) in changed for operand in origin.head.operands):
            value.get()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
