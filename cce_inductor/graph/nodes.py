"""What a node of a graph calls: its canonical name, its arguments by parameter name, and how a person writes it."""

import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .. import compat
from .facts import Fact
from .spellings import FUNCTIONS, METHODS, NAMES

# Other names for the same parameter.
_RENAMED = {
    "split": {"split_size": "split_size_or_sections"},
    "sum": {"axis": "dim", "keepdims": "keepdim"},
    "mean": {"axis": "dim", "keepdims": "keepdim"},
    "logsumexp": {"axis": "dim", "keepdims": "keepdim"},
    "flatten": {"start": "start_dim", "end": "end_dim"},
    "transpose": {"axis0": "dim0", "axis1": "dim1"},
    "cat": {"axis": "dim"},
}


@dataclass(frozen=True)
class Op:
    """A node as the table of spellings reads it: its canonical name and its arguments by parameter name.

    inplace: whether it writes the result into its first argument.
    """

    name: str
    args: dict[str, Any]
    inplace: bool = False

    @property
    def is_head(self) -> bool:
        """Whether it may be the product that gives logits."""
        return bool(NAMES[self.name].head)

    def has(self, facts: Fact) -> bool:
        """Whether one of `facts` is known of the op."""
        return bool(NAMES[self.name].facts & facts)


_INPLACE_FORMS = {getattr(operator, f"i{name}"): getattr(operator, name) for name in ("add", "sub", "mul", "truediv")}


def read(node: Node) -> Op | None:
    """What `node` is, or None for an op that the table of spellings does not have (or arguments it does not fit)."""
    attribute = compat.attribute_read(node)
    if attribute is not None:
        return Op("getattr", {"input": node.args[0], "name": attribute})
    entry, inplace = _entry(node)
    if entry is None:
        return None
    name, signature = entry
    kwargs = {_RENAMED.get(name, {}).get(key, key): value for key, value in node.kwargs.items()}
    try:
        # What a cast does is read off its result: its keywords do not matter.
        bound = signature.bind(*node.args, **({} if name == "cast" else kwargs))
    except TypeError:
        return None
    bound.apply_defaults()
    return Op(name, dict(bound.arguments), inplace)


def _entry(node: Node) -> tuple[tuple[str, inspect.Signature] | None, bool]:
    """The canonical name and signature of what a node calls, or None; and whether it writes into its first argument."""
    entry, inplace = None, False
    if node.op == "call_function":
        inplace = node.target in _INPLACE_FORMS or node.target is operator.setitem
        entry = FUNCTIONS.get(_INPLACE_FORMS.get(node.target, node.target))  # type: ignore[arg-type]
    elif node.op == "call_method":
        target = str(node.target)
        entry = METHODS.get(target)
        if entry is None and target.endswith("_") and not target.endswith("__"):
            entry, inplace = METHODS.get(target[:-1]), True
        inplace |= target == "__setitem__"
    return entry, inplace


def unknown_arguments(node: Node) -> str:
    """The keywords of a call, as text, for which the table knows the op but cannot read the call; "" if it can."""
    if read(node) is not None or (entry := _entry(node)[0]) is None:
        return ""
    known = {*entry[1].parameters, *_RENAMED.get(entry[0], {})}
    names = [f"{name}=" for name in node.kwargs if name not in known]
    return ", ".join(names) or "arguments in another form"


# Losses over classes that read every one of them.
DENSE_LOSSES = (
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "ctc_loss",
    "kl_div",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "soft_margin_loss",
)


def is_dense_loss(node: Node) -> bool:
    """Whether a node calls one of them. Others, such as mse_loss, may be of hidden states as well."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") in DENSE_LOSSES


def is_autograd_function(node: Node) -> bool:
    """Whether a node applies a torch.autograd.Function."""
    return node.op == "call_function" and node.target is torch.ops.higher_order.autograd_function_apply


# Operators that come with PyTorch; those of other namespaces are somebody's own.
_NAMESPACES = frozenset(("aten", "prims", "prim", "higher_order", "c10d", "_c10d_functional", "_dtensor"))


def is_custom(node: Node) -> bool:
    """Whether a node runs code of the user's own as one op: an autograd function or a custom operator."""
    if node.op != "call_function":
        return False
    target = node.target
    operators = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
    owned = isinstance(target, operators) and str(target).split(".")[0] not in _NAMESPACES
    return owned or is_autograd_function(node)


def called(node: Node) -> str:
    """The name of the function or method that a node calls, without its module."""
    return getattr(node.target, "__name__", str(node.target))


def describe(node: Node) -> str:
    """The op as a person writes it: ``torch.nn.functional.dropout``, ``Tensor.view``, ``%``-names for inputs."""
    if is_autograd_function(node):
        return "torch.autograd.Function.apply"
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    attribute = compat.attribute_read(node)
    if attribute is not None:
        return f"Tensor.{attribute}"
    if node.op == "call_function":
        target = node.target
        module = getattr(target, "__module__", None)
        name = called(node)
        return f"{module}.{name}" if module not in (None, "builtins", "_operator") else name
    return f"{node.op} {node.target}"
