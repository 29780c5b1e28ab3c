"""Lowerings for the CPU of a loss over two heads: as cpu.py, with the other head's operands beside."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..ops.call import OF_HEAD, OTHER, Attributes
from ..ops.divergences import LEAST, OWN, Divergence
from ..ops.divergences import OTHER as OTHER_PART
from ..ops.statistics import LSE_OF_BOTH, PAIRS, TABLE
from . import cpu
from .cpu_template import Spec, launch
from .limits import CACHED_SHARE
from .unsupported import Unsupported
from .vector_code import body

# Statistics of the first head that need no exponential: the others are formed together with the other head's.
OF_ONE = ("target_logit", "entry_logits", "logit_sum", "argmax")
# Those of both heads that come from running sums, or from logits that are picked, as the templates know them.
RESULTS = (*LSE_OF_BOTH, *PAIRS, "entropy", "target_logit", "logit_sum")


def forward(
    operands: dict[str, Any],
    row_mask: Any,
    statistics: list[str],
    attributes: Attributes,
    bounded: bool,
) -> Sequence[Any]:
    names = _identifiers(statistics)
    constants = _of_forward(statistics, names)
    constants["needed"] = [*LSE_OF_BOTH] if constants["divergences"] else []
    layouts = _renamed(cpu.statistics_layouts(operands, statistics), names)
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
    if "entry_logits" not in tangents:
        operands = {name: t for name, t in operands.items() if name != "entries"}
    read, constants = _of_backward(tangents, names, needs)
    if "entry_logits" in tangents and attributes.softcap:
        read.append("entry_logits")
    beside = {name: t for name, t in _renamed(saved, names).items() if name in read}
    beside |= cpu.prefixed(_renamed(tangents, names))
    layouts = cpu.gradient_layouts(operands, needs)
    absent = [*TABLE, *cpu.prefixed(TABLE)]
    return _launch("two_heads_backward", operands, beside, row_mask, attributes, constants, layouts, absent)


def with_gradients(
    tangents: dict[str, Any],
    operands: dict[str, Any],
    row_mask: Any,
    statistics: list[str],
    needs: list[str],
    attributes: Attributes,
    bounded: bool,
) -> Sequence[Any]:
    for name in needs:
        dtype = operands[name].get_dtype()
        if name.endswith("weight") and dtype != torch.float32:
            raise Unsupported(f"the gradient of {name} is {dtype}: chunks cannot be added up in it")
    names = _identifiers(statistics)
    read, constants = _of_backward(tangents, names, needs)
    # Both logits are what a program without the operator saves.
    compute = {"input": attributes.compute_dtype, OTHER + "input": attributes.other_compute_dtype}
    saved = [dtype or operands[name].get_dtype() for name, dtype in compute.items()]
    constants |= _of_forward(statistics, names) | {
        "needed": read,
        "kept_share": CACHED_SHARE,
        "logit_bytes": sum(dtype.itemsize for dtype in saved),
    }
    layouts = _renamed(cpu.statistics_layouts(operands, statistics), names) | cpu.gradient_layouts(operands, needs)
    beside, absent = cpu.prefixed(_renamed(tangents, names)), cpu.prefixed(TABLE)
    return _launch("two_heads_with_gradients", operands, beside, row_mask, attributes, constants, layouts, absent)


def _of_forward(statistics: Sequence[str], names: Mapping[str, str]) -> dict[str, Any]:
    """What the templates are told of the statistics. names: `_identifiers`."""
    asked: dict[Divergence, list[str]] = {}
    for row in (TABLE[name] for name in statistics):
        if row.divergence is not None:
            asked.setdefault(row.divergence, []).append(row.part)
    divergences: list[dict[str, Any]] = []
    for divergence, parts in asked.items():
        results = [names[f"{divergence}{part}"] for part in parts]
        first = sum(len(before["results"]) for before in divergences)
        divergences.append(_written(divergence, names, parts) | {"results": results, "first": first})
    return {
        "statistics": statistics,
        "of_one": [name for name in statistics if name in OF_ONE],
        "results": [*RESULTS, *names.values()],
        "divergences": divergences,
        "least": LEAST,
    }


def _of_backward(
    tangents: Iterable[str], names: Mapping[str, str], needs: list[str]
) -> tuple[list[str], dict[str, Any]]:
    """Which statistics the gradients read, as the templates know them, and what the templates are told.

    names: `_identifiers`. Raises Unsupported where no tangent is of both heads.
    """
    divergences = [d for name in tangents if (d := TABLE[name].divergence) is not None]
    pairs = [name for name in PAIRS if name in tangents]
    if not (pairs or divergences):
        raise Unsupported("no tangent of a function of both heads")
    slopes = [names[f"{divergence}{part}"] for divergence in divergences for part in (OWN, OTHER_PART)]
    read = [*LSE_OF_BOTH, *pairs, *(name for name in ("entropy", "target_logit") if name in tangents), *slopes]
    of_divergences = [*slopes, *(f"g_{names[str(d)]}" for d in divergences)]
    constants = {
        "tangents": list(tangents),
        "needs": needs,
        "of_rows": [*LSE_OF_BOTH, *PAIRS, *(f"g_{name}" for name in PAIRS), *of_divergences],
        "differentiated": [_written(divergence, names, (OWN, OTHER_PART)) for divergence in divergences],
        "least": LEAST,
    }
    return read, constants


def _renamed(by_name: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The same by the names that the templates know: `_identifiers`."""
    return {names.get(name, name): value for name, value in by_name.items()}


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


def _written(divergence: Divergence, names: Mapping[str, str], parts: Sequence[str]) -> dict[str, Any]:
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
    absent: Iterable[str] = (),
) -> Sequence[Any]:
    """The results of one kernel. beside: what it reads besides the operands, by name. absent: what it might, too."""
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
    absent = [*(OTHER + name for name in OF_HEAD), *absent]
    dtypes = cpu.ABSENT | dict.fromkeys(absent, torch.float32)
    spec = Spec(template, element, compute, given, dtypes, layouts, constants, other)
    return list(launch(spec, operands["input"].get_device()).values())


def _of_other(operands: dict[str, Any]) -> dict[str, Any]:
    """The other head's operands by the names of a head's own."""
    return {name.removeprefix(OTHER): t for name, t in operands.items() if name.startswith(OTHER)}
