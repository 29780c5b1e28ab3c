"""Products of logits' functions that are summed at once, or written in another op's name: eager's numbers, fused."""

import pytest
import torch
import torch.nn.functional as F
from capture import assert_same_as_eager, graphs_of
from test_compared_heads import N, V, operands

from cce_inductor import config
from cce_inductor.rewrite.run import rewrite


def mixed(r, t):
    return 0.3 * F.one_hot(t, V) + 0.7 * r.softmax(-1)


def mixture(z, r):
    return 0.4 * z.softmax(-1) + 0.6 * r.softmax(-1)


def edited(p):
    p /= 1.0 + p.sum(-1, keepdim=True)
    return p.square().sum()


def log_of_quotient(z, r):
    q = r.softmax(-1)
    return (q * (q / z.softmax(-1)).log()).sum(-1).mean()


def estimated(z, r, t):
    """The k3 estimate of a divergence, of the target alone (http://joschu.net/blog/kl-approx.html)."""
    d = (r.log_softmax(-1) - z.log_softmax(-1)).gather(-1, t[:, None])[:, 0]
    return (d.exp() - d - 1).mean()


# Of the logits of two heads, and classes.
FUSED = {
    "einsum": lambda z, r, t: -torch.einsum("nv,nv->n", r.softmax(-1), z.log_softmax(-1)).mean(),
    "einsum, any rows": lambda z, r, t: torch.einsum("...v,...v->...", [z.softmax(-1), r.softmax(-1).log()]).sum(),
    "einsum, three dimensions": lambda z, r, t: torch.einsum(
        "bsv, bsv -> bs", r.view(3, 4, V).softmax(-1), z.view(3, 4, V)
    ).mean(),
    "vecdot": lambda z, r, t: -torch.linalg.vecdot(r.softmax(-1), z.log_softmax(-1)).mean(),
    "bmm": lambda z, r, t: -torch.bmm(r.softmax(-1)[:, None], z.log_softmax(-1)[:, :, None]).mean(),
    "@": lambda z, r, t: (z.softmax(-1).unsqueeze(-2) @ r.unsqueeze(-1)).squeeze(-1).squeeze(-1),
    "xlogy": lambda z, r, t: (torch.xlogy(q := r.softmax(-1), q) - q * z.log_softmax(-1)).sum(-1).mean(),
    "xlogy of two": lambda z, r, t: -torch.special.xlogy(r.softmax(-1), z.softmax(-1)).sum(-1).mean(),
    "a logarithm of a quotient": lambda z, r, t: log_of_quotient(z, r),
    "an estimate": lambda z, r, t: estimated(z, r, t),
    "one-hot tensors and probabilities": lambda z, r, t: F.cross_entropy(z, mixed(r, t)),
    "... of every row": lambda z, r, t: F.cross_entropy(z, mixed(r, t).detach(), reduction="none"),
    "... times log-probabilities": lambda z, r, t: -(mixed(r, t) * z.log_softmax(-1)).sum(-1).mean(),
    "... negated, scaled, over all": lambda z, r, t: (2 * -mixed(r, t) * z.log_softmax(-1) / N).sum(),
    "a mixture": lambda z, r, t: -mixture(z, r).log().gather(-1, t[:, None]).mean(),
    "a mixture, nll_loss": lambda z, r, t: F.nll_loss(mixture(z, r).log(), torch.where(t % 3 == 0, -100, t)),
    "a mixture, of every row": lambda z, r, t: F.nll_loss(mixture(z, r).log(), t, reduction="none"),
    "... by lerp": lambda z, r, t: F.cross_entropy(z, torch.lerp(r.softmax(-1), F.one_hot(t, V).to(z.dtype), 0.3)),
    "lerp of two": lambda z, r, t: -(z.softmax(-1).lerp(r.softmax(-1), 0.2) * r.log_softmax(-1)).sum(-1).mean(),
    "... a mean": lambda z, r, t: -(z.log_softmax(-1) * mixed(r, t)).mean(-1).sum(),
}
ALONE = {
    "the largest probability": lambda z, t: F.cross_entropy(z, t) + z.softmax(-1).max(-1).values.mean(),
    "the largest logarithm of a probability": lambda z, t: (
        F.cross_entropy(z, t) + (0.5 * z.log_softmax(-1)).amax(-1, keepdim=True).sum()
    ),
    "the largest probabilities, edited": lambda z, t: F.cross_entropy(z, t) + edited(z.softmax(-1).topk(1).values),
    "entropy by entr": lambda z, t: torch.special.entr(z.softmax(-1)).sum(-1).mean(),
    "entropy by xlogy": lambda z, t: -torch.xlogy(p := z.softmax(-1), p).sum(-1).mean(),
    "entropy by einsum": lambda z, t: -torch.einsum("nv,nv->n", z.softmax(-1), z.log_softmax(-1)).mean(),
    "targets by einsum": lambda z, t: -torch.einsum("nv,nv->n", F.one_hot(t, V).float(), z.log_softmax(-1)).mean(),
    "targets by vecdot": lambda z, t: -torch.linalg.vecdot(F.one_hot(t, V).float(), z.log_softmax(-1)).sum(),
}


@pytest.mark.parametrize("name", FUSED)
def test_two_heads(name):
    def fn(x, w, y, u, t):
        return FUSED[name](F.linear(x, w), F.linear(y, u), t)

    x, w, y, u, _, t = operands()
    result = rewrite(graphs_of(fn, x, w, y, u, t)[-1], config.Settings(min_vocab=0), "v")
    assert result.sites and all(site.fused for site in result.sites), result.sites
    assert_same_as_eager(fn, (x, w, y, u, t), fused=len(result.sites), tolerance=2e-5)


@pytest.mark.parametrize("name", ALONE)
def test_one_head(name):
    x, w, _, _, _, t = operands()
    assert_same_as_eager(lambda x, w, t: ALONE[name](F.linear(x, w), t), (x, w, t), fused=1, tolerance=2e-5)


def test_symbolic_rows():
    for name in ("einsum", "bmm", "one-hot tensors and probabilities"):
        loss = FUSED[name]
        fn = lambda x, w, y, u, t, loss=loss: loss(F.linear(x, w), F.linear(y, u), t)  # noqa: E731
        x, w, y, u, _, t = operands()
        assert_same_as_eager(fn, (x, w, y, u, t), fused=1, tolerance=2e-5, dynamic=True)


# The loss, and a part of the reason.
REFUSED = {
    "a quotient": (lambda z, r, t: (z.softmax(-1) / r.softmax(-1)).square().mean(), "of probabilities over probab"),
    "squares of targets": (lambda z, r, t: (mixed(r, t) - z.softmax(-1)).square().mean(), "of one-hot tensors and"),
    "smoothed": (lambda z, r, t: F.cross_entropy(z, mixed(r, t), label_smoothing=0.1), "of one-hot tensors and"),
    "targets of kl_div": (lambda z, r, t: F.kl_div(z.log_softmax(-1), mixed(r, t)), "of one-hot tensors and"),
    "a mixture's mean": (lambda z, r, t: mixture(z, r).log().mean(), "the logarithm of a mixture"),
    "a mixture with class weights": (
        lambda z, r, t: F.nll_loss(mixture(z, r).log(), t, torch.rand(V)),
        "the logarithm of a mixture",
    ),
    "a matrix of products": (lambda z, r, t: torch.einsum("nv,mv->nm", z.softmax(-1), r).mean(), "einsum"),
    "a product of probabilities": (
        lambda z, r, t: torch.einsum("nv,nv->n", z.softmax(-1), r.softmax(-1)).mean(),
        "",
    ),
    "a mixture by tensors": (
        lambda z, r, t: z.softmax(-1).lerp(r.softmax(-1), torch.rand(N, V)).log().mean(),
        "lerp",
    ),
    "a chain that sums rows": (
        lambda z, r, t: torch.einsum("nv,vd,nd->d", z.softmax(-1), torch.rand(V, 3), torch.rand(N, 3)).mean(),
        "einsum",
    ),
    "over the rows": (lambda z, r, t: torch.einsum("nv,nv->v", z.softmax(-1), r.log_softmax(-1)).mean(), "einsum"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    loss, words = REFUSED[name]
    x, w, y, u, _, t = operands()

    def fn(x, w, y, u, t):
        z = F.linear(x, w)
        return loss(z, F.linear(y, u), t), F.cross_entropy(z, t)

    sites = rewrite(graphs_of(fn, x, w, y, u, t)[-1], config.Settings(min_vocab=0), "v").sites
    assert sites and not any(site.fused for site in sites)
    assert any(words in site.reason for site in sites), [site.reason for site in sites]
