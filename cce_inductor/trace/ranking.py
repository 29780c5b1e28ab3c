"""Reductions of the order of the logits: the largest of each row, and how many pass a comparison with one number.

They are for logging, have no gradient, and are served by an operator of their own (`emit_ranking`). A comparison is a
`Value` of its own kind; its sum over the classes is the reduction.
"""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..graph import nodes
from ..graph.facts import Fact
from ..graph.fakes import fake, is_tensor
from ..graph.refusal import Refused
from ..ops.ranking import LARGEST
from .pointwise import not_rounded
from .reduction import Reduction
from .reductions import argmax, maximum, over_rows
from .shapes import is_row_vector, same_rows
from .softmax import over_classes
from .targets import base
from .values import Args, Comparison, Value

# a < b is b > a.
_TURNED = {"gt": "lt", "ge": "le", "lt": "gt", "le": "ge"}


@dataclass(frozen=True)
class Ranking(Reduction):
    """A node that the operator gives as `result`: of the `k` largest logits, or of `value.comparison`."""

    result: str = ""
    k: int = 0

    @property
    def others(self) -> tuple[Node, ...]:
        comparison = self.value.comparison
        return () if comparison is None or comparison.target is not None else (comparison.node,)

    @property
    def since(self) -> Node:
        return self.node if self.value.comparison is None else self.value.comparison.read

    @property
    def operand(self) -> Node | None:
        """The numbers, or the classes, that its comparison is with."""
        comparison = self.value.comparison
        return None if comparison is None else comparison.target or comparison.node

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the logits are computed in behind the head, wide enough for what fills masked columns."""
        least = torch.float32 if _filled(self.value) else self.value.head.dtype
        return functools.reduce(torch.promote_types, (*self.value.arithmetic, least), self.value.head.dtype)


# ---- the largest logits


def topk(value: Value, node: Node, args: Args) -> list:
    """The largest logits of each row, and their classes: what the two parts of the result are."""
    if value.members:
        raise Refused("the largest logits of several heads", "take those of each head")
    return [lambda part: largest(value, part, 0, args), lambda part: largest(value, part, 1, args)]


def largest(value: Value, part: Node, index: int, args: Args) -> Reduction:
    """The largest logits of each row (part 0 of topk), or their classes (part 1)."""
    over_classes(value, "topk", args["dim"])
    if args["largest"] is not True or not isinstance(args["k"], int):
        raise Refused("topk of the smallest logits, or of a computed number of them", "use largest=True and a number")
    if value.picked is not None or value.kind not in ("logits", "log_softmax", "softmax") or value.factor <= 0:
        raise Refused("topk of something that does not grow with the logits", "take it of the logits")
    if args["k"] == 1 and not _filled(value):
        # The loss's own operator has it.
        return maximum(value, part, True) if index == 0 else argmax(value, part, {**args, "keepdim": True})
    if index == 0:
        value.need("logits", "the largest probabilities", "take the largest logits, and subtract their logsumexp")
        if fake(part).requires_grad:
            raise Refused("the largest logits with a gradient", "detach them, or compute them under no_grad")
    return Ranking(part, value, (), result=LARGEST[index], k=args["k"])


# ---- comparisons


def compared(value: Value, node: Node, args: Args, known: Mapping[Node, Reduction]) -> Value:
    """Whether each logit is larger than a number of its row: than its target's logit, if that is among `known`."""
    if value.members:
        raise Refused("logits of several heads are compared", "compare those of each head")
    op = nodes.read(node)
    assert op is not None
    first = args["input"] is value.node
    other = args["other"] if first else args["input"]
    if not is_tensor(other) or not is_row_vector(other, value) or fake(node).shape != value.fake.shape:
        raise Refused("the logits are compared with other than one number for each row", "compare with a column")
    if value.kind not in ("logits", "log_softmax") or value.factor <= 0 or value.picked is not None:
        raise Refused("something that does not grow with the logits is compared", "compare the logits")
    not_rounded(value)
    if not _repeated(value):
        raise Refused("logits are compared that were computed in 16 bits behind the head", "cast them to float32 first")
    name = op.name if first else _TURNED[op.name]
    own = known.get(origin(other))
    common: dict[str, Any] = dict(name=name, node=other, class_dim=value.class_dim, start=len(value.rows))
    common["factor"] = value.factor
    if own is not None and _is_entry(own) and _alike(own.value, value):
        assert own.given is not None
        if not is_row_vector(own.given, value) and not same_rows(own.given, value):
            raise Refused("the target's logit is picked out of the logits in another shape", "pick it out of the same")
        made = Comparison(**common, target=own.given, wraps=own.wraps, read=own.node)
    else:
        if value.kind != "logits" or value.terms or value.affine.constant:
            raise Refused("shifted logits are compared with a number that is not one of them", "compare the logits")
        made = Comparison(**common, target=None, wraps=False, read=node)
    return replace(value, node=node, function=made)


def origin(node: Node) -> Node:
    """The reduction that a node is a view of, or a wider copy of."""
    while True:
        node = base(node)
        op = nodes.read(node)
        if op is None or op.inplace or op.name not in ("detach", "cast"):
            return node
        old, new = fake(op.args["input"]).dtype, fake(node).dtype
        if torch.promote_types(old, new) != new:
            return node
        node = op.args["input"]


def _is_entry(reduction: Reduction) -> bool:
    """Whether a reduction is one entry of each row as it stands."""
    op = nodes.read(reduction.node)
    assert op is not None
    return reduction.given is not None and op.name in ("gather", "take_along_dim", "getitem")


def _alike(a: Value, b: Value) -> bool:
    """Whether two values have the same entries."""
    mine, other = ((v.source, v.affine, v.terms, v.kind, v.factor) for v in (a, b))
    return mine == other


def _filled(value: Value) -> bool:
    """Whether columns are masked with a finite number."""
    return any(mask.fill != -torch.inf for mask in value.masks)


def _repeated(value: Value) -> bool:
    """Whether the operator rounds the logits where eager does: what is equal in 16 bits is counted."""
    narrow = [dtype for dtype in value.arithmetic if dtype.itemsize < 4]
    if not narrow:
        return True
    scale, softcap, shifts, inner = value.affine.operator()
    steps = 3 if softcap and scale == 1.0 else 1 if not softcap else 0
    own = not shifts or (len(shifts) == 1 and shifts[0].node is value.one.bias and shifts[0].factor == 1.0)
    plain = own and not value.affine.factors and not inner and not value.affine.constant and not value.terms
    return plain and not _filled(value) and value.kind == "logits" and len(value.arithmetic) == len(narrow) == steps


def counted(value: Value, node: Node, args: Args) -> Reduction | None:
    """How many classes pass a comparison; None for what is no comparison."""
    return _counted(value, node, args, mean=False) if value.kind == "comparison" else None


def share(value: Value, node: Node, args: Args) -> Reduction | None:
    """Which share of the classes passes a comparison; None for what is no comparison."""
    return _counted(value, node, args, mean=True) if value.kind == "comparison" else None


def _counted(value: Value, node: Node, args: Args, mean: bool) -> Reduction:
    if value.factor != 1.0 or value.picked is not None:
        raise Refused("comparisons of the logits are multiplied before they are added up", "multiply their sum")
    comparison = value.comparison
    assert comparison is not None
    shape = over_rows(value, args["dim"], bool(args.get("keepdim")), mean)

    def flat(s: Any) -> Any:
        return s.count.double() / s.vocab if mean else s.count

    given = comparison.target
    return Ranking(node, value, (), given, comparison.wraps, flat, shape, result=comparison.name)


# ---- for the trace


def only_compared(node: Node, comparisons: Collection[Node]) -> list[Node] | None:
    """The views and copies of an entry that is for nothing but `comparisons`, itself among them; else None."""
    found = [node]
    for n in found:
        for user in n.users:
            op = nodes.read(user)
            if user in comparisons:
                continue
            if op is None or op.inplace or not op.has(Fact.HANDS_ON):
                return None
            found.append(user)
    return found
