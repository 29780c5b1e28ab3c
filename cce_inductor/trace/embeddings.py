"""Expected embeddings, ``softmax(z) @ matrix``, as a loss over costs reads them (EMO, arXiv 2310.04691).

Multiplied with one vector t for each row and summed over the width, such an embedding is the expected value of another
head's logits: of ``t @ matrix.T``. That head is put into the graph in front of the sum, and followed like the program's
own. Where the vectors are the rows of a matrix for the targets, written as a product with a one-hot tensor, they are
looked up instead. Any other use of an expected embedding needs all probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..graph import nodes
from ..graph.builder import Builder, Proxy
from ..graph.fakes import example, fake, is_number, is_tensor, same
from ..graph.nodes import Op
from ..graph.refusal import Refused
from .decompose import in_dtype_of, in_shape
from .functions import comparable, of_two
from .one_hot import coefficient, mixture
from .reductions import over_rows
from .trace import Trace
from .values import Diagonal, Mixture, Value
from .walk import Walk


@dataclass(frozen=True)
class Weights:
    """A softmax, less its own entry at a class of each row, which is another node's value, detached perhaps."""

    node: Node
    softmax: Value
    less: Value
    traces: tuple[Trace, ...]
    what = "probabilities of which the target's is taken out"


@dataclass(frozen=True)
class Embedding:
    """factor · probabilities @ matrix, (..., D'), and the tensor of the same shape that it was multiplied with, if any.

    matrix: (V, D'), or (D', V) if `transposed`.
    """

    node: Node
    softmax: Value
    less: Value | None
    matrix: Node
    transposed: bool
    traces: tuple[Trace, ...]
    factor: float = 1.0
    vectors: Node | None = None
    what = "an expected embedding"


def follows(walk: Walk, node: Node, op: Op | None, touched: list[Node]) -> bool:
    """Whether a node is made of an expected embedding, which is then noted; Refused if there is no rule for it."""
    known = [walk.sums.get(n) for n in touched]
    if not any(isinstance(k, (Weights, Embedding)) for k in known):
        made = _begins(walk, node, op, touched)
        if made is None:
            return False
        walk.put_sum(node, made)
        return True
    # What it is multiplied with is a product with a matrix as well, and may be read as logits.
    plain = [n for n, k in zip(touched, known, strict=True) if k is None and walk.values[n].values[0].kind == "logits"]
    if op is not None and not op.inplace and len(touched) == 1 + len(plain):
        source, given = next((n, k) for n, k in zip(touched, known, strict=True) if k is not None)
        if isinstance(given, Weights) and (embedding := _product(walk, node, op, source)) is not None:
            walk.put_sum(node, embedding)
            return True
        if isinstance(given, Embedding) and _used(walk, node, op, given):
            return True
    words = next(k.what for k in known if isinstance(k, (Weights, Embedding)))
    raise Refused(
        f"{nodes.describe(node)} of {words}: it needs every probability", "multiply it with a vector for each row"
    )


def _begins(walk: Walk, node: Node, op: Op | None, touched: list[Node]) -> Weights | Embedding | None:
    if op is None or op.inplace or not all(n in walk.values for n in touched):
        return None
    if op.name == "sub" and len(touched) == 2 and op.args["alpha"] == 1:
        a, b = (walk.values[n].values[0] for n in (op.args["input"], op.args["other"]))
        plain = a.kind == b.kind == "softmax" and a.factor == b.factor == 1.0 and a.picked is None
        if plain and _target(b) is not None and (a.source, a.affine) == (b.source, b.affine):
            return Weights(node, a, b, tuple(walk.values[touched[0]].trace.with_parts))
    return _product(walk, node, op, touched[0]) if len(touched) == 1 else None


def _target(value: Value) -> Node | Diagonal | None:
    """The class of each row that is all that is left of a softmax; None where it is another part."""
    if isinstance(value.picked, Mixture):
        terms = value.picked.terms
        alone = len(terms) == 1 and terms[0][:2] == (1.0, ()) and not value.picked.constant
        return terms[0][2] if alone else None
    return value.picked


def _product(walk: Walk, node: Node, op: Op, source: Node) -> Embedding | None:
    """Probabilities times a matrix."""
    matrix = op.args.get("other" if op.name == "matmul" else "weight")
    if op.name not in ("matmul", "linear") or op.args["input"] is not source or op.args.get("bias") is not None:
        return None
    known = walk.sums.get(source)
    value = known.softmax if isinstance(known, Weights) else walk.values[source].values[0]
    if value.kind != "softmax" or value.factor != 1.0 or value.picked is not None or value.members:
        return None
    transposed = op.name == "linear"
    if not is_tensor(matrix) or fake(matrix).dim() != 2 or value.class_dim != value.fake.dim() - 1:
        return None
    if not same(fake(matrix).shape[transposed], value.vocab):
        return None
    comparable(value)
    traces = tuple(walk.values[value.node].trace.with_parts)
    return Embedding(node, value, known.less if isinstance(known, Weights) else None, matrix, transposed, traces)


def _used(walk: Walk, node: Node, op: Op, given: Embedding) -> bool:
    """What is done to an expected embedding; False if there is no rule for it."""
    if op.name == "cast" and fake(node).dtype in (torch.float32, fake(given.node).dtype):
        walk.put_sum(node, replace(given, node=node))
    elif op.name == "mul":
        other = op.args["other"] if op.args["input"] is given.node else op.args["input"]
        if is_number(other):
            walk.put_sum(node, replace(given, node=node, factor=given.factor * other))
        elif is_tensor(other) and given.vectors is None and fake(other).shape == fake(given.node).shape:
            walk.put_sum(node, replace(given, node=node, vectors=other))
        else:
            return False
    elif op.name == "sum" and given.vectors is not None and fake(node).shape[:-1] == fake(given.node).shape[:-2]:
        width = replace(given.softmax, node=given.node, class_dim=fake(given.node).dim() - 1)
        shape = over_rows(width, op.args["dim"], bool(op.args["keepdim"]), False)
        walk.decompose(node, given.traces, lambda b: in_dtype_of(shape(_expected(b, given)), node))
    else:
        return False
    return True


def _expected(builder: Builder, given: Embedding) -> Any:
    """The sum over the width, in the leading shape of the logits."""
    assert given.vectors is not None
    value, matrix = given.softmax, builder.proxy(given.matrix)
    vectors = in_dtype_of(_vectors(builder, given.vectors, value), given.matrix)
    if given.transposed:
        matrix = matrix.t()
    r = builder.call(F.linear, vectors, matrix)
    p, c = builder.proxy(value.node), value.class_dim
    result: Any = builder.call(of_two, r, p, "expected", c)
    if given.less is not None:
        target = _target(given.less)
        assert target is not None
        classes = in_shape(builder, target, p, value)
        entry = p.gather(c, classes).squeeze(c)
        entry = entry if given.less.fake.requires_grad else entry.detach()
        cost = (builder.call(F.embedding, classes.squeeze(c), matrix) * vectors).sum(-1)
        result = result - entry * cost
    return result if given.factor == 1.0 else result * given.factor


def _vectors(builder: Builder, node: Node, value: Value) -> Proxy:
    """A tensor of one vector for each row; a product of one-hot tensors with a matrix is rows of that."""
    source: Any = node
    while (op := nodes.read(source)) is not None and op.name == "cast" and fake(source).is_floating_point():
        source = op.args["input"]
    if op is None or op.name != "matmul" or op.inplace or not is_tensor(op.args["other"]):
        return builder.proxy(node)
    found = mixture(op.args["input"], value)
    if found is None or fake(op.args["other"]).dim() != 2:
        return builder.proxy(node)
    return _rows(builder, found, op.args["other"], value)


def _rows(builder: Builder, mixed: Mixture, matrix: Node, value: Value) -> Any:
    p, m, c = builder.proxy(value.node), builder.proxy(matrix), value.class_dim
    total: Any = None
    for term in mixed.terms:
        rows = builder.call(F.embedding, in_shape(builder, term[2], p, value).squeeze(c), m)
        factor = coefficient(builder, term, c)
        of_rows = isinstance(factor, torch.fx.Proxy) and example(factor.node).dim() > 0
        rows = rows * (factor.unsqueeze(c) if of_rows else factor)
        total = rows if total is None else total + rows
    return total + m.sum(0) * mixed.constant if mixed.constant else total
