"""The algebra of heads, row maps, pointwise ops and statistics: each spelling fuses, and is eager's."""

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from capture import FUSE_ALL, assert_same_as_eager, graphs_of
from torch._dynamo.utils import counters

from cce_inductor import config
from cce_inductor.ops.choice import Choice
from cce_inductor.rewrite.run import rewrite

B, S, D, V = 2, 6, 8, 40


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(*shape, scale=1.0):
    return (torch.randn(shape) * scale).requires_grad_()


def labels(ignored=None):
    t = torch.randint(0, V, (B, S))
    if ignored is not None:
        t[0, :2] = ignored
    return t


def ce(z, t, **kwargs):
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), t.reshape(-1), **kwargs)


# ---- heads

HEADS = {
    "einsum": lambda h, w: torch.einsum("bsd,vd->bsv", h, w),
    "einsum, stored (D, V)": lambda h, w: torch.einsum("b s d, d v -> b s v", h, w.t()),
    "einsum with an ellipsis": lambda h, w: torch.einsum("...d,vd->...v", h, w),
    "einsum, the weight first": lambda h, w: torch.einsum("vd,bsd->bsv", w, h),
    "einsum, the result in another order": lambda h, w: torch.einsum("bsd,vd->svb", h, w).permute(2, 0, 1),
    "einsum, the hidden dimension first": lambda h, w: torch.einsum("dbs,vd->bsv", h.permute(2, 0, 1), w),
    "einsum without a result": lambda h, w: torch.einsum("bsd,vd", h, w),
    "tensordot": lambda h, w: torch.tensordot(h, w, dims=([2], [1])),
    "tensordot by a number": lambda h, w: torch.tensordot(h, w.t(), 1),
    "inner": lambda h, w: torch.inner(h, w),
    "bmm with an expanded weight": lambda h, w: torch.bmm(h, w.t().unsqueeze(0).expand(B, -1, -1)),
    "matmul with a weight [None]": lambda h, w: torch.matmul(h, w.t()[None].expand(B, D, V)),
    "baddbmm": lambda h, w: torch.baddbmm(torch.ones(V), h, w.t().expand(B, D, V)),
    "W @ x.T": lambda h, w: (w @ h.reshape(-1, D).t()).t().reshape(B, S, V),
    "F.linear(W, x).T": lambda h, w: F.linear(w, h.reshape(-1, D)).T.reshape(B, S, V),
    "W @ a batch": lambda h, w: (w @ h.mT).mT,
    "inner, the weight first": lambda h, w: torch.inner(w, h).movedim(0, -1),
    "tensordot, the weight first": lambda h, w: torch.tensordot(w, h, dims=([1], [2])).permute(1, 2, 0),
    "convolution of one point": lambda h, w: F.conv1d(h.transpose(1, 2), w[:, :, None]).transpose(1, 2),
    "two-dimensional convolution": lambda h, w: (
        F.conv2d(h.transpose(1, 2)[..., None], w[:, :, None, None], torch.ones(V))[..., 0].mT
    ),
    "gathered rows of the weight": lambda h, w: F.linear(h, w[torch.arange(V).flip(0)]),
    "weight norm": lambda h, w: F.linear(h, w / w.norm(dim=1, keepdim=True)),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    def fn(h, w, t):
        return ce(HEADS[name](h, w), t)

    assert_same_as_eager(fn, (rand(B, S, D), rand(V, D), labels(-100)), fused=1)


@pytest.mark.parametrize("head", [lambda h, w: w @ h, torch.matmul, lambda h, w: torch.mv(w, h)])
def test_one_row(head):
    def fn(h, w, t):
        z = head(h[0, -1], w.t()) if head is torch.matmul else head(h[0, -1], w)
        return F.cross_entropy(z, t[0, -1])

    assert_same_as_eager(fn, (rand(B, S, D), rand(V, D), labels()), fused=1)


def test_both_directions_of_a_similarity_matrix():
    def clip(a, b, scale):
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        z = scale.exp() * a @ b.t()
        y = torch.arange(z.shape[0])
        return (F.cross_entropy(z, y) + F.cross_entropy(z.t(), y)) / 2

    assert_same_as_eager(clip, (rand(12, D), rand(12, D), rand()), fused=2)


# ---- rows

ROWS = {
    "view_as": lambda z, t: (z.view_as(torch.empty(B * S, V)), t.view(-1)),
    "unflatten": lambda z, t: (z.flatten(0, 1).unflatten(0, (S, B)), t.view(S, B)),
    "expand": lambda z, t: (z[None].expand(3, B, S, V), t.expand(3, B, S)),
    "expand_as": lambda z, t: (z[:1].expand_as(torch.empty(B, S, V)), t),
    "select": lambda z, t: (z.select(1, 2), t[:, 2]),
    "narrow": lambda z, t: (z.narrow(1, 1, 3), t[:, 1:4]),
    "a step": lambda z, t: (z[:, ::2], t[:, ::2]),
    "index_select": lambda z, t: (z.index_select(1, torch.tensor([4, 0, 0])), t[:, [4, 0, 0]]),
    "rows by a tensor": lambda z, t: (z[torch.arange(B), torch.tensor([5, 2])], t[:, 0]),
    "rows by a tensor behind a slice": lambda z, t: (z[:, torch.tensor([[0, 1], [2, 3]])], t[:, :4].reshape(B, 2, 2)),
    "rows by a gather": lambda z, t: (
        z.gather(1, torch.tensor([[0], [3]])[..., None].expand(-1, -1, V)),
        t[:, :1],
    ),
    "flip": lambda z, t: (z.flip(1), t.flip(1)),
    "flip of a function": lambda z, t: (torch.flip(z, [0, 1]), t.flip(0, 1)),
    "roll": lambda z, t: (z.roll(1, 1), t),
    "roll of two": lambda z, t: (torch.roll(z, (1, 2), (0, 1)), t),
    "rot90": lambda z, t: (z.rot90(1, (0, 1)), t.rot90(1, (0, 1))),
    "movedim": lambda z, t: (z.movedim(-1, 0).movedim(0, -1), t),
    "moveaxis of rows": lambda z, t: (torch.moveaxis(z, 0, 1), t.t()),
    "split": lambda z, t: (z.split([2, 4], dim=1)[1], t[:, 2:]),
    "chunk": lambda z, t: (z.chunk(2)[1], t[1:]),
    "unbind": lambda z, t: (z.unbind(1)[3], t[:, 3]),
    "tensor_split": lambda z, t: (z.tensor_split(3, 1)[0], t[:, :2]),
    "rows put together": lambda z, t: (torch.cat([z[:, 3:], z[:, :3]], 1), t),
    "rows stacked": lambda z, t: (torch.stack([z[0], z[1] * 1], 1), t.t()),
    "a new dimension": lambda z, t: (z[:, None], t[:, None]),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(name):
    def fn(h, w, t):
        return ce(*ROWS[name](F.linear(h, w), t))

    assert_same_as_eager(fn, (rand(B, S, D), rand(V, D), labels()), fused=1)


# ---- entries

EVEN = torch.arange(V) % 2 == 0
BETWEEN = {
    "a constant added": lambda z: z + 3.0,
    "a constant inside a softcap": lambda z: 4 * torch.tanh((z + 1.5) / 4),
    "softcap as a sigmoid": lambda z: 6 * torch.sigmoid((z + 2) / 3),
    "softcap as a sigmoid of a scale": lambda z: 23.0 * torch.sigmoid(z * 0.3),
    "softcap by rsqrt": lambda z: 15 * z * torch.rsqrt(z.square() + 225),
    "softcap by rsqrt, the root first": lambda z: 2 * torch.rsqrt(torch.add(z * z, 4)) * z,
    "softcap by rsqrt of methods": lambda z: z.mul(z.pow(2.0).add(9).rsqrt()).mul(3.0),
    "softcap by rsqrt of a ratio": lambda z: z * torch.rsqrt(1 + (z / 3) ** 2),
    "softcap by a root": lambda z: 3 * (z / torch.sqrt(z**2 + 9)),
    "softcap by a multiple of the root": lambda z: z / (2 * (z.square() + 4).sqrt()),
    "softcap by one over a root": lambda z: (1 / torch.sqrt(z**2 + 4)) * z * -2,
    "softcap by a power": lambda z: z * (torch.pow(z, 2) + 4) ** -0.5,
    "softcap over a power": lambda z: torch.div(z, (z.square() + 4) ** 0.5),
    "softcap of another scale": lambda z: (30 * z) * (0.5 * torch.rsqrt((z / 2).square() * 3 + 7)) + 1,
    "softcap by rsqrt of a shift": lambda z: (z + 1.5) * torch.rsqrt((z + 1.5).square() + 4),
    "softcap by rsqrt of a bias, in another scale": lambda z: (
        lambda b: (2 * (z * 0.7 + b)) * torch.rsqrt((z * 0.7 + b).square() + 4)
    )(torch.linspace(-1, 1, V)),
    "softcap by rsqrt, the sum in place": lambda z: z * z.square().add_(4).rsqrt(),
    "columns behind a softcap by rsqrt": lambda z: (z * torch.rsqrt(z.square() + 4))[..., :30],
    "masked columns": lambda z: z.masked_fill(EVEN, -math.inf),
    "masked with a finite number": lambda z: z.masked_fill(EVEN, -2.0),
    "masked with a number, scaled": lambda z: z.masked_fill(EVEN[None], -2.0) * 0.5 + 1,
    "where": lambda z: torch.where(EVEN, -1.0, z),
    "where columns are kept": lambda z: torch.where(~EVEN, z, -1e8),
    "a bias of -inf": lambda z: z + torch.where(EVEN, -math.inf, 0.0),
    "columns": lambda z: z[..., :30],
    "every other column": lambda z: z[..., 1::2] + torch.ones(20),
    "columns, narrow": lambda z: z.narrow(-1, 5, 30),
    "columns behind a bias and a mask": lambda z: (z + torch.linspace(0, 1, V)).masked_fill(EVEN, -3.0)[..., 3:33],
    "columns behind a softcap": lambda z: (4 * torch.tanh(z / 4))[..., :30],
    "mul_": lambda z: z.mul_(0.5),
    "mul_, its result unused": lambda z: (z.mul_(0.5), z)[1],
    "div_ and tanh_": lambda z: z.div_(4).tanh_() * 4,
    "itruediv": lambda z: operator.itruediv(z, 2.0),
    "columns set to -inf": lambda z: (z.__setitem__((..., slice(30, None)), -math.inf), z)[1],
    "one column set": lambda z: (z.__setitem__((..., 3), -1.0), z)[1],
    "masked_fill_": lambda z: z.masked_fill_(EVEN, -5.0),
    "log of softmax": lambda z: torch.log(F.softmax(z, -1)),
    "log_softmax twice": lambda z: F.log_softmax(z, -1),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_between(name):
    def fn(h, w, t):
        z = BETWEEN[name](F.linear(h, w))
        return ce(z, t % 10 * 2 + 1)  # classes that no mask hides

    def hidden_targets(h, w, t):
        z = BETWEEN[name](F.linear(h, w))
        return ce(z, t % 20)

    inputs = (rand(B, S, D), rand(V, D), labels())
    assert_same_as_eager(fn, inputs, fused=1)
    assert_same_as_eager(hidden_targets, inputs, fused=1)


EARLY = {f"head: {name}": (lambda h, w, t, f=f: ce(f(h, w), t)) for name, f in HEADS.items()}
EARLY |= {f"rows: {name}": (lambda h, w, t, f=f: ce(*f(F.linear(h, w), t))) for name, f in ROWS.items()}
EARLY |= {f"between: {name}": (lambda h, w, t, f=f: ce(f(F.linear(h, w)), t % 20)) for name, f in BETWEEN.items()}


@pytest.mark.parametrize("name", EARLY)
def test_gradients_formed_in_the_forward(name):
    """What the kernels of a CPU do for a single loss: the same, with the tangents known before the statistics are."""

    def backend(gm, inputs):
        settings = config.Settings(min_vocab=0)
        made = rewrite(gm, settings, "v", lambda problem: Choice("test", gradients_in_forward=True))
        early.append("with_gradients" in str(made.graph_module.graph))
        return made.graph_module.forward

    early = []
    inputs = rand(B, S, D), rand(V, D), labels()
    fn = EARLY[name]
    torch._dynamo.reset()
    wanted, got = fn(*inputs), torch.compile(fn, backend=backend)(*inputs)
    # What masked columns are filled with is put back into the log-sum-exp, which is not linear.
    filled = "finite number", "number, scaled", "where", "behind a bias and a mask", "column set", "masked_fill_"
    assert early == [not any(s in name for s in filled)]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(loss, inputs[:2]) for loss in (wanted, got)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_a_layer_whose_width_is_parted_beside_the_head():
    """As attention parts it, of a batch of symbolic size: no stack of heads, and none of the head's business."""
    h, q, w = (torch.randn(s).requires_grad_() for s in ((B, S, D), (D, D), (V, D)))

    def fn(h, q, w, t):
        parted = F.linear(h, q).view(h.shape[0], h.shape[1], 2, D // 2)
        return ce(F.linear(h + parted.flatten(2).tanh(), w), t)

    assert_same_as_eager(fn, (h, q, w, torch.randint(V, (B, S))), fused=1, dynamic=True)


def test_entries_by_an_index_with_a_symbolic_size_of_its_own():
    """Sizes that Dynamo finds to vary, each with a symbol of its own: a guard says that they are equal."""
    w = torch.randn(V, D).requires_grad_()

    def fn(h, t):
        return F.linear(h, w).log_softmax(-1).gather(-1, t[..., None]).mean()

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(fn, backend="cce", options=FUSE_ALL)
    for n in (S, S + 3, S + 5):
        h, t = torch.randn(B, n, D), torch.randint(V, (B, n))
        torch.testing.assert_close(compiled(h, t), fn(h, t))
    assert counters["cce_inductor"]["declined"] == 0 and counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("read", ["cross_entropy", "logsumexp"])
def test_all_classes_masked_with_a_number(read):
    """They are constants: no gradient reaches the head."""

    def fn(h, w, t):
        z = F.linear(h, w).masked_fill(torch.ones(V, dtype=torch.bool), -30.0)
        return ce(z, t) if read == "cross_entropy" else z.logsumexp(-1).mean()

    inputs = torch.randn(B, S, D).requires_grad_(), torch.randn(V, D).requires_grad_(), torch.randint(V, (B, S))
    assert_same_as_eager(fn, inputs, fused=1)


def test_learned_temperatures():
    def fn(h, w, s, r, b, t):
        z = (F.linear(h, w, b) * s.exp()) / r + b
        return ce(5 * torch.tanh(z / 5), t)

    assert_same_as_eager(fn, (rand(B, S, D), rand(V, D), rand(), rand(1), rand(V), labels()), fused=1)


# One factor for every entry, which is a number of its row times one of its class.
OF_ROWS_AND_CLASSES = {
    "lengths": lambda z, h, w: z / (h.norm(dim=-1, keepdim=True) * w.norm(dim=1)),
    "lengths, the other first": lambda z, h, w: z / (w.norm(dim=1)[None] * h.norm(dim=-1).unsqueeze(-1)),
    "a quotient": lambda z, h, w: (w.norm(dim=1) / h.norm(dim=-1, keepdim=True)) * z,
    "in place": lambda z, h, w: z.div_(h.norm(dim=-1, keepdim=True) * w.norm(dim=1)),
    "in front of a softcap": lambda z, h, w: torch.tanh(z * (h[..., :1].exp() * w[:, 0].exp())),
}


@pytest.mark.parametrize("name", OF_ROWS_AND_CLASSES)
def test_a_product_of_numbers_of_rows_and_of_classes(name):
    def fn(h, w, t):
        return ce(3 * OF_ROWS_AND_CLASSES[name](F.linear(h, w), h, w), t)

    assert_same_as_eager(fn, (rand(B, S, D), rand(V, D), labels()), fused=1)


def test_other_factors_of_every_entry_are_left_alone():
    def fn(h, w, t, f):
        z = F.linear(h, w)
        return ce(z * (f * f[..., :1]), t) + ce(z * (f[..., :1] * f[:1, :1]), t) + ce(z / (f * f.flip(0)), t)

    assert_same_as_eager(fn, (rand(B, S, D), rand(V, D), labels(), rand(B, S, V)), fused=0)


def test_an_edit_shows_in_what_reads_the_logits_afterwards():
    def fn(h, w, t):
        z = F.linear(h, w)
        first = ce(z * 2, t)
        z += 1.0
        z *= 0.5
        return first + z.logsumexp(-1).mean(), z

    with torch.no_grad():  # with gradients, eager itself refuses the second edit
        assert_same_as_eager(fn, (rand(B, S, D), rand(V, D), labels()), fused=1, deferred=1)


# ---- statistics

LSE = torch.logsumexp
ONE_HOT = F.one_hot
RSQRT = torch.rsqrt
STATISTICS = {
    "logsumexp minus gather": lambda z, t: (LSE(z, -1) - z.gather(-1, t[..., None])[..., 0]).mean(),
    "log_softmax and gather": lambda z, t: -z.log_softmax(-1).gather(-1, t.unsqueeze(-1)).squeeze(-1).mean(),
    "take_along_dim": lambda z, t: -F.log_softmax(z, -1).take_along_dim(t[..., None], -1).mean(),
    "indices of all rows": lambda z, t: -z.view(-1, V).log_softmax(1)[torch.arange(B * S), t.view(-1)].mean(),
    "indices of two dimensions": lambda z, t: (
        -z.log_softmax(-1)[torch.arange(B)[:, None], torch.arange(S)[None], t].mean()
    ),
    "negative indices": lambda z, t: -z.view(-1, V).log_softmax(1)[torch.arange(B * S), t.view(-1) - V].mean(),
    "one-hot": lambda z, t: -(ONE_HOT(t, V) * z.log_softmax(-1)).sum(-1).mean(),
    "one-hot, all at once": lambda z, t: -(z.log_softmax(-1) * ONE_HOT(t, V).float()).sum() / t.numel(),
    "one-hot as probabilities": lambda z, t: F.cross_entropy(z.view(-1, V), ONE_HOT(t.view(-1), V).float()),
    "z minus its logsumexp": lambda z, t: -(z - z.logsumexp(-1, keepdim=True)).gather(-1, t[..., None]).mean(),
    "the same, unsqueezed": lambda z, t: -(z - z.logsumexp(-1)[..., None]).gather(-1, t[..., None]).mean(),
    "probability of the target": lambda z, t: (1 - z.softmax(-1).gather(-1, t[..., None])).square().mean(),
    "z-loss": lambda z, t: ce(z, t) + 1e-2 * LSE(z, -1).square().mean(),
    "z-loss of all rows": lambda z, t: ce(z, t, ignore_index=3) + 1e-2 * LSE(z, -1).square().mean(),
    "poly": lambda z, t: (
        F.cross_entropy(z.view(-1, V), t.view(-1), reduction="none")
        + (1 - F.softmax(z.view(-1, V), -1).gather(1, t.view(-1, 1)).squeeze(1))
    ).mean(),
    "fairseq smoothing": lambda z, t: (
        -0.9 * z.log_softmax(-1).gather(-1, t[..., None]).mean() - 0.1 * z.log_softmax(-1).sum(-1).mean() / V
    ),
    "timm smoothing": lambda z, t: (
        -0.9 * z.log_softmax(-1).gather(-1, t[..., None]).squeeze(-1) - 0.1 * z.log_softmax(-1).mean(-1)
    ).mean(),
    "entropy bonus": lambda z, t: (lambda lp: ce(z, t) + 0.1 * (lp.exp() * lp).sum(-1).mean())(z.log_softmax(-1)),
    "expected logit": lambda z, t: ce(z, t) + 0.1 * (z.softmax(-1) * z).sum(-1).mean(),
    "entropy of p and z": lambda z, t: ce(z, t) - 0.1 * (LSE(z, -1) - (z.softmax(-1) * z).sum(-1)).mean(),
    "mean of all logits": lambda z, t: ce(z, t) + 0.1 * z.mean(),
    "sum over classes and rows": lambda z, t: ce(z, t) + 0.1 * z.log_softmax(-1).sum((1, 2)).square().mean(),
    "constants in the statistics": lambda z, t: (LSE(z + 2, -1) * (z + 2).gather(-1, t[..., None])[..., 0]).mean(),
    "exp, sum and log": lambda z, t: (z.exp().sum(-1).log() - z.gather(-1, t[..., None])[..., 0]).mean(),
    "exp over its sum": lambda z, t: -(z.exp() / z.exp().sum(-1, keepdim=True)).log().gather(-1, t[..., None]).mean(),
    "exp over its sum, once": lambda z, t: (
        lambda e: -(e / e.sum(-1)[..., None]).gather(-1, t[..., None]).log().mean()
    )(z.exp()),
    "minus the logsumexp of detached logits": lambda z, t: (
        ce(z, t) + (z - z.detach().logsumexp(-1, keepdim=True)).gather(-1, t[..., None]).square().mean()
    ),
    "shifted by the logsumexp of other rows": lambda z, t: (
        ce(z - z.flip(0).logsumexp(-1, keepdim=True), t)
        - (z - z.flip(0).logsumexp(-1, keepdim=True)).gather(-1, t[..., None]).mean()
    ),
    "shifted by the maximum": lambda z, t: (
        lambda s: (s.exp().sum(-1).log() - s.gather(-1, t[..., None])[..., 0]).mean()
    )(z - z.max(-1, keepdim=True).values),
    "shifted by the maximum, detached": lambda z, t: (
        lambda s: (LSE(s, -1) - s.gather(-1, t[..., None])[..., 0]).mean()
    )(z - z.amax(-1, keepdim=True).detach()),
    "the maximum put back": lambda z, t: (
        lambda m: (m[..., 0] + (z - m).exp().sum(-1).log() - z.gather(-1, t[..., None])[..., 0]).square().mean()
    )(z.max(dim=-1, keepdim=True)[0]),
    "shifted, then reshaped and scaled": lambda z, t: (
        lambda s: (LSE(s, -1) * s.gather(-1, t.view(-1, 1))[:, 0]).mean()
    )(((z - z.amax(-1, keepdim=True)) * 0.5).transpose(0, 1).reshape(-1, V)),
    "cross-entropy of shifted logits": lambda z, t: ce(z - z.detach().max(-1, keepdim=True).values, t),
    "the largest logit": lambda z, t: ce(z, t) + (5 * torch.tanh((z * 0.5 + 1) / 5) - 2).amax(-1).square().mean(),
    "the largest logit behind rsqrt": lambda z, t: (
        lambda u: ce(z, t) + (5 * u * RSQRT(u.square() + 9) - 2).amax(-1).square().mean()
    )(z * 0.5 + 1),
    "two softcaps of one head": lambda z, t: (
        ce(3 * torch.tanh(z / 3), t) + LSE(3 * z * RSQRT(z.square() + 9), -1).square().mean()
    ),
    "indices of a range": lambda z, t: -z.view(-1, V).log_softmax(1)[range(B * S), t.view(-1)].mean(),
    "Categorical": lambda z, t: (lambda d: -(d.log_prob(t) + 0.1 * d.entropy()).mean())(
        torch.distributions.Categorical(logits=z, validate_args=False)
    ),
    "softcapped statistics": lambda z, t: (lambda c: (LSE(c, -1) * c.gather(-1, t[..., None])[..., 0]).mean())(
        6 * torch.sigmoid(z / 3)
    ),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(name):
    def fn(h, w, t):
        return STATISTICS[name](F.linear(h, w), t)

    assert_same_as_eager(fn, (rand(B, S, D), rand(V, D), labels()), fused=1)


def operators_in(fn, *inputs):
    """The fused operators that a function's graph is given."""
    (gm,) = graphs_of(fn, *inputs)
    made = rewrite(gm, config.Settings(min_vocab=0), "v").graph_module
    return [n for n in made.graph.nodes if n.op == "call_function" and "linear_statistics" in str(n.target)]


@pytest.mark.parametrize("name", ["logsumexp minus gather", "z-loss", "poly", "fairseq smoothing", "entropy bonus"])
def test_statistics_of_the_same_logits_share_an_operator(name):
    def fn(h, w, t):
        return STATISTICS[name](F.linear(h, w), t)

    assert len(operators_in(fn, rand(B, S, D), rand(V, D), labels())) == 1


def test_statistics_for_logging_come_along():
    def fn(h, w, t):
        z = F.linear(h, w).view(-1, V)
        loss = ce(z, t, reduction="mean")
        with torch.no_grad():
            accuracy = (z.argmax(-1) == t.view(-1)).float().mean()
            entropy = LSE(z, -1) - (z.softmax(-1) * z).sum(-1)
            capped = LSE(3 * z * RSQRT(z.square() + 9), -1)
        return loss, accuracy, entropy, capped, z.detach().logsumexp(-1)

    inputs = rand(B, S, D), rand(V, D), labels(-100)
    assert_same_as_eager(fn, inputs, fused=1)
    assert len(operators_in(fn, *inputs)) <= 3


def test_a_log_probability_on_its_own_is_a_loss():
    def grpo(h, w, t):
        lp = (F.linear(h, w) / 0.9).log_softmax(-1).gather(-1, t[..., None]).squeeze(-1)
        return -(torch.exp(lp - lp.detach()) * 2.0).mean()

    assert_same_as_eager(grpo, (rand(B, S, D), rand(V, D), labels()), fused=1)


def test_a_router_is_no_loss():
    """Softmax and top-k of a linear, as in a mixture of experts: nothing is recorded."""

    def fn(h, w):
        p = F.linear(h, w).softmax(-1)
        return p.topk(2, dim=-1).values.sum()

    (gm,) = graphs_of(fn, rand(B, S, D), rand(D // 2, D))
    assert rewrite(gm, config.Settings(min_vocab=0), "v").sites == []


# ---- chunks


def chunked_head(h, w, t):
    total = torch.tensor(0.0)
    h, t = h.reshape(-1, D), t.reshape(-1)
    for a, b in zip(h.tensor_split(3), t.tensor_split(3), strict=True):
        total += F.cross_entropy(F.linear(a, w).float(), b, reduction="sum")
    return total / (t != -100).sum()


def chunked_logits(h, w, t):
    z, t = F.linear(h, w).view(-1, V), t.view(-1)
    losses = [F.cross_entropy(a, b, reduction="none") for a, b in zip(z.split(5), t.split(5), strict=True)]
    return torch.cat(losses).sum() / (t != -100).sum()


def sliced_in_a_loop(h, w, t):
    h, t = h.reshape(-1, D), t.reshape(-1)
    losses = [F.cross_entropy(F.linear(h[i : i + 4], w), t[i : i + 4], reduction="sum") for i in range(0, B * S, 4)]
    return sum(losses) / (t != -100).sum()


@pytest.mark.parametrize("fn", [chunked_head, chunked_logits, sliced_in_a_loop])
@pytest.mark.parametrize("dynamic", [None, True])
def test_chunks_of_one_weight_share_an_operator(fn, dynamic):
    inputs = rand(B, S, D), rand(V, D), labels(-100)
    assert_same_as_eager(fn, inputs, fused=3, dynamic=dynamic)
    assert len(operators_in(fn, *inputs)) == 1


def test_chunks_that_depend_on_one_another_do_not():
    def fn(h, w, t):
        first = ce(F.linear(h, w), t)
        return ce(F.linear(h * first, w), t)

    inputs = rand(B, S, D), rand(V, D), labels()
    assert_same_as_eager(fn, inputs, fused=2)
    assert len(operators_in(fn, *inputs)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    def fn(h, w, t):
        z = F.linear(h, w).masked_fill(EVEN, -2.0)
        lp = z.log_softmax(-1)
        return -(lp.gather(-1, t[..., None]).mean() + 0.1 * z.logsumexp(-1).mean())

    inputs = (
        rand(B, S, D).detach().to(dtype).requires_grad_(),
        rand(V, D).detach().to(dtype).requires_grad_(),
        labels(),
    )
    assert_same_as_eager(fn, inputs, fused=1, tolerance=2e-2 if dtype == torch.bfloat16 else 1e-12)


# ---- checkpointed heads


def checkpointed(f, *args):
    return torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False)


def test_a_checkpointed_head_fuses_inside_the_checkpoint():
    def whole(h, w, t):
        return checkpointed(lambda h: ce(F.linear(h, w), t), h * 2)

    def chunks(h, w, t):
        parts = zip(h.split(1), t.split(1), strict=True)
        return sum(checkpointed(lambda a, b: ce(F.linear(a, w), b, reduction="sum"), a, b) for a, b in parts)

    def beside_another(h, w, t):
        return checkpointed(lambda h: ce(F.linear(h, w), t), h) + ce(F.linear(h, w * 2), t)

    inputs = rand(B, S, D), rand(V, D), labels(-100)
    assert_same_as_eager(whole, inputs, fused=1)
    assert_same_as_eager(chunks, inputs, fused=2)
    assert_same_as_eager(beside_another, inputs, fused=2)


def test_logits_that_leave_a_checkpoint_are_real():
    def fn(h, w, t):
        def region(h):
            z = F.linear(h, w)
            return ce(z, t), z

        loss, z = checkpointed(region, h)
        return loss + z.square().mean(), z

    assert_same_as_eager(fn, (rand(B, S, D), rand(V, D), labels()), fused=1)


def test_a_batch_of_equal_weights_for_one_matrix():
    """(N, D) @ (B, D, V): the rows are repeated, and nothing of that is a head."""

    def fn(h, w, t):
        return ce(h[0] @ w.t().expand(B, D, V), t)

    assert_same_as_eager(fn, (rand(B, S, D), rand(V, D), labels()), fused=0)


def test_a_mask_over_a_vocabulary_of_symbolic_size():
    def fn(h, w, mask):
        z = torch.matmul(w[: mask.shape[0]], h.mT).transpose(-1, -2).masked_fill(mask, -1e4)
        return z.detach().logsumexp(-1)

    inputs = rand(B, 1, D), rand(V + 2, D), torch.arange(V) > 30
    assert_same_as_eager(fn, inputs, fused=1, dynamic=True, compiler="eager")
