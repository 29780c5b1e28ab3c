"""Weights that are int8 codes: ``q.to(dtype)``, or that times one number for each class, as quantised checkpoints have.

The product of hidden states with the codes is the logits but for those numbers. An operator that reads the codes in
place needs no copy of the weight in a floating dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..graph import nodes
from ..graph.fakes import fake, is_number, is_tensor, same
from ..graph.memory import storages, written
from .shapes import is_vocabulary_vector
from .values import Head, Step

# int8 is exact in each of them.
_WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Times:
    """A number, or the tensor of a node with one for each class or one for all, that codes are multiplied with."""

    factor: Any
    divides: bool


@dataclass(frozen=True)
class Codes:
    """What the weight of a head is made of.

    node: the int8 matrix, with its classes where the weight has them. scales: what it is multiplied with. chain: the
    nodes that make the weight of it, in order.
    """

    node: Node
    scales: tuple[Times, ...]
    chain: tuple[Node, ...]

    def steps(self, start: int) -> tuple[Step, ...]:
        """How the weight comes of them, op by op; the tensors among `scales` are the entries from `start` on."""
        scales, made, index = iter(self.scales), [], start
        for node in self.chain:
            if _name(node) == "cast":
                made.append(_cast(fake(node).dtype))
                continue
            times = next(scales)
            held = isinstance(times.factor, Node)
            made.append(_product(index if held else times.factor, held, times.divides))
            index += held
        return tuple(made)


def _cast(dtype: torch.dtype) -> Step:
    return lambda w, _: w.to(dtype)


def _product(factor: Any, held: bool, divides: bool) -> Step:
    def step(w: Tensor, extra: list[Tensor]) -> Tensor:
        f = extra[factor] if held else factor
        return w / f if divides else w * f

    return step


def codes(head: Head) -> Codes | None:
    """The codes that a head's weight is made of; None where it is not, or where the codes would tell another story."""
    class_dim = 1 if head.transposed else 0
    node, scales, chain = head.weight, [], []
    while fake(node).dtype in _WIDE:
        made = _step(node, class_dim, head.dtype == torch.float64)
        if made is None:
            return None
        chain.append(node)
        node, times = made
        if times is not None:
            scales.append(times)
    tensors = [node, *(t.factor for t in scales if isinstance(t.factor, Node))]
    if fake(node).dtype != torch.int8 or any(is_traceable_wrapper_subclass(fake(n)) for n in tensors):
        return None
    # Written to, codes or numbers are others afterwards than where they were multiplied.
    memory = set().union(*(storages(n) for n in (*chain, *tensors)))
    if written(node.graph.nodes, memory):
        return None
    # Somebody may ask for the gradient of a weight that leaves the graph.
    if any(fake(n).requires_grad and any(user.op == "output" for user in n.users) for n in chain):
        return None
    return Codes(node, tuple(reversed(scales)), tuple(reversed(chain)))


def _name(node: Node) -> str:
    op = nodes.read(node)
    return "" if op is None else op.name


def _step(node: Node, class_dim: int, double: bool) -> tuple[Node, Times | None] | None:
    """What a node casts or multiplies, and with what; None for any other node. double: whether numbers may be fp64."""
    op = nodes.read(node)
    if op is None or op.inplace or op.name not in ("cast", "mul", "div"):
        return None
    source = op.args["input"]
    if op.name == "cast":
        return (source, None) if is_tensor(source) and fake(source).device == fake(node).device else None
    factor, divides = op.args["other"], op.name == "div"
    if divides and op.args["rounding_mode"] is not None:
        return None
    if not divides and not _is_matrix(source, node):
        source, factor = factor, source
    if not _is_matrix(source, node):
        return None
    if is_number(factor):
        number = float(factor) if not divides else 1 / factor if factor else math.inf
        return (source, Times(number, False)) if math.isfinite(number) else None
    if not is_tensor(factor) or fake(factor).dtype not in _WIDE[not double :]:
        return None
    one = same(fake(factor).numel(), 1)
    if not one and not is_vocabulary_vector(fake(factor), fake(node), class_dim):
        return None
    if fake(factor).requires_grad and not fake(node).requires_grad:
        return None  # multiplied under no_grad
    return source, Times(factor, divides)


def _is_matrix(source: Any, node: Node) -> bool:
    """Whether the argument of a product has the shape of the result."""
    if not is_tensor(source):
        return False
    mine, whole = fake(source).shape, fake(node).shape
    return len(mine) == len(whole) and all(map(same, mine, whole))
