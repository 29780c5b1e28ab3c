"""Eager calls that come again and again: compiled, as the graph of their head was.

A call on pending logits runs the operators' eager implementation. That is there at once, and takes up to 2.6 times as
long as the kernels that the same loss gets in one graph with its head. A loss in a training loop comes in every step:
from its third call on it has those kernels too, if it is large enough for the compilation to pay.
"""

import logging
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from ..ops.library import FORWARD
from ..rewrite.result import Rewritten
from .calls import described, state
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

    rewrite: the pass, for the kernels that there are. compile: it is given what the pass has made and real inputs.
    known: by kind of call, what it was compiled to; None where it was tried and failed.
    """

    rewrite: Callable[[Form], Rewritten]
    compile: Callable[[GraphModule, Sequence[Tensor]], Callable]
    calls: Counter[Hashable] = field(default_factory=Counter)
    known: dict[Hashable, Callable | None] = field(default_factory=dict)

    def of_loss(self, kind: Hashable, form: Form, given: Sequence[Tensor]) -> Callable | None:
        """What computes the graph of a call of this kind, in the place of its eager implementation; None: nothing.

        form: the graph before the pass. given: its inputs.
        """

        def make(inputs: Sequence[Tensor]) -> Callable | None:
            result = self.rewrite(Form(form.graph_module, list(inputs)))
            fits = result.fused and form.accepts(result) and not result.uncompiled
            return self.compile(result.graph_module, inputs) if fits else None

        return self._often(kind, make, given)

    def forward(
        self, operands: Sequence[Tensor], names: str, row_mask: Tensor | None, statistics: str, *rest: Any
    ) -> list[Tensor]:
        """What the operator `linear_statistics` gives; behind the statistics there may be nothing."""
        given = [*operands, *([] if row_mask is None else [row_mask])]

        def make(inputs: Sequence[Tensor]) -> Callable:
            graph = Graph()
            nodes = [graph.placeholder(name) for name in names.split()]
            mask = None if row_mask is None else graph.placeholder("row_mask")
            made = graph.call_function(FORWARD, (nodes, names, mask, statistics, *rest))
            graph.output(
                tuple(graph.call_function(operator.getitem, (made, i)) for i in range(len(statistics.split())))
            )
            return self.compile(GraphModule(torch.nn.Module(), graph), inputs)

        kind = (names, statistics, rest, *map(described, given), state(given[0].device.type))
        compiled = self._often(kind, make, given)
        if compiled is None:
            return FORWARD(list(operands), names, row_mask, statistics, *rest)
        return list(compiled(*given))

    def _often(
        self, kind: Hashable, make: Callable[[Sequence[Tensor]], Callable | None], given: Sequence[Tensor]
    ) -> Callable | None:
        """What calls of this kind were compiled to, or are now that they have come often."""
        if kind in self.known:
            return self.known[kind]
        hidden, weight, *_ = given
        if hidden.numel() * weight.numel() // hidden.shape[-1] < LEAST:
            return None
        if len(self.calls) >= COUNTED:
            self.calls.clear()  # shapes that are others each time: none of them comes often
        self.calls[kind] += 1
        if self.calls[kind] >= CALLS and len(self.known) < KINDS:
            try:
                self.known[kind] = make([t.detach().requires_grad_(t.requires_grad) for t in given])
            except Exception:
                log.exception("cce_inductor could not compile what is called eagerly on logits, and goes on without")
                self.known[kind] = None
        return self.known.get(kind)
