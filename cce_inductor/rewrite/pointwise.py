"""Ops on the entries of logits: casts, scales, biases, a softcap, masks over the vocabulary, softmax and its logarithm.

A rule gives the `Value` of the node, or raises `Refused` with the reason and the cure.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from . import roots
from .heads import is_vocabulary_vector
from .one_hot import is_number, is_row_vector, is_tensor, marks_target, mixture, one_hot_target
from .rows import full, positions
from .values import SQUARES, Factor, Mask, Refused, Shift, Term, Value, differentiates, fake

Args = dict[str, Any]


def _cast(value: Value, node: Node, args: Args) -> Value:
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
        return roots.scaled(value, node, factor, step)
    if value.kind != "logits" or value.picked is not None:
        return value.then(node, step, factor=value.factor * factor)
    if value.masks and not (factor > 0 and math.isfinite(factor)):
        raise Refused("masked logits are multiplied by a number that is not positive", "mask them afterwards")
    masks = tuple(replace(m, fill=m.fill * factor) for m in value.masks)
    terms = tuple(replace(t, factor=t.factor * factor) for t in value.terms)
    return value.then(node, step, affine=value.affine.scaled(factor), masks=masks, terms=terms)


def _factors(value: Value, other: Node, divides: bool) -> tuple[str, str]:
    """What a tensor that is no number does to logits, as the reason, and what may be scaled instead."""
    what = f"{value.words} {'divided' if divides else 'multiplied'} by a tensor"
    if value.kind != "logits":
        return f"{what} before the loss reads them", "weigh the loss, or what it is the sum of"
    scale = fake(other)
    if is_vocabulary_vector(scale, value.fake, value.class_dim) and not is_row_vector(other, value):
        cure = "multiply the rows of the weight by it, and the bias, instead"
        return f"{what} that has a factor for each class", _in_front(value, cure)
    if is_row_vector(other, value):
        cure = "scale the hidden states instead, a row each"
        if value.affine.shifts:
            cure += " (and append the bias to the weight as a column, with a 1 in the hidden states)"
        return f"{what} that has a factor for each row", _in_front(value, cure)
    form = f"of shape {tuple(scale.shape)}" if scale.is_floating_point() else f"of dtype {scale.dtype}"
    return f"{what} {form}", "multiply by a number, or scale the hidden states instead"


def _in_front(value: Value, cure: str) -> str:
    return f"in front of the softcap, {cure}" if value.affine.capped else cure


def _tensor_scale(value: Value, node: Node, other: Node, divides: bool) -> Value:
    scale = fake(other)
    one = scale.numel() == 1 and all(isinstance(s, int) for s in scale.shape) and scale.dim() <= value.fake.dim()
    if not one or fake(node).shape != value.fake.shape or not scale.is_floating_point():
        raise Refused(*_factors(value, other, divides))
    value.need("logits", "log-probabilities are multiplied by a tensor before the loss", "scale the loss instead")
    if value.affine.capped or value.affine.inner or value.masks or value.terms:
        raise Refused("logits are multiplied by a tensor behind a softcap, a mask or a constant", "multiply before it")
    if scale.dtype == torch.float64 and value.head.dtype != torch.float64:
        raise Refused("logits multiplied by a float64 tensor", "cast it to float32")
    index = len(value.extra)

    def step(z: Tensor, extra: list[Tensor]) -> Tensor:
        return z / extra[index] if divides else z * extra[index]

    affine = value.affine.times(Factor(other, divides))
    return value.then(node, step, affine=affine, extra=(*value.extra, other))


def _mul(value: Value, node: Node, args: Args) -> Value:
    factor = args["other"] if args["input"] is value.node else args["input"]
    if is_number(factor):
        return _scale(value, node, float(factor), lambda z, _: z * factor)
    if not is_tensor(factor):
        raise Refused("logits multiplied by something computed", "multiply by a number, or scale the hidden states")
    target = one_hot_target(factor, value)
    if target is not None:
        if value.picked is not None or value.kind in SQUARES:
            raise Refused("logits multiplied by two masks, or their square by one", "use class indices")
        return replace(value, node=node, picked=target, steps=(*value.steps, _no_step))
    mixed = mixture(factor, value)
    if mixed is not None and value.picked is None and value.kind not in SQUARES:
        return replace(value, node=node, picked=replace(mixed, source=value), steps=(*value.steps, _no_step))
    return _tensor_scale(value, node, factor, False)


def _no_step(z: Tensor, extra: list[Tensor]) -> Tensor:
    raise AssertionError("a product with a one-hot tensor is never deferred")


def _div(value: Value, node: Node, args: Args) -> Value:
    divisor = args["other"]
    if value.kind == "root" and is_number(args["input"]) and args["rounding_mode"] is None:
        return roots.reciprocal(value, node, float(args["input"]))
    if args["input"] is not value.node or args["rounding_mode"] is not None:
        raise Refused("logits are a divisor, or divided with rounding", "divide by a number")
    if is_number(divisor) and divisor != 0:
        return _scale(value, node, 1.0 / divisor, lambda z, _: z / divisor)
    if not is_tensor(divisor):
        raise Refused("logits divided by something computed", "divide by a number, or scale the hidden states")
    return _tensor_scale(value, node, divisor, True)


def _neg(value: Value, node: Node, args: Args) -> Value:
    return _scale(value, node, -1.0, lambda z, _: -z)


def _squashed(value: Value, node: Node, function: Callable[[Tensor], Tensor], name: str) -> Value:
    value.need("logits", f"{name} of probabilities", "use one softcap, cap * tanh(logits / cap)")
    if value.affine.capped or value.masks or value.terms:
        raise Refused(
            f"{name} of logits that were capped, masked or shifted", "use one softcap, cap * tanh(logits / cap)"
        )
    return value.then(node, lambda z, _: function(z), affine=replace(value.affine, capped=True))


def _tanh(value: Value, node: Node, args: Args) -> Value:
    return _squashed(value, node, torch.tanh, "tanh")


def _sigmoid(value: Value, node: Node, args: Args) -> Value:
    """1 / (1 + exp(-z)) = tanh(z / 2) / 2 + 1 / 2."""
    made = _squashed(replace(value, affine=value.affine.scaled(0.5)), node, torch.sigmoid, "sigmoid")
    return replace(made, affine=replace(made.affine, post=0.5, offset=0.5))


def _add(value: Value, node: Node, args: Args, sign: float = 1.0) -> Value:
    first = args["input"] is value.node
    other = args["other"] if first else args["input"]
    alpha = args["alpha"]
    if value.kind == "square" and is_number(other) and alpha == 1:
        return roots.plus(value, node, float(other))
    if value.kind == "logits" and (value.picked is not None or marks_target(other, value)):
        raise Refused(*MARGIN)
    value.need("logits", f"something is added to {value.words} before the loss reads them", "add it to the loss")
    if not is_number(alpha):
        raise Refused("logits are added with a computed factor", "multiply them by it")
    factor = sign * alpha
    expanded = fake(node).shape != value.fake.shape
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
    if not is_vocabulary_vector(fake(other), value.fake, value.class_dim) or expanded:
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
    index = len(value.extra)

    def step(z: Tensor, extra: list[Tensor]) -> Tensor:
        b = extra[index].reshape(-1)
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
    return value.then(node, _no_step, terms=terms, affine=value.affine)


def _sub(value: Value, node: Node, args: Args) -> Value:
    return _add(value, node, args, sign=-1.0)


def _detach(value: Value, node: Node, args: Args) -> Value:
    return value.then(node, lambda z, _: z.detach())


# ---- softmax and its logarithm


def over_classes(value: Value, name: str, dim: Any) -> None:
    """Refused unless `dim` is the class dimension."""
    if not isinstance(dim, int) or dim % value.fake.dim() != value.class_dim:
        raise Refused(
            f"{name} over dimension {dim}, but the classes are dimension {value.class_dim} of "
            f"{tuple(value.fake.shape)}",
            "normalise over the vocabulary",
        )


def _normalised(value: Value, node: Node, args: Args, name: str, function: Callable) -> Value:
    # The softmax of log_softmax is that of the logits.
    if value.kind not in ("logits", "log_softmax") or value.factor != 1.0 or value.picked is not None:
        raise Refused(f"{name} of probabilities", "take it once")
    over_classes(value, name, args["dim"])
    dtype = fake(node).dtype
    if dtype == torch.float64 and value.head.dtype != torch.float64:
        raise Refused(f"{name} in float64 of logits in a narrower dtype", "use dtype=torch.float32")
    return value.then(node, lambda z, _: function(z, -1, dtype=dtype), kind=name, terms=())


def _log_softmax(value: Value, node: Node, args: Args) -> Value:
    return _normalised(value, node, args, "log_softmax", F.log_softmax)


def _softmax(value: Value, node: Node, args: Args) -> Value:
    return _normalised(value, node, args, "softmax", F.softmax)


def _exp(value: Value, node: Node, args: Args) -> Value:
    if value.kind not in ("log_softmax", "logits") or value.factor != 1.0 or value.picked is not None:
        raise Refused("exp of scaled log-probabilities", "scale the logits instead")
    return value.then(node, lambda z, _: z.exp(), kind="softmax" if value.kind == "log_softmax" else "exp")


def _log(value: Value, node: Node, args: Args) -> Value:
    value.need("softmax", "log of the logits", "take log_softmax")
    if value.factor != 1.0:
        raise Refused("log of scaled probabilities", "take log_softmax")
    return value.then(node, lambda z, _: z.log(), kind="log_softmax")


def _clamp(value: Value, node: Node, args: Args) -> Value:
    """Only where it changes nothing but -inf, as torch.distributions.Categorical does."""
    low, high = args["min"], args["max"]
    if value.kind != "log_softmax":
        raise Refused(f"the {value.words} are clamped", _UNCLAMPED.get(value.kind, "clamp what the loss reads of them"))
    if high is not None or not is_number(low) or low > -1e30:
        raise Refused("the log-probabilities are clamped", "clamp the entry of the target instead, or use a softcap")
    return value.then(node, lambda z, _: z.clamp(min=low))


_UNCLAMPED = {
    "logits": "use a softcap",
    "softmax": "use log_softmax (torch.distributions.Categorical: give it logits=, not probs=)",
}


MARGIN = (
    "the target's logit is edited in front of the softmax: a margin at the target",
    "edit it behind: with lse, z = cce_inductor.linear_logsumexp(...) and e for the edited z, the loss is "
    "lse + log1p(exp(e - lse) - exp(z - lse)) - e",
)


def _scatter(value: Value, node: Node, args: Args) -> Value:
    index = args["index"]
    if is_tensor(index) and is_row_vector(index, value):
        raise Refused(*MARGIN)
    raise Refused("single entries of the logits are written to, by an index", "only whole columns can be masked")


# ---- masks over the vocabulary


def _masked(value: Value, node: Node, mask: Mask, step: Any, extra: tuple[Node, ...] = ()) -> Value:
    value.need("logits", "log-probabilities are masked", "mask the logits instead")
    if math.isnan(mask.fill) or mask.fill == math.inf:
        raise Refused(f"logits are replaced by {mask.fill}", "use -inf")
    if value.affine.capped or (value.terms and math.isfinite(mask.fill)):
        raise Refused("capped or shifted logits are masked", "slice the weight instead")
    return value.then(node, step, masks=(*value.masks, mask), extra=(*value.extra, *extra))


def _number_in(fill: Any) -> float:
    if not is_number(fill):
        raise Refused("logits are replaced by something computed", "use a number")
    return float(fill)


def _masked_fill(value: Value, node: Node, args: Args) -> Value:
    return _fill(value, node, args["mask"], args["value"])


def _fill(value: Value, node: Node, mask: Node, fill: Any) -> Value:
    if value.kind == "logits" and marks_target(mask, value):
        raise Refused(*MARGIN)
    number = _number_in(fill)
    if not is_vocabulary_vector(fake(mask), value.fake, value.class_dim):
        raise Refused(
            f"a mask of shape {tuple(fake(mask).shape)} for logits of shape {tuple(value.fake.shape)} is not one for "
            "all rows",
            "only a mask over the vocabulary can be fused",
        )
    index = len(value.extra)

    def step(z: Tensor, extra: list[Tensor]) -> Tensor:
        return z.masked_fill(extra[index].reshape(-1), number)

    return _masked(value, node, Mask(mask, None, number, (), value.vocab), step, (mask,))


def _where(value: Value, node: Node, args: Args) -> Value:
    if args["other"] is not value.node:
        raise Refused("torch.where keeps the logits where its condition holds", "use masked_fill on the others")
    return _fill(value, node, args["condition"], args["input"])


def _setitem(value: Value, node: Node, args: Args) -> Value:
    """logits[..., start:stop] = number."""
    entries = positions(value, args["index"])
    own = [i for dim, i in entries if dim == value.class_dim]
    others = [i for dim, i in entries if dim != value.class_dim]
    if own and is_tensor(own[0]) and fake(own[0]).dtype == torch.int64 and any(map(is_tensor, others)):
        raise Refused(*MARGIN)
    number = _number_in(args["value"])
    if any(i is None or (dim != value.class_dim and not full(i)) for dim, i in entries) or not own:
        raise Refused("logits of some rows are written to in place", "only whole columns can be masked")
    part = own[0]
    if is_tensor(part) and fake(part).dim() == 1 and fake(part).dtype == torch.bool:
        return _fill(value, node, part, number)
    if isinstance(part, int):
        part = slice(part, part + 1 if part != -1 else None)
    bounds = (part.start, part.stop, part.step) if isinstance(part, slice) else (None, None, object())
    if not all(s is None or isinstance(s, int) for s in bounds):
        raise Refused("logits of computed columns are written to in place", "use masked_fill with a mask")
    if not isinstance(value.vocab, int):
        raise Refused("columns of a vocabulary of symbolic size are written to in place", "use masked_fill with a mask")

    def step(z: Tensor, extra: list[Tensor]) -> Tensor:
        # Not in place: where deferred logits are read, autograd does not see a write through a view.
        return z.slice_scatter(torch.full_like(z[..., slice(*bounds)], number), -1, *bounds[:2], bounds[2] or 1)

    return _masked(value, node, Mask(None, bounds, number, (), value.vocab), step)


VALUES: dict[str, Callable[[Value, Node, Args], Value]] = {
    "cast": _cast,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "add": _add,
    "sub": _sub,
    "detach": _detach,
    "log_softmax": _log_softmax,
    "softmax": _softmax,
    "exp": _exp,
    "log": _log,
    "clamp": _clamp,
    "masked_fill": _masked_fill,
    "where": _where,
    "setitem": _setitem,
    "scatter": _scatter,
    "scatter_add": _scatter,
    **roots.RULES,
}
# What may write its result into the logits: afterwards they are that.
INPLACE = frozenset(
    ("mul", "div", "neg", "tanh", "sigmoid", "add", "sub", "masked_fill", "setitem", "scatter", "scatter_add")
)


# ---- products of two values


def product(a: Value, b: Value, node: Node) -> Value:
    """The softmax times its logarithm or times the logits, entry by entry; or logits times the root of their square."""
    if b.kind in SQUARES:
        a, b = b, a
    if a.kind in SQUARES:
        return roots.softcap(b, a, node, False)
    if a.kind != "softmax":
        a, b = b, a
    kinds = {"log_softmax": "p log p", "logits": "p z"}
    if a.kind != "softmax" or b.kind not in kinds or a.picked is not None or b.picked is not None:
        raise Refused("the logits are multiplied by themselves", "compute it from the hidden states")
    if a.source != b.source or a.affine != b.affine or a.class_dim != b.class_dim or fake(node).shape != a.fake.shape:
        raise Refused("the softmax of some logits is multiplied by others", "use the same logits in both")
    if not differentiates(node, a.node, b.node):
        raise Refused("a softmax is multiplied by detached logits, or a detached one by logits", "detach both, or none")
    if a.masks or a.terms or b.terms:
        raise Refused("the entropy of masked or shifted logits", "slice the weight instead of masking")
    factor = a.factor * b.factor
    return replace(b, node=node, kind=kinds[b.kind], factor=factor, steps=(*b.steps, _no_step))
