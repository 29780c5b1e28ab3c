"""What Dynamo knows of a node's result: its fake tensor, sizes that are known to be equal."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import SymFloat, Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from .refusal import Refused


def example(node: Node) -> Any:
    """The fake value that Dynamo gave a node; None where it gave none."""
    return node.meta.get("example_value", node.meta.get("val"))


def fake(node: Node) -> Tensor:
    """The fake tensor of a node, or Refused for a node that is no tensor."""
    value = example(node)
    if not isinstance(value, Tensor):
        raise Refused(f"%{node.name} has no tensor metadata", "report it: Dynamo gave a node without an example")
    return value


def differentiates(node: Node, *operands: Node) -> bool:
    """Whether a gradient that comes back to `node`, if one does, goes on to every one of `operands`."""
    return not fake(node).requires_grad or all(fake(n).requires_grad for n in operands)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without adding a guard."""
    return statically_known_true(a == b)


def guarded_same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal, in this graph: a guard says so where they are symbols of their own.

    For indices that PyTorch itself would take in another size: who gives one for each row, does so every time.
    """
    return bool(same(a, b) or guard_or_false(a == b))


def is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def is_symbolic(x: Any) -> TypeGuard[Node]:
    """Whether something is the node of a float that the graph computes, or is given."""
    return isinstance(x, Node) and isinstance(example(x), SymFloat)


def is_tensor(x: Any) -> TypeGuard[Node]:
    """Whether something is the node of a tensor."""
    return isinstance(x, Node) and isinstance(example(x), Tensor)
