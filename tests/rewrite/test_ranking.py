"""Top-k and the rank of the target, as people log them beside a loss: they fuse, and count what eager counts."""

import pytest
import torch
import torch.nn.functional as F
from capture import assert_same_as_eager, graphs_of

import cce_inductor
from cce_inductor import config
from cce_inductor.ops.choice import Choice
from cce_inductor.rewrite.run import rewrite

B, S, D, V = 2, 6, 8, 40


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(*shape):
    return torch.randn(*shape).requires_grad_()


def operands():
    return rand(B, S, D), rand(V, D), rand(V), torch.randint(0, V, (B, S))


def ce(z, t):
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), t.reshape(-1))


def accuracy(output, target, topk=(1,)):
    """torchvision's reference script, under no_grad: AOTAutograd takes no views in inference mode."""
    with torch.no_grad():
        maxk = max(topk)
        batch_size = target.size(0)
        if target.ndim == 2:
            target = target.max(dim=1)[1]
        _, pred = output.topk(maxk, 1, True, True)
        pred = pred.t()
        correct = pred.eq(target[None])
        res = []
        for k in topk:
            correct_k = correct[:k].flatten().sum(dtype=torch.float32)
            res.append(correct_k * (100.0 / batch_size))
        return res


def imagenet_accuracy(output, target, topk=(1, 5)):
    """PyTorch's ImageNet example."""
    with torch.no_grad():
        maxk = max(topk)
        batch_size = target.size(0)
        _, pred = output.topk(maxk, 1, True, True)
        pred = pred.t()
        correct = pred.eq(target.view(1, -1).expand_as(pred))
        res = []
        for k in topk:
            correct_k = correct[:k].reshape(-1).float().sum(0, keepdim=True)
            res.append(correct_k.mul_(100.0 / batch_size))
        return res


def rank(z, t):
    return (z > z.gather(-1, t.unsqueeze(-1))).sum(-1)


def without_grad(f):
    def metric(z, t):
        with torch.no_grad():
            return f(z, t)

    return metric


def flat(f):
    return lambda z, t: f(z.view(-1, V), t.view(-1))


METRICS = {
    "torchvision": flat(lambda z, t: accuracy(z, t, (1, 5))),
    "torchvision, top-1 only": flat(lambda z, t: accuracy(z, t)),
    "ImageNet example": flat(imagenet_accuracy),
    "top 5 under no_grad": without_grad(
        lambda z, t: (z.topk(5, dim=-1).indices == t.unsqueeze(-1)).any(-1).float().mean()
    ),
    "top 5 of probabilities": lambda z, t: z.softmax(-1).topk(5)[1].eq(t[..., None]).any(-1),
    "top 5 of log-probabilities": lambda z, t: torch.topk(z.log_softmax(-1), 5, dim=-1).indices,
    "the largest logits": without_grad(lambda z, t: tuple(z.topk(3))),
    "the largest logits, detached": lambda z, t: z.detach().topk(4, sorted=False).values.sort(-1).values,
    "the largest logits, shifted": without_grad(lambda z, t: (z + 1.5 + torch.ones(B, S, 1)).topk(3).values),
    "classes in front": without_grad(lambda z, t: tuple(z.movedim(-1, 0).topk(3, dim=0))),
    "classes in dimension one": lambda z, t: z.transpose(1, 2).topk(3, dim=1).indices,
    "the largest of one row": without_grad(lambda z, t: tuple(z[0, 2].topk(4))),
    "topk of one": without_grad(lambda z, t: tuple(z.topk(1))),
    "topk of one, with a gradient": lambda z, t: z.topk(1).values,
    "all of them": without_grad(lambda z, t: tuple(z.topk(V))),
    "rank": rank,
    "rank from one, hits and the reciprocal": lambda z, t: (
        (r := rank(z, t) + 1) <= 5,
        (r < 10).float().mean(),
        (1.0 / r).mean(),
    ),
    "pessimistic rank": lambda z, t: (z >= z.gather(-1, t[..., None])).sum(dim=-1),
    "turned round": lambda z, t: torch.lt(z.gather(-1, t[..., None]), z).long().sum(-1),
    "worse classes": lambda z, t: z.lt(z.gather(-1, t[..., None])).float().sum(-1),
    "share of worse classes": lambda z, t: z.le(z.gather(-1, t[..., None])).double().mean(-1),
    "count_nonzero": lambda z, t: torch.count_nonzero(z.gt(z.gather(-1, t[..., None])), dim=-1),
    "sum in int32": lambda z, t: (z > z.gather(-1, t[..., None])).int().sum(-1, keepdim=True, dtype=torch.int32),
    "sum over everything": lambda z, t: (z > z.gather(-1, t[..., None])).sum() / t.numel(),
    "mean over everything": lambda z, t: (z > z.gather(-1, t[..., None])).float().mean(),
    "by index": flat(lambda z, t: (z > z[torch.arange(B * S), t][:, None]).sum(1)),
    "by an index from the end": flat(lambda z, t: (z > z[torch.arange(B * S), t - V].unsqueeze(1)).sum(1)),
    "take_along_dim": lambda z, t: (z > torch.take_along_dim(z, t[..., None], -1)).sum(-1),
    "of log-probabilities": lambda z, t: rank(z.log_softmax(-1), t),
    "of detached logits": lambda z, t: rank(z.detach(), t),
    "with a detached entry": lambda z, t: (z > z.gather(-1, t[..., None]).detach()).sum(-1),
    "rows taken behind the comparison": lambda z, t: (z > z.gather(-1, t[..., None]))[:, 1:].transpose(0, 1).sum(-1),
    "rows taken behind one by index": flat(lambda z, t: (z > z[torch.arange(B * S), t][:, None])[::3].sum(1)),
    "rows by chunks": lambda z, t: [m.sum(-1) for m in (z > z.gather(-1, t[..., None])).chunk(3, 1)],
    "classes first": lambda z, t: (z.movedim(-1, 0) > z.movedim(-1, 0).gather(0, t[None])).sum(0),
    "a number for each row": lambda z, t: (z > torch.linspace(-2, 2, B * S).view(B, S, 1)).sum(-1),
    "a number for each row, rows taken": lambda z, t: (z >= torch.linspace(-2, 2, B * S).view(B, S, 1))[:, 2:].sum(-1),
    "a number for each row, flat": flat(lambda z, t: (torch.linspace(-2, 2, B * S)[:, None] >= z).float().sum(1)),
    "several at once": lambda z, t: (
        rank(z, t),
        (z >= z.gather(-1, t[..., None])).sum(-1),
        z.topk(3).indices,
        z.topk(7).indices,
        (z < torch.zeros(B, S, 1)).sum(-1),
    ),
}


def flattened(found):
    return tuple(x for y in found for x in flattened(y)) if isinstance(found, (tuple, list)) else (found,)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", METRICS)
def test_beside_a_loss(name, dynamic):
    def fn(h, w, b, t):
        z = F.linear(h, w, b)
        return ce(z, t), *flattened(METRICS[name](z, t))

    assert_same_as_eager(fn, operands(), fused=1, dynamic=dynamic)


BETWEEN = {
    "scaled": lambda z: z * -0.5,
    "scaled by a tensor": lambda z: z * torch.tensor(0.7),
    "scaled by a tensor, with biases": lambda z: (
        (z + torch.linspace(-1, 1, V)) / torch.tensor([0.3]) + torch.linspace(1, 0, V)
    ),
    "softcap": lambda z: 3 * torch.tanh(z / 3),
    "softcap of biased logits": lambda z: 3 * torch.tanh((z + 0.3 * torch.linspace(-1, 1, V) + 1) / 3),
    "softcap, shifted": lambda z: 2 * torch.tanh(z) + 5,
    "a number added": lambda z: z + 1.5,
    "columns": lambda z: z[..., 3:30],
    "columns and a bias": lambda z: (z + torch.linspace(-1, 1, V))[..., 3:30:2],
    "masked": lambda z: z.masked_fill(torch.arange(V) % 3 == 0, -torch.inf),
    "masked with a number": lambda z: (z + 1).masked_fill(torch.arange(V) % 3 == 0, -0.5) * 2 + 1,
    "masked in place": lambda z: (z.__setitem__((..., slice(30, None)), -1e4), z)[1],
    "rows": lambda z: z.flip(1).transpose(0, 1),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_between(name):
    def fn(h, w, b, t):
        z = F.linear(h, w, b)
        z = BETWEEN[name](z * 1)
        t = t.view(z.shape[:-1]) % z.shape[-1]
        with torch.no_grad():
            values, indices = z.topk(3)
            return ce(z, t), values, indices, rank(z, t), (z <= z.gather(-1, t[..., None])).sum(-1)

    assert_same_as_eager(fn, operands(), fused=1)


def rewritten(fn, *inputs, dynamic=None):
    """What the pass makes of a function's graph, and its calls of our operators as (name, names of the results)."""
    (gm,) = graphs_of(fn, *inputs, dynamic=dynamic)
    result = rewrite(gm, config.Settings(min_vocab=0), "v")
    calls = [n for n in result.graph_module.graph.nodes if "cce_inductor" in str(n.target)]
    return result, [(n.target.__name__.split(".")[0], n.args[2 if "ranking" in str(n.target) else 3]) for n in calls]


def test_what_is_counted_together():
    """One product for all of the same rows, compared with the same numbers; none for what is read by nothing else."""

    def fn(h, w, b, t):
        z = F.linear(h, w, b)
        worse = (z < torch.zeros(B, S, 1)).sum(-1)
        more = (z >= z.gather(-1, t[..., None])).sum(-1)
        return ce(z, t), rank(z, t), more, z.topk(3).indices, z.softmax(-1).topk(7).indices, worse

    result, calls = rewritten(fn, *operands())
    statistics = ("linear_statistics", "lse lse_low target_logit")
    assert sorted(calls) == [("linear_ranking", "gt ge"), ("linear_ranking", "indices lt"), statistics]
    assert [site.fused for site in result.sites] == [True]


def test_top_1_comes_along_with_the_loss():
    def fn(h, w, b, t):
        z = F.linear(h, w, b)
        return ce(z, t), z.topk(1).indices

    assert rewritten(fn, *operands())[1] == [("linear_statistics", "lse lse_low target_logit argmax")]


def test_the_target_logit_of_a_comparison_leaves_the_loss_alone():
    """Its gradients are still formed in the forward, which only a single statistic of the graph allows."""

    def fn(h, w, b, t):
        z = F.linear(h, w, b)
        return ce(z, t), (z > z.gather(-1, t.clamp(max=20)[..., None]).detach()).sum(-1)

    def used_besides(h, w, b, t):
        z = F.linear(h, w, b)
        own = z.gather(-1, t[..., None])
        return ce(z, t), (z > own).sum(-1), own.detach() * 2

    (gm,) = graphs_of(fn, *operands())
    choice = Choice("kernel", gradients_in_forward=True)
    graph = rewrite(gm, config.Settings(min_vocab=0), "v", lambda problem: choice).graph_module.graph
    names = [getattr(n.target, "__name__", str(n.target)) for n in graph.nodes]
    assert "linear_statistics_with_gradients.default" in names and "gather" not in names and "linear" not in names
    assert_same_as_eager(used_besides, operands(), fused=1)


def test_alone_they_are_no_site():
    def fn(h, w, b, t):
        z = F.linear(h, w, b)
        return z.topk(5).indices, rank(z, t)

    result, calls = rewritten(fn, *operands())
    assert (result.sites, calls) == ([], [])
    assert_same_as_eager(fn, operands(), fused=0)


def test_explain_shows_the_loss_fused():
    def fn(h, w, b, t):
        z = F.linear(h, w, b)
        return ce(z, t), rank(z, t), z.topk(5).indices

    with config.patch(min_vocab=0):
        (site,) = cce_inductor.explain(fn, *operands()).sites
    assert site.fused and "cross_entropy" in site.loss


def test_a_log_probability_is_the_site_and_not_the_rank():
    def fn(h, w, b, t):
        lp = F.linear(h, w, b).log_softmax(-1)
        return rank(lp, t), -lp.gather(-1, t[..., None]).mean()

    result, _ = rewritten(fn, *operands())
    assert [(site.fused, site.loss) for site in result.sites] == [(True, "Tensor.gather")]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_under_inductor(dynamic):
    def fn(h, w, b, t):
        z = F.linear(h, w, b)
        hits = z.view(-1, V).topk(5).indices.eq(t.view(-1, 1)).any(-1)
        return ce(z, t), hits.float().mean(), (1.0 / (rank(z, t) + 1)).mean(), z.detach().topk(2).values

    assert_same_as_eager(fn, operands(), fused=1, compiler="inductor", dynamic=dynamic)


def test_in_a_checkpoint():
    def fn(h, w, b, t):
        def region(h):
            z = F.linear(h, w, b)
            return ce(z, t), rank(z, t)

        return torch.utils.checkpoint.checkpoint(region, h, use_reentrant=False)

    assert_same_as_eager(fn, operands(), fused=1)


# Logits that are small integers: many are equal, in every dtype and in every order of adding.
TIES = {
    "as they are": lambda z: z,
    "cast": lambda z: z.float(),
    "scaled in 16 bits": lambda z: z * 0.3,
    "capped in 16 bits": lambda z: 3.0 * torch.tanh(z / 3.0),
    "capped in float32": lambda z: 30.0 * torch.tanh(z.float() / 30.0),
    "log-probabilities in float32": lambda z: z.float().log_softmax(-1),
}


def whole(dtype):
    return [torch.randint(-2, 3, shape).to(dtype).requires_grad_() for shape in ((B, S, D), (400, D), (400,))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TIES)
def test_equal_logits(name, dtype):
    def fn(h, w, b, t):
        z = TIES[name](F.linear(h, w, b))
        own = z.gather(-1, t[..., None])
        return ce(z.float(), t), rank(z, t), (z >= own).sum(-1), (z < own).sum(-1), (z <= own).sum(-1)

    inputs = [*whole(dtype), torch.randint(0, 400, (B, S))]
    with torch.no_grad():
        assert (fn(*inputs)[2] - fn(*inputs)[1]).max() > 3
    assert_same_as_eager(fn, inputs, fused=1, tolerance=2e-2)


def test_under_autocast():
    def fn(h, w, b, t):
        with torch.autocast("cpu", torch.bfloat16):
            z = F.linear(h, w, b)
            return ce(z, t), rank(z, t), (z >= z.gather(-1, t[..., None])).sum(-1)

    assert_same_as_eager(fn, [*whole(torch.float32), torch.randint(0, 400, (B, S))], fused=1, tolerance=2e-2)


def test_compared_with_a_reading_of_another_head():
    """The number is itself given by an operator in the rewritten graph."""

    def fn(h, w, b, t):
        z, other = F.linear(h, w, b), F.linear(h, w * 0.5)
        own = other.gather(-1, t[..., None])
        return ce(z, t) + ce(other, t), (z > own).sum(-1), (z < other.logsumexp(-1, keepdim=True)).sum(-1)

    assert_same_as_eager(fn, operands(), fused=2)


def test_targets_that_are_written_to():
    """The operator reads them where the count is; eager, where the entry was picked or compared."""

    def before(h, w, b, t):
        t = t.clone()
        z = F.linear(h, w, b)
        t[:, 0] = 3
        return ce(z, t), rank(z, t)

    def behind_the_entry(h, w, b, t):
        z, s = F.linear(h, w, b), t.clone()
        own = z.gather(-1, s[..., None])
        s.zero_()
        return ce(z, t), (z > own).sum(-1)

    def behind_the_comparison(h, w, b, t):
        z, least = F.linear(h, w, b), torch.ones(B, S, 1)
        above = z > least
        least.zero_()
        return ce(z, t), above.sum(-1)

    assert_same_as_eager(before, operands(), fused=1)
    assert_same_as_eager(behind_the_entry, operands(), fused=0)
    assert_same_as_eager(behind_the_comparison, operands(), fused=0)


EVEN = torch.arange(V) % 2 == 0
# name: (metric of logits and targets, part of the reason, part of the cure)
REFUSED = {
    "a threshold computed from the logits": (lambda z, t: (z > z.mean(-1, keepdim=True)).sum(-1), "threshold", ""),
    "the largest as a threshold": (lambda z, t: (z >= z.amax(-1, keepdim=True)).sum(-1), "threshold", ""),
    "the target's logit less a margin": (lambda z, t: (z > z.gather(-1, t[..., None]) - 1).sum(-1), "threshold", ""),
    "an entry of other logits": (lambda z, t: (2 * z > z.gather(-1, t[..., None])).sum(-1), "threshold", ""),
    "an entry rounded": (lambda z, t: (z > z.gather(-1, t[..., None]).half()).sum(-1), "threshold", ""),
    "a number": (lambda z, t: (z > 0).sum(-1), "one number for each row", "column"),
    "a number for each class": (lambda z, t: (z > torch.zeros(V)).sum(-1), "one number for each row", ""),
    "more rows": (lambda z, t: (z[:1] > torch.zeros(B, S, 1)).sum(-1), "one number for each row", ""),
    "probabilities": (lambda z, t: rank(z.softmax(-1), t), "grow with the logits", "logits"),
    "negative log-probabilities": (lambda z, t: rank(-z.log_softmax(-1), t), "grow with the logits", "logits"),
    "rounded": (lambda z, t: rank(z.bfloat16(), t), "narrower", ""),
    "log-probabilities in 16 bits": (lambda z, t: rank(z.half().float(), t), "narrower", ""),
    "in another shape": (
        lambda z, t: (z > z.view(-1, V).gather(-1, t.view(-1, 1)).view(B, S, 1)).sum(-1),
        "in another shape",
        "the same",
    ),
    "shifted, with a number": (lambda z, t: (z + 1 > torch.zeros(B, S, 1)).sum(-1), "shifted", ""),
    "log-probabilities and a number": (lambda z, t: (z.log_softmax(-1) > -torch.ones(B, S, 1)).sum(-1), "shifted", ""),
    "comparisons multiplied": (lambda z, t: ((z > z.gather(-1, t[..., None])) * 2.0).sum(-1), "multiplied", "sum"),
    "comparisons of rows put together": (
        lambda z, t: torch.cat([(m := z > z.gather(-1, t[..., None]))[:, 3:], m[:, :3]], 1).sum(-1),
        "put together",
        "",
    ),
    "comparisons of a target": (lambda z, t: (z > z[..., :1]).gather(-1, t[..., None]), "", ""),
    "comparisons over rows": (lambda z, t: (z > z.gather(-1, t[..., None])).sum(1), "over rows", ""),
    "comparisons returned": (lambda z, t: z > z.gather(-1, t[..., None]), "comparison leaves", ""),
    "comparisons of some classes": (lambda z, t: (z > z.gather(-1, t[..., None]))[..., :9].sum(-1), "part of the", ""),
    "comparisons combined": (lambda z, t: ((z > torch.zeros(B, S, 1)) & EVEN).sum(-1), "", ""),
    "the smallest": (lambda z, t: z.topk(3, largest=False).indices, "smallest", "largest=True"),
    "topk of negated log-probabilities": (lambda z, t: (-z.log_softmax(-1)).topk(3).indices, "grow", "logits"),
    "topk over rows": (lambda z, t: z.topk(3, dim=1).indices, "topk over dimension 1", "vocabulary"),
    "the largest with a gradient": (lambda z, t: z.topk(3).values, "gradient", "detach"),
    "the largest probabilities": (lambda z, t: z.softmax(-1).topk(3).values, "largest probabilities", "logsumexp"),
    "topk of one-hot products": (lambda z, t: (z * F.one_hot(t, V)).topk(3).indices, "grow", ""),
    "sorted": (lambda z, t: z.argsort(-1, descending=True), "argsort", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name):
    metric, reason, cure = REFUSED[name]

    def fn(h, w, b, t):
        z = F.linear(h, w, b)
        return ce(z, t), metric(z, t)

    assert_same_as_eager(fn, operands(), fused=0)
    with config.patch(min_vocab=0):
        (site,) = cce_inductor.explain(fn, *operands()).sites
    assert not site.fused and reason in site.reason and cure in site.cure, (site.reason, site.cure)


@pytest.mark.parametrize(
    "between",
    [
        lambda z: z * 0.3 * 0.7,
        lambda z: z + torch.ones(V, dtype=z.dtype),
        lambda z: z + 1.0,
        lambda z: z * torch.tensor(0.3),
        lambda z: z.log_softmax(-1),
        lambda z: 5 * torch.tanh(z / 3),
        lambda z: (z * 0.3).masked_fill(EVEN, -2.0),
        lambda z: (z * 0.3).float() * 0.7,
    ],
)
def test_several_roundings_are_refused(between):
    """More or fewer logits would be equal than in eager mode; the classes of the largest may still be asked for."""

    def counts(h, w, b, t):
        z = F.linear(h, w, b)
        return ce(z, t), rank(between(z), t)

    def classes(h, w, b, t):
        z = F.linear(h, w, b)
        return ce(z, t), between(z).topk(3).indices

    h, w, b = [x.detach().bfloat16().requires_grad_() for x in operands()[:3]]
    t = operands()[3]
    assert_same_as_eager(counts, (h, w, b, t), fused=0, tolerance=2e-2)
    with config.patch(min_vocab=0):
        (site,) = cce_inductor.explain(counts, h, w, b, t).sites
        assert "16 bits" in site.reason and "float32" in site.cure
        (site,) = cce_inductor.explain(classes, h, w, b, t).sites
        assert site.fused
