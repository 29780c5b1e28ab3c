"""In-batch negatives: logits are the similarities of two batches, and the diagonal is masked, edited or read."""

import math

import pytest
import torch
import torch.nn.functional as F
from against_eager import assert_error_rule
from capture import FUSE_ALL, assert_same_as_eager
from torch._dynamo.utils import counters

import cce_inductor
from cce_inductor import config

N, D = 12, 6
FLOAT_MIN = torch.finfo(torch.float32).min


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(N, D).requires_grad_(), torch.randn(N, D).requires_grad_(), torch.randint(0, 4, (N,))


def similarities(q, k):
    return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).T / 0.2


def check_one_graph_for_any_size(fn):
    counters.clear()
    compiled = torch.compile(fn, backend="cce", dynamic=True, options=FUSE_ALL)
    for n in (N, N + 4):
        q, k, t = torch.randn(n, D), torch.randn(n, D), torch.randint(0, 4, (n,))
        torch.testing.assert_close(compiled(q, k, t), fn(q, k, t))
    assert counters["stats"]["unique_graphs"] == 1


def partners(n=N):
    """The other view of each row: of 2N views, the first N and the others in the same order."""
    return torch.cat([torch.arange(n // 2, n), torch.arange(n // 2)])


def ce(z, **kwargs):
    return F.cross_entropy(z, partners(), **kwargs)


def eye(**kwargs):
    return torch.eye(N, **kwargs)


def bools():
    return torch.eye(N, dtype=torch.bool)


def filled(z, number):
    z.fill_diagonal_(number)
    return z


def written(z, index, number=-math.inf):
    z[index] = number
    return z


def rows():
    return torch.arange(N)


def positive(z):
    return z.gather(1, partners()[:, None])[:, 0]


# Of similarities: the loss of the partners, with each row's own similarity left out.
LEFT_OUT = {
    "masked": lambda z: ce(z.masked_fill(bools(), -math.inf)),
    "masked in place": lambda z: ce(z.masked_fill_(eye().bool(), -math.inf)),
    "masked with a number": lambda z: ce(z.masked_fill(eye() > 0, -1e9)),
    "a mask of all others": lambda z: ce(torch.where(~bools(), z, -math.inf)),
    "a mask of the diagonal": lambda z: ce(torch.where(eye() == 1, torch.tensor(-math.inf), z)),
    "fill_diagonal_": lambda z: ce(filled(z.clone(), -math.inf)),
    "fill_diagonal_ of the head's own": lambda z: ce(filled(z, -math.inf)),
    "a large number subtracted": lambda z: ce(z - eye() * 1e9),
    "a large number subtracted in place": lambda z: ce(z.sub_(1e9 * eye(dtype=torch.bool).float())),
    "a filled matrix added": lambda z: ce(z + filled(torch.zeros_like(z), -math.inf)),
    "one-hot rows subtracted": lambda z: ce(z - F.one_hot(rows(), N) * 1e9),
    "numbers compared": lambda z: ce(z.masked_fill(rows() == rows()[:, None], -math.inf)),
    "numbers compared with others": lambda z: ce(torch.where(rows()[None] != torch.arange(0, N)[:, None], z, -1e4)),
    "written by a mask": lambda z: ce(written(z.clone(), bools())),
    "written by indices": lambda z: ce(written(z, (rows(), rows()))),
    "scattered": lambda z: ce(z.scatter(1, rows()[:, None], -math.inf)),
    "a mask of ones": lambda z: ce(z.masked_fill(filled(torch.ones(N, N), 0.0) == 0, -math.inf)),
    "what is left of ones": lambda z: ce(z.masked_fill((torch.ones(N, N) - eye()) < 0.5, -math.inf)),
    "of every row": lambda z: (ce(z.masked_fill(bools(), -math.inf), reduction="none") * 0.1).sum(),
    "log-probabilities": lambda z: -z.masked_fill(bools(), -math.inf).log_softmax(-1)[rows(), partners()].mean(),
    "a log-sum-exp": lambda z: (z.masked_fill(bools(), -math.inf).logsumexp(1) - positive(z)).mean(),
    "exponentials": lambda z: (torch.log((z.exp() * (1 - eye())).sum(1)) - positive(z)).mean(),
    "some rows are ignored": lambda z: F.cross_entropy(
        z.masked_fill(bools(), -math.inf), torch.where(rows() % 3 == 0, -100, partners())
    ),
}
# The diagonal has the positives.
POSITIVES = {
    "cross_entropy": lambda z: F.cross_entropy(z, rows()),
    "both ways": lambda z: F.cross_entropy(z, rows()) + F.cross_entropy(z.T, rows()),
    "less a margin": lambda z: F.cross_entropy(z - 0.3 * eye(), rows()),
    "less a margin, smoothed": lambda z: F.cross_entropy(z - 0.3 * eye(), rows(), label_smoothing=0.1),
    "diagonal": lambda z: (z.logsumexp(1) - z.diagonal()).mean(),
    "diag": lambda z: -torch.diag(z.log_softmax(-1)).mean(),
    "diagonal of dimensions": lambda z: -torch.diagonal(z.log_softmax(-1), 0, -1, -2).mean(),
    "diagonal less a margin": lambda z: -(z - 0.3 * eye()).log_softmax(-1).diagonal().mean(),
    "a product": lambda z: -(z.log_softmax(-1) * eye()).sum(-1).mean(),
    "probabilities": lambda z: F.cross_entropy(z, eye()),
    "not among the negatives": lambda z: (z.masked_fill(bools(), -math.inf).logsumexp(1) - z.diagonal()).mean(),
}


def equal(t, u=None):
    return t[:, None] == (t if u is None else u)


def pairs(z, mask, number=-math.inf, **kwargs):
    return F.cross_entropy(z.masked_fill(mask, number), rows(), **kwargs)


# Of similarities and labels: other rows of the row's label are no negatives.
LABELS = {
    "masked": lambda z, t: pairs(z, equal(t) & ~bools()),
    "masked in place": lambda z, t: F.cross_entropy(z.masked_fill_(equal(t) & ~bools(), -math.inf), rows()),
    "a number": lambda z, t: pairs(z, equal(t) & ~bools(), -1.5),
    "a number, divided": lambda z, t: F.cross_entropy(z.masked_fill(equal(t) & ~bools(), -1e9) / 0.5, rows()),
    "a number, times a tensor": lambda z, t: F.cross_entropy(
        z.masked_fill(equal(t) & ~bools(), -1.0) * t.float().amax() - 0.3, rows()
    ),
    "the sign changes": lambda z, t: F.cross_entropy(-z.masked_fill(equal(t) & ~bools(), 1.5), rows()),
    "a large number added": lambda z, t: F.cross_entropy(z + (equal(t).float() - eye()) * (FLOAT_MIN / 100), rows()),
    "a large number subtracted": lambda z, t: F.cross_entropy(z - 1e9 * (equal(t) & ~bools()), rows()),
    "a large number added in place": lambda z, t: F.cross_entropy(z.add_((equal(t) & ~bools()) * -1e9) / 0.5, rows()),
    "a filled matrix of large numbers added": lambda z, t: F.cross_entropy(
        z + torch.zeros_like(z).masked_fill(equal(t) & ~bools(), FLOAT_MIN), rows()
    ),
    "logical functions": lambda z, t: pairs(z, torch.logical_and(torch.eq(t.view(-1, 1), t), bools().logical_not())),
    "either of the two": lambda z, t: pairs(z, ~(torch.logical_or(t[:, None] != t, bools()))),
    "not the diagonal": lambda z, t: pairs(z, equal(t) ^ bools()),
    "a difference": lambda z, t: pairs(z, (equal(t).float() - eye()).bool()),
    "a difference compared": lambda z, t: pairs(z, (equal(t).float() - eye()) > 0.5),
    "a product": lambda z, t: pairs(z, (equal(t).int() * (1 - eye(dtype=torch.int32))) == 1),
    "the diagonal filled": lambda z, t: pairs(z, filled(equal(t), False)),
    "the diagonal filled, at once": lambda z, t: pairs(z, equal(t).fill_diagonal_(False)),
    "the diagonal masked in place": lambda z, t: pairs(z, equal(t).masked_fill_(bools(), False)),
    "the diagonal written": lambda z, t: pairs(z, written(equal(t), (rows(), rows()), False)),
    "the diagonal masked": lambda z, t: pairs(z, equal(t).masked_fill(bools(), False)),
    "where": lambda z, t: F.cross_entropy(torch.where(equal(t) & ~bools(), -1e4, z), rows()),
    "where not": lambda z, t: F.cross_entropy(torch.where(~equal(t) | bools(), z, torch.tensor(-1e4)), rows()),
    "written by a mask": lambda z, t: F.cross_entropy(written(z.clone(), equal(t) & ~bools()), rows()),
    "added": lambda z, t: F.cross_entropy(z + torch.zeros(N, N).masked_fill(equal(t) & ~bools(), -math.inf), rows()),
    "added by where": lambda z, t: F.cross_entropy(z + torch.where(equal(t) & ~bools(), -math.inf, 0.0), rows()),
    "labels of the classes": lambda z, t: pairs(z, equal(t, t.roll(1)) & ~bools()),
    "labels of 16 bits": lambda z, t: pairs(z, equal(t.short()) & ~bools()),
    "of every row": lambda z, t: (pairs(z, equal(t) & ~bools(), reduction="none") * torch.linspace(0, 1, N)).sum(),
    "log-probabilities": lambda z, t: -z.masked_fill(equal(t) & ~bools(), -math.inf).log_softmax(1).diagonal().mean(),
    "one label": lambda z, t: pairs(z, equal(t * 0) & ~bools()),
    "one label, a number": lambda z, t: pairs(z, equal(t * 0) & ~bools(), -1e4),
    "either, by exclusion": lambda z, t: pairs(z, (t[:, None] != t).logical_or(bools()).logical_not()),
    "a log-sum-exp": lambda z, t: (z.masked_fill(equal(t) & ~bools(), -3.0).logsumexp(1) - z.diagonal()).mean(),
    "no row of the label": lambda z, t: (z.masked_fill(equal(t), -math.inf).logsumexp(1) - z.diagonal()).mean(),
    "exponentials": lambda z, t: (torch.log((z.exp() * (t[:, None] != t).float()).sum(1)) - z.diagonal()).mean(),
    "exponentials, the mask first": lambda z, t: (torch.log((~equal(t) * z.exp()).sum(1)) - z.diagonal()).mean(),
    "exponentials, averaged": lambda z, t: (torch.log((~equal(t) * z.exp()).mean(1)) - z.diagonal()).mean(),
}


@pytest.mark.parametrize("name", LABELS)
def test_equal_labels(name, inputs):
    assert_same_as_eager(lambda q, k, t: LABELS[name](similarities(q, k), t), inputs, fused=1)


@pytest.mark.parametrize("name", ["masked", "the diagonal filled", "a number", "log-probabilities"])
def test_equal_labels_of_a_batch_with_itself(name, inputs):
    assert_same_as_eager(lambda q, k, t: LABELS[name](similarities(q, q) + k.sum() * 0, t), inputs, fused=1)


def corrected():
    return torch.linspace(0, 1, N)


# What is done to the classes behind a mask of equal labels, each by a number of its own; -inf, and out of sight.
BEHIND = {
    "less a prior": lambda z, t: z.masked_fill(equal(t) & ~bools(), -math.inf) - corrected(),
    "less a prior, a number": lambda z, t: z.masked_fill(equal(t) & ~bools(), -1e9) - corrected(),
    "and a prior, a number": lambda z, t: corrected() + z.masked_fill(equal(t) & ~bools(), -1e9),
    "a mask": lambda z, t: z.masked_fill(equal(t) & ~bools(), -math.inf).masked_fill(corrected() > 0.8, -math.inf),
    "scaled from the left": lambda z, t: 0.5 * z.masked_fill(equal(t) & ~bools(), -math.inf),
}


@pytest.mark.parametrize("name", BEHIND)
def test_classes_are_edited_behind_a_mask_of_labels(name, inputs):
    target = torch.arange(N) % (N // 2)

    def fn(q, k, t):
        z = BEHIND[name](similarities(q, k), t)
        return (z.logsumexp(1) - z.diagonal())[target].square().mean()

    assert_same_as_eager(fn, inputs, fused=1)


# What brings the classes that are left out to other logits than all of them one, or than none.
NOT_BEHIND = {
    "a prior, in sight": lambda z, t: z.masked_fill(equal(t) & ~bools(), -5.0) - corrected(),
    "a gain": lambda z, t: z.masked_fill(equal(t) & ~bools(), -1e9) * (corrected() + 1.0),
    "a mask with a number": lambda z, t: z.masked_fill(equal(t) & ~bools(), -math.inf).masked_fill(
        corrected() > 0.8, -5.0
    ),
    "subtracted from a tensor": lambda z, t: corrected()[:, None] - z.masked_fill(equal(t) & ~bools(), math.inf),
}


@pytest.mark.parametrize("name", NOT_BEHIND)
def test_classes_that_are_left_out_are_edited_apart(name, inputs):
    assert_same_as_eager(
        lambda q, k, t: F.cross_entropy(NOT_BEHIND[name](similarities(q, k), t), rows()), inputs, fused=0
    )


# With a target that is not the diagonal.
OF_A_TARGET = {
    "one-hot rows": lambda z, t, u: z.masked_fill(equal(u, t) & ~F.one_hot(t, N).bool(), -math.inf),
    "scattered": lambda z, t, u: z.masked_fill(equal(u, t).scatter(1, t[:, None], False), -math.inf),
    "written": lambda z, t, u: z.masked_fill(written(equal(u, t), (rows(), t), False), -math.inf),
    "numbers compared": lambda z, t, u: z.masked_fill(equal(u, t) & (t[:, None] != rows()), -1.0),
    "rows of a view": lambda z, t, u: z.masked_fill(equal(u, t) & (t[:, None] != rows()), -1.0)[None].flatten(0, 1),
    "in two dimensions": lambda z, t, u: (
        z.view(2, -1, N).masked_fill((u.view(2, -1, 1) == t) & ~F.one_hot(t.view(2, -1), N).bool(), -1.0).view(N, N)
    ),
}


@pytest.mark.parametrize("name", OF_A_TARGET)
def test_equal_labels_but_for_the_target(name, inputs):
    def fn(q, k, t):
        return F.cross_entropy(OF_A_TARGET[name](similarities(q, k), t, t.flip(0)), t)

    assert_same_as_eager(fn, inputs, fused=1)


def test_equal_labels_where_rows_are_ignored(inputs):
    def fn(q, k, t):
        target = torch.where(rows() % 3 == 0, -100, t)
        z = similarities(q, k).masked_fill(equal(t.flip(0), t) & (target[:, None] != rows()), -math.inf)
        return F.cross_entropy(z, target)

    assert_same_as_eager(fn, inputs, fused=1)


def test_equal_labels_both_ways(inputs):
    def fn(q, k, t):
        z = similarities(q, k)
        return sum(pairs(y, equal(t) & ~bools()) for y in (z, z.T))

    assert_same_as_eager(fn, inputs, fused=2)


# One matrix, edited and read both ways.
BOTH_WAYS = {
    "masked": lambda z, t: z.masked_fill(equal(t) & ~bools(), -math.inf),
    "masked with a number": lambda z, t: z.masked_fill(equal(t) & ~bools(), -2.0),
    "by where": lambda z, t: torch.where(~equal(t) | bools(), z, -1e4),
    "less a margin": lambda z, t: z - 0.3 * eye(),
    "less a margin by where": lambda z, t: torch.where(bools(), z - 0.3, z),
}


@pytest.mark.parametrize("turn", [lambda z: z.T, lambda z: z.t(), lambda z: z.transpose(0, 1), lambda z: z.mT])
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_both_ways_of_an_edited_matrix(name, turn, inputs):
    def fn(q, k, t):
        z = BOTH_WAYS[name](similarities(q, k), t)
        return F.cross_entropy(z, rows()) + 0.5 * F.cross_entropy(turn(z), rows())

    assert_same_as_eager(fn, inputs, fused=2)


def test_equal_labels_of_symbolic_sizes():
    def fn(q, k, t):
        n = q.shape[0]
        mask = equal(t) & ~torch.eye(n, dtype=torch.bool)
        return F.cross_entropy(similarities(q, k).masked_fill(mask, -1e9), torch.arange(n))

    check_one_graph_for_any_size(fn)
    assert counters["cce_inductor"]["fused"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_rule_where_labels_are_equal(dtype):
    """The positive has nearly all the mass of what is left, and the masked ones have as much."""
    n, d = 256, 32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x = x[torch.arange(n) // 4] + 0.3 * x

    def loss(x):
        z = F.normalize(x, dim=-1) @ F.normalize(x + x.roll(1, 1) * 0.1, dim=-1).T / 0.05
        mask = equal(torch.arange(n) // 4) & ~torch.eye(n, dtype=torch.bool)
        return F.cross_entropy(z.masked_fill(mask, -math.inf), torch.arange(n), reduction="none")

    assert_error_rule(loss, (x,), dtype)


BOTH = {**LEFT_OUT, **POSITIVES}


@pytest.mark.parametrize("name", BOTH)
def test_the_diagonal(name, inputs):
    fused = 2 if name == "both ways" else 1
    assert_same_as_eager(lambda q, k, t: BOTH[name](similarities(q, k)), inputs, fused=fused)


@pytest.mark.parametrize("name", ["masked", "fill_diagonal_", "written by a mask", "log-probabilities"])
def test_the_diagonal_of_a_batch_with_itself(name, inputs):
    assert_same_as_eager(lambda q, k, t: BOTH[name](similarities(q, q) + k.sum() * 0), inputs, fused=1)


def test_the_partner_may_be_the_row_itself(inputs):
    """Where it is, the loss is infinite, and the gradient is eager's."""

    def fn(q, k, t):
        target = torch.where(rows() < 2, rows(), partners())
        return F.cross_entropy(similarities(q, k).masked_fill(bools(), -math.inf), target, reduction="none")

    assert_same_as_eager(fn, inputs, fused=1)


def test_more_classes_than_rows(inputs):
    """Positives first, then negatives of their own: the diagonal is that of the first N columns."""

    def fn(q, k, t):
        z = similarities(q, torch.cat([k, k.flip(0) * 0.5]))
        z = z.masked_fill(torch.eye(N, 2 * N).bool(), -math.inf)
        return F.cross_entropy(z, partners()) - z.log_softmax(-1).gather(1, partners()[:, None]).mean()

    assert_same_as_eager(fn, inputs, fused=2)


@pytest.mark.parametrize("same", [True, False])
def test_symbolic_sizes(same, inputs):
    """A batch of a symbolic size has a diagonal where both are of that size; no size is guarded on."""

    def fn(q, k, t):
        n = q.shape[0]
        z = similarities(q, k if same else torch.cat([k, k]))
        own = torch.eye(n, dtype=torch.bool, device=z.device) if same else torch.eye(n, 2 * n, dtype=torch.bool)
        target = torch.arange(n).roll(n // 2)
        return F.cross_entropy(z.masked_fill(own, -math.inf), target)

    assert_same_as_eager(fn, inputs, fused=int(same), dynamic=True)
    check_one_graph_for_any_size(fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_rule_where_a_row_is_most_like_itself(dtype):
    """At a temperature of 0.05 the similarity of a row with itself, which is left out, is nearly all the mass."""
    n, d = 256, 32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x = (x + x.roll(n // 2, 0)) / 2 + 0.5 * torch.randn(n, d, generator=generator, dtype=torch.float64)

    def nt_xent(x):
        z = F.normalize(x, dim=-1)
        z = z @ z.T / 0.05
        z = z.masked_fill(torch.eye(n, dtype=torch.bool), -math.inf)
        return F.cross_entropy(z, partners(n), reduction="none")

    assert_error_rule(nt_xent, (x,), dtype)


# What has no statistic, or is no diagonal: with a part of the reason.
UNFUSED = {
    "equal labels are masked, and another class is the target": (
        lambda z, t: ce(z.masked_fill(equal(t) & ~bools(), -math.inf)),
        "read at another",
    ),
    "equal labels are masked, the target's too": (
        lambda z, t: pairs(z, equal(t, t.roll(1)), -5.0),
        "where labels are equal",
    ),
    "equal labels are masked, and the loss is smoothed": (
        lambda z, t: F.cross_entropy(z.masked_fill(equal(t) & ~bools(), -1e4), rows(), label_smoothing=0.1),
        "label smoothing over classes that are masked",
    ),
    "equal labels are written to, of two kinds": (
        lambda z, t: F.cross_entropy(written(z.clone(), equal(t) & equal(t // 2) & ~bools()), rows()),
        "where labels are equal",
    ),
    "equal labels are filled, and no class is kept": (
        lambda z, t: (z.masked_fill(equal(t), -5.0).logsumexp(1) - z.diagonal()).mean(),
        "where labels are equal",
    ),
    "a mask of equal labels in float64": (
        lambda z, t: F.cross_entropy(
            z + torch.zeros(N, N, dtype=torch.float64).masked_fill(equal(t) & ~bools(), -math.inf), rows()
        ),
        "where labels are equal",
    ),
    "equal labels are masked, and all is negated": (
        lambda z, t: (z.masked_fill(equal(t) & ~bools(), -math.inf) * -1.0).logsumexp(1).mean(),
        "more than a loss",
    ),
    "labels that are no integers": (
        lambda z, t: F.cross_entropy(z.masked_fill(equal(t * 0.5) & ~bools(), -math.inf), rows()),
        "where labels are equal",
    ),
    "two comparisons of labels": (
        lambda z, t: F.cross_entropy(z.masked_fill(equal(t) & equal(t // 2) & ~bools(), -math.inf), rows()),
        "where labels are equal",
    ),
    "labels that are written to afterwards": (
        lambda z, t: (lambda u, m: (u.fill_(0), F.cross_entropy(z.masked_fill(m, -math.inf), rows()))[1])(
            *(lambda u: (u, equal(u) & ~bools()))(t.clone())
        ),
        "where labels are equal",
    ),
    "the mask is written twice": (
        lambda z, t: F.cross_entropy(
            z.masked_fill(written(filled(equal(t), False), (rows(), partners()), False), -math.inf), rows()
        ),
        "where labels are equal",
    ),
    "the sign of what is masked changes": (
        lambda z, t: F.cross_entropy(-z.masked_fill(equal(t) & ~bools(), -math.inf).clamp(min=-9), rows()),
        "",
    ),
    "equal labels are subtracted": (lambda z, t: ce(z - 3.0 * (equal(t).float() - eye())), "where labels are equal"),
    "supervised": (
        lambda z, t: ce(z) - (z.masked_fill(bools(), -1e9).log_softmax(-1) * equal(t)).sum() / N,
        "where labels are equal",
    ),
    "supervised, with itself": (
        lambda z, t: -((z.log_softmax(-1) * equal(t).float()).sum(1) / equal(t).sum(1)).mean(),
        "where labels are equal",
    ),
    "another diagonal": (lambda z, t: (z.logsumexp(1)[2:] - z.diagonal(-2)).mean(), "diagonal reads the logits"),
    "the diagonal is written to": (
        lambda z, t: (lambda y: (y.diagonal().fill_(-1e4), ce(y))[1])(z.clone()),
        "the diagonal of the logits is edited",
    ),
    "edited after the diagonal was read": (
        lambda z, t: (lambda y, d: (y.mul_(2), ce(y) - d.mean())[1])(*(lambda y: (y, y.diagonal()))(z.clone())),
        "the diagonal of the logits is edited",
    ),
    "the diagonal of fewer classes": (
        lambda z, t: (z[:, :5].logsumexp(1)[:5] - z[:, :5].diagonal()).mean(),
        "diagonal reads the logits",
    ),
    "a diagonal of fewer classes is filled": (
        lambda z, t: F.cross_entropy(filled(z[:, :5].clone(), -1.0), partners() % 5),
        "by an index",
    ),
    "a diagonal filled with a tensor": (
        lambda z, t: ce(filled(z.clone(), z.detach()[0, 0])),
        "",
    ),
    "a diagonal that is written to": (
        lambda z, t: ce(z - written(eye(), (0,), 1.0) * 1e9),
        "not one bias per class",
    ),
    "the mask is written with numbers of its own": (
        lambda z, t: ce(written(z.clone(), bools(), z.detach().diagonal() * 2)),
        "",
    ),
    "all but the diagonal is written": (lambda z, t: ce(written(z.clone(), ~bools(), 0.5)), ""),
    "exponentials, weighted": (
        lambda z, t: ce(z) + torch.log((z.exp() * (1 - 0.5 * eye())).sum(1)).mean(),
        "less at a target",
    ),
    "exponentials of what is edited later": (
        lambda z, t: (lambda y, e: (y.mul_(2), torch.log((e * (1 - eye())).sum(1)).mean() + ce(y))[1])(
            *(lambda y: (y, y.detach().exp()))(z.clone())
        ),
        "edited after their exponentials",
    ),
    "the largest without itself": (
        lambda z, t: (ce(z), z.masked_fill(bools(), -math.inf).amax(-1))[0] + z.masked_fill(bools(), -1.0).amax(),
        "margin",
    ),
}


@pytest.mark.parametrize("name", UNFUSED)
def test_what_is_no_diagonal_is_left_alone(name, inputs):
    loss, reason = UNFUSED[name]

    def fn(q, k, t):
        return loss(similarities(q, k), t)

    assert_same_as_eager(fn, inputs, fused=0)
    with config.patch(min_vocab=0):
        sites = cce_inductor.explain(fn, *inputs).sites
    assert sites and not any(site.fused for site in sites)
    assert any(reason in site.reason for site in sites), [site.reason for site in sites]
