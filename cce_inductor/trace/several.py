"""Uses of more than one tensor of logits: put together, added up, multiplied with each other.

A rule is given the walk, the node, its op and the nodes among its arguments that are made from logits. It says whether
it takes the node.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from ..graph.builder import Builder, Proxy
from ..graph.fakes import example, fake, is_number, same
from ..graph.memory import written_after
from ..graph.nodes import Op
from ..graph.refusal import Refused
from . import decompose, layout, merge_heads, pointwise, rsqrt_softcap, targets
from .reasons import product_of_two
from .trace import Trace
from .values import SQUARES, Value
from .walk import Walk, distinct, each_way, first_way


def joined(walk: Walk, node: Node, op: Op, touched: list[Node]) -> bool:
    """cat and stack: rows of one head, rows of several with one weight, or several heads in one tensor."""
    if not all(n in walk.values for n in touched):
        return False
    tensors = op.args["tensors"]
    found = [walk.values.get(n) for n in tensors] if isinstance(tensors, (list, tuple)) else [None]
    entries = [e for e in found if e is not None]
    if len(entries) != len(found):
        raise Refused("logits are put together with other tensors", "compute a loss of each")
    stacked, dim, traces = op.name == "stack", op.args["dim"], distinct([e.trace for e in entries])

    def together(values: tuple[Value, ...]) -> Value:
        at = dim % (values[0].fake.dim() + stacked)
        if not stacked and at == values[0].class_dim:
            return decompose.concatenated(values, node, at)
        ways: list[Callable[[], Value]] = [
            lambda: merge_heads.rows(Builder(walk.graph, node), values, node, at, stacked),
            lambda: decompose.stacked(values, node, at, stacked),
        ]
        if len(traces) == 1:
            ways.insert(0, lambda: layout.join(values, node, at, stacked))
        return first_way(ways)

    made = each_way(together, list(zip(*(e.values for e in entries), strict=False)))
    trace = traces[0]
    if made[0].head.node is node:
        trace = walk.traces[node] = Trace(made[0], parts=traces)
    if any(value.head.node is node for value in made):  # of one of several ways to read a product, perhaps
        walk.members[node] = entries
    walk.put(node, trace, made)
    return True


def added(walk: Walk, node: Node, op: Op, touched: list[Node]) -> bool:
    """A sum or a difference of logits: one head, or the same logits twice."""
    given = op.args["input"], op.args["other"]
    if not all(n in walk.values for n in given):
        return False
    a, b = (walk.values[n] for n in given)
    alpha = op.args["alpha"]
    if not is_number(alpha):
        raise Refused("logits are added with a computed factor", "multiply them by it")
    factor = -alpha if op.name == "sub" else alpha
    builder = Builder(walk.graph, node)
    pairs = [(x, y) for x in a.values for y in b.values]
    made = each_way(lambda pair: merge_heads.added(builder, pair[0], pair[1], node, factor), pairs)
    trace = a.trace
    if all(made[0].head is not v.head for v in a.values):
        trace = walk.traces[node] = Trace(made[0], parts=distinct([a.trace, b.trace]))
    walk.put_or_edit(node, op, a, made, trace)
    return True


def multiplied(walk: Walk, node: Node, op: Op, touched: list[Node]) -> bool:
    """Logits times themselves, times the root of their square, or the softmax times its logarithm or the logits."""
    if op.inplace or not all(n in walk.values for n in (op.args["input"], op.args["other"])):
        return False
    a, b = walk.values[op.args["input"]], walk.values[op.args["other"]]
    if op.args["input"] is op.args["other"]:
        walk.put(node, a.trace, each_way(lambda v: rsqrt_softcap.product_with_itself(v, node), a.values))
        return True
    if a.trace is not b.trace:
        raise Refused(*product_of_two(a.values[0], b.values[0]))
    pairs = list(zip(a.values, b.values, strict=False))
    walk.put(node, a.trace, each_way(lambda pair: pointwise.product(pair[0], pair[1], node), pairs))
    return True


def divided(walk: Walk, node: Node, op: Op, touched: list[Node]) -> bool:
    """Logits over the root of their square: a softcap."""
    squares = any(n in walk.values and walk.values[n].values[0].kind in SQUARES for n in touched)
    if not squares or len(touched) != 2 or op.args["rounding_mode"] is not None or op.inplace:
        return False
    a, b = walk.values[op.args["input"]], walk.values[op.args["other"]]
    pairs = list(zip(a.values, b.values, strict=False))
    walk.put(node, a.trace, each_way(lambda pair: rsqrt_softcap.softcap(pair[0], pair[1], node, True), pairs))
    return True


def grouped(walk: Walk, node: Node, op: Op, touched: list[Node]) -> bool:
    """A view that parts the classes, (..., V) as (..., K, C) or (N, C): K stacked heads, such as codebooks."""
    entry = walk.values.get(touched[0])
    if entry is None or len(touched) > 1 or op.args["input"] is not touched[0]:
        return False
    value, new = entry.values[0], fake(node).shape
    lead, c, classes = value.lead_shape, value.class_dim, value.vocab
    if value.kind != "logits" or c != len(lead) or not (isinstance(classes, int) and isinstance(new[-1], int)):
        return False
    if new[-1] in (0, 1, classes) or classes % new[-1]:
        return False
    heads = classes // new[-1]
    stacked = len(new) == len(lead) + 2 and all(map(same, new, (*lead, heads)))
    if (not stacked and len(new) != 2) or not all(isinstance(s, int) for s in lead):
        return False  # heads are stacked with sizes that are known only

    def record(builder: Builder) -> Proxy:
        z = builder.proxy(value.node)
        made = builder.call(torch.stack, [z.narrow(c, k * new[-1], new[-1]) for k in range(heads)], c)
        return made if stacked else made.flatten(0, -2)

    made = walk.values.get(walk.decompose(node, entry.trace, record))
    if made is not None:
        walk.put(node, made.trace, [v.at(node) for v in made.values])
    return True


def diagonal(walk: Walk, node: Node, op: Op, touched: list[Node]) -> bool:
    """The entries on the diagonal of (N, M) logits: those of the classes with the rows' numbers."""
    entry = walk.values.get(touched[0])
    value = entry.values[0] if entry is not None else None
    if entry is None or value is None or op.args["offset"] != 0 or not value.has_diagonal:
        return False
    if sorted(op.args.get(name, i) % 2 for i, name in enumerate(("dim1", "dim2"))) != [0, 1]:
        return False
    if written_after(node):
        raise Refused("the diagonal of the logits is edited, or they are after it was read", "use fill_diagonal_")

    def record(builder: Builder) -> Proxy:
        made: Proxy = builder.proxy(touched[0]).gather(value.class_dim, targets.diagonal(builder, value))
        return made.squeeze(value.class_dim)

    walk.decompose(node, entry.trace, record)
    return True


def broadcast(walk: Walk, node: Node, op: Op, touched: list[Node]) -> bool:
    """Tensors expanded to the logits' shape: those that are not logits are followed no further."""
    source = touched[0]
    entry = walk.values[source]
    own = [i for i, n in enumerate(op.args["tensors"]) if n is source]
    if len(own) != 1 or example(node)[own[0]].shape != fake(source).shape:
        raise Refused("the logits are expanded to the shape of another tensor", "expand the other one only")
    count = len(example(node))
    walk.put_parts(node, entry.trace, [[v.at if i in own else None for i in range(count)] for v in entry.values])
    return True
