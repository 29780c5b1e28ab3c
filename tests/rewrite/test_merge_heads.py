"""Logits of several heads that are the logits of one: sums of heads, and rows of one weight put together."""

import pytest
import torch
import torch.nn.functional as F
from capture import assert_same_as_eager, graphs_of, text
from torch._dynamo.utils import counters

from cce_inductor import config
from cce_inductor.rewrite.run import rewrite

B, S, D, V, R = 2, 6, 8, 40, 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(*shape):
    return torch.randn(shape).requires_grad_()


def labels():
    t = torch.randint(0, V, (B, S))
    t[0, :2] = -100
    return t


def ce(z, t):
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), t.reshape(-1))


def operands():
    return rand(B, S, D), rand(V, D), rand(B, S, R), rand(V, R), rand(V)


def added_in_place(x, w, u, v, b):
    z = F.linear(x, w, b)
    z += F.linear(u, v) * 0.5
    return z


def dora(base, low_rank, magnitude):
    """DoRA (arXiv 2402.09353), as peft adds it to the result of the layer it is for."""
    return base + ((magnitude.abs() - 1) * base + magnitude.abs() * low_rank)


COMBINED = {
    "LoRA": lambda x, w, u, v, b: F.linear(x, w) + F.linear(u, v) * 0.5,
    "LoRA, biases": lambda x, w, u, v, b: F.linear(x, w, b) * 2 + (u @ v.t() - 0.1 * b),
    "in place": added_in_place,
    "subtracted": lambda x, w, u, v, b: F.linear(x, w) - 3 * F.linear(u, v, b),
    "with alpha": lambda x, w, u, v, b: torch.add(F.linear(x, w), F.linear(u, v), alpha=0.25),
    "three": lambda x, w, u, v, b: (F.linear(x, w) + u @ v.t()) + F.linear(u.tanh(), v.tanh(), b),
    "one without gradient": lambda x, w, u, v, b: F.linear(x, w) + F.linear(u, v, b).detach(),
    "learned scales": lambda x, w, u, v, b: F.linear(x, w) * b[0] + F.linear(u, v) / (1 + b[1].abs()),
    "then a softcap": lambda x, w, u, v, b: 5 * torch.tanh((F.linear(x, w) + F.linear(u, v, b)) / 5),
    "classes in front": lambda x, w, u, v, b: ((w @ x.mT) + (v @ u.mT)).mT,
    "some of the classes": lambda x, w, u, v, b: F.linear(x, w)[..., 2:] + F.linear(u, v[2:]),
    "neighbouring rows": lambda x, w, u, v, b: (z := F.linear(x, w, b)) + 0.5 * z.roll(1, 1),
    "twice": lambda x, w, u, v, b: (z := F.linear(x, w, b) * 0.5) + z,
    "itself, scaled": lambda x, w, u, v, b: (z := F.linear(x, w, b)) - 0.3 * z,
    "itself, scaled by class": lambda x, w, u, v, b: (z := F.linear(x, w, b)) + (b.exp() - 1) * z,
    "DoRA": lambda x, w, u, v, b: dora(F.linear(x, w), F.linear(u, v), b),
    "DoRA, a bias": lambda x, w, u, v, b: b + dora(F.linear(x, w), 2 * F.linear(u, v), b),
    "classes of their own weight": lambda x, w, u, v, b: b * F.linear(x, w, b) - F.linear(u, v) / b.exp(),
    "the same one in two sums": lambda x, w, u, v, b: (z := x @ w.t()) + (0.5 * z + u @ v.t()) * 2,
    "itself, detached": lambda x, w, u, v, b: (z := F.linear(x, w, b)) + 0.5 * z.detach(),
    "rows": lambda x, w, u, v, b: torch.cat([F.linear(p, w, b) for p in x.chunk(2, 1)], 1),
    "rows, transposed": lambda x, w, u, v, b: torch.cat([(p @ w.t()).mT for p in x.split([1, 2, 3], 1)], -1).mT,
    "rows, stacked": lambda x, w, u, v, b: torch.stack([F.linear(p, w) + b for p in x.unbind(1)], 1),
    "rows, stacked behind the classes": lambda x, w, u, v, b: torch.stack([p @ w.t() for p in x.unbind(1)], 2).mT,
    "rows of other hidden states": lambda x, w, u, v, b: torch.cat([F.linear(x[:1], w), F.linear(x[1:].tanh(), w)]),
    "rows of sums": lambda x, w, u, v, b: torch.cat([F.linear(x[:1], w), F.linear(x[1:], w)]) + F.linear(u, v),
}


@pytest.mark.parametrize("name", COMBINED)
def test_one_site(name):
    def fn(x, w, u, v, b, t):
        z = COMBINED[name](x, w, u, v, b)
        return ce(z, t if z.shape[-1] == V else t.clamp(max=V - 3))

    assert_same_as_eager(fn, (*operands(), labels()), fused=1)


@pytest.mark.parametrize("name", ["LoRA", "rows"])
def test_symbolic_sizes(name):
    assert_same_as_eager(lambda *a: ce(COMBINED[name](*a[:-1]), a[-1]), (*operands(), labels()), fused=1, dynamic=True)


@pytest.mark.parametrize("name", COMBINED)
def test_the_logits_are_deferred_and_read_as_eager_has_them(name):
    def fn(x, w, u, v, b, t):
        z = COMBINED[name](x, w, u, v, b)
        return ce(z[:, 1:], t[:, 1:].clamp(max=V - 3)), z

    inputs = (*operands(), labels())
    torch._dynamo.reset()
    before = counters["cce_inductor"]["deferred_materialized"]
    compiled = torch.compile(fn, backend="cce", options={"min_vocab": 0, "compiler": "aot_eager"})
    loss, logits = compiled(*inputs)
    assert counters["cce_inductor"]["deferred_materialized"] == before
    want_loss, want = fn(*inputs)
    torch.testing.assert_close(loss, want_loss)
    # The logits are computed as eager does, step by step.
    torch.testing.assert_close(logits + 0, want, rtol=1e-6, atol=1e-6)
    leaves = [x for x in inputs if x.requires_grad]
    weights = torch.randn_like(want)
    got = torch.autograd.grad(loss + (logits * weights).sum(), leaves, allow_unused=True)
    expected = torch.autograd.grad(want_loss + (want * weights).sum(), leaves, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_bf16_is_as_exact_as_eager():
    """A sum is rounded once, where eager rounds both terms and their sum."""
    x, w, u, v = ((torch.randn(s) * 0.5).bfloat16() for s in ((64, 32), (100, 32), (64, 4), (100, 4)))
    t = torch.randint(0, 100, (64,))

    def fn(x, w, u, v):
        return F.cross_entropy((F.linear(x, w) + 0.3 * F.linear(u, v)).float(), t)

    def gradients(f, dtype):
        leaves = [p.to(dtype).requires_grad_() for p in (x, w, u, v)]
        return [g.double() for g in torch.autograd.grad(f(*leaves), leaves)]

    exact = gradients(lambda x, w, u, v: F.cross_entropy(F.linear(x, w) + 0.3 * F.linear(u, v), t), torch.float64)
    torch._dynamo.reset()
    ours = gradients(
        torch.compile(fn, backend="cce", options={"min_vocab": 0, "compiler": "aot_eager"}), torch.bfloat16
    )
    for a, b, c in zip(ours, gradients(fn, torch.bfloat16), exact, strict=True):
        assert (a - c).abs().max() <= 1.25 * (b - c).abs().max()


def rewritten(fn, *inputs, **settings):
    gm = graphs_of(fn, *inputs)[-1]
    return gm, rewrite(gm, config.Settings(min_vocab=0, **settings), "v")


def operators(result):
    return [n for n in result.graph_module.graph.nodes if "linear_statistics" in str(n.target)]


def test_one_product_and_no_other_is_left():
    _, result = rewritten(lambda x, w, u, v, t: ce(F.linear(x, w) + F.linear(u, v), t), *operands()[:4], labels())
    assert len(operators(result)) == 1
    assert " linear(" not in text(result.graph_module)


def test_chunks_of_rows_read_the_weight_itself():
    _, result = rewritten(lambda x, w, t: ce(torch.cat([p @ w.t() for p in x.chunk(2)]), t), *operands()[:2], labels())
    (made,) = operators(result)
    assert made.args[0][1].op == "placeholder"


def declined(fn, *inputs, **settings):
    """The sites of a graph that has to be left as it is."""
    gm, result = rewritten(fn, *inputs, **settings)
    assert result.graph_module is gm
    return result.sites


@pytest.mark.parametrize("use", [lambda z, t: z.abs().mean(), lambda z, t: z.relu().sum()])
def test_a_head_that_is_read_elsewhere_keeps_the_sum(use):
    def fn(x, w, u, v, t):
        z = F.linear(x, w)
        return ce(z + F.linear(u, v), t) + use(z, t)

    (site,) = declined(fn, *operands()[:4], labels())
    assert "reads the logits themselves" in site.reason


def test_a_sum_that_is_read_elsewhere_keeps_its_heads():
    def fn(x, w, u, v, t):
        z = F.linear(x, w)
        both = z + F.linear(u, v)
        return ce(z, t) + both.square().mean()

    (site,) = declined(fn, *operands()[:4], labels())
    assert "square" in site.reason


def test_a_sum_that_no_loss_reads_keeps_its_heads():
    def fn(x, w, u, v, t):
        z = F.linear(x, w)
        return ce(z, t), z + F.linear(u, v)

    (site,) = declined(fn, *operands()[:4], labels())
    assert "no loss reads" in site.reason


def test_a_loss_of_a_head_and_one_of_the_sum():
    def fn(x, w, u, v, t):
        z = F.linear(x, w)
        return ce(z + F.linear(u, v), t) + 0.5 * ce(z, t)

    assert_same_as_eager(fn, (*operands()[:4], labels()), fused=2)


def test_a_refused_sum_refuses_the_losses_of_its_heads():
    """Otherwise one head would be computed twice, to save nothing."""

    def fn(x, w, u, v, t):
        z = F.linear(x, w)
        return ce(z + F.linear(u, v), t) + 0.5 * ce(z, t)

    x, w, u, v, _ = operands()
    sites = declined(fn, x[:, :2], w, u[:, :2], v, labels()[:, :2], workspace_mb=0)
    assert len(sites) == 2 and all("put together take" in site.reason for site in sites)


def test_a_write_between_the_heads():
    def fn(x, w, u, v, t):
        x = x.detach() * 1
        z = F.linear(x, w)
        x.mul_(2)
        return ce(z + F.linear(u, v), t)

    (site,) = declined(fn, *operands()[:4], labels())
    assert "written to in place" in site.reason


def test_weights_larger_than_the_logits_are_not_copied():
    """[w, v] and its gradient, against logits of few rows and theirs."""

    def fn(x, w, u, v, t):
        return ce(F.linear(x, w) + F.linear(u, v), t)

    few = rand(1, 4, 64), rand(V, 64), rand(1, 4, R), rand(V, R), torch.randint(0, V, (1, 4))
    (site,) = declined(fn, *few, workspace_mb=0)
    assert "more than the logits" in site.reason
    many = rand(1, 90, 64), rand(V, 64), rand(1, 90, R), rand(V, R), torch.randint(0, V, (1, 90))
    _, result = rewritten(fn, *many, workspace_mb=0)
    assert result.fused == 1
    _, result = rewritten(fn, *few)  # they are less than the workspace
    assert result.fused == 1


def test_nothing_is_left_of_sums_that_no_loss_needs():
    """Layers inside of a model are linear, and added, too."""

    def fn(x, w, u, v, t):
        y = (F.linear(x, v[:D, :1].expand(D, D)) + F.linear(u, w[:D, :R])).relu()
        return ce(F.linear(y, w), t)

    _, result = rewritten(fn, *operands()[:4], labels())
    kept = text(result.graph_module).split("linear_statistics")[0]
    assert result.fused == 1 and "cat" not in kept and kept.count("linear(") == 2


@pytest.mark.parametrize("first", [True, False], ids=["column first", "loss first"])
def test_one_column_of_chunks_of_rows_in_another_order(first):
    """The product can be read with either factor as the weight: of the other way its rows are heads of their own."""

    def fn(h, w, t):
        z = torch.cat(h.matmul(w).chunk(2)[::-1])
        made = z[..., 1].sum(), F.cross_entropy(z, t)
        return sum(made if first else made[::-1])

    assert_same_as_eager(fn, (rand(4, 6), rand(6, 9), torch.tensor([3, 8, 0, 1])), fused=1)
