"""What must not fuse: the graph stays as it was, results are eager's, and the record says why, where and what to do."""

import logging

import pytest
import torch
import torch.nn.functional as F
from capture import FUSE_ALL, assert_same_as_eager, graphs_of
from torch._dynamo.utils import counters

import cce_inductor
from cce_inductor import config
from cce_inductor.rewrite.run import rewrite

B, S, D, V = 2, 6, 8, 40


def rand(*shape):
    return torch.randn(*shape).requires_grad_()


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return rand(B, S, D), rand(V, D), torch.randint(0, V, (B, S))


def ce(z, t, **kwargs):
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), t.reshape(-1), **kwargs)


def softened(z):
    return torch.softmax(z.detach().flip(-1), -1).view(-1, V)


# name: (function of logits and targets, part of the reason, part of the cure)
REFUSED = {
    "dropout": (lambda z, t: ce(F.dropout(z, 0.0), t), "dropout", "hidden states"),
    "relu": (lambda z, t: ce(F.relu(z), t), "relu", ""),
    "the classes reversed": (lambda z, t: ce(z.flip(-1), t), "moves the classes", "leading"),
    "the classes rolled": (lambda z, t: ce(z.roll(1), t), "moves the classes", "leading"),
    "softmax first": (lambda z, t: ce(F.softmax(z, -1), t), "softmax", ""),
    "layer norm": (lambda z, t: ce(F.layer_norm(z, z.shape[-1:]), t), "layer_norm", ""),
    "in place, not a pointwise op": (lambda z, t: (z.relu_(), ce(z, t))[1], "in place", "out-of-place"),
    "in place on a view": (lambda z, t: (z[..., 0].zero_(), ce(z, t))[1], "", ""),
    "in place, read through an alias": (
        lambda z, t: (lambda a: (z.mul_(0.5), ce(a, t))[1])(z.view(-1, V)),
        "alias",
        "out-of-place",
    ),
    "setitem of some rows": (lambda z, t: (z.__setitem__((0, ..., 3), -1e4), ce(z, t))[1], "some rows", "columns"),
    "mask of some rows": (lambda z, t: ce(z.masked_fill(t[..., None] == 3, -1e4), t), "not one for all rows", ""),
    "a mask behind a softcap": (
        lambda z, t: ce((5 * torch.tanh(z / 5)).masked_fill(torch.arange(V) > 30, -torch.inf), t % 30),
        "capped",
        "slice",
    ),
    "view regroups classes": (
        lambda z, t: ce(z.view(B, V, S).mT, t),
        "reshape",
        "leading",
    ),
    "wrong class dimension": (
        lambda z, t: F.cross_entropy(z, t[:, :1].expand(B, V) % S),
        "classes are dimension 2",
        "flatten",
    ),
    "soft targets": (lambda z, t: F.cross_entropy(z.view(-1, V), softened(z)), "class probabilities", "class indices"),
    "log_softmax over rows": (
        lambda z, t: F.nll_loss(F.log_softmax(z, 1).view(-1, V), t.view(-1)),
        "log_softmax over",
        "vocabulary",
    ),
    "nll_loss of logits": (
        lambda z, t: F.nll_loss(z.view(-1, V), t.view(-1)),
        "nll_loss reads logits",
        "cross_entropy",
    ),
    "token-dependent prior": (lambda z, t: ce(z + z.detach().sin(), t), "", ""),
    "row-dependent bias": (lambda z, t: ce(z + torch.ones(S, V), t), "not one bias per class", "vocabulary"),
    "prior behind a softcap": (
        lambda z, t: ce(5 * torch.tanh(z / 5) + torch.ones(V), t),
        "behind the softcap",
        "in front",
    ),
    "regulariser on the logits": (lambda z, t: ce(z, t) + z.square().mean(), "square", ""),
    "times zero": (lambda z, t: ce(z * 0, t), "multiplied by zero", "constant"),
    "subtracted from itself": (lambda z, t: ce(z - z, t), "multiplied by zero", "constant"),
    "rounded on the way": (lambda z, t: ce(z.bfloat16().float(), t), "narrower dtype", ""),
    "float64 statistics": (lambda z, t: ce(z.double(), t), "float64", "float32"),
    "clamped": (lambda z, t: ce(z.clamp(min=-1.0), t), "the logits are clamped", "softcap"),
    "clamped probabilities": (
        lambda z, t: F.nll_loss(z.softmax(-1).clamp(1e-6, 1 - 1e-6).log().view(-1, V), t.view(-1)),
        "the probabilities are clamped",
        "log_softmax",
    ),
    "clamped log-probabilities": (
        lambda z, t: F.nll_loss(z.log_softmax(-1).clamp(min=-9.0).view(-1, V), t.view(-1)),
        "the log-probabilities are clamped",
        "entry of the target",
    ),
    "Categorical of probabilities": (
        lambda z, t: -torch.distributions.Categorical(probs=z.softmax(-1), validate_args=False).log_prob(t).mean(),
        "a sum of probabilities",
        "logits=",
    ),
    "a factor for each class behind a softcap": (
        lambda z, t: ce(z.tanh() * torch.ones(V), t),
        "multiplied by a tensor with one number for each class behind a softcap",
        "in front of it",
    ),
    "a temperature for each row behind a number": (
        lambda z, t: ce((z + 1.0) / torch.full((B, S, 1), 2.0), t),
        "divided by a tensor with one number for each row behind",
        "in front of it",
    ),
    "a number behind a temperature for each row, capped": (
        lambda z, t: ce((z / torch.full((B, S, 1), 2.0) + 1.0).tanh(), t),
        "a softcap of logits with a constant behind a factor for each row",
        "leave the constant out",
    ),
    "a number behind a temperature for each row, capped by a root": (
        lambda z, t: ce((y := z / torch.full((B, S, 1), 2.0) + 1.0) * torch.rsqrt(y.square() + 4.0), t),
        "a softcap of logits with a constant behind a factor for each row",
        "leave the constant out",
    ),
    "a bias behind a temperature for each row": (
        lambda z, t: ce(z / torch.full((B, S, 1), 2.0) + torch.ones(V), t),
        "a bias is added behind a factor for each row",
        "in front of the factor",
    ),
    "a mask behind a temperature for each row": (
        lambda z, t: ce((z / torch.full((B, S, 1), 2.0)).masked_fill(torch.arange(V) > 30, -torch.inf), t % 30),
        "masked behind a factor for each row",
        "in front of it",
    ),
    "the order of logits with a factor for each class": (
        lambda z, t: ce(z := z * torch.ones(V), t) + z.topk(3).indices.float().mean(),
        "the order is asked of logits that have a factor",
        "before it",
    ),
    "a factor for each entry": (
        lambda z, t: ce(z * torch.ones(B, S, V), t),
        "multiplied by a tensor of shape (2, 6, 40)",
        "",
    ),
    "an integer factor": (lambda z, t: ce(z * torch.tensor(2), t), "of dtype torch.int64", "a number"),
    "weighted log-probabilities": (
        lambda z, t: -(z.log_softmax(-1) * torch.ones(V)).gather(-1, t[..., None]).mean(),
        "log-probabilities multiplied by a tensor before the loss",
        "weigh the loss",
    ),
    "probabilities of one head added": (
        lambda z, t: -(z.softmax(-1) + z.flip(0).softmax(-1)).log().mean(),
        "the logarithm of a mixture",
        "the entry of a target",
    ),
    "an expected embedding": (
        lambda z, t: ce(z, t) + (z.softmax(-1) @ torch.ones(V, D)).square().mean(),
        "an expected embedding: it needs every probability",
        "a vector for each row",
    ),
    "another head's logits as a factor": (
        lambda z, t: ce(z * F.linear(torch.ones(B, S, D), torch.ones(V, D)), t),
        "multiplied with the logits of another",
        "a loss of each",
    ),
    "a keyword that is not known": (
        lambda z, t: ce(z, t) + z.max(axis=-1).values.mean(),
        "with axis=, which is not known here",
        "leave the argument out",
    ),
    "smoothing over masked classes": (
        lambda z, t: ce(z.masked_fill(torch.arange(V) > 30, -1e4), t % 30, label_smoothing=0.1),
        "masked",
        "slice",
    ),
    "deprecated arguments": (lambda z, t: ce(z, t, size_average=True), "deprecated", "reduction"),
    "rows normalised": (
        lambda z, t: ce(z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-6), t),
        "mean reads the square of the logits",
        "softcap",
    ),
    "the root of a learned number": (
        lambda z, t: ce(z * torch.rsqrt(z.square() + torch.full((1,), 4.0)), t),
        "multiplied by a tensor",
        "hidden states",
    ),
    "the root of a square with a minus": (
        lambda z, t: ce(z * torch.rsqrt(1e4 + z.square() * -0.1), t),
        "multiplied by a tensor",
        "hidden states",
    ),
    "the root of other logits": (
        lambda z, t: ce(z * torch.rsqrt((z + 1).square() + 4), t),
        "the square of others",
        "softcap",
    ),
    "a detached root": (lambda z, t: ce(z * torch.rsqrt(z.detach().square() + 4), t), "detached", "softcap"),
    "detached logits minus their log-sum-exp": (
        lambda z, t: ce(z, t) + (z.detach() - z.logsumexp(-1, keepdim=True)).gather(-1, t[..., None]).square().mean(),
        "detached",
        "detach both",
    ),
    "exponentials over a detached sum": (
        lambda z, t: (
            ce(z, t) + (z.exp() / z.detach().exp().sum(-1, keepdim=True)).gather(-1, t[..., None]).square().mean()
        ),
        "the sum of others",
        "softmax",
    ),
    "detached exponentials over their sum": (
        lambda z, t: (
            ce(z, t) + (z.detach().exp() / z.exp().sum(-1, keepdim=True)).gather(-1, t[..., None]).square().mean()
        ),
        "the sum of others",
        "softmax",
    ),
    "detached rows among others": (
        lambda z, t: ce(torch.cat([z[:1].detach(), z[1:]]), t),
        "detached rows",
        "detach all",
    ),
    "pseudo-labels": (lambda z, t: ce(z, z.argmax(-1)), "computed from the logits", ""),
}


@pytest.mark.filterwarnings("ignore:.*size_average.*")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name, inputs):
    loss, reason, cure = REFUSED[name]

    def fn(h, w, t):
        return loss(F.linear(h, w), t)

    report = cce_inductor.explain(fn, *inputs)
    assert_same_as_eager(fn, inputs, fused=0)
    with config.patch(min_vocab=0):
        report = cce_inductor.explain(fn, *inputs)
    assert report.sites and not any(site.fused for site in report.sites)
    site = report.sites[0]
    assert site.reason and reason in site.reason
    assert cure in site.cure
    assert "test_refusals.py:" in site.location


def test_the_reason_names_the_node_and_the_line(inputs):
    def fn(h, w, t):
        z = F.linear(h, w)
        dropped = F.dropout(z, 0.0)  # the line at fault
        return ce(dropped, t)

    with config.patch(min_vocab=0):
        (site,) = cce_inductor.explain(fn, *inputs).sites
    line = fn.__code__.co_firstlineno + 2
    assert site.at.startswith("dropped") and site.at_location.endswith(f"test_refusals.py:{line}")
    assert f"test_refusals.py:{line}" in str(site) and "hidden states" in str(site)


def test_graph_untouched_when_declined(inputs):
    def fn(h, w, t):
        return ce(F.dropout(F.linear(h, w), 0.1), t)

    (gm,) = graphs_of(fn, *inputs)
    before = str(gm.graph)
    result = rewrite(gm, config.Settings(min_vocab=0), "v")
    assert result.graph_module is gm and str(gm.graph) == before
    assert [site.fused for site in result.sites] == [False]


def test_the_captured_graph_is_not_changed_when_fused(inputs):
    (gm,) = graphs_of(lambda h, w, t: ce(F.linear(h, w), t), *inputs)
    before = str(gm.graph)
    result = rewrite(gm, config.Settings(min_vocab=0), "v")
    assert result.fused == 1 and result.graph_module is not gm and str(gm.graph) == before


def test_one_head_declines_and_another_fuses(inputs):
    h, w, t = inputs

    def fn(h, w, w2, t):
        return ce(F.linear(h, w), t) + ce(F.linear(h, w2).relu(), t)

    assert_same_as_eager(fn, (h, w, rand(V, D), t), fused=1)


def test_operand_written_to_between_head_and_loss(inputs):
    """The operator reads the hidden states at the loss: a write after the head must not be seen."""
    h, w, t = inputs

    def hidden(h, w, t):
        h = h.detach() * 1
        z = F.linear(h, w)
        h.mul_(2)
        return ce(z, t)

    def through_a_view(h, w, t):
        h = h.detach() * 1
        rows = h.view(-1)
        z = F.linear(h, w)
        rows.zero_()
        return ce(z, t)

    def by_a_positional_flag(h, w, t):
        h = h.detach() * 1
        z = F.linear(h, w)
        F.relu(h, True)
        return ce(z, t)

    def before_the_head(h, w, t):
        h = h * 1
        h.mul_(2)
        return ce(F.linear(h, w), t)

    def target_before_the_loss(h, w, t):
        t = t.clone()
        z = F.linear(h, w)
        t[:, 0] = -100
        return ce(z, t)

    def returned_logits(h, w, t):
        h = h * 1
        z = F.linear(h, w)
        loss = ce(z, t)
        h.detach().zero_()
        return loss, z

    assert_same_as_eager(target_before_the_loss, (h, w, t), fused=1)
    with torch.no_grad():  # with gradients, eager itself refuses the writes
        for fn, fused in (
            (hidden, 0),
            (through_a_view, 0),
            (by_a_positional_flag, 0),
            (before_the_head, 1),
            (returned_logits, 0),
        ):
            assert_same_as_eager(fn, (h, w, t), fused=fused)


def test_copies_of_targets_that_are_written_to(inputs):
    """A copy is as good as the original only if neither is written to."""

    def masked(h, w, t):
        s = t.clone()
        s[:, 0] = 3
        return -F.linear(h, w).log_softmax(-1).gather(-1, s[..., None]).mean()

    def beside_the_original(h, w, t):
        z, s = F.linear(h, w), t.clone()
        s[:, 0] = 3
        return ce(z, t) - z.log_softmax(-1).gather(-1, s[..., None]).mean()

    def classes_in_dimension_one(h, w, t):
        s = t.clone()
        s[:, 0] = 3
        return F.cross_entropy(F.linear(h, w).transpose(1, 2), s)

    def original_written_to(h, w, t):
        t = t * 1
        s = t.clone()
        t.zero_()
        return F.cross_entropy(F.linear(h, w).transpose(1, 2), s)

    def behind_the_first_statistic(h, w, t):
        z, s = F.linear(h, w), t.clone()
        lse = z.logsumexp(-1)
        s.add_(3).remainder_(V)
        return (lse - z.gather(-1, s[..., None]).squeeze(-1)).mean()

    for fn in (masked, beside_the_original, classes_in_dimension_one, original_written_to):
        assert_same_as_eager(fn, inputs, fused=1)
    assert_same_as_eager(behind_the_first_statistic, inputs, fused=0)


def test_operands_written_to_between_two_losses(inputs):
    """One operator for the chunks would read them too early."""

    def target(h, w, t):
        s = t[1].clone()
        first = ce(F.linear(h[0], w), t[0])
        s.fill_(3)
        return first + ce(F.linear(h[1], w), s)

    def hidden(h, w, t):
        x = h[1] * 1
        first = ce(F.linear(h[0], w), t[0])
        x.mul_(2)
        return first + ce(F.linear(x, w), t[1])

    def weight(h, w, t):
        w = w.detach() * 1
        first = ce(F.linear(h[0], w), t[0])
        w.mul_(2)
        return first + ce(F.linear(h[1], w), t[1])

    for fn in (target, hidden):
        assert_same_as_eager(fn, inputs, fused=2)
    with torch.no_grad():
        assert_same_as_eager(weight, inputs, fused=2)


def test_what_the_logits_were_made_with_is_written_to(inputs):
    def shift(h, w, t):
        s = torch.ones(B, S, 1)
        z = F.linear(h, w) + s
        s.zero_()
        return ce(z, t) + z.logsumexp(-1).mean()

    def index(h, w, t):
        rows = torch.tensor([1, 0])
        z = F.linear(h, w)[rows]
        rows.zero_()
        return ce(z, t)

    assert_same_as_eager(shift, inputs, fused=0)
    with torch.no_grad():  # with gradients, eager itself refuses the write
        assert_same_as_eager(index, inputs, fused=0)


def test_size_gate(inputs):
    def fn(h, w, t):
        return ce(F.linear(h, w), t)

    assert_same_as_eager(fn, inputs, fused=0, min_vocab=V + 1)
    assert_same_as_eager(fn, inputs, fused=1, min_vocab=V)
    (site,) = cce_inductor.explain(fn, *inputs).sites
    assert "min_vocab=4096" in site.reason and "min_vocab" in site.cure


def test_logits_from_outside_the_graph(inputs):
    h, w, t = inputs
    with config.patch(min_vocab=0):
        (site,) = cce_inductor.explain(lambda z, t: ce(z, t), F.linear(h, w).detach(), t).sites
    assert "from outside" in site.reason and "one torch.compile region" in site.cure


def test_hook_on_the_logits(inputs):
    def fn(h, w, t):
        z = F.linear(h, w)
        z.register_hook(lambda g: g * 2)
        return ce(z, t)

    assert_same_as_eager(fn, inputs, fused=0)


def test_functorch_is_left_alone(inputs):
    def fn(h, w, t):
        return torch.func.vmap(lambda a, b: F.cross_entropy(F.linear(a, w), b.clone().reshape(-1)))(h, t).mean()

    def elsewhere(h, w, t):
        weights = torch.func.vmap(lambda a: a.square().sum())(h.detach())
        return weights.sum() * F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))

    assert_same_as_eager(fn, inputs, fused=0)
    (site,) = rewrite(graphs_of(fn, *inputs)[-1], config.Settings(min_vocab=0), "v").sites
    assert "torch.func transform" in site.reason
    assert_same_as_eager(elsewhere, inputs, fused=1)


@pytest.mark.parametrize(
    "conv",
    [
        torch.nn.Conv2d(4, V, 3, padding=1),
        torch.nn.Conv2d(4, V, 1, stride=2, padding=3),
        torch.nn.Conv2d(4, V, 1, groups=2),
    ],
    ids=["kernel", "stride", "groups"],
)
def test_convolution_is_no_head(conv):
    def fn(x, t):
        return F.cross_entropy(conv(x), t)

    x, t = torch.randn(2, 4, 4, 4), torch.randint(0, V, (2, *conv(torch.randn(2, 4, 4, 4)).shape[2:]))
    with config.patch(min_vocab=0):
        (site,) = cce_inductor.explain(fn, x, t).sites
    assert not site.fused and "convolution" in site.reason


def test_a_second_derivative_runs_uncompiled(inputs):
    """No compiled graph can be differentiated twice: this one is left to eager, and says so."""

    def of_logits(h, w, t):
        loss = ce(F.linear(h, w), t)
        (g,) = torch.autograd.grad(loss, h, create_graph=True)
        return loss + g.square().sum()

    def of_head(h, w, t):
        return ce(F.linear(h, w), t)

    def fn(h, w, t):
        loss = of_head(h, w, t)
        (g,) = torch.autograd.grad(loss, h, create_graph=True)
        return loss + g.square().sum()

    assert_same_as_eager(of_logits, inputs, fused=0)
    assert_same_as_eager(fn, inputs, fused=0)
    with config.patch(min_vocab=0):
        (site,) = cce_inductor.explain(fn, *inputs).sites
    assert "create_graph=True" in site.reason and "test_refusals.py:" in site.reason


def test_an_edit_that_records_no_gradient(inputs):
    """Under no_grad the values change and the gradients do not."""

    def fn(h, w, t):
        z = F.linear(h, w)
        with torch.no_grad():
            z.mul_(2)
        return ce(z, t)

    assert_same_as_eager(fn, inputs, fused=0)


def test_strict_raises_with_the_reason(inputs):
    def fn(h, w, t):
        return ce(F.dropout(F.linear(h, w), 0.0), t)

    with pytest.raises(Exception, match="dropout.*test_refusals.py"):
        torch.compile(fn, backend="cce", options={**FUSE_ALL, "strict": True})(*inputs)
    torch._dynamo.reset()
    # strict says nothing about a graph that fuses or has no loss.
    torch.compile(lambda h, w, t: ce(F.linear(h, w), t), backend="cce", options={**FUSE_ALL, "strict": True})(*inputs)
    torch.compile(torch.sin, backend="cce", options={**FUSE_ALL, "strict": True})(inputs[0])


def test_a_fault_of_the_pass_leaves_the_graph(inputs, monkeypatch, caplog):
    from cce_inductor.rewrite import emit

    def broken(*args):
        raise KeyError("deliberate")

    monkeypatch.setattr(emit, "emit", broken)
    with caplog.at_level(logging.ERROR, logger="cce_inductor"):
        assert_same_as_eager(lambda h, w, t: ce(F.linear(h, w), t), inputs, fused=0)
    assert "could not rewrite" in caplog.text
    with config.patch(min_vocab=0):
        (site,) = cce_inductor.explain(lambda h, w, t: ce(F.linear(h, w), t), *inputs).sites
    assert "internal error" in site.reason and "deliberate" in site.reason


def test_counters(inputs):
    counters.clear()
    fn = torch.compile(lambda h, w, t: ce(F.linear(h, w).relu(), t), backend="cce", options=FUSE_ALL)
    fn(*inputs)
    assert counters["cce_inductor"]["declined"] == 1 and counters["cce_inductor"]["fused"] == 0


def test_columns_of_a_symbolic_number_that_are_returned(inputs):
    """They fuse as long as they stay: what computes them has to know how many they are."""

    def fn(h, w, t, columns):
        z = F.linear(h, w)[..., columns]
        return ce(z, t % 5), z[:1]

    columns = torch.tensor([7, 3, 11, 0, 2])
    assert_same_as_eager(fn, [*inputs, columns], fused=0, dynamic=True)
    assert_same_as_eager(lambda *given: fn(*given)[0], [*inputs, columns], fused=1, dynamic=True)
    with config.patch(min_vocab=0):
        (gm,) = graphs_of(fn, *inputs, columns, dynamic=True)
        (site,) = rewrite(gm, config.Settings(min_vocab=0), "v").sites
    assert "symbolic number of classes leave the graph" in site.reason
