"""Values that are not computed yet: from what, by which steps, and in whose memory."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import compat, notice
from .entries import Entries
from .mixtures import Spreadable
from .shared import Shared
from .staleness import Operand
from .steps import OTHER, Extra, Joint, Part, Step, moved, surroundings
from .value_graph import ValueGraph

Compute = Callable[[Sequence[Tensor]], Tensor]
# (pending logits, function, args, kwargs) -> what function(*args, **kwargs) gives, or NotImplemented.
Fuse = Callable[[Any, Callable, tuple, dict[str, Any]], Any]


# ---------------------------------------------------------------------------------------------------- the head

_HEADS = itertools.count()


class PendingHead:
    """What pending logits are computed from, and a call of which computes them: (..., V) of `shape` and `dtype`.

    Called once, by its :class:`PendingValue`, which then lets go of it. `shape` is None where the logits are those of a
    graph that is being traced, of which only the operands are given. For `compute`, `operands`, `fuse`, `large`,
    `alone`, `eager` and `meeting` see :func:`defer`. shared: what eager calls have computed of the rows.
    """

    def __init__(
        self,
        compute: Compute,
        operands: Sequence[Tensor],
        shape: torch.Size | None,
        dtype: torch.dtype,
        fuse: Fuse | None = None,
        large: bool = False,
        alone: bool = True,
        eager: bool = False,
        meeting: Callable[[], None] | None = None,
    ) -> None:
        self.compute, self.shape, self.dtype = compute, shape, dtype
        self.fuse, self.large, self.alone = fuse, large, alone
        self.shared = Shared()
        self.on_read: Callable[[], None] | None = None  # called when the logits are computed
        self.known: list[Known] = []  # statistics that the program has
        self.operands = [Operand.record(i, t) for i, t in enumerate(operands)]
        self.device = operands[0].device
        self.eager, self.meeting = eager, meeting
        self.watched = False  # somebody, such as a hook, waits for the gradient of the logits
        self.needs: tuple[bool, ...] = ()  # which operands a gradient reaches, if any
        self.graph: ValueGraph | None = None  # of the value that was read, for the backward through the logits
        self.number = next(_HEADS)  # of two that a tensor follows from, the first is the older one
        self._leaves: list[Tensor] = []

    @property
    def leaves(self) -> list[Tensor]:
        """The operands, as leaves that a loss leads to whose gradient is to come by way of the logits."""
        if not self._leaves:
            given = zip(self.operands, self.needs, strict=True)
            self._leaves = [operand.alias.detach().requires_grad_(need) for operand, need in given]
        return self._leaves

    def known_as(self, tensor: Tensor) -> PendingValue | None:
        """The value of logits, pending, that a tensor of the program is a statistic of: that statistic, or None."""
        made = next((known for known in self.known if known.is_in(tensor)), None)
        return None if made is None else made.again(tensor)

    def check(self) -> list[Tensor]:
        """The operands, detached, which are still what they were; else a :class:`DeferredLogitsError`."""
        for operand in self.operands:
            operand.check()
        return [operand.alias for operand in self.operands]

    def __call__(self) -> Tensor:
        """The logits: contiguous, and below autograd. A :class:`DeferredLogitsError` if they could be wrong."""
        operands = self.check()
        if self.meeting is not None and not isinstance(operands[0], (FakeTensor, FunctionalTensor)):
            self.meeting()
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
            notice.saw_read()
            self.operands, self.graph = [], graph  # a value is computed once: nothing will be compared again
            self.shared, self.known = Shared(), []
            if self.on_read is not None:
                self.on_read()
        return out.detach() if grad else out


# ------------------------------------------------------------------------------------- how a value follows from it


@dataclass(frozen=True)
class Recipe:
    """How a pending tensor follows from the operands of a head: ``steps`` behind ``compute(operands)``.

    reads: how many operands the head has, or both heads together. The others are what the steps read besides.
    other: of a tensor that follows from two heads, what computes the other one's logits, and how many operands it has.
    needs: which operands a gradient reaches; none if the tensor does not require grad. connected: False for a tensor
    whose gradient does not end in the operands, such as ``logits.detach().requires_grad_()``. dtype, device: its own.
    offset: where it begins in the memory that it shares with other views. of: the value that it is the recipe of.

    It is what a compiled graph is guarded on that was given pending logits.
    """

    compute: Compute
    reads: int
    steps: tuple[Step | Joint, ...]
    needs: tuple[bool, ...]
    connected: bool
    dtype: torch.dtype
    device: torch.device
    offset: int | torch.SymInt
    of: weakref.ref[PendingValue] = field(compare=False)
    other: tuple[Compute, int] | None = None

    @property
    def own(self) -> int:
        """How many operands the first head has."""
        return self.reads if self.other is None else self.reads - self.other[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        return self


class Other(NamedTuple):
    """The other head that a value follows from. needs: whether a gradient reaches the first head, and this one."""

    head: PendingHead
    needs: tuple[bool, bool]


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a pending value comes from.

    other: where it follows from two heads, the younger one; it is not in the way of `steps` but within a joint one.
    recipe: stands in for what autograd would say, in a graph that is traced. extras: what the steps read besides the
    head's operands. beside: nodes of the autograd graph that statistics of the same logits come from, where `steps`
    compute these again.
    """

    head: PendingHead
    steps: tuple[Step | Joint, ...] = ()
    recipe: Recipe | None = None
    extras: tuple[Extra | Spreadable, ...] = ()
    beside: tuple[Any, ...] = ()
    other: Other | None = None

    def then(self, step: Step | Joint, extras: Sequence[Extra | Spreadable] = (), beside: Sequence[Any] = ()) -> Origin:
        """The origin of what `step` makes of the value, where it reads these besides those known."""
        extras, beside = (*self.extras, *extras), (*self.beside, *beside)
        return Origin(self.head, (*self.steps, step), None, extras, beside, self.other)

    def needs(self, trains: bool) -> dict[PendingHead, bool]:
        """Each head that the value follows from, and whether a gradient reaches it from a tensor that `trains`.

        A detached tensor has the value of one that is not.
        """
        needs = (True,) if self.other is None else self.other.needs
        return {head: trains and need for head, need in zip(self.heads, needs, strict=True)}

    @property
    def heads(self) -> tuple[PendingHead, ...]:
        """Those that the value follows from: one, or two."""
        return (self.head,) if self.other is None else (self.head, self.other.head)


# --------------------------------------------------------------------------------------------------- the value


class SharedMemory:
    """What values share that are views of each other.

    readers: pending values that are to be computed before it is edited. head: whose own value it holds, if any.
    tensors: all that lie in it.
    entries: what was computed of it without the rest, and must be found in it when it is. edited_in_graph: whether a
    graph edits it that Dynamo may not break: it is compiled for computed logits, and takes pending ones too. piece:
    whether a graph that is traced is given no more than a part of it.
    """

    edited_in_graph = False
    piece = False

    def __init__(self, head: PendingHead | None = None) -> None:
        self.readers: weakref.WeakSet[PendingValue] = weakref.WeakSet()
        self.tensors = WeakTensorKeyDictionary()
        self.entries: list[Entries] = []
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
        self._parts: tuple[PendingValue, ...] = ()  # of a joint step: those that it is made from
        self._step: Step | None = None  # of a view: what it is of its source
        self.memory = SharedMemory() if memory is None else memory
        # Of a value in a graph that is traced: what it was made from, which it stays to the graph, computed or not.
        self.given: tuple[Recipe, list[Tensor]] | None = None

    @classmethod
    def computed(
        cls, tensor: Tensor, memory: SharedMemory | None = None, source: PendingValue | None = None
    ) -> PendingValue:
        """The value that `tensor` holds, in the memory of others if it is a view of theirs: of `source`, if traced."""
        value = cls(lambda: tensor, source=source, memory=memory)
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
        made_from = self._parts if self._source is None else (self._source, *self._parts)
        return None if any(value.origin is None for value in made_from) else self._origin

    @torch.compiler.disable  # Dynamo would otherwise compile the frames below when a compiled function reads us
    def get(self) -> Tensor:
        """The value, which nobody may edit; a :class:`DeferredLogitsError` if it could be wrong."""
        if self._tensor is None:
            assert self._make is not None
            tensor = self._make()
            if isinstance(tensor, FakeTensor):
                return tensor  # somebody traces: a real read may follow
            # With the others go the operands, or the value that it was made from.
            self._tensor, self._make, self._origin, self._source, self._parts = tensor, None, None, None, ()
            while self.memory.entries:
                self.memory.entries.pop().put(tensor)
        return self._tensor

    def copy(self, step: Step, extras: Sequence[Extra | Spreadable] = ()) -> PendingValue:
        """The value ``step`` of this one, in memory of its own: pending, and computed from this one as it is now.

        extras: what the step reads that no earlier one has read.
        """
        origin = self._origin and self._origin.then(step, extras)
        child = PendingValue(self._after(step, origin), origin, self)
        self.memory.readers.add(child)
        return child

    def view(self, step: Step) -> PendingValue:
        """The value ``step`` of this one, in the same memory."""
        origin = self._origin and self._origin.then(step)
        child = PendingValue(self._after(step, origin), origin, self, self.memory)
        child._step = step
        return child

    def steps_from_memory(self) -> tuple[Step, ...]:
        """The views between what all of its memory holds and this pending value."""
        if self._step is None or self._source is None:
            return ()
        return (*self._source.steps_from_memory(), self._step)

    def instead_of(self, old: PendingValue, in_place: Any) -> PendingValue:
        """This value, a step behind `old`, where the program has edited that by the operator `in_place`.

        `old` is of no tensor any more. Its memory is edited when this is read, and what was copied of it is computed
        before, as in eager mode.
        """
        old.memory.readers.discard(self)
        assert self._origin is not None
        step, copies, parts = self._origin.steps[-1], [extra.copy for extra in self._origin.extras], self._parts[1:]

        def make() -> Tensor:
            beside = [part.get() for part in parts]
            tensor = old.expose()
            with surroundings(tensor.device, grad=False), compat.counting_versions():
                if isinstance(step, Joint):
                    step.of((tensor, *beside), copies, in_place)
                else:
                    step(tensor, copies, in_place)
            return tensor

        self._make = make
        return self

    @staticmethod
    def joint(
        op: Any,
        values: Sequence[PendingValue],
        trains: Sequence[bool],
        args: tuple | None = None,
        extras: Sequence[Extra | Spreadable] = (),
        beside: Sequence[Any] = (),
    ) -> PendingValue | None:
        """The value ``op(*args)`` of several: pending, where all follow from one value, or from two heads; else None.

        trains: which of the values a gradient reaches. Steps do not say what has been computed without one: all that
        follow from a head must agree. args: with a :class:`Part` for each value, and a :class:`Read` for each of
        `extras`; where it is None, op takes the values alone. beside: see :class:`Origin`.
        """
        origins = [value.origin for value in values]
        needs = _needs(origins, trains)
        if needs is None:
            return None
        first, *others = sorted(needs, key=lambda head: head.number)
        source = values[0]._common(values[1:])
        if source is None and others:
            source = next(v for v in values if v.origin is not None and v.origin.head is first)._root()
        if source is None or source.origin is None or (others and source.origin.head is not first):
            return None
        n, known = len(source.origin.steps), len(source.origin.extras)
        own: list[Extra | Spreadable] = []
        parts: list[tuple[Step | Joint, ...]] = []
        nodes: list[Any] = []
        for origin, trained in zip(origins, trains, strict=True):
            assert origin is not None
            steps = origin.steps[n:] if origin.head is first else (OTHER, *origin.steps)
            parts.append(tuple(step.behind(known, len(own)) for step in steps))
            beside_it = origin.extras[known:]
            own += beside_it if trained else [e.detached if isinstance(e, Extra) else e for e in beside_it]
            nodes += origin.beside[len(source.origin.beside) :]
        given = tuple(map(Part, range(len(values)))) if args is None else args
        step = Joint(op, tuple(parts), moved(given, 0, known + len(own)))
        origin = source.origin.then(step, (*own, *extras), (*nodes, *beside))
        if others:
            origin = replace(origin, other=Other(others[0], (needs[first], needs[others[0]])))
        copies = [extra.copy for extra in origin.extras]

        def make() -> Tensor:
            made = [value.get() for value in values]
            with surroundings(made[0].device, grad=False), compat.counting_versions():
                return step.of(made, copies)

        child = PendingValue(make, origin, source)
        child._parts = tuple(values)
        for value in values:  # what they are made from, they read: it may be edited, and one of them be that edit
            value.memory.readers.add(child)
        return child

    def _common(self, others: Sequence[PendingValue]) -> PendingValue | None:
        """The nearest value that this one and all others are made from."""
        behind = [set(other._behind()) for other in others]
        return next((v for v in self._behind() if all(v in values for values in behind)), None)

    def _behind(self) -> Iterator[PendingValue]:
        """This value, then the one that it is made from, and so on."""
        value: PendingValue | None = self
        while value is not None:
            yield value
            value = value._source

    def _root(self) -> PendingValue | None:
        """The logits of the head that it is made from, whole; None in a graph that is traced."""
        *_, root = self._behind()
        return root if root.origin is not None and not root.origin.steps else None

    def stands_for(self) -> PendingValue | None:
        """In a graph that Dynamo traces: the value that the program has there."""
        recipes = [value.origin.recipe for value in self._behind() if value.origin is not None]
        recipe = next((recipe for recipe in recipes if recipe is not None), None)
        return None if recipe is None else recipe.of()

    def _after(self, step: Step, origin: Origin | None) -> Callable[[], Tensor]:
        copies = [] if origin is None else [extra.copy for extra in origin.extras]

        def make() -> Tensor:
            tensor = self.get()
            with surroundings(tensor.device, grad=False), compat.counting_versions():
                return step(tensor, copies)

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


def _needs(origins: Sequence[Origin | None], trains: Sequence[bool]) -> dict[PendingHead, bool] | None:
    """The heads that values follow from, one or two, each with whether a gradient reaches it; None where they do not
    agree, where there are more, or where one is computed already."""
    needs: dict[PendingHead, bool] = {}
    for origin, reached in zip(origins, trains, strict=True):
        if origin is None:
            return None
        for head, own in origin.needs(reached).items():
            if needs.setdefault(head, own) != own:
                return None
    return needs if len(needs) <= 2 else None


class Known:
    """A statistic of pending logits that a program has: a tensor, and how it follows from their value.

    Where the program goes on with the logits and that tensor (``z - z.logsumexp(-1, keepdim=True)``), both are one
    function of the logits, which may be fused. Refers to neither.
    """

    def __init__(self, tensor: Tensor, value: PendingValue, step: Step, extras: Sequence[Extra]) -> None:
        self._tensor, self._value = weakref.ref(tensor), weakref.ref(value)
        self._version = None if tensor.is_inference() else tensor._version
        self._step, self._extras = step, extras

    def is_in(self, tensor: Tensor) -> bool:
        """Whether `tensor` holds just this: it is the tensor, or a view of it in another shape."""
        made = self._tensor()
        if made is None or not (made is tensor or (tensor._base is made and tensor.is_contiguous())):
            return False
        version = None if made.is_inference() else made._version
        return version == self._version and made.is_contiguous() and tensor.numel() == made.numel()

    def again(self, tensor: Tensor) -> PendingValue | None:
        """It, in the shape of `tensor`, to be computed from the logits once more; None if these are gone."""
        value = self._value()
        if value is None or value.origin is None:
            return None
        step = self._step.behind(0, len(value.origin.extras))
        made = value.copy(step, self._extras)
        if tensor is self._tensor():
            return made
        return made.view(Step.of(torch.ops.aten.view.default, (tuple(tensor.shape),), {}))
