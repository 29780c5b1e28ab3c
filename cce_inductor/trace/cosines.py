"""Logits that are cosines: products of rows of length 1."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch.fx import Node

from ..graph import nodes
from ..graph.fakes import fake, is_number, is_tensor
from .affine import IDENTITY
from .values import Head, Value

# In the meta of the input of a graph, a tensor whose rows were divided by their lengths in another graph.
OF_LENGTH_ONE = "cce_inductor_of_length_one"


def are_cosines(value: Value) -> bool:
    """Whether logits are products of rows of length 1 as they are."""
    edited = value.affine != IDENTITY or value.masks or value.terms or not value.whole
    return not edited and isinstance(value.head, Head) and gives_cosines(value.head)


def gives_cosines(head: Head) -> bool:
    """Whether a head multiplies rows of length 1."""
    of_weight = _of_length_one(head.weight, 0 if head.transposed else 1)
    return head.bias is None and of_weight and _of_length_one(head.input, head.width_dim)


def between_cosines(low: Any, high: Any) -> bool:
    """Whether these are the least and the largest cosine, or a rounding error less: the arccosine has a slope then."""
    ends = (low, high)
    return all(is_number(end) and 0 <= 1 - abs(end) <= 1e-5 for end in ends) and low < 0 < high


def _of_length_one(node: Node, dim: int) -> bool:
    """Whether a tensor was divided by its length along a dimension."""
    op = nodes.read(node)
    while op is not None and op.name in ("cast", "copy", "detach") and not op.inplace:
        node = op.args["input"]
        op = nodes.read(node)
    if OF_LENGTH_ONE in node.meta:
        return True
    rank = fake(node).dim()
    if node.target is F.normalize:
        given = dict(zip(("p", "dim"), node.args[1:3], strict=False)) | node.kwargs
        along = given.get("dim", 1)
        return bool(given.get("p", 2.0) == 2 and isinstance(along, int) and along % rank == dim % rank)
    if op is None or op.name != "div" or op.inplace or not is_tensor(length := op.args["other"]):
        return False
    name = nodes.called(length).split(".")[0]
    shape: list[Any] = [*fake(node).shape]
    shape[dim] = 1
    own = bool(length.args) and length.args[0] is op.args["input"]
    order = length.kwargs.get("p", length.kwargs.get("ord", length.args[1] if len(length.args) > 1 else 2))
    return name in _LENGTHS and shape == [*fake(length).shape] and own and order in (2, None)


_LENGTHS = ("norm", "linalg_norm", "linalg_vector_norm")
