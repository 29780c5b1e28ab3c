"""How deferred logits are computed, as a value that a graph can be compiled for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph.builder import Proxy
from ..graph.fakes import example
from ..trace.affine import Range
from ..trace.cosines import OF_LENGTH_ONE
from ..trace.values import Step
from .sharded_heads import Whole

RECORDED = "cce_inductor_recorded"  # in the meta of a head that was put into a graph by `Logits.record`


@dataclass(frozen=True, eq=False)
class Logits:
    """The logits as eager computes them: the head in its dtype, then every step the user wrote.

    Of (hidden states, weight, bias if `biased`, and what `steps` read besides). The hidden states have `rank`
    dimensions, with D at `class_dim`; the result has V there. With `terms` the logits are the sum of others, each times
    a factor, or their concatenation; their operands stand in the head's place, one after the other. columns: what
    `steps` leave of the vocabulary, or how many classes. whole: puts weight and bias together, where the operands are
    this rank's shards; every rank has to compute the logits then. cosines: whether the rows of hidden states and weight
    were divided by their lengths.
    """

    dtype: torch.dtype
    transposed: bool
    pointwise: bool  # a weight (V, D, 1, ...), of a convolution
    biased: bool
    rank: int
    class_dim: int
    steps: tuple[Step, ...]
    reads: int  # how many operands, those of `steps` included
    weight_steps: tuple[Step, ...] = ()  # what the weight is made by of the operand, which is int8
    columns: tuple[Range | int, ...] = ()
    terms: tuple[tuple[float, "Logits"], ...] = ()
    concatenated: bool = False
    whole: Whole | None = None
    cosines: bool = False

    def __call__(self, operands: Sequence[Tensor]) -> Tensor:
        return self._in_place(self._classes_last(operands, recorded=False))

    def _computed(self, operands: Sequence[Tensor], extra: list[Tensor]) -> Tensor:
        biases = map(self._gathered, operands[2:])
        x, w, *bias = [t.to(self.dtype) for t in (operands[0], self._weight(operands[1], extra), *biases)]
        return self._head(x, w, bias[0] if bias else None)

    @property
    def group(self) -> str | None:
        """The name of the group of ranks that compute the logits together, if there is one."""
        groups = [term.group for _, term in self.terms] if self.whole is None else [self.whole.group]
        return next((group for group in groups if group is not None), None)

    def record(self, operands: Sequence[Proxy]) -> Proxy:
        """The same as nodes of a graph, with a head whose operands keep their dtypes, as under autocast.

        It is marked: the pass erases it where nothing but what it fuses needs the logits.
        """
        given: Any = operands
        return self._in_place(self._classes_last(given, recorded=True))  # type: ignore[return-value]

    def _recorded(self, operands: Sequence[Any], extra: list[Any]) -> Any:
        w = self._weight(operands[1], extra)
        for operand in (operands[0], w) if self.cosines else ():
            operand.node.meta[OF_LENGTH_ONE] = True
        w = w if example(w.node).is_floating_point() else w.to(example(operands[0].node).dtype)
        return self._head(operands[0], w, self._gathered(operands[2]) if self.biased else None, self._marked)

    def _gathered(self, shard: Any) -> Any:
        return shard if self.whole is None else self.whole(shard)

    def _weight(self, w: Any, extra: list[Any]) -> Any:
        w = self._gathered(w)
        for step in self.weight_steps:
            w = step(w, extra)
        return w

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
            z: Any = (self._recorded if recorded else self._computed)(operands[:used], list(operands[used:]))
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
        if self.whole is not None:
            each = [self.whole.classes]
        elif not each:
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
