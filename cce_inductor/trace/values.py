"""What the trace knows of a node that is made from a head's logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.fakes import example, fake
from ..graph.refusal import Refused


@dataclass(frozen=True)
class Head:
    """A linear map onto the vocabulary: logits = input @ weight.T + bias.

    weight: a node of shape (V, D), or (D, V) if `transposed`, as in ``x @ w``, or (V, D, 1, ...) of a convolution with
    a kernel of one point. bias: a (V,)-like node or None. width_dim: the dimension of `input` that is contracted.
    product_dtype: what it was computed in, where that is not the dtype of `node`.
    """

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    transposed: bool
    width_dim: int = -1
    product_dtype: torch.dtype | None = None

    @property
    def terms(self) -> tuple[tuple[float, Value], ...]:
        """The logits that these are made of, each with its factor; none of a single head."""
        return ()

    @property
    def dtype(self) -> torch.dtype:
        """What the logits were computed in: under autocast not the dtype of the operands."""
        return self.product_dtype or fake(self.node).dtype

    @property
    def vocab(self) -> Any:
        """V, an int or a SymInt."""
        return fake(self.weight).shape[1 if self.transposed else 0]

    @property
    def width(self) -> Any:
        return fake(self.input).shape[self.width_dim]

    def operands(self) -> list[Node]:
        return [n for n in (self.input, self.weight, self.bias) if n is not None]

    def weights(self) -> list[Node]:
        return [self.weight]

    def matrix(self, weight: Any) -> Any:
        """The (V, D) matrix from what `weight` gives, a tensor or a proxy: a view."""
        if fake(self.weight).dim() > 2:
            return weight.flatten(1)
        return weight.t() if self.transposed else weight


@dataclass(frozen=True)
class SumOfHeads(Head):
    """Several heads whose sum is one product (`merge_heads`). node: where their logits were added up."""

    parts: tuple[tuple[float, Value], ...] = ()

    @property
    def terms(self) -> tuple[tuple[float, Value], ...]:
        return self.parts


@dataclass(frozen=True)
class SeveralHeads:
    """Logits of several heads in one tensor, which is read by the statistics of each (`decompose`).

    They are concatenated over the classes, or, along dimension `stacked_at`, put together by stack (`stacked`) or cat.
    node: where they were put together.
    """

    node: Node
    members: tuple[Value, ...]
    stacked_at: int | None = None
    stacked: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.members[0].head.dtype

    @property
    def vocab(self) -> Any:
        """V, an int or a SymInt: of all of them where they are concatenated over the classes."""
        counts = [member.vocab for member in self.members]
        return sum(counts[1:], counts[0]) if self.stacked_at is None else counts[0]

    @property
    def width(self) -> Any:
        return self.members[0].head.width

    @property
    def terms(self) -> tuple[tuple[float, Value], ...]:
        return tuple((1.0, member) for member in self.members)

    def operands(self) -> list[Node]:
        return [n for member in self.members for n in member.head.operands()]

    def weights(self) -> list[Node]:
        return [n for member in self.members for n in member.head.weights()]


Range = tuple[Any, Any, Any]  # start, stop and step of a slice


@dataclass(frozen=True)
class Listed:
    """Classes by their indices: a (K,) node, or numbers."""

    indices: Node | tuple[int, ...]


Columns = tuple[Range | Listed, ...]  # parts taken of the vocabulary, one after the other


@dataclass(frozen=True)
class Factor:
    """A tensor of one element that logits are multiplied with, or divided by."""

    node: Node
    divides: bool = False


@dataclass(frozen=True)
class Scale:
    """A factor for each class, or for each row, that logits are multiplied with or divided by: the tensor of `node`.

    of_rows: whether it is of rows: 1 wide where the classes were. columns: what was taken of the vocabulary after it.
    start: how many of `Value.rows` had been applied to the logits by then; the others apply to it as well. class_dim:
    where the classes were then. expanded: whether several rows share a number.
    """

    node: Node
    divides: bool
    of_rows: bool
    columns: Columns = ()
    start: int = 0
    class_dim: int = -1
    expanded: bool = False


@dataclass(frozen=True)
class Shift:
    """A bias over the vocabulary: the tensor of `node`, flattened to (V,), times `factor` and `factors`.

    A tensor of one element is added to every class. columns: what was taken of the vocabulary after it was added.
    """

    node: Node
    factor: float
    factors: tuple[Factor | Scale, ...] = ()
    columns: Columns = ()


@dataclass(frozen=True)
class Mask:
    """Columns whose logits are replaced by `fill`: where `node`, (V,)-like and bool, is true, or a range of them."""

    node: Node | None
    range: Range | None
    fill: float
    columns: Columns = ()
    vocab: Any = field(default=None, compare=False)  # of the logits when they were masked


@dataclass(frozen=True)
class Term:
    """A number for each row that was added to all its logits: the tensor of `node`, 1 wide, times `factor`.

    start: how many of `Value.rows` had been applied to the logits by then; the others apply to it as well.
    """

    node: Node
    factor: float
    start: int


# (hidden, D) -> hidden, on FX proxies: does to the hidden states what an op did to the logits' leading dimensions.
RowMap = Callable[[Any, Any], Any]
# One op on values, with the class dimension last; the list holds the tensors of `Value.extra`.
Step = Callable[[Tensor, list[Tensor]], Tensor]


@dataclass(frozen=True)
class Affine:
    """How logits come from a = input @ weight.T: s and `post` only if `capped`.

    z = post * s(rows * (scale * factors * columns * a + sum of shifts) + inner) + offset, s(t) = tanh(t), or
    t / sqrt(1 + t²) for the form "rsqrt" (ops/softcap.py). `rows` and `columns` are the products of the `scales`.
    """

    scale: float = 1.0
    factors: tuple[Factor, ...] = ()
    scales: tuple[Scale, ...] = ()
    shifts: tuple[Shift, ...] = ()
    inner: float = 0.0
    capped: bool = False
    form: str = "tanh"
    post: float = 1.0
    offset: float = 0.0

    def scaled(self, factor: float) -> Affine:
        if self.capped:
            return replace(self, post=self.post * factor, offset=self.offset * factor)
        shifts = tuple(replace(s, factor=s.factor * factor) for s in self.shifts)
        return replace(self, scale=self.scale * factor, shifts=shifts, inner=self.inner * factor)

    def times(self, factor: Factor) -> Affine:
        """Scaled by a tensor; only without a softcap, and a constant has to be a bias before it."""
        shifts = tuple(replace(s, factors=(*s.factors, factor)) for s in self.shifts)
        return replace(self, factors=(*self.factors, factor), shifts=shifts)

    def scaled_along(self, factor: Scale) -> Affine:
        """Scaled by a factor for each class or row, under the same conditions."""
        shifts = self.shifts
        if not factor.of_rows:
            shifts = tuple(replace(s, factors=(*s.factors, factor)) for s in shifts)
        return replace(self, scales=(*self.scales, factor), shifts=shifts)

    @property
    def of_rows(self) -> bool:
        """Whether there is a factor for each row."""
        return any(s.of_rows for s in self.scales)

    @property
    def nodes(self) -> list[Node]:
        """The tensors that the logits were computed with."""
        of_shifts = [n for s in self.shifts for n in (s.node, *(f.node for f in s.factors))]
        return [*of_shifts, *(f.node for f in self.factors), *(s.node for s in self.scales)]

    def plus(self, constant: float) -> Affine:
        if self.capped:
            return replace(self, offset=self.offset + constant)
        return replace(self, inner=self.inner + constant)

    def multiple(self, other: Affine) -> float | None:
        """What `other`, without a softcap, is to be scaled by to be this, but for rounding; None if nothing does it."""
        if other.scale == 0:
            return None
        ratio = self.scale / other.scale
        scaled = other.scaled(ratio)
        if self._without_numbers() != scaled._without_numbers():
            return None
        numbers = zip(self._numbers(), scaled._numbers(), strict=True)
        return ratio if all(math.isclose(a, b, rel_tol=1e-12) for a, b in numbers) else None

    def _numbers(self) -> list[float]:
        return [self.inner, *(s.factor for s in self.shifts)]

    def _without_numbers(self) -> Affine:
        return replace(self, scale=1.0, inner=0.0, shifts=tuple(replace(s, factor=1.0) for s in self.shifts))

    def operator(self) -> tuple[float, float, tuple[Shift, ...], float]:
        """(scale, softcap, biases, constant bias) of the operator: cap * s(scale * (a + biases + constant) / cap).

        The constant is 0 without a softcap: there, as behind one, it is added to the statistics (`constant`).
        """
        scale = self.scale * self.post if self.capped else self.scale
        if scale == 0:
            raise Refused("logits multiplied by zero", "drop the loss: it is a constant")
        shifts = tuple(replace(s, factor=s.factor / self.scale) for s in self.shifts)
        return scale, abs(self.post) if self.capped else 0.0, shifts, self.inner / self.scale if self.capped else 0.0

    @property
    def constant(self) -> float:
        """What the logits are larger than the operator's by."""
        return self.offset if self.capped else self.inner


SQUARES = ("square", "root", "inverse root")
# What a person calls each kind of function of the logits.
WORDS = {
    "logits": "logits",
    "log_softmax": "log-probabilities",
    "softmax": "probabilities",
    "exp": "exponentials of the logits",
    "p log p": "terms of the entropy",
    "p z": "probabilities times the logits",
    "comparison": "comparisons of the logits",
    **dict.fromkeys(SQUARES, "square of the logits"),
}


@dataclass(frozen=True)
class Function:
    """Which function of the logits a value is, entry by entry: `kind`, one of `WORDS`, times `factor`.

    "p log p" and "p z" are the softmax times its logarithm or the logits. The factor of the logits themselves is in
    their `Affine`.
    """

    kind: str = "logits"
    factor: float = 1.0


@dataclass(frozen=True)
class Square(Function):
    """k z² + c of the logits z, or by its kind the root of it, or one over that root."""

    kind: str = "square"
    k: float = 1.0
    c: float = 0.0


@dataclass(frozen=True)
class Comparison(Function):
    """True or 1 where a logit passes a comparison with one number of its row: `name` is gt, ge, lt or le.

    node: the numbers, 1 wide. target: where those are logits of these very rows, the node of their classes; else None.
    wraps: whether a negative class counts from the end. read: the node that read the numbers, or those logits.
    class_dim: where the classes were then. start: how many of `Value.rows` had been applied.
    """

    kind: str = "comparison"
    _: KW_ONLY
    name: str
    node: Node
    target: Node | None
    wraps: bool
    read: Node
    class_dim: int
    start: int


@dataclass(frozen=True)
class Edit:
    """Another entry at the target of each row (`margins`).

    target: the tensor that the classes are a view of. classes, entry: the class of each row and its entry, nodes, 1
    wide where the classes are. logits: the last node of logits. start: how many of `Value.rows` there were where the
    entry was put in, which `classes` and `entry` are in front of. order: `Value.order` there.
    """

    target: Node
    classes: Node
    entry: Node
    logits: Node
    start: int
    order: Node | None


@dataclass(frozen=True)
class Value:
    """A tensor made from a head's logits: rows rearranged, values through an affine map and perhaps a softcap.

    class_dim: where the classes are. function: of the logits that `affine` describes. picked: the class (the node
    of a tensor with one for each row) of the only entry that is not 0, or what it was multiplied with over all
    classes, or None. columns, masks: of the vocabulary. terms: of the rows. rows: what happened to the leading
    dimensions. order: the last node that changed which rows there are, or their order; None if none did. edit: of the
    entry at the target. without: the class of each row that is left out. rounded:
    cast to a dtype narrower than the head's. arithmetic: the dtype of each result on the way from the head's.
    """

    head: Head | SeveralHeads
    node: Node
    class_dim: int
    function: Function = Function()
    affine: Affine = Affine()
    columns: Columns = ()
    masks: tuple[Mask, ...] = ()
    terms: tuple[Term, ...] = ()
    picked: Node | Mixture | None = None
    rounded: bool = False
    arithmetic: tuple[torch.dtype, ...] = field(default=(), compare=False)
    rows: tuple[tuple[Node, RowMap], ...] = ()
    order: Node | None = None
    edit: Edit | None = None
    without: Node | None = None
    # How eager computed the values, for deferred logits: ops in order, and tensors they read besides the head's. The
    # first `plain` of them gave logits still.
    steps: tuple[Step, ...] = field(default=(), compare=False)
    plain: int = field(default=0, compare=False)
    extra: tuple[Node, ...] = ()

    @property
    def fake(self) -> Tensor:
        return fake(self.node)

    @property
    def kind(self) -> str:
        return self.function.kind

    @property
    def factor(self) -> float:
        return self.function.factor

    @property
    def comparison(self) -> Comparison | None:
        return self.function if isinstance(self.function, Comparison) else None

    @property
    def members(self) -> tuple[Value, ...]:
        """The logits of several heads that it holds in one tensor; none of a single head's."""
        return self.head.members if isinstance(self.head, SeveralHeads) else ()

    @property
    def one(self) -> Head:
        """The head of logits of a single one."""
        assert isinstance(self.head, Head)
        return self.head

    @property
    def words(self) -> str:
        """What a person calls it."""
        return WORDS[self.kind]

    @property
    def vocab(self) -> Any:
        """How many classes are left of the head's, an int or a SymInt."""
        return self.fake.shape[self.class_dim]

    def operands(self) -> list[Node]:
        """The floating tensors that it is made of."""
        return [*self.head.operands(), *self.affine.nodes]

    @property
    def lead_shape(self) -> tuple:
        shape = tuple(self.fake.shape)
        return shape[: self.class_dim] + shape[self.class_dim + 1 :]

    @property
    def source(self) -> tuple:
        """Equal for values that are functions of the same rows of the same logits, a constant apart."""
        affine = self.affine
        return (
            self.head,
            self.order,
            *affine.operator(),
            affine.form,
            affine.factors,
            affine.scales,
            self.columns,
            self.masks,
        )

    def gains_gradient(self, node: Node) -> bool:
        """Whether a node that reads it has a gradient, where the logits have none though their operands do."""
        made = example(node)
        if self.fake.requires_grad or not isinstance(made, Tensor) or not made.requires_grad:
            return False
        return any(fake(n).requires_grad for n in self.operands())

    def at(self, node: Node, **changes: Any) -> Value:
        """The same at another node."""
        return replace(self, node=node, **changes)

    def then(self, node: Node, step: Step, **changes: Any) -> Value:
        """What one op on the entries gives."""
        function = changes.get("function", self.function)
        of_a_square = isinstance(function, Square) and function.kind == self.kind
        if "columns" not in changes and not of_a_square and not {"affine", "function"}.isdisjoint(changes):
            changes["arithmetic"] = (*self.arithmetic, fake(node).dtype)
        steps = (*self.steps, step)
        plain = len(steps) if function.kind == "logits" else self.plain
        return replace(self, node=node, steps=steps, plain=plain, **changes)

    def mapped(self, node: Node, row_map: RowMap, class_dim: int, order: Node | None = None) -> Value:
        """Rows rearranged; `order` is given where they are others now, or in another order."""
        rows = (*self.rows, (node, row_map))
        return replace(self, node=node, rows=rows, class_dim=class_dim, order=order or self.order)

    def need(self, kind: str, what: str, cure: str) -> None:
        """Refused for a value of another kind."""
        if self.kind in SQUARES and self.kind != kind:
            raise Refused("the square of the logits is read by itself", "compute it from the hidden states")
        if self.kind != kind or self.picked is not None:
            raise Refused(what, cure)


Args = dict[str, Any]


# ---- mixtures


@dataclass(frozen=True)
class Mixture:
    """A tensor of the logits' shape: a constant, and a sum of one-hot tensors.

    terms: for each of them a number, the tensors that it is multiplied with or divided by (of one element, or of one
    for each row), and the class indices, in any shape. source: the logits that it was multiplied with, if it was.
    """

    terms: tuple[tuple[float, tuple[Factor, ...], Node], ...]
    constant: float
    source: Value | None = None

    def times(self, number: float) -> Mixture:
        terms = tuple((factor * number, weights, target) for factor, weights, target in self.terms)
        return replace(self, terms=terms, constant=self.constant * number)

    def plus(self, number: float) -> Mixture:
        return replace(self, constant=self.constant + number)
