"""The gradient that a fused loss gives its logits: pending, as they are.

As a rule a loss that is fused goes around its logits: it reads the operands of their head, and its gradients go there.
Where somebody waits for the gradient of the logits (a hook, as FSDP2 and Lightning Fabric put on every output), the
loss is behind them, as in eager mode. What autograd then brings them is a :class:`PendingGradient`. It passes the
hooks, and whatever lies between the loss and the head, without being computed. Where it reaches the head as it was, the
fused backward runs; a hook that looks at it has it computed; and what a hook puts in its place goes on from there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .. import compat
from .lazy import ALONG
from .pending import PendingHead
from .tensor import DeferredLogits

aten = torch.ops.aten


class Part:
    """What one fused loss gives: the gradient of what it was computed from.

    outputs: what it computed, which leads to the leaves of each head. grads: their gradients. heads: of each of the
    logits that it was called on. between: the nodes of the autograd graph from these to their heads.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        heads: Sequence[PendingHead],
        between: frozenset[Any],
    ) -> None:
        given = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        self.outputs, self.grads = [o for o, _ in given], [g for _, g in given]
        self.heads, self.between = tuple(heads), between
        self._found: dict[int, Tensor | None] | None = None

    @property
    def alone(self) -> bool:
        """Whether its gradients are those of one head, and not formed yet."""
        return len({*self.heads}) == 1 and self._found is None

    def now(self, others: Sequence[Tensor] = ()) -> list[Tensor | None]:
        """Forms the gradients of the leaves of all heads, and gives those of `others`, where there are any."""
        if others or not self.alone:
            leaves = [t for own in dict.fromkeys(self.heads) for t in own.leaves if t.requires_grad]
            wanted, retain = [*leaves, *others], compat.keeps_graph()
            found = torch.autograd.grad(self.outputs, wanted, self.grads, retain_graph=retain, allow_unused=True)
            self._found = {id(t): g for t, g in zip(wanted, found, strict=True)}
            return list(found[len(leaves) :])
        return []

    def of(self, head: PendingHead) -> list[Tensor | None]:
        """The gradients of the leaves of one of its heads, which are formed together with the others'."""
        if self._found is None:
            self.now()
        assert self._found is not None
        return [self._found.get(id(leaf)) for leaf in head.leaves]


class PendingGradient(Tensor):
    """The gradient of pending logits, or of a tensor that follows from them, computed when something looks at it.

    parts: fused losses, whose gradients for the head are known without it, each with the number of the logits. rest:
    another summand, or None. make: computes all of it.
    """

    parts: tuple[tuple[Part, int], ...]
    rest: Tensor | None

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device, *_: Any) -> PendingGradient:
        self = Tensor._make_wrapper_subclass(cls, meta.size(), strides=meta.stride(), dtype=meta.dtype, device=device)
        torch._C._set_throw_on_mutable_data_ptr(self)
        return self

    def __init__(
        self,
        meta: Tensor,
        device: torch.device,
        parts: Iterable[tuple[Part, int]],
        rest: Tensor | None,
        make: Callable[[], Tensor],
    ) -> None:
        super().__init__()
        self.parts, self.rest = tuple(dict.fromkeys(parts)), rest
        self._make: Callable[[], Tensor] | None = make
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        """All of it, as a plain tensor."""
        if self._value is None:
            assert self._make is not None
            self._value, self._make = self._make(), None
        return self._value

    def _meta(self) -> Tensor:
        return torch.empty_strided(self.size(), self.stride(), dtype=self.dtype, device="meta")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self._value is None:
            return f"PendingGradient(not computed yet, size={tuple(self.shape)}, dtype={self.dtype})"
        return repr(self._value)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    beyond_logits = True  # an operator on both is for this class to answer

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.add.Tensor and not kwargs:
            made = _sum(*args)
            if made is not NotImplemented:
                return made
        if _is_on_its_way(sys._getframe(), func, args, kwargs):
            return _joined(*args) if func is aten.cat.default else _moved(args[0], func, args[1:], kwargs)
        with torch.overrides.enable_reentrant_dispatch():  # by autograd, below which we are
            args, kwargs = tree_map(lambda x: x.value() if isinstance(x, PendingGradient) else x, (args, kwargs))
        return func(*args, **kwargs)


def _sum(first: Any, second: Any) -> Any:
    """The sum of two gradients of the same tensor, as autograd forms it."""
    if not all(isinstance(t, Tensor) and t.shape == first.shape and t.dtype == first.dtype for t in (first, second)):
        return NotImplemented
    pending = [t for t in (first, second) if isinstance(t, PendingGradient)]
    rests = [t.rest if isinstance(t, PendingGradient) else t for t in (first, second)]
    rest, like = added(*rests), pending[0]
    parts = [part for t in pending for part in t.parts]
    return PendingGradient(like._meta(), like.device, parts, rest, lambda: _value(first) + _value(second))


def _value(t: Tensor) -> Tensor:
    return t.value() if isinstance(t, PendingGradient) else t


# What the nodes between logits and their head do to a gradient, all of it linear: the others compute it.
_LINEAR = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    *ALONG,
    aten.slice_backward.default,
    aten.select_backward.default,
    aten.clone.default,
    aten.alias.default,
    aten._to_copy.default,
    aten.neg.default,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.masked_fill.Scalar,
    aten.sum.dim_IntList,
    aten.tanh_backward.default,
    aten._softmax_backward_data.default,
    aten._log_softmax_backward_data.default,
}


def _is_on_its_way(frame: Any, func: Any, args: Any, kwargs: Any) -> bool:
    """Whether autograd takes a gradient from one tensor to the one that it was made of, on the way to the head.

    frame: of what was called. A hook, too, runs while its node does.
    """
    if func not in _LINEAR and func is not aten.cat.default:
        return False
    first, *others = args
    grads = [t for t in (first if func is aten.cat.default else [first]) if isinstance(t, PendingGradient)]
    if not grads or any(isinstance(a, PendingGradient) for a in (*others, *kwargs.values())):
        return False
    node = compat.running_node(frame)
    return node is not None and all(any(node in part.between for part, _ in grad.parts) for grad in grads)


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> PendingGradient:
    """Gradients of pieces of a tensor, one behind the other."""
    grads = [t for t in tensors if isinstance(t, PendingGradient)]
    rests = [t.rest if isinstance(t, PendingGradient) else t for t in tensors]
    rest = None
    if any(t is not None for t in rests):
        rest = torch.cat([t.new_zeros(t.shape) if r is None else r for t, r in zip(tensors, rests, strict=True)], dim)
    meta = torch.cat([t._meta() if isinstance(t, PendingGradient) else t.to("meta") for t in tensors], dim)
    parts = [part for t in grads for part in t.parts]
    return PendingGradient(meta, grads[0].device, parts, rest, lambda: torch.cat(list(map(_value, tensors)), dim))


def _moved(grad: PendingGradient, func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator on the way makes of a gradient: it is linear, and its parts lead to the head all the same."""

    def without_memory(x: Any) -> Any:
        if isinstance(x, DeferredLogits):
            return x._meta()
        return x.to("meta") if isinstance(x, Tensor) else x

    meta = func(grad._meta(), *tree_map(without_memory, args), **tree_map(without_memory, kwargs | _on_meta(kwargs)))
    rest = None if grad.rest is None else func(grad.rest, *args, **kwargs)
    return PendingGradient(meta, grad.device, grad.parts, rest, lambda: func(grad.value(), *args, **kwargs))


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"device": torch.device("meta")} if kwargs.get("device") is not None else {}


# (gradients of the outputs that require grad, tensors) -> gradients of the logits, to which autograd does not lead; or,
# where tensors are given, gradients of the logits and of these, to be differentiated themselves.
Dense = Callable[[Sequence[Tensor | None], Sequence[Tensor] | None], Sequence[Tensor]]


class _Made(NamedTuple):
    """What a fused loss has computed: outputs, from the leaves of the logits' heads and from `copies` of others."""

    outputs: Sequence[Tensor]
    copies: Sequence[Tensor]
    dense: Dense
    between: frozenset[Any]


class Behind(torch.autograd.Function):
    """Puts what a fused loss gives behind the logits that it was called on, in the autograd graph."""

    @staticmethod
    def forward(ctx: Any, made: _Made, n: int, *given: Any) -> tuple[Tensor, ...]:
        """The outputs, in memory of their own.

        given: `n` logits, the others that a gradient reaches, and the outputs detached.
        """
        ctx.of_logits = True
        ctx.made = made
        ctx.logits = [(z._meta(), z.device, z.head()) for z in given[:n]]
        ctx.others = given[n : n + len(made.copies)]
        ctx.set_materialize_grads(False)
        return tuple(t.clone() for t in given[n + len(made.copies) :])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """The gradients of the logits, pending, and those of the others."""
        none, rest, made = (None, None), (None,) * len(grads), ctx.made
        if made is None:
            raise RuntimeError(
                "backward through a loss that was fused with its head a second time: its graph is gone, as that of any "
                "operator is then. Give the first backward retain_graph=True."
            )
        if all(g is None for g in grads):
            return (*none, *(None for _ in (*ctx.logits, *ctx.others)), *rest)
        if torch.is_grad_enabled():  # to be differentiated itself
            return (*none, *made.dense(grads, ctx.others), *rest)
        # What comes from a tensor that follows from the same logits has its parts already: they lead around this loss.
        known = [part for g in grads if isinstance(g, PendingGradient) for part in g.parts]
        own = [g.rest if isinstance(g, PendingGradient) else g for g in grads]
        values = _once(lambda: made.dense([g if g is None else _value(g) for g in grads], None))
        part = None
        if any(g is not None for g in own):
            part = Part(made.outputs, own, [head for _, _, head in ctx.logits], made.between)
        of_others = part.now(made.copies) if part is not None else [None for _ in ctx.others]
        result = []
        for i, (meta, device, _) in enumerate(ctx.logits):
            parts = known if part is None else [*known, (part, i)]
            result.append(PendingGradient(meta, device, parts, None, partial(_entry, values, i)))
        if not compat.keeps_graph():  # who keeps the loss must not keep the hidden states
            ctx.made, ctx.logits, ctx.others = None, (), ()
        return (*none, *result, *of_others, *rest)


def _entry(values: Callable[[], Sequence[Tensor]], i: int) -> Tensor:
    return values()[i]


def _once(make: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    """`make`, which is called at most once."""
    made: list[Sequence[Tensor]] = []

    def get() -> Sequence[Tensor]:
        if not made:
            made.append(make())
        return made[0]

    return get


def behind(
    logits: Sequence[DeferredLogits],
    own: Sequence[Any],
    given: Sequence[Any],
    run: Callable[..., Sequence[Any]],
    dense: Dense,
) -> list[Any]:
    """``run(*given)``, a fused loss: behind the logits that it is called on, in the autograd graph.

    own: those of `given` that are the leaves of the logits' heads, or follow from them.
    """
    known = {id(t) for t in own}
    train = [i for i, t in enumerate(given) if isinstance(t, Tensor) and t.requires_grad and id(t) not in known]
    copies = {i: given[i].detach().requires_grad_() for i in train if torch.is_grad_enabled()}
    result = list(run(*(copies.get(i, t) for i, t in enumerate(given))))
    out = [i for i, t in enumerate(result) if isinstance(t, Tensor) and t.requires_grad]
    if not out:
        return result
    between = frozenset(node for z in logits for node in z.between() or ())
    made = _Made([result[i] for i in out], list(copies.values()), dense, between)
    beside = [given[i] for i in copies]
    found = Behind.apply(made, len(logits), *logits, *beside, *(result[i].detach() for i in out))
    for i, t in zip(out, found, strict=True):
        result[i] = t
    return result


def gradients(
    made: Any, grads: Sequence[Tensor | None], logits: Sequence[Tensor], others: Sequence[Tensor] | None
) -> Sequence[Tensor]:
    """What a :data:`Dense` gives, where the loss has been computed from `logits` by plain operators: `made`."""
    outputs = [t for t in tree_leaves(made) if isinstance(t, Tensor) and t.requires_grad]
    given = [(t, g) for t, g in zip(outputs, grads, strict=True) if g is not None]
    found = torch.autograd.grad(
        [t for t, _ in given],
        [*logits, *(others or ())],
        [g for _, g in given],
        create_graph=others is not None,
        allow_unused=True,
    )
    return [torch.zeros_like(t) if g is None else g for t, g in zip((*logits, *(others or ())), found, strict=True)]


def of_leaves(grad: PendingGradient, head: PendingHead) -> list[Tensor | None] | None:
    """The gradients of the leaves of a head, without those of `rest`: of one loss, or of several in one pass.

    None where a hook has put something else in the place of a part of them.
    """
    tags: dict[Part, set[int]] = {}
    for part, i in grad.parts:
        tags.setdefault(part, set()).add(i)
    if any(own is head and i not in found for part, found in tags.items() for i, own in enumerate(part.heads)):
        return None
    alone = [part for part in tags if part.alone]
    wanted, retain = [t for t in head.leaves if t.requires_grad], compat.keeps_graph()
    made: dict[int, Tensor | None] = {}
    if alone:
        outputs, grads = [o for part in alone for o in part.outputs], [g for part in alone for g in part.grads]
        found = torch.autograd.grad(outputs, wanted, grads, retain_graph=retain, allow_unused=True)
        made = {id(t): g for t, g in zip(wanted, found, strict=True)}
    result = [made.get(id(t)) for t in head.leaves]
    for part in tags.keys() - set(alone):
        result = [added(a, b) for a, b in zip(result, part.of(head), strict=True)]
    return result


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients, either of which may not be there."""
    return b if a is None else a if b is None else a + b
