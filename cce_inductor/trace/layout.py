"""Ops on the leading dimensions of logits: each is replayed on the hidden states.

A rule says where the op leaves the classes and how to do the same to a tensor with D in their place. It gives one
value, or for an op that cuts logits into parts a function for each part.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ..graph import nodes
from ..graph.fakes import differentiates, example, fake, same
from ..graph.refusal import Refused
from ..graph.spellings import function_of
from .indexing import columns
from .values import Args, Value


def _one(*given: Any) -> tuple:
    """Arguments that may be given as one sequence or one by one, as a tuple."""
    given = given[0] if len(given) == 1 and isinstance(given[0], tuple) else given
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list, torch.Size)) else tuple(given)


def _product(sizes: Sequence) -> Any:
    product: Any = 1
    for size in sizes:
        product = product * size
    return product


def _output_class_dim(value: Value, node: Node) -> int:
    """Where a reshape put the classes, or Refused if it split them, merged them or moved rows into them."""
    old, new, c = value.fake.shape, fake(node).shape, value.class_dim
    for j, size in enumerate(new):
        before = same(_product(new[:j]), _product(old[:c]))
        behind = same(_product(new[j + 1 :]), _product(old[c + 1 :]))
        # A reshape keeps the number of elements: with the classes last, what stands before them follows.
        if same(size, old[c]) and (behind and (before or (j == len(new) - 1 and c == len(old) - 1))):
            return j
    raise Refused(
        f"a reshape from {tuple(old)} to {tuple(new)} does not keep the {old[c]} classes in a dimension of their own",
        "reshape only the leading dimensions",
    )


def _resize(value: Value, node: Node, sizes: tuple) -> Value:
    class_dim = _output_class_dim(value, node)
    if len(sizes) != fake(node).dim():
        raise Refused("the logits are viewed as another dtype, or with a size not spelled out", "name every dimension")
    others_known = not any(isinstance(s, int) and s == -1 for i, s in enumerate(sizes) if i != class_dim)

    def replay(h: Any, width: Any) -> Any:
        width = -1 if others_known else width
        return h.reshape(*(width if i == class_dim else s for i, s in enumerate(sizes)))

    return value.mapped(node, replay, class_dim)


def view(value: Value, node: Node, args: Args) -> Value:
    return _resize(value, node, _one(args["size"]))


def reshape(value: Value, node: Node, args: Args) -> Value:
    return _resize(value, node, _one(args["shape"]))


def view_as(value: Value, node: Node, args: Args) -> Value:
    other = args["other"]
    class_dim = _output_class_dim(value, node)

    sizes = [_size(other, i) if i != class_dim else -1 for i in range(fake(node).dim())]

    def replay(h: Any, width: Any) -> Any:
        return h.reshape(*(width if i == class_dim else s for i, s in enumerate(sizes)))

    return value.mapped(node, replay, class_dim)


def _size(node: Node, dim: int) -> Any:
    """A dimension of a tensor as a number. Symbolic sizes of another tensor would have to be recorded."""
    size = fake(node).shape[dim]
    if not isinstance(size, int):
        raise Refused("the logits take the shape of a tensor of symbolic size", "give the shape by numbers")
    return size


def flatten(value: Value, node: Node, args: Args) -> Value:
    start, end = args["start_dim"], args["end_dim"]
    return value.mapped(node, lambda h, _: h.flatten(start, end), _output_class_dim(value, node))


def unflatten(value: Value, node: Node, args: Args) -> Value:
    dim, sizes = args["dim"], args["sizes"]
    if not isinstance(dim, int) or dim % value.fake.dim() == value.class_dim:
        raise Refused("the classes are split into groups", "reshape only the leading dimensions")
    dim %= value.fake.dim()
    added = fake(node).dim() - value.fake.dim()
    return value.mapped(
        node, lambda h, _: h.unflatten(dim, sizes), value.class_dim + (added if dim < value.class_dim else 0)
    )


def unsqueeze(value: Value, node: Node, args: Args) -> Value:
    dim = args["dim"] % (value.fake.dim() + 1)
    return value.mapped(node, lambda h, _: h.unsqueeze(dim), value.class_dim + (dim <= value.class_dim))


def squeeze(value: Value, node: Node, args: Args) -> Value:
    dim, shape = args["dim"], value.fake.shape
    listed = range(len(shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    dims = [d for d in sorted(d % len(shape) for d in listed) if same(shape[d], 1)]
    if value.class_dim in dims or len(shape) - len(dims) != fake(node).dim():
        raise Refused("squeeze of the class dimension, or of one of symbolic size", "squeeze leading dimensions")

    def replay(h: Any, width: Any) -> Any:
        for d in reversed(dims):  # one by one: the hidden states may be 1 wide
            h = h.squeeze(d)
        return h

    return value.mapped(node, replay, value.class_dim - sum(d < value.class_dim for d in dims))


def expand(value: Value, node: Node, args: Args) -> Value:
    sizes = _one(args["size"])
    added = fake(node).dim() - value.fake.dim()
    class_dim = value.class_dim + added
    if not same(fake(node).shape[class_dim], value.vocab):
        raise Refused("the class dimension is expanded", "expand only the leading dimensions")
    return value.mapped(
        node, lambda h, _: h.expand(*(-1 if i == class_dim else s for i, s in enumerate(sizes))), class_dim, node
    )


def expand_as(value: Value, node: Node, args: Args) -> Value:
    return expand(value, node, {"size": tuple(_size(args["other"], i) for i in range(fake(node).dim()))})


def copy(value: Value, node: Node, args: Args) -> Value:
    return value.at(node)


def _rearranged(value: Value, node: Node, row_map: Callable, order: list[int]) -> Value:
    """A permutation of dimensions: the rows stay in order if the leading ones do."""
    lead = [d for d in order if d != value.class_dim and not same(value.fake.shape[d], 1)]
    return value.mapped(node, row_map, order.index(value.class_dim), None if lead == sorted(lead) else node)


def transpose(value: Value, node: Node, args: Args) -> Value:
    rank = value.fake.dim()
    a, b = args["dim0"] % rank, args["dim1"] % rank
    order = list(range(rank))
    order[a], order[b] = b, a
    return _rearranged(value, node, lambda h, _: h.transpose(a, b), order)


def permute(value: Value, node: Node, args: Args) -> Value:
    order = [d % value.fake.dim() for d in _one(args["dims"])]
    return _rearranged(value, node, lambda h, _: h.permute(*order), order)


def movedim(value: Value, node: Node, args: Args) -> Value:
    source, destination = args["source"], args["destination"]
    rank = value.fake.dim()
    moved = torch.empty(list(range(rank)) if rank else [], device="meta").movedim(source, destination).shape
    return _rearranged(value, node, lambda h, _: h.movedim(source, destination), list(moved))


def t(value: Value, node: Node, args: Args) -> Value:
    return transpose(value, node, {"dim0": 0, "dim1": value.fake.dim() - 1})


def getattr(value: Value, node: Node, args: Args) -> Value:
    rank, name = value.fake.dim(), args["name"]
    if name in ("mT", "mH") or (name in ("T", "H") and rank == 2):
        return transpose(value, node, {"dim0": rank - 2, "dim1": rank - 1})
    raise Refused(f"the attribute {name} of the logits is read", "read it from the hidden states")


def along(value: Value, node: Node, args: Args) -> Value:
    """An op that moves entries along the dimensions that it names: it does the same to the hidden states."""
    given = {name: argument for name, argument in args.items() if name != "input"}
    dims = _one(given["dims"]) if isinstance(given["dims"], (list, tuple)) else [given["dims"]]
    if None in dims or value.class_dim in [d % value.fake.dim() for d in dims]:
        raise Refused(f"{nodes.describe(node)} moves the classes", "move leading dimensions, or rows of the weight")
    op = nodes.read(node)
    assert op is not None
    function, given["dims"] = function_of(op.name), dims
    return value.mapped(node, lambda h, _: function(h, **given), value.class_dim, node)


def repeat_interleave(value: Value, node: Node, args: Args) -> Value:
    repeats, dim = args["repeats"], args["dim"]
    if not isinstance(repeats, int) or not isinstance(dim, int) or dim % value.fake.dim() == value.class_dim:
        raise Refused("the logits are repeated, other than whole rows by a number", "repeat the hidden states")
    return value.mapped(node, lambda h, _: h.repeat_interleave(repeats, dim), value.class_dim, node)


def repeat(value: Value, node: Node, args: Args) -> Value:
    sizes = _one(args["sizes"])
    class_dim = value.class_dim + fake(node).dim() - value.fake.dim()
    if not isinstance(sizes[class_dim], int) or sizes[class_dim] != 1:
        raise Refused("the classes are repeated", "repeat leading dimensions")
    return value.mapped(node, lambda h, _: h.repeat(*sizes), class_dim, node)


# ---- tuples of values


def _parts(value: Value, node: Node, dim: int, split: Callable[[Any], Any], gone: bool = False) -> list[Callable]:
    """The value of every part of a node that is a tuple, as functions of the node that takes it out."""
    dim %= value.fake.dim()
    if dim == value.class_dim:
        return _vocabularies(value, node, gone)
    class_dim = value.class_dim - (gone and dim < value.class_dim)

    def part(i: int) -> Callable[[Node], Value]:
        return lambda taken: value.mapped(taken, lambda h, _: split(h)[i], class_dim, taken)

    return [part(i) for i in range(len(example(node)))]


def _vocabularies(value: Value, node: Node, gone: bool) -> list[Callable]:
    """Parts of the classes: each the logits of some rows of the weight."""
    sizes = [1 if gone else part.shape[value.class_dim] for part in example(node)]
    if gone or not all(isinstance(size, int) for size in sizes):
        raise Refused("the vocabulary is taken apart, into single classes or by computed sizes", "slice the weight")
    stops = list(itertools.accumulate(sizes))

    def part(start: int, stop: int) -> Callable[[Node], Value]:
        return lambda taken: columns(value, taken, (start, stop, 1))

    return [part(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def split(value: Value, node: Node, args: Args) -> list[Callable]:
    size, dim = args["split_size_or_sections"], args["dim"]
    return _parts(value, node, dim, lambda h: h.split(size, dim))


def chunk(value: Value, node: Node, args: Args) -> list[Callable]:
    chunks, dim = args["chunks"], args["dim"]
    return _parts(value, node, dim, lambda h: h.chunk(chunks, dim))


def tensor_split(value: Value, node: Node, args: Args) -> list[Callable]:
    sections, dim = args["indices_or_sections"], args["dim"]
    return _parts(value, node, dim, lambda h: h.tensor_split(sections, dim))


def unbind(value: Value, node: Node, args: Args) -> list[Callable]:
    dim = args["dim"]
    return _parts(value, node, dim, lambda h: h.unbind(dim), gone=True)


# ---- several values in one


def join(values: Sequence[Value], node: Node, dim: int, stacked: bool) -> Value:
    """Rows of one head put together again by cat, along other than the classes, or by stack."""
    first = values[0]
    rank = first.fake.dim()
    alike: dict[str, Any] = {"node": node, "rows": (), "order": None, "steps": (), "extra": ()}
    # What belongs to rows that were rearranged before: afterwards nobody knows by how much.
    behind = any(
        v.comparison is not None or any(term.start for term in v.terms) or any(s.start for s in v.affine.scales)
        for v in values
    )
    plain = not behind and all(v.picked is None and v.fake.dim() == rank for v in values)
    if not plain or not all(replace(v, **alike) == replace(first, **alike) for v in values):
        raise Refused("logits of different heads, or treated differently, are put together", "compute a loss of each")
    if not differentiates(node, *(v.node for v in values)):
        raise Refused("detached rows are put together with others", "detach all of them, or none")
    class_dim = first.class_dim + (stacked and dim <= first.class_dim)
    pieces = [v.rows for v in values]

    def replay(h: Any, width: Any) -> Any:
        made = []
        for maps in pieces:
            piece = h
            for _, row_map in maps:
                piece = row_map(piece, width)
            made.append(piece)
        return torch.stack(made, dim) if stacked else torch.cat(made, dim)

    return replace(first, node=node, rows=((node, replay),), class_dim=class_dim, order=node)
