"""The softmax over the classes and its logarithm, whole or written out."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..graph.fakes import fake, is_number
from ..graph.refusal import Refused
from .values import Args, Value

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


def log_softmax(value: Value, node: Node, args: Args) -> Value:
    return _normalised(value, node, args, "log_softmax", F.log_softmax)


def softmax(value: Value, node: Node, args: Args) -> Value:
    return _normalised(value, node, args, "softmax", F.softmax)


def exp(value: Value, node: Node, args: Args) -> Value:
    if value.kind not in ("log_softmax", "logits") or value.factor != 1.0 or value.picked is not None:
        raise Refused("exp of scaled log-probabilities", "scale the logits instead")
    return value.then(node, lambda z, _: z.exp(), kind="softmax" if value.kind == "log_softmax" else "exp")


def log(value: Value, node: Node, args: Args) -> Value:
    value.need("softmax", "log of the logits", "take log_softmax")
    if value.factor != 1.0:
        raise Refused("log of scaled probabilities", "take log_softmax")
    return value.then(node, lambda z, _: z.log(), kind="log_softmax")


def clamp(value: Value, node: Node, args: Args) -> Value:
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
