"""Which nodes are functions of row statistics, and of which.

A rule gives the `Reduction` of a node that reduces a value over the classes: a loss, a log-sum-exp, the entry of a
target, a sum, an argmax. A rule that cannot take a node raises `Refused` with the reason and the cure.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..graph import nodes
from ..graph.facts import Fact
from ..graph.fakes import fake, guarded_same, is_number, is_tensor, same
from ..graph.refusal import Refused
from ..ops.losses import CrossEntropy
from .indexing import full, positions
from .one_hot import one_hot_target
from .pointwise import not_rounded
from .reduction import SOFTMAX, Loss, Reduction, as_it_is
from .shapes import same_rows
from .softmax import over_classes
from .targets import counts
from .values import Args, Mixture, Value

# ---- losses over classes


def arguments_of(args: Args) -> CrossEntropy:
    """The arguments of cross_entropy or nll_loss, or Refused where they ask for more than row statistics."""
    if args["size_average"] is not None or args["reduce"] is not None:
        raise Refused("the deprecated arguments size_average or reduce", "use reduction=")
    smoothing = args.get("label_smoothing", 0.0)
    if not isinstance(args["ignore_index"], int) or not is_number(smoothing) or not isinstance(args["reduction"], str):
        raise Refused("an argument of the loss is computed in the graph", "use Python numbers")
    return CrossEntropy(args["ignore_index"], args["reduction"], float(smoothing))


def reads_the_classes(name: str, value: Value) -> None:
    """Refused unless the classes are where the loss expects them."""
    expected = 1 if value.fake.dim() > 1 else 0
    if value.class_dim != expected:
        raise Refused(
            f"the classes are dimension {value.class_dim} of {tuple(value.fake.shape)}, but {name} takes dimension "
            f"{expected} for the classes",
            "flatten the logits to (N, V)",
        )


def _loss(value: Value, node: Node, args: Args, name: str) -> Loss:
    target, weight = args["target"], args["weight"]
    arguments = arguments_of(args)
    indices, ignores = target, True
    if fake(target).is_floating_point():
        found = one_hot_target(target, value) if weight is None else None
        if found is None:
            raise Refused("class probabilities as target: they need every logit", "use class indices")
        indices, ignores = found, False
    if fake(indices).dtype != torch.int64:
        raise Refused(f"targets of dtype {fake(indices).dtype}", "use target.long()")
    wanted = ("log_softmax",) if name == "nll_loss" else ("logits", "log_softmax")
    if value.kind not in wanted or value.factor != 1.0 or value.picked is not None:
        kind = value.kind.replace("_", "-")
        raise Refused(f"{name} reads {kind}, not {wanted[0]}", "use cross_entropy on logits")
    not_rounded(value)
    reads_the_classes(name, value)
    if not same_rows(indices, value):
        shape = tuple(fake(indices).shape)
        raise Refused(f"targets of shape {shape} for logits with rows {value.lead_shape}", "give each row one target")
    if arguments.label_smoothing and value.masks:
        raise Refused("label smoothing over masked classes", "slice the weight instead of masking")
    statistics = tuple(arguments.statistics.split())
    return Loss(node, value, statistics, indices, weight=weight, arguments=arguments, ignores=ignores)


def cross_entropy(value: Value, node: Node, args: Args) -> Reduction:
    return _loss(value, node, args, "cross_entropy")


def nll_loss(value: Value, node: Node, args: Args) -> Reduction:
    return _loss(value, node, args, "nll_loss")


# ---- reductions over the classes


def _reducible(value: Value, node: Node) -> None:
    not_rounded(value)
    if fake(node).dtype == torch.float64 and value.head.dtype != torch.float64:
        raise Refused("a float64 statistic of logits in a narrower dtype", "use float32")


def _keep(value: Value, keepdim: bool) -> Callable[[Any], Any]:
    return (lambda r: r.unsqueeze(value.class_dim)) if keepdim else as_it_is


def logsumexp(value: Value, node: Node, args: Args) -> Reduction:
    value.need("logits", "logsumexp of log-probabilities, which is 0", "leave it out")
    _reducible(value, node)
    over_classes(value, "logsumexp", _single(args["dim"]))
    # What is added to the rows may leave a small difference: it has all its digits.
    flat = (lambda s: s.lse + s.lse_low) if value.terms else (lambda s: s.lse)
    return Reduction(node, value, SOFTMAX, flat=flat, shape=_keep(value, args["keepdim"]))


def _single(dim: Any) -> Any:
    return dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim


def argmax(value: Value, node: Node, args: Args) -> Reduction:
    over_classes(value, "argmax", args["dim"])
    _grows(value)
    _no_finite_mask(value)
    return Reduction(node, value, ("argmax",), flat=lambda s: s.argmax, shape=_keep(value, args["keepdim"]))


def _grows(value: Value) -> None:
    if value.picked is not None or value.kind not in ("logits", "log_softmax", "softmax") or value.factor <= 0:
        raise Refused("argmax of something that does not grow with the logits", "take it of the logits")


def _no_finite_mask(value: Value) -> None:
    if any(m.fill != -torch.inf for m in value.masks):
        raise Refused("logits that are masked with a finite number", "use -inf")


def _entry(value: Value, name: str = "target_logit") -> tuple[tuple[str, ...], Callable[[Any], Any]]:
    """The statistics that an entry of each row needs, and the entry.

    name: "target_logit"; or "entry_logits", of K classes; or "maximum".
    """
    factor = value.factor
    if value.kind == "logits":
        return (name,), lambda s: _times(getattr(s, name), factor)
    if value.kind == "log_softmax":
        return (*SOFTMAX, name), lambda s: _times(s.log_p(getattr(s, name)), factor)
    if value.kind == "softmax":
        return (*SOFTMAX, name), lambda s: _times(s.log_p(getattr(s, name)).exp(), factor)
    if value.kind == "exp":
        return (name,), lambda s: _times(getattr(s, name).exp(), factor)
    raise Refused("one entry of the product of the softmax and its logarithm", "compute it from log_softmax")


def _times(result: Any, factor: float) -> Any:
    return result if factor == 1.0 else result * factor


def _whole(value: Value) -> tuple[tuple[str, ...], Callable[[Any], Any]]:
    """The statistics that the sum over the classes needs, and the sum."""
    factor = value.factor
    if value.picked is not None:
        return _entry(value)
    if value.kind == "exp":
        return SOFTMAX, lambda s: _times(s.lse.exp() * (1.0 + s.lse_low), factor)  # all its digits
    if value.kind == "p log p":
        return (*SOFTMAX, "entropy"), lambda s: s.entropy * -factor
    if value.kind == "p z":
        return (*SOFTMAX, "entropy"), lambda s: _times((s.lse - s.entropy) + s.lse_low, factor)
    if value.masks:
        raise Refused("a sum over masked classes", "slice the weight instead of masking")
    if value.kind == "logits":
        return ("logit_sum",), lambda s: _times(s.logit_sum, factor)
    if value.kind == "log_softmax":
        return (*SOFTMAX, "logit_sum"), lambda s: _times(s.log_p(s.logit_sum, s.vocab), factor)
    cure = "leave it out (torch.distributions.Categorical: give it logits=, not probs=)"
    raise Refused("a sum of probabilities, which is 1", cure)


def total(value: Value, node: Node, args: Args) -> Reduction:
    return _reduced(value, node, args, mean=False)


def mean(value: Value, node: Node, args: Args) -> Reduction:
    return _reduced(value, node, args, mean=True)


def _reduced(value: Value, node: Node, args: Args, mean: bool) -> Reduction:
    _reducible(value, node)
    shape = over_rows(value, args["dim"], bool(args["keepdim"]), mean)
    statistics, total = _whole(value)

    def flat(s: Any) -> Any:
        return total(s) / s.vocab if mean else total(s)

    assert not isinstance(value.picked, Mixture)
    return Reduction(node, value, statistics, value.picked, flat=flat, shape=shape)


def over_rows(value: Value, dim: Any, keepdim: bool, mean: bool) -> Callable[[Any], Any]:
    """What a sum (or mean) over the classes, and perhaps some rows, makes of one over the classes alone."""
    rank, c = value.fake.dim(), value.class_dim
    listed = range(rank) if dim is None else [dim] if isinstance(dim, int) else dim
    dims = sorted(d % rank for d in listed)
    if c not in dims:
        raise Refused("the logits are summed over rows", "sum the hidden states instead")
    others = [d for d in dims if d != c]

    def shape(r: Any) -> Any:
        r = r.unsqueeze(c)
        if others:
            r = r.mean(others, keepdim=True) if mean else r.sum(others, keepdim=True)
        for d in reversed(dims) if not keepdim else ():
            r = r.squeeze(d)
        return r

    return shape


# ---- the entry of a target


def _indices(index: Any) -> Node:
    if not is_tensor(index) or fake(index).dtype != torch.int64:
        raise Refused("classes are picked by something other than int64 indices", "use target.long()")
    return index


def _picked(value: Value, node: Node, target: Node, wraps: bool, shape: Callable[[Any], Any]) -> Reduction:
    """One class for each row."""
    _pickable(value, node)
    statistics, entry = _entry(value)
    return Reduction(node, value, statistics, target, wraps, flat=entry, shape=shape)


def _several_picked(value: Value, node: Node, index: Node, wraps: bool) -> Reduction:
    """K classes for each row: `index` has the logits' shape, with K in the place of the classes."""
    _pickable(value, node)
    statistics, entry = _entry(value, "entry_logits")
    c = value.class_dim
    moved = as_it_is if c == value.fake.dim() - 1 else lambda r: r.movedim(-1, c)
    return Reduction(node, value, statistics, wraps=wraps, entries=index, flat=entry, shape=moved)


def _pickable(value: Value, node: Node) -> None:
    _reducible(value, node)
    if value.picked is not None:
        raise Refused("an entry of logits multiplied by a one-hot tensor", "use one of the two")


def gather(value: Value, node: Node, args: Args) -> Reduction | None:
    """The entries of a class, or of several, for each row; None for a gather of rows."""
    dim = args["dim"]
    if not isinstance(dim, int) or dim % value.fake.dim() != value.class_dim:
        return None
    return _along(value, node, _indices(args["index"]))


def _along(value: Value, node: Node, index: Node) -> Reduction:
    """Entries by an index that has the logits' shape but for the number of classes."""
    given = tuple(fake(index).shape)
    lead = given[: value.class_dim] + given[value.class_dim + 1 :]
    if len(given) != value.fake.dim() or not all(map(guarded_same, lead, value.lead_shape)):
        raise Refused(f"classes of shape {given} are picked out of logits of shape {tuple(value.fake.shape)}", EACH)
    if same(given[value.class_dim], 1):
        return _picked(value, node, index, False, _keep(value, True))
    return _several_picked(value, node, index, False)


EACH = "pick classes for each row"


def take_along_dim(value: Value, node: Node, args: Args) -> Reduction:
    index = _indices(args["indices"])
    over_classes(value, "take_along_dim", args["dim"])
    return _along(value, node, index)


def getitem(value: Value, node: Node, args: Args) -> Reduction | None:
    """logits[arange(N), target], or with K classes for each row; None for an index that takes no classes out."""
    entries = positions(value, args["index"], lists=True)
    own = next((i for dim, i in entries if dim == value.class_dim), None)
    if not is_tensor(own) or fake(own).dtype in (torch.bool, torch.uint8):
        return None
    lead = [i for dim, i in entries if dim != value.class_dim]
    if fake(own).dim() == 1 and all(full(i) for i in lead):
        return None  # the same classes of every row
    target = _indices(own)
    if value.class_dim != value.fake.dim() - 1 or any(dim is None for dim, _ in entries):
        raise Refused("classes are picked with new dimensions", EACH)
    if same_rows(target, value) and all(is_arange(i, value.lead_shape, d) for d, i in enumerate(lead)):
        return _picked(value, node, target, True, as_it_is)
    shape = tuple(fake(target).shape)
    rows = len(shape) == value.fake.dim() and all(map(same, shape, value.lead_shape))
    if not rows or not all(is_arange(i, shape, d) for d, i in enumerate(lead)):
        raise Refused("classes are picked out of some rows of the logits", "use gather: " + EACH)
    return _several_picked(value, node, target, True)


def is_arange(index: Any, lead: tuple, dim: int) -> bool:
    """Whether `index` holds 0, 1, 2, ... along dimension `dim` of a shape, and is broadcast along the others."""
    if isinstance(index, (list, tuple, range)):
        return len(lead) == 1 and same(len(index), lead[0]) and list(index) == list(range(len(index)))
    if not is_tensor(index):
        return False
    op = nodes.read(index)
    if op is not None and op.has(Fact.REPEATS) and op.name != "repeat" and fake(op.args["input"]).dim() == len(lead):
        index = op.args["input"]
    shape = fake(index).shape
    at = dim - (len(lead) - len(shape))  # dimensions are aligned from the right
    if at < 0 or not all(same(s, lead[dim] if i == at else 1) for i, s in enumerate(shape)):
        return False
    return counts(index)


def max_and_class(value: Value, node: Node, args: Args) -> list:
    """The largest logit of each row, and its class: what the two parts of the result are."""
    if value.members:
        raise Refused("the largest logits of several heads", "take those of each head")
    over_classes(value, "max", args["dim"])
    return [lambda part: maximum(value, part, bool(args["keepdim"])), lambda part: argmax(value, part, args)]


def maximum(value: Value, node: Node, keepdim: bool) -> Reduction:
    """The largest logit, that of the class that argmax finds; or its probability, or the logarithm of that."""
    _reducible(value, node)
    _grows(value)
    _no_finite_mask(value)
    statistics, entry = _entry(value, "maximum")
    read = tuple("argmax" if name == "maximum" else name for name in statistics)
    return Reduction(node, value, read, flat=entry, shape=_keep(value, keepdim))


def amax(value: Value, node: Node, args: Args) -> Reduction:
    over_classes(value, "amax", _single(args["dim"]))
    return maximum(value, node, args["keepdim"])
