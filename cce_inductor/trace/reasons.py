"""What a person is told of a use of logits that no rule follows."""

from __future__ import annotations

from torch.fx import Node

from ..graph import nodes
from ..graph.refusal import Refusal, Refused
from .values import Value

MARGIN = (
    "the target's logit is edited in front of the softmax: a margin at the target",
    "edit it behind: with lse, z = cce_inductor.linear_logsumexp(...) and e for the edited z, the loss is "
    "lse + log1p(exp(e - lse) - exp(z - lse)) - e",
)


LABELS = (
    "classes are masked or weighted where labels are equal: they may be any number of each row",
    "compare one whole number of each row with one of each class, and keep the class that the loss is about: "
    "z.masked_fill((a[:, None] == b) & ~torch.eye(n, dtype=torch.bool), -math.inf)",
)
# Of logits that such a mask has left classes out of.
LEFT_OUT = (
    "more than a loss at the class that a mask of equal labels keeps is read of the masked logits",
    "read it before they are masked",
)


def dense(node: Node, words: str) -> Refused:
    """What reads logits that no rule follows, and what to do instead."""
    what, op = nodes.describe(node), nodes.read(node)
    own = "write the loss with PyTorch's own operations"
    if nodes.is_autograd_function(node):
        return Refused(f"a torch.autograd.Function takes the {words}: what it reads of them is not known", own)
    if nodes.is_custom(node):
        return Refused(f"the operator {what} takes the {words}: what it reads of them is not known", own)
    if names := nodes.unknown_arguments(node):
        return Refused(f"{what} of the {words} with {names}, which is not known here", "leave the argument out")
    if op is not None and op.is_head:
        reason = f"{what} multiplies the {words} of all classes with something else"
        return Refused(reason, "compute it from the hidden states, or outside the compiled region")
    if nodes.is_dense_loss(node):
        cure = "use a loss of log-sum-exps, entries of a target or sums of the logits"
        return Refused(f"{what} reads the {words} of every class", cure)
    cure = "compute it from the returned logits outside the compiled region, or from the hidden states"
    return Refused(f"{what} reads the {words} themselves", cure)


def product_of_two(a: Value, b: Value) -> tuple[str, str]:
    """Why the entries of two products with a matrix are not multiplied, and what to do instead."""
    reason = f"the {a.words} of a head are multiplied with the {b.words} of another: a loss over two heads"
    return reason, "compute a loss of each"


def unknown(node: Node) -> Refusal:
    if node.op == "placeholder":
        return Refusal(
            node,
            "the logits come into the graph from outside",
            "compile the head and the loss in one torch.compile region",
        )
    cure = "apply it to the hidden states, or compute the loss outside the compiled region"
    return Refusal(node, f"{nodes.describe(node)} between the head and the loss has no fused form", cure)
