"""What no operator computes at once, decomposed into nodes that read one head, and one target for each row, at a time.

Three things: losses against mixtures of one-hot tensors (mixup, smoothing by hand), logits whose vocabularies were
concatenated, and logits of several heads that were stacked. The nodes are put into the graph in front of what they
replace, and traced like the program's own.
"""

from __future__ import annotations

import abc
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..graph import nodes
from ..graph.builder import Builder, Proxy
from ..graph.facts import Fact
from ..graph.fakes import example, fake
from ..graph.memory import written_after
from ..graph.refusal import Refused
from ..ops.losses import cross_entropy, normalizer
from .one_hot import coefficient
from .operands import vocab
from .reduction import Loss, Reduction
from .reductions import arguments_of, over_rows, reads_the_classes
from .targets import diagonal
from .values import Diagonal, Mixture, SeveralHeads, Value

_WIDE = (torch.float32, torch.float64)


def widened(p: Any) -> Any:
    """Statistics of narrow logits are taken in fp32, and rounded once at the end."""
    return p if example(p.node).dtype in _WIDE else p.float()


def in_dtype_of(p: Any, node: Node) -> Any:
    dtype = fake(node).dtype
    return p if example(p.node).dtype == dtype else p.to(dtype)


# ---- mixtures of one-hot tensors


def _picked(builder: Builder, z: Any, mixture: Mixture, value: Value) -> Any:
    """The sum of the entries of `z` at the targets, each times its coefficient. value: of the shape of `z`."""
    class_dim = value.class_dim
    total: Any = 0.0
    for term in mixture.terms:
        entry = z.gather(class_dim, in_shape(builder, term[2], z, value)).squeeze(class_dim)
        total = total + entry * coefficient(builder, term, class_dim)
    return total


def in_shape(builder: Builder, target: Node | Diagonal, z: Any, value: Value) -> Any:
    """Class indices in the shape of `z`, with one class. value: of the shape of `z`."""
    if isinstance(target, Diagonal):
        return diagonal(builder, value)
    class_dim = value.class_dim
    t = builder.proxy(target)
    shape = list(example(z.node).shape)
    shape[class_dim] = 1
    if fake(target).dim() == len(shape) - 1 and list(fake(target).shape) == shape[:class_dim] + shape[class_dim + 1 :]:
        return t.unsqueeze(class_dim)
    if sum(not isinstance(s, int) for s in shape) > 1:
        raise Refused("one-hot tensors in another shape than the logits, of symbolic size", "make them in its shape")
    return t.reshape([s if isinstance(s, int) else -1 for s in shape])


def mixed_loss(builder: Builder, value: Value, node: Node, args: dict[str, Any], mixture: Mixture) -> Proxy:
    """cross_entropy of logits against probabilities that are a mixture."""
    arguments = arguments_of(args)
    if args["weight"] is not None:
        raise Refused("class probabilities as target, with class weights", "use class indices")
    value.need("logits", f"cross_entropy reads {value.kind}, not logits", "use cross_entropy on logits")
    reads_the_classes("cross_entropy", value)
    c, smoothing = value.class_dim, arguments.label_smoothing
    z = widened(builder.proxy(value.node))
    classes = value.vocab
    if not isinstance(classes, int) and (smoothing or mixture.constant):
        raise Refused("smoothed class probabilities over a vocabulary of symbolic size", "use class indices")
    mixture = mixture.times(1.0 - smoothing).plus(smoothing / classes if smoothing else 0.0)
    coefficients: Any = classes * mixture.constant if mixture.constant else 0.0
    for term in mixture.terms:
        coefficients = coefficients + coefficient(builder, term, c)
    rows = z.logsumexp(c) * coefficients - _picked(builder, z, mixture, value)
    if mixture.constant:
        rows = rows - z.sum(c) * mixture.constant
    return in_dtype_of(rows if arguments.reduction == "none" else getattr(rows, arguments.reduction)(), node)


def mixed_sum(builder: Builder, value: Value, node: Node, args: dict[str, Any], mean: bool) -> Proxy:
    """The sum over the classes of logits or log-probabilities times a mixture."""
    mixture = value.picked
    assert isinstance(mixture, Mixture)
    source = mixture.source
    assert source is not None
    c = source.class_dim
    if value.rows != source.rows:
        raise Refused("a product with a mixture is rearranged before it is summed", "sum it first")
    factor = value.factor / source.factor
    v = widened(builder.proxy(source.node))
    if source.kind == "exp" and mixture.constant and any(number < 0 for number, _, _ in mixture.terms):
        rows = _exp_of_others(builder, source, mixture)
    else:
        rows = _picked(builder, v, mixture, source)
        rows = rows + v.sum(c) * mixture.constant if mixture.constant else rows
    rows = rows if factor == 1.0 else rows * factor
    rows = rows / vocab(builder, value) if mean else rows
    return in_dtype_of(over_rows(value, args["dim"], bool(args["keepdim"]), mean)(rows), node)


def _exp_of_others(builder: Builder, source: Value, mixture: Mixture) -> Any:
    """The sum of the exponentials of all classes but one of each row, times the mixture's constant.

    Not the sum of all less the one: where that is nearly all, the difference is nothing but rounding.
    """
    (number, weights, target), *others = mixture.terms
    op, c = nodes.read(source.node), source.class_dim
    if others or weights or number != -mixture.constant or op is None or op.name != "exp" or op.inplace:
        raise Refused("exponentials of the logits are weighted, and less at a target", "leave the target out whole")
    if written_after(source.node):
        raise Refused("logits are edited after their exponentials were taken", "use the out-of-place form")
    z = widened(builder.proxy(op.args["input"]))
    rest = builder.call(torch.scatter, z, c, in_shape(builder, target, z, source), -math.inf)
    return rest.logsumexp(c).exp() * mixture.constant


# ---- several heads in one tensor


def concatenated(values: Sequence[Value], node: Node, dim: int) -> Value:
    """The value of cat over the classes of logits."""
    first = values[0]
    for value in values:
        value.need("logits", "vocabularies of log-probabilities are put together", "put the logits together")
        if value.class_dim != dim or value.head.dtype != first.head.dtype:
            raise Refused("vocabularies are put together with something else", "put logits of one dtype together")
    return Value(SeveralHeads(node, tuple(values)), node, dim)


def stacked(values: Sequence[Value], node: Node, dim: int, is_stack: bool) -> Value:
    """The value of stack, or of cat over rows, of logits of different heads."""
    first = values[0]
    for value in values:
        value.need("logits", "log-probabilities of several heads are stacked", "stack the logits")
        alike = value.class_dim == first.class_dim and value.head.dtype == first.head.dtype
        if not alike or value.fake.requires_grad != first.fake.requires_grad:
            raise Refused("logits that differ in layout, dtype or gradient are stacked", "compute a loss of each")
        if not all(isinstance(s, int) for s in value.fake.shape):
            raise Refused("logits of several heads are stacked, with symbolic sizes", "compute a loss of each")
    class_dim = first.class_dim + (is_stack and dim <= first.class_dim)
    return Value(SeveralHeads(node, tuple(values), dim, is_stack), node, class_dim)


def of_members(builder: Builder, reduction: Reduction) -> Proxy:
    """A reduction of several heads' logits, by the statistics of each."""
    value = reduction.value
    if value.masks or value.terms or value.columns or value.affine.scales:
        raise Refused(
            "logits of several heads are masked, shifted, cut, or multiplied by row or class", "do that to each of them"
        )
    if not set(reduction.statistics) <= {"lse", "lse_low", "target_logit", "logit_sum"}:
        raise Refused(f"the {reduction.statistics[-1]} of logits of several heads", "compute it of each of them")
    several = _several(value)
    kind = _Concatenated if several.stacked_at is None else _Stacked
    statistics = kind(builder, reduction)
    if not isinstance(reduction, Loss):
        result = reduction.shape(statistics.in_rows(reduction.flat(statistics)))
        return in_dtype_of(statistics.with_zeros(result), reduction.node)
    if reduction.column_weight is not None:
        raise Refused("label smoothing with class weights over several heads", "compute a loss of each")
    target, row_mask = statistics.target, statistics.row_mask
    stats = {name: getattr(statistics, name) for name in reduction.statistics}
    weight = None if reduction.weight is None else builder.proxy(reduction.weight)
    result = cross_entropy(stats, target, row_mask, weight, statistics.vocab, reduction.arguments)
    result = statistics.in_rows(result) if reduction.arguments.reduction == "none" else result
    return in_dtype_of(statistics.with_zeros(result), reduction.node)


def _several(value: Value) -> SeveralHeads:
    assert isinstance(value.head, SeveralHeads)
    return value.head


class _Members(abc.ABC):
    """The statistics of logits that are made of several heads', as `served.Statistics` has them of one."""

    def __init__(self, builder: Builder, reduction: Reduction):
        self.builder, self.reduction, self.value = builder, reduction, reduction.value
        self.members = self.value.members

    @property
    def vocab(self) -> Any:
        return self.value.vocab

    def _steps(self, z: Any, cut: slice) -> Any:
        """What was done to the logits since, with the classes last; `cut` are the classes of `z` among all."""
        extra: list[Any] = []
        for node in self.value.extra:
            assert isinstance(node, Node)
            p = self.builder.proxy(node)
            extra.append(p.reshape(-1)[cut] if fake(node).numel() != 1 else p)
        z = widened(z)
        for step in self.value.steps[: self.value.plain]:
            z = step(z, extra)
        return widened(z)

    @functools.cached_property
    def row_mask(self) -> Any:
        """Where the target is one that counts."""
        loss = self.reduction
        if not isinstance(loss, Loss) or not loss.ignores:
            return self.given.ge(-self.vocab)
        return self.given.ne(loss.arguments.ignore_index)

    @functools.cached_property
    def target(self) -> Any:
        """Class indices, and some class in rows that do not count."""
        t = self.builder.call(torch.where, self.row_mask, self.given, 0)
        return self.builder.call(torch.where, t < 0, t + self.vocab, t) if self.reduction.wraps else t

    @property
    @abc.abstractmethod
    def given(self) -> Any:
        """The targets as the program has them, one for each row."""

    @abc.abstractmethod
    def in_rows(self, flat: Any) -> Any:
        """In the leading shape of the logits."""

    lse_low = 0.0  # log-sum-exps that are put together are not known to more digits

    def log_p(self, z: Any, count: Any = 1) -> Any:
        return z - normalizer(self.lse) * count  # type: ignore[attr-defined]

    def with_zeros(self, result: Any) -> Any:
        """Eager's gradients of heads that nothing is read of are zero, not none: this sends them zeros."""
        if not self.value.fake.requires_grad:
            return result
        left = [m for m in self.value.members if m not in self.members and m.fake.requires_grad]
        if any(member.members for member in left):
            raise Refused("logits of several heads are stacked, and not all of them are read", "stack single heads")
        for node in dict.fromkeys(n for member in left for n in member.operands()):
            if fake(node).requires_grad:
                result = result + self.builder.proxy(node).reshape(-1)[:0].sum()
        return result


class _Concatenated(_Members):
    """In the logits' leading shape."""

    def __init__(self, builder: Builder, reduction: Reduction):
        super().__init__(builder, reduction)
        sizes = [member.vocab for member in self.members]
        if not all(isinstance(size, int) for size in sizes):
            raise Refused("vocabularies of symbolic size are put together", "put the weights together")
        self.starts = [0, *itertools.accumulate(sizes)]
        self.parts = [self._part(k) for k in range(len(self.members))]
        # Recorded first, so that one operator can give all the statistics of a head.
        self.own = (
            [self._own(*bound) for bound in itertools.pairwise(self.starts)] if reduction.given is not None else []
        )

    def _part(self, k: int) -> Any:
        z: Any = self.builder.proxy(self.members[k].node)
        for _, row_map in self.value.rows:
            z = row_map(z, self.members[k].vocab)
        if self.value.class_dim != self.value.fake.dim() - 1:
            z = z.movedim(self.value.class_dim, -1)
        return self._steps(z, slice(self.starts[k], self.starts[k + 1]))

    def _own(self, start: int, stop: int) -> tuple[Any, Any]:
        """Where the target is one of these classes, and which of them; some class elsewhere."""
        inside = self.target.ge(start) & self.target.lt(stop)
        return inside, self.builder.call(torch.where, inside, self.target - start, 0).unsqueeze(-1)

    @property
    def given(self) -> Any:
        assert self.reduction.given is not None
        t = self.builder.proxy(self.reduction.given)
        # A gather has an index with one class, in the logits' rank.
        return t.squeeze(self.value.class_dim) if fake(self.reduction.given).dim() == self.value.fake.dim() else t

    def in_rows(self, flat: Any) -> Any:
        return flat

    @functools.cached_property
    def lse(self) -> Any:
        parts = [z.logsumexp(-1) for z in self.parts]
        return functools.reduce(lambda a, b: self.builder.call(torch.logaddexp, a, b), parts)

    @functools.cached_property
    def target_logit(self) -> Any:
        result: Any = None
        for z, (inside, own) in zip(self.parts, self.own, strict=True):
            entry = z.gather(-1, own).squeeze(-1)
            result = entry if result is None else self.builder.call(torch.where, inside, entry, result)
        return result

    @functools.cached_property
    def logit_sum(self) -> Any:
        return functools.reduce(lambda a, b: a + b, [z.sum(-1) for z in self.parts])


class _Stacked(_Members):
    """(rows,): the rows of one head behind those of the other, and then in the order in which they are read."""

    def __init__(self, builder: Builder, reduction: Reduction):
        super().__init__(builder, reduction)
        for node, _ in self.value.rows:
            op = nodes.read(node)
            if op is None or not op.has(Fact.EACH_ONCE) or _reads_a_tensor(op):
                raise Refused("stacked logits are indexed or expanded", "index the hidden states")
        rows = [member.fake.numel() // member.vocab for member in self.members]
        starts = [0, *itertools.accumulate(rows)]
        bounds = list(itertools.pairwise(starts))
        try:
            place = self._places([torch.arange(*bound) for bound in bounds], torch.stack, torch.cat)
        except (TypeError, RuntimeError) as error:  # a number that the graph computes
            raise Refused("rows of stacked logits are chosen by a computed number", "compute a loss of each") from error
        used = [k for k, (start, stop) in enumerate(bounds) if ((place >= start) & (place < stop)).any()]
        if not used:
            raise Refused("no row is left of stacked logits", "leave the loss out")
        first, last = used[0], used[-1] + 1
        self.members, self.counts = self.members[first:last], rows[first:last]
        self.lead = tuple(place.shape)
        # Where each row that is read stands among those that are computed; None where that is where it stands anyway.
        self.place: Any = None
        if not torch.equal(place.flatten(), torch.arange(starts[first], starts[last])):
            numbers = [
                builder.call(torch.arange, start - starts[first], stop - starts[first], device=self.value.fake.device)
                for start, stop in bounds
            ]
            self.place = self._places(numbers, *(functools.partial(builder.call, f) for f in (torch.stack, torch.cat)))
            self.place = self.place.reshape(-1)
        self.parts = [self._part(k) for k in range(len(self.members))]
        self.own = self._targets() if reduction.given is not None else []

    def _targets(self) -> list[Any]:
        """The targets of the rows of each head; those that are not read have some class."""
        target = self.target
        if self.place is not None:
            target = target.new_zeros((sum(self.counts),)).scatter(0, self.place, target)
        if len(self.counts) == 1:
            return [target.unsqueeze(-1)]
        starts = itertools.accumulate(self.counts, initial=0)
        return [target.narrow(0, start, n).unsqueeze(-1) for start, n in zip(starts, self.counts, strict=False)]

    def _places(self, numbers: list[Any], stack: Callable, cat: Callable) -> Any:
        """The number of each row that is read, in the rows' shape. `numbers` are those of the members' rows."""
        pieces = []
        for n, member in zip(numbers, self.value.members, strict=True):
            shape = list(member.fake.shape)
            shape[member.class_dim] = 1
            pieces.append(n.view(shape))
        head = _several(self.value)
        place = (stack if head.stacked else cat)(pieces, head.stacked_at)
        for _, row_map in self.value.rows:
            place = row_map(place, 1)
        return place.squeeze(self.value.class_dim)

    def _part(self, k: int) -> Any:
        member = self.members[k]
        z: Any = self.builder.proxy(member.node)
        if member.class_dim != member.fake.dim() - 1:
            z = z.movedim(member.class_dim, -1)
        z = z.flatten(0, -2) if member.fake.dim() > 2 else z if member.fake.dim() == 2 else z.unsqueeze(0)
        return self._steps(z, slice(None))

    def _ordered(self, parts: list[Any]) -> Any:
        every = parts[0] if len(parts) == 1 else self.builder.call(torch.cat, parts)
        return every if self.place is None else every[self.place]

    @property
    def given(self) -> Any:
        assert self.reduction.given is not None
        return self.builder.proxy(self.reduction.given).reshape(-1)

    def in_rows(self, flat: Any) -> Any:
        return flat.reshape(self.lead)

    @functools.cached_property
    def lse(self) -> Any:
        return self._ordered([z.logsumexp(-1) for z in self.parts])

    @functools.cached_property
    def target_logit(self) -> Any:
        return self._ordered([z.gather(-1, own).squeeze(-1) for z, own in zip(self.parts, self.own, strict=True)])

    @functools.cached_property
    def logit_sum(self) -> Any:
        return self._ordered([z.sum(-1) for z in self.parts])


def _reads_a_tensor(op: nodes.Op) -> bool:
    """Whether an index is made of tensors, which may name a row twice."""
    index = op.args.get("index")
    return any(isinstance(i, (Node, list)) for i in (index if isinstance(index, tuple) else (index,)))
