"""Losses that no rule has a name for: each has one record, with the reason and its line; what is no loss has none."""

import pytest
import torch
import torch.nn.functional as F
from capture import FUSE_ALL, assert_same_as_eager, graphs_of
from torch._dynamo.utils import counters

import cce_inductor
from cce_inductor import config, record
from cce_inductor.rewrite.run import rewrite

B, S, D, V, K = 2, 6, 8, 40, 3
N = B * S


def rand(*shape):
    return torch.randn(*shape).requires_grad_()


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return rand(B, S, D), rand(V, D), torch.randint(0, V, (B, S))


class Confidence(torch.autograd.Function):
    """Minus the log-probability of a target, with a backward of its own."""

    @staticmethod
    def forward(ctx, z, t):
        p = z.softmax(-1)
        ctx.save_for_backward(p, t)
        return -p.gather(-1, t[..., None]).squeeze(-1).log()

    @staticmethod
    def backward(ctx, g):
        p, t = ctx.saved_tensors
        return (p - F.one_hot(t, V)) * g[..., None], None


class Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


def some(t, n=1):
    """A distribution, or several numbers of [0, 1], for each row."""
    return torch.linspace(0.1, 1, V).roll(n).softmax(-1).expand(*t.shape, V)


def classes(t):
    return torch.stack([(t + k) % V for k in range(K)], -1)


def jensen_shannon(z, t):
    q, p = z.softmax(-1), some(t)
    m = ((p + q) / 2).log()
    return F.kl_div(m, q, reduction="sum") + F.kl_div(m, p, reduction="sum")


def sparsemax(z, t):
    s = z.sort(-1, descending=True).values
    count = (1 + torch.arange(1, V + 1) * s > s.cumsum(-1)).sum(-1, keepdim=True)
    threshold = (s.cumsum(-1).gather(-1, count - 1) - 1) / count
    return (z - threshold).clamp(min=0).square().sum(-1).mean()


def nucleus(z, t):
    s = z.softmax(-1).sort(-1, descending=True).values
    q = torch.where(s.cumsum(-1) < 0.9, s, 0.0)
    return -(q * (q + 1e-9).log()).sum()


def in_a_buffer(z, t):
    lp, made = z.flatten(0, 1).log_softmax(-1), torch.zeros(N, K)
    for i in range(0, N, 4):
        made[i : i + 2] = lp[i : i + 4].gather(-1, classes(t).flatten(0, 1)[i : i + 2])
    return made.mean()


def hinge(z, t):
    return (z - z.gather(-1, t[..., None]) + 1).clamp(min=0).sum(-1).mean()


# name: (function of logits and targets, the loss as the record calls it, part of the reason)
LOSSES = {
    "KL alone": (
        lambda z, t: F.kl_div(z.log_softmax(-1), some(t), reduction="batchmean"),
        "kl_div",
        "kl_div reads the log-probabilities",
    ),
    "KL, summed later": (
        lambda z, t: F.kl_div(z.log_softmax(-1), some(t), reduction="none").sum(-1).mean(),
        "kl_div",
        "kl_div reads the log-probabilities",
    ),
    "Jensen-Shannon": (jensen_shannon, "kl_div", "kl_div reads the probabilities"),
    "K classes of some rows": (
        lambda z, t: z.log_softmax(-1).gather(-1, classes(t)[:1]).mean(),
        "gather",
        "are picked out of logits of shape",
    ),
    "K classes of half of the rows, in a buffer": (in_a_buffer, "gather", "are picked out of logits of shape"),
    "soft targets written out": (
        lambda z, t: -(some(t) * z.log_softmax(-1)).sum(-1).mean(),
        "sum",
        "log-probabilities multiplied by a tensor before the loss",
    ),
    "multi-margin": (
        lambda z, t: F.multi_margin_loss(z.flatten(0, 1), t.flatten()),
        "multi_margin_loss",
        "multi_margin_loss reads the logits",
    ),
    "binary cross-entropy": (
        lambda z, t: F.binary_cross_entropy_with_logits(z, some(t)),
        "binary_cross_entropy_with_logits",
        "binary_cross_entropy_with_logits reads the logits",
    ),
    "sigmoid loss of pairs": (
        lambda z, t: -F.logsigmoid(z * (2.0 * F.one_hot(t, V) - 1)).sum(),
        "sum",
        "log_sigmoid reads the logits",
    ),
    "squared error": (lambda z, t: F.mse_loss(z, some(t)), "mse_loss", "mse_loss reads the logits themselves"),
    "absolute error": (lambda z, t: (z - some(t).cumsum(1)).abs().mean(), "mean", "not one bias per class"),
    "hinge": (hinge, "gather", "the logits are clamped"),
    "hinge of the best": (
        lambda z, t: (z.amax(-1) - z.gather(-1, t[..., None]).squeeze(-1)).relu().mean(),
        "amax",
        "reads the logits: no loss function and no log-sum-exp",
    ),
    "sparsemax": (sparsemax, "gather", "Tensor.sort reads the logits"),
    "nucleus": (nucleus, "sum", "Tensor.sort reads the probabilities"),
    "focal, by a one-hot tensor": (
        lambda z, t: (F.one_hot(t, V) * (1 - z.softmax(-1)) ** 2).sum(-1).mean(),
        "sum",
        "something is added to probabilities",
    ),
    "entropy of given probabilities": (
        lambda z, t: torch.distributions.Categorical(probs=z.softmax(-1), validate_args=False).entropy().mean(),
        "sum",
        "a sum of probabilities, which is 1",
    ),
    "an autograd function": (
        lambda z, t: Confidence.apply(z, t).mean(),
        "torch.autograd.Function.apply",
        "a torch.autograd.Function takes the logits",
    ),
    "a divisor for each entry": (
        lambda z, t: (lambda s: (s.logsumexp(-1)).mean())(z / torch.full((B, S, V), 2.0)),
        "logsumexp",
        "divided by a tensor of shape",
    ),
    "two classes of all": (
        lambda z, t: F.softplus(z[..., 3] - z[..., 7]).mean(),
        "getitem",
        "classes are taken out of the logits",
    ),
    "the largest of negated probabilities": (
        lambda z, t: (-z.softmax(-1)).max(-1).values,
        "max",
        "does not grow with the logits",
    ),
    "one log-sum-exp of all rows": (lambda z, t: z.logsumexp((1, 2)).mean(), "logsumexp", "logsumexp over dimension"),
    "a softmax that leaves": (lambda z, t: z.softmax(-1), "softmax", "the softmax leaves the graph"),
}


def explained(fn, *inputs, **settings):
    torch._dynamo.reset()
    with config.patch(min_vocab=0, **settings):
        return cce_inductor.explain(fn, *inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_one_record_with_the_reason(name, inputs):
    loss, called, reason = LOSSES[name]

    def fn(h, w, t):
        return loss(F.linear(h, w), t)

    report = explained(fn, *inputs)
    (site,) = report.sites
    assert not site.fused and reason in site.reason
    assert site.loss.endswith(called) and (site.rows, site.vocab, site.width) == (str(N), str(V), str(D))
    assert "test_unnamed.py:" in site.location and reason in str(report)
    assert_same_as_eager(fn, inputs, fused=0)


@pytest.mark.parametrize("name", ["KL alone", "K classes of some rows", "an autograd function", "hinge"])
def test_strict_raises_and_counters_count(name, inputs):
    loss, _, reason = LOSSES[name]

    def fn(h, w, t):
        return loss(F.linear(h, w), t)

    torch._dynamo.reset()
    counters.clear()
    torch.compile(fn, backend="cce", options=FUSE_ALL)(*inputs)
    assert counters["cce_inductor"]["declined"] == 1 and counters["cce_inductor"]["fused"] == 0
    torch._dynamo.reset()
    with pytest.raises(Exception, match=reason):
        torch.compile(fn, backend="cce", options={**FUSE_ALL, "strict": True})(*inputs)


def test_the_record_has_the_line_of_the_loss_and_of_the_reason(inputs):
    def fn(h, w, t):
        z = F.linear(h, w)
        cold = z / torch.full((B, S, V), 2.0)  # the reason
        lse = cold.logsumexp(-1)  # the loss
        return lse.mean()

    (site,) = explained(fn, *inputs).sites
    first = fn.__code__.co_firstlineno
    assert site.location.endswith(f"test_unnamed.py:{first + 3}") and site.source.startswith("lse = ")
    assert site.at_location.endswith(f"test_unnamed.py:{first + 2}") and site.at_source.startswith("cold = ")


def mlp(activation):
    return lambda h, w, t: F.linear(activation(F.linear(h, w)), w.t() * 2).square().mean()


def normalised(u):
    return u * torch.rsqrt(u.square().mean(-1, keepdim=True) + 1e-6)


def sparse_autoencoder(h, w, t):
    u = F.linear(h, w).relu()
    return F.mse_loss(F.linear(u, w.t() * 2), h.detach()) + u.abs().sum(-1).mean()


def attention(h, w, t):
    return ((h[0] @ w.t()).softmax(-1) @ (w * 2)).square().mean()


def generated(h, w, t):
    with torch.no_grad():
        z = F.linear(h, w)
        return z, z.softmax(-1), z.log_softmax(-1).gather(-1, classes(t))


def router(h, w, t):
    p = F.linear(h, w[:4]).softmax(-1)
    return p.mean((0, 1)).square().sum()


def few_classes_of_many_rows(h, w, t):
    return F.kl_div(F.linear(h.flatten(0, 1), w[:4]).log_softmax(-1), torch.full((N, 4), 0.25), reduction="sum")


def regression(h, w, t):
    return F.mse_loss(F.linear(F.linear(h, w).relu(), w.t()[:1]), t[..., None].float())


NOTHING = {
    "a hidden layer": mlp(F.gelu),
    "a gated layer": mlp(lambda u: (lambda a, b: torch.cat([F.silu(a) * b] * 2, -1))(*u.chunk(2, -1))),
    "a normalised layer": mlp(normalised),
    "a layer with an activation of one's own": mlp(Rectified.apply),
    "a hidden layer and a regression": regression,
    "a hidden layer with a penalty": sparse_autoencoder,
    "half of a hidden layer": lambda h, w, t: F.gelu(F.linear(h, w)),
    "attention": attention,
    "queries": lambda h, w, t: (lambda u: F.scaled_dot_product_attention(u, u, u))(F.linear(h, w)).square().mean(),
    "attention in batches": lambda h, w, t: ((h @ h.mT).softmax(-1) @ h).sum(),
    "a router": router,
    "few classes of many rows": few_classes_of_many_rows,
    "logits": lambda h, w, t: F.linear(h, w).float() * 0.5,
    "log-probabilities": lambda h, w, t: F.linear(h, w).log_softmax(-1),
    "generation": generated,
    "sampling": lambda h, w, t: torch.multinomial(F.linear(h, w).flatten(0, 1).softmax(-1), 1),
    "metrics": lambda h, w, t: (lambda z: (z, z.argmax(-1), z.detach().softmax(-1).amin(-1)))(F.linear(h, w)),
    "nearest": lambda h, w, t: F.mse_loss(w[(h.detach() @ w.t()).argmax(-1)], h.detach()),
}


@pytest.mark.parametrize("name", NOTHING)
def test_no_record_of_what_is_no_loss(name, inputs):
    assert explained(NOTHING[name], *inputs).sites == []


def test_small_heads_are_left_alone(inputs):
    fn = LOSSES["KL alone"][0]
    (gm,) = graphs_of(lambda h, w, t: fn(F.linear(h, w), t), *inputs)
    assert rewrite(gm, config.Settings(min_vocab=V + 1), "v").sites == []
    assert len(rewrite(gm, config.Settings(min_vocab=V), "v").sites) == 1


def test_one_record_for_each_loss(inputs):
    """Not one for each reader, nor for each head that one loss reads, nor beside a loss that is known."""
    kl = LOSSES["KL alone"][0]

    def twice(h, w, t):
        z = F.linear(h, w)
        return kl(z, t) + hinge(z, t)

    def beside(h, w, t):
        z = F.linear(h, w)
        return F.cross_entropy(z.flatten(0, 1), t.flatten()) + kl(z, t)

    def of_two_heads(h, w, t):
        return F.kl_div(F.linear(h, w).log_softmax(-1), F.linear(h, w * 2).softmax(-1), reduction="sum")

    for fn in (twice, beside, of_two_heads):
        assert len(explained(fn, *inputs).sites) == 1, fn.__name__

    def of_each(h, w, t):
        return kl(F.linear(h[:1], w), t[:1]) + kl(F.linear(h[1:], w), t[1:])

    assert len(explained(of_each, *inputs).sites) == 2


def test_beside_a_loss_that_is_fused(inputs):
    h, w, t = inputs

    def fn(h, w, v, t):
        return F.cross_entropy(F.linear(h, w).flatten(0, 1), t.flatten()) + LOSSES["KL alone"][0](F.linear(h, v), t)

    assert [site.fused for site in explained(fn, h, w, rand(V, D), t).sites] == [True, False]
    assert_same_as_eager(fn, (h, w, rand(V, D), t), fused=1)


def test_another_head_is_deferred_all_the_same(inputs):
    h, w, t = inputs

    def fn(h, w, v, t):
        return LOSSES["KL alone"][0](F.linear(h, w), t), F.linear(h, v)

    assert_same_as_eager(fn, (h, w, rand(V, D), t), fused=0, deferred=1)
    report = explained(fn, h, w, rand(V, D), t)
    assert len(report.sites) == 1 and report.deferred == 1


def test_inside_a_checkpoint(inputs):
    kl = LOSSES["KL alone"][0]

    def fn(h, w, t):
        return torch.utils.checkpoint.checkpoint(lambda h, w: kl(F.linear(h, w), t), h, w, use_reentrant=False)

    (site,) = explained(fn, *inputs).sites
    assert "kl_div" in site.reason


def test_a_head_that_no_rule_takes(inputs):
    def fn(h, w, t):
        return F.kl_div(torch.bmm(h, torch.stack([w.t(), w.t() * 2])).log_softmax(-1), some(t), reduction="sum")

    (site,) = explained(fn, *inputs).sites
    assert "3 dimensions" in site.reason and site.loss.endswith("kl_div")


def test_the_loss_that_a_graph_breaks_at(inputs):
    """CTC reads its lengths: Dynamo breaks the graph, and the logits are deferred until then."""
    h, w, t = inputs
    lengths = torch.full((S,), B), torch.full((S,), 1)

    def fn(h, w, t):
        lp = F.linear(h, w).log_softmax(-1)
        return F.ctc_loss(lp, t[:1].T.clamp(min=1), *lengths)

    report = explained(fn, h, w, t)
    (site,) = report.sites
    assert site.source.startswith("return F.ctc_loss") and "ctc_loss breaks the graph" in site.reason
    assert report.deferred == 1
    assert_same_as_eager(fn, inputs, fused=0, deferred=1)


@pytest.mark.parametrize("edit", [False, True], ids=["as they came", "edited"])
def test_logits_of_another_graph(edit, inputs):
    """The graph that reads them has the record, the one that gave them has none."""
    h, w, t = inputs
    model = torch.compile(lambda h, w: F.linear(h, w), backend="cce", options=FUSE_ALL)

    def loss(z, t):
        if edit:
            z.mul_(2)
        return LOSSES["KL alone"][0](z, t)

    def metric(z, t):
        return z.detach().softmax(-1).amin(-1)

    torch._dynamo.reset()
    with record.collect() as graphs:
        torch.compile(metric, backend="cce", options=FUSE_ALL)(model(h, w), t)
        assert [graph.sites for graph in graphs] == [[], []]
        torch.compile(loss, backend="cce", options=FUSE_ALL)(model(h, w), t)
    (site,) = graphs[-1].sites
    assert site.loss.endswith("kl_div") and "test_unnamed.py:" in site.location
    assert "kl_div reads" in site.reason


def test_a_fault_in_the_search_costs_nothing(inputs, monkeypatch, caplog):
    from cce_inductor.rewrite import run as module

    def broken(*args):
        raise KeyError("deliberate")

    monkeypatch.setattr(module, "unnamed", broken)
    fn = lambda h, w, t: F.cross_entropy(F.linear(h, w).flatten(0, 1), t.flatten())  # noqa: E731
    assert_same_as_eager(fn, inputs, fused=1)
    assert "could not look for losses" in caplog.text
