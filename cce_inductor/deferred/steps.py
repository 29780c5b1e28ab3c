"""What lies between a head's logits and a tensor that follows from them: steps, and what they read besides."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .mixtures import Spread
from .staleness import sample


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


def autocast_now(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Makes the autocast mode that there is now, for later."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, enabled=enabled, dtype=dtype)


@dataclass(frozen=True)
class Read:
    """Stands among the arguments of a step for one of the `extras` that its pending tensor reads: which of them.

    spread: how the argument follows from it; None where it is the argument.
    """

    index: int
    spread: Spread | None = None

    def of(self, extras: Sequence[Any]) -> Any:
        """The argument, where the extras are these."""
        extra = extras[self.index]
        return extra if self.spread is None else self.spread(extra)


class Step(NamedTuple):
    """One lazy operator between the head's logits and a pending tensor.

    args, kwargs: its other arguments. at: how many of `args` stand before the tensor.
    """

    op: Any
    args: tuple
    kwargs: tuple[tuple[str, Any], ...]
    at: int = 0

    @classmethod
    def of(cls, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], at: int = 0) -> Step:
        """The step with these arguments beside its tensor; lists among them become tuples, which have a hash."""
        return cls(op, tuple(_frozen(a) for a in args), tuple((k, _frozen(v)) for k, v in kwargs.items()), at)

    def __call__(self, tensor: Any, extras: Sequence[Any] = (), op: Any = None) -> Any:
        """What the operator, or `op` in its place, makes of `tensor`, where it reads `extras`."""
        args = [a.of(extras) if isinstance(a, Read) else a for a in self.args]
        return (op or self.op)(*args[: self.at], tensor, *args[self.at :], **dict(self.kwargs))

    def behind(self, known: int, more: int) -> Step:
        """The step where `more` extras stand behind the `known` ones, in front of its own."""
        return self._replace(args=moved(self.args, known, more))


def other_head(logits: Any, other: Any) -> Any:
    """The logits of the other head, of two that a tensor follows from."""
    return other


# They come last among the extras, where a step is taken.
OTHER = Step(other_head, (Read(-1),), ())


@dataclass(frozen=True)
class Part:
    """Stands among the arguments of a :class:`Joint` for one of the tensors that it is made from: which of them."""

    index: int


class Joint(NamedTuple):
    """A lazy operator on several tensors that all follow from a pending one, each by steps of `parts`: itself a step.

    A part that begins with `OTHER` follows from the logits of another head.

    args: its arguments, with a :class:`Part` for each of those tensors.
    """

    op: Any
    parts: tuple[tuple[Step | Joint, ...], ...]
    args: tuple

    def __call__(self, tensor: Any, extras: Sequence[Any] = ()) -> Any:
        """What it makes of `tensor`, where its steps read `extras`."""
        made = []
        for steps in self.parts:
            out = tensor
            for step in steps:
                out = step(out, extras)
            made.append(out)
        return self.of(made, extras)

    def of(self, made: Sequence[Any], extras: Sequence[Any], op: Any = None) -> Any:
        """What the operator, or `op` in its place, makes of these tensors."""
        return (op or self.op)(*(_given(a, made, extras) for a in self.args))

    def behind(self, known: int, more: int) -> Joint:
        """As :meth:`Step.behind`."""
        parts = tuple(tuple(step.behind(known, more) for step in steps) for steps in self.parts)
        return Joint(self.op, parts, moved(self.args, known, more))


def _given(argument: Any, made: Sequence[Any], extras: Sequence[Any]) -> Any:
    # Not within `of`: a function that refers to itself lives until the collector finds it, and with it the tensors.
    if isinstance(argument, tuple):
        return [_given(a, made, extras) for a in argument]
    if isinstance(argument, Part):
        return made[argument.index]
    return argument.of(extras) if isinstance(argument, Read) else argument


class Extra:
    """A small tensor that a step reads besides the logits: a bias, a mask, a temperature.

    tensor: the program's own. alias: it, detached. copy: what it held then, which a read of the logits uses whatever
    becomes of the tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._version = None if tensor.is_inference() else tensor._version
        with surroundings(tensor.device, grad=False):
            self.alias = tensor.detach()
            self.copy = self.alias.clone()
        self._sample = sample(self.alias)  # of the copy, whose strides may be others, it would be another

    @property
    def detached(self) -> Extra:
        """The same without the gradient that the tensor may have."""
        made = copy.copy(self)
        made.tensor = self.alias
        return made

    @property
    def unchanged(self) -> bool:
        """Whether the program's tensor still holds it; what is recognised is in the docstring of :class:`Operand`."""
        version = None if self.tensor.is_inference() else self.tensor._version
        if version != self._version:
            return False
        now = sample(self.tensor.detach())
        return self._sample is None or now is None or torch.equal(now, self._sample)


def _frozen(argument: Any) -> Any:
    return tuple(argument) if isinstance(argument, (list, tuple)) else argument


def moved(args: tuple, known: int, more: int) -> tuple:
    """The arguments of a step where `more` extras stand behind the `known` ones."""

    def of(a: Any) -> Any:
        if isinstance(a, tuple):
            return moved(a, known, more)
        return replace(a, index=a.index + more) if isinstance(a, Read) and a.index >= known else a

    return tuple(map(of, args))
