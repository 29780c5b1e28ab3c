"""Which tensors stand for a number per class, and which for one per row."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..graph import nodes
from ..graph.fakes import fake, is_tensor, same
from .values import Value


def is_vocabulary_vector(other: Any, z: Any, class_dim: int) -> bool:
    """Whether `other` broadcasts against logits `z` along every dimension but the classes."""
    from_right = z.dim() - class_dim  # 1 for the last dimension
    if other.dim() < from_right or other.dim() > z.dim():
        return False
    return all(
        same(size, z.shape[class_dim]) if other.dim() - i == from_right else same(size, 1)
        for i, size in enumerate(other.shape)
    )


def is_row_vector(node: Node, value: Value) -> bool:
    """Whether a tensor holds one number for each row of `value`, in its shape but for a single class."""
    shape = list(value.fake.shape)
    shape[value.class_dim] = 1
    given = fake(node).shape
    # One class of a single row could as well be a bias: it does not matter, both are constants.
    return len(given) == len(shape) and all(same(a, b) for a, b in zip(given, shape, strict=True))


def broadcasts_to_rows(other: Any, value: Value) -> bool:
    """Whether a tensor of several elements broadcasts to one number for each row of `value`, 1 wide."""
    z = value.fake
    sizes = list(zip(reversed(other.shape), reversed(z.shape), strict=False))
    own = z.dim() - 1 - value.class_dim  # the place of the classes, from the right
    fits = all(same(size, 1) or (i != own and same(size, whole)) for i, (size, whole) in enumerate(sizes))
    return other.dim() <= z.dim() and fits and other.dim() > own + 1


def per_row(node: Any, value: Value) -> Node | None:
    """The tensor of one number for each row of `value`, or for several, that a node is, or is expanded from."""
    while is_tensor(node):
        if is_row_vector(node, value) or broadcasts_to_rows(fake(node), value):
            return node
        op = nodes.read(node)
        if op is None or op.inplace or op.name not in ("expand", "expand_as"):
            return None
        node = op.args["input"]
    return None


def same_shape(node: Node, value: Value) -> bool:
    """Whether a tensor has the shape of the logits."""
    given, shape = fake(node).shape, value.fake.shape
    return len(given) == len(shape) and all(map(same, given, shape))


def same_rows(node: Any, value: Value) -> bool:
    """Whether a tensor has one element for each row of `value`, in its leading shape."""
    if not is_tensor(node) or fake(node).dim() != len(value.lead_shape):
        return False
    return all(same(a, b) for a, b in zip(fake(node).shape, value.lead_shape, strict=True))
