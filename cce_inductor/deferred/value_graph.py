"""The autograd graph that a read of pending logits leaves to the backward that comes through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


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
