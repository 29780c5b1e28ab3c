"""What the logits of a loss are read for: every use of them that the trace found, in words."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from ..graph import nodes
from ..ops.statistics import TABLE
from ..trace.trace import Trace

# What a person calls the rows of `ops/statistics.py`; "" for the digits that rounding left of another one.
WORDS = {
    "lse": "log-sum-exp",
    "lse_low": "",
    "lse_rest": "log-sum-exp without the target, or more classes",
    "lse_rest_low": "",
    "target_logit": "logit of the target",
    "entry_logits": "logits of K classes of each row",
    "logit_sum": "sum of the logits",
    "entropy": "entropy",
    "argmax": "argmax",
    "other_lse": "log-sum-exp of the other head",
    "other_lse_low": "",
    "expected_other": "mean of the other head's logits under the softmax",
    "cross_entropy": "cross-entropy with the other head",
    "other_cross_entropy": "cross-entropy of the other head",
    "divergence": "divergence from the other head",
    "other_divergence": "divergence of the other head",
}
# Of the divergences of `ops/divergences.py`, by their names.
OF_MIXTURES = {
    "jensen_shannon": "Jensen-Shannon divergence of both heads",
    "skew": "divergence from a mixture of both heads",
    "mixture": "cross-entropy with a mixture of both heads",
}
RETURNED = "returned"


@dataclass(frozen=True)
class Read:
    """One use of the logits.

    node: which reads them. what: its op, as a person writes it, or "returned". wants: what it needs of them, in words,
    or what becomes of those that are returned. needs_all: whether it reads every logit, so that the loss is left as it
    was; `wants` is the reason then.
    """

    node: str
    what: str
    wants: str
    needs_all: bool = False


def of(trace: Trace | None, defers: bool) -> tuple[Read, ...]:
    """The uses of a head's logits, in the order of the graph. defers: whether logits that are returned become lazy."""
    found: dict[tuple[str, str], Read] = {}
    order = {node: i for i, node in enumerate(trace.first.node.graph.nodes)} if trace is not None else {}
    uses = sorted(_uses(trace, defers), key=lambda use: order.get(use[0], -1)) if trace is not None else []
    for node, read in uses:
        found.setdefault((node.name, read.wants), read)
    return tuple(found.values())


def _uses(trace: Trace, defers: bool) -> Iterator[tuple[Node, Read]]:
    for part in (*trace.with_parts, *trace.wholes):
        for reduction in part.reductions:
            wants = filter(None, map(_words, reduction.statistics))
            yield reduction.node, _read(reduction.node, ", ".join(wants) or "one number for each row")
        for node, _, _ in part.metadata:
            yield node, _read(node, "their shape")
        for value in part.outputs:
            became = "deferred, and computed if somebody looks" if defers else "given as they are"
            yield value.node, Read(value.node.name, RETURNED, became)
        for escape in part.escapes:
            yield escape.node, _read(escape.node, escape.reason, needs_all=True)


def _words(name: str) -> str:
    divergence = TABLE[name].divergence
    if divergence is None:
        return WORDS[name]
    return OF_MIXTURES[divergence.name] if TABLE[name].has_divergence else ""


def _read(node: Node, wants: str, needs_all: bool = False) -> Read:
    return Read(node.name, nodes.describe(node), wants, needs_all)
