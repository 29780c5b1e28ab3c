"""What is called often on deferred logits, in a training loop, is compiled: with the same numbers before and after."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_outside import Model, V, entry, flat, label_smoother
from torch import Tensor
from torch._dynamo.utils import counters

import cce_inductor
from cce_inductor import compat, config
from cce_inductor.deferred import often


def ours() -> dict[str, int]:
    return counters["cce_inductor"]


def with_z_loss(z: Tensor, t: Tensor) -> Tensor:
    """As TRL's `selective_log_softmax`, and a statistic of its own."""
    return (z.logsumexp(-1) - entry(z, t)).mean() + 1e-2 * z.logsumexp(-1).square().mean()


def with_entropy(z: Tensor, t: Tensor) -> Tensor:
    log_p = z.log_softmax(-1)
    return flat(log_p, t) + 0.1 * (log_p.exp() * log_p).sum(-1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": flat,
    "none": lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten(), reduction="none").square().mean(),
    "label smoother": label_smoother,
    "z-loss": with_z_loss,
    "entropy": with_entropy,
}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is large enough."""
    monkeypatch.setattr(often, "LEAST", 0)
    torch._dynamo.reset()
    ours().clear()


class AsItIs:
    """In the place of Inductor: what it is given runs as it is. fails: but for operators of ours."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        if self.fails and any("statistics" in str(node.target) for node in gm.graph.nodes):
            raise RuntimeError("no compiler here")
        return gm.forward

    def reset(self) -> None:
        pass


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "inductor_wrapper", lambda mode, options: AsItIs())


def deferring_head(model: Model) -> Callable[[Tensor], Tensor]:
    """The model in eager mode, with a head that gives pending logits."""
    with_head = copy.copy(model)
    with_head._modules = {**model._modules, "head": copy.copy(model.head)}
    cce_inductor.defer_head(with_head.head)

    def call(x: Tensor) -> Tensor:
        with config.patch(min_vocab=0):
            return with_head(x)

    return call


def step(model: Any, call: Any, loss: Callable, b: int = 2, s: int = 12) -> list[Tensor]:
    x, t = torch.randn(b, s, 16), torch.randint(0, V, (b, s))
    made = loss(call(x), t)
    return [made.detach(), *torch.autograd.grad(made, [p for p in model.parameters() if p is not model.temperature])]


def assert_step(model: Any, compiled: Any, loss: Callable, seed: int, **sizes: int) -> None:
    torch.manual_seed(seed)
    ours = step(model, compiled, loss, **sizes)
    torch.manual_seed(seed)
    for got, want in zip(ours, step(model, model, loss, **sizes), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_third_call_of_a_kind_is_compiled(loss, large, uncompiled):
    model = Model()
    compiled = torch.compile(model, backend="cce", options={"min_vocab": 0})
    made = []
    for seed in range(5):
        assert_step(model, compiled, loss, seed)
        made.append(ours()["calls_compiled"])
    assert made[:2] == [0, 0] and made[2] >= 1 and made[2:] == [made[2]] * 3
    assert ours()["deferred_materialized"] == 0


def test_other_shapes_are_compiled_apart_and_not_without_end(large, uncompiled, monkeypatch):
    monkeypatch.setattr(often, "KINDS", 2)
    model = Model()
    compiled = torch.compile(model, backend="cce", options={"min_vocab": 0}, dynamic=True)
    for length in (3, 4, 5):
        for seed in range(4):
            assert_step(model, compiled, flat, seed, s=length)
    assert ours()["calls_compiled"] == 2


def test_rows_that_vary_are_compiled_once_for_any_number(large, uncompiled):
    model = Model()
    compiled = torch.compile(model, backend="cce", options={"min_vocab": 0}, dynamic=True)
    made = []
    for length in (3, 4, 5, 6, 7, 5, 9, 11):
        assert_step(model, compiled, flat, length, s=length)
        made.append(ours()["calls_compiled"])
    assert made[:2] == [0, 0] and made[2] == 1 and made == [*made[:2], *[1] * 6]
    assert ours()["deferred_materialized"] == 0


@pytest.mark.slow
def test_kernels_for_any_number_of_rows(large):
    """With Inductor, behind a head that runs eagerly."""
    model = Model()
    for length in (3, 4, 5, 6, 11, 12, 3):
        assert_step(model, deferring_head(model), flat, length, s=length)
    assert ours()["calls_compiled"] == 1 and ours()["deferred_materialized"] == 0


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_small_calls_and_other_compilers_stay_as_they_are(compiler, uncompiled, monkeypatch):
    torch._dynamo.reset()
    ours().clear()
    if compiler == "aot_eager":
        monkeypatch.setattr(often, "LEAST", 0)
    model = Model()
    compiled = torch.compile(model, backend="cce", options={"min_vocab": 0, "compiler": compiler})
    for seed in range(4):
        assert_step(model, compiled, flat, seed)
    assert ours()["calls_compiled"] == 0 and ours()["fused"] == 1


def test_a_compilation_that_fails_costs_no_step(large, monkeypatch, caplog):
    monkeypatch.setattr(compat, "inductor_wrapper", lambda mode, options: AsItIs(fails=True))
    model = Model()
    compiled = torch.compile(model, backend="cce", options={"min_vocab": 0})
    for seed in range(5):
        assert_step(model, compiled, flat, seed)
    assert ours()["calls_compiled"] == 0
    # Once for the loss, and once for the operator in it.
    assert sum("goes on without" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize("loss", [flat, pytest.param(with_z_loss, marks=pytest.mark.slow)])
def test_kernels(loss, large):
    """With Inductor; `flat` forms its gradients in its forward."""
    model = Model()
    compiled = torch.compile(model, backend="cce", options={"min_vocab": 0})
    for seed in range(4):
        assert_step(model, compiled, loss, seed)
    assert ours()["calls_compiled"] == 1 and ours()["deferred_materialized"] == 0


def test_the_calls_see_the_modes_of_their_time(large, uncompiled):
    """What was compiled with gradients is not run without."""
    model, t = Model(), torch.randint(0, V, (2, 12))
    compiled = torch.compile(model, backend="cce", options={"min_vocab": 0})
    for seed in range(4):
        assert_step(model, compiled, flat, seed)
    z = compiled(torch.randn(2, 12, 16))
    with torch.no_grad():
        assert not flat(z, t).requires_grad
    assert flat(z, t).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        z = compiled(torch.randn(2, 12, 16))
        assert flat(z, t).isfinite()
