"""What shares memory in a graph, and who writes into it: asked here, and nowhere else."""

import functools
import inspect
import itertools
import keyword
import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from .. import compat
from .fakes import example

# operator.iadd(a, b) on a tensor writes into a, as do methods that end in one underscore, setitem and out=.
_INPLACE_FUNCTIONS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")
) | {operator.ilshift, operator.irshift, operator.imatmul, operator.delitem}


def _inplace_argument(node: Node) -> bool:
    """Whether a call has a true `inplace`, by keyword or by position, as in ``F.relu(x, True)``."""
    if node.kwargs.get("inplace"):
        return True
    signature = _signature(node.target)
    if signature is None or "inplace" not in signature.parameters:
        return False
    try:
        return bool(signature.bind(*node.args, **node.kwargs).arguments.get("inplace"))
    except TypeError:
        return False


@functools.cache
def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without one has no such argument
        return None


def mutated(node: Node) -> tuple[Node, ...]:
    """The nodes whose tensors `node` writes into; none for most ops."""
    if node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        if schema is not None:
            return _written_by_schema(node, schema) if schema.is_mutable else ()
        name = getattr(node.target, "__name__", str(node.target))
        if name == "triton_kernel_wrapper_mutation":  # which of them it writes into, only its kernel knows
            return tuple(node.all_input_nodes)
        out = _nodes(node.kwargs.get("out"))
        # `operator.or_` is called so since `or` is a keyword.
        inplace = name.endswith("_") and not name.endswith("__") and not keyword.iskeyword(name[:-1])
        if out or not (inplace or node.target in _INPLACE_FUNCTIONS or _inplace_argument(node)):
            return out
    elif node.op == "call_method":
        name = str(node.target)
        if not (name.endswith("_") and not name.endswith("__")) and name != "__setitem__":
            return ()
    else:
        return ()
    return _nodes(node.args[0] if node.args else next(iter(node.kwargs.values()), None))


def _written_by_schema(node: Node, schema: Any) -> tuple[Node, ...]:
    given = {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)} | node.kwargs
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return tuple(n for name in written for n in _nodes(given.get(name)))


def _nodes(argument: Any) -> tuple[Node, ...]:
    """The nodes in an argument: itself, or those of a list (``torch._foreach_mul_``)."""
    return tuple(n for n in tree_leaves(argument) if isinstance(n, Node))


def storages(node: Node) -> set[StorageWeakRef]:
    """The memory that a node's tensor lies in; nothing inside of a torch.func transform, which is declined anyway."""
    value = example(node)
    if not isinstance(value, Tensor) or compat.is_transformed(value):
        return set()
    return {StorageWeakRef(value.untyped_storage())}


def written(nodes: Iterable[Node], memory: set[StorageWeakRef]) -> bool:
    """Whether one of `nodes` writes into some memory."""
    return any(storages(target) & memory for n in nodes for target in mutated(n))


def written_after(node: Node) -> bool:
    """Whether something is written into a tensor, or into what it was made from, after it was made."""
    memory = set().union(storages(node), *(storages(n) for n in node.all_input_nodes))
    later = itertools.dropwhile(lambda n: n is not node, node.graph.nodes)
    return written(itertools.islice(later, 1, None), memory)


def written_twice(node: Node) -> bool:
    """Whether more than one node writes into a tensor's memory."""
    memory = storages(node)
    return sum(written((n,), memory) for n in node.graph.nodes) > 1


def only_write(node: Node) -> Node | None:
    """The node that writes into a tensor, if it is the only one and nothing reads the tensor before; else None."""
    edits = [user for user in node.users if node in mutated(user)]
    if len(edits) != 1 or written_twice(node):
        return None
    before = itertools.takewhile(lambda n: n is not edits[0], node.graph.nodes)
    return None if any(n in node.users for n in before) else edits[0]


def parted(source: Node, copy: Node) -> bool:
    """Whether a node copies another, and one of the two is written to: they may differ afterwards."""
    if storages(source) == storages(copy):
        return False
    return written(source.graph.nodes, storages(source) | storages(copy))


def written_between(graph: Graph, operands: list[Node], start: Node, end: Node | None) -> Node | None:
    """The first node behind `start` and in front of `end` that writes into the memory of one of `operands`.

    The fused operator reads its operands later than the head did: a write in between would change what it sees.
    """
    memory = set().union(*(storages(n) for n in operands)) if operands else set()
    inside = False
    for node in graph.nodes:
        if node is end:
            return None
        if inside and any(target in operands or storages(target) & memory for target in mutated(node)):
            return node
        inside |= node is start
    return None
