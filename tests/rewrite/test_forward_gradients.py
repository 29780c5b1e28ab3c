"""Which losses have their gradients formed in the forward, and that these are what eager's backward gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cce_inductor import config
from cce_inductor.ops.choice import Choice
from cce_inductor.rewrite.run import rewrite

B, S, D, V = 3, 4, 6, 40
N = B * S


def each(z: Tensor, t: Tensor, **how: Any) -> Tensor:
    return F.cross_entropy(z, t, reduction="none", **how)


def log_p(z: Tensor, t: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(1, t.clamp(min=0)[:, None]).squeeze(1)


def by_sequence(z: Tensor, t: Tensor, m: Tensor) -> Tensor:
    mask = m.view(B, S) > 0.3
    return ((each(z, t).view(B, S) * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


# Of logits (N, V), targets (N,) some of which are ignored, and numbers (N,).
LINEAR: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mean": lambda z, t, m: F.cross_entropy(z, t),
    "sum": lambda z, t, m: F.cross_entropy(z, t, reduction="sum") / 7,
    "smoothed": lambda z, t, m: F.cross_entropy(z, t, label_smoothing=0.1),
    "weighted classes": lambda z, t, m: F.cross_entropy(z, t, torch.linspace(0.5, 2, V).to(z), label_smoothing=0.1),
    "a mask": lambda z, t, m: (each(z, t) * (m > 0.5)).sum() / (m > 0.5).sum(),
    "a mask of floats": lambda z, t, m: (each(z, t) * m).sum() / m.sum(),
    "a mask by where": lambda z, t, m: torch.where(m > 0.5, each(z, t), 0.0).mean(),
    "a mask that fills": lambda z, t, m: each(z, t).masked_fill(m > 0.5, 0.0).sum() * 0.25,
    "rows of several dimensions": lambda z, t, m: (each(z, t).view(B, S) * m.view(B, S)).mean(),
    "a mean of means": by_sequence,
    "log-probabilities": lambda z, t, m: -log_p(z, t).mean(),
    "advantages": lambda z, t, m: -(log_p(z, t) * (m - 0.5)).sum(0) / N,
    "two sums": lambda z, t, m: each(z, t).sum() - (m * each(z, t)).mean(),
    "beside a number": lambda z, t, m: 3.0 - 0.5 * F.cross_entropy(z, t) + m.sum(),
    "beside a metric": lambda z, t, m: F.cross_entropy(z, t) + (z.argmax(-1) == t).float().mean(),
    "of bfloat16": lambda z, t, m: F.cross_entropy(z, t).bfloat16().double() * 2,
}
NOT: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "z-loss": lambda z, t, m: F.cross_entropy(z, t) + 1e-3 * z.logsumexp(-1).square().mean(),
    "probabilities": lambda z, t, m: -(log_p(z, t).exp() * m).sum(),
    "focal": lambda z, t, m: ((1 - log_p(z, t).exp()) ** 2 * each(z, t)).mean(),
    "a maximum": lambda z, t, m: each(z, t).max(),
    "an entropy": lambda z, t, m: (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "a logsumexp": lambda z, t, m: z.logsumexp(-1).mean(),
    "returned for each row": lambda z, t, m: each(z, t),
    "for each row beside the mean": lambda z, t, m: (each(z, t).mean(), each(z, t)),
    "a mask of the loss": lambda z, t, m: (each(z, t) * (each(z, t) > 3)).sum(),
}


def run(fn: Callable, *inputs: Tensor, dynamic: bool | None = None) -> tuple[Any, str]:
    """What a function gives where kernels form gradients in the forward, and what its record says of the kernel."""
    said: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Callable:
        choose = lambda problem: Choice("kernel", gradients_in_forward=True)  # noqa: E731
        made = rewrite(gm, config.Settings(min_vocab=0), "v", choose)
        said.extend(site.kernel for site in made.sites)
        assert made.fused == len(made.sites)
        return made.graph_module.forward

    torch._dynamo.reset()
    return torch.compile(fn, backend=backend, dynamic=dynamic)(*inputs), said[0]


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, w = torch.randn(N, D, dtype=dtype).requires_grad_(), torch.randn(V, D, dtype=dtype).requires_grad_()
    t = torch.randint(V, (N,))
    t[::5] = -100
    return x, w, t, torch.rand(N, dtype=dtype)


def compare(fn: Callable, dynamic: bool | None = None) -> str:
    inputs = data()
    wanted = fn(*inputs)
    got, said = run(fn, *inputs, dynamic=dynamic)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(*(torch.autograd.grad(loss, inputs[:2]) for loss in (wanted, got)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14)
    return said


@pytest.mark.parametrize("name", LINEAR)
def test_a_number_that_is_linear(name: str) -> None:
    said = compare(lambda x, w, t, m: LINEAR[name](F.linear(x, w), t, m))
    assert said == "kernel, gradients formed in the forward"


@pytest.mark.parametrize("name", [n for n in LINEAR if n not in ("rows of several dimensions", "a mean of means")])
def test_of_any_number_of_rows(name: str) -> None:
    said = compare(lambda x, w, t, m: LINEAR[name](F.linear(x, w), t, m), dynamic=True)
    assert said == "kernel, gradients formed in the forward"


@pytest.mark.parametrize("name", NOT)
def test_what_is_not(name: str) -> None:
    inputs = data()
    _, said = run(lambda x, w, t, m: NOT[name](F.linear(x, w), t, m), *inputs)
    assert said == "kernel"


def test_two_losses() -> None:
    """Each would hold a gradient of its weight until the backward."""
    assert (
        compare(lambda x, w, t, m: F.cross_entropy(x @ w.T, t) + F.cross_entropy(x.tanh() @ (2 * w).T, t)) == "kernel"
    )


def test_numbers_that_are_trained() -> None:
    """A gradient reaches the numbers that the loss is multiplied by: they are none that are known beforehand."""
    x, w, t, m = data()
    m.requires_grad_()
    fn = lambda x, w, t, m: (each(F.linear(x, w), t) * m).sum()  # noqa: E731
    got, said = run(fn, x, w, t, m)
    assert said == "kernel"
    for a, b in zip(*(torch.autograd.grad(loss, (x, w, m)) for loss in (fn(x, w, t, m), got)), strict=True):
        torch.testing.assert_close(b, a)


def test_numbers_that_are_written_to_in_between() -> None:
    def fn(x: Tensor, w: Tensor, t: Tensor, m: Tensor) -> Tensor:
        m, losses = m.clone(), each(F.linear(x, w), t)
        first = losses + m
        m.zero_()
        return first.sum() + m.sum()

    assert compare(fn) == "kernel"


@pytest.mark.parametrize("name", ["mean", "a mask", "log-probabilities"])
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_rows_that_are_not_finite(name: str, number: float) -> None:
    """Where eager has NaN, and nowhere else."""
    x, w, t, m = data(torch.float32)
    with torch.no_grad():
        x[1, 2], t[1] = number, 5
    fn = lambda x, w, t, m: LINEAR[name](F.linear(x, w), t, m)  # noqa: E731
    got, said = run(fn, x, w, t, m)
    assert "in the forward" in said
    torch.testing.assert_close(got, fn(x, w, t, m), equal_nan=True)
    for a, b in zip(*(torch.autograd.grad(loss, (x, w)) for loss in (fn(x, w, t, m), got)), strict=True):
        torch.testing.assert_close(b, a, equal_nan=True)


def test_a_scaled_loss_and_a_second_backward() -> None:
    x, w, t, m = data()
    fn = lambda x, w, t, m: LINEAR["a mask"](F.linear(x, w), t, m)  # noqa: E731
    wanted, (got, _) = fn(x, w, t, m), run(fn, x, w, t, m)
    for scale in (3.0, 0.5):
        for a, b in zip(
            *(torch.autograd.grad(scale * loss, (x, w), retain_graph=True) for loss in (wanted, got)), strict=True
        ):
            torch.testing.assert_close(b, a)
