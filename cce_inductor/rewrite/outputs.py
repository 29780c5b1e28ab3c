"""Logits that leave the graph: what the rewritten graph returns in their place, and how to compute them from it.

The graph gives back the hidden states (with the logits' row maps replayed) where it gave the logits. At run time the
backend makes a lazy tensor of them and of the head's weight, which is a graph input as a rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..graph import nodes
from ..graph.builder import Builder, Proxy
from ..graph.facts import Fact
from ..graph.fakes import fake
from ..graph.refusal import Refused
from ..ops.sharded import Shards
from ..trace import operands
from ..trace.affine import Listed, Scale
from ..trace.codes import codes
from ..trace.cosines import gives_cosines
from ..trace.values import SeveralHeads, Value
from . import sharded_heads
from .recipe import Logits
from .sharded_heads import Whole


@dataclass(frozen=True)
class Source:
    """Where a run of the compiled graph finds an operand: argument `index`, or additional output `index`.

    `chain` are the nodes to repeat on it, in order. shard: whether it is a DTensor, of which this rank's part is meant.
    """

    argument: bool
    index: int
    chain: tuple[Node, ...] = ()
    shard: bool = False

    def get(self, arguments: Sequence[Any], extra: Sequence[Any]) -> Tensor:
        value = (arguments if self.argument else extra)[self.index]
        for node in self.chain:
            value = _repeat(node, value)
        return value.to_local() if self.shard else value


def _repeat(node: Node, value: Tensor) -> Tensor:
    """What `node` gives for `value` as its only tensor argument."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda _: value)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


@dataclass(frozen=True)
class Split:
    """Of logits whose classes are split over the ranks of a mesh: how many there are, and what the program gets.

    placements: of the DTensor that it gets; None where that is a plain tensor, of all classes.
    """

    mesh: Any
    classes: int
    placements: tuple[Any, ...] | None

    @property
    def shards(self) -> Shards:
        return Shards(self.classes, self.mesh.get_group().group_name, average=False)

    @property
    def gathered(self) -> bool:
        """Whether each rank is to have all classes."""
        return self.placements is None or self.placements[0].is_replicate()


@dataclass(frozen=True)
class Deferral:
    """One graph output that is made lazy. `operands` are hidden states, weight, and what `compute` reads besides.

    split: of a head that is split over ranks; `operands` are this rank's, and so is what `compute` makes of them.
    """

    position: int
    operands: tuple[Source, ...]
    compute: Logits
    dtype: torch.dtype
    requires_grad: bool
    split: Split | None = None

    def shape(self, operands: Sequence[Tensor]) -> tuple[int, ...]:
        """The shape of the logits, from the operands of one run."""
        sizes = list(operands[0].shape)
        gathered = self.split is not None and self.split.gathered
        sizes[self.compute.class_dim] = self.split.classes if gathered else self.compute.classes(operands)  # type: ignore[union-attr]
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
            op = nodes.read(base)
            if (
                op is None
                or op.inplace
                or not (op.has(Fact.VIEW) or op.name == "cast")
                or list(base.all_input_nodes) != [op.args["input"]]
            ):
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
        for factor, part in head.terms:
            # What was done to the rows of the whole is done to those of each term.
            of_rows = replace(part, rows=(*part.rows, *value.rows))
            term, given = self._recipe(builder, of_rows, rank, class_dim)
            terms.append((factor, term))
            sources += given
        one = None if terms else value.one
        whole = None if one is None else self._whole(one.weight, one.bias)
        made = None if one is None else codes(one)
        if one is not None:
            h = builder.run(operands.hidden, builder, value, False).node
            sources.append(Source(True, self.placeholders[h]) if h in self.placeholders else self._own_output(h))
            weight = one.weight if made is None else made.node
            sources += [(self.source if whole is None else self._part)(n) for n in (weight, one.bias) if n is not None]
        sources += [
            self._of_rows(builder, value, extra) if isinstance(extra, Scale) else self.source(extra)
            for extra in value.extra
        ]
        factors = [t.factor for t in made.scales if isinstance(t.factor, Node)] if made is not None else []
        sources += [self.source(n) for n in factors]
        compute = Logits(
            dtype=head.dtype,
            transposed=one is not None and one.transposed,
            pointwise=one is not None and fake(one.weight).dim() > 2,
            biased=one is not None and one.bias is not None,
            rank=rank,
            class_dim=class_dim,
            weight_steps=() if made is None or not made.scales else made.steps(len(value.extra)),
            steps=value.steps,
            reads=len(sources),
            columns=tuple(int(part.count) if isinstance(part, Listed) else part for part in value.columns),
            terms=tuple(terms),
            concatenated=isinstance(head, SeveralHeads),
            whole=whole,
            cosines=one is not None and gives_cosines(one),
        )
        return compute, sources

    def _of_rows(self, builder: Builder, value: Value, factor: Scale) -> Source:
        """A factor of the rows, with one number where the classes are, as the last dimension."""

        def last() -> Proxy:
            p = operands.row_factor(builder, value, factor)
            return p if value.class_dim == value.fake.dim() - 1 else p.movedim(value.class_dim, -1)

        made = builder.run(last).node
        return self.source(made) if made is factor.node else self._own_output(made)

    def _whole(self, weight: Node, bias: Node | None) -> Whole | None:
        """How a head is put together of what the ranks have, where the graph is given that."""
        found = [sharded_heads.read(n) for n in (weight, bias) if n is not None]
        if not all(gather is not None and gather.shard in self.placeholders for gather in found):
            return None
        wholes = {gather.whole() for gather in found if gather is not None}
        return wholes.pop() if len(wholes) == 1 else None

    def _part(self, node: Node) -> Source:
        """This rank's part of a weight or a bias that is gathered."""
        gather = sharded_heads.read(node)
        assert gather is not None
        return Source(True, self.placeholders[gather.shard], shard=gather.is_dtensor)

    def _own_output(self, node: Node) -> Source:
        if node not in self.extra:
            self.extra.append(node)
        return Source(False, self.extra.index(node))

    def finish(self) -> int:
        """Writes the outputs back, without those that were deferred; gives the number of the user's own."""
        kept = [out for i, out in enumerate(self.outputs) if i not in self.deferred]
        self.node.args = ((*kept, *self.extra),)
        return len(self.outputs)
