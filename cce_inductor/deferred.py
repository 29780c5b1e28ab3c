"""Deferred logits: a tensor that stands for ``head(hidden)`` and computes it on first touch.

A model returns its logits beside its loss; a training loop reads the loss and drops the logits.  Once the
loss is fused, those returned logits are the last N x V tensor of the step.  In their place the program gets a
:class:`DeferredLogits`, which knows everything about them but their values.

Three parts, from the inside out:

``_Head``           what to compute and from what, and the check that this is still what it was;
``_Value``          one N x V value, pending or remembered, shared by all tensors that alias each other;
``DeferredLogits``  the tensor subclass.  An operator that has a row in ``_LAZY`` is answered without the
                    value; every other one runs on the value, hence on a plain tensor.

Autograd sees ordinary operators on a tensor with a ``grad_fn`` (:class:`DeferLogits`), so gradients through the
logits, in-place edits and views need nothing of their own; the dispatcher calls us below autograd.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

Compute = Callable[[Sequence[Tensor]], Tensor]


class DeferredLogitsError(RuntimeError):
    """Deferred logits were read when their values could be wrong.  The message says why and what to do."""


_CURE = (
    "Read the logits before that happens (calling .materialize() on them is enough), or have the model return "
    "plain logits: set cce_inductor.config.defer_logits = False, or pass options={'defer_logits': False} to "
    "torch.compile."
)


def defer(
    compute: Compute, operands: Sequence[Tensor], *, shape: Sequence[int], dtype: torch.dtype, requires_grad: bool
) -> Tensor:
    """A tensor of this shape and dtype that stands for ``compute(operands)`` and computes it on first touch.

    ``compute`` is a pure, differentiable function of the operands and returns a tensor of ``shape`` and ``dtype`` that
    does not alias them; ours is contiguous.  ``operands[0]`` are the hidden states (..., D), ``operands[1]`` the
    head's weight.  It runs outside autocast and outside Dynamo: once for the value, and once more inside the backward
    if a gradient reaches the logits.  ``requires_grad`` says whether eager's logits would have required grad.

    The operands are referred to, not copied.  A read after they have changed raises
    :class:`DeferredLogitsError`; see :class:`_Operand` for what is recognised and what cannot be.
    """
    shape = torch.Size(shape)
    value = _Value(_Head(compute, operands, shape, dtype))
    if not requires_grad:
        return DeferredLogits(value, torch.empty(shape, dtype=dtype, device="meta"), operands[0].device)
    with torch.enable_grad():  # the caller may have left a no_grad region that the logits were not computed in
        return DeferLogits.apply(value, compute, shape, dtype, *operands)


# ------------------------------------------------------------------------------------------------- the operands


def _operand_name(index: int) -> str:
    return {0: "the hidden states", 1: "the head's weight"}.get(index, f"operand {index} of the head")


class _Operand(NamedTuple):
    """An operand as it was when the logits were deferred, and how we notice that it is so no longer.

    * An in-place edit by PyTorch raises the version counter, which every alias shares.
    * Freed storage (FSDP after resharding) has no bytes left.
    * What writes behind the counter's back shows in ``sample``, a few elements of all rows and columns that are
      compared bit for bit at the first read: edits of ``p.data``, ``AdamW(fused=True)`` on a CPU, FSDP2's next
      all-gather into the same buffer, flat parameter buffers, a CUDA graph's pool.

    Replacing ``p.data`` by another tensor changes nothing here: the alias keeps the old storage, and the logits
    come out as eager's.  **Not recognised**: a write behind the counter's back that misses all sampled elements,
    such as ``p.data[i, j] = x``, or ``p.data[i] = x`` with far more than ``_SAMPLES`` rows.
    """

    name: str
    alias: Tensor
    version: int | None
    sample: Tensor | None

    @classmethod
    def record(cls, index: int, tensor: Tensor) -> _Operand:
        # It shares the version counter, but not the grad_fn, which would keep the whole graph's saved tensors alive.
        alias = tensor.detach()
        version = None if alias.is_inference() else alias._version
        return cls(_operand_name(index), alias, version, _sample(alias))

    def check(self) -> None:
        _check_allocated(self.name, self.alias)
        version = None if self.alias.is_inference() else self.alias._version
        if version != self.version:
            raise DeferredLogitsError(
                f"deferred logits were read too late: {self.name} {tuple(self.alias.shape)} has been modified in "
                f"place since the forward pass (version {self.version}, now {version}), as optimizer.step() does. "
                + _CURE
            )
        if self.sample is None or (self.alias.is_cuda and torch.cuda.is_current_stream_capturing()):
            return  # while a graph is captured nothing can be compared
        if not torch.equal(_sample(self.alias), self.sample):
            raise DeferredLogitsError(
                f"deferred logits were read too late: {self.name} {tuple(self.alias.shape)} has been overwritten "
                "since the forward pass without a change of its version (through .data, by a gather into the same "
                "buffer, or by a replayed CUDA graph). " + _CURE
            )


def _check_allocated(name: str, tensor: Tensor) -> None:
    if tensor.numel() and not isinstance(tensor, FakeTensor) and not tensor.untyped_storage().nbytes():
        raise DeferredLogitsError(
            f"deferred logits were read too late: the storage of {name} {tuple(tensor.shape)} has been freed since "
            "the forward pass, as FSDP does when it reshards the parameters. " + _CURE
        )


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by item size; as bits NaN equals itself
_SAMPLES = 2**14  # one kernel of some microseconds, and below what PyTorch splits among CPU threads


def _sample(tensor: Tensor) -> Tensor | None:
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


# --------------------------------------------------------------------------------------------------- the value


@contextlib.contextmanager
def _surroundings(device: torch.device, *, grad: bool) -> Iterator[None]:
    """Where ``compute`` gives what the graph would have given: no ambient autocast, and no inference mode, whose
    tensors could not be edited once it is left."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


class _Head:
    """The recipe of pending logits: run once by its :class:`_Value`, which then lets go of it."""

    def __init__(self, compute: Compute, operands: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        self.compute, self.shape, self.dtype = compute, shape, dtype
        self.operands = [_Operand.record(i, t) for i, t in enumerate(operands)]

    def __call__(self) -> Tensor:
        for operand in self.operands:
            operand.check()
        aliases = [operand.alias for operand in self.operands]
        with _surroundings(aliases[0].device, grad=False):
            out = self.compute(aliases).contiguous()  # the strides that the program has been told
        if out.shape != self.shape or out.dtype != self.dtype:
            raise AssertionError(
                f"deferred logits came out as {tuple(out.shape)} {out.dtype} where the graph has "
                f"{tuple(self.shape)} {self.dtype}; please report this"
            )
        if not isinstance(out, FakeTensor):
            counters["cce_inductor"]["deferred_materialized"] += 1
        return out


class _Value:
    """One value, pending or remembered.  Tensors that alias each other (``detach``) share one."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make: Callable[[], Tensor] | None = make
        self._tensor: Tensor | None = None
        self._readers: weakref.WeakSet[_Value] = weakref.WeakSet()

    @property
    def pending(self) -> bool:
        return self._tensor is None

    @torch.compiler.disable  # Dynamo would otherwise compile the frames below when a compiled function reads us
    def get(self) -> Tensor:
        if self._tensor is None:
            assert self._make is not None
            tensor = self._make()
            if isinstance(tensor, FakeTensor):
                return tensor  # somebody traces: a real read may follow
            self._tensor, self._make = tensor, None  # and with it the operands, or the value derived from
        return self._tensor

    def derive(self, fn: Callable[[Tensor], Tensor]) -> _Value:
        """The value ``fn`` of this one: itself pending, and computed from this one as it is now."""

        def make() -> Tensor:
            tensor = self.get()
            with _surroundings(tensor.device, grad=False):
                return fn(tensor)

        child = _Value(make)
        self._readers.add(child)
        return child

    def expose(self) -> Tensor:
        """The tensor for uses that may edit its memory, now (``mul_``) or later and unseen (a view, ``numpy()``):
        whatever derives from its present state is computed first."""
        tensor = self.get()
        for child in list(self._readers):
            child.get()
        self._readers.clear()
        return tensor


# ---------------------------------------------------------------------------------------------------- the tensor


class DeferredLogits(torch.Tensor):
    """Logits that are computed when something looks at their values.

    Shape, dtype, device, strides, ``requires_grad``, ``grad_fn`` and ``repr`` are there without them, and so are
    the results of the operators in ``_LAZY``.  Everything else computes them once, remembers them, and behaves as
    for a plain tensor.  A read that could be wrong raises :class:`DeferredLogitsError`.

    Unlike eager's logits: a hook on them, or ``retain_grad()``, sees gradients that come *through* them but not the
    fused loss's own, and ``torch.autograd.grad(loss, logits)`` finds no path.  Assigning to ``.data`` is an error.
    """

    _value: _Value

    @staticmethod
    def __new__(cls, value: _Value, meta: Tensor, device: torch.device) -> DeferredLogits:
        self = torch.Tensor._make_wrapper_subclass(
            cls, meta.size(), strides=meta.stride(), dtype=meta.dtype, device=device
        )
        self._value = value
        # There is no storage behind us; C++ that asks for its pointer would otherwise be given null.
        torch._C._set_throw_on_mutable_data_ptr(self)
        return self

    def __init__(self, *_: Any) -> None:
        super().__init__()

    @property
    def is_materialized(self) -> bool:
        """Whether the values have been computed."""
        return not self._value.pending

    def materialize(self) -> Tensor:
        """These logits as a plain tensor, connected to autograd and sharing memory with all further reads."""
        return aten.view(self, self.shape)

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _LAZY.get(func)
        if rule is not None and isinstance(args[0], DeferredLogits):
            out = rule(args[0], func, args[1:], kwargs)
            if out is not NotImplemented:
                return out
        # Inference mode hands us composite operators whole; their parts may have rows.
        out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        if torch.Tag.inplace_view in func.tags:
            return _change_shape_in_place(func, args, kwargs)
        return _run_on_values(func, args, kwargs)

    # ---- what does not go through the dispatcher (see also _THROUGH_VALUE)

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
    "untyped_storage",
)


def _through_value(name: str) -> Callable[..., Any]:
    def method(self: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.materialize(), name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = getattr(torch.Tensor, name).__doc__
    return method


for _name in _THROUGH_VALUE:
    setattr(DeferredLogits, _name, _through_value(_name))


# ------------------------------------------------------------------------------------------- operators on the value


def _run_on_values(func: Any, args: Any, kwargs: Any) -> Any:
    """``func`` on plain tensors.  What it edits comes back as the tensor that it was given."""
    schema = func._schema
    given = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
    owner: dict[int, DeferredLogits] = {}
    for argument in schema.arguments:
        if argument.alias_info is None:
            continue
        for x in tree_leaves(given.get(argument.name)):
            if isinstance(x, DeferredLogits):
                owner[id(x._value.expose())] = x

    def plain(x: Any) -> Any:
        return x._value.get() if isinstance(x, DeferredLogits) else x

    out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
    return tree_map(lambda x: owner.get(id(x), x), out)


def _change_shape_in_place(func: Any, args: Any, kwargs: Any) -> DeferredLogits:
    """``t_``, ``squeeze_`` and the like: other sizes and strides on the same memory, for this tensor alone."""
    self: DeferredLogits = args[0]
    if func.overloadpacket in (aten.resize_, aten.resize_as_, aten.set_):
        raise DeferredLogitsError(
            f"{func} exchanges its tensor's storage, and deferred logits have none. Use it on .materialize()."
        )
    tensor = self._value.expose().detach()
    func(tensor, *args[1:], **kwargs)
    self._value = _Value(lambda: tensor)
    self._value.get()
    with no_dispatch():
        func(self, *args[1:], **kwargs)
    return self


# ------------------------------------------------------------------------------------------------- operators without

# A rule is given the tensor, the operator, and the operator's other arguments; it answers without the value, or
# declines with NotImplemented.
_Rule = Callable[[DeferredLogits, Any, Sequence[Any], dict[str, Any]], Any]


def _meta(self: DeferredLogits) -> Tensor:
    return torch.empty_strided(self.size(), self.stride(), dtype=self.dtype, device="meta")


def _aliased(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    with torch.inference_mode(self.is_inference()):  # as what it aliases, wherever that is done
        return DeferredLogits(self._value, _meta(self), self.device)


def _copied(self: DeferredLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if self.is_materialized or kwargs.get("pin_memory") or kwargs.get("layout") not in (None, torch.strided):
        return NotImplemented
    if "non_blocking" in kwargs:
        # The copy happens at the first read, after any synchronisation that the caller has planned for it.
        kwargs = {**kwargs, "non_blocking": False}
    meta = func(_meta(self), *args, **{k: v for k, v in kwargs.items() if k != "device"})
    return DeferredLogits(self._value.derive(lambda t: func(t, *args, **kwargs)), meta, _device(self, kwargs))


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


# ------------------------------------------------------------------------------------------------------ autograd


class DeferLogits(torch.autograd.Function):
    """Gives deferred logits their ``grad_fn``.

    It saves the operands and not the value, and is not part of a backward that does not come through the logits.
    One that does computes the head a second time, since the value was computed below autograd.
    """

    @staticmethod
    def forward(
        ctx: Any, value: _Value, compute: Compute, shape: torch.Size, dtype: torch.dtype, *operands: Tensor
    ) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*operands)
        ctx.set_materialize_grads(False)
        return DeferredLogits(value, torch.empty(shape, dtype=dtype, device="meta"), operands[0].device)

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[4:]
        grads: list[Tensor | None] = [None] * len(needed)
        if grad is None:
            return (None,) * 4 + tuple(grads)
        operands = ctx.saved_tensors  # raises, as for eager's head, if one of them has been modified in place
        for i, operand in enumerate(operands):
            _check_allocated(_operand_name(i), operand)
        create_graph = torch.is_grad_enabled()
        with _surroundings(operands[0].device, grad=True):
            # Aliases, not detached for the sake of create_graph; the operands' own hooks must not run here.
            inputs = [t.view_as(t) if need else t.detach() for t, need in zip(operands, needed, strict=True)]
            out = ctx.compute(inputs)
            wanted = [i for i, need in enumerate(needed) if need]
            found = torch.autograd.grad(
                out, [inputs[i] for i in wanted], grad, create_graph=create_graph, allow_unused=True
            )
        for i, g in zip(wanted, found, strict=True):
            grads[i] = g
        return (None,) * 4 + tuple(grads)
