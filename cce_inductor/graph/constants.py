"""Tensors of one number that a graph computes of nothing but numbers, such as ``torch.log(torch.tensor(0.1))``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from .facts import Fact
from .fakes import example
from .nodes import read

_MAKES = (torch.tensor, torch.scalar_tensor, torch.as_tensor)
_FUNCTIONS = (
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.rsub),
    *(torch.log, torch.log1p, torch.exp, torch.sqrt, torch.reciprocal),
)
_METHODS = ("add", "sub", "mul", "div", "neg", "log", "log1p", "exp", "sqrt", "reciprocal", "clone", "detach")


def number(node: Any) -> float | None:
    """What a node is always, in the precision it is computed in; None for anything but a tensor of one such number."""
    made = _tensor(node)
    return None if made is None else float(made)


def _tensor(node: Any) -> Tensor | None:
    z = example(node) if isinstance(node, Node) else None
    if not isinstance(z, Tensor) or z.dim() != 0 or z.requires_grad or _is_edited(node):
        return None
    op = read(node)
    made_of = op.args["fill_value"] if op is not None and op.has(Fact.CONSTANT) else None
    if node.op == "call_function" and node.target in _MAKES:
        made_of = node.args[0]
    if isinstance(made_of, (int, float)):
        return torch.full((), made_of, dtype=z.dtype)
    if not z.is_floating_point():
        return None
    known = node.op == "call_function" and node.target in _FUNCTIONS
    if not known and not (node.op == "call_method" and node.target in _METHODS):
        return None
    values = {n: _tensor(n) for n in node.all_input_nodes}
    if node.kwargs or any(value is None for value in values.values()):
        return None
    args = map_arg(node.args, values.__getitem__)
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:])
        return node.target(*args)  # type: ignore[operator]


def _is_edited(node: Node) -> bool:
    return any((op := read(user)) is not None and op.inplace and user.args[0] is node for user in node.users)
