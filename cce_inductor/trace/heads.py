"""Which nodes are heads: products of hidden states with one matrix whose rows are the classes.

`HEADS` give the `Value`s of a node's result, one for each way to read it: a product of two matrices has its classes in
its columns, and as well in its rows. A rule that cannot take a node raises `Refused` with the reason and the cure.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import compat
from ..config import Settings
from ..graph import nodes
from ..graph.facts import Fact
from ..graph.fakes import example, fake, is_tensor, same
from ..graph.memory import storages, written
from ..graph.refusal import Refusal, Refused
from .affine import Affine, Shift
from .shapes import is_vocabulary_vector
from .values import Head, RowMap, SeveralHeads, Value

# Linear layers inside a model (an MLP of four times the width) look like heads otherwise.
_WIDENING = 4
# Bytes of deferred logits from which on it pays not to compute them for what they are read for, on every device.
LARGE_LOGITS = 64 << 20


def large(vocab: int | torch.SymInt, width: int | torch.SymInt, settings: Settings) -> bool:
    """Whether a head is over a vocabulary. By what symbolic sizes were at capture, without a guard."""
    classes = compat.size_hint(vocab)
    return classes >= settings.min_vocab and classes > _WIDENING * compat.size_hint(width)


def worth_deferring(bytes: int) -> bool:
    """Whether logits of that size are worth more steps to do without them. What scratch may take does not count."""
    return bytes > LARGE_LOGITS


def subclassed(head: Head | SeveralHeads) -> Refusal | None:
    """Why a head is left alone whose operands are other than plain tensors."""
    weights = head.weights()
    for node in dict.fromkeys([*weights, *head.operands()]):
        made: Any = fake(node)
        if is_traceable_wrapper_subclass(made):
            kind, placements = type(made).__name__, getattr(made, "placements", ())
            if node in weights and any(placement.is_shard() for placement in placements):
                reason = f"a tensor-parallel head: its weight is a {kind} that is split over ranks"
                return Refusal(node, reason, "compile the head with its loss, on a mesh of one dimension")
            return Refusal(node, f"an operand of the head is a {kind}", "give the head plain tensors")
    return None


def _value(
    node: Node,
    x: Node,
    w: Node,
    bias: Any = None,
    transposed: bool = False,
    width_dim: int = -1,
    class_dim: int | None = None,
    row_map: RowMap | None = None,
) -> Value:
    """The value of a head; `row_map` brings `x` into the shape of the result, with D at `class_dim`."""
    if fake(w).dim() != 2 and not (fake(w).dim() > 2 and all(same(s, 1) for s in fake(w).shape[2:])):
        raise Refused(f"the head's weight has {fake(w).dim()} dimensions, not 2", "flatten the weight to (V, D)")
    if not fake(node).is_floating_point():
        raise Refused(f"the head computes in {fake(node).dtype}", "use a floating dtype")
    while fake(w).dim() == 2 and (source := _transpose_of(w)) is not None:
        w, transposed = source, not transposed
    if _are_marks(w):
        raise Refused("a product with zeros and ones: it picks columns or adds them up", "index with the classes")
    head = Head(node, x, w, bias, transposed, width_dim)
    class_dim = fake(node).dim() - 1 if class_dim is None else class_dim
    affine = Affine() if bias is None else Affine(shifts=(Shift(bias, 1.0),))
    rows = () if row_map is None else ((node, row_map),)
    return Value(head, node, class_dim, affine=affine, rows=rows)


def _are_marks(node: Node) -> bool:
    """Whether a tensor is made of truth values or class indices, as one-hot tensors are."""
    op = nodes.read(node)
    of = op.args["input"] if op is not None and op.name == "cast" else node
    return is_tensor(of) and fake(of).dtype in (torch.bool, torch.int64)


def _transpose_of(w: Node) -> Node | None:
    """The matrix that `w` is the transposed view of: heads may have that in common, each with a view of its own."""
    op = nodes.read(w)
    source = op.args.get("input") if op is not None and not op.inplace else None
    if op is None or not isinstance(source, Node) or not isinstance(made := example(source), Tensor) or made.dim() != 2:
        return None
    swaps = op.name == "t" or (op.name == "getattr" and op.args["name"] in ("T", "mT"))
    if op.name == "transpose":
        swaps = op.args["dim0"] % 2 != op.args["dim1"] % 2
    if op.name == "permute":
        dims = op.args["dims"][0] if isinstance(op.args["dims"][0], (tuple, list)) else op.args["dims"]
        swaps = [d % 2 for d in dims] == [1, 0]
    return source if swaps else None


def linear(node: Node, args: dict[str, Any]) -> list[Value]:
    x, w = args["input"], args["weight"]
    values = [_value(node, x, w, args["bias"])]
    if args["bias"] is None and fake(x).dim() == 2 and fake(w).dim() == 2:
        # F.linear(W, x): the classes are the rows.
        values.append(_value(node, w, x, class_dim=0, row_map=lambda h, _: h.t()))
    return values


def _stored_once(w: Any) -> Any:
    """The matrix that a batch of equal ones is an expanded view of, or `w` itself."""
    node = w
    while isinstance(node, Node) and isinstance(example(node), type(example(w))) and fake(node).dim() > 2:
        op = nodes.read(node)
        if op is None or op.inplace or not (op.has(Fact.REPEATS) or op.name in ("unsqueeze", "getitem")):
            return w
        base = op.args["input"]
        if op.name == "repeat" and (op.args["sizes"][-2:] != (1, 1) or written(base.graph.nodes, storages(base))):
            return w
        if op.name in ("unsqueeze", "getitem") and fake(node).dim() != fake(base).dim() + 1:
            return w
        if op.name == "unsqueeze" and op.args["dim"] % fake(node).dim() != 0:
            return w
        if op.name == "getitem" and op.args["index"] not in (None, (None,), (None, Ellipsis)):
            return w
        if not all(same(a, b) for a, b in zip(fake(node).shape[-2:], fake(base).shape[-2:], strict=False)):
            return w
        node = base
    return node


def matmul(node: Node, args: dict[str, Any]) -> list[Value]:
    x, w = args["input"], args["other"]
    if fake(w).dim() > 2:
        w = _stored_once(w)
    whole = fake(x).dim() == fake(node).dim()
    values = [_value(node, x, w, None, True)] if fake(w).dim() == 2 and whole else []
    if fake(x).dim() == 2:
        # W @ x.T, for one matrix, a batch of them or a vector: the classes are where W's rows go.
        h, rank = args["other"], fake(args["other"]).dim()
        at = max(rank - 2, 0)
        values.append(_value(node, h, x, None, False, at, at, lambda h, _: h))
    if not values:
        raise Refused(f"the head's weight has {fake(w).dim()} dimensions, not 2", "flatten the weight to (V, D)")
    return values


def addmm(node: Node, args: dict[str, Any]) -> list[Value]:
    w, bias, beta, alpha = _stored_once(args["other"]), args["bias"], args["beta"], args["alpha"]
    if not is_vocabulary_vector(fake(bias), fake(node), fake(node).dim() - 1):
        raise Refused("addmm adds a matrix, not one bias per class", "add a (V,) bias")
    if (beta, alpha) == (1, 1):
        return [_value(node, args["input"], w, bias, True)]
    if not all(isinstance(f, (int, float)) for f in (beta, alpha)):
        raise Refused("addmm with a computed beta or alpha", "use Python numbers")

    if beta == 0:
        raise Refused("addmm with beta=0, which does not read its bias", "use matmul")

    def step(z: Tensor, extra: list[Tensor]) -> Tensor:
        return alpha * z + beta * extra[0].reshape(-1)

    affine = Affine(scale=float(alpha), shifts=(Shift(bias, float(beta)),))
    return [replace(_value(node, args["input"], w, None, True), affine=affine, steps=(step,), plain=1, extra=(bias,))]


def inner(node: Node, args: dict[str, Any]) -> list[Value]:
    x, w = args["input"], args["other"]
    values = [_value(node, x, w)] if fake(w).dim() == 2 else []
    if fake(x).dim() == 2:
        values.append(_value(node, w, x, class_dim=0, row_map=lambda h, _: h.movedim(-1, 0)))
    if not values:
        raise Refused(f"the head's weight has {fake(w).dim()} dimensions, not 2", "flatten the weight to (V, D)")
    return values


def _contraction(node: Node, x: Node, w: Node, x_labels: str, w_labels: str, out: str) -> list[Value]:
    """x (labels) times w (two labels) into out: one label of w is contracted, the other one is the classes."""
    shared = [c for c in w_labels if c in x_labels]
    classes = [c for c in w_labels if c not in x_labels]
    if len(w_labels) != 2 or len(set(x_labels)) != len(x_labels) or len(shared) != 1 or len(classes) != 1:
        raise Refused("a contraction that is no product with one matrix", "use F.linear for the head")
    d, v = shared[0], classes[0]
    if d in out or sorted(out) != sorted(x_labels.replace(d, v)):
        raise Refused("a contraction that sums over more than the hidden dimension", "use F.linear for the head")
    order = [x_labels.index(d if c == v else c) for c in out]

    def to_output(h: Any, _: Any) -> Any:
        return h if order == sorted(order) else h.permute(*order)

    return [_value(node, x, w, None, w_labels[0] == d, x_labels.index(d), out.index(v), to_output)]


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _subscripts(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The labels of every operand and of the result, with ellipses and a missing result spelled out."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    free = [c for c in LETTERS if c not in equation]
    hidden = [rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True) if "..." in t]
    longest = max(hidden, default=0)
    dots = "".join(free[:longest])
    labels = []
    for term, rank in zip(terms, ranks, strict=True):
        count = rank - len(term.replace("...", ""))
        labels.append(term.replace("...", dots[longest - count :] if count else ""))
    if not arrow:
        every = "".join(labels)
        out = ("..." if longest else "") + "".join(sorted(c for c in set(every) - set(dots) if every.count(c) == 1))
    return labels, out.replace("...", dots)


def einsum(node: Node, args: dict[str, Any]) -> list[Value]:
    operands = args["operands"]
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    if not isinstance(args["equation"], str) or len(operands) != 2 or not all(isinstance(o, Node) for o in operands):
        raise Refused("an einsum of other than two tensors by an equation", "use F.linear for the head")
    return _contractions(node, operands, *_subscripts(args["equation"], [fake(o).dim() for o in operands]))


def _contractions(node: Node, operands: Sequence[Node], labels: Sequence[str], out: str) -> list[Value]:
    """A contraction of two tensors, either of which may be the weight."""
    values, refused = [], None
    for i, j in ((0, 1), (1, 0)):
        try:
            values += _contraction(node, operands[i], operands[j], labels[i], labels[j], out)
        except Refused as error:
            refused = refused or error
    if not values:
        assert refused is not None
        raise refused
    return values


def tensordot(node: Node, args: dict[str, Any]) -> list[Value]:
    x, w, dims = args["input"], args["other"], args["dims"]
    a, b = ([-1], [0]) if dims == 1 else dims if isinstance(dims, (list, tuple)) else ([], [])
    a, b = ([d] if isinstance(d, int) else list(d) for d in (a, b))
    if len(a) != 1 or len(b) != 1 or not all(isinstance(d, int) for d in (*a, *b)):
        raise Refused("a tensordot over other than one dimension", "use F.linear for the head")
    x_labels, w_labels = LETTERS[: fake(x).dim()], list(LETTERS[-fake(w).dim() :])
    w_labels[b[0]] = x_labels[a[0]]
    out = "".join(c for c in (*x_labels, *w_labels) if c != x_labels[a[0]])
    return _contractions(node, [x, w], [x_labels, "".join(w_labels)], out)


def convolution(node: Node, args: dict[str, Any]) -> list[Value]:
    x, w = args["input"], args["weight"]
    if not all(same(s, 1) for s in fake(w).shape[2:]):
        raise Refused("a convolution with a kernel of more than one point", "there is no fused form of it")

    def all_are(name: str, value: int) -> bool:
        given = args[name]
        return all(g == value for g in (given if isinstance(given, (list, tuple)) else (given,)))

    if args["groups"] != 1 or not (all_are("stride", 1) and all_are("padding", 0)):
        raise Refused("a convolution in groups, with a stride or with padding", "there is no fused form of it")
    rank = fake(node).dim()
    if fake(w).dim() != rank:
        raise Refused("a convolution without a batch dimension", "give it one")
    return [_value(node, x, w, args["bias"], False, 1, 1, lambda h, _: h)]
