"""A node that is a function of row statistics, and of which."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from ..graph.fakes import fake
from ..ops.losses import CrossEntropy
from .targets import base
from .values import Value

# What a reduction of a log-sum-exp, a softmax or its logarithm needs: a gradient is exact with both.
SOFTMAX = ("lse", "lse_low")


def as_it_is(result: Any) -> Any:
    return result


@dataclass(frozen=True)
class Reduction:
    """A node that is made of row statistics of `value`.

    statistics: those it needs. given: the node with a class for each row, in the rows' order, or None. wraps: whether
    a negative class counts from the end. entries: the node with K classes for each row, in the rows' order and where
    the logits have their classes, or None. flat: from the statistics, a `served.Statistics`, to a (N,) result, or
    (N, K) of entries. shape: from that in the leading shape of the logits, and K behind, to the node's. other: the
    logits of the second head, if it is of two.
    """

    node: Node
    value: Value
    statistics: tuple[str, ...]
    given: Node | None = None
    wraps: bool = False
    flat: Callable[[Any], Any] = as_it_is
    shape: Callable[[Any], Any] = as_it_is
    other: Value | None = None
    entries: Node | None = field(default=None, kw_only=True)

    @functools.cached_property
    def target(self) -> Node | None:
        """The tensor that `given` is a view of: equal for reductions of the same targets."""
        return None if self.given is None else base(self.given)

    @property
    def classes(self) -> Node | None:
        """The tensor of the classes whose entries it reads: the target, or K for each row; None if there is none."""
        return self.entries or self.target

    @property
    def width(self) -> Any:
        """How many classes it reads of each row, an int or a SymInt."""
        return 1 if self.entries is None else fake(self.entries).shape[self.value.class_dim]

    @property
    def others(self) -> tuple[Node, ...]:
        """What it reads besides the logits and the target."""
        return ()

    @property
    def since(self) -> Node:
        """The node from which on the target and `others` must not change: the one that read them."""
        return self.node

    @property
    def differentiated(self) -> bool:
        """Whether a gradient comes back through it to the logits."""
        return fake(self.node).requires_grad and self.value.fake.requires_grad


DEFAULTS = CrossEntropy()


@dataclass(frozen=True)
class Loss(Reduction):
    """A loss over classes, with all its arguments: `weight` per class or None."""

    weight: Node | None = None
    arguments: CrossEntropy = DEFAULTS
    ignores: bool = True  # False: every row counts, whatever its class

    @property
    def column_weight(self) -> Node | None:
        """What the sum of the logits is weighted by."""
        return self.weight if self.arguments.label_smoothing else None
