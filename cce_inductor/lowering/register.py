"""Registers the lowerings of the fused operators with Inductor.

A call that the templates of its device cannot take runs the operator's eager implementation inside the compiled graph.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from ..ops.call import OTHER, Attributes, bounded, filtered, saved_names
from ..ops.divergences import Divergence
from ..ops.statistics import TABLE
from . import apart
from .unsupported import Apart, Unsupported, as_lse, check_picked, check_statistics, differentiable

log = logging.getLogger(__name__)

# device type -> module of this package with `forward`, `backward` and `with_gradients`
DEVICES = {"cpu": "cpu", "cuda": "cuda"}
# The same of a loss over two heads; `with_gradients` may be missing.
DEVICES_OF_TWO = {"cpu": "cpu_two_heads", "cuda": "cuda_two_heads"}
# Those of them that have divergences of a mixture of both.
WITH_MIXTURES = ("cpu",)


@functools.cache
def register() -> None:
    """Makes Inductor compile the fused operators with our templates. May be called any number of times."""
    from torch._inductor.lowering import register_lowering

    from ..ops.library import BACKWARD, FORWARD, SAVED
    from ..ops.with_gradients import ATTACH, WITH_GRADIENTS

    for operator, read in ((FORWARD, _forward), (BACKWARD, _backward), (WITH_GRADIENTS, _with_gradients)):
        register_lowering(operator, type_promotion_kind=None)(functools.partial(_lower, operator, read))
    # What these two are for is done when the joint graph is cut in two.
    for operator in (SAVED, ATTACH):
        register_lowering(operator, type_promotion_kind=None)(lambda value, *rest: value)


def _lower(operator: Any, read: Callable, *call: Any) -> Sequence[Any]:
    from torch._inductor.lowering import fallback_handler

    try:
        name, operands, arguments = read(*call)
        device = operands["input"].get_device().type
        two_heads = OTHER + "input" in operands
        modules = DEVICES_OF_TWO if two_heads else DEVICES
        if device not in modules:
            raise Unsupported(f"there is no template for {device}" + " that compares two heads" * two_heads)
        if two_heads and arguments.pop("rest", False):
            raise Unsupported("the target is left out of a log-sum-exp beside a second head")
        if device not in WITH_MIXTURES and any(map(Divergence.read, arguments.get("statistics") or arguments["saved"])):
            raise Unsupported(f"there is no template for {device} with divergences of a mixture")
        module = importlib.import_module(f".{modules[device]}", __package__)
        if not hasattr(module, name):
            raise Unsupported(f"there is no template for {device} that forms gradients of two heads in the forward")
        return getattr(module, name)(**arguments)
    except Apart as reason:
        log.info("%s computes its entries apart: %s", operator, reason)
        gather = fallback_handler(operator, add_to_fallback_set=False)
        return getattr(apart, name)(gather, functools.partial(_lower, operator, read), *call)
    except Unsupported as reason:
        log.info("%s runs its eager implementation: %s", operator, reason)
    except Exception:
        # A fault of ours, or of the tuning, must not cost the user the compilation.
        log.exception("%s could not be lowered and runs its eager implementation", operator)
    return fallback_handler(operator, add_to_fallback_set=False)(*call)


def _forward(operands, names, row_mask, statistics, training, *attributes) -> tuple[str, dict, dict]:
    check_statistics(statistics)
    check_picked(statistics.split())
    named, options = _read(names, operands), Attributes(*attributes)
    wanted, rest = as_lse(statistics)
    arguments = {
        "operands": named,
        "row_mask": row_mask,
        "statistics": wanted,
        "attributes": options,
        "bounded": training and bounded(statistics, options),
        "rest": rest,
    }
    return "forward", named, arguments


def _backward(tangents, tangent_names, saved, operands, names, row_mask, statistics, needs, *attributes):
    check_statistics(statistics)
    named, options = _read(names, operands), Attributes(*attributes)
    if filtered(statistics, options) and not bounded(statistics, options):
        raise Unsupported("no template has the filter eps")
    check_picked(tangent_names.split())
    rest = as_lse(statistics)[1]
    given, results = _named(tangent_names, tangents), _named(saved_names(statistics, saved), saved)
    if OTHER + "input" in named and OTHER not in needs and not any(map(_of_two, given)):
        # No function of both heads was differentiated: the second one is not read.
        named = {name: t for name, t in named.items() if not name.startswith(OTHER)}
        results = {name: t for name, t in results.items() if not _of_two(name)}
    arguments = {
        "tangents": _as_lse(differentiable(given)),
        "saved": _as_lse(results),
        "operands": named,
        "row_mask": row_mask,
        "needs": needs.split(),
        "attributes": options,
        "rest": rest,
    }
    return "backward", named, arguments


def _with_gradients(tangents, tangent_names, operands, names, row_mask, statistics, needs, *attributes):
    check_statistics(statistics)
    named, options = _read(names, operands), Attributes(*attributes)
    if filtered(statistics, options) and not bounded(statistics, options):
        raise Unsupported("no template has the filter eps")
    if as_lse(statistics)[1]:
        raise Unsupported("no loss of lse_rest has its gradients formed in the forward")
    if "entries" in named:
        raise Unsupported("no loss over several classes a row has its gradients formed in the forward")
    arguments = {
        "tangents": differentiable(_named(tangent_names, tangents)),
        "operands": named,
        "row_mask": row_mask,
        "statistics": statistics.split(),
        "needs": needs.split(),
        "attributes": options,
        "bounded": bounded(statistics, options),
    }
    return "with_gradients", named, arguments


def _of_two(statistic: str) -> bool:
    """Whether it is of a second head."""
    return statistic.startswith(OTHER) or OTHER + "input" in TABLE[statistic].requires


def _as_lse(named: dict[str, Any]) -> dict[str, Any]:
    return {as_lse(name)[0][0]: value for name, value in named.items()}


def _read(names: str, operands: Sequence[Any]) -> dict[str, Any]:
    """The operands by name that an operator reads: "diagnostics" is there for its gradient alone."""
    return {name: operand for name, operand in _named(names, operands).items() if name != "diagnostics"}


def _named(names: str | Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(names.split() if isinstance(names, str) else names, values, strict=True))
