"""The many spellings of an op, brought to one canonical name with named arguments.

A row of `SPELLINGS` says: these functions and these tensor methods are `name`, and their parameters are called so.
A new spelling is a new entry here; what an op does to logits is decided in `trace`.
"""

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from .. import compat


@dataclass(frozen=True)
class Spelling:
    """`parameters` in order, as in a signature: ``"input dim=None"``; a leading ``*`` collects the rest in a tuple.

    What stands behind that is given by keyword only.
    """

    name: str
    parameters: str
    functions: tuple[Callable, ...] = ()
    methods: tuple[str, ...] = ()

    @property
    def signature(self) -> inspect.Signature:
        kinds = inspect.Parameter
        parameters = []
        kind: Any = kinds.POSITIONAL_OR_KEYWORD
        for text in self.parameters.split():
            name, _, default = text.partition("=")
            if name.startswith("*"):
                parameters.append(kinds(name[1:], kinds.VAR_POSITIONAL))
                kind = kinds.KEYWORD_ONLY
            else:
                parameters.append(kinds(name, kind, default=eval(default) if default else kinds.empty))
        return inspect.Signature(parameters)


_CROSS_ENTROPY = (
    "input target weight=None size_average=None ignore_index=-100 reduce=None reduction='mean' label_smoothing=0.0"
)
_NLL = "input target weight=None size_average=None ignore_index=-100 reduce=None reduction='mean'"
_CAST_METHODS = ("to", "float", "double", "half", "bfloat16", "long", "int", "type", "type_as", "cpu", "cuda")
_REDUCE = "input dim=None keepdim=False dtype=None"
_FACTORY = "dtype=None layout=None device=None requires_grad=False memory_format=None pin_memory=False out=None"

SPELLINGS = (
    # heads
    Spelling("linear", "input weight bias=None", (F.linear, torch._C._nn.linear)),
    Spelling(
        "matmul",
        "input other",
        (torch.matmul, operator.matmul, torch.mm, torch.bmm, torch.linalg.matmul),
        ("matmul", "mm", "bmm", "__matmul__"),
    ),
    Spelling("addmm", "bias input other beta=1 alpha=1", (torch.addmm, torch.baddbmm), ("addmm", "baddbmm")),
    Spelling("mv", "input other", (torch.mv,), ("mv",)),
    Spelling("inner", "input other", (torch.inner,), ("inner",)),
    Spelling("tensordot", "input other dims=2 out=None", (torch.tensordot,)),
    Spelling("einsum", "equation *operands", (torch.einsum, torch.functional.einsum)),
    Spelling(
        "convolution",
        "input weight bias=None stride=1 padding=0 dilation=1 groups=1",
        (torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d),
    ),
    # values
    Spelling("cast", "input *rest", (), _CAST_METHODS),
    Spelling(
        "mul", "input other", (operator.mul, torch.mul, torch.multiply), ("mul", "multiply", "__mul__", "__rmul__")
    ),
    Spelling(
        "div",
        "input other rounding_mode=None",
        (operator.truediv, torch.div, torch.true_divide, torch.divide),
        ("div", "true_divide", "divide", "__truediv__"),
    ),
    Spelling("add", "input other alpha=1", (operator.add, torch.add), ("add", "__add__", "__radd__")),
    Spelling("sub", "input other alpha=1", (operator.sub, torch.sub, torch.subtract), ("sub", "subtract", "__sub__")),
    Spelling("rsub", "input other alpha=1", (torch.rsub,), ("__rsub__",)),
    Spelling("neg", "input", (operator.neg, torch.neg, torch.negative), ("neg", "negative", "__neg__")),
    Spelling("tanh", "input", (torch.tanh, F.tanh), ("tanh",)),
    Spelling("sigmoid", "input", (torch.sigmoid, F.sigmoid, torch.special.expit), ("sigmoid",)),
    Spelling("square", "input", (torch.square,), ("square",)),
    Spelling("sqrt", "input", (torch.sqrt,), ("sqrt",)),
    Spelling("rsqrt", "input", (torch.rsqrt,), ("rsqrt",)),
    Spelling("pow", "input exponent", (operator.pow, torch.pow), ("pow", "__pow__")),
    Spelling("exp", "input", (torch.exp,), ("exp",)),
    Spelling("log", "input", (torch.log,), ("log",)),
    Spelling("clamp", "input min=None max=None", (torch.clamp, torch.clip), ("clamp", "clip")),
    Spelling("detach", "input", (torch.detach,), ("detach",)),
    Spelling("masked_fill", "input mask value", (torch.masked_fill,), ("masked_fill",)),
    Spelling("where", "condition input other", (torch.where,)),
    Spelling("setitem", "input index value", (operator.setitem,), ("__setitem__",)),
    Spelling("gt", "input other", (operator.gt, torch.gt, torch.greater), ("gt", "greater", "__gt__")),
    Spelling("ge", "input other", (operator.ge, torch.ge, torch.greater_equal), ("ge", "greater_equal", "__ge__")),
    Spelling("lt", "input other", (operator.lt, torch.lt, torch.less), ("lt", "less", "__lt__")),
    Spelling("le", "input other", (operator.le, torch.le, torch.less_equal), ("le", "less_equal", "__le__")),
    # rows
    Spelling("view", "input *size", (), ("view", "reshape")),
    Spelling("view_as", "input other", (), ("view_as", "reshape_as")),
    Spelling("reshape", "input shape", (torch.reshape,)),
    Spelling("flatten", "input start_dim=0 end_dim=-1", (torch.flatten,), ("flatten",)),
    Spelling("unflatten", "input dim sizes", (torch.unflatten,), ("unflatten",)),
    Spelling("expand", "input *size", (), ("expand",)),
    Spelling("expand_as", "input other", (), ("expand_as",)),
    Spelling("broadcast_to", "input size", (torch.broadcast_to,), ("broadcast_to",)),
    Spelling("unsqueeze", "input dim", (torch.unsqueeze,), ("unsqueeze",)),
    Spelling("squeeze", "input dim=None", (torch.squeeze,), ("squeeze",)),
    Spelling("copy", "input memory_format=None", (torch.clone,), ("contiguous", "clone")),
    Spelling(
        "transpose",
        "input dim0 dim1",
        (torch.transpose, torch.swapaxes, torch.swapdims),
        ("transpose", "swapaxes", "swapdims"),
    ),
    Spelling("movedim", "input source destination", (torch.movedim, torch.moveaxis), ("movedim", "moveaxis")),
    Spelling("t", "input", (torch.t,), ("t",)),
    Spelling("permute", "input *dims", (), ("permute",)),
    Spelling("permute", "input dims", (torch.permute,)),
    Spelling("getitem", "input index", (operator.getitem,), ("__getitem__",)),
    Spelling("select", "input dim index", (torch.select,), ("select",)),
    Spelling("narrow", "input dim start length", (torch.narrow,), ("narrow",)),
    Spelling("index_select", "input dim index", (torch.index_select,), ("index_select",)),
    Spelling(
        "repeat_interleave",
        "input repeats dim=None output_size=None",
        (torch.repeat_interleave,),
        ("repeat_interleave",),
    ),
    Spelling("repeat", "input *sizes", (), ("repeat",)),
    Spelling("flip", "input dims", (torch.flip,)),
    Spelling("flip", "input *dims", (), ("flip",)),
    Spelling("roll", "input shifts dims=None", (torch.roll,), ("roll",)),
    Spelling("split", "input split_size_or_sections dim=0", (torch.split, torch.functional.split), ("split",)),
    Spelling("chunk", "input chunks dim=0", (torch.chunk,), ("chunk",)),
    Spelling("tensor_split", "input indices_or_sections dim=0", (torch.tensor_split,), ("tensor_split",)),
    Spelling("unbind", "input dim=0", (torch.unbind,), ("unbind",)),
    Spelling("broadcast_tensors", "*tensors", (torch.broadcast_tensors, torch.functional.broadcast_tensors)),
    Spelling("cat", "tensors dim=0", (torch.cat, torch.concat, torch.concatenate)),
    Spelling("stack", "tensors dim=0", (torch.stack,)),
    # metadata
    Spelling("size", "input dim=None", (), ("size",)),
    Spelling("metadata", "input *rest", (), ("dim", "ndimension", "numel", "nelement", "stride", "is_contiguous")),
    # losses
    Spelling("log_softmax", "input dim=None _stacklevel=3 dtype=None", (F.log_softmax,)),
    Spelling("log_softmax", "input dim dtype=None", (torch.log_softmax, torch.special.log_softmax), ("log_softmax",)),
    Spelling("softmax", "input dim=None _stacklevel=3 dtype=None", (F.softmax,)),
    Spelling("softmax", "input dim dtype=None", (torch.softmax, torch.special.softmax), ("softmax",)),
    # reductions over the classes
    Spelling("logsumexp", "input dim keepdim=False", (torch.logsumexp, torch.special.logsumexp), ("logsumexp",)),
    Spelling("sum", _REDUCE, (torch.sum,), ("sum",)),
    Spelling("mean", _REDUCE, (torch.mean,), ("mean",)),
    Spelling("argmax", "input dim=None keepdim=False", (torch.argmax,), ("argmax",)),
    Spelling("amax", "input dim keepdim=False", (torch.amax,), ("amax",)),
    Spelling("max", "input dim keepdim=False", (torch.max,), ("max",)),
    Spelling("topk", "input k dim=-1 largest=True sorted=True", (torch.topk,), ("topk",)),
    Spelling("count_nonzero", "input dim=None", (torch.count_nonzero,), ("count_nonzero",)),
    Spelling("gather", "input dim index sparse_grad=False", (torch.gather,), ("gather",)),
    Spelling("take_along_dim", "input indices dim=None", (torch.take_along_dim,), ("take_along_dim",)),
    Spelling("one_hot", "input num_classes=-1", (F.one_hot, torch._C._nn.one_hot)),
    Spelling("scatter", "input dim index src=None value=None reduce=None", (torch.scatter,), ("scatter",)),
    Spelling("scatter_add", "input dim index src", (torch.scatter_add,), ("scatter_add",)),
    Spelling("full", f"size fill_value {_FACTORY}", (torch.full,)),
    Spelling("full", f"input fill_value {_FACTORY}", (torch.full_like,)),
    Spelling("full", f"input size fill_value {_FACTORY}", (), ("new_full",)),
    Spelling("zeros", f"*size {_FACTORY}", (torch.zeros,)),
    Spelling("zeros", f"input *size {_FACTORY}", (torch.zeros_like,), ("new_zeros",)),
    Spelling("cross_entropy", _CROSS_ENTROPY, (F.cross_entropy,)),
    Spelling("nll_loss", _NLL, (F.nll_loss,)),
)

_FUNCTIONS = {f: (s.name, s.signature) for s in SPELLINGS for f in s.functions}
_METHODS = {m: (s.name, s.signature) for s in SPELLINGS for m in s.methods}
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
    """A node read by the vocabulary: its canonical name and its arguments by parameter name.

    inplace: whether it writes the result into its first argument.
    """

    name: str
    args: dict[str, Any]
    inplace: bool = False


_INPLACE_FORMS = {getattr(operator, f"i{name}"): getattr(operator, name) for name in ("add", "sub", "mul", "truediv")}


def read(node: Node) -> Op | None:
    """What `node` is, or None for an op that the vocabulary does not have (or arguments it does not fit)."""
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
        entry = _FUNCTIONS.get(_INPLACE_FORMS.get(node.target, node.target))  # type: ignore[arg-type]
    elif node.op == "call_method":
        target = str(node.target)
        entry = _METHODS.get(target)
        if entry is None and target.endswith("_") and not target.endswith("__"):
            entry, inplace = _METHODS.get(target[:-1]), True
        inplace |= target == "__setitem__"
    return entry, inplace


def unknown_arguments(node: Node) -> str:
    """The keywords of a call, as text, for which the vocabulary knows the op but cannot read the call; "" if it can."""
    if read(node) is not None or (entry := _entry(node)[0]) is None:
        return ""
    known = {*entry[1].parameters, *_RENAMED.get(entry[0], {})}
    names = [f"{name}=" for name in node.kwargs if name not in known]
    return ", ".join(names) or "arguments in another form"


_SIZES = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_size.default, torch.ops.aten.sym_numel.default)


def reads_size(node: Node) -> bool:
    """Whether a node asks for a size that only the data knows: Dynamo checks it as soon as it is there."""
    return node.target in _SIZES


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
        name = getattr(target, "__name__", str(target))
        return f"{module}.{name}" if module not in (None, "builtins", "_operator") else name
    return f"{node.op} {node.target}"


def functions_of(*names: str) -> frozenset[Callable]:
    """The torch functions and Tensor methods of these canonical names, as ``__torch_function__`` is given them."""
    rows = [row for row in SPELLINGS if row.name in names]
    methods = [getattr(torch.Tensor, method) for row in rows for method in row.methods]
    return frozenset((*methods, *(function for row in rows for function in row.functions)))
