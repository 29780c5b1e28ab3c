"""Rows of pending logits taken by a tensor, as code does that leaves ignored tokens out: rows of the hidden states."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_eager_statistics import IDS, Counted, Model, S, V, X, compiled, same, with_gradients
from torch import Tensor

from cce_inductor.deferred import DeferredLogits, DeferredLogitsError
from cce_inductor.trace import heads

pytestmark = pytest.mark.usefixtures("a_mib_is_large")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


CACHED = IDS % 3 != 0
LABELS = IDS.where(CACHED, -100)
LAST = torch.tensor([S - 1, 7])


def ce(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.float(), t)


TAKEN: dict[str, Callable[[Any], Any]] = {
    "boolean": lambda z: ce(z[CACHED], IDS[CACHED]),
    "operator.getitem": lambda z: ce(operator.getitem(z, CACHED), IDS[CACHED]),
    "boolean, flat": lambda z: ce(z.view(-1, V)[CACHED.view(-1)], IDS[CACHED]),
    "boolean, cast before": lambda z: ce(z.float().reshape(-1, z.size(-1))[LABELS.view(-1) != -100], IDS[CACHED]),
    "shifted": lambda z: ce(z[..., :-1, :][CACHED[:, 1:]], IDS[:, 1:][CACHED[:, 1:]]),
    "numbers": lambda z: ce(z[:, torch.tensor([3, 1, 3])].flatten(0, 1), IDS[:, [3, 1, 3]].flatten()),
    "one row of each": lambda z: ce(z[torch.arange(2), LAST], IDS[torch.arange(2), LAST]),
    "index_select": lambda z: ce(z.view(-1, V).index_select(0, LAST), IDS.view(-1)[LAST]),
    "torch.index_select": lambda z: ce(torch.index_select(z, 1, LAST)[0], IDS[0, LAST]),
    "reversed": lambda z: ce(z.flip(1).flatten(0, 1), IDS.flip(1).flatten()),
    "rolled": lambda z: ce(torch.roll(z, 1, 1).flatten(0, 1), IDS.roll(1, 1).flatten()),
    "rotated": lambda z: ce(z.rot90(1, (0, 1)).flatten(0, 1), IDS.rot90(1, (0, 1)).flatten()),
    "twice": lambda z: ce(z[CACHED][torch.tensor([4, 2])], IDS[CACHED][[4, 2]]),
    "then a slice": lambda z: ce(z[CACHED][5:, None].squeeze(1), IDS[CACHED][5:]),
    "log-probabilities": lambda z: z[CACHED].log_softmax(-1).gather(-1, IDS[CACHED][:, None]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TAKEN)
def test_a_loss_of_some_rows_needs_no_logits(name: str, dtype: torch.dtype) -> None:
    model, x = Model(dtype), X.to(dtype)
    eager, exact = with_gradients(model, TAKEN[name], x), with_gradients(Model().double(), TAKEN[name], x.double())
    lazy = compiled(Model(dtype))
    with Counted() as c:
        same(with_gradients(lazy, TAKEN[name], x), eager, exact)
    assert (c.reads, c.declined, c.fused + c.graphs) == (0, 0, 1)


def test_a_graph_break_at_the_mask() -> None:
    """Dynamo breaks the graph where the number of rows depends on the data."""
    model, lazy = Model(), Model()

    def step(m: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        z = m(x).view(-1, V)
        keep = LABELS.view(-1) != -100
        return F.cross_entropy(z[keep], LABELS.view(-1)[keep])

    want = step(model, X)
    with Counted() as c:
        got = compiled(lambda x: step(lazy, x))(X)
        grads = torch.autograd.grad(got, list(lazy.parameters()))
    assert (c.reads, c.fused) == (0, 1)
    torch.testing.assert_close(got, want)
    for g, w in zip(grads, torch.autograd.grad(want, list(model.parameters())), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-7)


def test_what_is_taken_reads_as_eager() -> None:
    model = Model()
    lazy = compiled(Model())
    with Counted() as c:
        taken = lazy(X)[CACHED]
        assert isinstance(taken, DeferredLogits) and c.start is not None
        assert taken.shape == (int(CACHED.sum()), V)
    assert c.reads == 0
    torch.testing.assert_close(taken + 0, model(X)[CACHED])


def test_without_gradients() -> None:
    lazy = compiled(Model())
    logits = lazy(X)
    with torch.no_grad():
        taken = logits[CACHED]
    assert not taken.requires_grad
    torch.testing.assert_close(taken + 0, Model()(X)[CACHED].detach())


def test_changed_weights_are_a_named_error() -> None:
    model = Model()
    taken = compiled(model)(X)[CACHED]
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(DeferredLogitsError):
        taken.materialize()


READS: dict[str, Callable[[Any], Any]] = {
    "entries": lambda z: z[IDS[..., None].expand(-1, -1, V) % 2 == 0],
    "classes": lambda z: z[..., torch.tensor([3, 1])],
    "a new dimension": lambda z: z[None, CACHED],
    "index_select of classes": lambda z: z.index_select(2, LAST),
    "a list": lambda z: z[[1, 0]],
    "classes were cut": lambda z: z[..., :-1][CACHED],
    "transposed": lambda z: z.mT[torch.tensor([1])],
}


@pytest.mark.parametrize("name", READS)
def test_what_is_no_row_reads_the_logits(name: str) -> None:
    with Counted() as c:
        got = READS[name](compiled(Model())(X))
        torch.testing.assert_close(got + 0, READS[name](Model()(X)))
    assert c.reads == 1


def test_rows_of_a_sum_of_two_heads() -> None:
    """Their hidden states have rows too."""
    w, u = torch.randn(V, X.shape[-1], requires_grad=True), torch.randn(V, X.shape[-1], requires_grad=True)

    def head(x: Tensor, y: Tensor) -> Tensor:
        return F.linear(x, w) + F.linear(y, u)

    order = torch.arange(S).flip(0)
    losses = [ce(fn(X, X.cos())[:, order].flatten(0, 1), IDS[:, order].flatten()) for fn in (compiled(head), head)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (w, u)) for loss in losses))


def test_rows_without_a_gradient_of_small_logits_are_read(monkeypatch: Any) -> None:
    monkeypatch.setattr(heads, "LARGE_LOGITS", 64 << 20)
    logits = compiled(Model())(X)
    with Counted() as c:
        taken = logits[CACHED]
    assert c.reads == 0 and isinstance(taken, DeferredLogits) and not taken.is_materialized
    with Counted() as c:
        taken = logits.detach()[CACHED]
    assert c.reads == 1 and not (isinstance(taken, DeferredLogits) and not taken.is_materialized)
