"""The tensor subclass: what the program is given in the place of logits.

Everything that a tensor knows without its values is here, and so is what the class says to Dynamo and AOTAutograd, to
pickle and copy, and to the functions of torch that it is passed to. What operators do is in `lazy` and `on_values`.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .. import compat
from ..graph.facts import Fact
from ..graph.spellings import NAMES, REDUCING, functions_of
from .pending import Origin, Other, PendingHead, PendingValue, Recipe
from .staleness import DeferredLogitsError
from .steps import Extra, Step, surroundings
from .way import Way, way

aten = torch.ops.aten

# (logits, operator, its other arguments, its keywords) -> what it gives, or NotImplemented where it needs the values.
Rule = Callable[["DeferredLogits", Any, Sequence[Any], dict[str, Any]], Any]


@dataclass
class Rules:
    """How an operator on deferred logits is answered.

    lazy: without the values, one rule for each operator that has one. entrywise: operators on every entry, for which
    `record` is one rule. joined: operators on a list of tensors. on_values: every other operator, and those that their
    rule declines. The last three are given the operator, its arguments and its keywords.
    """

    lazy: dict[Any, Rule] = field(default_factory=dict)
    entrywise: frozenset[Any] = frozenset()
    joined: dict[Any, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = field(default_factory=dict)
    record: Callable[[Any, Sequence[Any], dict[str, Any]], Any] | None = None
    on_values: Callable[[Any, Sequence[Any], dict[str, Any]], Any] | None = None


# The rules make tensors of the class below, so their modules (`lazy`, `on_values`) import this one and put them in
# here; the package imports both, hence the rules are there before anybody has deferred logits.
RULES = Rules()


class DeferredLogits(torch.Tensor):
    """Logits that are computed when something looks at their values.

    Shape, dtype, device, strides, ``requires_grad``, ``grad_fn`` and ``repr`` are there without them, and so are
    the results of the operators in ``RULES.lazy``.  Everything else computes them once, remembers them, and behaves as
    for a plain tensor.  A read that could be wrong raises :class:`DeferredLogitsError`.

    A view of one is one too, also once the values are there, and shares its (empty) storage: by that, Dynamo and
    AOTAutograd know what shares memory.

    Unlike eager's logits: a hook on them, or ``retain_grad()``, that comes *after* a loss has been computed sees
    gradients that come through them but not the fused loss's own, and ``torch.autograd.grad(loss, logits)`` finds no
    path.  ``set_``, ``resize_`` and an assignment
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
        value.memory.tensors[self] = None
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

    def as_now(self) -> Callable[[bool], Tensor]:
        """Gives, later, these logits in a plain tensor, connected to autograd as they are or a leaf that requires grad.

        It has the values of now, whatever becomes of the memory.
        """
        value, version = self._value, self._version
        kept = value.copy(Step.of(aten.clone.default, (), {}))

        def get(connected: bool) -> Tensor:
            if connected and self._value is value and self._version == version:
                return self.materialize()
            if connected:
                raise DeferredLogitsError(
                    "a loss is differentiated twice whose logits have been edited in place since: edit a copy of them"
                )
            return (value if kept.pending else kept).get().detach().requires_grad_()

        return get

    def head(self) -> PendingHead:
        """The head that these pending logits come from."""
        origin = self._value.origin
        assert origin is not None
        return origin.head

    def whole_shape(self) -> torch.Size:
        """The shape of the head's logits, which these pending ones come from."""
        shape = self.head().shape
        assert shape is not None
        return shape

    def whole_dtype(self) -> torch.dtype:
        """The dtype of the head's logits."""
        return self.head().dtype

    # ---- computing something else from what these are computed from

    def recipe(self) -> Recipe | None:
        """How these pending logits follow from the operands of their head; None once they are computed."""
        origin = self._value.origin
        if origin is None:
            return None
        if origin.recipe is not None:
            return origin.recipe
        with unset_fake_temporarily():  # another backend's AOTAutograd may be asking
            unchanged = all(extra.unchanged for extra in origin.extras)
        if not unchanged:
            return None  # only a read knows what it was
        given, other = self._given(), origin.other
        reads = sum(len(head.operands) for head in origin.heads)
        needs = tuple(t.requires_grad for t in given or ()) or (False,) * (reads + len(origin.extras))
        connected = given is not None or not self.requires_grad
        offset = self.storage_offset()
        own = (self.dtype, self.device, offset, weakref.ref(self._value))
        beside = None if other is None else (other.head.compute, len(other.head.operands))
        return Recipe(origin.head.compute, reads, origin.steps, needs, connected, *own, other=beside)

    def operands(self) -> tuple[Tensor, ...]:
        """The operands of :meth:`recipe`, connected to autograd as these logits are.

        Raises :class:`DeferredLogitsError` if they are no longer what they were.
        """
        origin = self._value.origin
        assert origin is not None
        aliases = [alias for head in origin.heads for alias in head.check()]
        return self._given() or (*aliases, *(extra.alias for extra in origin.extras))

    def _given(self) -> tuple[Tensor, ...] | None:
        """The operands for a loss that is computed from here; None where a gradient must take the way that it leads.

        They are those of the head, around the logits, as a rule. If anybody watches the logits' gradient (FSDP's hooks
        are on a model's outputs), or if something other than the lazy operators is on the way (DDP puts a function
        with side effects behind a model's outputs), they are leaves: see :mod:`gradient`. None if autograd does not
        lead to the head.
        """
        way = self._way()
        return None if way is None else way.operands

    @property
    def waits(self) -> bool:
        """Whether a loss that is computed now has to be behind these logits in the autograd graph."""
        return self.requires_grad and torch.is_grad_enabled() and self.between() is not None

    def between(self) -> frozenset[Any] | None:
        """The nodes of the autograd graph from here to the head, if a fused loss has to be behind the logits in it."""
        way = self._way() if self._value.origin is not None else None
        return None if way is None else way.between

    def _way(self) -> Way | None:
        assert self._value.origin is not None
        with torch._C.DisableTorchFunctionSubclass():  # looking for it is not watching
            return way(self.grad_fn, self._value.origin)

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
            head = PendingHead(recipe.compute, operands[: recipe.own], None, recipe.dtype)
            dtype, device, offset = recipe.dtype, recipe.device, recipe.offset
            extras, other = operands[recipe.reads :], None
            if recipe.other is not None:
                second = PendingHead(recipe.other[0], operands[recipe.own : recipe.reads], None, recipe.dtype)
                needs = any(recipe.needs[: recipe.own]), any(recipe.needs[recipe.own : recipe.reads])
                other = Other(second, needs)

            def make() -> Tensor:
                out = head()
                beside = extras if other is None else [*extras, other.head()]
                with surroundings(out.device, grad=False):
                    for step in recipe.steps:
                        out = step(out, beside)
                return out

            value = PendingValue(make, Origin(head, recipe.steps, recipe, tuple(map(Extra, extras)), other=other))
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
        if compat.is_tracing():
            return None
        base = super()._base
        return self if base is None and self._value.memory.piece else base

    def _view_func(self, new_base: Tensor) -> Tensor:
        # AOTAutograd makes a result again that shares memory with an input, as a view of that. It has it from a graph
        # that computed it elsewhere, and would add its offset to the input's (from torch 2.14); both are absolute.
        if super()._base is not None:
            return super()._view_func(new_base)  # type: ignore[misc]
        return new_base.as_strided(self.size(), self.stride(), self.storage_offset())

    @property
    def _values(self) -> Tensor:  # type: ignore[override]
        value = self._value
        return value.expose() if value.memory.edited_in_graph else value.get()

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
            i, operands = int(number[1]), [operand.alias for head in origin.heads for operand in head.operands]
            if i == 0 and not compat.is_tracing():
                for head in origin.heads:
                    head.check()  # a compiled function of somebody else's takes the operands from here
            operands += [extra.alias for extra in origin.extras]
            if i < len(operands):
                return operands[i]
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
        if func is Tensor.fill_diagonal_ and not compat.is_tracing():
            func = _fill_diagonal
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(getattr(kind, "beyond_logits", False) for kind in types):
            return NotImplemented
        if func is aten._reshape_alias.default:
            return func(args[0]._value.expose(), *args[1:], **kwargs)
        rule = RULES.lazy.get(func)
        if rule is not None and isinstance(args[0], DeferredLogits) and not args[0]._is_traced_to_the_end():
            out = rule(args[0], func, args[1:], kwargs)
            if out is not NotImplemented:
                return out
        of_several = RULES.record if func in RULES.entrywise else RULES.joined.get(func)
        if of_several is not None:
            out = of_several(func, args, kwargs)
            if out is not NotImplemented:
                return out
        assert RULES.on_values is not None
        return RULES.on_values(func, args, kwargs)

    def _meta(self) -> Tensor:
        """A tensor without memory, of this shape and dtype, and with these strides and this offset."""
        offset = self.storage_offset()
        if isinstance(offset, int) and offset == 0:
            return torch.empty_strided(self.size(), self.stride(), dtype=self.dtype, device="meta")
        extent = offset + 1 + sum((size - 1) * stride for size, stride in zip(self.size(), self.stride(), strict=True))
        whole = torch.empty(extent, dtype=self.dtype, device="meta")
        return whole.as_strided(self.size(), self.stride(), offset)

    # ---- what does not go through the dispatcher (see also _THROUGH_VALUE)

    @property
    def data(self) -> Tensor:
        """An alias without history. What is assigned must have the same shape, dtype, device and strides."""
        return super().data

    @data.setter
    @torch.compiler.disable
    def data(self, new: Tensor) -> None:
        self._hold(new, ".data = ...")

    @torch.compiler.disable
    def _hold(self, new: Tensor, how: str) -> None:
        """Exchanges the value for another tensor's memory, for this tensor alone; its views keep the old one."""
        tensor = new._value.expose() if isinstance(new, DeferredLogits) else new
        same = all(getattr(tensor, name) == getattr(self, name) for name in ("dtype", "device", "layout"))
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
        """The memory of the values, which are computed for it; in a trace the empty one that views share."""
        if compat.is_tracing():
            return super().untyped_storage()  # Dynamo asks for its identity, to find out which inputs share memory
        return self.materialize().untyped_storage()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
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
    "__format__",
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
LOSSES = functions_of(*(name for name, row in NAMES.items() if row.facts & Fact.LOSS))
# Functions that compare logits with others, which may be pending too: another model's.
COMPARISONS = functions_of("cross_entropy", "kl_div")
# Those that the tracer ends at.
STATISTICS = functions_of(*(n for n, row in NAMES.items() if any(r.startswith(REDUCING) for r in row.rules))) - LOSSES
# Functions that take rows by a tensor: of the hidden states instead.
ROWS = functions_of("getitem", "index_select")
_FUSED = LOSSES | COMPARISONS | STATISTICS | ROWS
# What waits for a gradient that would go around the logits then: hooks, also on the node of the autograd graph.
_WATCHING = frozenset((Tensor.register_hook, Tensor.retain_grad, Tensor.grad_fn.__get__))  # type: ignore[union-attr]


def _fill_diagonal(logits: Tensor, fill_value: Any, wrap: bool = False) -> Tensor:
    """``fill_diagonal_`` as an index of entries, which is recorded: in eager mode it writes into a strided view."""
    n = len(logits) if logits.dim() == 2 else 0
    if not 0 < n <= logits.shape[-1]:
        return logits.fill_diagonal_(fill_value, wrap)
    rows = torch.arange(n, device=logits.device)
    return logits.index_put_((rows, rows), torch.tensor(fill_value, dtype=logits.dtype))


def _fused(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    logits = args[0] if args else kwargs.get("input")
    if not isinstance(logits, DeferredLogits) or logits._value.origin is None:
        return NotImplemented
    compared = [logits]
    if func in COMPARISONS:
        compared += [x for x in (*args[1:], *kwargs.values()) if isinstance(x, DeferredLogits)]
    origins = [x._value.origin for x in compared if x._value.origin is not None]
    heads = [head for origin in origins for head in origin.heads if head.alone or func in ROWS]
    if not heads or heads[0].fuse is None or compat.is_transforming():
        return NotImplemented
    if heads[0].meeting is not None and func not in LOSSES:
        heads[0].meeting()  # a loss is of all ranks anyway
    return heads[0].fuse(logits, func, args, kwargs)
