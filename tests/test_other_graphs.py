"""A loss that is not in the graph of its head: called eagerly, compiled on its own, or behind a graph break.

Every test runs a model and a loss twice, with eager PyTorch and with the model compiled by our backend, and compares
the loss and all gradients. ``Counted`` says how many losses were fused and how often logits were really computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture import FUSE_ALL
from torch import Tensor, nn
from torch._dynamo.utils import counters

import cce_inductor
from cce_inductor.deferred import DeferredLogits, DeferredLogitsError

B, S, D, V = 2, 6, 8, 40


class Model(nn.Module):
    """Hidden states, a head, and what some models put behind it."""

    def __init__(self, behind: Callable[[Tensor], Any] = lambda z: z, bias: bool = False, dtype: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(D, D, dtype=dtype)
        self.head = nn.Linear(D, V, bias=bias, dtype=dtype)
        self.behind = behind

    def forward(self, x: Tensor) -> Any:
        return self.behind(self.head(torch.tanh(self.trunk(x))))


class Transposed(Model):
    """A head with its weight stored (D, V)."""

    def forward(self, x: Tensor) -> Any:
        return torch.tanh(self.trunk(x)) @ self.head.weight.reshape(D, V) + torch.arange(V) / V


class Adapted(Model):
    """A head with a LoRA adapter."""

    def __init__(self) -> None:
        super().__init__(bias=True)
        self.down, self.up = nn.Linear(D, 1, bias=False), nn.Linear(1, V, bias=False)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.trunk(x))
        return (self.head(h) + self.up(self.down(h)) * 0.5).float()


class Counted:
    """``with Counted() as c: ...; c.fused, c.reads, c.deferred``: what the counters went up by."""

    def __enter__(self) -> Counted:
        self.start = dict(counters["cce_inductor"])
        return self

    def __exit__(self, *_: Any) -> None:
        self.fused, self.reads, self.deferred, self.declined = (
            counters["cce_inductor"][name] - self.start.get(name, 0)
            for name in ("fused", "deferred_materialized", "deferred", "declined")
        )


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def data(rows: tuple[int, ...] = (B, S), dtype: Any = None) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    x, t = torch.randn(*rows, D, generator=gen).to(dtype), torch.randint(0, V, rows, generator=gen)
    t.view(-1)[1] = -100
    return x, t


def compiled(fn: Any, **options: Any) -> Any:
    return torch.compile(fn, backend=cce_inductor.cce_backend, options={**FUSE_ALL, **options})


def trained(model: Any, loss: Callable[[Any, Tensor], Tensor], *inputs: Tensor) -> list[Tensor]:
    """The loss and the gradients of the parameters."""
    params = list(model.parameters())
    value = loss(model(inputs[0]), inputs[1])
    assert value.requires_grad
    return [value.detach(), *torch.autograd.grad(value, params, torch.ones_like(value), allow_unused=True)]


def same(got: list[Any], expected: list[Any], tolerance: float = 1e-5) -> None:
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        if e is not None:
            assert (g.shape, g.dtype) == (e.shape, e.dtype)
            # Gradients that cancel out exactly, such as those of a key's bias, come out as rounding noise.
            torch.testing.assert_close(g, e, rtol=tolerance, atol=max(1e-9, tolerance * float(e.abs().max())))


# ------------------------------------------------------------------------------------------------------- the losses

WEIGHT = torch.rand(V, generator=torch.Generator().manual_seed(2)) + 0.5

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "view": lambda z, t: F.cross_entropy(z.view(-1, V), t.view(-1)),
    "flatten": lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten(0, 1)),
    "upcast": lambda z, t: F.cross_entropy(z.float().view(-1, V), t.view(-1)),
    "shifted": lambda z, t: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, V), t[..., 1:].reshape(-1)),
    "transposed": lambda z, t: F.cross_entropy(z.transpose(1, 2), t),
    "mT": lambda z, t: F.cross_entropy(z.mT, t),
    "permuted": lambda z, t: F.cross_entropy(z.permute(0, 2, 1), t),
    "one_row": lambda z, t: F.cross_entropy(z[0, 2], t[0, 2]),
    "unsqueezed": lambda z, t: F.cross_entropy(z[None].squeeze(0).mT, t),
    "module": lambda z, t: nn.CrossEntropyLoss()(z.view(-1, V), t.view(-1)),
    "keywords": lambda z, t: F.cross_entropy(target=t.view(-1).clamp(0), input=z.view(-1, V), ignore_index=0),
    "class_weight": lambda z, t: F.cross_entropy(z.view(-1, V), t.view(-1), WEIGHT.to(z.dtype)),
    "smoothed": lambda z, t: F.cross_entropy(z.view(-1, V), t.view(-1), label_smoothing=0.1),
    "smoothed_weight": lambda z, t: F.cross_entropy(z.mT, t, WEIGHT.to(z.dtype), label_smoothing=0.1, reduction="sum"),
    "none": lambda z, t: F.cross_entropy(z.mT, t, reduction="none"),
    "sum": lambda z, t: F.cross_entropy(z.mT, t, reduction="sum") / t.ne(-100).sum(),
    "nll": lambda z, t: F.nll_loss(F.log_softmax(z.view(-1, V), -1), t.view(-1)),
    "nll_dim1": lambda z, t: F.nll_loss(z.mT.log_softmax(1), t, reduction="sum"),
    "nll_module": lambda z, t: nn.NLLLoss()(nn.LogSoftmax(dim=-1)(z.view(-1, V)), t.view(-1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LOSSES)
def test_an_eager_loss_on_pending_logits_is_fused(name: str, dtype: torch.dtype) -> None:
    model, (x, t) = Model(dtype=dtype), data(dtype=dtype)
    expected = trained(model, LOSSES[name], x, t)
    with Counted() as c:
        lazy = compiled(model)
        for _ in range(2):
            # bf16: eager rounds the logits, we only the results.
            same(trained(lazy, LOSSES[name], x, t), expected, 1e-5 if dtype == torch.float32 else 3e-2)
    assert (c.fused, c.reads, c.deferred, c.declined) == (1, 0, 1, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_compiled_apart_from_its_model_is_fused(name: str) -> None:
    model, (x, t) = Model(), data()
    expected = trained(model, LOSSES[name], x, t)
    with Counted() as c:
        lazy = compiled(model)
        loss = torch.compile(
            LOSSES[name], backend=cce_inductor.cce_backend, options={**FUSE_ALL, "strict": True}, fullgraph=True
        )
        for _ in range(2):
            same(trained(lazy, loss, x, t), expected)
    assert (c.fused, c.reads, c.deferred, c.declined) == (1, 0, 1, 0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["view", "shifted", "nll"])
def test_a_loss_compiled_by_another_backend_is_right(name: str, backend: str) -> None:
    model, (x, t) = Model(), data()
    expected = trained(model, LOSSES[name], x, t)
    lazy, loss = compiled(model), torch.compile(LOSSES[name], backend=backend, fullgraph=True)
    for _ in range(2):
        same(trained(lazy, loss, x, t), expected)


MODELS: dict[str, Callable[[], Model]] = {
    "bias": lambda: Model(bias=True),
    "scaled": lambda: Model(lambda z: z / 8.0),
    "capped": lambda: Model(lambda z: 5 * torch.tanh(z / 5)),
    "capped by rsqrt": lambda: Model(lambda z: 5 * z * torch.rsqrt(z.square() + 25)),
    "upcast": lambda: Model(lambda z: z.float()),
    "prior": lambda: Model(lambda z: z + WEIGHT.log()),
    "class_first": lambda: Model(lambda z: z.permute(2, 0, 1)),
    "rows_cut": lambda: Model(lambda z: z[:, 1:].reshape(-1, V)),
    "transposed": Transposed,
    "adapted": Adapted,
    "adapted, frozen": lambda: _frozen(Adapted(), "head"),
    "in_a_dict": lambda: Model(lambda z: {"logits": z, "more": [z.shape[0]]}),
    "twice": lambda: Model(lambda z: (z, z.float())),
    "frozen_trunk": lambda: _frozen(Model(), "trunk"),
    "frozen_head": lambda: _frozen(Model(bias=True), "head"),
}


def _frozen(model: Model, name: str) -> Model:
    getattr(model, name).requires_grad_(False)
    return model


def any_loss(out: Any, t: Tensor) -> Tensor:
    """Cross-entropy of whatever the models above return."""
    z = out["logits"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
    if z.shape[0] == V:
        return F.cross_entropy(z.flatten(1).t(), t.flatten())
    if z.dim() == 2:
        return F.cross_entropy(z, t[:, 1:].flatten())
    return F.cross_entropy(z.flatten(0, 1), t.flatten())


@pytest.mark.parametrize("where", ["eager", "compiled"])
@pytest.mark.parametrize("name", MODELS)
def test_whatever_the_head_is_followed_by(name: str, where: str) -> None:
    model, (x, t) = MODELS[name](), data()
    params = [p for p in model.parameters() if p.requires_grad]

    def run(model: Any, loss: Any) -> list[Tensor]:
        value = loss(model(x), t)
        return [value.detach(), *torch.autograd.grad(value, params, allow_unused=True)]

    with Counted() as c:
        loss = any_loss if where == "eager" else compiled(any_loss)
        same(run(compiled(model), loss), run(model, any_loss))
    assert (c.fused, c.reads) == (1, 0)


# -------------------------------------------------------------------------------------------------- graph breaks


def broken(model: Model) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def step(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        torch._dynamo.graph_break()
        logits = logits.float()
        return F.cross_entropy(logits.view(-1, V), t.view(-1)), logits

    return step


def test_a_graph_break_between_head_and_loss() -> None:
    model, (x, t) = Model(), data()
    params = list(model.parameters())
    with Counted() as c:
        results = []
        for step in (compiled(broken(model)), broken(model)):
            for _ in range(2):
                loss, logits = step(x, t)
                results.append([loss, *torch.autograd.grad(loss + logits.square().mean(), params), logits])
        for got in results[:2]:
            assert isinstance(got[-1], DeferredLogits)
            same(got, results[2])
    assert (c.fused, c.deferred, c.reads) == (1, 1, 2)  # read by the test, once per step


def test_graph_breaks_all_the_way() -> None:
    model, (x, t) = Model(), data()

    def step(x: Tensor) -> Tensor:
        z = model(x)
        for op in (lambda z: z.float(), lambda z: z[:, :-1], lambda z: z.reshape(-1, V)):
            torch._dynamo.graph_break()
            z = op(z)
        torch._dynamo.graph_break()
        return F.cross_entropy(z, t[:, 1:].reshape(-1))

    with Counted() as c:
        got = torch.autograd.grad(compiled(step)(x), list(model.parameters()))
        same(list(got), list(torch.autograd.grad(step(x), list(model.parameters()))))
    assert (c.fused, c.reads) == (1, 0)


@pytest.mark.parametrize("family", ["GPT2LMHeadModel", pytest.param("BertLMHeadModel", marks=pytest.mark.slow)])
def test_models_that_warn_between_head_and_loss(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their graph breaks at a logged warning; the backend cures that by itself, so it is told not to here."""
    transformers = pytest.importorskip("transformers")
    config_class, sizes = {
        "GPT2LMHeadModel": (transformers.GPT2Config, {"n_embd": 16, "n_head": 2, "n_layer": 1}),
        "BertLMHeadModel": (
            transformers.BertConfig,
            {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16},
        ),
    }[family]
    extra = {"is_decoder": True} if family == "BertLMHeadModel" else {}
    config = config_class(vocab_size=211, **sizes, **extra)
    torch.manual_seed(0)
    model = getattr(transformers, family)(config).eval()
    ids = torch.randint(0, 211, (2, 7))
    monkeypatch.setattr(cce_inductor.compat, "transformers_warning_once", lambda: None)
    known = torch._dynamo.config.ignore_logging_functions
    before = set(known)
    known.clear()

    def step(model: Any) -> list[Any]:
        model.zero_grad()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        return [out.loss.detach(), *(p.grad for p in model.parameters())]

    expected = [None if t is None else t.clone() for t in step(model)]
    with Counted() as c:
        lazy = compiled(model)
        for _ in range(2):
            same([None if t is None else t.clone() for t in step(lazy)], expected, 1e-4)
    known.update(before)
    assert (c.fused, c.reads) == (1, 0) and c.deferred >= 1


# ---------------------------------------------------------------------------------------- what may not be fused


NOT_FUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "arithmetic": lambda z, t: F.cross_entropy((z * 2).mT, t),
    "class_dim": lambda z, t: F.cross_entropy(z, t[:, 0].new_zeros(B, V)),
    "probabilities": lambda z, t: F.cross_entropy(z.view(-1, V), F.one_hot(t.view(-1).clamp(0), V).float()),
    "vocabulary_cut": lambda z, t: F.cross_entropy(z[..., : V - 1].mT, t.clamp(max=V - 2)),
    "classes_regrouped": lambda z, t: F.cross_entropy(z.view(-1, V // 2), torch.cat([t.view(-1)] * 2).clamp(max=9)),
    "log_softmax_twice": lambda z, t: F.nll_loss(z.log_softmax(-1).log_softmax(-1).mT, t),
    "softmax_of_log_softmax": lambda z, t: F.cross_entropy(z.mT.log_softmax(1), t),
    "log_softmax_of_rows": lambda z, t: F.nll_loss(z.log_softmax(1).mT, t),
    "nll_of_logits": lambda z, t: F.nll_loss(z.mT, t),
    "deprecated": lambda z, t: F.cross_entropy(z.mT, t, size_average=True),
    "float64": lambda z, t: F.cross_entropy(z.double().mT, t),
    "logits_as_weight": lambda z, t: (
        F.cross_entropy(torch.ones(3, V), t[0, 3:], weight=z[0, 0].detach().exp()) + z.sum()
    ),
    "soft_target_of_logits": lambda z, t: F.cross_entropy(z.mT, z.mT.softmax(1)),
    "twice": lambda z, t: F.cross_entropy(z.mT, t) + F.nll_loss(z.mT.softmax(1), t),
    "leaf": lambda z, t: F.cross_entropy(z.detach().requires_grad_().mT, t) + z.sum(),
    "edited": lambda z, t: F.cross_entropy(z.clone().mul_(3).mT, t),
}


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize("where", ["eager", "compiled"])
@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_is_not_a_loss_over_row_statistics_is_right(name: str, where: str) -> None:
    model, (x, t) = Model(), data()
    expected = trained(model, NOT_FUSED[name], x, t)
    loss = NOT_FUSED[name] if where == "eager" else compiled(NOT_FUSED[name])
    lazy = compiled(model)
    for _ in range(2):
        same(trained(lazy, loss, x, t), expected)


@pytest.mark.parametrize("where", ["eager", "compiled"])
def test_edits_in_place_reach_the_loss_and_the_logits(where: str) -> None:
    def loss(z: Tensor, t: Tensor) -> Tensor:
        z[:, 0].mul_(3)
        value = F.cross_entropy(z.mT, t)
        z[:, -1] = 0
        return value + z.square().mean()

    def first_copied(z: Tensor, t: Tensor) -> Tensor:
        copied, viewed = z.float().clone(), z[:, 1:]
        z /= 2
        return F.cross_entropy(copied.mT, t) + F.cross_entropy(viewed.mT, t[:, 1:])

    for fn in (loss, first_copied):
        model, (x, t) = Model(), data()
        expected = trained(model, fn, x, t)
        run = fn if where == "eager" else compiled(fn)
        lazy = compiled(model)
        for _ in range(2):
            same(trained(lazy, run, x, t), expected)


def test_logits_and_a_view_of_them_edited_in_one_compiled_function() -> None:
    def edit(z: Tensor, first: Tensor, t: Tensor) -> Tensor:
        first.zero_()
        return z.logsumexp(-1).sum()

    model, (x, t) = Model(), data()
    lazy = compiled(model)
    with torch.no_grad():
        z = model(x)
        expected = edit(z, z[:, 0], t)
    y = lazy(x).detach()
    assert isinstance(y, DeferredLogits)
    torch.testing.assert_close(compiled(edit)(y, y[:, 0], t), expected)
    torch.testing.assert_close(y.materialize(), z)


def test_hooks_on_the_logits_see_their_gradient() -> None:
    seen: dict[bool, list[Tensor]] = {}
    model, (x, t) = Model(), data()
    lazy = compiled(model)
    for is_lazy in (False, True):
        logits = (lazy if is_lazy else model)(x)
        logits.retain_grad()
        seen[is_lazy] = []
        logits.register_hook(seen[is_lazy].append)
        F.cross_entropy(logits, t[:, :1].expand(B, V) % S).backward()  # classes in dimension 1
        seen[is_lazy].append(logits.grad)
        flat = (lazy if is_lazy else model)(x).view(-1, V)
        flat.retain_grad()
        F.cross_entropy(flat, t.view(-1)).backward()
        seen[is_lazy].append(flat.grad)
    same(seen[True], seen[False])


def test_hooks_on_the_node_behind_the_logits_see_their_gradient() -> None:
    from torch.autograd.graph import get_gradient_edge, register_multi_grad_hook

    model, (x, t) = Model(), data()
    lazy = compiled(model)
    seen: dict[bool, list[Any]] = {}
    for is_lazy in (False, True):
        logits = (lazy if is_lazy else model)(x)
        seen[is_lazy] = []
        register_multi_grad_hook((logits,), lambda g, to=seen[is_lazy]: to.extend(g))
        F.cross_entropy(logits.mT, t).backward()
        logits = (lazy if is_lazy else model)(x)
        edge = get_gradient_edge(logits)
        seen[is_lazy] += torch.autograd.grad(F.cross_entropy(logits.mT, t), [edge])
    same(seen[True], seen[False])


def test_a_loss_after_the_logits_were_read_uses_them() -> None:
    model, (x, t) = Model(), data()
    logits = compiled(model)(x)
    with Counted() as c:
        sums = logits.detach().cumsum(-1)
        value = F.cross_entropy(logits.mT, t)
        got = [value.detach(), *torch.autograd.grad(value, list(model.parameters()))]
    torch.testing.assert_close(sums, model(x).detach().cumsum(-1))
    same(got, trained(model, LOSSES["mT"], x, t))
    assert (c.fused, c.reads) == (0, 1)


def test_the_logits_are_still_there_after_their_loss() -> None:
    model, (x, t) = Model(), data()
    logits = compiled(model)(x)
    value = F.cross_entropy(logits.mT, t) + logits.logsumexp(-1).square().mean()
    expected = F.cross_entropy(model(x).mT, t) + model(x).logsumexp(-1).square().mean()
    params = list(model.parameters())
    same(list(torch.autograd.grad(value, params)), list(torch.autograd.grad(expected, params)))
    same([logits.detach()], [model(x).detach()])


@pytest.mark.parametrize("where", ["eager", "compiled"])
def test_a_loss_without_gradients(where: str) -> None:
    model, (x, t) = Model(), data()
    loss = LOSSES["shifted"] if where == "eager" else compiled(LOSSES["shifted"])
    logits = compiled(model)(x)
    expected = LOSSES["shifted"](model(x), t).detach()
    with Counted() as c:
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                value = loss(logits, t)
            assert not value.requires_grad
            torch.testing.assert_close(value, expected)
        for given in (logits.detach(), logits.data):
            value = loss(given, t)
            assert not value.requires_grad
            torch.testing.assert_close(value, expected)
        with torch.no_grad():
            cast = logits.clone()
        assert not loss(cast, t).requires_grad
    assert c.fused >= 1 and c.reads == 0


@pytest.mark.parametrize("where", ["eager", "compiled"])
def test_changed_weights_are_a_named_error(where: str) -> None:
    model, (x, t) = Model(), data()
    loss = LOSSES["view"] if where == "eager" else compiled(LOSSES["view"])
    lazy = compiled(model)
    loss(lazy(x), t)
    for grad in (True, False):
        for change in (lambda p: p.data.mul_(2), lambda p: p.detach().mul_(2)):
            with torch.set_grad_enabled(True):
                logits = lazy(x)
            change(model.head.weight)
            with torch.set_grad_enabled(grad), pytest.raises(DeferredLogitsError, match="head's weight"):
                loss(logits, t)


def test_a_loss_that_edits_what_logits_are_made_of_without_needing_it() -> None:
    """The bias alone has a gradient: the hidden states may change once the loss is computed, as in eager mode."""
    model, (x, t) = Model(bias=True), data()
    weight, bias = model.head.weight.detach(), model.head.bias

    def head(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x * 1
        return hidden, F.linear(hidden, weight, bias)

    def loss(hidden: Tensor, z: Tensor, t: Tensor) -> Tensor:
        hidden.mul_(2.0)
        return LOSSES["view"](z, t)

    found = []
    for first, second in ((head, loss), (compiled(head), compiled(loss))):
        value = second(*first(x), t)
        found.append([value.detach(), *torch.autograd.grad(value, bias)])
    same(found[1], found[0])


def test_two_losses_on_one_pending_tensor() -> None:
    model, (x, t) = Model(), data()

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z.mT, t) + 0.5 * F.cross_entropy(z[:, :-1].mT, t[:, 1:], reduction="sum")

    for fn in (loss, compiled(loss)):
        with Counted() as c:
            same(trained(compiled(model), fn, x, t), trained(model, loss, x, t))
        assert (c.fused, c.reads) == (2, 0)


def test_two_backwards_through_one_graph() -> None:
    model, (x, t) = Model(), data()
    params = list(model.parameters())
    for fn in (LOSSES["mT"], compiled(LOSSES["mT"])):
        value = fn(compiled(model)(x), t)
        first = torch.autograd.grad(value, params, retain_graph=True)
        same(list(torch.autograd.grad(value, params)), list(first))


def test_gradients_that_accumulate_in_the_parameters() -> None:
    model, (x, t) = Model(), data()
    lazy = compiled(model)
    for _ in range(3):
        F.cross_entropy(lazy(x).mT, t).backward()
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    for _ in range(3):
        F.cross_entropy(model(x).mT, t).backward()
    same(got, [p.grad for p in model.parameters()])


def test_a_checkpoint_around_the_model_or_the_loss() -> None:
    from torch.utils.checkpoint import checkpoint

    model, (x, t) = Model(), data()
    expected = trained(model, LOSSES["mT"], x, t)
    lazy = compiled(model)
    params = list(model.parameters())
    losses = {
        "model": lambda: F.cross_entropy(checkpoint(lazy, x, use_reentrant=False).mT, t),
        "loss": lambda: checkpoint(LOSSES["mT"], lazy(x), t, use_reentrant=False),
        "both": lambda: checkpoint(lambda x, t: LOSSES["mT"](lazy(x), t), x, t, use_reentrant=False),
    }
    for run in losses.values():
        value = run()
        same([value.detach(), *torch.autograd.grad(value, params)], expected)


# ------------------------------------------------------------------------------------------------ autocast, shapes


@pytest.mark.parametrize("where", ["eager", "compiled"])
@pytest.mark.parametrize(("around_model", "around_loss"), [(True, True), (True, False), (False, True)])
def test_autocast_around_the_model_the_loss_or_both(around_model: bool, around_loss: bool, where: str) -> None:
    model, (x, t) = Model(bias=True), data()
    params = list(model.parameters())

    def run(model: Any, loss: Any) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around_model):
            logits = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around_loss):
            value = loss(logits, t)
        return [value.detach(), *torch.autograd.grad(value, params)]

    loss = LOSSES["upcast"] if where == "eager" else compiled(LOSSES["upcast"])
    with Counted() as c:
        got = run(compiled(model), loss)
    same(got, run(model, LOSSES["upcast"]), 3e-2 if around_model else 1e-5)
    assert (c.fused, c.reads) == (1, 0)


def test_new_shapes_compile_once_more_and_then_no_more() -> None:
    model = Model()
    lazy, loss = compiled(model), compiled(LOSSES["flatten"])
    frames: list[int] = []
    for rows in ((2, 6), (2, 7), (3, 8), (4, 9), (5, 11)):
        x, t = data(rows)
        with Counted() as c:
            same(trained(lazy, loss, x, t), trained(model, LOSSES["flatten"], x, t))
        assert c.reads == 0
        frames.append(counters["stats"]["unique_graphs"])
    assert frames[-1] == frames[1] or frames[-1] == frames[2]
    with Counted() as c:
        x, t = data((7, 13))
        same(trained(lazy, LOSSES["shifted"], x, t), trained(model, LOSSES["shifted"], x, t))
    assert (c.fused, c.reads) == (1, 0)


def test_dynamic_from_the_start() -> None:
    model = Model()
    options = {"backend": cce_inductor.cce_backend, "options": FUSE_ALL, "dynamic": True}
    lazy, loss = torch.compile(model, **options), torch.compile(LOSSES["upcast"], **options)
    for rows in ((2, 6), (3, 8)):
        x, t = data(rows)
        with Counted() as c:
            same(trained(lazy, loss, x, t), trained(model, LOSSES["upcast"], x, t))
        assert c.reads == 0


# ----------------------------------------------------------------------------------------------------- the gates


@pytest.mark.parametrize("options", [{"defer_logits": False}, {"defer_without_loss": False}, {"min_vocab": V + 1}])
def test_logits_that_are_not_to_be_deferred_are_plain(options: dict[str, Any]) -> None:
    model, (x, _) = Model(), data()
    with Counted() as c:
        logits = compiled(model, **options)(x)
        assert type(logits) is Tensor
        same([logits.detach()], [model(x).detach()])
    assert (c.deferred, c.fused) == (0, 0)


def test_generation_and_evaluation_stay_plain() -> None:
    model, (x, _) = Model(), data()
    for mode in (torch.no_grad, torch.inference_mode):
        torch._dynamo.reset()
        with mode(), Counted() as c:
            assert type(compiled(model)(x)) is Tensor
        assert c.deferred == 0


def test_a_wide_layer_at_the_end_of_a_graph_is_no_head() -> None:
    layer = nn.Linear(D, 4 * D)
    assert type(compiled(lambda x: layer(x * 2))(data()[0])) is Tensor


def test_logits_with_another_use_in_the_graph_stay_plain() -> None:
    model, (x, _) = Model(lambda z: (z, z.relu().sum())), data()
    assert type(compiled(model)(x)[0]) is Tensor


def test_a_loss_in_the_graph_is_fused_and_real_logits_come_back_without_deferral() -> None:
    model, (x, t) = Model(), data()

    def step(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        z = model(x)
        return F.cross_entropy(z.mT, t), z

    with Counted() as c:
        loss, logits = compiled(step, defer_logits=False)(x, t)
    assert type(logits) is Tensor and (c.fused, c.deferred) == (1, 0)
    same([loss, logits], list(step(x, t)))


def test_strict_and_explain_know_of_losses_in_another_graph() -> None:
    model, (x, t) = Model(), data()
    with pytest.raises(cce_inductor.backend.DeclinedError, match="in a dimension of their own|classes"):
        F.cross_entropy(compiled(model, strict=True)(x), t[:, :1].expand(B, V) % S)

    def step(x: Tensor, t: Tensor) -> Tensor:
        logits = model(x)
        torch._dynamo.graph_break()
        return F.cross_entropy(logits.mT, t)

    with cce_inductor.config.patch(min_vocab=0):
        report = cce_inductor.explain(step, x, t)
    assert [site.fused for site in report.sites] == [True] and report.deferred == 1
    assert report.sites[0].location.split(":")[0].endswith("test_other_graphs.py")


def test_an_eager_loss_is_recorded_where_it_stands() -> None:
    from cce_inductor import record

    model, (x, t) = Model(), data()
    with record.collect() as graphs:
        F.cross_entropy(compiled(model)(x).mT, t)  # here
    (site,) = graphs[-1].sites
    assert site.fused and site.location.startswith(__file__)


def test_a_call_that_could_not_be_tried_is_logged_and_tried_again(monkeypatch: Any, caplog: Any) -> None:
    """What went wrong once says nothing of the next call of the same kind."""
    from cce_inductor.deferred import calls

    torch.manual_seed(0)
    w, x, t = torch.randn(V, D, requires_grad=True), torch.randn(S, D), torch.randint(0, V, (S,))
    head = torch.compile(lambda x, w: F.linear(x, w), backend="cce", options=FUSE_ALL)
    original = calls.call_graph
    faults = [RuntimeError("deliberate")]

    def once_broken(*args: Any) -> Any:
        if faults:
            raise faults.pop()
        return original(*args)

    monkeypatch.setattr(calls, "call_graph", once_broken)
    want = F.cross_entropy(F.linear(x, w), t)
    with caplog.at_level("INFO", logger="cce_inductor"), Counted() as counted:
        torch.testing.assert_close(F.cross_entropy(head(x, w), t), want)
    assert (counted.fused, counted.reads) == (0, 1) and "deliberate" in caplog.text
    with Counted() as counted:
        torch.testing.assert_close(F.cross_entropy(head(x, w), t), want)
    assert (counted.fused, counted.reads) == (1, 0)


def test_a_fault_of_ours_in_a_loss_that_is_called_is_logged(monkeypatch: Any, caplog: Any) -> None:
    """What is remembered of such a call, that it is not fused, has its reason in the log."""
    from cce_inductor.deferred import other_graphs

    def gone(*args: Any) -> Any:
        raise AttributeError("deliberate")

    model, (x, t) = Model(), data()
    logits, want = compiled(model)(x), F.cross_entropy(model(x).mT, t)
    monkeypatch.setattr(other_graphs, "_form", gone)
    with Counted() as counted:
        torch.testing.assert_close(F.cross_entropy(logits.mT, t), want)
    assert (counted.fused, counted.reads) == (0, 1)
    (entry,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert entry.exc_info is not None and "deliberate" in str(entry.exc_info[1])


def test_a_loss_that_is_called_and_not_fused_is_logged_with_its_reason(caplog: Any) -> None:
    model, (x, _) = Model(), data()
    with caplog.at_level("INFO", logger="cce_inductor"), Counted() as counted:
        F.cross_entropy(compiled(model)(x).view(-1, V), torch.rand(B * S, V))
    assert (counted.declined, counted.reads) == (1, 1)
    assert "deferred logits are read for cross_entropy: " in caplog.text and "target" in caplog.text
