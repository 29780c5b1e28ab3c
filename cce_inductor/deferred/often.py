"""Eager calls that come again and again: compiled, as the graph of their head was.

A call on pending logits runs the operators' eager implementation. That is there at once, and takes up to 2.6 times as
long as the kernels that the same loss gets in one graph with its head. A loss in a training loop comes in every step:
from its third call on it has those kernels too, if it is large enough for the compilation to pay. They are for its
number of rows if that has been the same each time, and for any if not.
"""

import logging
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from ..ops.library import FORWARD
from ..rewrite.result import Rewritten
from .calls import Call, Fakes, described, state, without_rows
from .other_graphs import Form

log = logging.getLogger(__name__)

# Calls of one kind before it is compiled, and kinds that are compiled for one compiled model: as a rule they are
# shapes, and each takes seconds.
CALLS = 3
KINDS = 8
COUNTED = 256  # kinds of which it is known how often they came
# Multiplications of one product of the hidden states and the weight. The kernels save 0.1 s for 2**32 on two cores.
LEAST = 1 << 28


@dataclass
class Kernels:
    """Makes kernels of what is called often on the logits of one compiled model.

    rewrite: the pass, for the kernels that there are. compile: it is given what the pass has made and fake inputs.
    known: by kind of call, what it was compiled to; None where it was tried and failed. calls: how often it came, by
    the kind of any number of rows, and by the whole kind. of_one: those that are compiled for one number of rows.
    """

    rewrite: Callable[[Form], Rewritten]
    compile: Callable[[GraphModule, Sequence[Tensor]], Callable]
    calls: dict[Hashable, Counter[Hashable]] = field(default_factory=dict)
    known: dict[Hashable, "Compiled | None"] = field(default_factory=dict)
    of_one: set[Hashable] = field(default_factory=set)

    def of_loss(self, call: Call, given: Sequence[Tensor]) -> Callable | None:
        """What computes the graph of calls of this kind, in the place of its eager implementation; None: nothing.

        given: the inputs of the graph.
        """

        def make(fakes: Fakes) -> tuple[GraphModule, Sequence[Tensor]] | None:
            form = call.form(fakes)
            result = None if form is None else self.rewrite(form)
            if form is None or result is None or not result.fused or not form.accepts(result) or result.uncompiled:
                return None
            return result.graph_module, form.inputs

        return self._often(Kind(call.kind, call.kind_for_any_rows), make, given)

    def forward(
        self, operands: Sequence[Tensor], names: str, row_mask: Tensor | None, statistics: str, *rest: Any
    ) -> list[Tensor]:
        """What the operator `linear_statistics` gives; behind the statistics there may be nothing."""
        given = [*operands, *([] if row_mask is None else [row_mask])]

        def make(fakes: Fakes) -> tuple[GraphModule, Sequence[Tensor]]:
            graph = Graph()
            nodes = [graph.placeholder(name) for name in names.split()]
            mask = None if row_mask is None else graph.placeholder("row_mask")
            made = graph.call_function(FORWARD, (nodes, names, mask, statistics, *rest))
            parts = tuple(graph.call_function(operator.getitem, (made, i)) for i in range(len(statistics.split())))
            graph.output(parts)
            hidden, weight, *others = given
            inputs = [fakes.of_rows(hidden, hidden.requires_grad), fakes.fixed(weight, weight.requires_grad)]
            return GraphModule(torch.nn.Module(), graph), [*inputs, *(fakes.of(t, t.requires_grad) for t in others)]

        own = (names, statistics, rest, state(given[0].device.type))
        kind = Kind((*own, *map(described, given)), (*own, *map(without_rows, given)))
        compiled = self._often(kind, make, given)
        if compiled is None:
            return FORWARD(list(operands), names, row_mask, statistics, *rest)
        return list(compiled(*given))

    def _often(self, kind: "Kind", make: "Make", given: Sequence[Tensor]) -> Callable | None:
        """What calls of this kind were compiled to, or are now that they have come often."""
        for own in kind:
            if own in self.known:
                known = self.known[own]
                return None if known is None or not known.takes(given) else known.run
        hidden, weight, *_ = given
        if hidden.numel() * weight.numel() // hidden.shape[-1] < LEAST:
            return None
        if len(self.calls) >= COUNTED:
            self.calls.clear()  # others each time: none of them comes often
        calls = self.calls.setdefault(kind.any_rows, Counter())
        calls[kind.whole] += 1
        if calls.total() < CALLS or len(self.known) >= KINDS:
            return None
        del self.calls[kind.any_rows]
        one = len(calls) == 1 and kind.any_rows not in self.of_one
        try:
            compiled = self._compiled(make, Fakes(() if one else hidden.shape[:-1]))
        except Exception:
            log.exception("cce_inductor could not compile what is called eagerly on logits, and goes on without")
            compiled = None
        self.of_one.add(kind.any_rows)
        self.known[kind.whole if one else kind.any_rows] = compiled
        return None if compiled is None or not compiled.takes(given) else compiled.run

    def _compiled(self, make: "Make", fakes: Fakes) -> "Compiled | None":
        made = make(fakes)
        if made is None:
            return None
        gm, inputs = made
        run = self.compile(gm, inputs)
        return Compiled(run, fakes.guards(inputs))


class Kind(NamedTuple):
    """What calls have in common: all of it, and all but their numbers of rows."""

    whole: Hashable
    any_rows: Hashable


class Compiled(NamedTuple):
    """What a kind of call was compiled to, and whether it takes these inputs."""

    run: Callable
    takes: Callable[[Sequence[Tensor]], bool]


# Makes the graph of a call, and its inputs; None where it is not fused.
Make = Callable[[Fakes], tuple[GraphModule, Sequence[Tensor]] | None]
