"""Registers the two operators of namespace ``cce_inductor``: everything that PyTorch needs to know of them.

`linear_statistics` reduces the logits of `input` and `weight` to row statistics without ever writing them;
`linear_statistics_backward` gives the gradients of its operands from tangents of the statistics.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import register_flop_formula

from . import filtered, reference, twice
from .bound import blocks, groups
from .call import DIFFERENTIABLE_OPERANDS, OTHER, Attributes, Call, check, saved_names
from .statistics import TABLE, with_all_digits

ATTRIBUTES = (
    "float scale, float softcap, str softcap_form, ScalarType? compute_dtype, str grad_filter, int workspace, "
    "str version, float other_scale=1.0, float other_softcap=0.0, str other_softcap_form='tanh', "
    "ScalarType? other_compute_dtype=None"
)
# `training` asks for what a backward reads besides the statistics; it comes behind them in the result.
_FORWARD = (
    "linear_statistics(Tensor[] operands, str names, Tensor? row_mask, str statistics, bool training, "
    f"{ATTRIBUTES}) -> Tensor[]"
)
# `tangents` go with the statistics named in `tangent_names`; the result with the operands named in `needs`.
_BACKWARD = (
    "linear_statistics_backward(Tensor[] tangents, str tangent_names, Tensor[] saved, Tensor[] operands, str names, "
    f"Tensor? row_mask, str statistics, str needs, {ATTRIBUTES}) -> Tensor[]"
)

library = torch.library.Library("cce_inductor", "DEF")
for _schema in (_FORWARD, _BACKWARD):
    # Strides are left to Inductor: every implementation takes any.
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
# The tensor itself; only traced graphs have it, and Inductor takes it out again (lowering/register.py).
library.define(
    "saved(Tensor value, Tensor[]? beside=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)

FORWARD = torch.ops.cce_inductor.linear_statistics.default
BACKWARD = torch.ops.cce_inductor.linear_statistics_backward.default
SAVED = torch.ops.cce_inductor.saved.default


def eager_forward(
    operands: list[Tensor], names: str, row_mask: Tensor | None, statistics: str, training: bool, *attributes: Any
) -> list[Tensor]:
    """The eager implementation of `linear_statistics`.

    operands: as `names` say, ``input (N, D)``, ``weight (V, D)`` and so on (call.py); all are floating but the weight,
    which may be int8 and has no gradient then. row_mask: (N,) bool, the rows that count, or None for all. statistics:
    their names. training: whether a backward may follow. attributes: those of `Attributes`, in order. Returns the
    statistics, (N,) each and entry_logits (N, K), in fp32 (fp64 for fp64; argmax: int64), and behind them the bound if
    a backward needs one. Raises RuntimeError for operands that do not fit together.
    """
    call = Call.read(operands, names, row_mask, statistics, attributes)
    check(call, training)
    return filtered.forward(call) if training and call.bounded else reference.forward(call)


def eager_backward(
    tangents: list[Tensor],
    tangent_names: str,
    saved: list[Tensor],
    operands: list[Tensor],
    names: str,
    row_mask: Tensor | None,
    statistics: str,
    needs: str,
    *attributes: Any,
) -> list[Tensor]:
    """The eager implementation of `linear_statistics_backward`.

    tangents: of the statistics in `tangent_names`, in their shapes. saved: what the forward gave, the bound included.
    needs: names of operands. The others are as for `eager_forward`. Returns the gradient of each operand in `needs`, in
    its shape and dtype.
    """
    call = Call.read(operands, names, row_mask, statistics, attributes)
    check(call, training=True, needs=needs)
    given = dict(zip(tangent_names.split(), tangents, strict=True))
    results = dict(zip(saved_names(statistics, saved), saved, strict=True))
    if call.filtered and "lse" in given:
        return filtered.backward(call, given, results, needs.split())
    results.pop("bound", None)
    return reference.backward(call, given, results, needs.split())


library.impl("linear_statistics", eager_forward, "CompositeExplicitAutograd")
library.impl("linear_statistics_backward", eager_backward, "CompositeExplicitAutograd")
library.impl("saved", lambda value, beside=None: value.clone(), "CompositeExplicitAutograd")


@torch.library.register_fake("cce_inductor::linear_statistics", lib=library)
def fake_forward(
    operands: list[Tensor], names: str, row_mask: Tensor | None, statistics: str, training: bool, *attributes: Any
) -> list[Tensor]:
    """Shapes and dtypes of what `eager_forward` gives, and its errors."""
    call = Call.read(operands, names, row_mask, statistics, attributes)
    check(call, training)
    x = call.input
    dtypes = [torch.int64 if row.integer else call.accumulate_dtype for row in call.rows]
    out = [x.new_empty(call.shape(row), dtype=dtype) for row, dtype in zip(call.rows, dtypes, strict=True)]
    if training and call.bounded:
        out.append(
            x.new_empty((blocks(x.shape[0]), groups(call.weight.shape[0], call.filter.group)), dtype=torch.uint8)
        )
    return out


@torch.library.register_fake("cce_inductor::linear_statistics_backward", lib=library)
def fake_backward(
    tangents: list[Tensor],
    tangent_names: str,
    saved: list[Tensor],
    operands: list[Tensor],
    names: str,
    row_mask: Tensor | None,
    statistics: str,
    needs: str,
    *attributes: Any,
) -> list[Tensor]:
    """Shapes and dtypes of what `eager_backward` gives, and its errors."""
    call = Call.read(operands, names, row_mask, statistics, attributes)
    check(call, training=True, needs=needs)
    return [call.operands[name].new_empty(call.operands[name].shape) for name in needs.split()]


@torch.library.register_fake("cce_inductor::saved", lib=library)
def _fake_saved(value: Tensor, beside: Sequence[Tensor] | None = None) -> Tensor:
    return torch.empty_like(value)


class _LinearStatistics(torch.autograd.Function):
    """Autograd of the forward operator: saves the operands and the statistics, never a logit."""

    @staticmethod
    def forward(ctx: Any, names: str, row_mask: Tensor | None, statistics: str, attributes: tuple, *operands: Tensor):
        call = Call.read(list(operands), names, row_mask, statistics, attributes).grouped()
        attributes = call.attributes.args()
        with torch._C._AutoDispatchBelowAutograd():
            out = FORWARD(list(operands), names, row_mask, statistics, True, *attributes)
        seed = [call.operands["seed"]] if "seed" in call.operands else []  # drawn again, it would be another one
        # Of the statistics, some may be read by the backward alone.
        low = [i for i, row in enumerate(call.rows) if not row.differentiable and not row.integer]
        beside = must_save([*out[len(call.rows) :], *(out[i] for i in low), *seed])
        extra = len(out) - len(call.rows)
        out = [*must_save(out[: len(call.rows)], beside), *beside[:extra]]
        for i, saved in zip(low, beside[extra:], strict=False):
            out[i] = saved
        if seed:
            call.operands["seed"] = beside[-1]
        ctx.names, ctx.statistics, ctx.attributes = names, statistics, attributes
        ctx.operands = len(operands)
        ctx.save_for_backward(*call.operands.values(), *out, *(() if row_mask is None else (row_mask,)))
        ctx.set_materialize_grads(False)
        plain = [o for o, row in zip(out, call.rows, strict=False) if not row.differentiable]
        ctx.mark_non_differentiable(*plain, *out[len(call.rows) :])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None):
        tensors = list(ctx.saved_tensors)  # read once: inside an activation checkpoint a second time is an error
        operands, rest = tensors[: ctx.operands], tensors[ctx.operands :]
        statistics = ctx.statistics.split()
        row_mask = rest.pop() if len(rest) > len(tangents) else None
        named = {name: t for name, t in zip(statistics, tangents, strict=False) if t is not None}
        named, saved = with_all_digits(named, dict(zip(saved_names(ctx.statistics, rest), rest, strict=True)))
        names = ctx.names.split()
        # The other head's logits have a gradient from statistics of both alone.
        both = any(TABLE[name].of_both for name in named)
        needs = [
            name
            for name, wanted in zip(names, ctx.needs_input_grad[4:], strict=True)
            if wanted and name in DIFFERENTIABLE_OPERANDS and (both or not name.startswith(OTHER))
        ]
        if not named or not {*needs} - {"diagnostics"}:
            return (None,) * (4 + len(operands))
        grads = BACKWARD(
            list(named.values()),
            " ".join(named),
            list(saved.values()),
            operands,
            ctx.names,
            row_mask,
            ctx.statistics,
            " ".join(needs),
            *ctx.attributes,
        )
        by_name = dict(zip(needs, grads, strict=True))
        return (None, None, None, None, *(by_name.get(name) for name in names))


def _autograd_forward(operands, names, row_mask, statistics, training, *attributes) -> list[Tensor]:
    wanted = (t for name, t in zip(names.split(), operands, strict=True) if name != "diagnostics")
    if torch.is_grad_enabled() and any(t.requires_grad for t in wanted):
        results = list(_LinearStatistics.apply(names, row_mask, statistics, attributes, *operands))
        return results if training else results[: len(statistics.split())]
    with torch._C._AutoDispatchBelowAutograd():
        return FORWARD(operands, names, row_mask, statistics, training, *attributes)


def must_be_saved(operator: Any, *args: Any) -> list[Tensor]:
    """Calls an operator below autograd, and `must_save` on its results: they cost passes over the whole vocabulary."""
    with torch._C._AutoDispatchBelowAutograd():
        results = operator(*args)
    return must_save(results)


def must_save(tensors: list[Tensor], beside: Sequence[Tensor] = ()) -> list[Tensor]:
    """The tensors. While a joint graph is traced, they are marked "must be saved".

    No activation checkpoint, memory budget or aggressive recomputation then computes them a second time. The mark has
    to stand on an operator that gives a tensor, since torch saves what is marked
    (torch._functorch.partitioners.choose_saved_values_set) and the fused operators give a list: hence `saved`. And it
    only counts on what the forward's own results depend on: `beside` are marked tensors that those are made to.
    """
    mode = get_proxy_mode()
    graph = None if mode is None else getattr(mode.tracer, "graph", None)
    if graph is None:
        return tensors
    before = len(graph.nodes)
    with torch._C._AutoDispatchBelowAutograd():
        tensors = [SAVED(t, list(beside) or None) for t in tensors]
    for node in itertools.islice(reversed(graph.nodes), len(graph.nodes) - before):
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return tensors


def _autograd_backward(
    tangents, tangent_names, saved, operands, names, row_mask, statistics, needs, *attributes
) -> list[Tensor]:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*tangents, *saved, *operands)):
        if get_proxy_mode() is not None:
            raise RuntimeError(
                "cce_inductor: the fused cross-entropy has no second derivative in compiled code, so "
                "backward(create_graph=True) through it cannot work there. Compile without cce_inductor where you "
                "differentiate twice."
            )
        call = Call.read(list(operands), names, row_mask, statistics, attributes)
        named = dict(zip(tangent_names.split(), tangents, strict=True))
        return twice.gradients(call, named, needs.split())
    with torch._C._AutoDispatchBelowAutograd():
        return BACKWARD(tangents, tangent_names, saved, operands, names, row_mask, statistics, needs, *attributes)


library.impl("linear_statistics", _autograd_forward, "Autograd")
library.impl("linear_statistics_backward", _autograd_backward, "Autograd")


_AUTOCAST = {device: f"Autocast{device.upper()}" for device in ("cpu", "cuda", "xpu")}


def autocast_off(name: str, operator: Any) -> None:
    """Registers that an operator runs with autocast off: it would round the tiles of the eager implementation."""
    for key in _AUTOCAST.values():
        exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def run(*args, exclude=exclude) -> list[Tensor]:
            with torch._C._ExcludeDispatchKeyGuard(exclude):
                return operator(*args)

        library.impl(name, run, key)


def _autocast(operands: dict[str, Tensor], attributes: Attributes, device_type: str) -> tuple:
    """The attributes with the autocast dtype for a compute dtype that is not given: of each head, as F.linear would."""
    ambient = torch.get_autocast_dtype(device_type)

    def dtype(given: torch.dtype | None, prefix: str) -> torch.dtype | None:
        exact = any(t.dtype == torch.float64 for n, t in operands.items() if n in (f"{prefix}input", f"{prefix}weight"))
        return ambient if given is None and not exact else given

    own, other = dtype(attributes.compute_dtype, ""), dtype(attributes.other_compute_dtype, OTHER)
    attributes = replace(attributes, compute_dtype=own, other_compute_dtype=other)
    return attributes.args()


def _autocast_forward(device_type: str, key: str) -> None:
    """An unspecified compute dtype becomes the ambient autocast dtype; the operands themselves are never copied."""
    exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def forward(operands, names, row_mask, statistics, training, *attributes) -> list[Tensor]:
        attributes = _autocast(dict(zip(names.split(), operands, strict=True)), Attributes(*attributes), device_type)
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            return FORWARD(operands, names, row_mask, statistics, training, *attributes)

    library.impl("linear_statistics", forward, key)


for _device_type, _key in _AUTOCAST.items():
    _autocast_forward(_device_type, _key)
autocast_off("linear_statistics_backward", BACKWARD)


@register_flop_formula(torch.ops.cce_inductor.linear_statistics)
def _forward_flops(operands, names, *args, out_val=None, **kwargs) -> int:
    """2 N V D: one GEMM over the logits of each head, and 2 N K D for entries. `operands` are shapes."""
    shapes = dict(zip(names.split(), operands, strict=True))
    return _gemm_flops(shapes) + _gemm_flops(shapes, OTHER)


@register_flop_formula(torch.ops.cce_inductor.linear_statistics_backward)
def backward_flops(
    tangents, tangent_names, saved, operands, names, row_mask, statistics, needs, *args, **kwargs
) -> int:
    """2 N V D for recomputing the logits of each head and as much again for each of dx and dW that is wanted."""
    shapes = dict(zip(names.split(), operands, strict=True))
    wanted = needs.split()
    return sum(
        _gemm_flops(shapes, prefix) * (1 + (f"{prefix}input" in wanted) + (f"{prefix}weight" in wanted))
        for prefix in ("", OTHER)
    )


def _gemm_flops(shapes: dict[str, Any], prefix: str = "") -> int:
    """2 N V D of a head, 0 if there is none, and 2 N K D for the entries of the first one."""
    if f"{prefix}input" not in shapes:
        return 0
    (n, d), v = shapes[f"{prefix}input"], shapes[f"{prefix}weight"][0]
    k = 0 if prefix else shapes.get("entries", (0, 0))[1]
    return 2 * n * (v + k) * d
