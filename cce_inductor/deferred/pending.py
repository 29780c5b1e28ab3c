"""Values that are not computed yet: from what, by which steps, and in whose memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .. import compat
from .staleness import Operand

Compute = Callable[[Sequence[Tensor]], Tensor]
# (pending logits, function, args, kwargs) -> what function(*args, **kwargs) gives, or NotImplemented.
Fuse = Callable[[Any, Callable, tuple, dict[str, Any]], Any]


# ---------------------------------------------------------------------------------------------------- the head


@contextlib.contextmanager
def surroundings(device: torch.device, *, grad: bool) -> Iterator[None]:
    """Where ``compute`` gives what the graph would have given: no ambient autocast, and no inference mode, whose
    tensors could not be edited once it is left."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


class PendingHead:
    """What pending logits are computed from, and a call of which computes them: (..., V) of `shape` and `dtype`.

    Called once, by its :class:`PendingValue`, which then lets go of it. `shape` is None where the logits are those of a
    graph that is being traced, of which only the operands are given. For `compute`, `operands`, `fuse` and `statistics`
    see :func:`defer`.
    """

    def __init__(
        self,
        compute: Compute,
        operands: Sequence[Tensor],
        shape: torch.Size | None,
        dtype: torch.dtype,
        fuse: Fuse | None = None,
        statistics: bool = False,
    ) -> None:
        self.compute, self.shape, self.dtype, self.fuse, self.statistics = compute, shape, dtype, fuse, statistics
        self.operands = [Operand.record(i, t) for i, t in enumerate(operands)]
        self.device = operands[0].device
        self.watched = False  # somebody, such as a hook, waits for the gradient of the logits
        self.needs: tuple[bool, ...] = ()  # which operands a gradient reaches, if any
        self.graph: ValueGraph | None = None  # of the value that was read, for the backward through the logits

    def check(self) -> list[Tensor]:
        """The operands, detached, which are still what they were; else a :class:`DeferredLogitsError`."""
        for operand in self.operands:
            operand.check()
        return [operand.alias for operand in self.operands]

    def __call__(self) -> Tensor:
        """The logits: contiguous, and below autograd. A :class:`DeferredLogitsError` if they could be wrong."""
        operands = self.check()
        grad = any(self.needs)  # with grad mode off too: a metric may read what is trained through later
        if grad:
            operands = [t.detach().requires_grad_(need) for t, need in zip(operands, self.needs, strict=True)]
        with surroundings(self.device, grad=grad):
            out = self.compute(operands).contiguous()  # the strides that the program has been told
            graph = ValueGraph.of(out, operands) if out.requires_grad else None
        if self.shape is not None and (out.shape != self.shape or out.dtype != self.dtype):
            raise AssertionError(
                f"deferred logits came out as {tuple(out.shape)} {out.dtype} where the graph has "
                f"{tuple(self.shape)} {self.dtype}; please report this"
            )
        if not isinstance(out, (FakeTensor, FunctionalTensor)):
            counters["cce_inductor"]["deferred_materialized"] += 1
            self.operands, self.graph = [], graph  # a value is computed once: nothing will be compared again
        return out.detach() if grad else out


class ValueGraph(NamedTuple):
    """How a head's value leads back to its operands: an edge, and not the value, which lives as long as eager's logits.

    reads_value: whether a gradient is computed from the value itself, as that of tanh is. Autograd would not notice an
    edit there: they are done below it.
    """

    edge: GradientEdge
    operands: Sequence[Tensor]
    reads_value: bool

    @classmethod
    def of(cls, out: Tensor, operands: Sequence[Tensor]) -> ValueGraph:
        """The graph of logits that were computed from these operands with gradients recorded."""
        node = type((out if out._base is None else out._base).grad_fn)
        reads_value = any(hasattr(node, name) for name in ("_saved_result", "saved_tensors"))
        return cls(get_gradient_edge(out.view_as(out)), operands, reads_value)

    def gradients(self, wanted: Sequence[int], grad: list[Tensor | None], retain: bool) -> Sequence[Tensor | None]:
        """Those of the operands at `wanted`; None for one that no gradient reaches.

        grad: the logits' own, in a list, from which it is gone as soon as it is used. retain: whether another backward
        comes through this graph.
        """
        assert grad[0] is not None
        # A backward holds what it is started with until its end, so that is a tensor without memory.
        start = grad[0].new_zeros(()).expand(grad[0].shape)
        handle = self.edge.node.register_prehook(lambda _: (grad.pop(),))
        try:
            inputs = [self.operands[i] for i in wanted]
            return torch.autograd.grad(self.edge, inputs, start, retain_graph=retain, allow_unused=True)
        finally:
            handle.remove()


# ------------------------------------------------------------------------------------- how a value follows from it


class Step(NamedTuple):
    """One lazy operator between the head's logits and a pending tensor: ``op(tensor, *args, **dict(kwargs))``."""

    op: Any
    args: tuple
    kwargs: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step:
        """The step with these arguments behind its tensor; lists among them become tuples, which have a hash."""
        return cls(op, tuple(_frozen(a) for a in args), tuple((k, _frozen(v)) for k, v in kwargs.items()))

    def __call__(self, tensor: Tensor) -> Tensor:
        """What the operator makes of `tensor`."""
        return self.op(tensor, *self.args, **dict(self.kwargs))


def _frozen(argument: Any) -> Any:
    return tuple(argument) if isinstance(argument, (list, tuple)) else argument


@dataclass(frozen=True)
class Recipe:
    """How a pending tensor follows from the operands of a head: ``steps`` behind ``compute(operands)``.

    needs: which operands a gradient reaches; none if the tensor does not require grad. connected: False for a tensor
    whose gradient does not end in the operands, such as ``logits.detach().requires_grad_()``. dtype, device: its own.
    offset: where it begins in the memory that it shares with other views. of: the value that it is the recipe of.

    It is what a compiled graph is guarded on that was given pending logits.
    """

    compute: Compute
    steps: tuple[Step, ...]
    needs: tuple[bool, ...]
    connected: bool
    dtype: torch.dtype
    device: torch.device
    offset: int | torch.SymInt
    of: weakref.ref[PendingValue] = field(compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        return self


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a pending value comes from. `recipe` stands in for what autograd would say, in a graph that is traced."""

    head: PendingHead
    steps: tuple[Step, ...] = ()
    recipe: Recipe | None = None

    def then(self, step: Step) -> Origin:
        """The origin of what `step` makes of the value."""
        return Origin(self.head, (*self.steps, step), None)


# --------------------------------------------------------------------------------------------------- the value


class SharedMemory:
    """What values share that are views of each other.

    readers: pending values that are to be computed before it is edited. head: whose own value it holds, if any.
    edited_in_graph: whether a graph edits it that Dynamo may not break: it is compiled for computed logits, and takes
    pending ones too. piece: whether a graph that is traced is given no more than a part of it.
    """

    edited_in_graph = False
    piece = False

    def __init__(self, head: PendingHead | None = None) -> None:
        self.readers: weakref.WeakSet[PendingValue] = weakref.WeakSet()
        self.head = head


class PendingValue:
    """One value, pending or computed and remembered.  Tensors that share all their elements (``detach``) share one.

    make: computes it, a tensor that autograd does not know. origin: how it follows from its head; None where it does
    not. source: the value that it is made from, if any. memory: that of its source, if it is a view.
    """

    def __init__(
        self,
        make: Callable[[], Tensor],
        origin: Origin | None = None,
        source: PendingValue | None = None,
        memory: SharedMemory | None = None,
    ) -> None:
        self._make: Callable[[], Tensor] | None = make
        self._tensor: Tensor | None = None
        self._origin, self._source = origin, source
        self.memory = SharedMemory() if memory is None else memory
        # Of a value in a graph that is traced: what it was made from, which it stays to the graph, computed or not.
        self.given: tuple[Recipe, list[Tensor]] | None = None

    @classmethod
    def computed(cls, tensor: Tensor, memory: SharedMemory | None = None) -> PendingValue:
        """The value that `tensor` holds, in the memory of others if it is a view of theirs."""
        value = cls(lambda: tensor, memory=memory)
        value._tensor, value._make = tensor, None
        return value

    @property
    def fake(self) -> bool:
        """Whether Dynamo traces what is computed from it."""
        return isinstance(self._evidence, FakeTensor)

    @property
    def functional(self) -> bool:
        """Whether AOTAutograd does."""
        return isinstance(self._evidence, FunctionalTensor)

    @property
    def _evidence(self) -> Tensor | None:
        return self._tensor if self.origin is None else self.origin.head.operands[0].alias

    @property
    def pending(self) -> bool:
        """Whether it has not been computed yet."""
        return self._tensor is None

    @property
    def origin(self) -> Origin | None:
        """Where it comes from; None once it, or what it is made from, has been computed: that may be edited."""
        if self._source is not None and self._source.origin is None:
            return None
        return self._origin

    @torch.compiler.disable  # Dynamo would otherwise compile the frames below when a compiled function reads us
    def get(self) -> Tensor:
        """The value, which nobody may edit; a :class:`DeferredLogitsError` if it could be wrong."""
        if self._tensor is None:
            assert self._make is not None
            tensor = self._make()
            if isinstance(tensor, FakeTensor):
                return tensor  # somebody traces: a real read may follow
            # With the others go the operands, or the value that it was made from.
            self._tensor, self._make, self._origin, self._source = tensor, None, None, None
        return self._tensor

    def copy(self, step: Step) -> PendingValue:
        """The value ``step`` of this one, in memory of its own: pending, and computed from this one as it is now."""
        child = PendingValue(self._after(step), self._origin and self._origin.then(step), self)
        self.memory.readers.add(child)
        return child

    def view(self, step: Step) -> PendingValue:
        """The value ``step`` of this one, in the same memory."""
        return PendingValue(self._after(step), self._origin and self._origin.then(step), self, self.memory)

    def meet(self, other: PendingValue) -> tuple[PendingValue | None, tuple[Step, ...], tuple[Step, ...]]:
        """The last value that this pending one and another one both follow from, if any, and the steps of each."""
        if self.origin is None or other.origin is None:
            return None, (), ()
        behind = list(self._behind())
        source = next((v for v in other._behind() if v in behind), None)
        n = 0 if source is None or source.origin is None else len(source.origin.steps)
        return source, self.origin.steps[n:], other.origin.steps[n:]

    def _behind(self) -> Iterator[PendingValue]:
        """This value, then the one that it is made from, and so on."""
        value: PendingValue | None = self
        while value is not None:
            yield value
            value = value._source

    def stands_for(self) -> PendingValue | None:
        """In a graph that Dynamo traces: the value that the program has there."""
        recipes = [value.origin.recipe for value in self._behind() if value.origin is not None]
        recipe = next((recipe for recipe in recipes if recipe is not None), None)
        return None if recipe is None else recipe.of()

    def _after(self, step: Step) -> Callable[[], Tensor]:
        def make() -> Tensor:
            tensor = self.get()
            with surroundings(tensor.device, grad=False), compat.counting_versions():
                return step(tensor)

        return make

    def expose(self) -> Tensor:
        """The tensor for uses that may edit its memory, now (``mul_``) or later and unseen (``numpy()``): whatever
        derives from its present state is computed first."""
        tensor = self.get()
        for child in list(self.memory.readers):
            child.get()
        self.memory.readers.clear()
        if self.memory.head is not None:
            graph = self.memory.head.graph
            if graph is not None and graph.reads_value:
                self.memory.head.graph = None
        return tensor
