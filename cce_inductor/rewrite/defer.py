"""Logits that leave the graph: what the rewritten graph returns in their place, and how to compute them from it.

The graph gives back the hidden states (with the logits' row maps replayed) where it gave the logits. At run time the
backend makes a lazy tensor of them and of the head's weight, which is a graph input as a rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from . import emit, vocabulary
from .builder import Builder
from .values import Columns, Head, Refused, Step, Value, fake

# Ops that derive a weight from a parameter and are cheaper to repeat at a read than to keep the result of.
_CHEAP = frozenset(("cast", "view", "reshape", "transpose", "t", "permute", "getattr", "getitem", "detach", "flatten"))


@dataclass(frozen=True)
class Source:
    """Where a run of the compiled graph finds an operand: argument `index`, or additional output `index`.

    `chain` are the nodes to repeat on it, in order.
    """

    argument: bool
    index: int
    chain: tuple[Node, ...] = ()

    def get(self, arguments: Sequence[Any], extra: Sequence[Any]) -> Tensor:
        value = (arguments if self.argument else extra)[self.index]
        for node in self.chain:
            value = _repeat(node, value)
        return value


def _repeat(node: Node, value: Tensor) -> Tensor:
    """What `node` gives for `value` as its only tensor argument."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda _: value)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


@dataclass(frozen=True)
class Deferral:
    """One graph output that is made lazy. `operands` are hidden states, weight, and what `compute` reads besides."""

    position: int
    operands: tuple[Source, ...]
    compute: Callable[[Sequence[Tensor]], Tensor]
    class_dim: int
    transposed: bool
    columns: Columns
    dtype: torch.dtype
    requires_grad: bool

    def shape(self, operands: Sequence[Tensor]) -> tuple[int, ...]:
        """The shape of the logits, from the operands of one run."""
        sizes = list(operands[0].shape)
        classes = range(operands[1].shape[1 if self.transposed else 0])
        for part in self.columns:
            classes = classes[slice(*part)]
        sizes[self.class_dim] = len(classes)
        return tuple(sizes)


def _compute(head: Head, class_dim: int, steps: tuple[Step, ...]) -> Callable[[Sequence[Tensor]], Tensor]:
    """The logits as eager computes them: the head in its dtype, then every step the user wrote."""
    dtype, transposed, biased = head.dtype, head.transposed, head.bias is not None
    first_extra = 2 + biased

    def compute(operands: Sequence[Tensor]) -> Tensor:
        x, w = operands[0].movedim(class_dim, -1).to(dtype), operands[1].to(dtype)
        bias = operands[2].to(dtype) if biased else None
        if not transposed:
            z = F.linear(x, head.matrix(w), bias)
        elif bias is not None and x.dim() == 2:
            z = torch.addmm(bias, x, w)
        else:
            z = x @ w if bias is None else x @ w + bias
        extra = list(operands[first_extra:])
        for step in steps:
            z = step(z, extra)
        return z.movedim(-1, class_dim)

    return compute


class Outputs:
    """The outputs of a graph while it is rewritten: replaces logits and collects additional outputs."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.node = next(n for n in reversed(graph.nodes) if n.op == "output")
        self.outputs = list(self.node.args[0])  # type: ignore[arg-type]
        self.placeholders = {n: i for i, n in enumerate(p for p in graph.nodes if p.op == "placeholder")}
        self.extra: list[Node] = []

    def source(self, node: Node) -> Source:
        """An operand's source, with an additional output where it is neither an input nor cheap to derive from one."""
        chain: list[Node] = []
        base = node
        while base not in self.placeholders:
            op = vocabulary.read(base)
            if op is None or op.inplace or op.name not in _CHEAP or list(base.all_input_nodes) != [op.args["input"]]:
                break
            chain.append(base)
            base = op.args["input"]
        if base in self.placeholders:
            return Source(True, self.placeholders[base], tuple(reversed(chain)))
        return self._own_output(node)

    def defer(self, value: Value) -> list[Deferral]:
        """Takes one traced value out of the outputs."""
        positions = [i for i, out in enumerate(self.outputs) if out is value.node]
        if not positions or not all(n is None or isinstance(n, Node) for n in self.outputs):
            raise Refused("the logits leave the graph inside a structure", "return them as a tensor")
        head = value.head
        builder = Builder(self.graph, self.node)
        h = builder.run(emit.hidden, builder, value, False).node
        hidden = Source(True, self.placeholders[h]) if h in self.placeholders else self._own_output(h)
        others = [n for n in (head.weight, head.bias, *value.extra) if n is not None]
        operands = (hidden, *(self.source(n) for n in others))
        compute = _compute(head, value.class_dim, value.steps)
        requires_grad = value.fake.requires_grad
        for i in positions:
            self.outputs[i] = None
        return [
            Deferral(
                i,
                operands,
                compute,
                value.class_dim,
                head.transposed,
                value.columns,
                fake(value.node).dtype,
                requires_grad,
            )
            for i in positions
        ]

    def _own_output(self, node: Node) -> Source:
        if node not in self.extra:
            self.extra.append(node)
        return Source(False, self.extra.index(node))

    def finish(self) -> int:
        """Writes the outputs back; gives the number of the user's own."""
        self.node.args = ((*self.outputs, *self.extra),)
        return len(self.outputs)
