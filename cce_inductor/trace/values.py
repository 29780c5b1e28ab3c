"""What the trace knows of a node that is made from a head's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.fakes import example, fake, same
from ..graph.refusal import Refused
from .affine import IDENTITY, Affine, Columns, Factor, Range, Scale


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
class Labels:
    """Labels of the rows and of the classes: a row's logits leave out the classes that share its label.

    rows: one for each row, 1 wide where the classes are. classes: (V,)-like. start: how many of `Value.rows` had been
    applied by then.
    """

    rows: Node
    classes: Node
    start: int


@dataclass(frozen=True)
class Edit:
    """Another entry at the target of each row (`margins`), or one of its own in front of the others.

    target: the classes, or what they are a view of. classes, entry: the class of each row and its entry, 1 wide
    where the classes are; no target and no classes where it stands in front. logits: the last node of logits.
    start: how many of `Value.rows` there were where the entry was put in, which `classes` and `entry` are in front of.
    order: `Value.order` there. partial: whether rows may have no such class, and some other in `classes`: those that
    the loss ignores. filled: what is in the place of the classes that `Value.labels` leaves out, and how many they are
    in each row, both 1 wide as well; None where that is -inf.
    """

    target: Node | Diagonal | None
    classes: Node | None
    entry: Node
    logits: Node
    start: int
    order: Node | None
    partial: bool = False
    filled: tuple[Node, Node] | None = None


@dataclass(frozen=True)
class Value:
    """A tensor made from a head's logits: rows rearranged, values through an affine map and perhaps a softcap.

    class_dim: where the classes are. function: of the logits that `affine` describes. picked: the class (the node
    of a tensor with one for each row) of the only entry that is not 0, or what it was multiplied with over all
    classes, or None. columns, masks: of the vocabulary. terms: of the rows. rows: what happened to the leading
    dimensions. order: the last node that changed which rows there are, or their order; None if none did. edit: of the
    entry at the target. without: the class of each row that is left out. labels: of those that are left out. rounded:
    cast to a dtype narrower than the head's. arithmetic: the dtype of each result on the way from the head's.
    """

    head: Head | SeveralHeads
    node: Node
    class_dim: int
    function: Function = Function()
    affine: Affine = IDENTITY
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
    labels: Labels | None = None
    # How eager computed the values, for deferred logits: ops in order, and tensors they read besides the head's: of the
    # classes, or of the rows, 1 wide. The first `plain` of them gave logits still.
    steps: tuple[Step, ...] = field(default=(), compare=False)
    plain: int = field(default=0, compare=False)
    extra: tuple[Node | Scale, ...] = ()

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
    def whole(self) -> bool:
        """Whether these are logits, with all entries as they were."""
        return self.kind == "logits" and self.picked is None and self.edit is None and self.labels is None

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
    def has_diagonal(self) -> bool:
        """Whether it is a matrix with a class of its own number for every row."""
        if self.fake.dim() != 2:
            return False
        rows, classes = *self.lead_shape, self.vocab
        if isinstance(rows, int) and isinstance(classes, int):
            return rows <= classes
        return bool(same(rows, classes)) and not self.members

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
            self.labels,
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
class Diagonal:
    """Class indices that no tensor holds: 0, 1, 2, ... for the rows of (N, M) logits, N <= M."""


# A one-hot tensor: a number, the tensors that it is multiplied with or divided by (of one element, or one for each
# row), and the class indices in any shape.
OneHot = tuple[float, tuple[Factor, ...], Node | Diagonal]


@dataclass(frozen=True)
class Mixture:
    """A tensor of the logits' shape: a constant, and a sum of one-hot tensors.

    source: the logits that it was multiplied with, if it was.
    """

    terms: tuple[OneHot, ...]
    constant: float
    source: Value | None = None

    def times(self, number: float) -> Mixture:
        terms = tuple((factor * number, weights, target) for factor, weights, target in self.terms)
        return replace(self, terms=terms, constant=self.constant * number)

    def plus(self, number: float) -> Mixture:
        return replace(self, constant=self.constant + number)
