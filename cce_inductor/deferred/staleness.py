"""Whether what deferred logits are computed from is still what it was."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import compat


class DeferredLogitsError(RuntimeError):
    """Deferred logits were read when their values could be wrong.  The message says why and what to do."""


_CURE = (
    "Read the logits before that happens (calling .materialize() on them is enough), or have the model return "
    "plain logits: set cce_inductor.config.defer_logits = False, or pass options={'defer_logits': False} to "
    "torch.compile."
)


def operand_name(index: int) -> str:
    """What an operand of a head is called in an error message."""
    return {0: "the hidden states", 1: "the head's weight"}.get(index, f"operand {index} of the head")


class Operand(NamedTuple):
    """An operand as it was when the logits were deferred, and how we notice that it is so no longer.

    * An in-place edit by PyTorch raises the version counter, which every alias shares.
    * Freed storage (FSDP after resharding) has no bytes left.
    * What writes behind the counter's back shows in ``sample``, a few elements of all rows and columns that are
      compared bit for bit at the first read: edits of ``p.data``, ``AdamW(fused=True)`` on a CPU, FSDP2's next
      all-gather into the same buffer, flat parameter buffers, a CUDA graph's pool.
    * A CUDA graph's pool may also have been invalidated: PyTorch then raises as soon as the elements are read.

    Replacing ``p.data`` by another tensor changes nothing here: the alias keeps the old storage, and the logits
    come out as eager's.  **Not recognised**: a write behind the counter's back that misses all sampled elements,
    such as ``p.data[i, j] = x``, or ``p.data[i] = x`` with far more than ``_SAMPLES`` rows.
    """

    name: str
    alias: Tensor
    version: int | None
    sample: Tensor | None

    @classmethod
    def record(cls, index: int, tensor: Tensor) -> Operand:
        """The operand at `index` of a head as it is now."""
        # It shares the version counter, but not the grad_fn, which would keep the whole graph's saved tensors alive.
        alias = tensor.detach()
        version = None if alias.is_inference() else alias._version
        return cls(operand_name(index), alias, version, sample(alias))

    def check(self) -> None:
        """Raises :class:`DeferredLogitsError` if the operand is not what it was."""
        check_allocated(self.name, self.alias)
        version = None if self.alias.is_inference() else self.alias._version
        if version != self.version:
            raise DeferredLogitsError(
                f"deferred logits were read too late: {self.name} {tuple(self.alias.shape)} has been modified in "
                f"place since the forward pass (version {self.version}, now {version}), as optimizer.step() does. "
                + _CURE
            )
        if self.sample is None or (self.alias.is_cuda and torch.cuda.is_current_stream_capturing()):
            return  # while a graph is captured nothing can be compared
        if not self._holds_its_sample():
            raise DeferredLogitsError(
                f"deferred logits were read too late: {self.name} {tuple(self.alias.shape)} has been overwritten "
                "since the forward pass without a change of its version (through .data, by a gather into the same "
                "buffer, or by a replayed CUDA graph). " + _CURE
            )

    def _holds_its_sample(self) -> bool:
        try:
            now = sample(self.alias)
            return now is not None and self.sample is not None and torch.equal(now, self.sample)
        except RuntimeError as error:
            if compat.is_of_replayed_cuda_graph(error):
                return False
            raise


def check_allocated(name: str, tensor: Tensor) -> None:
    """Raises :class:`DeferredLogitsError` if the storage of the operand of that name has been freed."""
    if tensor.numel() and not isinstance(tensor, FakeTensor) and not tensor.untyped_storage().nbytes():
        raise DeferredLogitsError(
            f"deferred logits were read too late: the storage of {name} {tuple(tensor.shape)} has been freed since "
            "the forward pass, as FSDP does when it reshards the parameters. " + _CURE
        )


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by item size; as bits NaN equals itself
_SAMPLES = 2**14  # one kernel of some microseconds, and below what PyTorch splits among CPU threads


def sample(tensor: Tensor) -> Tensor | None:
    """About one element per row as bits, each in another column, or None where they cannot be read."""
    bits = _BITS.get(tensor.itemsize)
    if type(tensor) is not Tensor or bits is None or not tensor.numel() or tensor.is_meta:
        return None
    dense = next((t for t in (tensor, tensor.mT if tensor.dim() > 1 else tensor) if t.is_contiguous()), None)
    if dense is None:
        picked = tensor.select(-1, tensor.size(-1) // 2) if tensor.dim() else tensor
    else:
        # One more than a row is long: the next row, and there the next column.
        step = min(dense.shape[-2:]) + 1 if dense.dim() > 1 else 1
        picked = dense.reshape(-1)[:: step * -(-dense.numel() // (step * _SAMPLES))]
    return picked.clone(memory_format=torch.contiguous_format).view(bits)
