"""Losses as they are written in training loops, outside the compiled model: none of them needs the logits.

Each is run on the logits of a model that is compiled without it, and on those of the same model in eager mode. What
fuses in a compiled graph fuses here too; tests/rewrite/test_property.py tries programs put together at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture import FUSE_ALL
from torch import Tensor, nn
from torch._dynamo.utils import counters

from cce_inductor import DeferredLogitsError

B, S, D, V = 2, 12, 16, 1000
ROWS = torch.arange(B * S)
PADDED = torch.arange(V) >= 900
PRIOR = torch.linspace(-1, 1, V).log_softmax(0)
POSITIVE = torch.linspace(-1, 1, B * S)[:, None]


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


def smoothed_probabilities(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), (F.one_hot(t, V) * 0.9 + 0.1 / V).flatten(0, 1))


def mixup(z: Tensor, t: Tensor) -> Tensor:
    """As timm has it, of smoothed one-hot tensors; some rows are mixed with their own class."""
    other = torch.where(torch.arange(S) % 3 == 0, t, t.flip(0))
    one, two = (torch.full((B, S, V), 0.1 / V).scatter_(-1, x[..., None], 0.9) for x in (t, other))
    return -(z.log_softmax(-1) * (0.7 * one + 0.3 * two)).sum(-1).mean()


def halves(z: Tensor, t: Tensor) -> Tensor:
    q = 0.5 * F.one_hot(t, V) + 0.5 * F.one_hot(t.flip(1), V)
    return F.cross_entropy(z.flatten(0, 1), q.to(z.dtype).flatten(0, 1))


def margin(z: Tensor, t: Tensor) -> Tensor:
    return flat(3 * (z - 0.3 * F.one_hot(t, V)), t)


def margin_by_where(z: Tensor, t: Tensor) -> Tensor:
    return flat(torch.where(torch.arange(V) == t[..., None], z - 0.3, z), t)


def arcface(z: Tensor, t: Tensor) -> Tensor:
    cosines, own = z / 10, F.one_hot(t, V).to(z.dtype)
    return flat(30 * (own * torch.cos(torch.acos(cosines) + 0.3) + (1.0 - own) * cosines), t)


def monotonic(cosines: Tensor) -> Tensor:
    """An angle larger by 0.3, as far as that is one: where it is not, as much less that it goes on falling."""
    angle = cosines * math.cos(0.3) - torch.sqrt((1.0 - torch.pow(cosines, 2)).clamp(0, 1)) * math.sin(0.3)
    return torch.where(cosines > math.cos(math.pi - 0.3), angle, cosines - math.sin(math.pi - 0.3) * 0.3)


def arcface_that_falls(z: Tensor, t: Tensor) -> Tensor:
    cosines = z / 10
    own = torch.zeros(cosines.size()).scatter_(-1, t[..., None], 1)
    return flat(30 * (own * monotonic(cosines) + (1.0 - own) * cosines), t)


def margin_and_prior(z: Tensor, t: Tensor) -> Tensor:
    return flat((3 * (z - 0.3 * F.one_hot(t, V)) + PRIOR).masked_fill(torch.arange(V) > 998, -torch.inf), t % 998)


def margin_by_scatter(z: Tensor, t: Tensor) -> Tensor:
    return flat(z.scatter(-1, t[..., None], z.gather(-1, t[..., None]) - 0.3), t)


def margin_in_place(z: Tensor, t: Tensor) -> Tensor:
    y = z.flatten(0, 1) * 2
    y[ROWS, t.flatten()] -= 0.3
    return F.cross_entropy(y, t.flatten())


def margin_added_in_place(z: Tensor, t: Tensor) -> Tensor:
    z.scatter_add_(-1, t[..., None], torch.full_like(t[..., None], -0.3, dtype=z.dtype))
    return flat(z, t)


def in_place(edit: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    """A loss of logits that are edited before."""

    def loss(z: Tensor, t: Tensor) -> Tensor:
        edit(z)
        return flat(z, t % 900)

    return loss


def temperature_in_place(z: Tensor) -> None:
    z /= 0.7


def number_in_columns(z: Tensor) -> None:
    z[..., 900:] = -1e4


def mask_in_columns(z: Tensor) -> None:
    z[..., PADDED] = -torch.inf


def masked_twice(z: Tensor) -> None:
    z[..., 900:] = -0.5
    z[..., 950] = -torch.inf
    z.masked_fill_(PADDED & (torch.arange(V) % 2 == 0), 0.25)


def through_a_view(z: Tensor) -> None:
    y = z.view(-1, V)
    y /= 0.7
    y[:, PADDED] = -torch.inf


def copied_before(z: Tensor, t: Tensor) -> Tensor:
    y = z * 0.5
    z.mul_(3.0)
    return flat(y, t) + flat(z, t)


def above_a_number(z: Tensor, t: Tensor) -> Tensor:
    worse = (z.flatten(0, 1) > torch.linspace(-1, 1, B * S)[:, None]).sum(-1)
    return flat(z, t) + worse.float().mean()


def of_a_copy(z: Tensor, t: Tensor) -> Tensor:
    y = z[:, :-1].contiguous().float()
    y.div_(0.7)
    return F.cross_entropy(y.view(-1, V), t[:, 1:].flatten())


def a_number_at_the_target(z: Tensor, t: Tensor) -> Tensor:
    y = z.flatten(0, 1).clone()
    y[ROWS, t.flatten()] = 0.5
    return (y.logsumexp(-1) - z.flatten(0, 1)[ROWS, t.flatten()]).mean()


LOSSES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "masked_fill": lambda z, t: flat(z.masked_fill(PADDED, -torch.inf), t % 900),
    "masked_fill_expanded": lambda z, t: flat(z.masked_fill(PADDED.expand_as(z), -torch.inf), t % 900),
    "temperatures_expanded": lambda z, t: flat(z / (1 + 0.1 * t.float()).unsqueeze(-1).expand_as(z), t),
    "masked_by_where": lambda z, t: flat(torch.where(PADDED, -1e9, z), t % 900),
    "masked_by_a_sum": lambda z, t: flat(z + PADDED * -1e9, t % 900),
    "logit_adjustment": lambda z, t: flat(z + PRIOR, t),
    "logit_adjustment, expanded": lambda z, t: flat(z - torch.broadcast_to(PRIOR, z.shape), t),
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
    "probabilities": lambda z, t: F.cross_entropy(z.flatten(0, 1), F.one_hot(t, V).to(z.dtype).flatten(0, 1)),
    "smoothed_probabilities": smoothed_probabilities,
    "mixup": mixup,
    "kl_div of smoothed targets": lambda z, t: F.kl_div(
        z.log_softmax(-1), F.one_hot(t, V).to(z.dtype) * 0.9 + 0.1 / V, reduction="batchmean"
    ),
    "kl_div of filled targets": lambda z, t: F.kl_div(
        z.log_softmax(-1), torch.zeros_like(z).fill_(0.1 / V).scatter_(-1, t[..., None], 0.9), reduction="sum"
    ),
    "halves": halves,
    "margin": margin,
    "margin_by_where": margin_by_where,
    "margin_by_where_not": lambda z, t: flat(torch.where(torch.arange(V) != t[..., None], z, z - 0.3), t),
    "margin_and_prior": margin_and_prior,
    "arcface": arcface,
    "arcface_that_falls": arcface_that_falls,
    "margin_by_scatter": margin_by_scatter,
    "margin_in_place": margin_in_place,
    "margin_added_in_place": margin_added_in_place,
    "a_number_at_the_target": a_number_at_the_target,
    "a_positive_in_front": lambda z, t: F.cross_entropy(
        torch.cat([POSITIVE, z.flatten(0, 1)], 1) / 0.2, 0 * t.flatten()
    ),
    "a_positive_by_hstack": lambda z, t: F.cross_entropy(torch.hstack((POSITIVE, z.flatten(0, 1))), t.flatten()),
    "the_diagonal_filled": lambda z, t: F.cross_entropy(
        z.flatten(0, 1).clone().fill_diagonal_(-torch.inf), t.flatten() % 900 + 100
    ),
    "temperature_in_place": in_place(temperature_in_place),
    "factor_in_place": in_place(lambda z: z.mul_(torch.tensor(0.5))),
    "bias_in_place": in_place(lambda z: z.add_(PRIOR)),
    "negated_in_place": in_place(lambda z: z.neg_()),
    "centred_in_place": in_place(lambda z: z.sub_(z.detach().amax(-1, keepdim=True))),
    "softcap_in_place": in_place(lambda z: z.div_(30).tanh_()),
    "filled_in_place": in_place(lambda z: z.masked_fill_(PADDED, -1e4)),
    "filled_by_index_in_place": in_place(lambda z: z.index_fill_(-1, torch.arange(900, 1000), -1e4)),
    "number_in_columns": in_place(number_in_columns),
    "mask_in_columns": in_place(mask_in_columns),
    "masked_twice": in_place(masked_twice),
    "through_a_view": in_place(through_a_view),
    "copied_before": copied_before,
    "of_a_copy": of_a_copy,
    "rows_in_another_order": lambda z, t: flat(torch.cat(z.chunk(2)[::-1]).flip(1).roll(2, 1), t),
    "rows_repeated": lambda z, t: flat(z.repeat(2, 1, 1), torch.cat([t, t])),
    "rows_stacked": lambda z, t: flat(torch.stack(z.unbind(1), 1), t),
    "rows_by_index": lambda z, t: flat(z[..., torch.tensor([3, 0, 3]), :], t[:, [3, 0, 3]]),
    "classes_in_another_order": lambda z, t: flat(z[..., torch.arange(V).flip(0)], t),
    "above_a_number": above_a_number,
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


def test_a_positive_beside_the_logits_has_its_gradient() -> None:
    """As in MoCo, where it is made of the same hidden states."""
    model, other = Model(), torch.randn(B, S, D)

    def loss(run: Any) -> Tensor:
        x = X.clone().requires_grad_()
        positive = (x * other).sum(-1).flatten()[:, None]
        value = F.cross_entropy(torch.cat([positive, run(x).flatten(0, 1)], 1) / 0.2, torch.zeros(B * S).long())
        return torch.autograd.grad(value, x)[0]

    counters["cce_inductor"].clear()
    torch.testing.assert_close(loss(compiled(model)), loss(model), rtol=1e-4, atol=1e-5)
    assert counters["cce_inductor"]["deferred_materialized"] == 0


# Logits (rows..., V) that a compiled head returns times numbers of the rows: of (S, D), (V, D) and (S,).
OF_TEMPERATURES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "of each row": lambda x, w, k: x @ w.T / k[:, None],
    "in front of a view": lambda x, w, k: (x @ w.T * k[:, None]).view(4, 3, V),
    "of each position": lambda x, w, k: (x @ w.T).view(4, 3, V) * k[:3].view(1, 3, 1),
    "of each sequence, cut": lambda x, w, k: ((x @ w.T).view(4, 3, V) / k[:4].view(4, 1, 1))[:, 1:],
    "in another order": lambda x, w, k: ((x @ w.T / k[:, None]).flip(0) * k[:, None])[3:],
    "in front of a softcap": lambda x, w, k: 30 * torch.tanh((x @ w.T + PRIOR) / k[:, None] / 30),
    "log-probabilities": lambda x, w, k: (x @ w.T / k[:, None]).log_softmax(-1),
    "computed": lambda x, w, k: x @ w.T * (1 + k.square())[:, None],
}


@pytest.mark.parametrize("apart", [False, True], ids=["eager", "compiled apart"])
@pytest.mark.parametrize("name", OF_TEMPERATURES)
def test_logits_with_factors_of_rows_are_returned(name: str, apart: bool) -> None:
    torch._dynamo.reset()
    head = OF_TEMPERATURES[name]
    given = [torch.randn(S, D).requires_grad_(), torch.randn(V, D).requires_grad_(), torch.rand(S).add(0.5)]
    given[2].requires_grad_()

    def loss(z: Tensor) -> Tensor:
        rows = z[T[0, :S].view(z.shape[:-1]) % 4 != 0] if z.shape[:-1].numel() == S else z.flatten(0, -2)
        return F.cross_entropy(rows, torch.arange(len(rows)))

    run = torch.compile(head, backend="cce", options=FUSE_ALL)
    of_logits = torch.compile(loss, backend="cce", options=FUSE_ALL) if apart else loss
    counters["cce_inductor"].clear()
    got, expected = of_logits(run(*given)), loss(head(*given))
    torch.testing.assert_close(got, expected)
    for g, e in zip(torch.autograd.grad(got, given), torch.autograd.grad(expected, given), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
    counted = counters["cce_inductor"]
    assert counted["deferred"] >= 1 and counted["deferred_materialized"] == 0


def test_temperatures_that_are_edited_before_the_logits_are_read() -> None:
    """As any operand: it is what the logits were computed with that counts."""
    torch._dynamo.reset()
    x, w, k = torch.randn(S, D).requires_grad_(), torch.randn(V, D).requires_grad_(), torch.rand(S)
    z = torch.compile(OF_TEMPERATURES["of each row"], backend="cce", options=FUSE_ALL)(x, w, k)
    k.mul_(2)
    with pytest.raises(DeferredLogitsError, match="read too late"):
        z.sum()


def normalized(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.normalize(x), F.normalize(weight))


# Of cosines, whose arccosine is an angle, and which are clamped to what they are.
OF_COSINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clamped": lambda z, t: F.cross_entropy(30 * z.clamp(-1, 1), t),
    "a margin": lambda z, t: F.cross_entropy(30 * (z.clamp(-1, 1) - 0.3 * F.one_hot(t, V)), t),
    "angles": lambda z, t: F.cross_entropy(
        30 * torch.cos(torch.acos(z.clamp(-1 + 1e-7, 1 - 1e-7)) + 0.3 * F.one_hot(t, V)), t
    ),
}


@pytest.mark.parametrize("apart", [False, True], ids=["eager", "compiled apart"])
@pytest.mark.parametrize("name", OF_COSINES)
@pytest.mark.parametrize("head", [normalized, lambda x, w: normalized(x, w).clip(-1, 1)], ids=["", "clipped"])
def test_no_cosines_are_needed(head: Callable[[Tensor, Tensor], Tensor], name: str, apart: bool) -> None:
    torch._dynamo.reset()
    x, w = (torch.randn(n, D, dtype=torch.float64).requires_grad_() for n in (S, V))
    t = T.flatten()[:S]
    run = torch.compile(head, backend="cce", options=FUSE_ALL)
    loss = torch.compile(OF_COSINES[name], backend="cce", options=FUSE_ALL) if apart else OF_COSINES[name]
    counters["cce_inductor"].clear()
    got, expected = loss(run(x, w), t), OF_COSINES[name](head(x, w), t)
    torch.testing.assert_close(got, expected)
    for g, e in zip(torch.autograd.grad(got, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True):
        torch.testing.assert_close(g, e)
    assert counters["cce_inductor"]["deferred"] == 1 and counters["cce_inductor"]["deferred_materialized"] == 0


def test_the_sum_of_all_entries_is_no_sum_of_a_row() -> None:
    square = torch.arange(24) % V
    for loss in (
        lambda z: F.cross_entropy(z.flatten(0, 1)[:, :24] * 10 / z.flatten(0, 1)[:, :24].sum(), square),
        lambda z: (z - z.sum()).logsumexp(-1).mean() + (z - z.amax()).logsumexp(-1).mean(),
    ):
        torch.testing.assert_close(loss(compiled(Model())(X)), loss(Model()(X)))


def test_an_edit_beside_what_was_made_before_it() -> None:
    made: list[Callable[[Any], Any]] = [
        lambda z: z.log_softmax(-1), lambda z: z.clone(), lambda z: z + 1, lambda z: z.logsumexp(-1, keepdim=True)
    ]  # fmt: skip
    for before in made:

        def difference(z: Tensor, before: Callable = before) -> Tensor:
            known = before(z)
            z.mul_(2.0)
            return (z - known).exp().mean()

        torch.testing.assert_close(difference(compiled(Model())(X)), difference(Model()(X)))


def test_a_learned_bias_that_is_expanded_has_its_gradient() -> None:
    made = []
    for ours in (False, True):
        model, prior = Model(), PRIOR.clone().requires_grad_()
        counters["cce_inductor"].clear()
        z = (compiled(model) if ours else model)(X)
        made.append(torch.autograd.grad(flat(z + prior.expand_as(z), T), [*model.head.parameters(), prior]))
        assert counters["cce_inductor"]["deferred_materialized"] == 0
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


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


def edit_without_gradients(z: Any, t: Tensor) -> Tensor:
    with torch.no_grad():
        z.mul_(3.0)
    return flat(z, t)


def edit_a_detached_alias(z: Any, t: Tensor) -> Tensor:
    z.detach().mul_(3.0)
    return flat(z, t)


def edit_beside_a_detached_alias(z: Any, t: Tensor) -> Tensor:
    y = z.detach()
    z.mul_(3.0)
    return flat(z, t) + y.logsumexp(-1).mean() * z.mean()


def edit_beside_views(z: Any, t: Tensor) -> Tensor:
    y, rows = z[:, 1:], z.view(-1, V)
    z.mul_(3.0)
    y[..., PADDED] = -1.0
    return flat(y, t[:, 1:]) + F.cross_entropy(rows, t.flatten())


def edit_a_few_rows(z: Any, t: Tensor) -> Tensor:
    z[:, 2:4] *= 2.0
    return flat(z, t)


def edit_all_columns(z: Any, t: Tensor) -> Tensor:
    y = z * 1
    z[..., :] = 0.5
    return flat(z, t) + flat(y, t)


def edit_after_the_loss(z: Any, t: Tensor) -> Tensor:
    loss = F.nll_loss((z * 2).flatten(0, 1).log_softmax(-1), t.flatten())
    z.mul_(3.0)
    return loss + z.logsumexp(-1).mean()


def edit_the_targets(z: Any, t: Tensor) -> Tensor:
    t = t.clone()
    y = z - 0.3 * F.one_hot(t, V)
    t.add_(1).remainder_(V)
    return flat(y, t)


def ask_again_after_an_edit(z: Any, t: Tensor) -> Tensor:
    with torch.no_grad():
        one = z.logsumexp(-1)
        one += 1.0
        two = z.logsumexp(-1)
    own = entry(z, t)
    own *= 2.0
    return own.mean() + entry(z, t).mean() + (one * two).mean() * z.mean()


def two_margins(z: Any, t: Tensor) -> Tensor:
    return margin(z, t) + 2 * margin(z, (t + 1) % V)


AFTERWARDS = (
    edit_without_gradients, edit_a_detached_alias, edit_beside_a_detached_alias, edit_beside_views, edit_a_few_rows,
    edit_all_columns, edit_after_the_loss, edit_the_targets, ask_again_after_an_edit,
    two_margins,
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
