"""Losses as they are written in training loops, outside the compiled model: none of them needs the logits.

Each is run on the logits of a model that is compiled without it, and on those of the same model in eager mode. What
fuses in a compiled graph fuses here too; tests/rewrite/test_property.py tries programs put together at random.
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

B, S, D, V = 2, 12, 16, 1000
ROWS = torch.arange(B * S)
PADDED = torch.arange(V) >= 900
PRIOR = torch.linspace(-1, 1, V).log_softmax(0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Linear(D, D), nn.Linear(D, V, bias=False)
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.trunk(x)))


def flat(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), t.flatten())


def entry(z: Tensor, t: Tensor) -> Tensor:
    return z.gather(-1, t.unsqueeze(-1)).squeeze(-1)


def label_smoother(z: Tensor, t: Tensor) -> Tensor:
    """As in Hugging Face's Trainer."""
    log_p = -F.log_softmax(z, dim=-1)
    labels = t.unsqueeze(-1)
    padding = labels.eq(3)
    nll, smooth = log_p.gather(dim=-1, index=labels), log_p.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll.masked_fill_(padding, 0.0)
    smooth.masked_fill_(padding, 0.0)
    active = padding.numel() - padding.long().sum()
    return 0.9 * nll.sum() / active + 0.1 * smooth.sum() / (active * log_p.shape[-1])


def label_smoothing(z: Tensor, t: Tensor) -> Tensor:
    """As in timm."""
    log_p = F.log_softmax(z, dim=-1)
    return (-0.9 * entry(log_p, t) - 0.1 * log_p.mean(dim=-1)).mean()


def accuracies(z: Tensor, t: Tensor) -> Tensor:
    """As in timm, beside the loss."""
    _, guesses = z.flatten(0, 1).topk(5, 1, True, True)
    right = guesses.t().eq(t.view(1, -1).expand_as(guesses.t()))
    return flat(z, t) + right[:1].float().mean() + right.float().sum()


def centred(z: Tensor, t: Tensor) -> Tensor:
    y = z - z.max(-1, keepdim=True).values
    return (y.exp().sum(-1).log() - entry(y, t)).mean()


def written_out(z: Tensor, t: Tensor) -> Tensor:
    most = z.amax(-1, keepdim=True)
    lse = most + (z - most).exp().sum(-1, keepdim=True).log()
    return (lse - z.gather(-1, t[..., None])).mean()


def normalised(z: Tensor, t: Tensor) -> Tensor:
    weights = z.exp()
    p = weights / weights.sum(-1, keepdim=True)
    return -entry(p, t).log().mean()


def categorical(z: Tensor, t: Tensor) -> Tensor:
    policy = torch.distributions.Categorical(logits=z)
    return -policy.log_prob(t).mean() - 0.01 * policy.entropy().mean()


def mixture(z: Tensor, t: Tensor) -> Tensor:
    q = torch.zeros_like(z).scatter_(-1, t[..., None], 1.0) * 0.9 + 0.1 / V
    return -(q * z.log_softmax(-1)).sum(-1).mean()


def poly(z: Tensor, t: Tensor) -> Tensor:
    p = (F.one_hot(t, V) * z.softmax(-1)).sum(-1)
    return (-p.log() + 1 - p).mean()


def policy_gradient(z: Tensor, t: Tensor) -> Tensor:
    """As GRPO has it."""
    log_p = entry(z.log_softmax(-1), t)
    ratio = torch.exp(log_p - log_p.detach())
    return -torch.min(ratio * 2, ratio.clamp(0.8, 1.2) * 2).mean()


LOSSES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "masked_fill": lambda z, t: flat(z.masked_fill(PADDED, -torch.inf), t % 900),
    "masked_by_where": lambda z, t: flat(torch.where(PADDED, -1e9, z), t % 900),
    "masked_by_a_sum": lambda z, t: flat(z + PADDED * -1e9, t % 900),
    "logit_adjustment": lambda z, t: flat(z + PRIOR, t),
    "temperature": lambda z, t: flat(z / 0.7, t),
    "softcap": lambda z, t: flat(30 * torch.tanh(z / 30), t),
    "label_smoother": label_smoother,
    "label_smoothing": label_smoothing,
    "accuracies": accuracies,
    "softmax_and_gather": lambda z, t: -entry(z.softmax(-1), t).log().mean(),
    "one_hot": lambda z, t: -(F.log_softmax(z, -1) * F.one_hot(t, V)).sum(-1).mean(),
    "one_hot_of_floats": lambda z, t: -(F.one_hot(t, V).to(z.dtype) * z.log_softmax(-1)).sum(-1).mean(),
    "mixture": mixture,
    "poly": poly,
    "categorical": categorical,
    "centred": centred,
    "centred_on_the_mean": lambda z, t: flat(z - z.mean(-1, keepdim=True), t),
    "written_out": written_out,
    "exponentials": lambda z, t: (z.exp().sum(-1).log() - entry(z, t)).mean(),
    "normalised": normalised,
    "less_log_sum_exp": lambda z, t: -entry(z - z.logsumexp(-1, keepdim=True), t).mean(),
    "less_view_of_log_sum_exp": lambda z, t: -(z - z.logsumexp(-1)[..., None]).gather(-1, t[..., None]).mean(),
    "z_loss": lambda z, t: flat(z, t) + 1e-4 * z.logsumexp(-1).square().mean(),
    "focal": lambda z, t: (lambda log_p: (-((1 - log_p.exp()) ** 2) * log_p).mean())(entry(z.log_softmax(-1), t)),
    "rows_and_classes": lambda z, t: -z.flatten(0, 1).log_softmax(-1)[ROWS, t.flatten()].mean(),
    "some_rows_and_classes": lambda z, t: z.flatten(0, 1).log_softmax(-1)[ROWS[3:9], t.flatten()[3:9]].mean(),
    "chosen_rows": lambda z, t: F.cross_entropy(z[t > 100], t[t > 100]),
    "entropy": lambda z, t: flat(z, t) + (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "entropy_of_logarithms": lambda z, t: (lambda p: flat(z, t) + (p * p.log()).sum(-1).mean())(z.softmax(-1)),
    "unlikelihood": lambda z, t: -(1 - entry(z.softmax(-1), t)).clamp(min=1e-5).log().mean(),
    "policy_gradient": policy_gradient,
    "rank": lambda z, t: flat(z, t) + (z > z.gather(-1, t[..., None])).sum(-1).float().mean(),
    "hardest": lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten(), reduction="none").topk(10).values.mean(),
    "transposed": lambda z, t: flat(z.transpose(0, 1).contiguous(), t.t()),
}

X = torch.randn(B, S, D, generator=torch.Generator().manual_seed(1))
T = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(2))


def step(model: nn.Module, run: Any, loss: Callable[[Any, Tensor], Tensor]) -> list[Tensor]:
    value = loss(run(X.to(model.head.weight.dtype)), T)
    return [value.detach(), *torch.autograd.grad(value, [p for p in model.parameters() if p.dim()])]


def in_eager_mode(model: nn.Module, loss: Callable[[Any, Tensor], Tensor]) -> list[Tensor]:
    return step(model, model, loss)


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="cce", options={**FUSE_ALL, **options})


@pytest.mark.parametrize("name", LOSSES)
def test_no_logits_are_needed(name: str) -> None:
    loss = LOSSES[name]
    expected, exact = in_eager_mode(Model(), loss), in_eager_mode(Model().double(), loss)
    model = Model()
    run = compiled(model)
    for _ in range(2):  # the second step takes the graphs of the first
        counters["cce_inductor"].clear()
        got = step(model, run, loss)
        assert counters["cce_inductor"]["deferred_materialized"] == 0
        for g, e, x in zip(got, expected, exact, strict=True):
            off, theirs = ((t.double() - x).norm() / x.norm() for t in (g, e))
            assert off <= 1.25 * theirs + 8 * torch.finfo(torch.float32).eps, f"off by {off:.2e}, eager {theirs:.2e}"


def test_a_learned_temperature_has_its_gradient() -> None:
    for loss in (lambda z, s: flat(z / s, T), lambda z, s: entry(z * s.exp(), T).mean() - (z * s).logsumexp(-1).mean()):
        made = []
        for ours in (False, True):
            model = Model()
            counters["cce_inductor"].clear()
            z = (compiled(model) if ours else model)(X)
            made.append(torch.autograd.grad(loss(z, model.temperature), [*model.parameters()]))
            assert counters["cce_inductor"]["deferred_materialized"] == 0
        for one, other in zip(*made, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------- what was recorded, and what came after


def edit_the_bias(z: Any, t: Tensor) -> Tensor:
    bias = torch.linspace(0, 1, V)
    y = z + bias
    bias.mul_(100)
    return flat(y, t)


def edit_the_bias_unseen(z: Any, t: Tensor) -> Tensor:
    bias = torch.linspace(0, 1, V)
    y = z + bias
    bias.data.mul_(100)
    return flat(y, t)


def edit_the_one_hot(z: Any, t: Tensor) -> Tensor:
    q = F.one_hot(t, V).float()
    y = q * z.detach().log_softmax(-1)
    q.zero_()
    return flat(z, t) - y.sum(-1).mean()


def edit_the_statistic(z: Any, t: Tensor) -> Tensor:
    lse = z.logsumexp(-1, keepdim=True)
    with torch.no_grad():
        lse = lse.clone()
        lse += 1
    return -entry(z - lse, t).mean()


def edit_the_statistic_in_place(z: Any, t: Tensor) -> Tensor:
    with torch.no_grad():
        most = z.amax(-1, keepdim=True)
        most.mul_(0.5)
    return entry(z - most, t).mean()


def edit_the_logits(z: Any, t: Tensor) -> Tensor:
    y = z / 2
    z.mul_(3)
    return flat(y, t) + flat(z, t)


def nearly_one_hot(z: Any, t: Tensor) -> Tensor:
    q = F.one_hot(t, V).float()
    q[1, 3] *= 0.5
    return -(q * z.log_softmax(-1)).sum(-1).mean()


def detached_statistic(z: Any, t: Tensor) -> Tensor:
    return -entry(z - z.detach().logsumexp(-1, keepdim=True), t).mean()


def entries_that_are_compared(z: Any, t: Tensor) -> Tensor:
    own = z.gather(-1, t[..., None])
    worse = (z.sort(-1).values >= own).sum(-1)  # a read, where its own entry must be found
    return flat(z, t) + worse.float().mean()


def entries_of_rows_that_are_compared(z: Any, t: Tensor) -> Tensor:
    y, rows = z.flatten(0, 1), ROWS.flip(0)
    own = y[rows, t.flatten()[rows]]
    return flat(z, t) + (y.sort(-1).values[rows] >= own[:, None]).sum(-1).float().mean()


def entries_of_expanded_rows_that_are_compared(z: Any, t: Tensor) -> Tensor:
    y = z[None].expand(2, -1, -1, -1)
    own = y.gather(-1, torch.stack([t, t.flip(0)])[..., None])
    return flat(z, t) + (y.sort(-1).values >= own).sum(-1).float().mean()


def rows_and_classes_that_count_from_the_end(z: Any, t: Tensor) -> Tensor:
    y, classes = z.flatten(0, 1), t.flatten()
    own = y[ROWS, classes - V] + y[-1 - ROWS, classes.flip(0)]
    return own.mean() + (y.sort(-1).values >= own[:, None]).sum(-1).float().mean()


AFTERWARDS = (
    edit_the_bias, edit_the_bias_unseen, edit_the_one_hot, edit_the_statistic, edit_the_statistic_in_place,
    edit_the_logits, nearly_one_hot, detached_statistic, entries_that_are_compared, entries_of_rows_that_are_compared,
    entries_of_expanded_rows_that_are_compared, rows_and_classes_that_count_from_the_end,
)  # fmt: skip


@pytest.mark.parametrize("loss", AFTERWARDS, ids=lambda loss: loss.__name__)
def test_what_was_recorded_is_as_it_was_then(loss: Callable) -> None:
    expected = in_eager_mode(Model(), loss)
    model = Model()
    for g, e in zip(step(model, compiled(model), loss), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


def test_a_factor_that_is_another_number_each_step_makes_no_graph_each_step() -> None:
    """Temperatures that are annealed: after a few, the logits are read."""
    model = Model()
    run = compiled(model)
    counters["cce_inductor"].clear()
    for i in range(20):
        z = run(X)
        torch.testing.assert_close((z / (1 + i)).logsumexp(-1), (model(X) / (1 + i)).logsumexp(-1))
    assert counters["cce_inductor"]["statistics"] <= 8 and counters["cce_inductor"]["deferred_materialized"] >= 12
