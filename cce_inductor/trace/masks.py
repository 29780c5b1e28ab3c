"""Columns of the logits that are replaced by a number."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.fakes import fake, is_number, is_tensor
from ..graph.refusal import Refused
from .indexing import full, positions
from .one_hot import compares_labels
from .reasons import LABELS
from .shapes import is_vocabulary_vector
from .values import Args, Mask, Value


def scatter(value: Value, node: Node, args: Args) -> Value:
    raise Refused("single entries of the logits are written to, by an index", "only whole columns can be masked")


# ---- masks over the vocabulary


def _masked(value: Value, node: Node, mask: Mask, step: Any, extra: tuple[Node, ...] = ()) -> Value:
    value.need("logits", "log-probabilities are masked", "mask the logits instead")
    if math.isnan(mask.fill) or mask.fill == math.inf:
        raise Refused(f"logits are replaced by {mask.fill}", "use -inf")
    if value.affine.of_rows:
        raise Refused("logits are masked behind a factor for each row", "mask them in front of it")
    if value.affine.capped or (value.terms and math.isfinite(mask.fill)):
        raise Refused("capped or shifted logits are masked", "slice the weight instead")
    return value.then(node, step, masks=(*value.masks, mask), extra=(*value.extra, *extra))


def _number_in(fill: Any) -> float:
    if not is_number(fill):
        raise Refused("logits are replaced by something computed", "use a number")
    return float(fill)


def masked_fill(value: Value, node: Node, args: Args) -> Value:
    return fill(value, node, args["mask"], args["value"])


def fill(value: Value, node: Node, mask: Node, fill: Any) -> Value:
    number = _number_in(fill)
    if compares_labels(mask, value):
        raise Refused(*LABELS)
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


def where(value: Value, node: Node, args: Args) -> Value:
    if args["other"] is not value.node:
        raise Refused("torch.where keeps the logits where its condition holds", "use masked_fill on the others")
    return fill(value, node, args["condition"], args["input"])


def setitem(value: Value, node: Node, args: Args) -> Value:
    """logits[..., start:stop] = number."""
    if compares_labels(args["index"], value):
        raise Refused(*LABELS)
    entries = positions(value, args["index"])
    own = [i for dim, i in entries if dim == value.class_dim]
    number = _number_in(args["value"])
    if any(i is None or (dim != value.class_dim and not full(i)) for dim, i in entries) or not own:
        raise Refused("logits of some rows are written to in place", "only whole columns can be masked")
    part = own[0]
    if is_tensor(part) and fake(part).dim() == 1 and fake(part).dtype == torch.bool:
        return fill(value, node, part, number)
    if isinstance(part, int):
        part = slice(part, part + 1 if part != -1 else None)
    bounds: tuple[Any, ...] = (part.start, part.stop, part.step) if isinstance(part, slice) else (None, None, object())
    if not all(s is None or isinstance(s, int) for s in bounds):
        raise Refused("logits of computed columns are written to in place", "use masked_fill with a mask")
    if not isinstance(value.vocab, int):
        raise Refused("columns of a vocabulary of symbolic size are written to in place", "use masked_fill with a mask")

    def step(z: Tensor, extra: list[Tensor]) -> Tensor:
        # Not in place: where deferred logits are read, autograd does not see a write through a view.
        start, stop, stride = bounds
        return z.slice_scatter(torch.full_like(z[..., slice(*bounds)], number), -1, start, stop, stride or 1)

    return _masked(value, node, Mask(None, bounds, number, (), value.vocab), step)
