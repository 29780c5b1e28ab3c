"""Losses against mixtures of one-hot tensors, and over the logits of several heads in one tensor."""

import pytest
import torch
import torch.nn.functional as F
from capture import assert_same_as_eager, graphs_of, text
from torch._dynamo.utils import counters

from cce_inductor import config
from cce_inductor.rewrite.run import rewrite

B, S, D, V, FEW = 2, 6, 8, 40, 5
N = B * S


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(*shape):
    return torch.randn(shape).requires_grad_()


def labels(*shape, classes=V, ignored=True):
    t = torch.randint(0, classes, shape)
    if ignored:
        t.view(-1)[:2] = -100
    return t


def ce(z, t, **kwargs):
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), t.reshape(-1), **kwargs)


def log_probability(z, t):
    return z.log_softmax(-1).gather(-1, t.clamp(min=0)[..., None]).squeeze(-1)


# ---- mixtures: of the logits z (N, V), two targets a and b, weights of the rows r (N, 1)


def hot(t):
    return F.one_hot(t, V)


def timm_mixup(a, b, lam, smoothing):
    off, on = smoothing / V, 1 - smoothing + smoothing / V

    def one(t):
        t = t.long().view(-1, 1)
        return torch.full((t.size()[0], V), off).scatter_(1, t, on)

    return one(a) * lam + one(b) * (1.0 - lam)


def filled(q, logp, t):
    q.fill_(0.1 / (V - 1))
    q.scatter_(1, t.unsqueeze(1), 0.9)
    return -(q * logp).sum(dim=1).mean()


def smoothed_in_place(z, t, r):
    q = torch.zeros_like(z).scatter_(1, t.unsqueeze(1), 1.0)
    return -(q * z.log_softmax(-1)).sum(dim=1).mean()


def entries_of_kl(z, t):
    """As WeNet smooths: a filled tensor of the logits' shape, and one number at the target."""
    q = torch.zeros_like(z).fill_(0.1 / (V - 1)).scatter_(1, t.unsqueeze(1), 0.9)
    return F.kl_div(z.log_softmax(dim=1), q, reduction="none")


MIXTURES = {
    "probabilities": lambda z, a, b, r: F.cross_entropy(z, 0.25 * hot(a) + 0.75 * hot(b)),
    "smoothed by hand": lambda z, a, b, r: F.cross_entropy(z, hot(a) * 0.9 + 0.1 / V),
    "and smoothed again, summed": lambda z, a, b, r: F.cross_entropy(
        z, r * hot(a) + (1 - r) * hot(b), label_smoothing=0.1, reduction="sum"
    ),
    "one loss a row": lambda z, a, b, r: (
        F.cross_entropy(z, 0.3 * hot(a) + 0.7 * hot(b), reduction="none") * r[:, 0]
    ).sum(),
    "of another shape": lambda z, a, b, r: F.cross_entropy(
        z, 0.5 * hot(a.view(B, S)).view(-1, V) + 0.5 * hot(b.view(B, S)).flatten(0, 1).float()
    ),
    "timm": lambda z, a, b, r: torch.sum(-timm_mixup(a, b, 0.7, 0.1) * F.log_softmax(z, dim=-1), dim=-1).mean(),
    "a product": lambda z, a, b, r: -((hot(a) * r - hot(b) / 3) * z.log_softmax(-1)).sum(-1).mean(),
    "a product, its mean": lambda z, a, b, r: -2 * (z.log_softmax(-1) * (0.2 * hot(a) + 0.8 * hot(b))).mean(),
    "a product with the logits": lambda z, a, b, r: (
        z.logsumexp(-1) - (z * (0.2 * hot(a) + 0.8 * hot(b))).sum(-1)
    ).mean(),
    "scattered": lambda z, a, b, r: smoothed_in_place(z, a, r),
    "a filled tensor": lambda z, a, b, r: filled(torch.zeros_like(z := z.log_softmax(-1)), z, a),
    "a filled copy": lambda z, a, b, r: filled(z.data.clone(), z.log_softmax(-1), a),
    "kl_div": lambda z, a, b, r: F.kl_div(z.log_softmax(-1), 0.9 * hot(a) + 0.1 / V, reduction="batchmean"),
    "kl_div, of every row": lambda z, a, b, r: F.kl_div(z.log_softmax(-1), r.detach() * hot(a), reduction="sum"),
    "kl_div of each entry, summed": lambda z, a, b, r: entries_of_kl(z, a).sum(),
    "kl_div of each entry, averaged": lambda z, a, b, r: 30 * entries_of_kl(z, a).mean(),
    "kl_div of each entry, by row": lambda z, a, b, r: (entries_of_kl(z, a).sum(-1) * r[:, 0]).mean(),
    "kl_div of each entry, kept": lambda z, a, b, r: (entries_of_kl(z, a).mean(-1, keepdim=True) * r).sum(),
    "kl_div of each entry, rows masked": lambda z, a, b, r: (
        entries_of_kl(z, a).masked_fill((b % 3 == 0).unsqueeze(1), 0).sum() / (b % 3 != 0).sum()
    ),
    "kl_div of each entry, rows weighed": lambda z, a, b, r: (2 * entries_of_kl(z, a) * r / r.sum()).sum(1).sum(),
    "kl_div, plain": lambda z, a, b, r: F.kl_div(z.log_softmax(-1), hot(a).type_as(z), reduction="mean"),
    "lerp": lambda z, a, b, r: F.cross_entropy(z, torch.lerp(hot(a).float(), hot(b).float(), 0.3).to(z.dtype)),
    "in their dtype": lambda z, a, b, r: -((0.3 * hot(a) + 0.7 * hot(b)).to(z) * z.log_softmax(-1)).sum(-1).mean(),
    "cutmix": lambda z, a, b, r: F.cross_entropy(
        3 * torch.tanh(z / 3), (m := r.mean().detach()) * hot(a) + (1 - m) * hot(b)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name, dtype):
    r = torch.rand(N, 1).to(dtype).requires_grad_()

    def fn(h, w, r, a, b):
        return MIXTURES[name](F.linear(h, w), a, b, r)

    h, w = (rand(*s).detach().to(dtype).requires_grad_() for s in ((N, D), (V, D)))
    inputs = h, w, r, labels(N, ignored=False), labels(N, ignored=False)
    assert_same_as_eager(fn, inputs, fused=1, tolerance=1e-5 if dtype == torch.float32 else 3e-2)


def test_a_mixture_of_symbolic_size():
    def fn(h, w, a, b):
        return F.cross_entropy(F.linear(h, w), 0.25 * hot(a) + 0.75 * hot(b))

    inputs = rand(N, D), rand(V, D), labels(N, ignored=False), labels(N, ignored=False)
    assert_same_as_eager(fn, inputs, fused=1, dynamic=True)


def edited(a, b):
    q = 0.25 * hot(a) + 0.75 * hot(b)
    q[:, 3:6] = 0.1
    return q


def read_before_filled(q, z, t):
    best = q.amax(-1, keepdim=True)
    return F.cross_entropy(z, q.fill_(0.1).scatter_(1, t[:, None], 0.9)) + (best * q).sum()


def edited_weights(a, b, r):
    q = r * hot(a) + hot(b)
    r.mul_(2)
    return q


NO_MIXTURES = {
    "written into": lambda z, a, b, r: F.cross_entropy(z, edited(a, b)),
    "of weights that are written into": lambda z, a, b, r: F.cross_entropy(z, edited_weights(a, b, r.detach() * 1)),
    "filled after it was read": lambda z, a, b, r: read_before_filled(z.data.clone(), z, a),
    "kl_div of two": lambda z, a, b, r: F.kl_div(z.log_softmax(-1), 0.4 * hot(a) + 0.6 * hot(b), reduction="sum"),
    "kl_div of logarithms": lambda z, a, b, r: F.kl_div(
        z.log_softmax(-1), 0.9 * hot(a) + 0.1, reduction="sum", log_target=True
    ),
    "times a column": lambda z, a, b, r: F.cross_entropy(z, hot(a) * torch.linspace(0, 1, V)),
    "a product of two": lambda z, a, b, r: F.cross_entropy(z, 0.5 * hot(a) * hot(b).float()),
    "with noise": lambda z, a, b, r: F.cross_entropy(z, 0.5 * hot(a) + torch.linspace(0, 1, N * V).view(N, V)),
    "of rows in another order": lambda z, a, b, r: F.cross_entropy(z, 0.5 * hot(a).flip(0) + 0.5 * hot(b)),
    "scattered over rows": lambda z, a, b, r: F.cross_entropy(z, torch.zeros(N, V).scatter(0, a[None] % N, 0.5)),
    "scattered twice": lambda z, a, b, r: F.cross_entropy(
        z, torch.zeros(N, V).scatter(1, a[:, None], 0.5).scatter(1, b[:, None], 0.5)
    ),
}


@pytest.mark.parametrize("name", NO_MIXTURES)
def test_what_is_no_mixture(name):
    def fn(h, w, r, a, b):
        return NO_MIXTURES[name](F.linear(h, w), a, b, r)

    inputs = rand(N, D), rand(V, D), torch.rand(N, 1).requires_grad_(), *(labels(N, ignored=False) for _ in "ab")
    assert_same_as_eager(fn, inputs, fused=0)


# ---- several heads: over (h, w, w2, few, b) and targets t (B, S), both (B, S, 2) and wide (B, S), of V + FEW classes


def wide(h, w, few, b):
    return torch.cat([F.linear(h, w, b), h.tanh() @ few.t()], dim=-1)


def two(h, w, w2, dim):
    return torch.stack([F.linear(h, w), F.linear(h, w2)], dim)


def half(labels):
    """Of classes of half the vocabulary."""
    return torch.where(labels < 0, labels, labels % (V // 2))


VOCABULARIES = {
    "cross_entropy": lambda h, w, w2, few, b, t, both, more: ce(wide(h, w, few, b), more),
    "in the middle": lambda h, w, w2, few, b, t, both, more: F.cross_entropy(
        torch.cat([F.linear(h, w).mT, F.linear(h, few).mT], 1), more
    ),
    "of three, capped": lambda h, w, w2, few, b, t, both, more: ce(
        4 * torch.tanh(torch.cat([F.linear(h, few), F.linear(h, w[FEW:]), F.linear(h, few) * 2], -1) / 4), more
    ),
    "a bias over all": lambda h, w, w2, few, b, t, both, more: ce(
        torch.cat([F.linear(h, w), F.linear(h, few)], -1) + torch.cat([b, b[:FEW]]), more
    ),
    "smoothed": lambda h, w, w2, few, b, t, both, more: ce(wide(h, w, few, b).float(), more, label_smoothing=0.1),
    "weighted": lambda h, w, w2, few, b, t, both, more: ce(
        wide(h, w, few, b), more, weight=torch.cat([b.abs(), b[:FEW].abs()]).detach()
    ),
    "shifted rows": lambda h, w, w2, few, b, t, both, more: ce(wide(h, w, few, b)[:, :-1], more[:, 1:]),
    "nll_loss": lambda h, w, w2, few, b, t, both, more: F.nll_loss(
        wide(h, w, few, b).log_softmax(-1).flatten(0, 1), more.flatten(), reduction="sum"
    ),
    "log-probabilities": lambda h, w, w2, few, b, t, both, more: (
        -log_probability(wide(h, w, few, b), more).exp().mean()
    ),
    "z-loss": lambda h, w, w2, few, b, t, both, more: (
        ce(z := wide(h, w, few, b), more) + 1e-2 * z.logsumexp(-1).square().mean()
    ),
    "advanced index": lambda h, w, w2, few, b, t, both, more: (
        -(wide(h, w, few, b).log_softmax(-1).view(N, -1)[torch.arange(N), more.clamp(min=0).view(-1)]).mean()
    ),
    "a mixture": lambda h, w, w2, few, b, t, both, more: F.cross_entropy(
        wide(h, w, few, b).view(N, -1), 0.5 * F.one_hot(more.clamp(min=0).view(-1), V + FEW) + 0.5 / (V + FEW)
    ),
    "stacked": lambda h, w, w2, few, b, t, both, more: ce(two(h, w, w2, 2), both),
    "stacked in front": lambda h, w, w2, few, b, t, both, more: ce(two(h, w, w2, 0), both.permute(2, 0, 1)),
    "stacked, permuted": lambda h, w, w2, few, b, t, both, more: F.cross_entropy(
        two(h, w, w2, 1).permute(0, 3, 2, 1), both, reduction="none"
    ).mean(),
    "stacked, scaled and shifted": lambda h, w, w2, few, b, t, both, more: ce(
        (0.5 * two(h, w, w2, 2) + b)[:, :-1], both[:, 1:], label_smoothing=0.1
    ),
    "stacked, one of them": lambda h, w, w2, few, b, t, both, more: ce(two(h, w, w2, 2)[:, :, 1], t),
    "stacked, a last row": lambda h, w, w2, few, b, t, both, more: ce(
        two(h, w, w2, 2)[:, -1], both[:, -1].clamp(min=0)
    ),
    "stacked, one after the other": lambda h, w, w2, few, b, t, both, more: sum(
        ce(z, both[:, :, k]) for k, z in enumerate(two(h, w, w2, 1).unbind(1))
    ),
    "rows of two heads": lambda h, w, w2, few, b, t, both, more: ce(
        torch.cat([F.linear(h, w), F.linear(h, w2)], 1), torch.cat([t, t.flip(0)], 1)
    ),
    "rows of different scales": lambda h, w, w2, few, b, t, both, more: ce(
        torch.cat([(z := F.linear(h, w))[:, :2], 0.5 * z[:, 2:]], 1), t
    ),
    "codebooks in one weight": lambda h, w, w2, few, b, t, both, more: ce(
        F.linear(h, w, b).view(B, S, 2, V // 2), half(both)
    ),
    "codebooks in one weight, flat": lambda h, w, w2, few, b, t, both, more: F.cross_entropy(
        (0.5 * F.linear(h, w)).reshape(-1, V // 2), half(both).flatten()
    ),
    "codebooks in one weight, one by one": lambda h, w, w2, few, b, t, both, more: sum(
        ce(z, half(both[:, :, k])) for k, z in enumerate(F.linear(h, w).unflatten(-1, (2, -1)).unbind(2))
    ),
}
SEVERAL_SITES = {"stacked, one after the other": 2, "codebooks in one weight, one by one": 2}


def inputs():
    tensors = rand(B, S, D), rand(V, D), rand(V, D), rand(FEW, D), rand(V)
    return *tensors, labels(B, S), labels(B, S, 2), labels(B, S, classes=V + FEW)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_several_heads(name):
    assert_same_as_eager(VOCABULARIES[name], inputs(), fused=SEVERAL_SITES.get(name, 1), tolerance=2e-5)


def rewritten(fn, *given):
    return rewrite(graphs_of(fn, *given)[-1], config.Settings(min_vocab=0), "v")


@pytest.mark.parametrize("name", ["cross_entropy", "stacked, one after the other"])
def test_no_logits_are_left(name):
    made = text(rewritten(VOCABULARIES[name], *inputs()).graph_module)
    assert "linear_statistics" in made
    assert " linear(" not in made and "stack(" not in made and "matmul(" not in made


def test_each_head_is_computed_once():
    """The log-sum-exp and the target's logit of a head come from one operator."""
    nodes = rewritten(VOCABULARIES["z-loss"], *inputs()).graph_module.graph.nodes
    assert len([n for n in nodes if "linear_statistics" in str(n.target)]) == 2


def test_concatenated_logits_are_deferred():
    def fn(h, w, few, b, more):
        z = wide(h, w, few, b)
        return ce(z[:, 1:], more[:, 1:]), z[..., 1:] * 2

    given = rand(B, S, D), rand(V, D), rand(FEW, D), rand(V), labels(B, S, classes=V + FEW)
    assert_same_as_eager(fn, given, fused=1, deferred=1)

    def whole(h, w, few, b, more):
        z = wide(h, w, few, b)
        return ce(z[:, 1:], more[:, 1:]), z * 2

    torch._dynamo.reset()
    before = counters["cce_inductor"]["deferred_materialized"]
    loss, logits = torch.compile(whole, backend="cce", options={"min_vocab": 0, "compiler": "aot_eager"})(*given)
    assert counters["cce_inductor"]["deferred_materialized"] == before
    assert tuple(logits.shape) == (B, S, V + FEW)
    want_loss, want = whole(*given)
    torch.testing.assert_close((loss, logits + 0), (want_loss, want))
    leaves = given[:4]
    weights = torch.randn_like(want)
    got = torch.autograd.grad(loss + (logits * weights).sum(), leaves)
    for a, b in zip(got, torch.autograd.grad(want_loss + (want * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_head_with_a_loss_of_its_own():
    def fn(h, w, few, t, more):
        z = F.linear(h, w)
        return ce(torch.cat([z, F.linear(h, few)], -1), more) + ce(z, t)

    given = rand(B, S, D), rand(V, D), rand(FEW, D), labels(B, S), labels(B, S, classes=V + FEW)
    assert_same_as_eager(fn, given, fused=2)


def test_a_head_that_is_read_elsewhere_leaves_both_as_they_were():
    def fn(h, w, few, t, more):
        z = F.linear(h, w)
        return ce(torch.cat([z, F.linear(h, few)], -1), more) + ce(z, t) + z.square().mean()

    given = rand(B, S, D), rand(V, D), rand(FEW, D), labels(B, S), labels(B, S, classes=V + FEW)
    (gm,) = graphs_of(fn, *given)
    result = rewrite(gm, config.Settings(min_vocab=0), "v")
    assert result.graph_module is gm
    assert ["square" in site.reason for site in result.sites] == [True, True]


def test_a_weight_written_to_before_the_loss():
    def fn(h, w, few, more):
        h, w = h.detach(), w.detach() * 1
        z = torch.cat([F.linear(h, w), F.linear(h, few)], -1)
        w.zero_()
        return ce(z, more)

    given = rand(B, S, D), rand(V, D), rand(FEW, D), labels(B, S, classes=V + FEW)
    assert_same_as_eager(fn, given, fused=0)
