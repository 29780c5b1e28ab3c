"""Several classes of each row: one call of the operator, whatever way a program picks them, and exact against eager."""

import pytest
import torch
import torch.nn.functional as F
from capture import assert_same_as_eager
from test_algebra import operators_in

N, D, V, K = 24, 6, 96, 5
LSE = torch.logsumexp
WEIGHT = torch.linspace(0.1, 2, V)


def in_a_buffer(z, i, t, u):
    made = torch.empty(N, K)
    for s in range(0, N, 8):
        c = z[s : s + 8].float()
        made[s : s + 8] = c.gather(-1, i[s : s + 8]) - LSE(c, -1, keepdim=True)
    return made.exp().mul(made).mean()


def every_way(z, i, t, u):
    lp = z.log_softmax(-1)
    return (
        (lp.gather(1, i) * lp.gather(1, t[:, None])).mean()
        + lp.gather(1, t.flip(0)[:, None]).exp().mean()
        + LSE(z, 1).mean()
    )


def pieces(z, i, t, u):
    return -sum(a.log_softmax(-1).gather(-1, b).sum() for a, b in zip(z.split(8), i.split(8), strict=True))


def masked(z, i, t, u):
    lp = z.masked_fill(torch.arange(V) % 3 == 0, -30.0).log_softmax(-1)
    return -(lp.gather(1, i) * torch.arange(K)).mean()


# Of logits (N, V), classes (N, K), and two targets (N,), one of which has rows to be ignored.
LOSSES = {
    "gather": lambda z, i, t, u: -(z.log_softmax(-1).gather(1, i) * torch.arange(K)).mean(),
    "torch.gather of logits": lambda z, i, t, u: (
        (LSE(z, 1, keepdim=True) - torch.gather(z, dim=1, index=i)).square().mean()
    ),
    "take_along_dim": lambda z, i, t, u: -(torch.take_along_dim(z.log_softmax(-1), i, 1) * torch.arange(K)).mean(),
    "indices": lambda z, i, t, u: -(z.log_softmax(-1)[torch.arange(N)[:, None], i] * torch.arange(K)).mean(),
    "indices, expanded": lambda z, i, t, u: -z.log_softmax(-1)[torch.arange(N)[:, None].expand(N, K), i].mean(),
    "negative indices": lambda z, i, t, u: -z.log_softmax(-1)[torch.arange(N).unsqueeze(1), i - V].mean(),
    "indices of two dimensions": lambda z, i, t, u: (
        -z.view(4, 6, V)
        .log_softmax(-1)[torch.arange(4)[:, None, None], torch.arange(6)[:, None], i.view(4, 6, K)]
        .mean()
    ),
    "the classes first": lambda z, i, t, u: -(z.t().log_softmax(0).gather(0, i.t()) * torch.arange(K)[:, None]).mean(),
    "a softcap, a factor and a constant": lambda z, i, t, u: (
        -(5 * torch.tanh((z * 0.5 + 1) / 5) - 2).log_softmax(-1).gather(1, i).square().mean()
    ),
    "masked classes": masked,
    "terms of rows": lambda z, i, t, u: (lambda s: LSE(s, -1).exp().mean() + s.gather(1, i).square().mean())(
        z + torch.linspace(-1, 1, N)[:, None]
    ),
    "unlikelihood": lambda z, i, t, u: F.cross_entropy(z, u) - torch.log1p(-z.softmax(-1).gather(1, i)).mean(),
    "every way at once": every_way,
    "a buffer": in_a_buffer,
    "pieces": pieces,
    "detached, for logging": lambda z, i, t, u: F.cross_entropy(z, t) + z.detach().log_softmax(-1).gather(1, i).mean(),
    "one class at a time": lambda z, i, t, u: (
        -sum(z.log_softmax(-1).gather(1, i[:, k : k + 1]).mean() * k for k in range(K))
    ),
    "mixup": lambda z, i, t, u: 0.3 * F.cross_entropy(z, t) + 0.7 * F.cross_entropy(z, i[:, 0]),
    "mixup of ignored targets": lambda z, i, t, u: (
        0.3 * F.cross_entropy(z, u) + 0.7 * F.cross_entropy(z, u.flip(0), weight=WEIGHT, label_smoothing=0.1)
    ),
    "mixup of every row": lambda z, i, t, u: (
        (F.cross_entropy(z, u, reduction="none") * 0.4 + F.nll_loss(z.log_softmax(1), t, reduction="none") * 0.6)
        .square()
        .mean()
    ),
    "a mixture of one-hot tensors": lambda z, i, t, u: F.cross_entropy(
        z, 0.5 * F.one_hot(t, V) + 0.3 * F.one_hot(i[:, 1], V) + 0.2 * F.one_hot(i[:, 2], V)
    ),
    "several labels": lambda z, i, t, u: (
        -(z.log_softmax(-1) * sum(F.one_hot(i[:, k], V) for k in range(K))).sum(-1).mean()
    ),
    "candidates": lambda z, i, t, u: (LSE(z.gather(1, i), 1) - z.gather(1, t[:, None])[:, 0]).mean(),
    "a ranking of pairs": lambda z, i, t, u: F.softplus(z.gather(1, i[:, 1:]) - z.gather(1, i[:, :1])).mean(),
    "a loss over candidates": lambda z, i, t, u: F.cross_entropy(z.gather(1, i), t % K),
}


# How many losses they are to the record, if not one.
COUNTS = {
    **{"every way at once": 3, "a buffer": 3, "pieces": 3, "one class at a time": K},
    **{"mixup": 2, "mixup of ignored targets": 2, "mixup of every row": 2},
}


def inputs():
    i = torch.randint(0, V, (N, K))
    i[:, 3] = i[:, 1]  # twice
    t = torch.randint(0, V, (N,))
    return torch.randn(N, D).requires_grad_(), torch.randn(V, D).requires_grad_(), i, t, t.masked_fill(t % 3 == 0, -100)


@pytest.mark.parametrize("name", LOSSES)
def test_one_call(name):
    def fn(h, w, i, t, u):
        return LOSSES[name](F.linear(h, w), i, t, u)

    given = inputs()
    assert len(operators_in(fn, *given)) == 1
    assert_same_as_eager(fn, given, fused=COUNTS.get(name, 1))


@pytest.mark.parametrize("name", ["gather", "indices", "mixup of ignored targets", "every way at once", "candidates"])
def test_symbolic_sizes(name):
    def fn(h, w, i, t, u):
        z = F.linear(h, w)
        n = z.shape[0]
        if name == "gather":
            return -z.log_softmax(-1).gather(1, i).square().mean()
        return LOSSES[name](z, i, t, u) if name != "indices" else -z.log_softmax(-1)[torch.arange(n)[:, None], i].mean()

    assert_same_as_eager(fn, inputs(), fused=COUNTS.get(name, 1), dynamic=True)


def test_rows_that_no_loss_counts_are_not_computed():
    def fn(h, w, u, v):
        z = F.linear(h, w)
        return F.cross_entropy(z, u) + F.cross_entropy(z, v)

    h, w, _, t, u = inputs()
    (call,) = operators_in(fn, h, w, u, t.masked_fill(t % 2 == 0, -100))
    assert call.args[2] is not None  # the mask of rows: of the one target or the other
    assert_same_as_eager(fn, (h, w, u, t.masked_fill(t % 2 == 0, -100)), fused=2)


def test_few_entries_of_few_classes_are_no_loss_of_their_own():
    """The values of actions, say: a head that is no wider than its input."""

    def fn(h, w, i):
        return F.linear(h, w).gather(1, i).square().mean()

    h, w, i, *_ = inputs()
    assert operators_in(fn, h, w[: 2 * D].detach().requires_grad_(), i % (2 * D)) == []
