"""A graph as text: a line for each node, with the shape of its result, its memory and the user's code."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .. import compat
from ..graph import nodes
from ..graph.fakes import example
from ..rewrite.site import Site, location, source

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_LONGEST = 80  # letters of a constant among the arguments
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "matmul": "@", "and_": "&", "or_": "|"}
_PARAMETER = re.compile(r"[lL]_(?P<owner>\w+?)_(?=modules_|parameters_|buffers_)(?P<path>\w+?)_*")
_PART = re.compile(r"(?:^|_)_?(?:modules|parameters|buffers)_")

# A piece of a line: text, and the name of the node that it stands for, or "".
Piece = tuple[str, str]


@dataclass(frozen=True)
class Line:
    """One node. `called` is its op, `pieces` what it calls and with what, `type` dtype and shape of its result.

    kind: "input", "output", "fused" for an operator of ours, or "". bytes: what its result takes, None where a size is
    symbolic; 0 for a view of another tensor, and where it is no tensor. location, source: of the user's code.
    """

    name: str
    kind: str
    called: str
    pieces: tuple[Piece, ...]
    type: str
    bytes: int | None
    location: str
    source: str

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces) + self.type


@dataclass(frozen=True)
class Pair:
    """A graph before and after the pass. name: "" or, of the body of a checkpoint, the attribute that holds it."""

    name: str
    before: tuple[Line, ...]
    after: tuple[Line, ...]


@dataclass
class GraphRecord:
    """One compiled graph: its number in the process, its sites, and how many outputs were deferred.

    pairs: it and the graphs inside of it before and after. kernels: those that were rendered for it, by file name.
    """

    number: int
    sites: list[Site]
    deferred: int
    pairs: list[Pair] = field(default_factory=list)
    kernels: dict[str, str] = field(default_factory=dict)


def pairs(before: GraphModule, after: GraphModule) -> list[Pair]:
    """A graph and the graphs inside of it, before and after."""
    found = [Pair("", lines(before), lines(after))]
    inner = {name: child for name, child in after.named_modules() if name and isinstance(child, GraphModule)}
    for name, child in before.named_modules():
        if name and isinstance(child, GraphModule):
            found.append(Pair(name, lines(child), lines(inner.get(name, child))))
    return found


def lines(gm: GraphModule) -> tuple[Line, ...]:
    """Every node of a graph as a line."""
    memory = _Memory()
    return tuple(_line(node, memory) for node in gm.graph.nodes)


def _line(node: Node, memory: "_Memory") -> Line:
    value = example(node)
    kind = {"placeholder": "input", "get_attr": "input", "output": "output"}.get(node.op, "")
    kind = "fused" if str(node.target).startswith("cce_inductor.linear_") and node.op == "call_function" else kind
    return Line(
        name=node.name,
        kind=kind,
        called=f"{node.op} {node.target}",
        pieces=tuple(_merged(_call(node))),
        type=_type(value),
        bytes=memory.of(value),
        # Of an input Dynamo knows the line that read it first, which is no line about it.
        location="" if node.op == "placeholder" else location(node),
        source="" if node.op == "placeholder" else source(node),
    )


# ---- what is called, and with what


def shown(name: str) -> str:
    """The name of a node; ``head.weight`` for the parameter ``L_self_modules_head_parameters_weight_``."""
    found = _PARAMETER.fullmatch(name)
    return _PART.sub(".", found["path"]).strip(".") if found is not None else name


def _call(node: Node) -> Iterator[Piece]:
    """``input``, ``F.linear(h, w)``, ``linear.view(6, 40)``, ``x[0]``, ``a + b``, ``return (loss, h)``."""
    args, name, attribute = list(node.args), nodes.describe(node), compat.attribute_read(node)
    if node.op == "placeholder":
        yield "input", ""
    elif node.op == "output":
        yield "return ", ""
        yield from _pieces(args[0])
    elif node.op == "get_attr":
        yield f"self.{node.target}", ""
    elif attribute is not None:
        yield from _pieces(args[0])
        yield f".{attribute}", ""
    elif name == "getitem":
        yield from _pieces(args[0])
        yield "[", ""
        yield from _joined(args[1] if isinstance(args[1], tuple) else args[1:])
        yield "]", ""
    elif name in _SIGNS and len(args) == 2:
        yield from _pieces(args[0])
        yield f" {_SIGNS[name]} ", ""
        yield from _pieces(args[1])
    else:
        if node.op == "call_method":
            yield from _pieces(args.pop(0))
            yield f".{node.target}", ""
        elif isinstance(node.target, torch._ops.OpOverload):
            yield str(node.target).removesuffix(".default"), ""
        else:
            yield re.sub(r"^torch\.(nn\.functional|_C\._nn)\.", "F.", name), ""
        yield "(", ""
        yield from _joined(args, node.kwargs)
        yield ")", ""


def _joined(args: Any, kwargs: Mapping[str, Any] | None = None) -> Iterator[Piece]:
    named = [("", value) for value in args] + [(f"{name}=", value) for name, value in (kwargs or {}).items()]
    for i, (name, value) in enumerate(named):
        yield (", " if i else "") + name, ""
        yield from _pieces(value)


def _pieces(value: Any) -> Iterator[Piece]:
    """An argument as a person writes it."""
    if isinstance(value, Node):
        yield shown(value.name), value.name
    elif isinstance(value, (list, tuple)):
        yield "[" if isinstance(value, list) else "(", ""
        yield from _joined(value)
        yield "]" if isinstance(value, list) else ",)" if len(value) == 1 else ")", ""
    elif isinstance(value, dict):
        yield "{", ""
        yield from _joined((), value)
        yield "}", ""
    elif isinstance(value, slice):
        for i, part in enumerate((value.start, value.stop, value.step)):
            if i < 2 or part is not None:
                yield ":" if i else "", ""
                yield from _pieces(part) if part is not None else ()
    elif isinstance(value, type(...)):
        yield "...", ""
    else:
        text = str(value) if isinstance(value, (torch.dtype, torch.device)) else repr(value)
        yield (text if len(text) <= _LONGEST else text[:_LONGEST] + "…"), ""


def _merged(pieces: Iterator[Piece]) -> list[Piece]:
    """The same with texts that follow each other put together."""
    found: list[Piece] = []
    for text, name in pieces:
        if found and not name and not found[-1][1]:
            found[-1] = (found[-1][0] + text, "")
        elif text:
            found.append((text, name))
    return found


# ---- what comes out


def _type(value: Any) -> str:
    """``fp32 (2048, 576)``; of several tensors each."""
    if isinstance(value, Tensor):
        dtype = _DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{dtype} ({', '.join(map(str, value.shape))})"
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(_type, value)))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"{type(value).__name__} {value}"
    return ""


class _Memory:
    """What the tensors of a graph take, each counted where it is made."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()

    def of(self, value: Any) -> int | None:
        if isinstance(value, (list, tuple)):
            sizes = [self.of(part) for part in value]
            return None if None in sizes else sum(sizes)  # type: ignore[arg-type]
        if not isinstance(value, Tensor):
            return 0
        try:
            storage = value.untyped_storage()._cdata
        except (RuntimeError, NotImplementedError):  # a tensor made of others
            storage = id(value)
        if storage in self.seen:
            return 0
        self.seen.add(storage)
        entries = value.numel()
        return entries * value.element_size() if isinstance(entries, int) else None
