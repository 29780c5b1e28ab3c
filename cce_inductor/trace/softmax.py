"""The softmax over the classes and its logarithm, whole or written out."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..graph import nodes
from ..graph.fakes import differentiates, fake, is_number
from ..graph.refusal import Refused
from .cosines import are_cosines, between_cosines
from .reduction import SOFTMAX, Reduction
from .shapes import is_row_vector
from .values import Args, Function, Value

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
    return value.then(node, lambda z, _: function(z, -1, dtype=dtype), function=Function(name), terms=())


def log_softmax(value: Value, node: Node, args: Args) -> Value:
    return _normalised(value, node, args, "log_softmax", F.log_softmax)


def softmax(value: Value, node: Node, args: Args) -> Value:
    return _normalised(value, node, args, "softmax", F.softmax)


def exp(value: Value, node: Node, args: Args) -> Value:
    if value.kind not in ("log_softmax", "logits") or value.factor != 1.0 or value.picked is not None:
        raise Refused("exp of scaled log-probabilities", "scale the logits instead")
    return value.then(
        node, lambda z, _: z.exp(), function=Function("softmax" if value.kind == "log_softmax" else "exp")
    )


def log(value: Value, node: Node, args: Args) -> Value:
    value.need("softmax", "log of the logits", "take log_softmax")
    if value.factor != 1.0:
        raise Refused("log of scaled probabilities", "take log_softmax")
    return value.then(node, lambda z, _: z.log(), function=Function("log_softmax"))


def clamp(value: Value, node: Node, args: Args) -> Value:
    """Only where it changes no more than -inf, as torch.distributions.Categorical does, or how cosines are rounded."""
    low, high = args["min"], args["max"]
    if are_cosines(value) and between_cosines(low, high):
        return value.then(node, lambda z, _: z.clamp(low, high))
    if value.kind != "log_softmax":
        raise Refused(f"the {value.words} are clamped", _UNCLAMPED.get(value.kind, "clamp what the loss reads of them"))
    if high is not None or not is_number(low) or low > -1e30:
        raise Refused("the log-probabilities are clamped", "clamp the entry of the target instead, or use a softcap")
    return value.then(node, lambda z, _: z.clamp(min=low))


_UNCLAMPED = {
    "logits": "use a softcap",
    "softmax": "use log_softmax (torch.distributions.Categorical: give it logits=, not probs=)",
}


# ---- z - z.logsumexp(-1, keepdim=True), and exp(z) / exp(z).sum(-1, keepdim=True)

Known = Mapping[Node, Reduction]


def minus_lse(value: Value, node: Node, args: Args, known: Known) -> Value | None:
    """The logits minus their log-sum-exp: log_softmax. Minus another one, they are shifted by row, as by any tensor."""
    lse = _summed(args["other"], known, logarithm=True)
    if lse is None:
        return None
    value.need("logits", "a log-sum-exp is subtracted from log-probabilities", "subtract it once")
    if value.gains_gradient(node):
        raise Refused("a log-sum-exp that requires grad is subtracted from detached logits", "detach both, or none")
    if not _is_own(value, lse, node, args["other"]) or args["alpha"] != 1:
        return None
    step = lambda z, _: z - z.logsumexp(-1, keepdim=True)  # noqa: E731
    return value.then(node, step, function=Function("log_softmax"), terms=())


def over_sum(value: Value, node: Node, args: Args, known: Known) -> Value | None:
    """The exponentials over their sum: softmax."""
    total = _summed(args["other"], known, logarithm=False)
    if total is None or args["input"] is not value.node:
        return None
    value.need("exp", "something is divided by a sum of exponentials", "use softmax")
    if not _is_own(value, total, node, args["other"]) or value.factor != 1.0:
        raise Refused("exponentials of logits are divided by the sum of others", "use softmax")
    return value.then(node, lambda z, _: z / z.sum(-1, keepdim=True), function=Function("softmax"), terms=())


def _summed(node: Any, known: Known, logarithm: bool) -> Reduction | None:
    """The sum of exponentials that a node is a view of, or the logarithm of one, if it is."""
    while isinstance(node, Node):
        op = nodes.read(node)
        if op is None or op.inplace:
            return None
        made = known.get(node)
        if made is not None:
            whole = op.name == ("logsumexp" if logarithm else "sum")
            return made if whole and made.statistics == SOFTMAX and made.value.factor == 1.0 else None
        if op.name == "log" and logarithm:
            logarithm = False
        elif op.name not in ("unsqueeze", "getitem"):
            return None
        node = op.args["input"]
    return None


def _is_own(value: Value, made: Reduction, node: Node, other: Node) -> bool:
    """Whether a reduction is of these very logits, and stands where it is broadcast along the classes."""
    whole = is_row_vector(other, value) and fake(node).shape == value.fake.shape
    mine, its = ((v.source, v.affine, v.terms) for v in (value, made.value))
    return whole and mine == its and not value.masks and differentiates(node, value.node, other)
