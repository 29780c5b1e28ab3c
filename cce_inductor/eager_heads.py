"""Heads that run eagerly: their forward gives pending logits.

Who compiles a model block by block leaves its head to PyTorch, FSDP2's hooks break the graph in front of it, and many
models are not compiled at all. `defer_head` does it for one module, the knob `eager_heads` for every `torch.nn.Linear`
that is a head over a vocabulary. A loss on such logits, eager or compiled apart, is then fused as on those that a
compiled head gives.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F  # noqa: F401 - torch.jit.script resolves the source of Linear.forward here
from torch import Tensor, nn

from . import compat, config, notice, record
from .config import Settings
from .deferred import defer, split_logits
from .deferred.calls import are_plain
from .deferred.eager_calls import EagerCalls
from .rewrite.recipe import Logits
from .rewrite.sharded_heads import Whole
from .rewrite.site import Site
from .trace.heads import large, worth_deferring

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)
_linear_forward = nn.Linear.forward


@dataclass
class Backend:
    """What `backend`, which imports this module, gives it.

    calls: what computes losses that are called on the logits, by the settings. compile: the backend for torch.compile.
    """

    calls: Callable[[Settings], EagerCalls] | None = None
    compile: Callable | None = None


BACKEND = Backend()


# ------------------------------------------------------------------------------------------------------- one module


def defer_head(module: M) -> M:
    """Has a head give pending logits in training, whatever runs it: eager mode, FSDP2's hooks, a checkpoint.

    `module` is changed in place and returned: an ``nn.Linear``, or any module that is called with hidden states
    (..., D) and gives logits (..., V), such as one that PEFT or a quantiser has put in its place; that is compiled by
    itself. Its parameters, ``state_dict``, type and hooks stay as they are, and so does what it computes: its forward
    only waits until somebody needs the values. It may be called before or after ``fully_shard`` and
    ``DistributedDataParallel``.

    The logits are plain ones in evaluation (``module.eval()``), under ``torch.inference_mode``, ``torch.func``,
    forward-mode differentiation, ``torch.export`` and ``torch.jit``, where FSDP frees the weight behind the forward,
    and by the knobs ``defer_logits`` and ``min_vocab``; but under ``torch.no_grad`` those of an ``nn.Linear`` that are
    larger than 64 MiB may be a teacher's, and wait too. Raises TypeError for what is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"defer_head takes a torch.nn.Module, the head of a model, and not {type(module).__name__}")
    before = vars(module).get("forward")
    if not isinstance(before, Deferring):
        module.forward = Deferring(module, before)
        module.__prepare_scriptable__ = module.forward.without  # type: ignore[assignment] # torch.jit.script asks for it
    return module


class Deferring:
    """The forward of a module that gives pending logits. It is copied and pickled with its module.

    before: a forward that the module had of its own, as others put there; None where it has its class's.
    """

    def __init__(self, module: nn.Module, before: Callable | None) -> None:
        self.module, self.before = module, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        return self._deferred(*args, **kwargs)

    def without(self) -> nn.Module:
        """The module as it was before, with the same parameters."""
        made = copy.copy(self.module)
        for name in ("forward", "__prepare_scriptable__"):
            vars(made).pop(name)
        if self.before is not None:
            made.forward = self.before
        return made

    @property
    def original(self) -> Callable:
        """The forward that it stands for."""
        return functools.partial(type(self.module).forward, self.module) if self.before is None else self.before

    @torch.compiler.disable
    def _deferred(self, *args: Any, **kwargs: Any) -> Any:
        module, settings = self.module, config.current()
        if not settings.defer_logits or not _is_plain_pytorch():
            return self.original(*args, **kwargs)
        if self.before is None and isinstance(module, nn.Linear) and _is_linear(type(module).forward):
            made = logits(module, *args, **kwargs, settings=settings) if len(args) + len(kwargs) == 1 else None
            return self.original(*args, **kwargs) if made is None else made
        if not module.training or not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        if module not in _compiled:
            _compiled[module] = torch.compile(self.original, backend=BACKEND.compile or "cce")
        return _compiled[module](*args, **kwargs)


_compiled: WeakKeyDictionary[nn.Module, Callable] = WeakKeyDictionary()


def _is_linear(forward: Any) -> bool:
    return forward in (_linear_forward, nn.Linear.forward)


# ------------------------------------------------------------------------------------------------- every linear head


def enable() -> None:
    """Lets every ``nn.Linear`` that is a head give pending logits where the knob `eager_heads` says so."""
    nn.Linear.forward = _forward  # type: ignore[method-assign]


def disable() -> None:
    """Undoes :func:`enable`."""
    nn.Linear.forward = _linear_forward  # type: ignore[method-assign]


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """:func:`enable` for the time of a ``with`` block."""
    before = nn.Linear.forward
    enable()
    try:
        yield
    finally:
        nn.Linear.forward = before  # type: ignore[method-assign]


@functools.wraps(_linear_forward)
def _forward(self: nn.Linear, input: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not _is_head(self):
        return _linear_forward(self, input)
    return _of_head(self, input, compat.dynamo_callback())


# Not traced by itself where a compiled function leaves it to Python: PyTorch's own forward is not, either.
compat.as_if_in(_forward, _linear_forward)


def _is_head(module: nn.Linear) -> bool:
    return module.out_features >= config.min_vocab  # type: ignore[attr-defined,no-any-return]


@torch.compiler.disable
def _of_head(module: nn.Linear, input: Tensor, callback: Any) -> Tensor:
    compiled_by = _settings_of_caller(callback)
    settings = config.current() if compiled_by is None else compiled_by
    if not settings.defer_logits or not _is_plain_pytorch():
        return _linear_forward(module, input)
    every = settings.eager_heads and notice.is_watching()
    if not (every or (compiled_by is not None and settings.defer_without_loss)):
        head = _Head(input, module.weight, module.bias, module.training)
        if torch.is_grad_enabled() and _why_not(head, settings) is None:
            _out_of_reach(module, settings)
        return _linear_forward(module, input)
    made = logits(module, input, settings=settings)
    return _linear_forward(module, input) if made is None else made


def _settings_of_caller(callback: Any) -> Settings | None:
    """Those of the compiled function that is running, if our pass is in it. None elsewhere.

    Dynamo has left a part of it to Python then, with the head.
    """
    running = compat.running_backend(callback)
    if running is None:
        return None
    backend = getattr(running, "compiler_fn", running)
    if hasattr(backend, "settings_of"):
        settings: Settings = backend.settings_of(getattr(running, "kwargs", {}))
        return settings
    return config.current() if notice.is_watching() and getattr(running, "compiler_name", "") == "inductor" else None


def _out_of_reach(module: nn.Linear, settings: Settings) -> None:
    """A head runs eagerly that the knob would reach: for the notice, the record, and an error under ``strict``."""
    notice.saw_head(str(module))
    vocab, width = module.weight.shape
    site = Site(
        fused=False,
        reason="its head runs outside of every graph, and its loss with it or behind it",
        cure="set CCE_INDUCTOR_EAGER_HEADS=1 (eager_heads), or call cce_inductor.defer_head(module)",
        loss=str(module),
        node="",
        location=compat.program_place(),
        vocab=str(vocab),
        width=str(width),
    )
    record.outside(site)
    if settings.strict and notice.is_watching():
        raise record.DeclinedError(f"cce_inductor, with strict=True:\n{site}")


# --------------------------------------------------------------------------------------------------------- the logits

_calls: dict[Settings, EagerCalls] = {}
# One object each: compiled losses are guarded on it.
_recipes: dict[tuple[torch.dtype, bool, int, Whole | None], Logits] = {}


def _is_plain_pytorch() -> bool:
    """Whether a module runs as a program's own, and not under a transform or a mode of PyTorch's."""
    return not (
        torch.is_inference_mode_enabled()
        or torch.jit.is_tracing()
        or torch.jit.is_scripting()
        or compat.is_tracing()
        or compat.is_transforming()
        or compat.has_forward_gradients()
        or compat.has_dispatch_modes()
    )


def logits(module: nn.Linear, input: Tensor, *, settings: Settings) -> Tensor | None:
    """What a linear head gives for hidden states (..., D), pending; None where that must be plain logits."""
    head = _Head(input, module.weight, module.bias, module.training)
    reason = _why_not(head, settings)
    if reason is not None:
        log.debug("%s gives plain logits: %s", module, reason)
        return None
    return _pending(head, settings)


def logits_of_shards(
    input: Tensor, weight: Tensor, bias: Tensor | None, whole: Whole, *, settings: Settings
) -> Tensor | None:
    """What a head gives for hidden states (..., D), pending, whose weight (V/P, D) and bias are this rank's shards.

    None where the logits must be plain ones, or nothing is trained; by nothing that only this rank knows.
    """
    head = _Head(input, weight, bias, True, whole)
    trains = settings.defer_logits and torch.is_grad_enabled() and _is_plain_pytorch()
    reason = _why_not(head, settings) if trains else "nothing is trained through it"
    if reason is not None:
        log.debug("a sharded head gives plain logits: %s", reason)
        return None
    return _pending(head, settings)


@dataclass(frozen=True)
class _Head:
    """A linear head that is called. trains: its module's mode. whole: as in `Logits`."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    trains: bool
    whole: Whole | None = None

    @property
    def operands(self) -> list[Tensor]:
        return [self.input, self.weight, *([] if self.bias is None else [self.bias])]

    @property
    def classes(self) -> int:
        return self.weight.shape[0] if self.whole is None else self.whole.classes

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return compat.autocast_dtype(self.input)

    @property
    def is_large(self) -> bool:
        rows = self.input.numel() // max(self.input.shape[-1], 1)
        return worth_deferring(rows * self.classes * self.dtype.itemsize)


def _pending(head: _Head, settings: Settings) -> Tensor:
    key = head.dtype, head.bias is not None, head.input.dim(), head.whole
    if key not in _recipes:
        _recipes[key] = _recipe(*key)
    if settings not in _calls:
        assert BACKEND.calls is not None
        _calls[settings] = BACKEND.calls(settings)
    trains = torch.is_grad_enabled()
    return defer(
        _recipes[key],
        head.operands,
        shape=torch.Size((*head.input.shape[:-1], head.classes)),
        dtype=head.dtype,
        requires_grad=trains,
        fuse=_calls[settings],
        large=head.is_large,
        alone=trains,
        eager=True,
        meeting=split_logits.meeting(_recipes[key], settings.defer_timeout),
    )


def _recipe(dtype: torch.dtype, biased: bool, rank: int, whole: Whole | None) -> Logits:
    return Logits(
        dtype=dtype,
        transposed=False,
        pointwise=False,
        biased=biased,
        rank=rank,
        class_dim=rank - 1,
        steps=(),
        reads=2 + biased,
        whole=whole,
    )


def _why_not(head: _Head, settings: Settings) -> str | None:
    """Why a head gives plain logits; None where they may be pending."""
    if not are_plain(head.operands):
        return "an operand is of a tensor subclass"
    hidden, weight, *bias = head.operands
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        return "the shapes do not fit"
    if any(b.shape != weight.shape[:1] for b in bias):
        return "the shapes do not fit"
    if not large(head.classes, weight.shape[1], settings):
        return "it is no head over a vocabulary"
    if len({t.device for t in head.operands}) > 1 or hidden.device.type not in ("cpu", "cuda"):
        return "its device"
    cast = compat.is_autocast(hidden) or (head.whole is not None and head.whole.casts)
    dtypes = {t.dtype for t in head.operands}
    if not all(dtype.is_floating_point for dtype in dtypes) or (len(dtypes) > 1 and not cast):
        return "its dtypes"
    trains = torch.is_grad_enabled() and head.trains and any(t.requires_grad for t in head.operands)
    # Large logits without a gradient may be a teacher's.
    if not (trains or (not torch.is_grad_enabled() and head.is_large)):
        return "nothing is trained through it"
    if not hidden.numel() and head.whole is None:
        return "it has no rows"
    if any(t.is_inference() for t in head.operands):
        return "an operand is of inference mode"
    if compat.is_freed_after_forward(weight):
        return "FSDP frees its weight after the forward: reshard_after_forward=False keeps it"
    return None
