"""Heads that run eagerly give pending logits: by `defer_head`, and by the knob `eager_heads`."""

from __future__ import annotations

import copy
import gc
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from test_outside import centred, entry, flat, label_smoother, label_smoothing
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import cce_inductor
from cce_inductor import backend, config, eager_heads
from cce_inductor.deferred import DeferredLogits
from cce_inductor.trace import heads

B, S, D, V = 2, 12, 16, 4096


class Model(nn.Module):
    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Linear(D, D), head or nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.trunk(x)))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, S, D, generator=generator), torch.randint(V, (B, S), generator=generator)


def ours() -> dict[str, int]:
    return counters["cce_inductor"]


def deferring(model: Any = None) -> Any:
    model = Model() if model is None else model
    cce_inductor.defer_head(model.head)
    return model


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    ours().clear()
    with config.patch(compiler="aot_eager"):
        yield


@pytest.fixture
def enabled() -> Iterator[None]:
    cce_inductor.enable()
    with config.patch(eager_heads=True):
        yield
    cce_inductor.disable()


def same_as_eager(model: Any, loss: Callable[[Tensor, Tensor], Tensor], reads: int = 0) -> None:
    """Whether a loss and all gradients are those of eager's, in float64, and how often the logits were read."""
    plain, (x, t) = copy.deepcopy(model), data()
    vars(plain.head).pop("forward", None)
    assert type(plain(x)) is Tensor
    parameters = list(model.parameters())
    z = model(x)
    assert type(z) is DeferredLogits
    value = loss(z, t)
    got = torch.autograd.grad(value, parameters)
    expected_value = loss(plain.double()(x.double()), t)
    expected = torch.autograd.grad(expected_value, list(plain.parameters()))
    torch.testing.assert_close(value.double(), expected_value.double(), rtol=1e-5, atol=1e-6)
    for g, e in zip(got, expected, strict=True):
        assert float((g - e).abs().max()) <= 1e-5 * float(e.abs().max())
    assert ours().get("deferred_materialized", 0) == reads


def hooked(hook: Callable[[Tensor], Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(z: Tensor, t: Tensor) -> Tensor:
        z.register_hook(hook)
        return flat(z, t)

    return loss


def hooked_behind_views(z: Tensor, t: Tensor) -> Tensor:
    y = z.float()[:, :-1].reshape(-1, V)
    y.register_hook(lambda g: g)
    z.register_hook(lambda g: None)
    return F.cross_entropy(y / 2.0, t[:, 1:].flatten()) + 1e-3 * y.logsumexp(-1).square().mean()


def hooked_softcap(z: Tensor, t: Tensor) -> Tensor:
    y = 3.0 * torch.tanh(z / 3.0)
    y.register_hook(lambda g: None)
    return flat(y, t)


def in_pieces(z: Tensor, t: Tensor) -> Tensor:
    pieces = zip(z.flatten(0, 1).split(5), t.flatten().split(5), strict=True)
    return torch.cat([F.cross_entropy(a, b, reduction="none") for a, b in pieces]).mean()


def written_out(z: Tensor, t: Tensor) -> Tensor:
    z.register_hook(lambda g: None)
    return -entry(z - z.logsumexp(-1, keepdim=True), t).mean()


FUSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": flat,
    "z-loss beside": lambda z, t: flat(z, t) + 1e-3 * z.logsumexp(-1).square().mean(),
    "label smoother": label_smoother,
    "label smoothing": label_smoothing,
    "centred": centred,
    "in pieces": in_pieces,
    "gather": lambda z, t: (z.logsumexp(-1) - entry(z, t)).mean(),
    "a hook": hooked(lambda g: None),
    "a hook that gives back what it got": hooked(lambda g: g),
    "hooks behind views": hooked_behind_views,
    "a hook behind a softcap": hooked_softcap,
    "a hook, and a loss written out": written_out,
}
# What computes the gradient of the logits, or the logits: right, and at plain's cost.
READ: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a hook that changes it": hooked(lambda g: 2.0 * g),
    "a hook that looks at it": hooked(lambda g: None if g.norm() > 0 else g * 0.0),
    "a dense reader beside": lambda z, t: hooked(lambda g: g)(z, t) + 1e-2 * z.square().mean(),
    "a hook that changes one of two": lambda z, t: (
        hooked(lambda g: 2.0 * g)(z.flatten(0, 1).view_as(z), t) + flat(z, t)
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_fuses(name: str) -> None:
    same_as_eager(deferring(), FUSED[name])


@pytest.mark.parametrize("name", READ)
def test_reads(name: str) -> None:
    same_as_eager(deferring(), READ[name], reads=1)


@pytest.mark.parametrize("name", [*FUSED, *READ])
def test_hooks_on_what_a_compiled_head_gives(name: str) -> None:
    model = Model()
    x, t = data()
    plain = torch.autograd.grad(FUSED.get(name, READ.get(name))(model(x), t), list(model.parameters()))  # type: ignore[misc]
    compiled = torch.compile(model, backend="cce")
    z = compiled(x)
    assert type(z) is DeferredLogits
    got = torch.autograd.grad((FUSED | READ)[name](z, t), list(model.parameters()))
    for g, e in zip(got, plain, strict=True):
        assert float((g - e).abs().max()) <= 2e-5 * float(e.abs().max())
    assert (ours().get("deferred_materialized", 0) == 0) == (name in FUSED)


@pytest.mark.parametrize("hook", [lambda g: None, lambda g: g, lambda g: 2.0 * g])
@pytest.mark.parametrize("gain", [False, True])
def test_a_compiled_loss_behind_hooks(hook: Callable, gain: bool) -> None:
    """gain: a parameter of the loss, whose gradient comes from the same graph."""
    scale = torch.ones((), requires_grad=True)

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return flat(z, t) * scale if gain else flat(z.float(), t)

    model, (x, t) = Model(), data()

    def gradients(model: Any, loss: Any) -> tuple[Tensor, ...]:
        z = model(x)
        z.register_hook(hook)
        return torch.autograd.grad(loss(z, t), [*model.parameters(), *([scale] if gain else [])])

    expected = gradients(model, loss)
    got = gradients(deferring(model), torch.compile(loss, backend="cce"))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)
    assert ours()["fused"] == 1 and bool(ours()["deferred_materialized"]) == (hook(1.0) == 2.0)


def test_hooks_run_once_with_the_whole_gradient_and_before_the_head() -> None:
    seen: list[Any] = []
    model, (x, t) = deferring(), data()
    model.head.weight.register_hook(lambda g: seen.append("weight"))
    z = model(x)
    z.register_hook(lambda g: seen.append(g + 0.0))
    (flat(z, t) + z.logsumexp(-1).mean()).backward()
    assert [type(s) for s in seen] == [Tensor, str]
    plain = Model()
    y = plain(x).detach().requires_grad_()
    (flat(y, t) + y.logsumexp(-1).mean()).backward()
    torch.testing.assert_close(seen[0], y.grad)


def test_the_gradient_of_the_logits_can_be_asked_for() -> None:
    model, (x, t) = deferring(), data()
    z = model(x)
    got = torch.autograd.grad(flat(z, t), z)[0]
    assert "not computed yet" in repr(got) and not z.is_materialized
    y = Model()(x).detach().requires_grad_()
    torch.testing.assert_close(got + 0.0, torch.autograd.grad(flat(y, t), y)[0])
    z = model(x)
    z.retain_grad()
    flat(z, t).backward()
    torch.testing.assert_close(z.grad + 0.0, torch.autograd.grad(flat(y, t), y)[0])


def test_a_second_derivative() -> None:
    x, t = data()

    def penalty(model: Any) -> tuple[Tensor, ...]:
        parameters = list(model.parameters())
        grads = torch.autograd.grad(flat(model(x), t), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), parameters)

    for g, e in zip(penalty(deferring()), penalty(Model()), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


def test_two_backwards_through_one_graph() -> None:
    model, (x, t) = deferring(), data()
    loss = flat(model(x), t)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


def test_a_loss_that_is_kept_keeps_nothing_else() -> None:
    model, (x, t) = deferring(), data()
    hidden = torch.tanh(model.trunk(x))
    seen = StorageWeakRef(hidden.untyped_storage())
    z = model.head(hidden)
    loss = flat(z, t)
    loss.backward()
    del hidden, z
    gc.collect()
    assert seen.expired()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_a_checkpoint_around_the_head_and_its_loss() -> None:
    """What is compiled or formed for the first call is no part of what the checkpoint saves and compares."""
    model, (x, t) = deferring(), data()
    plain = Model()
    for step in range(3):
        value = checkpoint(lambda x, step=step: flat(model(x) / (1 + step), t), x, use_reentrant=False)
        want = flat(plain(x) / (1 + step), t)
        torch.testing.assert_close(value, want)
        (got,), (expected,) = (torch.autograd.grad(v, m.head.weight) for v, m in ((value, model), (want, plain)))
        torch.testing.assert_close(got, expected)


def test_a_checkpoint_around_the_head() -> None:
    model, (x, t) = deferring(), data()
    flat(checkpoint(model, x, use_reentrant=False), t).backward()
    plain = Model()
    flat(plain(x), t).backward()
    for p, e in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, e.grad)
    assert not ours()["deferred_materialized"]


@pytest.mark.parametrize("biased", [False, True])
def test_autocast(biased: bool) -> None:
    x, t = data()
    model = deferring(Model(nn.Linear(D, V, bias=biased)))
    with torch.autocast("cpu", torch.bfloat16):
        z = model(x)
        loss = flat(z, t)
    assert type(z) is DeferredLogits and z.dtype == torch.bfloat16
    loss.backward()
    plain = Model(nn.Linear(D, V, bias=biased))
    plain.load_state_dict(model.state_dict())
    expected = flat(plain(x), t)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    for p, e in zip(model.parameters(), plain.parameters(), strict=True):
        assert float((p.grad - e.grad).abs().max()) <= 2e-2 * float(e.grad.abs().max())


def test_what_a_module_is_stays_as_it_is() -> None:
    model = Model()
    weight, keys, kind = model.head.weight, list(model.state_dict()), type(model.head)
    assert cce_inductor.defer_head(model.head) is model.head
    forward = model.head.forward
    assert cce_inductor.defer_head(model.head).forward is forward
    assert (model.head.weight is weight, list(model.state_dict()), type(model.head)) == (True, keys, kind)
    with pytest.raises(TypeError, match="takes a torch.nn.Module"):
        cce_inductor.defer_head(model.head.weight)  # type: ignore[type-var]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_defer_their_own(how: str) -> None:
    model = deferring()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert other.head.forward.module is other.head
    with torch.no_grad():
        other.head.weight.mul_(3.0)
    x, _ = data()
    z = other(x)
    assert type(z) is DeferredLogits
    torch.testing.assert_close(z + 0.0, F.linear(torch.tanh(other.trunk(x)), other.head.weight, other.head.bias))


def test_plain_logits_where_nothing_is_trained() -> None:
    model, (x, _) = deferring(), data()
    with torch.no_grad():
        assert type(model(x)) is Tensor
    with torch.inference_mode():
        assert type(model(x)) is Tensor
    with torch.autograd.forward_ad.dual_level():
        assert type(model(x)) is Tensor
    assert type(torch.vmap(model)(x)) is Tensor
    assert type(torch.jit.trace(model, x)(x)) is Tensor
    assert type(torch.jit.script(model)(x)) is Tensor
    with config.patch(min_vocab=V + 1):
        assert type(model(x)) is Tensor
    with config.patch(defer_logits=False):
        assert type(model(x)) is Tensor
    model.requires_grad_(False)
    assert type(model(x)) is Tensor
    assert type(model.requires_grad_(True).eval()(x)) is Tensor


def test_a_teacher_and_a_student_without_any_graph() -> None:
    student, teacher, x = deferring(), deferring(Model(nn.Linear(D, V, bias=False))).eval(), data()[0]

    def loss(student: Any, teacher: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            r = teacher(x) / 2.0
        return F.kl_div((student(x) / 2.0).log_softmax(-1), r.log_softmax(-1), reduction="batchmean", log_target=True)

    with patch.object(heads, "LARGE_LOGITS", 1 << 20):
        x = x.repeat(2 * 2**20 // (B * S * V * 4) * B + B, 1, 1)
        with torch.no_grad():
            assert type(teacher(x)) is DeferredLogits and type(teacher(x[:1, :1])) is Tensor
        got = torch.autograd.grad(loss(student, teacher, x), list(student.parameters()))
    assert not ours()["deferred_materialized"] and ours()["fused"] == 1
    plain = Model(), Model(nn.Linear(D, V, bias=False))
    plain[1].load_state_dict(teacher.state_dict())
    for g, e in zip(got, torch.autograd.grad(loss(*plain, x), list(plain[0].parameters())), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


def test_export_and_functional_calls() -> None:
    model, (x, t) = deferring(), data()
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), Model()(x))

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return flat(torch.func.functional_call(model, weights, (x,)), t)

    got = torch.func.grad(loss)({k: v.detach() for k, v in model.named_parameters()})
    flat(Model()(x), t)
    plain = Model()
    flat(plain(x), t).backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(got[name], p.grad)


def test_inside_a_compiled_model_it_is_no_more_than_a_linear() -> None:
    model, (x, t) = deferring(), data()
    torch.compile(lambda x, t: flat(model(x), t), backend="cce", fullgraph=True)(x, t).backward()
    assert ours() == {"fused": 1, "declined": 0, "deferred": 0}


@pytest.mark.parametrize("name", ["cross_entropy", "label smoother", "a hook", "hooks behind views", "z-loss beside"])
def test_no_tensor_of_logits_is_allocated(name: str) -> None:
    model, rows = deferring(), 512
    x, t = torch.randn(2, rows // 2, D), torch.randint(V, (2, rows // 2))
    with config.patch(workspace_mb=1):
        for _ in range(2):  # the first one makes the graph of the call
            with Allocations() as seen:
                FUSED[name](model(x), t).backward()
    assert seen.largest <= 2**20 + 4 * rows * D < rows * V * 4 / 2 and not ours()["deferred_materialized"]


def test_chunks_of_hidden_states_in_the_head() -> None:
    """As torchtune's chunked loss has it."""
    model, (x, t) = Model(), data()

    def loss(model: Any) -> Tensor:
        chunks = [model(h) for h in x.chunk(4, dim=1)]
        parts = zip(chunks, t.chunk(4, dim=1), strict=True)
        return (
            sum(F.cross_entropy(z.reshape(-1, V).float(), y.reshape(-1), reduction="sum") for z, y in parts) / t.numel()
        )

    expected = torch.autograd.grad(loss(model), list(model.parameters()))
    for g, e in zip(torch.autograd.grad(loss(deferring(model)), list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)
    assert not ours()["deferred_materialized"] and ours()["fused"] == 1


class Looped(Model):
    """Dynamo does not break a graph inside a loop: it leaves the whole function to Python, head and loss too."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        for _ in range(2):
            x = torch.tanh(self.trunk(x))
            torch._dynamo.graph_break()
        return flat(self.head(x), t)


@pytest.mark.parametrize("plain", [False, True])
def test_a_function_that_dynamo_leaves_to_python(plain: bool) -> None:
    """plain: with another backend, or none, the same head gives plain logits."""
    model, (x, t) = Looped(), data()
    expected = torch.autograd.grad(model(x, t), list(model.parameters()))
    run = torch.compile(model, backend="aot_eager") if plain else torch.compile(model, backend="cce")
    for g, e in zip(torch.autograd.grad(run(x, t), list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)
    assert ours().get("fused", 0) == (not plain) and not ours()["deferred_materialized"]
    assert type(model.head(x)) is Tensor


class Scaled(nn.Module):
    """As adapters are: a module that is no `nn.Linear`, around one."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(D, V), nn.Linear(D, 2, bias=False), nn.Linear(2, V, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


def test_a_head_that_is_no_linear() -> None:
    same_as_eager(deferring(Model(Scaled())), flat)


def test_every_linear_head_by_the_knob(enabled: None) -> None:
    same_as_eager_of = Model()
    x, t = data()
    z = same_as_eager_of(x)
    assert type(z) is DeferredLogits and type(same_as_eager_of.trunk(x)) is Tensor
    flat(z, t).backward()
    assert not ours()["deferred_materialized"] and ours()["fused"] == 1


def test_adapters_around_eager_heads(enabled: None) -> None:
    model, (x, t) = Model(Scaled()), data()
    got = torch.autograd.grad(flat(model(x), t), list(model.parameters()))
    assert not ours()["deferred_materialized"]
    cce_inductor.disable()
    expected = torch.autograd.grad(flat(model(x), t), list(model.parameters()))
    for g, e in zip(got, expected, strict=True):
        assert float((g - e).abs().max()) <= 1e-5 * float(e.abs().max())


def test_what_is_patched_is_given_back() -> None:
    cce_inductor.enable()
    assert nn.Linear.forward is not eager_heads._linear_forward
    torch.jit.script(nn.Linear(2, 3))
    torch.fx.symbolic_trace(Model())
    cce_inductor.disable()
    assert nn.Linear.forward is eager_heads._linear_forward


def test_a_head_out_of_reach_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    cce_inductor.enable()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert type(Model()(data()[0])) is Tensor
        with config.patch(strict=True), pytest.raises(backend.DeclinedError, match="runs outside of every graph"):
            Model()(data()[0])
    finally:
        cce_inductor.disable()
    (line,) = [r for r in caplog.records if r.name.startswith("cce_inductor")]
    assert "CCE_INDUCTOR_EAGER_HEADS=1" in line.getMessage() and "out_features=4096" in line.getMessage()
    assert "test_eager_heads.py:" in line.getMessage()


def test_explain_sees_a_head_that_runs_outside() -> None:
    model, (x, t) = Model(), data()

    @torch.compiler.disable
    def skipped() -> Tensor:
        return flat(model(x), t)

    (site,) = cce_inductor.explain(lambda: skipped() + 1.0).sites
    assert not site.fused and "CCE_INDUCTOR_EAGER_HEADS=1" in str(site) and "test_eager_heads.py:" in site.location


# ------------------------------------------------------------------------------------------------ what a run is told


def told(run: Callable[[], None], caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What is logged for a run under ``enable()``."""
    cce_inductor.enable()
    try:
        with caplog.at_level(logging.INFO, "cce_inductor.run"):
            run()
    finally:
        cce_inductor.disable()
    return [r for r in caplog.records if r.name == "cce_inductor.run"]


def trained(model: Any, loss: Callable[[Tensor, Tensor], Tensor], steps: int = 5) -> Callable[[], None]:
    def run() -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, t = data()
        compiled = torch.compile(model)
        for _ in range(steps):
            loss(compiled(x), t).backward()
            optimizer.step()

    return run


def test_a_run_is_told_once_that_its_losses_fused(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = told(trained(Model(), flat), caplog)
    assert line.levelno == logging.INFO
    size = B * S * V * 4 / 2**20
    assert f"after 3 steps: 1 loss over a vocabulary fused ({size:,.0f} MiB of logits not written)" in line.getMessage()
    assert "1 logits deferred, 0 times read, 0 declined" in line.getMessage()


def test_a_run_is_warned_where_nothing_fused(caplog: pytest.LogCaptureFixture) -> None:
    def run() -> None:
        x, t = data()
        weight = torch.zeros(V, D, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(4):
            flat(F.linear(x, weight), t).backward()
            optimizer.step()

    (line,) = told(run, caplog)
    assert line.levelno == logging.WARNING and "0 losses over a vocabulary fused" in line.getMessage()
    assert "torch.compile has captured nothing" in line.getMessage() and "cce_inductor explain" in line.getMessage()


def test_a_line_that_reads_logits_again_and_again_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    def loss(z: Tensor, t: Tensor) -> Tensor:
        z.std().item()
        return flat(z, t)

    lines = [line.getMessage() for line in told(trained(Model(), loss), caplog)]
    (named,) = [text for text in lines if "need" in text]
    assert "test_eager_heads.py:" in named
    assert "3 times read" in lines[-1]
