"""C++ vector code for functions of entries that are written once in Python (ops/divergences.py), from their graphs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..ops.divergences import Divergence, traced
from .cpu_template import number
from .unsupported import Unsupported

_ATEN = torch.ops.aten


def _sign(a: str) -> str:
    one_where = "Vec::blendv(Vec(0.f), Vec(1.f)"
    return f"{one_where}, {a} > Vec(0.f)) - {one_where}, {a} < Vec(0.f))"


# ATen operator -> C++ of its arguments, which are vectors of float by the names that the templates know.
_CODE: dict[Any, Callable[..., str]] = {
    _ATEN.add.Tensor: lambda a, b: f"{a} + {b}",
    _ATEN.add.Scalar: lambda a, b: f"{a} + {b}",
    _ATEN.sub.Tensor: lambda a, b: f"{a} - {b}",
    _ATEN.sub.Scalar: lambda a, b: f"{a} - {b}",
    _ATEN.rsub.Scalar: lambda a, b: f"{b} - {a}",
    _ATEN.mul.Tensor: lambda a, b: f"{a} * {b}",
    _ATEN.mul.Scalar: lambda a, b: f"{a} * {b}",
    _ATEN.div.Tensor: lambda a, b: f"{a} / {b}",
    _ATEN.div.Scalar: lambda a, b: f"{a} / {b}",
    _ATEN.neg.default: lambda a: f"{a}.neg()",
    _ATEN.detach.default: lambda a: a,
    _ATEN.alias.default: lambda a: a,
    _ATEN.exp.default: lambda a: f"exp({a})",
    _ATEN.expm1.default: lambda a: f"{a}.expm1()",
    _ATEN.log.default: lambda a: f"{a}.log()",
    _ATEN.log1p.default: lambda a: f"{a}.log1p()",
    _ATEN.sqrt.default: lambda a: f"{a}.sqrt()",
    _ATEN.reciprocal.default: lambda a: f"{a}.reciprocal()",
    _ATEN.abs.default: lambda a: f"{a}.abs()",
    _ATEN.sgn.default: lambda a: _sign(a),
    _ATEN.sign.default: lambda a: _sign(a),
    _ATEN.ones_like.default: lambda a: "Vec(1.f)",
    _ATEN.zeros_like.default: lambda a: "Vec(0.f)",
}


def body(divergence: Divergence, wanted: Sequence[str]) -> str:
    """Statements that put the parts that are wanted into `out`, one behind the other, from `log_p` and `log_q`."""
    names: dict[Node, str] = {}
    lines = []
    for node in traced(divergence, tuple(wanted)).graph.nodes:
        if node.op == "placeholder":
            names[node] = ("log_p", "log_q")[len(names)]
        elif node.op == "output":
            lines += [f"out[{i}] = {names[result]};" for i, result in enumerate(node.args[0])]
        else:
            code = _CODE.get(node.target)
            if code is None:
                raise Unsupported(f"there is no vector code for {node.target} in {divergence}")
            arguments = [names[a] if isinstance(a, Node) else f"Vec({number(a)})" for a in node.args]
            names[node] = f"t{len(names)}"
            lines.append(f"const Vec {names[node]} = {code(*arguments)};")
    return "\n  ".join(lines)
