"""Statistics of one head's logits that several eager calls share, so that they are computed in one pass.

A loss that is written by hand asks for one statistic after the other: the logit of the target, then the sum over the
classes. The first call computes what the next ones are likely to ask for, from the same tiles, and one backward serves
them all: autograd adds up the gradients of what one operator gave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..ops.call import Attributes
from ..ops.library import FORWARD
from ..ops.statistics import TABLE
from ..rewrite.groups import as_results

# What comes along: it is next to nothing beside the product.
_ALONG = ("lse", "lse_low", "logit_sum")
ENTRIES = "entry_logits"
# What depends on the target; the last two are of a call of their own.
_OF_TARGET = ("target_logit", "lse_rest", "lse_rest_low")


class Shared:
    """What eager calls have computed of the rows of one head."""

    def __init__(self) -> None:
        self._given: tuple[Tensor, ...] = ()
        self._found: list[tuple[tuple, Tensor | None, dict[str, Tensor]]] = []
        self._forward: Callable[..., list[Tensor]] = FORWARD

    def of(self, given: Sequence[Tensor], forward: Callable[..., list[Tensor]]) -> Shared:
        """This, for a call on these operands: what was computed from others, or by another way to them, is gone.

        forward: computes what the operator `linear_statistics` gives.
        """
        self._forward = forward
        if len(given) != len(self._given) or any(a is not b for a, b in zip(given, self._given, strict=True)):
            self._given, self._found = tuple(given), []
        return self

    def statistics(
        self, operands: Sequence[Tensor], names: str, row_mask: Tensor | None, statistics: str, *rest: Any
    ) -> list[Tensor]:
        """What the operator `linear_statistics` gives for these arguments."""
        given = dict(zip(names.split(), operands, strict=True))
        wanted = statistics.split()
        if ENTRIES in wanted:
            return self._with_entries(given, row_mask, wanted, *rest)
        target = given.pop("target", None)
        plain = given.keys() <= {"input", "weight", "bias"} and row_mask is None
        if not plain or Attributes(*rest[1:]).grad_filter != "exact":
            return self._forward(list(operands), names, row_mask, statistics, *rest)
        key = (tuple((name, _seen(t)) for name, t in given.items()), rest, torch.is_grad_enabled())
        known: dict[str, Tensor] = {}
        for of, classes, made in self._found:
            if of == key:
                same = target is classes or (target is not None and classes is not None and _same(target, classes))
                known |= {name: t for name, t in made.items() if name not in _OF_TARGET or same}
        missing = set(wanted) - known.keys()
        if missing:
            asked = missing | {r for name in missing for r in TABLE[name].requires if r in TABLE}
            # No call has the sum with the target and the one without.
            along = {*_ALONG} - known.keys() - ({"lse", "lse_low"} if "lse_rest" in asked else set())
            names_of = as_results(asked | along)
            forward = self._forward
            if missing <= {*_OF_TARGET}:
                # Without a sum over the classes, the eager implementation needs no product with the whole weight.
                names_of, forward = as_results(asked), FORWARD
            if target is not None and asked & {*_OF_TARGET}:
                given["target"] = target
            computed = forward(list(given.values()), " ".join(given), None, " ".join(names_of), *rest)
            found = dict(zip(names_of, computed, strict=False))
            self._found.append((key, None if target is None else target.clone(), found))
            known |= found
        return [known[name] for name in wanted]

    def _with_entries(
        self, given: dict[str, Tensor], row_mask: Tensor | None, wanted: list[str], *rest: Any
    ) -> list[Tensor]:
        """The same where entries are asked for: they need no product, and what does is shared."""
        own = {name: t for name, t in given.items() if name != "target"}
        made = {ENTRIES: FORWARD(list(own.values()), " ".join(own), row_mask, ENTRIES, *rest)[0]}
        others = " ".join(name for name in wanted if name != ENTRIES)
        if others:
            del given["entries"]
            found = self.statistics(list(given.values()), " ".join(given), row_mask, others, *rest)
            made |= dict(zip(others.split(), found, strict=False))
        return [made[name] for name in wanted]


def _seen(t: Tensor) -> tuple:
    """What says that two tensors, made in the same way of the same ones, are the same."""
    version = None if t.is_inference() else t._version
    return t.data_ptr(), t.shape, t.stride(), t.dtype, version, t.requires_grad


def _same(target: Tensor, classes: Tensor) -> bool:
    return target.shape == classes.shape and torch.equal(target, classes)


def through(shared: Shared, *arguments: Any) -> list[Tensor]:
    """The operator, in a graph whose first input is a :class:`Shared`."""
    return shared.statistics(*arguments)


def share(gm: GraphModule) -> GraphModule:
    """Gives a rewritten graph a first input, the :class:`Shared` that its calls of the operator go through."""
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_before(first):
        shared = gm.graph.placeholder("shared")
    for node in gm.graph.nodes:
        if node.target is FORWARD:
            node.target, node.args = through, (shared, *node.args)
    gm.recompile()
    return gm
