"""Losses that compare two heads over one vocabulary: eager's numbers where they fuse, and why others do not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from capture import FUSE_ALL, assert_same_as_eager, graphs_of
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributions import Categorical, kl_divergence

from cce_inductor import config
from cce_inductor.rewrite.run import rewrite

N, D, OTHER_D, V = 12, 8, 5, 40

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def kl(z, r, reduction="none", log_target=False, T=1.0):
    target = (r / T).log_softmax(-1) if log_target else (r / T).softmax(-1)
    return F.kl_div((z / T).log_softmax(-1), target, reduction=reduction, log_target=log_target)


ce = F.cross_entropy


def zeroed_in_place(z, r, keep):
    d = kl(z, r)
    d.masked_fill_(~keep, 0.0)
    return d.sum() / keep.sum()


def accumulated(z, r):
    p = z.softmax(-1)
    d = p * z.log_softmax(-1)
    return (d - p * r.log_softmax(-1)).sum(-1).mean()


def without_infinite(z, r):
    bad = torch.isinf(z) | torch.isinf(r)
    return -torch.masked_fill(z.softmax(-1) * r.log_softmax(-1), bad, 0).sum(-1).mean()


def with_mass(z, r):
    q = r.softmax(-1)
    return torch.where(q > 0, q * (q.log() - z.log_softmax(-1)), 0.0).sum(-1).mean()


def emo(z, r, w, t):
    e = F.normalize(w.detach(), dim=-1)
    return (1 - ((F.one_hot(t, V).to(z.dtype) @ e) * (z.softmax(-1) @ e)).sum(-1)).mean()


def emo_without_target(z, w, t):
    e, hot, q = w.detach(), F.one_hot(t, V).to(z.dtype), z.softmax(-1)
    return (1 - ((hot @ e) * ((q - (q * hot).detach()) @ e)).sum(-1)).mean()


def sure(z, r):
    """FixMatch (arXiv 2001.07685) with soft labels: rows count whose largest probability is above a threshold."""
    with torch.no_grad():
        q = r.softmax(-1)
        keep = (q.max(-1).values > 1.5 / V).float()
    return (-(q * z.log_softmax(-1)).sum(-1) * keep).mean()


# Of the logits z and r (N, V), a mask of rows (N, 1), the weight of z, and classes (N,).
FUSED: dict[str, Callable] = {
    "kl_div, mean": lambda z, r, keep, w, t: kl(z, r, "mean"),
    "kl_div, sum": lambda z, r, keep, w, t: kl(z, r, "sum"),
    "kl_div, batchmean": lambda z, r, keep, w, t: 4 * kl(z, r, "batchmean", T=2.0),
    "kl_div of logarithms": lambda z, r, keep, w, t: kl(z, r, log_target=True).sum(-1).mean(),
    "reverse": lambda z, r, keep, w, t: kl(r, z, log_target=True).sum(-1).mean(),
    "of the detached": lambda z, r, keep, w, t: kl(z, r.detach(), "batchmean"),
    "of detached probabilities": lambda z, r, keep, w, t: F.cross_entropy(z, r.softmax(-1).detach()),
    "log-probabilities less a value": lambda z, r, keep, w, t: (
        (lp := z.log_softmax(-1)).exp() * (0.2 * lp - r.detach())
    ).sum(-1).mean(),
    "rows that count": lambda z, r, keep, w, t: (kl(z, r) * keep).sum() / keep.sum(),
    "rows set to 0": lambda z, r, keep, w, t: kl(z, r).masked_fill(~keep, 0.0).sum(),
    "rows set to 0 in place": lambda z, r, keep, w, t: zeroed_in_place(z, r, keep),
    "rows chosen": lambda z, r, keep, w, t: torch.where(keep, kl(z, r), torch.zeros_like(z)).sum(),
    "rows chosen by what is left out": lambda z, r, keep, w, t: torch.where(~keep, 0.0, kl(z, r)).sum(),
    "rows that count, expanded": lambda z, r, keep, w, t: (kl(z, r) * keep.expand(-1, V)).sum() / keep.sum(),
    "rows set to 0, expanded": lambda z, r, keep, w, t: kl(z, r).masked_fill((~keep).expand_as(z), 0.0).sum(),
    "where there is mass": lambda z, r, keep, w, t: with_mass(z, r),
    "smoothed": lambda z, r, keep, w, t: F.cross_entropy(z, r.softmax(-1), label_smoothing=0.1),
    "smoothed log-probabilities": lambda z, r, keep, w, t: F.cross_entropy(
        z.log_softmax(-1), r.softmax(-1), label_smoothing=0.2, reduction="sum"
    ),
    "probabilities as targets": lambda z, r, keep, w, t: F.cross_entropy(z, (r / 2).softmax(-1)),
    "one a row": lambda z, r, keep, w, t: (F.cross_entropy(z, r.softmax(-1), reduction="none") * keep[:, 0]).sum(),
    "written out": lambda z, r, keep, w, t: -(r.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "a share of it": lambda z, r, keep, w, t: -(0.3 * r.softmax(-1) * z.log_softmax(-1) / 7).mean(),
    "of a difference": lambda z, r, keep, w, t: (
        (p := z.log_softmax(-1)).exp() * (p - r.log_softmax(-1))
    ).sum(-1).mean(),
    "of two sums": lambda z, r, keep, w, t: accumulated(z, r),
    "unequal parts": lambda z, r, keep, w, t: (
        z.softmax(-1) * (2 * z.log_softmax(-1) - r.log_softmax(-1))
    ).sum(-1).mean(),
    "both ways": lambda z, r, keep, w, t: (
        (z.softmax(-1) - r.softmax(-1)) * (z.log_softmax(-1) - r.log_softmax(-1))
    ).sum(-1).mean(),
    "an expected value": lambda z, r, keep, w, t: (z.softmax(-1) * r).sum(-1).mean(),
    "of the other": lambda z, r, keep, w, t: (z * r.detach().softmax(-1)).sum(-1).mean(),
    "with the infinite left out": lambda z, r, keep, w, t: without_infinite(z, r),
    "beside the label's": lambda z, r, keep, w, t: F.cross_entropy(z, t) + kl(z, r.detach(), "batchmean"),
    "rows rearranged": lambda z, r, keep, w, t: (kl(z.view(3, 4, V), r.view(3, 4, V))[:, 1:].sum(-1)).mean(),
    "of a smaller part": lambda z, r, keep, w, t: kl(z[1:, :30], r[:-1, :30], "batchmean"),
    "of a softcap": lambda z, r, keep, w, t: kl(3 * torch.tanh(z / 3), 5 * torch.tanh(r / 5), "batchmean"),
    "the same head, detached": lambda z, r, keep, w, t: kl(z, z.detach(), "sum") + ce(z, t),
    "the same head, sharper": lambda z, r, keep, w, t: kl(z, z.detach() * 3, "batchmean"),
    "expected embeddings": lambda z, r, keep, w, t: emo(z, r, w, t),
    "without the target": lambda z, r, keep, w, t: emo_without_target(z, w, t),
    "of vectors": lambda z, r, keep, w, t: (2.0 * F.linear(z.softmax(-1), w.detach().t()) * w[t]).sum(-1).mean(),
}  # fmt: skip


def heads(loss: Callable, frozen: bool = False) -> Callable:
    def fn(x, w, y, u, keep, t):
        z = F.linear(x, w)
        if frozen:
            with torch.no_grad():
                r = F.linear(y, u)
        else:
            r = F.linear(y, u)
        return loss(z, r, keep, w, t)

    return fn


def operands(dtype=torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = (N, D), (V, D), (N, OTHER_D), (V, OTHER_D)
    made = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    return *made, torch.arange(N)[:, None] % 3 != 0, torch.randint(0, V, (N,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_same_as_eager(name, dtype):
    assert_same_as_eager(
        heads(FUSED[name]), operands(dtype), fused=1, tolerance=2e-5 if dtype == torch.float32 else 4e-2
    )


def without_grad(fn: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return fn()


# Products of two heads' functions that have no gradient, though both heads have one.
DETACHED: dict[str, Callable] = {
    "a reward": lambda z, r, g: ((z.log_softmax(-1) - r.log_softmax(-1)).detach() * z.softmax(-1)).sum(-1).mean(),
    "per entry": lambda z, r, g: (kl(z, r).detach().sum(-1) * z.logsumexp(-1)).mean(),
    "products": lambda z, r, g: ((r.softmax(-1) * z.log_softmax(-1)).detach() * g).sum() + z.logsumexp(-1).mean(),
    "data": lambda z, r, g: ((r.softmax(-1) * z.log_softmax(-1)).data * g).sum() + z.logsumexp(-1).mean(),
    "half": lambda z, r, g: (lambda x: (x - 0.5 * x.detach()).sum(-1).mean())(r.softmax(-1) * z.log_softmax(-1)),
    "beside others": lambda z, r, g: (
        (r.softmax(-1) * z.log_softmax(-1)).detach() + z.softmax(-1) * z.log_softmax(-1)
    ).sum(-1).mean(),
    "without recording": lambda z, r, g: (
        lambda x: (without_grad(lambda: x * 2) * g).sum() + z.logsumexp(-1).mean()
    )(r.softmax(-1) * z.log_softmax(-1)),
    "a mixture": lambda z, r, g: (
        z.softmax(-1) * (z.log_softmax(-1) - (0.5 * z.softmax(-1) + 0.5 * r.softmax(-1)).log().detach())
    ).sum(-1).mean(),
    "entries": lambda z, r, g: (
        (z.log_softmax(-1) - r.log_softmax(-1)).detach()[torch.arange(N), torch.arange(N)]
        * z.log_softmax(-1)[torch.arange(N), torch.arange(N)]
    ).mean(),
}  # fmt: skip


@pytest.mark.parametrize("name", DETACHED)
def test_what_is_detached_has_no_gradient(name):
    x, w, y, u, *_ = operands()

    def fn(x, w, y, u, g):
        return DETACHED[name](F.linear(x, w), F.linear(y, u), g)

    before = dict(counters["cce_inductor"])
    g = torch.rand(N, 1)
    compiled = torch.compile(fn, backend="cce", options=FUSE_ALL)
    found = [
        (value.detach(), *torch.autograd.grad(value, (w, u), allow_unused=True))
        for value in (made(x, w, y, u, g) for made in (fn, compiled))
    ]
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    assert counters["cce_inductor"]["fused"] > before.get("fused", 0) or name in ("entries", "a mixture")


@pytest.mark.parametrize("how", ["split", "steps"])
def test_halves_of_a_symbolic_batch(how):
    def fn(x, w):
        z = F.linear(x, w)
        a, b = torch.split(z, z.size(0) // 2) if how == "split" else (z[0::2], z[1::2])
        return kl(a, b, "batchmean")

    x, w, *_ = operands()
    assert_same_as_eager(fn, (x, w), fused=1, tolerance=2e-5, dynamic=True)


@pytest.mark.parametrize("name", ["kl_div, batchmean", "reverse", "both ways", "of two sums", "rows that count"])
def test_a_frozen_head(name):
    assert_same_as_eager(heads(FUSED[name], frozen=True), operands(), fused=1, tolerance=2e-5)


def test_rows_that_the_other_head_is_sure_of():
    """Its largest probabilities are statistics of that head alone: a site of their own."""
    assert_same_as_eager(heads(lambda z, r, *_: sure(z, r)), operands(), fused=2, tolerance=2e-5)


@pytest.mark.parametrize("name", ["kl_div, batchmean", "one a row", "both ways", "expected embeddings"])
def test_symbolic_rows(name):
    assert_same_as_eager(heads(FUSED[name]), operands(), fused=1, tolerance=2e-5, dynamic=True)


def test_logits_are_returned_besides():
    def fn(x, w, y, u, keep, t):
        z, r = F.linear(x, w), F.linear(y, u)
        return kl(z, r, "batchmean"), z

    assert_same_as_eager(fn, operands(), fused=1, deferred=1)


def test_classes_in_front_of_the_rows():
    def fn(x, w, y, u, keep, t):
        z, r = torch.matmul(w, x.t())[None], torch.matmul(u, y.t())[None]
        return F.cross_entropy(z, r.softmax(1), reduction="none").squeeze(0).mean()

    assert_same_as_eager(fn, operands(), fused=1)


def test_one_call_serves_both_directions_and_the_label():
    x, w, y, u, _, t = operands()

    def fn(x, w, y, u, t):
        z, r = F.linear(x, w), F.linear(y, u)
        return kl(z, r, "batchmean") + kl(r, z, "batchmean") + z.logsumexp(-1).mean()

    (gm,) = graphs_of(fn, x, w, y, u, t)
    out = rewrite(gm, config.Settings(min_vocab=0), "v").graph_module
    calls = [n for n in out.graph.nodes if "linear_statistics" in str(n.target)]
    assert len(calls) == 1 and "divergence other_divergence" in calls[0].args[3]
    assert calls[0].args[1].split() == ["input", "weight", "other_input", "other_weight"]


def test_a_product_with_one_hot_tensors_looks_rows_up():
    x, w, y, u, keep, t = operands()
    (gm,) = graphs_of(heads(FUSED["expected embeddings"]), x, w, y, u, keep, t)
    out = rewrite(gm, config.Settings(min_vocab=0), "v").graph_module
    out.graph.eliminate_dead_code()
    assert not [n for n in out.graph.nodes if n.target is F.one_hot]


def test_masks_of_infinite_logits_do_not_keep_the_logits():
    (gm,) = graphs_of(heads(FUSED["with the infinite left out"]), *operands())
    out = rewrite(gm, config.Settings(min_vocab=0), "v").graph_module
    assert not [n for n in out.graph.nodes if "linear" in str(n.target) and "statistics" not in str(n.target)]


def aliased(z, r, keep):
    d = kl(z, r)
    view = d[:]
    d.masked_fill_(~keep, 0.0)
    return view.sum()


def set_where(d, where, number):
    d[where] = number
    return d


def edited_alias(z, r):
    alias = z[:]
    z.mul_(2.0)
    return kl(alias, r, "sum")


def edited_since(z, r):
    products = z.detach().softmax(-1) * r[:]
    r.mul_(2.0)
    return products.sum(-1).mean()


def many_products(z, r):
    total = z.softmax(-1) * r.log_softmax(-1)
    for k in range(8):
        total = total + (k + 2) * (z.softmax(-1) * r.log_softmax(-1))
    return total.sum()


def in_float64(w):
    return F.linear(torch.ones(N, D, dtype=torch.float64), w.double())


# The loss, and a part of the reason.
REFUSED: dict[str, tuple[Callable, str]] = {
    "weighed by class": (lambda z, r, keep, w, t: (kl(z, r) * torch.rand(V)).sum(), "weighed by class"),
    "masked by class": (lambda z, r, keep, w, t: kl(z, r).masked_fill(torch.rand(V) < 0.5, 0.0).sum(), "by class"),
    "filled with 1": (lambda z, r, keep, w, t: kl(z, r).masked_fill(keep, 1.0).sum(), "masked by class"),
    "expanded": (lambda z, r, keep, w, t: (kl(z, r) * keep[None].float().expand(2, N, 1)).sum(), "weighed by class"),
    "squared": (lambda z, r, keep, w, t: kl(z, r).square().sum(), "products of two heads"),
    "weighed and detached": (
        lambda z, r, keep, w, t: (kl(z, r) * w.mean()).detach().sum() + z.logsumexp(-1).sum(),
        "weighted products",
    ),
    "a total variation": (
        lambda z, r, keep, w, t: (z.softmax(-1) - r.softmax(-1)).abs().sum(-1).mean(),
        "products of two heads",
    ),
    "a product of probabilities": (
        lambda z, r, keep, w, t: ((z.softmax(-1) - r.softmax(-1)) * r.softmax(-1)).sum(-1).mean(),
        "none of expected values",
    ),
    "of a mixture": (
        lambda z, r, keep, w, t: kl(z, r, "sum") + (0.5 * (z.softmax(-1) + r.softmax(-1))).log().mean(),
        "the logarithm of a mixture",
    ),
    "an entry": (lambda z, r, keep, w, t: kl(z, r).gather(-1, t[:, None]).sum(), "cut by class"),
    "divided by": (lambda z, r, keep, w, t: (1.0 / (z.softmax(-1) * r.log_softmax(-1))).sum(), "divided by"),
    "something added": (lambda z, r, keep, w, t: (kl(z, r) + torch.rand(N, 1)).sum(), "something is added"),
    "a sum over rows": (lambda z, r, keep, w, t: kl(z, r).sum(0).square().mean(), "summed over rows"),
    "a difference alone": (
        lambda z, r, keep, w, t: (z.log_softmax(-1) - r.log_softmax(-1)).sum(-1).mean(),
        "summed beside another head's",
    ),
    "probabilities alone": (lambda z, r, keep, w, t: (z.softmax(-1) + r.softmax(-1)).sum(-1).mean(), "which is 1"),
    "masked logits": (
        lambda z, r, keep, w, t: kl(z.masked_fill(torch.arange(V) > 35, -1e4), r, "batchmean"),
        "masked logits are compared",
    ),
    "an alias that was edited": (lambda z, r, keep, w, t: aliased(z, r, keep), "an alias of what two heads"),
    "left": (lambda z, r, keep, w, t: kl(z, r), "leave the graph"),
    "weights of the classes": (
        lambda z, r, keep, w, t: F.cross_entropy(z, r.softmax(-1), weight=torch.rand(V)),
        "and class weights",
    ),
    "where another has mass": (
        lambda z, r, keep, w, t: torch.where(z.softmax(-1) > 0, kl(z, r), 0.0).sum(),
        "masked by class",
    ),
    "logits as a target": (lambda z, r, keep, w, t: F.cross_entropy(z, r), "and another head's logits"),
    "probabilities as an input": (
        lambda z, r, keep, w, t: F.kl_div(z.softmax(-1), r.softmax(-1)),
        "kl_div takes log-probabilities",
    ),
    "a target of logits": (lambda z, r, keep, w, t: F.kl_div(z.log_softmax(-1), r), "the target of kl_div is no"),
    "in float64": (lambda z, r, keep, w, t: kl(z, r).double().sum(), "cast to torch.float64"),
    "of a sequence of tokens": (
        lambda z, r, keep, w, t: kl(z.view(3, 4, V).transpose(1, 2), r.view(3, 4, V).transpose(1, 2), "sum"),
        "dimension",
    ),
    "shifted expected values": (
        lambda z, r, keep, w, t: (z.softmax(-1) * (r + 1.0)).sum(-1).mean(),
        "to which something was added",
    ),
    "an embedding that is normalised": (
        lambda z, r, keep, w, t: F.normalize(z.softmax(-1) @ w, dim=-1).sum(),
        "an expected embedding",
    ),
    "an embedding that leaves": (lambda z, r, keep, w, t: z.softmax(-1) @ w, "an expected embedding"),
    "where a biased head is infinite": (
        lambda z, r, keep, w, t: without_infinite(z + torch.rand(V), r),
        "with a bias or a mask are infinite",
    ),
    "zeros of another head": (
        lambda z, r, keep, w, t: set_where(kl(z, r), z.softmax(-1) == 0, 0.0).sum(),
        "masked by class",
    ),
    "where logits are infinite": (
        lambda z, r, keep, w, t: (z.softmax(-1) * r.log_softmax(-1) * torch.isinf(z)).sum(),
        "are read as numbers",
    ),
    "of scaled log-probabilities": (
        lambda z, r, keep, w, t: F.cross_entropy(2 * z.log_softmax(-1), r.softmax(-1)),
        "scaled log-probabilities",
    ),
    "another mask where they are": (
        lambda z, r, keep, w, t: torch.ones(N, V).masked_fill(torch.isinf(z), 0.0).sum(),
        "parts of the logits",
    ),
    "of other rows": (lambda z, r, keep, w, t: (z.softmax(-1) * r[:1].log_softmax(-1)).sum(), "differ in shape"),
    "with a deprecated argument": (
        lambda z, r, keep, w, t: F.kl_div(z.log_softmax(-1), r.softmax(-1), size_average=False),
        "deprecated arguments",
    ),
    "of products": (
        lambda z, r, keep, w, t: F.kl_div(z.softmax(-1) * r.log_softmax(-1), r.softmax(-1)),
        "no function of one head's logits",
    ),
    "weighed in another dimension": (lambda z, r, keep, w, t: (kl(z, r) * keep[None].float()).sum(), "heads"),
    "an alias of edited logits": (lambda z, r, keep, w, t: edited_alias(z, r), "an alias of the logits was edited"),
    "logits edited since": (lambda z, r, keep, w, t: edited_since(z, r), "edited in place"),
    "exponentials": (lambda z, r, keep, w, t: F.kl_div(z.exp(), r.softmax(-1)), "are compared with those of another"),
    "nine products": (
        lambda z, r, keep, w, t: many_products(z, r),
        "more than eight products",
    ),
    "with a margin": (lambda z, r, keep, w, t: kl(z - 0.5 * F.one_hot(t, V), r, "sum"), "edited logits"),
    "a head in float64": (lambda z, r, keep, w, t: kl(z, in_float64(w), "sum"), "logits in float64"),
    "zeros set to 1": (lambda z, r, keep, w, t: set_where(kl(z, r), r.softmax(-1) == 0, 1.0).sum(), "masked by class"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    loss, words = REFUSED[name]
    x, w, y, u, keep, t = operands()

    def fn(x, w, y, u, keep, t):
        z, r = F.linear(x, w), F.linear(y, u)
        return loss(z, r, keep, w, t), F.cross_entropy(z, t)

    graphs = graphs_of(fn, x, w, y, u, keep, t)
    sites = rewrite(graphs[-1], config.Settings(min_vocab=0), "v").sites
    assert sites and not any(site.fused for site in sites)
    assert any(words in site.reason for site in sites), [site.reason for site in sites]


def test_vocabularies_of_different_sizes():
    def fn(x, w, y, u):
        return kl(F.linear(x, w), F.pad(F.linear(y, u[:-4]), (0, 4), value=-5.0), "batchmean")

    assert_same_as_eager(fn, operands()[:4], fused=0)


def test_kl_divergence_of_distributions():
    def fn(x, w, y, u):
        p, q = (Categorical(logits=F.linear(a, b), validate_args=False) for a, b in ((x, w), (y, u)))
        return kl_divergence(p, q).mean()

    assert_same_as_eager(fn, operands()[:4], fused=2, tolerance=2e-5)


def test_without_a_kernel_it_is_left_to_the_compiler():
    x, w, y, u, keep, t = operands(torch.float64)
    from cce_inductor.lowering.choose import choose

    (gm,) = graphs_of(heads(FUSED["kl_div, batchmean"]), x, w, y, u, keep, t)
    (site, *_) = rewrite(gm, config.Settings(min_vocab=0), "v", choose).sites
    assert not site.fused and "fit in memory" in site.reason
