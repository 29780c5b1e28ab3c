"""The operators on deferred logits that need their values: each runs on plain tensors."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map

from .. import compat
from .pending import PendingValue
from .staleness import DeferredLogitsError
from .tensor import RULES, DeferredLogits

log = logging.getLogger(__name__)

aten = torch.ops.aten

_STORAGE_EDITS = (aten.resize_, aten.resize_as_, aten.set_)


def answer(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What the operator `func` gives where some of its arguments are deferred logits.

    It computes their values, which raises :class:`DeferredLogitsError` if they could be wrong. Of the results, views of
    deferred logits are deferred logits too, and the others are plain tensors.
    """
    if func._schema.is_mutable:
        _leave_to_eager_mode(func, args, kwargs)
    # Inference mode hands us composite operators whole; their parts may have lazy rules.
    with compat.counting_versions():
        out = func.decompose(*args, **kwargs)
    if out is not NotImplemented:
        return out
    given = (x._value for x in tree_leaves((args, kwargs)) if isinstance(x, DeferredLogits))
    if any(value.pending and not value.fake for value in given):
        log.info("deferred logits are read for %s, which needs their values", func)
    if torch.Tag.inplace_view in func.tags:
        return _change_shape_in_place(func, args, kwargs)
    return _run_on_values(func, args, kwargs)


RULES.on_values = answer


def _leave_to_eager_mode(func: Any, args: Any, kwargs: Any) -> None:
    """Breaks the graph that Dynamo is tracing where it would edit logits in place.

    No compiled graph knows that their values, their views and their autograd history are one: an edit in eager mode
    sees to all of them.  Where a break would be an error (``fullgraph``), the logits are computed and the function is
    traced again, with them as an input.
    """
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, DeferredLogits)]
    if any(x._value.functional and x._value.memory.piece for x in given):
        # AOTAutograd would put views of what it has edited where they are in a tensor of their own.
        raise DeferredLogitsError(
            "a function that another backend compiles with fullgraph=True edits a view of deferred logits in place. "
            "Give it .materialize() of the logits, or leave fullgraph out."
        )
    edited = [x._value for x in given if x._value.fake]
    if not edited:
        return
    reason = f"{func} edits deferred logits in place"
    if compat.may_break_graph():
        compat.break_graph(reason)
    real = [value for value in map(PendingValue.stands_for, edited) if value is not None and value.pending]
    if real and compat.dynamo_is_tracing():
        with unset_fake_temporarily():
            for value in real:
                value.memory.edited_in_graph = True
                value.get()
        compat.restart_tracing(reason)


def _run_on_values(func: Any, args: Any, kwargs: Any) -> Any:
    """``func`` on plain tensors.  What it edits comes back as the deferred logits that it was given, views as views."""
    schema = func._schema
    if schema.is_mutable and not compat.has_kernel(func, "Autograd"):
        return _run_on_connected(func, args, kwargs)
    given = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
    plain: dict[int, Tensor] = {}  # of the logits by identity; a fake read gives another tensor every time
    owner: dict[int, DeferredLogits] = {}  # the way back
    edited: list[Tensor] = []
    viewed: DeferredLogits | None = None
    for argument in schema.arguments:
        for x in tree_leaves(given.get(argument.name)):
            if not isinstance(x, DeferredLogits):
                continue
            writes = argument.alias_info is not None and argument.alias_info.is_write
            tensor = plain[id(x)] = x._value.expose() if writes else x._value.get()
            owner[id(tensor)] = x
            if writes:
                edited.append(x)
            elif argument.alias_info is not None:
                viewed = x

    def value(x: Any) -> Any:
        return plain[id(x)] if isinstance(x, DeferredLogits) else x

    # Whoever has saved the values for a backward of his own (AOTAutograd) is to notice an edit, of a view too. What is
    # neither must not be known as a view of something that the kernel (of stack, for one) has allocated inside.
    counting = compat.counting_versions() if schema.is_mutable or viewed is not None else contextlib.nullcontext()
    with counting:
        out = func(*tree_map(value, args), **tree_map(value, kwargs))
    if schema.is_mutable and not compat.has_kernel(func, "ADInplaceOrView"):
        torch.autograd.graph.increment_version(edited)  # nobody above us has
    if viewed is None:
        return tree_map(lambda x: owner.get(id(x), x), out)
    assert viewed is args[0]
    # Of fake views, the operator knows better where they begin than they do.
    metas = func(viewed._meta(), *args[1:], **kwargs)
    return tree_map(lambda tensor, meta: _computed_view(viewed, tensor, meta), out, metas)


def _run_on_connected(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator of which autograd knows nothing, on plain tensors that autograd knows: it records what the kernel
    does, as it would in eager mode."""
    given = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, DeferredLogits)}
    with torch.overrides.enable_reentrant_dispatch():
        plain = {i: x.materialize() for i, x in given.items()}
        owner = {id(tensor): given[i] for i, tensor in plain.items()}
        new_args, new_kwargs = tree_map(lambda x: plain.get(id(x), x), (args, kwargs))
        return tree_map(lambda x: owner.get(id(x), x), func(*new_args, **new_kwargs))


def _computed_view(of: DeferredLogits, tensor: Tensor, meta: Tensor) -> DeferredLogits:
    """`tensor`, a view of the value of some logits, as a view of them, of the form of `meta`."""
    with torch.inference_mode(of.is_inference()):  # as what it is a view of, wherever it is made
        value = PendingValue.computed(tensor, of._value.memory, of._value if of._value.fake else None)
        return DeferredLogits(value, meta, tensor.device, of, meta.storage_offset())


def _change_shape_in_place(func: Any, args: Any, kwargs: Any) -> DeferredLogits:
    """``t_``, ``squeeze_`` and the like: other sizes and strides on the same memory, for this tensor alone."""
    logits: DeferredLogits = args[0]
    if func.overloadpacket in _STORAGE_EDITS:
        return _exchange_storage(func, logits, args)
    tensor = logits._value.expose().detach()
    func(tensor, *args[1:], **kwargs)
    logits._value = PendingValue.computed(tensor, logits._value.memory)
    with no_dispatch():
        func(logits, *args[1:], **kwargs)
    return logits


def _exchange_storage(func: Any, logits: Any, args: Any) -> Any:
    """``set_`` and ``resize_``: an error, unless shape, dtype, device and strides stay as they are."""
    if not isinstance(logits, DeferredLogits):  # a plain tensor is to have the memory of deferred logits
        return _run_on_values(func, args, {})
    if func is aten.set_.source_Tensor:
        logits._hold(args[1], "set_")
    elif func.overloadpacket is aten.set_ or tuple(getattr(args[1], "shape", args[1])) != tuple(logits.shape):
        raise DeferredLogitsError(
            f"{func} exchanges its tensor's storage, and deferred logits have none. Use it on .materialize()."
        )
    return logits
