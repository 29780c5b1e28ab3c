"""Rows and classes that are taken by indices, slices and lists."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph import nodes
from ..graph.fakes import example, fake, same
from ..graph.refusal import Refused
from .affine import Listed, Range, Scale
from .values import Args, Value


def select(value: Value, node: Node, args: Args) -> Value:
    dim, index = args["dim"] % value.fake.dim(), args["index"]
    if dim == value.class_dim:
        raise Refused("one class is taken out of the logits", "compute it from the hidden states")
    return value.mapped(node, lambda h, _: h.select(dim, index), value.class_dim - (dim < value.class_dim), node)


def narrow(value: Value, node: Node, args: Args) -> Value:
    dim, start, length = args["dim"] % value.fake.dim(), args["start"], args["length"]
    if dim == value.class_dim:
        if not isinstance(start, int) or not isinstance(length, int) or start < 0:
            raise Refused("a part of the vocabulary of a computed size", "slice the weight instead")
        return columns(value, node, (start, start + length, 1))
    return value.mapped(node, lambda h, _: h.narrow(dim, start, length), value.class_dim, node)


def index_select(value: Value, node: Node, args: Args) -> Value:
    dim, index = args["dim"] % value.fake.dim(), args["index"]
    if dim == value.class_dim:
        return listed(value, node, index)
    return value.mapped(node, lambda h, _: h.index_select(dim, index), value.class_dim, node)


def gather(value: Value, node: Node, args: Args) -> Value:
    """Rows by an index that is the same for all classes of a row, as an expanded view of one with a single class."""
    dim, index = args["dim"] % value.fake.dim(), args["index"]
    op = nodes.read(index) if isinstance(index, Node) else None
    if dim == value.class_dim or op is None or op.name not in ("expand", "expand_as"):
        raise Refused("entries are gathered out of the logits", "gather rows of the hidden states instead")
    base, c = op.args["input"], value.class_dim
    if fake(base).dim() != fake(index).dim() or not same(fake(base).shape[c], 1):
        raise Refused("the index of a gather is not the same for all classes", "gather rows of the hidden states")
    if not same(fake(index).shape[c], value.vocab):
        raise Refused("a gather leaves out classes", "gather whole rows")
    if not all(
        same(a, b) for i, (a, b) in enumerate(zip(fake(base).shape, value.fake.shape, strict=True)) if i not in (c, dim)
    ):
        raise Refused("a gather leaves out rows", "gather whole rows")
    return value.mapped(node, lambda h, _: h.take_along_dim(base, dim), c, node)


# ---- indexing


def is_index_tensor(i: Any) -> bool:
    return isinstance(i, Node) and isinstance(example(i), Tensor)


def full(i: Any) -> bool:
    """Whether an index takes all of a dimension."""
    return isinstance(i, slice) and i.start in (None, 0) and i.stop is None and i.step in (None, 1)


def positions(value: Value, index: Any, lists: bool = False) -> list[tuple[int | None, Any]]:
    """The entries of an index with the dimension that each stands at, None for a new one; ellipses spelled out.

    lists: whether lists and ranges may stand in it.

    A bool tensor stands at the first of the dimensions that it takes.
    """
    given = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, bool) or (isinstance(i, (list, tuple, range)) and not lists) for i in given):
        raise Refused("the logits are indexed by a list", "index by a tensor")

    def taken(i: Any) -> int:
        if i is None or i is Ellipsis:
            return 0
        if is_index_tensor(i) and fake(i).dtype in (torch.bool, torch.uint8):
            return fake(i).dim()
        return 1

    consumed = sum(map(taken, given))
    rank = value.fake.dim()
    if not any(i is Ellipsis for i in given):
        given = (*given, Ellipsis)
    at = next(k for k, i in enumerate(given) if i is Ellipsis)
    given = given[:at] + (slice(None),) * (rank - consumed) + given[at + 1 :]
    found: list[tuple[int | None, Any]] = []
    dim = 0
    for i in given:
        found.append((None if i is None else dim, i))
        dim += taken(i)
    return found


def getitem(value: Value, node: Node, args: Args) -> Value:
    index = args["index"]
    entries = positions(value, index, lists=True)
    chosen = [i for dim, i in entries if dim == value.class_dim and (isinstance(i, list) or is_index_tensor(i))]
    if chosen and all(dim == value.class_dim or (dim is not None and full(i)) for dim, i in entries):
        return listed(value, node, chosen[0])
    if any(isinstance(i, (list, tuple, range)) for _, i in entries):
        raise Refused("the logits are indexed by a list", "index by a tensor")
    tensors = [(k, i) for k, (_, i) in enumerate(entries) if is_index_tensor(i)]
    own = next((k for k, (dim, _) in enumerate(entries) if dim == value.class_dim), None)
    if own is None or not isinstance(entries[own][1], slice):
        raise Refused("classes are taken out of the logits", "compute them from the hidden states")
    part = entries[own][1]
    new_index = tuple(i if k != own else slice(None) for k, (_, i) in enumerate(entries))
    changed = any(not full(i) and i is not None for k, (_, i) in enumerate(entries) if k != own)
    if tensors:
        advanced = [k for k, (_, i) in enumerate(entries) if not isinstance(i, (slice, type(None)))]
        if advanced[-1] - advanced[0] != len(advanced) - 1 or any(entries[k][0] is None for k in advanced):
            raise Refused("logits indexed by tensors that do not stand side by side", "index the hidden states")
        ranks = [1 if fake(i).dtype in (torch.bool, torch.uint8) else fake(i).dim() for _, i in tensors]
        result = max([*ranks, 0])
        kept = [k for k, (_, i) in enumerate(entries) if k < own and isinstance(i, (slice, type(None)))]
        class_dim = len(kept) + (result if advanced[0] < own else 0)
    else:
        class_dim = sum(1 for k, (_, i) in enumerate(entries) if k < own and (i is None or isinstance(i, slice)))
    if not full(part):
        value = columns(value, node, (part.start, part.stop, part.step))
    if not changed and not any(i is None for _, i in entries):
        return value.at(node)
    rows = index if full(part) else new_index
    return value.mapped(node, lambda h, _: h[rows], class_dim, node if changed else None)


def columns(value: Value, node: Node, part: tuple) -> Value:
    """Some of the classes: the logits of some rows of the weight."""
    start, stop, step = part
    if not all(s is None or isinstance(s, int) for s in part) or (step or 1) < 1:
        raise Refused("a part of the vocabulary of a computed size", "slice the weight instead")
    if value.kind != "logits" or value.picked is not None:
        raise Refused("a part of the vocabulary is taken out of probabilities", "slice the logits instead")
    cut = (start, stop, step)
    return value.then(node, lambda z, _: z[..., slice(*cut)], **_cut(value, cut))


def _cut(value: Value, part: Range | Listed) -> dict[str, Any]:
    def taken(entry: Any) -> Any:
        return replace(entry, columns=(*entry.columns, part))

    def of_classes(factors: tuple) -> tuple:
        return tuple(taken(f) if isinstance(f, Scale) and not f.of_rows else f for f in factors)

    shifts = tuple(replace(taken(s), factors=of_classes(s.factors)) for s in value.affine.shifts)
    affine = replace(value.affine, shifts=shifts, scales=of_classes(value.affine.scales))
    return {"affine": affine, "masks": tuple(map(taken, value.masks)), "columns": (*value.columns, part)}


def listed(value: Value, node: Node, indices: Any) -> Value:
    """Classes by their indices."""
    if value.kind != "logits" or value.picked is not None:
        raise Refused("a part of the vocabulary is taken out of probabilities", "take it out of the logits")
    if isinstance(indices, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
        return value.then(node, lambda z, _: z[..., indices], **_cut(value, Listed(tuple(indices))))
    if not is_index_tensor(indices) or fake(indices).dtype != torch.int64 or fake(indices).dim() != 1:
        raise Refused("classes are taken out of the logits by other than a list of them", "index the weight instead")
    index = len(value.extra)
    return value.then(
        node,
        lambda z, extra: z.index_select(-1, extra[index]),
        extra=(*value.extra, indices),
        **_cut(value, Listed(indices)),
    )
