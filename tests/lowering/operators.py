"""The operators, compiled for the CPU, and the comparison of what they compute with all logits at hand."""

from collections.abc import Callable, Sequence

import torch
from head_oracle import Head, check_error_rule, logits, operands, statistics
from torch import Tensor
from torch._dynamo.utils import counters

from cce_inductor import version
from cce_inductor.ops.call import DIFFERENTIABLE_OPERANDS, LABELS, SCALES, Attributes
from cce_inductor.ops.library import FORWARD
from cce_inductor.ops.with_gradients import WITH_GRADIENTS

LOSS = "lse target_logit"
EVERY = "lse target_logit logit_sum entropy argmax"
GRADIENTS = "dx dw db drow_scale dcolumn_scale"


def kernels() -> int:
    """How many kernels were made of our templates since the test began."""
    return counters["inductor"]["cpp_templated_kernel_counter"]


def tangents_of(names: str, head: Head) -> list[Tensor]:
    """Tangents of both signs, one for each statistic that has one."""
    generator, n = torch.Generator().manual_seed(5), head.x.shape[0]
    return [(torch.rand(n, generator=generator) - 0.4) / 8 for name in names.split() if name != "argmax"]


def forward(names: str, attributes: Attributes) -> Callable[..., Sequence[Tensor]]:
    """The forward operator as a function of tensors only, to be compiled."""
    arguments = attributes.args()

    def call(x, w, target, bias=None, column_weight=None, row_mask=None, **factors):
        given = operands(x, w, target, bias, column_weight, **factors)
        return FORWARD(list(given.values()), " ".join(given), row_mask, names, True, *arguments)

    return call


def with_gradients(names: str, attributes: Attributes) -> Callable[..., Sequence[Tensor]]:
    """The same of the operator that forms gradients in the forward: statistics, then a gradient of all that has one."""
    arguments = attributes.args()
    differentiable = " ".join(name for name in names.split() if name != "argmax")

    def call(tangents, x, w, target, bias=None, column_weight=None, row_mask=None, needs="", **factors):
        given = operands(x, w, target, bias, column_weight, **factors)
        floats = [name for name, t in given.items() if t.is_floating_point()]
        needs = needs or " ".join(name for name in DIFFERENTIABLE_OPERANDS if name in floats)
        return WITH_GRADIENTS(
            tangents, differentiable, list(given.values()), " ".join(given), row_mask, names, needs, *arguments
        )

    return call


def from_logits(names: str, attributes: Attributes) -> Callable[..., Sequence[Tensor]]:
    """The same statistics as `forward`'s, from all logits, and in the dtype of the operands."""

    def call(x, w, target, bias=None, column_weight=None, row_mask=None, entries=None, **others):
        labels = {name: others.pop(name) for name in LABELS if name in others}
        z = logits(x, w, bias, attributes.scale, attributes.softcap or None, attributes.softcap_form, **others)
        out = statistics(names, z, target, column_weight, entries, **labels)
        if row_mask is None:
            return out
        return [torch.where(row_mask if t.dim() == 1 else row_mask[:, None], t, 0) for t in out]

    return call


def differentiate(
    fn: Callable[..., Sequence[Tensor]], head: Head, names: str, needs: str = GRADIENTS, tangents=None, **tensors
) -> dict[str, Tensor]:
    """Statistics by name, and the gradients in `needs`, of what `forward` or `from_logits` made."""
    leaves = {name: t.detach().requires_grad_(name in needs.split()) for name, t in head.leaves().items()}
    factors = {name: leaves[f"d{name}"] for name in SCALES if f"d{name}" in leaves}
    out = fn(leaves["dx"], leaves["dw"], head.target, leaves.get("db"), **factors, **tensors)
    out = out[: len(names.split())]  # without a bound
    floats = [t for t in out if t.is_floating_point()]
    given = tangents or tangents_of(names, head)
    given = [
        g if t.dim() == 1 else g[:, None] * torch.linspace(0.5, -1, t.shape[1])
        for t, g in zip(floats, given, strict=True)
    ]
    total = sum((t * g).sum() for t, g in zip(floats, given, strict=True))
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    gradients = torch.autograd.grad(total, list(wanted.values()))
    return dict(zip([*names.split(), *wanted], [*(t.detach() for t in out), *gradients], strict=True))


def compare(
    case: str, ours: dict[str, Tensor], head: Head, names: str, attributes: Attributes, **call
) -> dict[str, Tensor]:
    """`ours`, checked against float64 under the error rule; eager's error is that of all logits at hand."""
    plain, dtype = from_logits(names, attributes), attributes.compute_dtype or head.x.dtype
    exact = differentiate(plain, head.to(torch.float64), names, **call)
    eager = differentiate(plain, head.to(dtype), names, **call)
    if "argmax" in exact:
        assert torch.equal(ours["argmax"], exact.pop("argmax")), case
    check_error_rule(case, ours, eager, exact, dtype)
    for name, leaf in head.leaves().items():
        assert name not in ours or (ours[name].dtype, ours[name].shape) == (leaf.dtype, leaf.shape)
    return ours


class Operator:
    """`forward`, or `with_gradients` if `at_once`, compiled with these attributes."""

    def __init__(self, names: str, at_once: bool = False, dynamic: bool | None = None, **attributes):
        # Of the templates as they are now: a test may have edited them.
        source = version.hash_files(version.PACKAGE, version.templates_dir())
        self.names, self.at_once = names, at_once
        self.attributes = Attributes(**attributes, version=source)
        function = (with_gradients if at_once else forward)(names, self.attributes)
        self.compiled = torch.compile(function, dynamic=dynamic)

    def run(self, head: Head, needs: str = GRADIENTS, tangents=None, **tensors) -> dict[str, Tensor]:
        """Statistics and gradients by name. `tensors`: column_weight, row_mask. `needs` is for autograd alone."""
        if not self.at_once:
            return differentiate(self.compiled, head, self.names, needs, tangents, **tensors)
        tangents = tangents or tangents_of(self.names, head)
        factors = {name: t for name in SCALES if (t := getattr(head, name)) is not None}
        out = self.compiled(tangents, head.x, head.w, head.target, head.bias, **factors, **tensors)
        floats = [name for name, t in head.leaves().items() if t.is_floating_point()]
        return dict(zip([*self.names.split(), *floats], out, strict=True))

    def check(self, case: str, head: Head, **call) -> dict[str, Tensor]:
        """What `run` gives, against float64 under the error rule; eager's error is that of all logits at hand."""
        return compare(case, self.run(head, **call), head, self.names, self.attributes, **call)

    def check_threads(self, case: str, head: Head, loops: Callable[[], set[tuple[int, int]]], **call) -> None:
        """`check`, that every loop of the kernels ran on three threads, and that a second run gives the same bits."""
        ours, again = self.check(case, head, **call), self.run(head, **call)
        found = loops()
        assert {threads for tasks, threads in found if tasks > 2} == {3}, found
        assert all(torch.equal(ours[name], again[name]) for name in again), case
