"""Statistics of the rows that are asked of pending logits eagerly, as RL and evaluation code does.

Every test runs a model and a function of its logits twice, with eager PyTorch and with the model compiled by our
backend, and compares results and gradients. The logits are so large that nothing may read them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture import FUSE_ALL
from test_deferred import largest_allocation
from torch import Tensor, nn
from torch._dynamo.utils import counters

import cce_inductor
from cce_inductor import record
from cce_inductor.deferred import DeferredLogits, DeferredLogitsError
from cce_inductor.trace import heads

pytestmark = pytest.mark.usefixtures("a_mib_is_large")

B, S, D, V = 2, 48, 8, 6000
MEBIBYTE = 2**20
assert B * S * V * 2 > MEBIBYTE  # in bf16


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, behind: Callable[[Tensor], Tensor] = lambda z: z) -> None:
        super().__init__()
        self.behind = behind
        torch.manual_seed(0)
        self.trunk = nn.Linear(D, D, dtype=dtype)
        self.head = nn.Linear(D, V, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.head(2 * torch.tanh(self.trunk(x))))


class Counted:
    """``with Counted() as c: ...; c.graphs, c.reads``: what the counters went up by."""

    def __enter__(self) -> Counted:
        self.start = dict(counters["cce_inductor"])
        return self

    def __exit__(self, *_: Any) -> None:
        self.graphs, self.reads, self.fused, self.declined = (
            counters["cce_inductor"][name] - self.start.get(name, 0)
            for name in ("statistics", "deferred_materialized", "fused", "declined")
        )


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


X = torch.randn(B, S, D, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(2))
SEVERAL = torch.stack([IDS, IDS.roll(1, 1), IDS], -1)  # K classes of each row


def compiled(fn: Any, **options: Any) -> Any:
    return torch.compile(fn, backend=cce_inductor.cce_backend, options={**FUSE_ALL, **options})


def results(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else list(made)


def with_gradients(model: Any, fn: Callable[[Any], Any], x: Tensor) -> list[Tensor]:
    """What `fn` makes of the logits, and the gradients of the parameters if it has any."""
    made = results(fn(model(x)))
    if not made[0].requires_grad:
        return made
    weights = torch.linspace(0.5, 1.5, made[0].numel()).view(made[0].shape)
    grads = torch.autograd.grad((made[0] * weights).sum(), list(model.parameters()))
    return [made[0].detach(), *made[1:], *grads]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())


def same(got: list[Tensor], eager: list[Tensor], exact: list[Tensor], units: int = 2) -> None:
    """As eager's in form; and no further from float64 than eager's, or as good a class."""
    for g, e, x in zip(got, eager, exact, strict=True):
        assert type(g) is Tensor
        assert (g.shape, g.dtype, g.stride()) == (e.shape, e.dtype, e.stride())
        if not g.is_floating_point():
            continue
        assert error(g, x) <= 1.25 * error(e, x) + units * torch.finfo(g.dtype).eps


# -------------------------------------------------------------------------------------------------- what is served


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """As TRL has it."""
    if logits.dtype in [torch.float32, torch.float64]:
        selected_logits = torch.gather(logits, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
        logsumexp_values = torch.stack([torch.logsumexp(lg, dim=-1) for lg in logits])
        return selected_logits - logsumexp_values
    per_token_logps = []
    for row_logits, row_labels in zip(logits, index, strict=True):
        row_logps = F.log_softmax(row_logits, dim=-1)
        row_per_token_logps = row_logps.gather(dim=-1, index=row_labels.unsqueeze(-1)).squeeze(-1)
        per_token_logps.append(row_per_token_logps)
    return torch.stack(per_token_logps)


def entropy_from_logits(logits: Tensor, chunk_size: int = 16) -> Tensor:
    """As TRL has it."""
    original_shape = logits.shape[:-1]
    num_classes = logits.shape[-1]
    flat_logits = logits.reshape(-1, num_classes)
    entropies = []
    for chunk in flat_logits.split(chunk_size, dim=0):
        logps = F.log_softmax(chunk, dim=-1)
        chunk_entropy = -(torch.exp(logps) * logps).sum(-1)
        entropies.append(chunk_entropy)
    return torch.cat(entropies, dim=0).reshape(original_shape)


# With how many graphs each takes.
STATISTICS: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "logsumexp": (1, lambda z: torch.logsumexp(z, -1)),
    "logsumexp_method": (1, lambda z: z.logsumexp(dim=(-1,), keepdim=True)),
    "logsumexp_special": (1, lambda z: torch.special.logsumexp(z.float(), 2)),
    "logsumexp_keyword": (1, lambda z: torch.logsumexp(input=z[0], dim=-1)),
    "gather": (1, lambda z: torch.gather(z, -1, IDS[..., None])),
    "gather_method": (1, lambda z: z.gather(dim=-1, index=IDS[..., None])),
    "several_classes": (1, lambda z: z.log_softmax(-1).gather(-1, SEVERAL)),
    "several_classes_of_logits": (1, lambda z: torch.take_along_dim(z, SEVERAL, -1)),
    "several_by_indices": (1, lambda z: z.view(-1, V)[torch.arange(IDS.numel())[:, None], SEVERAL.view(-1, 3) - V]),
    "several_minus_logsumexp": (2, lambda z: z.gather(-1, SEVERAL) - z.logsumexp(-1, keepdim=True)),
    "take_along_dim": (1, lambda z: z.take_along_dim(IDS[..., None], -1)),
    "take_along_dim_function": (1, lambda z: torch.take_along_dim(z.mT, IDS[:, None], dim=1)),
    "log_softmax": (1, lambda z: z.log_softmax(-1).gather(-1, IDS[..., None])),
    "log_softmax_fp32": (1, lambda z: F.log_softmax(z.float(), -1).gather(-1, IDS[..., None]).squeeze(-1)),
    "shifted": (1, lambda z: z[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])),
    "difference": (2, lambda z: torch.gather(z, -1, IDS[..., None]) - torch.logsumexp(z, -1, keepdim=True)),
    "temperature": (2, lambda z: selective_log_softmax((z[:, :-1] / 0.7).float(), IDS[:, 1:])),
    "selective": (1, lambda z: selective_log_softmax(z, IDS)),
    "entropy": (1, lambda z: entropy_from_logits(z)),
    "entropy_shifted": (2, lambda z: entropy_from_logits(z[:, :-1])),  # in chunks of 16 rows, and the rest
    "entropy_of_softmaxes": (1, lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)),
    "entropy_of_logarithms": (1, lambda z: (z.log_softmax(-1) * z.log_softmax(-1).exp()).sum(-1)),
    "entropy_shared": (1, lambda z: (lambda y: torch.sum(y * torch.exp(y), -1, keepdim=True))(z[0].log_softmax(-1))),
    "sum": (1, lambda z: torch.sum(z, -1)),
    "amax": (1, lambda z: z.amax(-1, keepdim=True)),
    "amax_function": (1, lambda z: torch.amax((2 * z)[:, 1], dim=1)),
    "max": (1, lambda z: z.max(-1)),
    "max_function": (1, lambda z: torch.max(z, dim=-1, keepdim=True)),
    "argmax": (1, lambda z: z.argmax(-1)),
    "argmax_keyword": (1, lambda z: z.argmax(dim=-1, keepdim=True)),
    "argmax_function": (1, lambda z: torch.argmax(z.view(-1, V), 1)),
    "argmax_shifted": (1, lambda z: z[..., :-1, :].contiguous().argmax(-1)),
    "argmax_softmax": (1, lambda z: z.softmax(-1).argmax(-1)),
    "argmax_log_softmax": (1, lambda z: z.log_softmax(-1).argmax(-1)),
    "probability": (1, lambda z: z.softmax(-1).gather(-1, IDS[..., None])),
    "exponential": (1, lambda z: (z / 3).exp().sum(-1)),
    "mean_logit": (1, lambda z: (z.softmax(-1) * z).sum(-1)),
    "scaled_by_a_tensor": (1, lambda z: (z / torch.tensor(2.0)).logsumexp(-1)),
    "scaled_beyond_numbers": (1, lambda z: (z * float("inf")).argmax(-1)),
}
# A small difference of two statistics that are 40 times larger: lse - entropy. And exp of numbers around -8.5, whose
# rounding, in absolute terms, is the relative error of what it gives.
UNITS = {"mean_logit": 40, "probability": 9}
# In fp32 TRL goes row by row for the log-sum-exp only.
GRAPHS = {("selective", torch.float32): 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", STATISTICS)
def test_an_eager_statistic_of_pending_logits_needs_no_logits(name: str, dtype: torch.dtype) -> None:
    graphs, fn = STATISTICS[name]
    model, x = Model(dtype), X.to(dtype)
    eager, exact = with_gradients(model, fn, x), with_gradients(Model().double(), fn, x.double())
    lazy = compiled(Model(dtype))
    for expected in (GRAPHS.get((name, dtype), graphs), 0):
        with Counted() as c:
            got = with_gradients(lazy, fn, x)
            same(got, eager, exact, UNITS.get(name, 2))
        assert (c.graphs, c.reads) == (expected, 0)
        assert (c.fused, c.declined) == (0, 0)  # these count losses
    for g, e in zip(got, eager, strict=True):
        if not e.is_floating_point() and dtype == torch.float32:
            assert torch.equal(g, e)


FACTOR = torch.full((1, 1, 1), 1.5)

# What a model puts behind its head, and a piece of that.
PIECES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Any]]] = {
    "rows": (lambda z: z, lambda z: z[1, 3:9]),
    "one_row": (lambda z: z, lambda z: z[1, 3]),
    "every_other": (lambda z: z, lambda z: z[:, ::2].reshape(-1, V)[1:]),
    "batch_of_rows": (lambda z: z, lambda z: z.view(-1, V)[S:].view(1, S, V)),
    "cast": (lambda z: z, lambda z: z[0].bfloat16()[2:].float()),
    "classes": (lambda z: z, lambda z: z[:, 1:, : V - 1]),
    "some_classes_behind": (lambda z: z[..., : V - 1], lambda z: z.view(-1, V - 1)[3:]),
    "groups": (lambda z: z, lambda z: z.view(-1, 2 * V)[1:].view(-1, V)),
    "class_first": (lambda z: z.permute(2, 0, 1), lambda z: z[:, 0].t()),
    "capped": (lambda z: 2 * torch.tanh(z / 2), lambda z: z[0, 1:]),
    "biased": (lambda z: z + torch.linspace(0, 1, V), lambda z: z[0, 1:]),
    "factor": (lambda z: z * FACTOR, lambda z: z[0, 1:]),
    "row_factor": (lambda z: z * torch.linspace(1, 2, S)[:, None], lambda z: z[0, 1:]),
}


@pytest.mark.parametrize("name", PIECES)
def test_a_statistic_of_a_piece_of_the_logits(name: str, caplog: pytest.LogCaptureFixture) -> None:
    behind, piece = PIECES[name]

    def fn(z: Any) -> Tensor:
        return piece(z).logsumexp(-1)

    expected = with_gradients(Model(behind=behind), fn, X)
    with Counted() as c:
        got = with_gradients(compiled(Model(behind=behind)), fn, X)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # Rounded to bf16, or in groups of two rows, they are no row statistics of a head.
    served = name not in ("cast", "groups")
    assert (c.graphs, c.reads) == ((1, 0) if served else (0, c.reads))
    assert not [entry for entry in caplog.records if entry.levelname == "ERROR"]


def test_pieces_of_one_shape_share_a_graph() -> None:
    logits, eager = compiled(Model())(X), Model()(X)
    with Counted() as c:
        for i in range(0, B * S, 16):
            got = logits.view(-1, V)[i : i + 16].logsumexp(-1)
            torch.testing.assert_close(got, eager.view(-1, V)[i : i + 16].logsumexp(-1))
    assert (c.graphs, c.reads) == (1, 0)


def test_the_gradient_of_a_product_one_factor_of_which_has_none() -> None:
    def no_grad(z: Any) -> Tensor:
        with torch.no_grad():
            p = z.softmax(-1)
        return (p * z.log_softmax(-1)).sum(-1)

    def detached(z: Any) -> Tensor:
        return (z.softmax(-1) * z.detach().log_softmax(-1)).sum(-1)

    def as_leaf(z: Any) -> Tensor:
        return (z.softmax(-1) * z.detach().requires_grad_().log_softmax(-1)).sum(-1)

    for fn in (no_grad, detached, as_leaf):
        got, expected = with_gradients(compiled(Model()), fn, X), with_gradients(Model(), fn, X)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_max_is_a_named_tuple() -> None:
    made = compiled(Model())(X).max(-1)
    assert isinstance(made, torch.return_types.max) and torch.equal(made.indices, Model()(X).argmax(-1))
    assert not made.indices.requires_grad and made.values.requires_grad


def test_the_classes_of_bf16_logits_are_those_of_larger_ones() -> None:
    """Eager's are the first of those that bf16 cannot tell apart."""
    z = Model(torch.bfloat16).double()(X.bfloat16().double())
    got, eager = (fn(X.bfloat16()).argmax(-1) for fn in (compiled(Model(torch.bfloat16)), Model(torch.bfloat16)))
    ours, theirs = (z.gather(-1, classes[..., None]) for classes in (got, eager))
    assert error(ours, z.amax(-1, keepdim=True)) <= error(theirs, z.amax(-1, keepdim=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_gradients(mode: Callable) -> None:
    logits, eager = compiled(Model())(X), Model()(X)
    detached = logits.detach()
    with Counted() as c, mode():
        for z, e in ((logits, eager), (detached, eager), (logits.mT.mT, eager), (logits[:, 1:], eager[:, 1:])):
            for fn in (lambda z: z.logsumexp(-1), lambda z: z.argmax(-1), lambda z: z.float().amax(-1)):
                got = fn(z)
                assert not got.requires_grad
                torch.testing.assert_close(got, fn(e))
    assert c.reads == 0 and not detached.logsumexp(-1).requires_grad


def test_a_statistic_of_what_does_not_require_grad_under_grad_mode() -> None:
    with Counted() as c:
        assert not compiled(Model())(X).detach().logsumexp(-1).requires_grad
    assert (c.graphs, c.reads) == (1, 0)


def test_beside_a_loss_in_the_graph() -> None:
    """A training step that logs its accuracy, as TRL's SFTTrainer does."""
    model = Model()

    def step(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        z = model(x)
        return F.cross_entropy(z.flatten(0, 1), t.flatten()), z

    loss, logits = compiled(step)(X, IDS)
    with Counted() as c, torch.no_grad():
        right = logits[..., :-1, :].contiguous().argmax(-1) == IDS[:, 1:]
    assert (c.graphs, c.reads) == (1, 0)
    assert torch.equal(right, model(X)[:, :-1].argmax(-1) == IDS[:, 1:])
    loss.backward()


def test_several_statistics_of_one_tensor_and_their_backward() -> None:
    def fn(z: Tensor) -> Tensor:
        return z.logsumexp(-1).square() + z.gather(-1, IDS[..., None]).squeeze(-1) * z.amax(-1)

    eager, exact = with_gradients(Model(), fn, X), with_gradients(Model().double(), fn, X.double())
    with Counted() as c:
        same(with_gradients(compiled(Model()), fn, X), eager, exact)
    assert (c.graphs, c.reads) == (3, 0)


def test_autocast_around_the_statistic() -> None:
    logits, eager = compiled(Model(torch.bfloat16))(X.bfloat16()), Model(torch.bfloat16)(X.bfloat16())
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype), Counted() as c:
            for fn in (lambda z: z.logsumexp(-1), lambda z: z.log_softmax(-1).gather(-1, IDS[..., None])):
                got, expected = fn(logits), fn(eager)
                assert got.dtype == expected.dtype
                torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)
        assert c.reads == 0


def test_nothing_as_large_as_the_logits_is_allocated() -> None:
    lazy = compiled(Model())
    names = ["selective", "log_softmax", "max", "argmax", "temperature"]

    def run() -> None:
        logits = lazy(X)
        for name in names:
            made = results(STATISTICS[name][1](logits))[0]
            if made.requires_grad:
                made.sum().backward(retain_graph=True)

    run()
    assert largest_allocation(run) < B * S * V * 4 / 2


# ------------------------------------------------------------------------------------------------ what reads them


READS: dict[str, Callable[[Any], Any]] = {
    "argmax_of_all": lambda z: z.argmax(),
    "argmax_of_rows": lambda z: z.argmax(1),
    "max_of_all": lambda z: z.max(),
    "max_of_rows": lambda z: z.max(0),
    "max_of_two": lambda z: torch.max(z, torch.zeros(())),
    "logsumexp_of_rows": lambda z: z.logsumexp(1),
    "logsumexp_of_two": lambda z: z.logsumexp((1, 2)),
    "gather_of_rows": lambda z: z.gather(1, IDS[:, :1, None] % S),
    "gather_out": lambda z: torch.gather(z.detach(), -1, IDS[..., None], out=torch.empty(B, S, 1)),
    "of_probabilities": lambda z: z.softmax(-1).logsumexp(-1),
    "of_log_probabilities": lambda z: z.log_softmax(-1).logsumexp(-1),
    "exponentials_of_exponentials": lambda z: (lambda y: (y * y.exp()).sum(-1))(z / 9),
    "logit_of_exponentials": lambda z: (z.exp() * z).sum(-1),
    "entropy_of_rows": lambda z: (z.softmax(1) * z.log_softmax(1)).sum(1),
    "sum_of_rows": lambda z: z.sum(1),
    "scaled_to_nothing": lambda z: (z * 0).logsumexp(-1),
    "as_leaf": lambda z: z.detach().requires_grad_().logsumexp(-1),
    "edited": lambda z: z.clone().mul_(torch.linspace(0, 1, S)[:, None]).cumsum(-1).logsumexp(-1),
    "double": lambda z: z.double().logsumexp(-1),
    "vmap": lambda z: torch.vmap(lambda row: row.argmax(-1))(z),
}


@pytest.mark.parametrize("name", READS)
def test_what_is_not_served_reads_the_logits(name: str) -> None:
    fn = READS[name]
    # A statistic is no loss: strict has nothing to say.
    logits, eager = compiled(Model(), strict=True)(X), Model()(X)
    with Counted() as c:
        got, expected = results(fn(logits)), results(fn(eager))
        for g, e in zip(got, expected, strict=True):
            assert (g.shape, g.dtype, g.requires_grad) == (e.shape, e.dtype, e.requires_grad)
            assert torch.equal(g.detach(), e.detach())
    assert (c.graphs, c.reads, c.declined) == (0, 1, 0)


def test_a_statistic_that_is_not_served_is_logged_with_the_reason(caplog: Any) -> None:
    logits = compiled(Model())(X)
    with caplog.at_level("INFO", logger="cce_inductor"):
        logits.sum(1)
    assert "read for sum: it is no statistic of the rows" in caplog.text


@pytest.mark.parametrize(("mib", "reads"), [(1, 0), (2, 0), (3, 1), (64, 1)])
@pytest.mark.parametrize("scratch", [1, "auto"])
def test_small_logits_are_read_at_once_where_they_were_read_before(
    mib: int, reads: int, scratch: Any, monkeypatch: Any
) -> None:
    """Their statistics then cost a product more than the read that comes anyhow."""
    assert 2 * MEBIBYTE < B * S * V * 4 < 3 * MEBIBYTE
    monkeypatch.setattr(heads, "LARGE_LOGITS", mib * MEBIBYTE)
    model = compiled(Model(), workspace_mb=scratch)
    for step in range(3):
        logits = model(X)
        with Counted() as c:
            for z in (logits, logits[:, -1], logits.bfloat16()):
                z.argmax(-1)
        assert c.reads == (reads if step else 0)
        logits.sort(-1)


def test_a_hook_on_the_logits_sees_the_gradient_of_a_statistic() -> None:
    seen: list[Tensor] = []
    for fn in (compiled(Model()), Model()):
        logits = fn(X)
        logits.register_hook(seen.append)
        logits.logsumexp(-1).sum().backward()
    torch.testing.assert_close(*seen)


def test_logits_that_were_read_stay_read() -> None:
    logits = compiled(Model())(X)
    values = logits.materialize()
    with Counted() as c:
        assert torch.equal(logits.argmax(-1), values.argmax(-1))
        assert torch.equal(logits.logsumexp(-1), values.logsumexp(-1))
    assert (c.graphs, c.reads) == (0, 0)


def test_an_edit_shows_in_the_statistics_behind_it() -> None:
    logits, eager = compiled(Model())(X), Model()(X)
    before = logits.float().clone()
    for z in (logits, eager):
        z[..., 7] = 100.0
    assert torch.equal(logits.argmax(-1), torch.full((B, S), 7))
    assert torch.equal(before.argmax(-1), Model()(X).argmax(-1))
    torch.testing.assert_close(logits.logsumexp(-1), eager.logsumexp(-1))


@pytest.mark.parametrize("fn", [lambda z: z.argmax(-1), lambda z: z.logsumexp(-1)], ids=["argmax", "logsumexp"])
def test_changed_weights_are_a_named_error(fn: Callable[[Any], Any]) -> None:
    model = Model()
    lazy = compiled(model)
    fn(lazy(X))
    logits = lazy(X)
    model.head.weight.data.mul_(2)
    with pytest.raises(DeferredLogitsError, match="head's weight"):
        fn(logits)


def test_classes_that_there_are_none_of_are_an_error_as_in_eager() -> None:
    for wrong in (-1, V):
        index = IDS.clone()
        index[1, 2] = wrong
        for fn in (compiled(Model()), Model()):
            with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
                fn(X).gather(-1, index[..., None])


def test_nothing_is_recorded_of_a_statistic() -> None:
    logits = compiled(Model())(X)
    with record.collect() as graphs:
        logits.argmax(-1)
        logits.logsumexp(-1)
    assert not graphs and isinstance(logits, DeferredLogits) and not logits.is_materialized
