"""Lowerings for the CPU of a loss over two heads: as cpu.py, with the other head's operands beside."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..ops.call import OF_HEAD, OTHER, Attributes
from ..ops.divergences import LEAST, OWN, Divergence
from ..ops.divergences import OTHER as OTHER_PART
from ..ops.statistics import LSE_OF_BOTH, PAIRS, TABLE
from . import cpu
from .cpu_template import Spec, launch
from .unsupported import Unsupported
from .vector_code import body

# Statistics of the first head that need no exponential: the others are formed together with the other head's.
OF_ONE = ("target_logit", "entry_logits", "logit_sum", "argmax")


def forward(
    operands: dict[str, Any],
    row_mask: Any,
    statistics: list[str],
    attributes: Attributes,
    bounded: bool,
) -> Sequence[Any]:
    names = _identifiers(statistics)
    asked: dict[Divergence, list[str]] = {}
    for row in (TABLE[name] for name in statistics):
        if row.divergence is not None:
            asked.setdefault(row.divergence, []).append(row.part)
    divergences: list[dict[str, Any]] = []
    for divergence, parts in asked.items():
        results = [names[f"{divergence}{part}"] for part in parts]
        first = sum(len(before["results"]) for before in divergences)
        divergences.append(_written(divergence, names, parts) | {"results": results, "first": first})
    constants = {
        "statistics": statistics,
        "of_one": [name for name in statistics if name in OF_ONE],
        "divergences": divergences,
        "least": LEAST,
    }
    layouts = cpu.statistics_layouts(operands, statistics)
    layouts = {names.get(name, name): layout for name, layout in layouts.items()}
    return _launch("two_heads", operands, {}, row_mask, attributes, constants, layouts)


def backward(
    tangents: dict[str, Any],
    saved: dict[str, Any],
    operands: dict[str, Any],
    row_mask: Any,
    needs: list[str],
    attributes: Attributes,
) -> Sequence[Any]:
    names = _identifiers(saved)
    divergences = [d for name in tangents if (d := TABLE[name].divergence) is not None]
    pairs = [name for name in PAIRS if name in tangents]
    if not (pairs or divergences):
        raise Unsupported("no tangent of a function of both heads")
    if "entry_logits" not in tangents:
        operands = {name: t for name, t in operands.items() if name != "entries"}
    needed = {*LSE_OF_BOTH, *pairs} | ({"entropy", "target_logit"} & {*tangents})
    needed |= {"entry_logits"} & {*tangents} if attributes.softcap else set()
    slopes = [f"{divergence}{part}" for divergence in divergences for part in (OWN, OTHER_PART)]
    beside = {names.get(name, name): t for name, t in saved.items() if name in needed or name in slopes}
    beside |= cpu.prefixed({names.get(name, name): t for name, t in tangents.items()})
    of_divergences = [*(names[name] for name in slopes), *(f"g_{names[str(d)]}" for d in divergences)]
    constants = {
        "tangents": list(tangents),
        "needs": needs,
        "of_rows": [*LSE_OF_BOTH, *PAIRS, *(f"g_{name}" for name in PAIRS), *of_divergences],
        "divergences": [_written(divergence, names, (OWN, OTHER_PART)) for divergence in divergences],
        "least": LEAST,
    }
    layouts = cpu.gradient_layouts(operands, needs)
    return _launch("two_heads_backward", operands, beside, row_mask, attributes, constants, layouts)


def _identifiers(statistics: Iterable[str]) -> dict[str, str]:
    """What the templates call the parts of divergences, by name: each divergence by its number."""
    found: dict[Divergence, int] = {}
    names = {}
    for name in statistics:
        row = TABLE[name]
        if row.divergence is not None:
            number = found.setdefault(row.divergence, len(found))
            names[name] = f"divergence_{number}{row.part.replace('.', '_')}"
    return names


def _written(divergence: Divergence, names: dict[str, str], parts: Sequence[str]) -> dict[str, Any]:
    """A divergence as the templates know it."""
    return {"text": str(divergence), "name": names[str(divergence)], "code": body(divergence, parts)}


def _launch(
    template: str,
    operands: dict[str, Any],
    beside: dict[str, Any],
    row_mask: Any,
    attributes: Attributes,
    constants: dict[str, Any],
    layouts: dict[str, Any],
) -> Sequence[Any]:
    """The results of one kernel. beside: what it reads besides the operands, by name."""
    theirs, of_other = _of_other(operands), attributes.of_other
    element, compute = cpu.dtypes({n: t for n, t in operands.items() if not n.startswith(OTHER)}, attributes)
    other_element, other_compute = cpu.dtypes(theirs, of_other)
    other = {
        "element": other_element,
        "compute": other_compute,
        **{name: getattr(of_other, name) for name in ("scale", "softcap", "softcap_form")},
        **{name: [] for name in ("statistics", "tangents", "needs")},
    }
    constants = cpu.constants_of(replace(attributes, grad_filter="exact"), compute) | constants
    constants |= {"bounded": False, "rest": False}
    given = cpu.realize(operands | cpu.mask(row_mask) | beside)
    absent = cpu.ABSENT | {OTHER + name: torch.float32 for name in OF_HEAD}
    if beside:
        absent |= dict.fromkeys([*TABLE, *cpu.prefixed(TABLE)], torch.float32)
    spec = Spec(template, element, compute, given, absent, layouts, constants, other)
    return list(launch(spec, operands["input"].get_device()).values())


def _of_other(operands: dict[str, Any]) -> dict[str, Any]:
    """The other head's operands by the names of a head's own."""
    return {name.removeprefix(OTHER): t for name, t in operands.items() if name.startswith(OTHER)}
