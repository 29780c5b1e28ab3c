"""The tensor that class indices are a view of: equal for losses of the same targets."""

from typing import Any

import torch
from torch.fx import Node

from ..graph import nodes
from ..graph.builder import Builder
from ..graph.facts import Fact
from ..graph.fakes import fake, is_tensor
from ..graph.memory import parted, storages, written
from .indexing import full
from .operands import vocab
from .values import Diagonal, Value


def base(target: Node) -> Node:
    """The tensor that a target is a view of with its elements in the same order."""
    while True:
        op = nodes.read(target)
        if op is None or op.inplace:
            return target
        keeps = op.has(Fact.IN_ORDER) or op.name == "cast"  # to its own dtype, as is asked below
        if op.name == "getitem":
            index = op.args["index"] if isinstance(op.args["index"], tuple) else (op.args["index"],)
            keeps = all(i is None or i is Ellipsis or full(i) for i in index)
            whole = _broadcast(op.args["input"], target) if index in ONE_CLASS else None
            if whole is not None:
                target = whole
                continue
        source = op.args["input"] if keeps else None
        if not is_tensor(source) or fake(source).dtype != fake(target).dtype or parted(source, target):
            return target
        target = source


ONE_CLASS = ((Ellipsis, slice(None, 1, None)), (Ellipsis, slice(0, 1, None)))


def _broadcast(node: Any, part: Node) -> Node | None:
    """What torch.broadcast_tensors expanded, if `part`, the first class of all, has all that there was."""
    taken = nodes.read(node) if isinstance(node, Node) else None
    if taken is None or taken.name != "getitem" or not isinstance(taken.args["index"], int):
        return None
    op = nodes.read(taken.args["input"])
    if op is None or op.name != "broadcast_tensors":
        return None
    source = op.args["tensors"][taken.args["index"]]
    return source if is_tensor(source) and fake(source).shape == fake(part).shape else None


def counts(node: Node) -> bool:
    """Whether a tensor holds 0, 1, 2, ... in the order of its entries: a torch.arange, viewed, and cast to int64."""
    while True:
        node = base(node)
        op = nodes.read(node)
        if op is None or op.name != "cast" or fake(node).dtype != torch.int64:
            break
        node = op.args["input"]
    if node.op != "call_function" or node.target is not torch.arange or not set(node.kwargs) <= {"device", "dtype"}:
        return False
    if written(node.graph.nodes, storages(node)):
        return False
    return len(node.args) == 1 or (len(node.args) == 2 and bool(node.args[0] == 0))


def same_classes(a: Node | Diagonal, b: Node | Diagonal) -> bool:
    """Whether class indices are the same, each one for each of the same rows."""
    if isinstance(a, Node) and isinstance(b, Node) and base(a) is base(b):
        return True
    return all(isinstance(classes, Diagonal) or counts(classes) for classes in (a, b))


def diagonal(builder: Builder, value: Value) -> Any:
    """The numbers of the rows of a matrix as class indices, recorded, 1 wide where the classes are."""
    (rows,) = value.lead_shape
    # A symbolic number of rows is that of the classes (`Value.has_diagonal`).
    count = rows if isinstance(rows, int) else vocab(builder, value)
    return builder.call(torch.arange, count, device=value.fake.device).unsqueeze(value.class_dim)


def as_column(builder: Builder, classes: Node | Diagonal, value: Value) -> Any:
    """The classes, 1 wide where those of the logits are."""
    if isinstance(classes, Diagonal):
        return diagonal(builder, value)
    p = builder.proxy(classes)
    return p if fake(classes).dim() == value.fake.dim() else p.unsqueeze(value.class_dim)
