"""Registers the two operators of namespace ``cce_inductor``: everything that PyTorch needs to know of them.

`linear_statistics` reduces the logits of `input` and `weight` to row statistics without ever writing them;
`linear_statistics_backward` gives the gradients of its operands from tangents of the statistics.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .call import DIFFERENTIABLE_OPERANDS, Attributes, Call, check

_ATTRIBUTES = (
    "float scale, float softcap, ScalarType? compute_dtype, str grad_filter, int workspace, str version"
)
# `training` asks for what a backward reads besides the statistics; it comes behind them in the result.
_FORWARD = (
    "linear_statistics(Tensor[] operands, str names, Tensor? active, str statistics, bool training, "
    f"{_ATTRIBUTES}) -> Tensor[]"
)
# `tangents` go with the statistics named in `tangent_names`; the result with the operands named in `needs`.
_BACKWARD = (
    "linear_statistics_backward(Tensor[] tangents, str tangent_names, Tensor[] saved, Tensor[] operands, str names, "
    f"Tensor? active, str statistics, str needs, {_ATTRIBUTES}) -> Tensor[]"
)

library = torch.library.Library("cce_inductor", "DEF")
for _schema in (_FORWARD, _BACKWARD):
    # Strides are left to Inductor: every implementation takes any.
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))

FORWARD = torch.ops.cce_inductor.linear_statistics.default
BACKWARD = torch.ops.cce_inductor.linear_statistics_backward.default


def _eager_forward(operands, names, active, statistics, training, *attributes) -> list[Tensor]:
    call = Call.read(operands, names, active, statistics, attributes)
    check(call)
    return reference.forward(call)


def _eager_backward(
    tangents, tangent_names, saved, operands, names, active, statistics, needs, *attributes
) -> list[Tensor]:
    call = Call.read(operands, names, active, statistics, attributes)
    check(call)
    return reference.backward(
        call,
        dict(zip(tangent_names.split(), tangents, strict=True)),
        dict(zip(statistics.split(), saved)),
        needs.split(),
    )


library.impl("linear_statistics", _eager_forward, "CompositeExplicitAutograd")
library.impl("linear_statistics_backward", _eager_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("cce_inductor::linear_statistics", lib=library)
def _fake_forward(operands, names, active, statistics, training, *attributes) -> list[Tensor]:
    call = Call.read(operands, names, active, statistics, attributes)
    check(call)
    n = call.input.shape[0]
    return [
        call.input.new_empty(n, dtype=torch.int64 if row.integer else call.accumulate_dtype) for row in call.rows
    ]


@torch.library.register_fake("cce_inductor::linear_statistics_backward", lib=library)
def _fake_backward(
    tangents, tangent_names, saved, operands, names, active, statistics, needs, *attributes
) -> list[Tensor]:
    call = Call.read(operands, names, active, statistics, attributes)
    return [call.operands[name].new_empty(call.operands[name].shape) for name in needs.split()]


class _LinearStatistics(torch.autograd.Function):
    """Autograd of the forward operator: saves the operands and the statistics, never a logit."""

    @staticmethod
    def forward(ctx: Any, names: str, active: Tensor | None, statistics: str, attributes: tuple, *operands: Tensor):
        with torch._C._AutoDispatchBelowAutograd():
            out = FORWARD(list(operands), names, active, statistics, True, *attributes)
        call = Call.read(list(operands), names, active, statistics, attributes)
        ctx.names, ctx.statistics, ctx.attributes = names, statistics, attributes
        ctx.operands = len(operands)
        ctx.save_for_backward(*operands, *out, *(() if active is None else (active,)))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(o for o, row in zip(out, call.rows) if not row.differentiable))
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None):
        operands = list(ctx.saved_tensors[: ctx.operands])
        statistics = ctx.statistics.split()
        rest = list(ctx.saved_tensors[ctx.operands :])
        active = rest.pop() if len(rest) > len(tangents) else None
        named = {name: t for name, t in zip(statistics, tangents) if t is not None}
        names = ctx.names.split()
        needs = [
            name
            for name, wanted in zip(names, ctx.needs_input_grad[4:])
            if wanted and name in DIFFERENTIABLE_OPERANDS
        ]
        if not named or not needs:
            return (None,) * (4 + len(operands))
        grads = BACKWARD(
            list(named.values()),
            " ".join(named),
            rest,
            operands,
            ctx.names,
            active,
            ctx.statistics,
            " ".join(needs),
            *ctx.attributes,
        )
        by_name = dict(zip(needs, grads))
        return (None, None, None, None, *(by_name.get(name) for name in names))


def _autograd_forward(operands, names, active, statistics, training, *attributes) -> list[Tensor]:
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        with _SavedOutputs():
            return list(_LinearStatistics.apply(names, active, statistics, attributes, *operands))
    with torch._C._AutoDispatchBelowAutograd():
        return FORWARD(operands, names, active, statistics, training, *attributes)


class _SavedOutputs:
    """Marks the nodes that a trace records inside it as "must be saved".

    The statistics are (N,) vectors that cost a full pass over the vocabulary: no activation checkpoint, memory budget
    or aggressive recomputation should run the forward operator a second time.
    """

    def __enter__(self) -> None:
        mode = get_proxy_mode()
        self.graph = None if mode is None else getattr(mode.tracer, "graph", None)
        self.before = 0 if self.graph is None else len(self.graph.nodes)

    def __exit__(self, *exc: object) -> None:
        if self.graph is not None:
            added = len(self.graph.nodes) - self.before
            for node in itertools.islice(reversed(self.graph.nodes), added):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _autograd_backward(tangents, tangent_names, saved, operands, *rest) -> list[Tensor]:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*tangents, *saved, *operands)):
        raise RuntimeError(
            "cce_inductor: the fused cross-entropy has no second derivative, so backward(create_graph=True) through "
            "it cannot work. Compile without cce_inductor where you differentiate twice, or compute the loss with "
            "torch.nn.functional.cross_entropy outside the compiled region."
        )
    with torch._C._AutoDispatchBelowAutograd():
        return BACKWARD(tangents, tangent_names, saved, operands, *rest)


library.impl("linear_statistics", _autograd_forward, "Autograd")
library.impl("linear_statistics_backward", _autograd_backward, "Autograd")


def _register_autocast(device_type: str) -> None:
    """An unspecified compute dtype becomes the ambient autocast dtype; the operands themselves are never copied."""
    key = f"Autocast{device_type.upper()}"
    exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(operands, names, active, statistics, training, *attributes) -> list[Tensor]:
        attrs = Attributes(*attributes)
        if attrs.compute_dtype is None and operands[0].dtype != torch.float64:
            attributes = (*attributes[:2], torch.get_autocast_dtype(device_type), *attributes[3:])
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            return FORWARD(operands, names, active, statistics, training, *attributes)

    library.impl("linear_statistics", kernel, key)


for _device_type in ("cpu", "cuda", "xpu"):
    _register_autocast(_device_type)


@register_flop_formula(torch.ops.cce_inductor.linear_statistics)
def _forward_flops(operands, names, *args, out_val=None, **kwargs) -> int:
    """2 N V D: one GEMM over the logits. `operands` are shapes."""
    shapes = dict(zip(names.split(), operands))
    return _gemm_flops(shapes)


@register_flop_formula(torch.ops.cce_inductor.linear_statistics_backward)
def _backward_flops(tangents, tangent_names, saved, operands, names, active, statistics, needs, *args, **kwargs) -> int:
    """2 N V D for recomputing the logits and as much again for each of dx and dW that is wanted."""
    shapes = dict(zip(names.split(), operands))
    return _gemm_flops(shapes) * (1 + sum(name in ("input", "weight") for name in needs.split()))


def _gemm_flops(shapes: dict[str, Any]) -> int:
    (n, d), v = shapes["input"], shapes["weight"][0]
    return 2 * n * v * d
