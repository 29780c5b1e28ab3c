"""How autograd leads from a pending tensor to the heads that it follows from."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from .pending import Origin


class Way(NamedTuple):
    """operands: what a loss is computed from. between: the nodes from the logits to their head, if the loss has to be
    behind the logits in the autograd graph; None where it goes around them."""

    operands: tuple[Tensor, ...]
    between: frozenset[Any] | None


def way(grad_fn: Any, origin: Origin) -> Way | None:
    """The way from a tensor with this `grad_fn`; None if it does not lead to its heads, or a gradient must take it."""
    extras = [extra.tensor for extra in origin.extras]
    watched = any(head.watched for head in origin.heads)
    # From there on the gradient goes to what the steps read besides.
    around = {get_gradient_edge(t).node for t in extras if t.requires_grad}
    seen: set[Any] = {*around, *(() if watched or origin.head.eager else origin.beside)}
    needs, found, between = origin.needs(True), dict[Any, Any](), set[Any]()
    stack: list[Any] = [grad_fn]
    while stack:
        node = stack.pop()
        if getattr(node, "head", None) in needs:
            found[node.head] = node.operands
            continue
        behind = [n for n, _ in node.next_functions if n is not None] if node is not None else []
        if not behind:
            return None
        if not isinstance(node, BackwardCFunction):
            between.add(node)
        elif not getattr(node, "of_logits", False):
            watched = True  # such as DDP's, which has side effects
        stack += [n for n in behind if n not in seen]  # more than one behind a product
        seen.update(behind)
    if any(trains and head not in found for head, trains in needs.items()):
        return None
    if origin.other is None and not around and (watched or origin.head.eager):
        return Way((*origin.head.leaves, *extras), frozenset(between))
    if watched:
        return None
    of_heads = [t for head in needs for t in found.get(head) or [o.alias for o in head.operands]]
    return Way((*of_heads, *extras), None)
