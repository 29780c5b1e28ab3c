"""Whether there are ranks, and what we build on of torch.distributed that has no public name."""

from collections import OrderedDict

import torch.distributed as dist
from torch import nn


def is_distributed() -> bool:
    """Whether there are ranks at all."""
    return dist.is_available() and dist.is_initialized()


def process_group(name: str) -> dist.ProcessGroup:
    """The group of ranks that functional collectives know by this name."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


def leave_to_itself(module: nn.Module) -> None:
    """Has ``fully_shard`` pass by a module and its parameters, as it does by one that is replicated."""
    from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem

    applied = getattr(module, REGISTRY_KEY, None)
    setattr(module, REGISTRY_KEY, OrderedDict(applied or {}, replicate=RegistryItem()))


def default_store() -> dist.Store:
    """The store in which the processes of ``torch.distributed`` found each other."""
    return dist.distributed_c10d._get_default_store()
