"""Ops on the entries of logits: casts, scales, biases, a softcap, and products of two values.

A rule gives the `Value` of the node, or raises `Refused` with the reason and the cure.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph import nodes
from ..graph.fakes import differentiates, fake, is_number, is_tensor, same
from ..graph.memory import written_after
from ..graph.refusal import Refused
from . import rsqrt_softcap
from .affine import Factor, Scale, Shift
from .one_hot import compares_labels, marks_target, mixture, one_hot_target
from .reasons import LABELS, MARGIN
from .shapes import broadcasts_to_rows, is_row_vector, is_vocabulary_vector, same_shape
from .values import SQUARES, Args, Function, Term, Value


def cast(value: Value, node: Node, args: Args) -> Value:
    old, new = value.fake, fake(node)
    if value.kind == "comparison" and new.device == old.device:
        return value.at(node)
    if not new.is_floating_point():
        raise Refused(f"logits cast to {new.dtype}", "keep them floating")
    if new.device != old.device:
        raise Refused(f"logits moved from {old.device} to {new.device}", "compute the loss where the head is")
    if new.dtype == torch.float64 and value.head.dtype != torch.float64:
        raise Refused(
            f"logits computed in {value.head.dtype} and cast to float64: the fused statistics are fp32",
            "cast to float32 instead",
        )
    dtype = new.dtype
    # A wider cast of what was rounded does not bring the digits back: only a loss minds, see `not_rounded`.
    rounded = value.rounded or torch.finfo(dtype).eps > torch.finfo(value.head.dtype).eps
    return value.then(node, lambda z, _: z.to(dtype), rounded=rounded)


def not_rounded(value: Value) -> None:
    if value.rounded:
        raise Refused(
            f"logits computed in {value.head.dtype} are rounded to a narrower dtype before the loss",
            "compute the head in that dtype, or leave the cast out",
        )


def _scale(value: Value, node: Node, factor: float, step: Any) -> Value:
    if value.kind == "square":
        return rsqrt_softcap.scaled(value, node, factor, step)
    if value.kind != "logits" or value.picked is not None:
        return value.then(node, step, function=replace(value.function, factor=value.factor * factor))
    if value.masks and not (factor > 0 and math.isfinite(factor)):
        raise Refused("masked logits are multiplied by a number that is not positive", "mask them afterwards")
    masks = tuple(replace(m, fill=m.fill * factor) for m in value.masks)
    terms = tuple(replace(t, factor=t.factor * factor) for t in value.terms)
    return value.then(node, step, affine=value.affine.scaled(factor), masks=masks, terms=terms)


def _factors(value: Value, other: Node, divides: bool) -> tuple[str, str]:
    """What a tensor that is no number does to logits, as the reason, and what may be scaled instead."""
    what = f"{value.words} {'divided' if divides else 'multiplied'} by a tensor"
    if value.kind != "logits" or value.picked is not None:
        return f"{what} before the loss reads them", "weigh the loss, or what it is the sum of"
    scale = fake(other)
    form = f"of shape {tuple(scale.shape)}" if scale.is_floating_point() else f"of dtype {scale.dtype}"
    return f"{what} {form}", "multiply by a number, by one for each class or row, or scale the hidden states"


def _tensor_scale(value: Value, node: Node, other: Node, divides: bool) -> Value:
    for factor, inverse in _of_rows_and_classes(other, value):
        value = _scale_along(value, node, factor, divides != inverse)
    return value


def _of_rows_and_classes(other: Node, value: Value) -> list[tuple[Node, bool]]:
    """The parts of a factor, and whether each is divided by: one of rows and one of classes, if it is their product.

    Such as the lengths of hidden states and weights, ``z / (x.norm(dim=1, keepdim=True) * w.norm(dim=1))``.
    """
    op = nodes.read(other)
    whole = [(other, False)]
    if (
        op is None
        or op.name not in ("mul", "div")
        or op.inplace
        or not same_shape(other, value)
        or written_after(other)
    ):
        return whole
    parts = [op.args["input"], op.args["other"]]
    if op.args.get("rounding_mode") is not None or not all(map(is_tensor, parts)):
        return whole
    kinds = {is_vocabulary_vector(fake(n), value.fake, value.class_dim) for n in parts if not same_shape(n, value)}
    rows = any(is_row_vector(n, value) for n in parts)
    return [(parts[0], False), (parts[1], op.name == "div")] if kinds == {True, False} and rows else whole


def _scale_along(value: Value, node: Node, other: Node, divides: bool) -> Value:
    if compares_labels(other, value):
        raise Refused(*LABELS)
    scale = fake(other)
    one = same(scale.numel(), 1) and all(isinstance(s, int) for s in scale.shape) and scale.dim() <= value.fake.dim()
    of_classes = not one and is_vocabulary_vector(scale, value.fake, value.class_dim)
    of_rows = not one and not of_classes and broadcasts_to_rows(scale, value)
    expanded = not same_shape(node, value)
    if value.kind != "logits" or value.picked is not None or expanded or not scale.is_floating_point():
        raise Refused(*_factors(value, other, divides))
    if not (one or of_classes or of_rows):
        raise Refused(*_factors(value, other, divides))
    # -inf divided by a temperature is what the operator makes of a bias of -inf.
    masked = any(not of_rows or mask.fill != -math.inf for mask in value.masks)
    if value.affine.capped or value.affine.inner or masked or value.terms:
        which = "" if one else f" with one number for each {'class' if of_classes else 'row'}"
        done = "divided" if divides else "multiplied"
        raise Refused(
            f"logits are {done} by a tensor{which} behind a softcap, a mask or a constant", "multiply in front of it"
        )
    if scale.dtype == torch.float64 and value.head.dtype != torch.float64:
        raise Refused("logits multiplied by a float64 tensor", "cast it to float32")
    index, dims = len(value.extra), scale.dim()
    if of_rows:
        shared = not is_row_vector(other, value)
        factor = Scale(other, divides, True, start=len(value.rows), class_dim=value.class_dim, expanded=shared)
        affine = value.affine.scaled_along(factor)
        if value.members:
            return value.then(node, no_step, affine=affine)
        of_row = (lambda z, extra: z / extra[index]) if divides else (lambda z, extra: z * extra[index])
        return value.then(node, of_row, affine=affine, extra=(*value.extra, factor))

    def step(z: Tensor, extra: list[Tensor]) -> Tensor:
        f = extra[index].reshape(-1) if dims > 1 or of_classes else extra[index]  # a piece has fewer dimensions
        return z / f if divides else z * f

    of_class = Scale(other, divides, False)
    affine = value.affine.scaled_along(of_class) if of_classes else value.affine.times(Factor(other, divides))
    return value.then(node, step, affine=affine, extra=(*value.extra, other))


def mul(value: Value, node: Node, args: Args) -> Value:
    factor = args["other"] if args["input"] is value.node else args["input"]
    if is_number(factor):
        return _scale(value, node, float(factor), lambda z, _: z * factor)
    if not is_tensor(factor):
        raise Refused("logits multiplied by something computed", "multiply by a number, or scale the hidden states")
    target = one_hot_target(factor, value)
    if target is not None:
        if value.picked is not None or value.kind in SQUARES:
            raise Refused("logits multiplied by two masks, or their square by one", "use class indices")
        return replace(value, node=node, picked=target, steps=(*value.steps, no_step))
    mixed = mixture(factor, value)
    if mixed is not None and value.picked is None and value.kind not in SQUARES:
        return replace(value, node=node, picked=replace(mixed, source=value), steps=(*value.steps, no_step))
    return _tensor_scale(value, node, factor, False)


def no_step(z: Tensor, extra: list[Tensor]) -> Tensor:
    raise AssertionError("what has a one-hot tensor, or a number added to each row, is never deferred")


def div(value: Value, node: Node, args: Args) -> Value:
    divisor = args["other"]
    if value.kind == "root" and is_number(args["input"]) and args["rounding_mode"] is None:
        return rsqrt_softcap.reciprocal(value, node, float(args["input"]))
    if args["input"] is not value.node or args["rounding_mode"] is not None:
        raise Refused("logits are a divisor, or divided with rounding", "divide by a number")
    if is_number(divisor) and divisor != 0:
        return _scale(value, node, 1.0 / divisor, lambda z, _: z / divisor)
    if not is_tensor(divisor):
        raise Refused("logits divided by something computed", "divide by a number, or scale the hidden states")
    return _tensor_scale(value, node, divisor, True)


def neg(value: Value, node: Node, args: Args) -> Value:
    return _scale(value, node, -1.0, lambda z, _: -z)


def _squashed(value: Value, node: Node, function: Callable[[Tensor], Tensor], name: str) -> Value:
    value.need("logits", f"{name} of probabilities", "use one softcap, cap * tanh(logits / cap)")
    if value.affine.capped or value.masks or value.terms:
        raise Refused(
            f"{name} of logits that were capped, masked or shifted", "use one softcap, cap * tanh(logits / cap)"
        )
    return value.then(node, lambda z, _: function(z), affine=value.affine.squashed())


def tanh(value: Value, node: Node, args: Args) -> Value:
    return _squashed(value, node, torch.tanh, "tanh")


def sigmoid(value: Value, node: Node, args: Args) -> Value:
    """1 / (1 + exp(-z)) = tanh(z / 2) / 2 + 1 / 2."""
    made = _squashed(replace(value, affine=value.affine.scaled(0.5)), node, torch.sigmoid, "sigmoid")
    return replace(made, affine=replace(made.affine, post=0.5, offset=0.5))


def add(value: Value, node: Node, args: Args, sign: float = 1.0) -> Value:
    first = args["input"] is value.node
    other = args["other"] if first else args["input"]
    alpha = args["alpha"]
    if value.kind == "square" and is_number(other) and alpha == 1:
        return rsqrt_softcap.plus(value, node, float(other))
    if value.kind == "logits" and (value.picked is not None or marks_target(other, value)):
        raise Refused(*MARGIN)
    value.need("logits", f"something is added to {value.words} before the loss reads them", "add it to the loss")
    if not is_number(alpha):
        raise Refused("logits are added with a computed factor", "multiply them by it")
    factor = sign * alpha
    expanded = not same_shape(node, value)
    if not first:
        times = factor  # b - z, b + alpha * z
        value, factor = value if times == 1 else _scale(value, node, times, lambda z, _: z * times), 1.0
    if is_number(other) and math.isfinite(other):
        masks = tuple(replace(m, fill=m.fill + factor * other) for m in value.masks)
        affine = value.affine.plus(factor * other)
        return value.then(node, lambda z, _: z + factor * other, affine=affine, masks=masks)
    if not is_tensor(other):
        raise Refused("something that is no tensor is added to the logits", "add a bias over the vocabulary")
    if is_row_vector(other, value) and not expanded:
        return _add_term(value, node, other, factor)
    if value.affine.capped:
        raise Refused("a prior is added behind the softcap", "add it in front of the softcap")
    if value.affine.of_rows:
        raise Refused("a bias is added behind a factor for each row", "add it in front of the factor")
    alike = same(fake(other).numel(), 1) or is_vocabulary_vector(fake(other), value.fake, value.class_dim)
    if compares_labels(other, value):
        raise Refused(*LABELS)
    if not alike or expanded:
        raise Refused(
            f"a tensor of shape {tuple(fake(other).shape)} is added to logits of shape {tuple(value.fake.shape)}: it "
            "is not one bias per class",
            "only a bias over the vocabulary can be fused",
        )
    if fake(other).dtype == torch.float64 and value.head.dtype != torch.float64:
        raise Refused("a float64 bias is added to the logits", "cast it to float32")
    if not fake(other).is_floating_point():
        raise Refused(f"a tensor of dtype {fake(other).dtype} is added to the logits", "cast it to the logits' dtype")
    if any(math.isfinite(m.fill) for m in value.masks):
        raise Refused("a bias is added to masked logits", "add it in front of the mask")
    index, dims = len(value.extra), fake(other).dim()

    def step(z: Tensor, extra: list[Tensor]) -> Tensor:
        b = extra[index].reshape(-1) if dims else extra[index]  # without dimensions it does not choose the dtype
        return z + b if factor == 1 else z - b if factor == -1 else z + factor * b

    affine = replace(value.affine, shifts=(*value.affine.shifts, Shift(other, factor)))
    return value.then(node, step, affine=affine, extra=(*value.extra, other))


def _add_term(value: Value, node: Node, other: Node, sign: float) -> Value:
    """A constant of the row: it cancels in a softmax."""
    if not fake(other).is_floating_point() or fake(other).dtype == torch.float64 != value.head.dtype:
        raise Refused(f"a tensor of dtype {fake(other).dtype} is added to the rows", "cast it to the logits' dtype")
    if any(math.isfinite(m.fill) for m in value.masks):
        raise Refused("a tensor is added to the rows of masked logits", "add it in front of the mask")
    terms = (*value.terms, Term(other, sign, len(value.rows)))
    return value.then(node, no_step, terms=terms, affine=value.affine)


def sub(value: Value, node: Node, args: Args) -> Value:
    return add(value, node, args, sign=-1.0)


def detach(value: Value, node: Node, args: Args) -> Value:
    return value.then(node, lambda z, _: z.detach())


# ---- products of two values


def product(a: Value, b: Value, node: Node) -> Value:
    """The softmax times its logarithm or times the logits, entry by entry; or logits times the root of their square."""
    if b.kind in SQUARES:
        a, b = b, a
    if a.kind in SQUARES:
        return rsqrt_softcap.softcap(b, a, node, False)
    if a.kind != "softmax":
        a, b = b, a
    kinds = {"log_softmax": "p log p", "logits": "p z"}
    picked = a.picked is not None or b.picked is not None
    # Of other logits, and of detached ones, it is a product of two heads' functions (two_heads.py).
    same_logits = a.source == b.source and a.affine == b.affine and differentiates(node, a.node, b.node)
    same_place = a.class_dim == b.class_dim and fake(node).shape == a.fake.shape
    if a.kind != "softmax" or b.kind not in kinds or picked or not (same_logits and same_place):
        raise Refused("the logits are multiplied by themselves", "compute it from the hidden states")
    if a.masks or a.terms or b.terms:
        raise Refused("the entropy of masked or shifted logits", "slice the weight instead of masking")
    factor = a.factor * b.factor
    return replace(b, node=node, function=Function(kinds[b.kind], factor), steps=(*b.steps, no_step))
