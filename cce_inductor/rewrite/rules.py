"""What each op does to logits: one function per op of the vocabulary, in three tables.

`HEADS` read a node as a head. `VALUES` give the `Value` of a node from the value of its input: the op commutes with the
head (row maps) or is an attribute of the operator (casts, scale, bias, softcap). `LOSSES` read a node as a loss over
row statistics. A rule that cannot take a node raises `Refused` with the reason and the cure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..ops.losses import CrossEntropy
from . import vocabulary
from .values import Head, Refused, Shift, Value, example, fake


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without adding a guard."""
    return statically_known_true(a == b)


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


# ---- heads


def _head(node: Node, x: Any, w: Any, bias: Any, transposed: bool) -> Head:
    if not isinstance(x, Node) or not isinstance(w, Node):
        raise Refused("an operand of the head is not a tensor of the graph", "make it one")
    if fake(w).dim() != 2:
        raise Refused(f"the head's weight has {fake(w).dim()} dimensions, not 2", "flatten the weight to (V, D)")
    if not fake(node).is_floating_point():
        raise Refused(f"the head computes in {fake(node).dtype}", "use a floating dtype")
    return Head(node, x, w, bias, transposed)


def _linear(node: Node, args: dict[str, Any]) -> Head:
    return _head(node, args["input"], args["weight"], args["bias"], False)


def _matmul(node: Node, args: dict[str, Any]) -> Head:
    return _head(node, args["input"], args["other"], None, True)


def _addmm(node: Node, args: dict[str, Any]) -> Head:
    if args["beta"] != 1 or args["alpha"] != 1:
        raise Refused("addmm with beta or alpha other than 1", "scale the logits behind the head")
    head = _head(node, args["input"], args["other"], args["bias"], True)
    if not is_vocabulary_vector(fake(args["bias"]), fake(node), fake(node).dim() - 1):
        raise Refused("addmm adds a matrix, not one bias per class", "add a (V,) bias")
    return head


HEADS: dict[str, Callable[[Node, dict[str, Any]], Head]] = {"linear": _linear, "matmul": _matmul, "addmm": _addmm}


def is_vocabulary_vector(other: Tensor, z: Tensor, class_dim: int) -> bool:
    """Whether `other` broadcasts against logits `z` along every dimension but the classes."""
    from_right = z.dim() - class_dim  # 1 for the last dimension
    if other.dim() < from_right or other.dim() > z.dim():
        return False
    return all(
        same(size, z.shape[class_dim]) if other.dim() - i == from_right else same(size, 1)
        for i, size in enumerate(other.shape)
    )


# ---- values


def _cast(value: Value, node: Node, args: dict[str, Any]) -> Value:
    old, new = value.fake, fake(node)
    if not new.is_floating_point():
        raise Refused(f"logits cast to {new.dtype}", "keep them floating")
    if new.device != old.device:
        raise Refused(f"logits moved from {old.device} to {new.device}", "compute the loss where the head is")
    if new.dtype == torch.float64 and value.head.dtype != torch.float64:
        raise Refused(
            f"logits computed in {value.head.dtype} and cast to float64: the fused statistics are fp32",
            "cast to float32 instead",
        )
    dtype = new.dtype
    # A wider cast of what was rounded does not bring the digits back: only a loss minds, see check_loss.
    rounded = value.rounded or torch.finfo(dtype).eps > torch.finfo(value.head.dtype).eps
    return value.then(node, lambda z, _: z.to(dtype), rounded=rounded)


def _scale(value: Value, node: Node, factor: float, step: Any) -> Value:
    if value.kind != "logits":
        raise Refused("log-probabilities are multiplied before the loss reads them", "scale the loss instead")
    return value.scaled(factor).then(node, step)


def _mul(value: Value, node: Node, args: dict[str, Any]) -> Value:
    factor = args["other"] if args["input"] is value.node else args["input"]
    if not _number(factor):
        raise Refused("logits multiplied by a tensor", "multiply by a number, or scale the hidden states instead")
    return _scale(value, node, factor, lambda z, _: z * factor)


def _div(value: Value, node: Node, args: dict[str, Any]) -> Value:
    divisor = args["other"]
    if args["input"] is not value.node or not _number(divisor) or args["rounding_mode"] is not None or divisor == 0:
        raise Refused("logits are a divisor, or divided by a tensor", "divide by a number, or scale the hidden states")
    return _scale(value, node, 1.0 / divisor, lambda z, _: z / divisor)


def _neg(value: Value, node: Node, args: dict[str, Any]) -> Value:
    return _scale(value, node, -1.0, lambda z, _: -z)


def _tanh(value: Value, node: Node, args: dict[str, Any]) -> Value:
    if value.kind != "logits" or value.capped:
        raise Refused("tanh of something other than scaled logits", "use one softcap, cap * tanh(logits / cap)")
    return value.then(node, lambda z, _: torch.tanh(z), capped=True)


def _add(value: Value, node: Node, args: dict[str, Any], sign: float = 1.0) -> Value:
    first = args["input"] is value.node
    other = args["other"] if first else args["input"]
    alpha = args["alpha"]
    if value.kind != "logits":
        raise Refused("something is added to log-probabilities before the loss reads them", "add it to the loss")
    if not isinstance(other, Node) or not isinstance(example(other), Tensor):
        raise Refused("a number is added to the logits", "drop it: the softmax does not depend on it")
    if not _number(alpha) or alpha != 1 or (sign < 0 and not first):
        raise Refused("logits are subtracted from a tensor, or added with alpha", "write logits + bias")
    if value.capped:
        raise Refused("a prior is added behind the softcap", "add it in front of the softcap")
    if not is_vocabulary_vector(fake(other), value.fake, value.class_dim) or fake(node).shape != value.fake.shape:
        raise Refused(
            f"a tensor of shape {tuple(fake(other).shape)} is added to logits of shape {tuple(value.fake.shape)}: it "
            "is not one bias per class",
            "only a bias over the vocabulary can be fused",
        )
    if fake(other).dtype == torch.float64 and value.head.dtype != torch.float64:
        raise Refused("a float64 bias is added to the logits", "cast it to float32")
    if not fake(other).is_floating_point():
        raise Refused(f"a tensor of dtype {fake(other).dtype} is added to the logits", "cast it to the logits' dtype")
    index = len(value.extra)

    def step(z: Tensor, extra: list[Tensor]) -> Tensor:
        return z + extra[index].reshape(-1) if sign > 0 else z - extra[index].reshape(-1)

    shifts = (*value.shifts, Shift(other, sign))
    return value.then(node, step, shifts=shifts, extra=(*value.extra, other))


def _sub(value: Value, node: Node, args: dict[str, Any]) -> Value:
    return _add(value, node, args, sign=-1.0)


def _detach(value: Value, node: Node, args: dict[str, Any]) -> Value:
    return value.then(node, lambda z, _: z.detach())


def _log_softmax(value: Value, node: Node, args: dict[str, Any]) -> Value:
    dim = args["dim"]
    if value.kind != "logits":
        raise Refused("log_softmax of log-probabilities", "take it once")
    if not isinstance(dim, int) or dim % value.fake.dim() != value.class_dim:
        raise Refused(
            f"log_softmax over dimension {dim}, but the classes are dimension {value.class_dim} of "
            f"{tuple(value.fake.shape)}",
            "normalise over the vocabulary",
        )
    dtype = fake(node).dtype
    if dtype == torch.float64 and value.head.dtype != torch.float64:
        raise Refused("log_softmax in float64 of logits in a narrower dtype", "use dtype=torch.float32")
    return value.then(node, lambda z, _: F.log_softmax(z, -1, dtype=dtype), kind="log_softmax")


# ---- rows


def _output_class_dim(value: Value, node: Node) -> int:
    """Where a reshape put the classes, or Refused if it split them, merged them or moved rows into them."""
    old, new, c = value.fake.shape, fake(node).shape, value.class_dim

    def count(sizes: Any) -> Any:
        product: Any = 1
        for size in sizes:
            product = product * size
        return product

    for j, size in enumerate(new):
        before = same(count(new[:j]), count(old[:c]))
        behind = same(count(new[j + 1 :]), count(old[c + 1 :]))
        # A reshape keeps the number of elements: with the classes last, what stands before them follows.
        if same(size, old[c]) and (behind and (before or (j == len(new) - 1 and c == len(old) - 1))):
            return j
    raise Refused(
        f"a reshape from {tuple(old)} to {tuple(new)} does not keep the {old[c]} classes in a dimension of their own",
        "reshape only the leading dimensions",
    )


def _resize(value: Value, node: Node, sizes: tuple) -> Value:
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list, torch.Size)):
        sizes = tuple(sizes[0])
    class_dim = _output_class_dim(value, node)
    if len(sizes) != fake(node).dim():
        raise Refused("the logits are viewed as another dtype, or with a size not spelled out", "name every dimension")
    others_known = not any(isinstance(s, int) and s == -1 for i, s in enumerate(sizes) if i != class_dim)

    def replay(h: Any, width: Any) -> Any:
        width = -1 if others_known else width
        return h.reshape(*(width if i == class_dim else s for i, s in enumerate(sizes)))

    return value.mapped(node, replay, class_dim)


def _view(value: Value, node: Node, args: dict[str, Any]) -> Value:
    return _resize(value, node, args["size"])


def _reshape(value: Value, node: Node, args: dict[str, Any]) -> Value:
    return _resize(value, node, (args["shape"],))


def _flatten(value: Value, node: Node, args: dict[str, Any]) -> Value:
    start, end = args["start_dim"], args["end_dim"]
    return value.mapped(node, lambda h, _: h.flatten(start, end), _output_class_dim(value, node))


def _unsqueeze(value: Value, node: Node, args: dict[str, Any]) -> Value:
    dim = args["dim"] % (value.fake.dim() + 1)
    return value.mapped(node, lambda h, _: h.unsqueeze(dim), value.class_dim + (dim <= value.class_dim))


def _squeeze(value: Value, node: Node, args: dict[str, Any]) -> Value:
    dim = args["dim"]
    if not isinstance(dim, int):
        raise Refused("squeeze of every dimension, or of several", "squeeze one dimension at a time")
    dim %= value.fake.dim()
    if dim == value.class_dim:
        raise Refused("squeeze of the class dimension", "squeeze a leading dimension")
    gone = value.fake.dim() - fake(node).dim()
    return value.mapped(node, lambda h, _: h.squeeze(dim), value.class_dim - (gone if dim < value.class_dim else 0))


def _copy(value: Value, node: Node, args: dict[str, Any]) -> Value:
    return value.at(node)


def _transpose(value: Value, node: Node, args: dict[str, Any]) -> Value:
    rank = value.fake.dim()
    a, b = args["dim0"] % rank, args["dim1"] % rank
    moved = {a: b, b: a}.get(value.class_dim, value.class_dim)
    return value.mapped(node, lambda h, _: h.transpose(a, b), moved)


def _permute(value: Value, node: Node, args: dict[str, Any]) -> Value:
    dims = args["dims"]
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    order = [d % value.fake.dim() for d in dims]
    return value.mapped(node, lambda h, _: h.permute(*order), order.index(value.class_dim))


def _t(value: Value, node: Node, args: dict[str, Any]) -> Value:
    return _transpose(value, node, {"dim0": 0, "dim1": value.fake.dim() - 1})


def _getattr(value: Value, node: Node, args: dict[str, Any]) -> Value:
    rank, name = value.fake.dim(), args["name"]
    if name == "mT" or (name == "T" and rank == 2):
        return _transpose(value, node, {"dim0": rank - 2, "dim1": rank - 1})
    raise Refused(f"the attribute {name} of the logits is read", "read it from the hidden states")


def _getitem(value: Value, node: Node, args: dict[str, Any]) -> Value:
    index = args["index"] if isinstance(args["index"], tuple) else (args["index"],)
    rank = value.fake.dim()
    if any(not (i is None or i is Ellipsis or isinstance(i, (int, slice))) or isinstance(i, bool) for i in index):
        raise Refused("logits indexed by a tensor", "index the hidden states in front of the head")
    consumed = sum(i is not None and i is not Ellipsis for i in index)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = index[:at] + (slice(None),) * (rank - consumed) + index[at + 1 :]
    dim, out_dim, class_dim = 0, 0, None
    for i in index:
        if i is None:
            out_dim += 1
            continue
        if dim == value.class_dim:
            if i not in (slice(None), slice(0, None), slice(None, None, 1), slice(0, None, 1)):
                raise Refused("a part of the vocabulary is taken out of the logits", "slice the weight instead")
            class_dim = out_dim
        dim += 1
        out_dim += not isinstance(i, int)
    if class_dim is None:
        class_dim = out_dim + value.class_dim - dim
    return value.mapped(node, lambda h, _: h[index], class_dim)


VALUES: dict[str, Callable[[Value, Node, dict[str, Any]], Value]] = {
    "cast": _cast,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "tanh": _tanh,
    "add": _add,
    "sub": _sub,
    "detach": _detach,
    "log_softmax": _log_softmax,
    "view": _view,
    "reshape": _reshape,
    "flatten": _flatten,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "copy": _copy,
    "transpose": _transpose,
    "t": _t,
    "permute": _permute,
    "getattr": _getattr,
    "getitem": _getitem,
}


# ---- losses


@dataclass(frozen=True)
class Loss:
    """A node that is a loss over row statistics: class indices `target`, `weight` per class or None."""

    node: Node
    input: Node
    target: Node
    weight: Node | None
    arguments: CrossEntropy


def _class_indices(node: Node, args: dict[str, Any]) -> Loss:
    """The arguments of cross_entropy or nll_loss, or Refused where they ask for more than row statistics."""
    if args["size_average"] is not None or args["reduce"] is not None:
        raise Refused("the deprecated arguments size_average or reduce", "use reduction=")
    target, weight = args["target"], args["weight"]
    if not isinstance(target, Node) or not isinstance(args["input"], Node):
        raise Refused("the target is not a tensor of the graph", "make it one")
    if fake(target).is_floating_point():
        raise Refused("class probabilities as target: they need every logit", "use class indices")
    if fake(target).dtype != torch.int64:
        raise Refused(f"targets of dtype {fake(target).dtype}", "use target.long()")
    smoothing = args.get("label_smoothing", 0.0)
    if not isinstance(args["ignore_index"], int) or not _number(smoothing) or not isinstance(args["reduction"], str):
        raise Refused("an argument of the loss is computed in the graph", "use Python numbers")
    arguments = CrossEntropy(args["ignore_index"], args["reduction"], float(smoothing))
    return Loss(node, args["input"], target, weight, arguments)


LOSSES: dict[str, Callable[[Node, dict[str, Any]], Loss]] = {
    "cross_entropy": _class_indices,
    "nll_loss": _class_indices,
}


def check_loss(loss: Loss, value: Value) -> None:
    """Refused unless `loss` reads `value` along its class dimension, one target per row."""
    name = vocabulary.read(loss.node).name  # type: ignore[union-attr]
    wanted = "log_softmax" if name == "nll_loss" else "logits"
    if value.kind != wanted:
        raise Refused(f"{name} reads {value.kind.replace('_', '-')}, not {wanted}", "use cross_entropy on logits")
    if value.rounded:
        raise Refused(
            f"logits computed in {value.head.dtype} are rounded to a narrower dtype before the loss",
            "compute the head in that dtype, or leave the cast out",
        )
    expected = 1 if value.fake.dim() > 1 else 0
    if value.class_dim != expected:
        raise Refused(
            f"the classes are dimension {value.class_dim} of {tuple(value.fake.shape)}, but {name} takes dimension "
            f"{expected} for the classes",
            "flatten the logits to (N, V)",
        )
    lead, target = value.lead_shape, tuple(fake(loss.target).shape)
    if len(lead) != len(target) or not all(same(a, b) for a, b in zip(lead, target, strict=True)):
        raise Refused(f"targets of shape {target} for logits with rows {lead}", "give each row one target")
