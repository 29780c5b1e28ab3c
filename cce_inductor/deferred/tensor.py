"""Deferred logits: a tensor that stands for ``head(hidden)`` and computes it on first touch.

A model returns its logits beside its loss; a training loop reads the loss and drops the logits.  Once the
loss is fused, those returned logits are the last N x V tensor of the step.  In their place the program gets a
:class:`DeferredLogits`, which knows everything about them but their values.

Three parts, from the inside out:

``PendingHead``           what to compute and from what, and the check that this is still what it was;
``PendingValue``          one N x V value, pending or remembered, shared by all tensors that alias each other;
``DeferredLogits``  the tensor subclass.  An operator that has a row in ``_LAZY`` is answered without the
                    value; every other one runs on the value, hence on a plain tensor.

Autograd sees ordinary operators on a tensor with a ``grad_fn`` (:class:`DeferLogits`), so gradients through the
logits, in-place edits and views need nothing of their own; the dispatcher calls us below autograd.

A pending value knows how it follows from its head: ``steps``, the operators between.  So a loss over it can still
be computed from the hidden states, by whoever deferred it (``fuse`` of :func:`defer`, for an eager call) or by the
compiled graph that it is given to (:meth:`DeferredLogits.recipe`, :meth:`DeferredLogits.operands`).
"""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import BackwardCFunction
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map

from .. import compat
from .pending import Origin, PendingHead, PendingValue, Recipe, Step, surroundings
from .staleness import DeferredLogitsError

aten = torch.ops.aten


# ---------------------------------------------------------------------------------------------------- the tensor


class DeferredLogits(torch.Tensor):
    """Logits that are computed when something looks at their values.

    Shape, dtype, device, strides, ``requires_grad``, ``grad_fn`` and ``repr`` are there without them, and so are
    the results of the operators in ``_LAZY``.  Everything else computes them once, remembers them, and behaves as
    for a plain tensor.  A read that could be wrong raises :class:`DeferredLogitsError`.

    A view of one is one too, also once the values are there, and shares its (empty) storage: by that, Dynamo and
    AOTAutograd know what shares memory.

    Unlike eager's logits: a hook on them, or ``retain_grad()``, sees gradients that come *through* them but not the
    fused loss's own, and ``torch.autograd.grad(loss, logits)`` finds no path.  ``set_``, ``resize_`` and an assignment
    to ``.data`` are errors where they change shape, dtype, device or strides, and so is a backward through views that
    were taken before ``t_`` and the like.
    """

    _value: PendingValue

    @staticmethod
    def __new__(
        cls,
        value: PendingValue,
        meta: Tensor,
        device: torch.device,
        view_of: DeferredLogits | None = None,
        offset: int = 0,
    ) -> DeferredLogits:
        self = torch.Tensor._make_wrapper_subclass(
            cls, meta.size(), strides=meta.stride(), storage_offset=offset, dtype=meta.dtype, device=device
        )
        self._value = value
        if view_of is not None:
            # A storage without bytes, by whose identity Dynamo and AOTAutograd know what shares memory.
            torch._functionalize_unsafe_set(self, view_of)
        # There is no storage behind us; C++ that asks for its pointer would otherwise be given null.
        torch._C._set_throw_on_mutable_data_ptr(self)
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    @property
    def is_materialized(self) -> bool:
        """Whether the values have been computed."""
        return not self._value.pending

    @torch.compiler.disable
    def materialize(self) -> Tensor:
        """These logits as a plain tensor, connected to autograd and sharing memory with all further reads."""
        # The one view that is none of us. Whoever has it may edit it unseen.
        return aten._reshape_alias(self, self.size(), self.stride())

    def whole_shape(self) -> torch.Size:
        """The shape of the logits that these pending ones come from."""
        origin = self._value.origin
        assert origin is not None and origin.head.shape is not None
        return origin.head.shape

    def whole_dtype(self) -> torch.dtype:
        """Their dtype."""
        origin = self._value.origin
        assert origin is not None
        return origin.head.dtype

    # ---- computing something else from what these are computed from

    def recipe(self) -> Recipe | None:
        """How these pending logits follow from the operands of their head; None once they are computed."""
        origin = self._value.origin
        if origin is None:
            return None
        if origin.recipe is not None:
            return origin.recipe
        given = self._given()
        needs = tuple(t.requires_grad for t in given or ()) or (False,) * len(origin.head.operands)
        connected = given is not None or not self.requires_grad
        offset = self.storage_offset()
        own = (self.dtype, self.device, offset, weakref.ref(self._value))
        return Recipe(origin.head.compute, origin.steps, needs, connected, *own)

    def operands(self) -> tuple[Tensor, ...]:
        """The operands of :meth:`recipe`, connected to autograd as these logits are.

        Raises :class:`DeferredLogitsError` if they are no longer what they were.
        """
        origin = self._value.origin
        assert origin is not None
        aliases = origin.head.check()
        return self._given() or tuple(aliases)

    def _given(self) -> tuple[Tensor, ...] | None:
        """The operands that autograd leads to from here, or None where a gradient must take the way that it leads.

        That is so if it does not lead to the head's own operands, if anybody watches the logits' gradient (FSDP's
        pre-backward hooks are on a model's outputs), or if something other than the lazy operators is on the way
        (DDP puts a function with side effects behind a model's outputs).
        """
        origin = self._value.origin
        assert origin is not None
        with torch._C.DisableTorchFunctionSubclass():  # looking for it is not watching
            stack: list[Any] = [self.grad_fn]
        seen: set[Any] = set()
        found: Any = None
        while stack:
            node = stack.pop()
            if getattr(node, "head", None) is origin.head:
                found = node
                continue
            behind = [n for n, _ in node.next_functions if n is not None] if node is not None else []
            if not behind or isinstance(node, BackwardCFunction):
                return None
            stack += [n for n in behind if n not in seen]  # more than one behind a product
            seen.update(behind)
        return found.operands if found is not None and not origin.head.watched else None

    # What Dynamo and AOTAutograd make of us as an input of a graph: the operands of the head, or the computed values.

    @torch.compiler.disable
    def __tensor_flatten__(self) -> tuple[list[str], Recipe | bool]:
        given = self._value.given
        recipe = given[0] if given is not None else self.recipe()
        if recipe is None:
            return ["_values"], self._value.memory.edited_in_graph
        return [f"_operand_{i}" for i in range(len(recipe.needs))], recipe

    @classmethod
    def __metadata_guard__(cls, compiled_for: Recipe | bool, given: Recipe | bool) -> bool:
        """Whether a graph that was compiled for such logits takes others. One that edits them takes all."""
        return compiled_for is True or compiled_for == given or (compiled_for is False and given is True)

    @staticmethod
    @torch.compiler.disable
    def __tensor_unflatten__(
        inner: dict[str, Tensor], recipe: Recipe | bool, size: Sequence[int], stride: Sequence[int]
    ) -> DeferredLogits:
        if isinstance(recipe, bool):
            tensor = inner["_values"]
            value = PendingValue.computed(tensor)
            dtype, device, offset = tensor.dtype, tensor.device, tensor.storage_offset()
            value.memory.edited_in_graph = recipe
            value.memory.piece = not (offset == 0 and tensor.is_contiguous())
        else:
            operands = [inner[f"_operand_{i}"] for i in range(len(inner))]
            head = PendingHead(recipe.compute, operands, None, recipe.dtype)
            dtype, device, offset = recipe.dtype, recipe.device, recipe.offset

            def make() -> Tensor:
                out = head()
                with surroundings(out.device, grad=False):
                    for step in recipe.steps:
                        out = step(out)
                return out

            value = PendingValue(make, Origin(head, recipe.steps, recipe))
            value.given = recipe, operands
            if any(isinstance(s, torch.SymInt) for s in size):
                # Dynamo gives us and the operands symbols of their own: say that they are the same sizes.
                for own, of_operands in zip(size, value.get().size(), strict=True):
                    torch._check(own == of_operands)
        meta = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        return DeferredLogits(value, meta, device, offset=offset)

    def _is_view(self) -> bool:
        # A compiled graph is given what each tensor is computed from; how it is a view of another one adds nothing.
        return not compat.is_tracing() and super()._is_view()

    @property
    def _base(self) -> Tensor | None:  # type: ignore[override]
        return None if compat.is_tracing() else super()._base

    @property
    def _values(self) -> Tensor:
        return self._value.get()

    def _is_traced_to_the_end(self) -> bool:
        """Whether another backend's AOTAutograd traces what follows from this tensor, and is given its value.

        What it traces must not be pending: neither behind the trace, nor as a result, whose gradient it would take for
        deferred logits. Of views, all that it asks is that they share memory: it makes them itself.
        """
        functional = self._value.functional
        if functional:
            self._value.get()
        return functional

    def __getattr__(self, name: str) -> Any:
        number = re.fullmatch(r"_operand_(\d+)", name)
        if number is not None and (given := self._value.given) is not None:
            return given[1][int(number[1])]
        if number is not None and (origin := self._value.origin) is not None:
            i, operands = int(number[1]), origin.head.operands
            if i == 0 and not compat.is_tracing():
                origin.head.check()  # a compiled function of somebody else's takes the operands from here
            if i < len(operands):
                return operands[i].alias
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not all(issubclass(cls, kind) for kind in types):
            return NotImplemented
        if func in _FUSED:
            out = _fused(func, args, kwargs)
            if out is not NotImplemented:
                return out
        if func in _WATCHING and (origin := args[0]._value.origin) is not None and not compat.is_tracing():
            origin.head.watched = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            _leave_to_eager_mode(func, args, kwargs)
        if func is aten._reshape_alias.default:
            return func(args[0]._value.expose(), *args[1:], **kwargs)
        rule = _LAZY.get(func)
        if rule is not None and isinstance(args[0], DeferredLogits) and not args[0]._is_traced_to_the_end():
            out = rule(args[0], func, args[1:], kwargs)
            if out is not NotImplemented:
                return out
        # Inference mode hands us composite operators whole; their parts may have rows.
        with compat.counting_versions():
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        if torch.Tag.inplace_view in func.tags:
            return _change_shape_in_place(func, args, kwargs)
        return _run_on_values(func, args, kwargs)

    # ---- what does not go through the dispatcher (see also _THROUGH_VALUE)

    @property
    def data(self) -> Tensor:
        return super().data

    @data.setter
    @torch.compiler.disable
    def data(self, new: Tensor) -> None:
        self._hold(new, ".data = ...")

    @torch.compiler.disable
    def _hold(self, new: Tensor, how: str) -> None:
        """Exchanges the value for another tensor's memory, for this tensor alone; its views keep the old one."""
        tensor = new._value.expose() if isinstance(new, DeferredLogits) else new
        kept = ("dtype", "device", "layout")
        same = all(getattr(tensor, name) == getattr(self, name) for name in kept)
        if not same or tensor.size() != self.size() or tensor.stride() != self.stride():
            raise DeferredLogitsError(
                f"{how} would give deferred logits another shape, dtype, device or strides. Use it on .materialize()."
            )
        self._value.get()  # what follows from the value so far, views included, follows from it still
        with torch.inference_mode(False), torch.no_grad():
            # The memory of an inference tensor, in one that may be edited later.
            held = torch.empty(0, dtype=self.dtype, device=self.device)
            held.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
        self._value = PendingValue.computed(held)

    def untyped_storage(self) -> torch.UntypedStorage:
        if compat.is_tracing():
            return super().untyped_storage()  # Dynamo asks for its identity, to find out which inputs share memory
        return self.materialize().untyped_storage()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        # Loggers and debuggers call repr on whole outputs: that is not yet an interest in the values.
        if self.is_materialized:
            return str(self)
        grad = ", requires_grad=True" if self.requires_grad else ""
        where = "" if self.device.type == "cpu" else f", device='{self.device}'"
        return f"DeferredLogits(not computed yet, size={tuple(self.shape)}, dtype={self.dtype}{where}{grad})"

    def __str__(self) -> str:
        text = str(self._value.get())
        if self.grad_fn is not None:
            return f"{text[:-1]}, grad_fn=<{type(self.grad_fn).__name__}>)"
        return f"{text[:-1]}, requires_grad=True)" if self.requires_grad else text

    def _as_leaf(self) -> Tensor:
        """The value as copies and pickles of a tensor carry it: ``requires_grad``, but no history."""
        return self._value.expose().detach().requires_grad_(self.requires_grad)

    def __copy__(self) -> Tensor:
        return self.detach().requires_grad_(self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if not self.is_leaf:
            return super().__deepcopy__(memo)  # raises, as for every other tensor
        return copy.deepcopy(self._as_leaf(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._as_leaf().__reduce_ex__(protocol)


# Methods in C++ that go to the storage, where a wrapper has none, and do not ask the dispatcher.  What Python builds
# on them (__array__, storage, share_memory_, is_shared) follows.
_THROUGH_VALUE = (
    "__dlpack__",
    "apply_",
    "as_subclass",
    "data_ptr",
    "map_",
    "map2_",
    "numpy",
    "tolist",
)


def _through_value(name: str) -> Callable[..., Any]:
    @torch.compiler.disable
    def method(self: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.materialize(), name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = getattr(torch.Tensor, name).__doc__
    return method


for _name in _THROUGH_VALUE:
    setattr(DeferredLogits, _name, _through_value(_name))


# --------------------------------------------------------------------------- losses and statistics of pending logits

# Functions of torch that may be computed without the logits, above autograd, where the operands can be reached.
LOSSES = frozenset((F.cross_entropy, F.nll_loss))
STATISTICS = frozenset(
    (
        *(torch.logsumexp, torch.special.logsumexp, Tensor.logsumexp),
        *(torch.gather, Tensor.gather, torch.take_along_dim, Tensor.take_along_dim),
        *(torch.argmax, Tensor.argmax, torch.max, Tensor.max, torch.amax, Tensor.amax),
        *(torch.sum, Tensor.sum),
    )
)
# Functions that take rows by a tensor: of the hidden states instead.
ROWS = frozenset((Tensor.__getitem__, torch.index_select, Tensor.index_select))
_FUSED = LOSSES | STATISTICS | ROWS
# What waits for a gradient that would go around the logits then: hooks, also on the node of the autograd graph.
_WATCHING = frozenset((Tensor.register_hook, Tensor.retain_grad, Tensor.grad_fn.__get__))  # type: ignore[attr-defined]


def _fused(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    logits = args[0] if args else kwargs.get("input")
    if not isinstance(logits, DeferredLogits) or logits._value.origin is None:
        return NotImplemented
    head = logits._value.origin.head
    if head.fuse is None or compat.is_transforming() or (func not in LOSSES and not head.statistics):
        return NotImplemented
    return head.fuse(logits, func, args, kwargs)


# ------------------------------------------------------------------------------------------- operators on the value


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
    """``func`` on plain tensors.  What it edits comes back as the tensor that it was given, and views as such."""
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

    def result(x: Any) -> Any:
        if id(x) in owner:
            return owner[id(x)]
        return x

    def value(x: Any) -> Any:
        return plain[id(x)] if isinstance(x, DeferredLogits) else x

    # Whoever has saved the values for a backward of his own (AOTAutograd) is to notice an edit.
    with compat.counting_versions():
        out = func(*tree_map(value, args), **tree_map(value, kwargs))
    if schema.is_mutable and not compat.has_kernel(func, "ADInplaceOrView"):
        torch.autograd.graph.increment_version(edited)  # nobody above us has
    if viewed is None:
        return tree_map(result, out)
    assert viewed is args[0]
    # Of fake views, the operator knows better where they begin than they do.
    metas = func(_meta(viewed), *args[1:], **kwargs)
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
    with torch.inference_mode(of.is_inference()):  # as what it is a view of, wherever it is made
        value = PendingValue.computed(tensor, of._value.memory)
        return DeferredLogits(value, meta, tensor.device, of, meta.storage_offset())


def _change_shape_in_place(func: Any, args: Any, kwargs: Any) -> DeferredLogits:
    """``t_``, ``squeeze_`` and the like: other sizes and strides on the same memory, for this tensor alone."""
    self: DeferredLogits = args[0]
    if func.overloadpacket in _STORAGE_EDITS:
        return _exchange_storage(func, self, args)
    tensor = self._value.expose().detach()
    func(tensor, *args[1:], **kwargs)
    self._value = PendingValue.computed(tensor, self._value.memory)
    with no_dispatch():
        func(self, *args[1:], **kwargs)
    return self


_STORAGE_EDITS = (aten.resize_, aten.resize_as_, aten.set_)


def _exchange_storage(func: Any, self: Any, args: Any) -> Any:
    if not isinstance(self, DeferredLogits):  # a plain tensor is to have the memory of deferred logits
        return _run_on_values(func, args, {})
    if func is aten.set_.source_Tensor:
        self._hold(args[1], "set_")
    elif func.overloadpacket is aten.set_ or tuple(getattr(args[1], "shape", args[1])) != tuple(self.shape):
        raise DeferredLogitsError(
            f"{func} exchanges its tensor's storage, and deferred logits have none. Use it on .materialize()."
        )
    return self


# ------------------------------------------------------------------------------------------------- operators without

# A rule is given the tensor, the operator, and the operator's other arguments; it answers without the value, or
# declines with NotImplemented.
_Rule = Callable[[DeferredLogits, Any, Sequence[Any], dict[str, Any]], Any]


def _meta(self: DeferredLogits) -> Tensor:
    offset = self.storage_offset()
    if isinstance(offset, int) and offset == 0:
        return torch.empty_strided(self.size(), self.stride(), dtype=self.dtype, device="meta")
    extent = offset + 1 + sum((size - 1) * stride for size, stride in zip(self.size(), self.stride(), strict=True))
    whole = torch.empty(extent, dtype=self.dtype, device="meta")
    return whole.as_strided(self.size(), self.stride(), offset)


def _aliased(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    with torch.inference_mode(self.is_inference()):  # as what it aliases, wherever that is done
        return DeferredLogits(self._value, _meta(self), self.device, self, self.storage_offset())


def _viewed(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if self.is_materialized:
        return NotImplemented
    meta = func(_meta(self), *args, **kwargs)
    value = self._value.view(Step.of(func, args, kwargs))
    with torch.inference_mode(self.is_inference()):
        return DeferredLogits(value, meta, self.device, self, meta.storage_offset())


def _split(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if self.is_materialized:
        return NotImplemented
    given = dict(zip(("sizes", "dim"), args, strict=False)) | kwargs
    dim, start, parts = given.get("dim", 0), 0, []
    for part in func(_meta(self), *args, **kwargs):
        end = start + part.size(dim)
        parts.append(_viewed(self, aten.slice.Tensor, (dim, start, end), {}))
        start = end
    return parts


def _unbound(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if self.is_materialized:
        return NotImplemented
    dim = args[0] if args else kwargs.get("dim", 0)
    return [_viewed(self, aten.select.int, (dim, i), {}) for i in range(self.size(dim))]


def _for_statistics(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    origin = self._value.origin
    return _copied(self, func, args, kwargs) if origin is not None and origin.head.statistics else NotImplemented


def _scaled(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if type(args[0]) not in (int, float) or not math.isfinite(args[0]):
        return NotImplemented
    return _for_statistics(self, func, args, kwargs)


def times(tensor: Tensor, first: Sequence[Step], second: Sequence[Step]) -> Tensor:
    """The step of a product of two tensors that both follow from `tensor`."""
    a = b = tensor
    for step in first:
        a = step(a)
    for step in second:
        b = step(b)
    return a * b


# The steps of the factors of an entropy, behind what they share.
_ENTROPIES = (
    {(), (aten.exp.default,)},
    {(aten._log_softmax.default,), (aten._log_softmax.default, aten.exp.default)},
    {(aten._log_softmax.default,), (aten._softmax.default,)},
)


def _multiplied(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Logits times a number, or probabilities times their logarithm, as an entropy is written.

    The probabilities are pending only where statistics are served.
    """
    other = args[0]
    if not isinstance(other, DeferredLogits):
        return _scaled(self, func, args, kwargs)
    # Steps do not say what has been computed without a gradient.
    if torch.is_grad_enabled() and self.requires_grad != other.requires_grad:
        return NotImplemented
    source, first, second = self._value.meet(other._value)
    if source is None:
        return NotImplemented
    pair = {tuple(step.op for step in steps) for steps in (first, second)}
    if pair not in _ENTROPIES:
        return NotImplemented
    meta = func(_meta(self), _meta(other))
    return DeferredLogits(source.copy(Step.of(times, (first, second), {})), meta, self.device)


def _copied(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if self.is_materialized or kwargs.get("pin_memory") or kwargs.get("layout") not in (None, torch.strided):
        return NotImplemented
    if "non_blocking" in kwargs:
        # The copy happens at the first read, after any synchronisation that the caller has planned for it.
        kwargs = {**kwargs, "non_blocking": False}
    meta = func(_meta(self), *args, **{k: v for k, v in kwargs.items() if k != "device"})
    return DeferredLogits(self._value.copy(Step.of(func, args, kwargs)), meta, _device(self, kwargs))


def _from_shape(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return func(_meta(self), *args, **{**kwargs, "device": _device(self, kwargs)})


def _device(self: DeferredLogits, kwargs: dict[str, Any]) -> torch.device:
    device = kwargs.get("device")
    return self.device if device is None else torch.empty(0, device=device).device  # "cuda" is "cuda:0"


_LAZY: dict[Any, _Rule] = {
    aten.detach.default: _aliased,
    aten.alias.default: _aliased,
    aten.clone.default: _copied,
    aten._to_copy.default: _copied,
    aten._log_softmax.default: _copied,
    aten.view.default: _viewed,
    aten._unsafe_view.default: _viewed,
    aten.slice.Tensor: _viewed,
    aten.select.int: _viewed,
    aten.unsqueeze.default: _viewed,
    aten.squeeze.dim: _viewed,
    aten.t.default: _viewed,
    aten.transpose.int: _viewed,
    aten.permute.default: _viewed,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbound,
    aten.empty_like.default: _from_shape,
    aten.zeros_like.default: _from_shape,
    aten.ones_like.default: _from_shape,
    aten.full_like.default: _from_shape,
    aten.rand_like.default: _from_shape,
    aten.randn_like.default: _from_shape,
    aten.new_empty.default: _from_shape,
    aten.new_zeros.default: _from_shape,
    aten.new_ones.default: _from_shape,
    aten.new_full.default: _from_shape,
    aten.new_empty_strided.default: _from_shape,
}

# What entropies and temperatures are written with.  Lazy only where a statistic of it would be asked for: the longer
# something is pending, the more often it is read too late.
EXPONENTIALS = frozenset((aten._softmax.default, aten.exp.default))
_ARITHMETIC: dict[Any, _Rule] = {
    **dict.fromkeys(EXPONENTIALS, _for_statistics),
    aten.mul.Tensor: _multiplied,
    aten.div.Tensor: _scaled,
}
_LAZY |= _ARITHMETIC
