"""One-hot tensors over the classes, and mixtures of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..graph import memory, nodes
from ..graph.builder import Builder
from ..graph.facts import Fact
from ..graph.fakes import fake, is_number, is_symbolic, is_tensor, same
from ..graph.memory import written_after
from .affine import Factor
from .operands import symbolic
from .shapes import is_row_vector, is_vocabulary_vector, same_rows, same_shape
from .targets import counts
from .values import Diagonal, Mixture, OneHot, Value


def one_hot_target(node: Node, value: Value) -> Node | None:
    """The class indices of a one-hot tensor of the logits' shape with the classes last, cast or not; else None."""
    seen = node
    while True:
        op = nodes.read(seen) if is_tensor(seen) else None
        if op is None or op.inplace or op.name not in ("cast", "one_hot", "copy") or written_after(seen):
            return None
        if op.name == "one_hot":
            break
        seen = op.args["input"]
    target = op.args["input"]
    rank = value.fake.dim()
    if fake(seen).shape != value.fake.shape or value.class_dim != rank - 1 or not same_rows(target, value):
        return None
    return target


# ---- the entry of a target


def marks_target(node: Any, value: Value) -> bool:
    """Whether a tensor is a constant but for one class of each row, as far as one can see.

    For the words of a reason only: a rule that builds on it needs more (`one_hot_target`, `mixture`).
    """
    if not is_tensor(node):
        return False
    op = nodes.read(node)
    read = [n for n in node.all_input_nodes if is_tensor(n)]
    if op is None:
        return nodes.called(node) == "bool" and any(marks_target(n, value) for n in read)
    if op.name in ("eq", "ne") and len(read) == 2:
        classes = [n for n in read if is_vocabulary_vector(fake(n), value.fake, value.class_dim) and counts(n)]
        return bool(classes) and any(is_row_vector(n, value) for n in read)
    if op.name == "one_hot":
        return same(fake(node).shape[-1], value.vocab)
    if op.has(Fact.CONSTANT):
        edits = [nodes.read(user) for user in node.users if node in memory.mutated(user)]
        return bool(edits) and all(edit is not None and _scatters_one(edit, value) for edit in edits)
    if op.name in ("add", "sub", "rsub"):
        return is_number(op.args["input"]) + is_number(op.args["other"]) == 1 and any(
            marks_target(op.args[name], value) for name in ("input", "other")
        )
    if not op.has(Fact.ENTRYWISE | Fact.IN_ORDER):
        return _scatters_one(op, value) and _is_constant(op.args["input"])
    return any(marks_target(op.args.get(name), value) for name in ("input", "other", "condition"))


def compares_labels(node: Any, value: Value) -> bool:
    """Whether a tensor of the logits' shape is made from a comparison of one label of each row with one of each class.

    For the words of a reason only.
    """
    seen, stack = set(), [node]
    while stack:
        made = stack.pop()
        if not is_tensor(made) or made in seen or not same_shape(made, value):
            continue
        seen.add(made)
        op, read = nodes.read(made), [n for n in made.all_input_nodes if is_tensor(n)]
        labels = [n for n in read if is_vocabulary_vector(fake(n), value.fake, value.class_dim) and not counts(n)]
        if op is not None and op.name in ("eq", "ne") and labels and any(is_row_vector(n, value) for n in read):
            return True
        stack += read
    return False


def _scatters_one(op: nodes.Op, value: Value) -> bool:
    """Whether an op puts something in the place of one class of each row."""
    index = op.args.get("index")
    return op.name in ("scatter", "scatter_add") and is_tensor(index) and is_row_vector(index, value)


def _is_constant(node: Any) -> bool:
    op = nodes.read(node) if is_tensor(node) else None
    return op is not None and op.has(Fact.CONSTANT)


def mixture(node: Any, value: Value) -> Mixture | None:
    """What a tensor is a mixture of, or None: with the logits' shape, and the classes last as in `value`."""
    if not is_tensor(node) or not same_shape(node, value) or value.class_dim != value.fake.dim() - 1:
        return None
    found = _mixed(node, value)
    if found is None or not found.terms or not all(_as_many(target, value) for _, _, target in found.terms):
        return None
    return found


def coefficient(builder: Builder, term: OneHot, class_dim: int | None = None) -> Any:
    """What a one-hot tensor of a mixture is multiplied by: a number, or a recorded tensor with one for each row.

    class_dim: where that is 1 wide, to be taken out; None: it stays.
    """
    factor, weights, _ = term
    result: Any = factor
    for weight in weights:
        p: Any = builder.proxy(weight.node)
        if is_symbolic(weight.node):
            p = symbolic(builder, weight.node)
        elif fake(weight.node).numel() == 1:
            p = p.reshape(())
        elif class_dim is not None:
            p = p.squeeze(class_dim)
        result = result / p if weight.divides else result * p
    return result


def _as_many(target: Node | Diagonal, value: Value) -> bool:
    if isinstance(target, Diagonal):
        return True  # `_on_diagonal` has seen to it
    rows: Any = 1
    for size in value.lead_shape:
        rows = rows * size
    return same(fake(target).numel(), rows)


def _mixed(node: Any, value: Value) -> Mixture | None:
    if is_number(node):
        return Mixture((), float(node))
    op = nodes.read(node) if is_tensor(node) else None
    if op is not None and op.name == "one_hot" and same(fake(node).shape[-1], value.vocab) and not written_after(node):
        return Mixture(((1.0, (), op.args["input"]),), 0.0)
    if op is not None and op.name == "eye":
        return _on_diagonal(node, value, 1.0, 0.0)
    if op is not None and op.has(Fact.CONSTANT):
        return _edited_once(node, value)
    rule = _MIXED.get(op.name) if op is not None else None
    if op is None or rule is None or (op.inplace and op.name not in _WRITES) or written_after(node):
        return None
    made = fake(node).dtype
    if op.name == "cast" and not made.is_floating_point and _is_floating(op.args["input"]):
        return None  # its numbers are cut off
    if made.is_floating_point and torch.finfo(made).eps > torch.finfo(value.head.dtype).eps:
        return None  # its numbers are rounded
    return rule(op.args, value)


def _is_floating(node: Any) -> bool:
    return is_tensor(node) and fake(node).is_floating_point()


def _same(args: dict[str, Any], value: Value) -> Mixture | None:
    source = args["input"]
    op = nodes.read(source) if is_tensor(source) and fake(source).dtype == torch.bool else None
    return None if op is not None and op.name != "eye" else _mixed(source, value)


def _viewed(args: dict[str, Any], value: Value) -> Mixture | None:
    """One-hot tensors of the logits' rows in another shape: as many classes, and so as many rows, in order."""
    found = _mixed(args["input"], value)
    if found is None or not found.terms or any(w for _, w, _ in found.terms):
        return None
    return found if same(fake(args["input"]).shape[-1], value.vocab) else None


def _negative(args: dict[str, Any], value: Value) -> Mixture | None:
    found = _mixed(args["input"], value)
    return None if found is None else found.times(-1.0)


def _sum(args: dict[str, Any], value: Value, sign: float = 1.0) -> Mixture | None:
    a, b, alpha = _mixed(args["input"], value), _mixed(args["other"], value), args["alpha"]
    if a is None or b is None or not is_number(alpha):
        return None
    b = b.times(sign * alpha)
    return Mixture((*a.terms, *b.terms), a.constant + b.constant)


def _difference(args: dict[str, Any], value: Value) -> Mixture | None:
    return _sum(args, value, -1.0)


def _interpolated(args: dict[str, Any], value: Value) -> Mixture | None:
    a, b, weight = _mixed(args["input"], value), _mixed(args["end"], value), args["weight"]
    if a is None or b is None or not is_number(weight):
        return None
    a, b = a.times(1.0 - weight), b.times(weight)
    return Mixture((*a.terms, *b.terms), a.constant + b.constant)


def _scaled(args: dict[str, Any], value: Value, divides: bool = False) -> Mixture | None:
    """A mixture times something else: a number, or a tensor that is the same for all classes."""
    a, b = args["input"], args["other"]
    if not divides and (is_number(a) or _mixed(a, value) is None):
        a, b = b, a
    found = _mixed(a, value)
    if found is None:
        return None
    if is_number(b):
        return found.times(1.0 / b if divides else b) if b or not divides else None
    fits = is_tensor(b) and fake(b).is_floating_point() and (fake(b).numel() == 1 or is_row_vector(b, value))
    if not (fits or is_symbolic(b)) or found.constant:
        return None
    return Mixture(tuple((f, (*w, Factor(b, divides)), t) for f, w, t in found.terms), 0.0)


def _quotient(args: dict[str, Any], value: Value) -> Mixture | None:
    return _scaled(args, value, divides=True) if args["rounding_mode"] is None else None


def _on_diagonal(node: Node, value: Value, number: float, elsewhere: float) -> Mixture | None:
    """A matrix of the logits' shape with one number on its diagonal and another one elsewhere."""
    if not same_shape(node, value) or not value.has_diagonal or written_after(node):
        return None
    return Mixture(((number - elsewhere, (), Diagonal()),), elsewhere)


def _edited_once(node: Node, value: Value) -> Mixture | None:
    """A constant, or one into which a number is written once, in place, before anything else reads it."""
    if not memory.written(node.graph.nodes, memory.storages(node)):
        number = _constant(node, shared=True)
        return None if number is None else Mixture((), number)
    edit = memory.only_write(node)
    op = nodes.read(edit) if edit is not None else None
    if op is None or op.name not in _WRITES:
        return None
    return _WRITES[op.name](op.args, value, edited=True)


def _scattered(args: dict[str, Any], value: Value, edited: bool = False) -> Mixture | None:
    """A number put in the place of a constant, at one class of each row. `edited`: others may read it afterwards."""
    base, index, dim = args["input"], args["index"], args["dim"]
    number = args["src"] if args["value"] is None else args["value"]
    constant = _constant(base, edited) if args["reduce"] is None else None
    if constant is None or not isinstance(number, (bool, int, float)) or not is_row_vector(index, value):
        return None
    if not isinstance(dim, int) or dim % value.fake.dim() != value.class_dim or fake(index).dtype != torch.int64:
        return None
    return Mixture(((number - constant, (), index),), constant)


def _filled(args: dict[str, Any], value: Value, edited: bool = False) -> Mixture | None:
    """A number put on the diagonal of a constant. `edited`: as of `_scattered`."""
    base, number = args["input"], args["fill_value"]
    constant = _constant(base, edited)
    if constant is None or not isinstance(number, (bool, int, float)) or not same_shape(base, value):
        return None
    return Mixture(((number - constant, (), Diagonal()),), constant) if value.has_diagonal else None


def _constant(node: Any, shared: bool = False) -> float | None:
    """The number that a tensor is full of, made for what reads it only: an edit in place shows nowhere else.

    shared: others may read it, all of them behind that edit.
    """
    op = nodes.read(node) if is_tensor(node) and (shared or len(node.users) == 1) else None
    if op is None or not op.has(Fact.CONSTANT):
        return None
    number = op.args["fill_value"]
    return float(number) if isinstance(number, (bool, int, float)) else None


# What writes a number into a constant.
_WRITES: dict[str, Callable[..., Mixture | None]] = {"scatter": _scattered, "fill_diagonal": _filled}
_MIXED: dict[str, Callable[[dict[str, Any], Value], Mixture | None]] = {
    "cast": _same,
    "copy": _same,
    "detach": _same,
    "view": _viewed,
    "reshape": _viewed,
    "flatten": _viewed,
    "neg": _negative,
    "add": _sum,
    "sub": _difference,
    "lerp": _interpolated,
    "mul": _scaled,
    "div": _quotient,
    **_WRITES,
}
