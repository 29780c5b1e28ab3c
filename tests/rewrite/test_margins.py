"""Logits with another entry at the target: margins as people spell them fuse, and are what eager computes."""

import math

import pytest
import torch
import torch.nn.functional as F
from against_eager import assert_error_rule
from capture import FUSE_ALL, assert_same_as_eager, graphs_of
from torch._dynamo.utils import counters

import cce_inductor
from cce_inductor import config
from cce_inductor.ops.library import FORWARD
from cce_inductor.record import collect
from cce_inductor.rewrite.run import rewrite

B, S, D, V = 2, 6, 8, 40
M = 0.3


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    x, w = (F.normalize(torch.randn(n, D)).requires_grad_() for n in (B * S, V))
    return x, w, torch.randint(0, V, (B * S,))


def ce(z, t, **kwargs):
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), t.reshape(-1), **kwargs)


def one_hot(t):
    return F.one_hot(t, V)


def scattered(made, t, number=1):
    made.scatter_(1, t.view(-1, 1).long(), number)
    return made


def rows(t):
    return torch.arange(len(t))


def set_at(z, t, entry):
    z[rows(t), t] = entry
    return z


def set_rows(z, i, t):
    z[i, t] = M
    return z


def negated(i):
    i.neg_()
    return i


def minus_at(z, t):
    z[rows(t), t] -= M
    return z


def angle(z):
    return z * math.cos(M) - torch.sqrt((1.0 - torch.pow(z, 2)).clamp(0, 1)) * math.sin(M)


def kept_monotonic(z):
    return torch.where(z > math.cos(math.pi - M), angle(z), z - math.sin(math.pi - M) * M)


def by_arccos(z):
    return torch.cos(torch.acos(z.clamp(-1 + 1e-6, 1 - 1e-6)) + M)


def mixed(phi, z, mask):
    return mask * phi + (1.0 - mask) * z


def in_place(z, t, scale):
    output = mixed(kept_monotonic(z), z, scattered(torch.zeros(z.size()), t))
    output *= scale
    return output


# Of cosines and class indices, (N, V) and (N,).
MARGINS = {
    "a one-hot tensor subtracted": lambda z, t: z - M * one_hot(t).to(z.dtype),
    "a one-hot tensor added": lambda z, t: -M * one_hot(t).float() + z,
    "a margin for each class": lambda z, t: z - torch.linspace(0.1, 0.5, V)[t][:, None] * one_hot(t),
    "of the classes' numbers": lambda z, t: z - one_hot(t) * torch.linspace(0.1, 0.5, V),
    "of the classes' numbers, one of one": lambda z, t: z - torch.linspace(0.1, 0.5, V) * one_hot(t).double().float(),
    "where classes are compared": lambda z, t: z - M * (torch.arange(V) == t[:, None]),
    "a sum of numbers of the classes": lambda z, t: z + one_hot(t) * (torch.linspace(0.1, 0.5, V) - M),
    "a scattered tensor subtracted": lambda z, t: z - torch.zeros_like(z).scatter_(-1, t[..., None], M),
    "a margin in a buffer": lambda z, t: z - scattered(torch.zeros(B * S, V), t, M),
    "a one-hot tensor subtracted in place": lambda z, t: z.sub_(M * one_hot(t)),
    "masked in place": lambda z, t: z.masked_fill_(one_hot(t).bool(), M),
    "written at the target": lambda z, t: set_at(z.clone(), t, z.gather(-1, t[..., None]).squeeze(-1) - M),
    "written into the head's own": lambda z, t: set_at(z, t, z[rows(t), t] - M),
    "subtracted in place": lambda z, t: minus_at(z, t),
    "a number written at the target": lambda z, t: set_at(z.clone(), t, M),
    "scattered": lambda z, t: z.scatter(-1, t[..., None], 0.5),
    "scattered in place": lambda z, t: z.clone().scatter_(-1, t[..., None], 0.5),
    "an angle scattered": lambda z, t: z.scatter(1, t[:, None], by_arccos(z.gather(1, t[:, None]))),
    "added by an index": lambda z, t: z.scatter_add(-1, t[..., None], torch.full((B * S, 1), -M)),
    "where the target is, an angle": lambda z, t: torch.where(one_hot(t).bool(), angle(z), z),
    "where the target is, less": lambda z, t: torch.where(one_hot(t) == 1, z - M, z),
    "where the target is not": lambda z, t: torch.where(one_hot(t) == 0, z, z - M),
    "where the target is not, a number": lambda z, t: torch.where(~one_hot(t).bool(), z, torch.tensor(M)),
    "where the classes are the target": lambda z, t: torch.where(torch.arange(V) == t[..., None], z - M, z),
    "where the classes are not the target": lambda z, t: torch.where(t[:, None] != torch.arange(V)[None], z, z - M),
    "where a scattered mask is": lambda z, t: torch.where(
        scattered(torch.zeros_like(z, dtype=torch.bool), t), z - torch.linspace(0.1, 0.5, V)[t].view(-1, 1), z
    ),
    "masked at the target": lambda z, t: z.masked_fill(one_hot(t) > 0, M),
    "ArcFace": lambda z, t: mixed(kept_monotonic(z), z, scattered(torch.zeros(z.size()), t)),
    "ArcFace, scaled in place": lambda z, t: in_place(z, t, 2.0),
    "CosFace": lambda z, t: mixed(z - M, z, one_hot(t).to(z.dtype)),
    "by arccos": lambda z, t: mixed(by_arccos(z), z, one_hot(t)),
    "a difference of angles": lambda z, t: z + one_hot(t) * (by_arccos(z) - z),
    "detached difference": lambda z, t: z + one_hot(t) * (angle(z) - z).detach(),
    "behind a scale": lambda z, t: (4 * z) - 4 * M * one_hot(t),
    "behind a learned prior": lambda z, t: (z + torch.linspace(-1, 1, V)) - M * one_hot(t),
    "of every row its own scale": lambda z, t: (z * torch.linspace(0.5, 2, B * S)[:, None]) - M * one_hot(t),
    "in three dimensions": lambda z, t: (z.view(B, S, V) - M * one_hot(t.view(B, S))).flatten(0, 1),
    "a copy edited in place before they are put together": lambda z, t: (
        lambda c: (lambda phi: torch.where(one_hot(t).bool(), phi, c.mul_(2)))(c - M)
    )(z.clone()),
    "softcapped": lambda z, t: 2 * torch.tanh(z / 2) - M * one_hot(t),
}
# What is made of them: of the logits, scaled, and the class indices.
LOSSES = {
    "cross_entropy": lambda z, t: ce(z, t),
    "a sum": lambda z, t: ce(z, t, reduction="sum"),
    "weighted, of every row": lambda z, t: (ce(z, t, weight=torch.linspace(0.5, 2, V), reduction="none") * 0.1).sum(),
    "ignoring a class": lambda z, t: ce(z, t, ignore_index=3),
    "smoothed": lambda z, t: ce(z, t, label_smoothing=0.1),
    "smoothed, ignoring a class": lambda z, t: ce(z, t, label_smoothing=0.1, ignore_index=3, reduction="sum"),
    "at another target": lambda z, t: ce(z, t.flip(0)),
    "smoothed, at another target": lambda z, t: ce(z, t.flip(0), label_smoothing=0.1, ignore_index=3),
    "log-probabilities of another target": lambda z, t: -z.log_softmax(-1)[rows(t), -t - 1].mean(),
    "another entry": lambda z, t: (z.logsumexp(-1) - z.gather(-1, t.flip(0)[:, None])[:, 0]).mean(),
    "nll_loss": lambda z, t: F.nll_loss(z.log_softmax(-1), t),
    "log-probabilities": lambda z, t: -(z.log_softmax(-1).gather(-1, t[:, None]).exp()).mean(),
    "written out": lambda z, t: (z.logsumexp(-1) - z.gather(-1, t[:, None])[:, 0]).square().mean(),
}


@pytest.mark.parametrize("name", MARGINS)
def test_a_margin_at_the_target_fuses(name, inputs):
    assert_same_as_eager(lambda x, w, t: ce(4 * MARGINS[name](F.linear(x, w), t), t), inputs, fused=1)


def prior():
    return torch.linspace(-1, 1, V)


# What is done to all classes behind a margin, each class by a number of its own.
BEHIND = {
    "a prior": lambda z: z * 4 + prior(),
    "a prior, subtracted in place": lambda z: (z * 4).sub_(prior()),
    "a prior before": lambda z: prior() + 0.5 * z,
    "a gain": lambda z: z * (prior() + 3.0),
    "a temperature": lambda z: z / (prior() + 2.0),
    "a mask": lambda z: (z * 4).masked_fill(prior() > 0.8, -math.inf),
    "a mask and a prior": lambda z: (z * 4).masked_fill(prior() > 0.8, -math.inf) + prior(),
    "a mask in three dimensions": lambda z: z.view(B, S, V).masked_fill(prior() > 0.8, -math.inf).view(B * S, V),
    "a mask in place": lambda z: (z * 4).masked_fill_((prior() > 0.8)[None], -math.inf),
}


@pytest.mark.parametrize("name", BEHIND)
@pytest.mark.parametrize("margin", ["a one-hot tensor subtracted", "scattered in place", "ArcFace"])
def test_classes_are_edited_behind_a_margin(name, margin, inputs):
    assert_same_as_eager(lambda x, w, t: ce(BEHIND[name](MARGINS[margin](F.linear(x, w), t)), t % 5), inputs, fused=1)


@pytest.mark.parametrize("ends", [(-1, 1), (-1.0 + 1e-7, 1.0 - 1e-7), (-0.5, 0.5)], ids=str)
@pytest.mark.parametrize("margin", ["none", "CosFace", "by arccos"])
def test_cosines_are_clamped_to_what_they_are(margin, ends, inputs):
    """As in insightface: a rounding error beyond 1 would have no arccosine."""

    def fn(x, w, t):
        z = F.linear(F.normalize(x), F.normalize(w)).clamp(*ends)
        return ce(4 * (z if margin == "none" else MARGINS[margin](z, t)), t)

    assert_same_as_eager(fn, inputs, fused=int(ends[1] > 0.9), tolerance=2e-5)


NO_COSINES = {
    "hidden states of any length": lambda x, w: F.linear(x, F.normalize(w)),
    "a weight of any length": lambda x, w: F.linear(F.normalize(x), w),
    "scaled": lambda x, w: 3 * F.linear(F.normalize(x), F.normalize(w)),
    "with a bias": lambda x, w: F.linear(F.normalize(x), F.normalize(w), torch.linspace(-1, 1, V)),
    "masked": lambda x, w: F.linear(F.normalize(x), F.normalize(w)).masked_fill(prior() > 0.8, -math.inf),
    "of another norm": lambda x, w: F.linear(F.normalize(x), F.normalize(w, p=1)),
    "along the classes": lambda x, w: F.linear(F.normalize(x), F.normalize(w, dim=0)),
}


@pytest.mark.parametrize("name", NO_COSINES)
def test_what_is_no_cosine_is_clamped(name, inputs):
    assert_same_as_eager(lambda x, w, t: ce(4 * NO_COSINES[name](x, w).clamp(-1, 1), t % 5), inputs, fused=0)


@pytest.mark.parametrize("number", [0.3, 0.1])
def test_a_margin_of_a_narrower_dtype(number, inputs):
    """It is rounded to fp32 before it is subtracted from logits of float64."""
    x, w, t = inputs
    wide = x.detach().double().requires_grad_(), w.detach().double().requires_grad_(), t

    def fn(x, w, t):
        return ce(4 * (F.linear(x, w) - number * one_hot(t)), t)

    assert_same_as_eager(fn, wide, fused=1, tolerance=1e-14)


def of_all_angles(z, t):
    return torch.cos(torch.acos(z.clamp(-1.0 + 1e-7, 1.0 - 1e-7)) + M * one_hot(t))


def with_scattered_angles(z, t):
    theta = torch.acos(z)
    return torch.cos(theta + torch.zeros_like(theta).scatter_(1, t[:, None], M))


# The cosine of the arccosine of every class, which is what it was, but for the target's. Fused, or not.
ANGLES = {
    "clamped": (of_all_angles, True),
    "scattered": (with_scattered_angles, True),
    "where": (lambda z, t: torch.where(one_hot(t).bool(), torch.cos(torch.arccos(z) + M), torch.cos(z.acos())), True),
    "clamped to less": (lambda z, t: torch.cos(torch.acos(z.clamp(-0.5, 0.5)) + M * one_hot(t)), False),
    "of other than cosines": (lambda z, t: of_all_angles(0.5 * z, t), False),
}


@pytest.mark.parametrize("name", ANGLES)
@pytest.mark.parametrize("lengths", [True, False], ids=["normalized", "divided by their lengths"])
def test_angles_of_all_classes(name, lengths):
    torch.manual_seed(0)
    x, w = (torch.randn(n, D).requires_grad_() for n in (B * S, V))
    margin, fused = ANGLES[name]

    def fn(x, w, t):
        x = F.normalize(x) if lengths else x / x.norm(dim=-1, keepdim=True)
        w = F.normalize(w.t(), dim=0).t() if lengths else w / torch.linalg.vector_norm(w, dim=1, keepdim=True)
        return ce(4 * margin(F.linear(x, w), t), t)

    assert_same_as_eager(fn, (x, w, torch.randint(0, V, (B * S,))), fused=fused, tolerance=2e-5)


def test_products_of_rows_that_were_not_normalized_are_no_cosines():
    x, w = (0.1 * torch.randn(n, D) for n in (B * S, V))

    def fn(x, w, t):
        return ce(4 * of_all_angles(F.linear(x, w), t), t)

    inputs = x.requires_grad_(), w.requires_grad_(), torch.randint(0, V, (B * S,))
    assert_same_as_eager(fn, inputs, fused=0)


def test_margins_looked_up_by_a_product_with_one_hot_tensors(inputs):
    """LDAM (arXiv 1906.07413), as its authors wrote it."""

    def fn(x, w, t):
        z = F.linear(x, w)
        index = scattered(torch.zeros_like(z, dtype=torch.bool), t)
        margin = torch.matmul(torch.linspace(0.1, 0.5, V)[None, :], index.float().transpose(0, 1)).view(-1, 1)
        return ce(4 * torch.where(index, z - margin, z), t)

    assert_same_as_eager(fn, inputs, fused=1)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_a_margin(name, inputs):
    assert_same_as_eager(
        lambda x, w, t: LOSSES[name](MARGINS["ArcFace"](F.linear(x, w), t).float() * 4, t), inputs, fused=1
    )


def without(z, t):
    return z.masked_fill(one_hot(t).bool(), -math.inf)


# The class of each row is left out: decoupled losses, and losses that are infinite where it is the target.
LEFT_OUT = {
    "masked": lambda z, t: (without(z, t).logsumexp(-1) - z.gather(-1, t[:, None])[:, 0]).mean(),
    "scattered": lambda z, t: (z.scatter(1, t[:, None], -math.inf).logsumexp(1) - z[rows(t), t]).mean(),
    "scattered in place": lambda z, t: z.clone().scatter_(1, t[:, None], -math.inf).logsumexp(1).mean(),
    "a tensor added": lambda z, t: ce(z + torch.zeros_like(z).scatter(1, t[:, None], -math.inf), t.flip(0)),
    "the target": lambda z, t: ce(without(z, t), t, reduction="none"),
    "a target of some rows": lambda z, t: ce(without(z, t), torch.where(t % 2 == 0, t, (t + 1) % V), reduction="none"),
    "smoothed": lambda z, t: ce(without(z, t), t.flip(0), label_smoothing=0.1),
    "log-probabilities": lambda z, t: without(z, t).log_softmax(-1)[rows(t), t],
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_class_of_each_row_is_left_out(name, inputs):
    assert_same_as_eager(lambda x, w, t: LEFT_OUT[name](5 * F.linear(x, w), t), inputs, fused=1)


def in_front(z, x, w):
    """A positive one in front of sampled negatives."""
    return torch.cat([(x * w.roll(1, 0)[: len(x)]).sum(1, keepdim=True), z], 1)


def zeros(t):
    return torch.zeros(len(t), dtype=torch.long)


# MoCo, InfoNCE, sampled softmax: the first class of each row is one of its own, and the target.
POSITIVES = {
    "divided by a temperature": lambda z, x, w, t: ce(in_front(z, x, w) / 0.07, zeros(t)),
    "divided in place": lambda z, x, w, t: ce(in_front(z, x, w).div_(0.2), torch.zeros(len(t)).long()),
    "log-probabilities": lambda z, x, w, t: F.nll_loss(in_front(z, x, w).log_softmax(-1), torch.zeros_like(t)),
    "written out": lambda z, x, w, t: (
        (y := in_front(z, x, w)).logsumexp(-1) - y.gather(-1, zeros(t)[:, None])[:, 0]
    ).mean(),
    "of every row": lambda z, x, w, t: ce(in_front(3 * z, x, w), zeros(t), reduction="none").square().mean(),
    "by hstack": lambda z, x, w, t: ce(torch.hstack([x.sum(1, keepdim=True), z]) / 0.2, zeros(t)),
    "as a target among others": lambda z, x, w, t: ce(in_front(z, x, w) / 0.2, torch.where(t % 2 == 0, 0, t + 1)),
    "as a smoothed target": lambda z, x, w, t: ce(in_front(z, x, w), t * 0, label_smoothing=0.1, reduction="sum"),
    "as a target or none": lambda z, x, w, t: ce(in_front(z, x, w), torch.where(t % 3 == 0, -100, t)),
    "read at a class": lambda z, x, w, t: -in_front(z, x, w).log_softmax(-1).gather(-1, t[:, None]).exp().mean(),
}


@pytest.mark.parametrize("name", POSITIVES)
def test_a_positive_in_front_of_negatives(name, inputs):
    assert_same_as_eager(lambda x, w, t: POSITIVES[name](F.linear(x, w), x, w, t), inputs, fused=1)


class Scheduled(torch.nn.Module):
    """A scale and a margin that change while it trains: with dynamic=True they are inputs of the graph."""

    def __init__(self, margin):
        super().__init__()
        self.scale, self.m, self.margin = 4.0, M, margin

    def forward(self, x, w, t):
        z = self.margin(F.linear(x, w), t, self.m)
        return ce(z * self.scale, t) + ce(F.linear(x, w) / (self.scale + 1.0), t)


SCHEDULED = {
    "none": lambda z, t, m: z,
    "by a one-hot tensor": lambda z, t, m: z - m * one_hot(t),
    "scaled before": lambda z, t, m: (m * z).masked_fill(one_hot(t).bool(), 0.2),
    "an angle": lambda z, t, m: torch.where(one_hot(t).bool(), torch.cos(torch.acos(z.clamp(-0.9, 0.9)) + m), z),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_scale_and_a_margin_that_are_inputs_of_the_graph(name, inputs):
    module = Scheduled(SCHEDULED[name])
    compiled = torch.compile(module, backend="cce", dynamic=True, options=FUSE_ALL)
    counters.clear()
    for module.scale, module.m in ((4.0, 0.3), (5.0, 0.1)):
        want, got = module(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad(loss, inputs[:2]) for loss in (want, got)), strict=True):
            torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-4)
    assert counters["cce_inductor"]["declined"] == 0
    assert counters["cce_inductor"]["fused"] == 2 * counters["stats"]["unique_graphs"]


def test_a_graph_that_dynamo_traces_again_is_recorded_once(inputs):
    """AOTAutograd takes a float that is an input of the graph for a number, and has the program traced once more."""
    module = Scheduled(SCHEDULED["none"])
    options = {**FUSE_ALL, "compiler": "aot_eager"}
    counters.clear()
    with collect() as found:
        for module.scale in (4.0, 5.0):
            torch.compile(module, backend="cce", dynamic=True, options=options)(*inputs)
    assert counters["cce_inductor"]["fused"] == 2 * len(found) == sum(len(graph.sites) for graph in found)
    assert len(found) == counters["stats"]["unique_graphs"]


def test_logits_scaled_by_an_input_of_the_graph_are_returned(inputs):
    module = Scheduled(SCHEDULED["none"])
    module.forward = lambda x, w, t: (lambda z: (ce(z, t), z))(F.linear(x, w) * module.scale)
    assert_same_as_eager(module.forward, inputs, fused=0, dynamic=True)


def test_one_pass_over_the_vocabulary(inputs):
    """The entry is picked out of the cosines, the sum is of their multiples: one operator gives both."""

    def fn(x, w, t):
        return ce(4 * MARGINS["ArcFace"](F.linear(x, w), t), t)

    result = rewrite(graphs_of(fn, *inputs)[-1], config.Settings(min_vocab=0), "v")
    assert sum(node.target is FORWARD for node in result.graph_module.graph.nodes) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_rule_where_the_target_holds_nearly_all_mass(dtype):
    """s = 64 and m = 0.5 over 50,000 identities, at cosines from 0.3 to 0.95 of the target."""
    n, d, v, scale, m = 48, 64, 50_000, 64.0, 0.5
    generator = torch.Generator().manual_seed(0)
    w = F.normalize(torch.randn(v, d, generator=generator, dtype=torch.float64))
    t, c = torch.randperm(v, generator=generator)[:n], torch.linspace(0.3, 0.95, n, dtype=torch.float64)[:, None]
    other = torch.randn(n, d, generator=generator, dtype=torch.float64)
    other = F.normalize(other - (other * w[t]).sum(1, keepdim=True) * w[t])
    x = c * w[t] + (1 - c * c).sqrt() * other

    def arcface(x, w):
        z = F.linear(F.normalize(x), F.normalize(w))
        phi = z * math.cos(m) - (1 - z * z).clamp(0, 1).sqrt() * math.sin(m)
        mask = F.one_hot(t, v).to(z.dtype)
        return F.cross_entropy((mask * phi + (1 - mask) * z) * scale, t, reduction="none")

    assert_error_rule(arcface, (x, w), dtype)


def every_entry(z):
    return torch.linspace(-1, 1, z.numel()).view(z.shape)


@pytest.mark.parametrize("ignored", [-100, V + 5])
def test_rows_that_have_no_target(ignored, inputs):
    """A comparison with the classes finds none in the rows that the loss ignores."""
    x, w, t = inputs
    t = torch.where(t % 3 == 0, ignored, t)

    def fn(x, w, t):
        z = F.linear(x, w)
        return ce(4 * torch.where(torch.arange(V) == t[:, None], angle(z), z), t, ignore_index=ignored)

    assert_same_as_eager(fn, (x, w, t), fused=1)


# What is no margin, or one that is used otherwise: with a part of the reason.
UNFUSED = {
    "angles of products that are no cosines": (lambda z, t: ce(of_all_angles(z, t), t), "the logits are clamped"),
    "several classes of each row": (lambda z, t: ce(z.scatter(-1, torch.stack([t, t * 0], -1), 0.5), t), "by an index"),
    "a mask of all that is likely": (
        lambda z, t: ce(z.masked_fill((z.detach() > 0).scatter(-1, t[..., None], False), -1e4), t),
        "",
    ),
    "a prior": (lambda z, t: ce(z + every_entry(z), t), "not one bias per class"),
    "read at another target of some rows": (
        lambda z, t: ce(torch.where(torch.arange(V) == t[..., None], 0.3, z), t.flip(0)),
        "read at another",
    ),
    "read at another target in another shape": (
        lambda z, t: F.nll_loss((z - M * one_hot(t)).log_softmax(-1).view(-1, V), t.flip(0).flatten()),
        "read at another",
    ),
    "all classes of some rows": (
        lambda z, t: torch.where(torch.arange(V) == t[..., None], 0.3, z).logsumexp(-1).mean(),
        "a margin at the target",
    ),
    "rows that are counted, and edited": (
        lambda z, t: (lambda i: ce(set_rows(z.view(-1, V).clone(), i, t.view(-1)), t))(negated(rows(t.view(-1)))),
        "some rows",
    ),
    "rows in another order": (
        lambda z, t: ce((z.flatten(0, -2) - M * one_hot(t.flatten())).flip(0), t),
        "read at another",
    ),
    "smoothed, with class weights": (
        lambda z, t: ce(z - M * one_hot(t), t, label_smoothing=0.1, weight=torch.ones(V)),
        "label smoothing with class weights",
    ),
    "class probabilities": (
        lambda z, t: F.cross_entropy((z - M * one_hot(t)).view(-1, V), one_hot(t.flatten()).float()),
        "class probabilities for logits with a margin",
    ),
    "masked with a number": (
        lambda z, t: (z.masked_fill(torch.arange(V) > 30, -1e4) - M * one_hot(t % 30)).logsumexp(-1).mean(),
        "masked with a finite number",
    ),
    "two margins": (lambda z, t: ce((z - M * one_hot(t)) - M * one_hot(t.flip(0)), t), "a margin at the target"),
    "of two targets": (
        lambda z, t: ce(one_hot(t) * (z - M) + (1.0 - one_hot(t.flip(0))) * z, t),
        "a margin at the target",
    ),
    "the largest": (lambda z, t: ce(z, t) + (z - M * one_hot(t)).amax(-1).mean(), "a margin at the target"),
    "its probabilities": (lambda z, t: ce(z, t) - (z - M * one_hot(t)).softmax(-1).square().sum(), "a margin"),
    "a mask behind it": (
        lambda z, t: ce((z - M * one_hot(t)).masked_fill(torch.arange(V) > 30, -1e4), t % 30),
        "masked with a finite number",
    ),
    "scattered along the rows": (lambda z, t: ce(z.scatter(0, t[:1, ..., None] % len(z), 0.5), t), "by an index"),
    "one row scattered": (lambda z, t: ce(z.scatter(-1, t[..., :1, None], 0.5), t), "by an index"),
    "another thing elsewhere": (lambda z, t: ce(torch.where(one_hot(t).bool(), z, torch.sin(z)), t), "torch.sin reads"),
    "more than the logits elsewhere": (lambda z, t: ce(one_hot(t) * z + (2.0 - one_hot(t)) * z, t), "a margin"),
    "a sum of both": (lambda z, t: ce(torch.sin(z) + z * one_hot(t), t), "torch.sin reads"),
    "all but the target, otherwise": (
        lambda z, t: ce(z, t) + z.scatter(-1, t[..., None], -math.inf).softmax(-1)[..., 3].mean(),
        "a margin at the target",
    ),
    "rounded behind it": (lambda z, t: ce((z.bfloat16() - M * one_hot(t)).float(), t), ""),
    "an entry of every class": (lambda z, t: ce(z - every_entry(z) * one_hot(t), t), ""),
    "the logits edited in place before they are put together": (
        lambda z, t: ce((lambda phi: torch.where(one_hot(t).bool(), phi, z.mul_(2)))(z - M), t),
        "a margin at the target",
    ),
    "log-probabilities at the target": (
        lambda z, t: ce(torch.where(one_hot(t).bool(), z.log_softmax(-1), z), t),
        "a margin at the target",
    ),
    "parts of it": (lambda z, t: ce((z - M * one_hot(t)).chunk(2)[0], t.chunk(2)[0]), "a margin at the target"),
    "a log-probability scattered": (
        lambda z, t: F.nll_loss(z.log_softmax(-1).scatter(-1, t[..., None], -1.0).view(-1, V), t.view(-1)),
        "by an index",
    ),
    "classes of int32": (
        lambda z, t: ce(set_at(z.view(-1, V).clone(), t.view(-1).int(), 0.3), t),
        "some rows",
    ),
    "scattered from a whole tensor": (lambda z, t: ce(z.scatter(-1, t[..., None], every_entry(z)), t), "by an index"),
    "classes scattered along the rows": (
        lambda z, t: (lambda c: ce(z.scatter(0, c[..., None], 0.5), c))(t % 2),
        "by an index",
    ),
    "written in another order of rows": (
        lambda z, t: (lambda y, c: (y.__setitem__((rows(c).flip(0), c), 0.3), ce(y, c))[1])(
            z.view(-1, V).clone(), t.view(-1)
        ),
        "some rows",
    ),
    "one number written for all": (
        lambda z, t: ce(set_at(z.view(-1, V).clone(), t.view(-1), torch.full((1,), 0.3)), t),
        "computed",
    ),
    "added to the logits": (lambda z, t: ce((z - M * one_hot(t)) + z, t), "a margin at the target"),
    "the logits added to it": (lambda z, t: ce(z + (z - M * one_hot(t)), t), "a margin at the target"),
    "some classes of it": (lambda z, t: (lambda c: ce((z - M * one_hot(c))[..., :30], c))(t % 30), "a margin at the"),
    "a softcap behind it": (lambda z, t: ce(torch.tanh(z - M * one_hot(t)), t), "a margin at the target"),
    "times a keyword": (lambda z, t: ce(torch.sub(z, one_hot(t), alpha=0.3), t), "a margin at the target"),
    "masked by a weighted mask": (
        lambda z, t: ce(z.masked_fill(one_hot(t) * (t[..., None] % 2 + 0.5) > 1, 0.3), t),
        "not one for all rows",
    ),
    "numbers of the classes beside a positive": (
        lambda z, t: ce(torch.cat([z.sum(-1, keepdim=True), z], -1) + torch.linspace(0, 1, V + 1), torch.zeros_like(t)),
        "a margin",
    ),
    "a positive behind the negatives": (
        lambda z, t: ce(torch.cat([z, z.sum(-1, keepdim=True)], -1), torch.full_like(t, V)),
        "put together with other tensors",
    ),
    "the largest of a positive and negatives": (
        lambda z, t: ce(z, t) + torch.cat([z.sum(-1, keepdim=True), z], -1).amax(-1).mean(),
        "a margin",
    ),
    "the mask edited twice": (
        lambda z, t: ce(z - scattered(scattered(torch.zeros(z.shape).flatten(0, -2), t), t.flip(0)).view(z.shape), t),
        "",
    ),
}


@pytest.mark.parametrize("name", UNFUSED)
def test_other_edits_are_left_alone(name, inputs):
    loss, reason = UNFUSED[name]

    def fn(x, w, t):
        return loss(F.linear(x, w), t)

    assert_same_as_eager(fn, inputs, fused=0)
    with config.patch(min_vocab=0):
        sites = cce_inductor.explain(fn, *inputs).sites
    assert sites and not any(site.fused for site in sites)
    assert any(reason in site.reason for site in sites), [site.reason for site in sites]
