"""What lies between a head's logits and a tensor that follows from them: steps, and what they read besides."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
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
        moved = (replace(a, index=a.index + more) if isinstance(a, Read) and a.index >= known else a for a in self.args)
        return self._replace(args=tuple(moved))


class Pair(NamedTuple):
    """A lazy operator on two tensors that both follow from a pending one, by `first` and `second`: itself a step."""

    op: Any
    first: tuple[Step | Pair, ...]
    second: tuple[Step | Pair, ...]

    def __call__(self, tensor: Any, extras: Sequence[Any] = ()) -> Any:
        """What it makes of `tensor`, where its steps read `extras`."""
        a = b = tensor
        for step in self.first:
            a = step(a, extras)
        for step in self.second:
            b = step(b, extras)
        return self.op(a, b)

    def behind(self, known: int, more: int) -> Pair:
        """As :meth:`Step.behind`."""
        first, second = (tuple(step.behind(known, more) for step in steps) for steps in (self.first, self.second))
        return Pair(self.op, first, second)


class Extra:
    """A small tensor that a step reads besides the logits: a bias, a mask, a temperature.

    tensor: the program's own. copy: what it held then, which a read of the logits uses whatever becomes of the tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._version = None if tensor.is_inference() else tensor._version
        with surroundings(tensor.device, grad=False):
            self.copy = tensor.detach().clone()
        self._sample = sample(tensor.detach())  # of the copy, whose strides may be others, it would be another

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
