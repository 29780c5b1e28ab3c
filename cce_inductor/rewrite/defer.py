"""Logits that leave the graph: what the rewritten graph returns in their place, and how to compute them from it.

The graph gives back the hidden states (with the logits' row maps replayed) where it gave the logits. At run time the
backend makes a lazy tensor of them and of the head's weight, which is a graph input as a rule.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from . import operands, vocabulary
from .builder import Builder
from .values import Listed, Range, Refused, Step, Value, fake

RECORDED = "cce_inductor_recorded"  # in the meta of a head that was put into a graph by `Logits.record`

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


@dataclass(frozen=True, eq=False)
class Logits:
    """The logits as eager computes them: the head in its dtype, then every step the user wrote.

    Of (hidden states, weight, bias if `biased`, and what `steps` read besides). The hidden states have `rank`
    dimensions, with D at `class_dim`; the result has V there. With `terms` the logits are the sum of others, each times
    a factor, or their concatenation; their operands stand in the head's place, one after the other. columns: what
    `steps` leave of the vocabulary, or how many classes.
    """

    dtype: torch.dtype
    transposed: bool
    pointwise: bool  # a weight (V, D, 1, ...), of a convolution
    biased: bool
    rank: int
    class_dim: int
    steps: tuple[Step, ...]
    reads: int  # how many operands, those of `steps` included
    columns: tuple[Range | int, ...] = ()
    terms: tuple[tuple[float, "Logits"], ...] = ()
    concatenated: bool = False

    def __call__(self, operands: Sequence[Tensor]) -> Tensor:
        return self._in_place(self._classes_last(operands, recorded=False))

    def _computed(self, operands: Sequence[Tensor]) -> Tensor:
        x, w, *bias = [t.to(self.dtype) for t in operands]
        return self._head(x, w, *bias)

    def record(self, operands: Sequence[fx.Proxy]) -> fx.Proxy:
        """The same as nodes of a graph, with a head whose operands keep their dtypes, as under autocast.

        It is marked: the pass erases it where nothing but what it fuses needs the logits.
        """
        given: Any = operands
        return self._in_place(self._classes_last(given, recorded=True))  # type: ignore[return-value]

    def _recorded(self, operands: Sequence[Any]) -> Any:
        return self._head(operands[0], operands[1], operands[2] if self.biased else None, self._marked)

    def _marked(self, z: Any) -> Any:
        z.node.meta["example_value"] = z.node.meta["example_value"].to(self.dtype)
        z.node.meta[RECORDED] = True
        return z

    def _head(self, x: Tensor, w: Tensor, bias: Tensor | None = None, product: Callable = lambda z: z) -> Tensor:
        if self.class_dim != self.rank - 1:
            x = x.movedim(self.class_dim, -1)
        if self.pointwise:
            w = w.flatten(1)
        if not self.transposed:
            return product(F.linear(x, w, bias))
        if bias is not None and self.rank == 2:
            return product(torch.addmm(bias, x, w))
        z = product(torch.matmul(x, w))
        return z if bias is None else z + bias

    def _classes_last(self, operands: Sequence[Tensor], recorded: bool) -> Tensor:
        """The logits with the classes in the last dimension."""
        parts = [(factor, term._classes_last(given, recorded)) for factor, term, given in self._given(operands)]
        used = sum(term.reads for _, term in self.terms) or 2 + self.biased
        if not parts:
            z: Any = (self._recorded if recorded else self._computed)(operands[:used])
        elif self.concatenated:
            z = torch.cat([part for _, part in parts], -1)
        else:
            z = parts[0][1]
            for factor, part in parts[1:]:
                z = z + part if factor == 1.0 else z + factor * part
        for step in self.steps:
            z = step(z, list(operands[used:]))
        return z

    def _given(self, operands: Sequence[Tensor]) -> Iterator[tuple[float, "Logits", Sequence[Tensor]]]:
        """The terms, each with its factor and its operands."""
        used = 0
        for factor, term in self.terms:
            yield factor, term, operands[used : used + term.reads]
            used += term.reads

    def classes(self, operands: Sequence[Tensor]) -> int:
        """How many there are, from the operands of one run."""
        each = [term.classes(given) for _, term, given in self._given(operands)]
        if not each:
            each = [operands[1].shape[1 if self.transposed else 0]]
        count = range(sum(each) if self.concatenated else each[0])
        for part in self.columns:
            count = range(part) if isinstance(part, int) else count[slice(*part)]
        return len(count)

    def _in_place(self, z: Tensor) -> Tensor:
        """With the classes at `class_dim`."""
        if self.class_dim == self.rank - 1:
            return z
        order = list(range(self.rank - 1))
        return z.permute(*order[: self.class_dim], self.rank - 1, *order[self.class_dim :])


def _count(part: Listed) -> int:
    count = fake(part.indices).shape[0] if isinstance(part.indices, Node) else len(part.indices)
    if not isinstance(count, int):
        raise Refused("logits of a symbolic number of classes leave the graph", "return all of them")
    return count


@dataclass(frozen=True)
class Deferral:
    """One graph output that is made lazy. `operands` are hidden states, weight, and what `compute` reads besides."""

    position: int
    operands: tuple[Source, ...]
    compute: Logits
    dtype: torch.dtype
    requires_grad: bool

    def shape(self, operands: Sequence[Tensor]) -> tuple[int, ...]:
        """The shape of the logits, from the operands of one run."""
        sizes = list(operands[0].shape)
        sizes[self.compute.class_dim] = self.compute.classes(operands)
        return tuple(sizes)


class Outputs:
    """The outputs of a graph while it is rewritten: replaces logits and collects additional outputs."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.node = next(n for n in reversed(graph.nodes) if n.op == "output")
        self.outputs = list(self.node.args[0])  # type: ignore[arg-type]
        self.placeholders = {n: i for i, n in enumerate(p for p in graph.nodes if p.op == "placeholder")}
        self.deferred: set[int] = set()
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
        compute, sources = self._recipe(Builder(self.graph, self.node), value, value.fake.dim(), value.class_dim)
        requires_grad = value.fake.requires_grad
        self.deferred.update(positions)
        return [
            Deferral(
                i,
                tuple(sources),
                compute,
                fake(value.node).dtype,
                requires_grad,
            )
            for i in positions
        ]

    def _recipe(self, builder: Builder, value: Value, rank: int, class_dim: int) -> tuple[Logits, list[Source]]:
        """How to compute a value whose hidden states have `rank` dimensions, and the operands that takes."""
        head = value.head
        sources: list[Source] = []
        terms = []
        for factor, part in head.sum_of or [(1.0, member) for member in head.members]:
            # What was done to the rows of the whole is done to those of each term.
            of_rows = replace(part, rows=(*part.rows, *value.rows))
            term, given = self._recipe(builder, of_rows, rank, class_dim)
            terms.append((factor, term))
            sources += given
        if not terms:
            h = builder.run(operands.hidden, builder, value, False).node
            sources.append(Source(True, self.placeholders[h]) if h in self.placeholders else self._own_output(h))
            sources += [self.source(n) for n in (head.weight, head.bias) if n is not None]
        sources += [self.source(n) for n in value.extra]
        pointwise, biased = fake(head.weight).dim() > 2, head.bias is not None
        compute = Logits(
            head.dtype,
            head.transposed,
            pointwise,
            biased,
            rank,
            class_dim,
            value.steps,
            len(sources),
            tuple(_count(part) if isinstance(part, Listed) else part for part in value.columns),
            tuple(terms),
            bool(head.members),
        )
        return compute, sources

    def _own_output(self, node: Node) -> Source:
        if node not in self.extra:
            self.extra.append(node)
        return Source(False, self.extra.index(node))

    def finish(self) -> int:
        """Writes the outputs back, without those that were deferred; gives the number of the user's own."""
        kept = [out for i, out in enumerate(self.outputs) if i not in self.deferred]
        self.node.args = ((*kept, *self.extra),)
        return len(self.outputs)
