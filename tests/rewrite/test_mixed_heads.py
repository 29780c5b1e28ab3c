"""Jensen-Shannon and skew divergences of two heads, as people write them: eager's numbers, from one operator."""

import math

import pytest
import torch
import torch.nn.functional as F
from capture import assert_same_as_eager, graphs_of
from test_compared_heads import V, heads, operands

from cce_inductor import config
from cce_inductor.rewrite.run import rewrite


def kl(log_m, log_p, reduction="none"):
    return F.kl_div(log_m, log_p, reduction=reduction, log_target=True)


def generalised(z, r, beta, keep=None, T=1.0):
    """GKD, as TRL writes it."""
    student, teacher = (z / T).log_softmax(-1), (r / T).log_softmax(-1)
    beta = torch.tensor(beta, dtype=student.dtype, device=student.device)
    log_m = torch.logsumexp(torch.stack([student + torch.log1p(-beta), teacher + torch.log(beta)]), dim=0)
    jsd = beta * kl(log_m, teacher) + (1 - beta) * kl(log_m, student)
    return jsd.sum() / jsd.size(0) if keep is None else jsd[keep].sum() / keep.sum()


def of_modules(z, r, beta):
    """Liger's reference."""
    log_q, log_p = z.log_softmax(-1).float().view(-1, V), r.log_softmax(-1).float().view(-1, V)
    log_m = torch.log(torch.lerp(log_q.exp(), log_p.exp(), beta))
    loss = beta * kl(log_m, log_p).sum(-1) + (1 - beta) * kl(log_m, log_q).sum(-1)
    return loss.sum() / loss.shape[0]


def written_out(z, r, beta, keep):
    log_q, log_p = torch.log_softmax(z.float() / 1.5, -1), torch.log_softmax(r.float() / 1.5, -1)
    q, p = log_q.exp(), log_p.exp()
    m = beta * p + (1 - beta) * q
    d = beta * (p * (log_p - m.log())) + (1 - beta) * (q * (log_q - m.log()))
    return torch.where(keep, d, torch.zeros_like(d)).sum() / keep.sum()


def of_sums(z, r, w):
    """DistiLLM's js_distance."""
    p, q = r.softmax(-1), z.softmax(-1)
    log_m = ((1 - w) * p + w * q).log()
    bad = torch.isinf(z) | torch.isinf(r)
    loss = 0.0
    for share, own, log in ((w, q, z.log_softmax(-1)), (1 - w, p, r.log_softmax(-1))):
        product = torch.masked_fill(own * log_m, bad, 0)
        product -= torch.masked_fill(own * log, bad, 0)
        loss = loss - share * product.sum(-1).mean()
    return loss


def both(z, r):
    return z.softmax(-1), r.softmax(-1), (z.softmax(-1) + r.softmax(-1)) / 2


def of_quotients(z, r):
    p, q, m = both(z, r)
    return (0.5 * (p * torch.log(p / m)).sum(-1) + 0.5 * (q * torch.log(q / m)).sum(-1)).mean()


def of_entropies(z, r):
    h = lambda p: -(p * p.log()).sum(-1)  # noqa: E731
    p, q, m = both(z, r)
    return (h(m) - 0.5 * h(p) - 0.5 * h(q)).mean()


def of_xlogy(z, r):
    p, q, m = both(z, r)
    return 0.5 * sum((torch.xlogy(a, a) - torch.xlogy(a, m)).sum(-1) for a in (p, q)).mean()


def of_probabilities(z, r):
    p, q, m = both(z, r)
    return 0.5 * (F.kl_div(m.log(), p, reduction="batchmean") + F.kl_div(m.log(), q, reduction="batchmean"))


def by_logaddexp(z, r, w):
    a, b = z.log_softmax(-1), r.log_softmax(-1)
    log_m = torch.logaddexp(a + math.log(1 - w), b + math.log(w))
    return ((1 - w) * (a.exp() * (a - log_m)) + w * (b.exp() * (b - log_m))).sum(-1).mean()


def without_weights(z, r):
    a, b = z.log_softmax(-1), r.log_softmax(-1)
    log_m = torch.stack([a, b], -1).logsumexp(-1) - math.log(2)
    return 0.5 * (kl(log_m, a, "sum") + kl(log_m, b, "sum"))


def of_views(z, r):
    """The logarithm of a mixture, and another mixture, are viewed as rows."""
    a, b = z.view(3, 4, V).log_softmax(-1), r.view(3, 4, V).log_softmax(-1)
    log_m = ((a.exp() + b.exp()) / 2).log().flatten(0, 1)
    log_n = (0.3 * a.exp() + 0.7 * b.exp()).view(-1, V).log()
    rows = a.reshape(-1, V), b.reshape(-1, V)
    return sum(kl(log_m, p, "batchmean") for p in rows) + kl(log_n, rows[0], "sum")


def of_logarithms(z, r):
    a, b = z.view(3, 4, V).log_softmax(-1), r.view(3, 4, V).log_softmax(-1)
    return kl((torch.logaddexp(a, b) - math.log(2)).view(-1, V), a.view(-1, V), "batchmean")


def skew(z, r, w):
    """DistiLLM's skewed_forward_kl, and the entropy of the teacher."""
    q = r.softmax(-1)
    return (q * (r.log_softmax(-1) - (w * q + (1 - w) * z.softmax(-1)).log())).sum(-1).mean()


def of_mixture_alone(z, r, w):
    return -(r.softmax(-1) * (w * r.softmax(-1) + (1 - w) * z.softmax(-1)).log()).sum(-1).mean()


# Of the logits z and r (N, V), a mask of rows (N, 1), the weight of z, and classes (N,).
FUSED = {
    "TRL": lambda z, r, keep, w, t: generalised(z, r, 0.1, T=0.9),
    "Liger": lambda z, r, keep, w, t: of_modules(z, r, 0.2),
    "Liger, rows that count": lambda z, r, keep, w, t: written_out(z, r, 0.1, keep),
    "of probabilities": lambda z, r, keep, w, t: of_probabilities(z, r),
    "of quotients": lambda z, r, keep, w, t: of_quotients(z, r),
    "xlogy": lambda z, r, keep, w, t: of_xlogy(z, r),
    "logaddexp": lambda z, r, keep, w, t: by_logaddexp(z, r, 0.3),
    "logaddexp of more than one": lambda z, r, keep, w, t: without_weights(z, r),
    "weighted rows": lambda z, r, keep, w, t: (keep * 0.5 * kl((both(z, r)[2]).log(), z.log_softmax(-1))).sum(),
    "beside the label's": lambda z, r, keep, w, t: F.cross_entropy(z, t) + of_probabilities(z, r),
    "of views": lambda z, r, keep, w, t: of_views(z, r),
    "of views of logarithms": lambda z, r, keep, w, t: of_logarithms(z, r),
    "DistiLLM": lambda z, r, keep, w, t: of_sums(z, r, 0.9),
    "a mean": lambda z, r, keep, w, t: sum(
        F.kl_div(torch.stack([z.softmax(-1), r.softmax(-1)]).mean(0).log(), p, reduction="batchmean")
        for p in (z.softmax(-1), r.softmax(-1))
    ),
    "an entropy of both": lambda z, r, keep, w, t: torch.special.entr(both(z, r)[2]).sum(-1).mean(),
    "at the target": lambda z, r, keep, w, t: (
        -torch.logaddexp((9 * z).log_softmax(-1) + math.log(0.7), (9 * r).log_softmax(-1) + math.log(0.3))
        .gather(-1, t[:, None])
        .mean()
    ),
    "skew": lambda z, r, keep, w, t: skew(z, r, 0.1),
    "skew, the other way": lambda z, r, keep, w, t: skew(r, z, 0.1),
    "cross-entropy with a mixture": lambda z, r, keep, w, t: of_mixture_alone(z, r, 0.1),
    "of softcaps": lambda z, r, keep, w, t: of_probabilities(3 * torch.tanh(z / 3), 5 * torch.tanh(r / 5)),
}


@pytest.mark.parametrize("name", FUSED)
def test_same_as_eager(name):
    assert_same_as_eager(heads(FUSED[name]), operands(), fused=1, tolerance=2e-5)


# Of those that eager mode computes in fp32 from there on: in 16 bits it rounds the mixture.
@pytest.mark.parametrize("name", ["Liger", "Liger, rows that count", "TRL", "logaddexp"])
def test_heads_in_sixteen_bits(name):
    assert_same_as_eager(heads(FUSED[name]), operands(torch.bfloat16), fused=1, tolerance=4e-2)


@pytest.mark.parametrize("name", ["TRL", "of probabilities", "DistiLLM", "skew"])
def test_a_frozen_head(name):
    assert_same_as_eager(heads(FUSED[name], frozen=True), operands(), fused=1, tolerance=2e-5)


@pytest.mark.parametrize("name", ["TRL", "Liger", "Liger, rows that count", "of probabilities"])
def test_symbolic_rows(name):
    assert_same_as_eager(heads(FUSED[name]), operands(), fused=1, tolerance=2e-5, dynamic=True)


def test_the_mixture_of_two_teachers():
    def fn(x, w, y, u, keep, t, how):
        z, p, q = F.linear(x, w), F.linear(y, u).detach().softmax(-1), F.linear(x, w.detach().flip(0)).softmax(-1)
        m = 0.3 * p + 0.7 * q
        if how == 0:
            return F.cross_entropy(z, m, label_smoothing=0.1)
        if how == 1:
            return F.kl_div(z.log_softmax(-1), m, reduction="batchmean")
        return F.kl_div(z.log_softmax(-1), m.log(), reduction="sum", log_target=True)

    for how in range(3):
        loss = lambda *given, how=how: fn(*given, how)  # noqa: E731
        assert_same_as_eager(loss, operands(), fused=1, tolerance=2e-5)


def test_each_entropy_is_a_loss_of_its_own():
    loss = heads(lambda z, r, keep, w, t: of_entropies(z, r))
    assert_same_as_eager(loss, operands(), fused=2, tolerance=2e-5)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_picked_by_a_mask():
    loss = heads(lambda z, r, keep, w, t: generalised(z, r, 0.3, keep[:, 0]))
    assert_same_as_eager(loss, operands(), fused=1, tolerance=2e-5)


def calls(loss):
    (gm,) = graphs_of(heads(loss), *operands())
    out = rewrite(gm, config.Settings(min_vocab=0), "v").graph_module
    return [n.args[3] for n in out.graph.nodes if "linear_statistics" in str(n.target)]


def test_one_statistic_where_it_is_one_sum():
    (names,) = calls(lambda z, r, keep, w, t: by_logaddexp(z, r, 0.25))
    assert names.split()[-3:] == [f"jensen_shannon(0.25){part}" for part in ("", ".other", ".own")]


def test_one_call_where_it_is_two():
    (names,) = calls(lambda z, r, keep, w, t: of_sums(z, r, 0.75))
    assert {"skew(0.25)", "other_skew(0.75)"} <= {*names.split()}


def test_a_number_is_read_through_arithmetic_on_tensors():
    (names,) = calls(lambda z, r, keep, w, t: generalised(z, r, 0.5))
    assert "jensen_shannon(0.5)" in names


def edited(z, r):
    beta = torch.tensor(0.5)
    beta.mul_(0.5)
    return generalised_by(z, r, beta)


def generalised_by(z, r, beta):
    log_m = torch.logaddexp(z.log_softmax(-1) + beta.log(), r.log_softmax(-1) + (1 - beta).log())
    return kl(log_m, z.log_softmax(-1), "sum")


def of_three(z, r):
    log_m = ((z.softmax(-1) + r.softmax(-1) + (2 * z).softmax(-1)) / 3).log()
    return kl(log_m, z.log_softmax(-1), "sum")


# The loss, and a part of the reason.
REFUSED = {
    "of three": (lambda z, r, keep, w, t: of_three(z, r), "of other than two heads"),
    "of a detached mixture": (
        lambda z, r, keep, w, t: kl((z.detach().softmax(-1) + r.softmax(-1)).log(), z.log_softmax(-1), "sum"),
        "averaged by something else",
    ),
    "from a mixture": (
        lambda z, r, keep, w, t: (both(z, r)[2] * (both(z, r)[2].log() - z.log_softmax(-1))).sum(-1).mean(),
        "between a mixture of two heads and one of them",
    ),
    "stacked for something else": (
        lambda z, r, keep, w, t: torch.stack([z.log_softmax(-1) + 1.0, r.log_softmax(-1) + 2.0]).mean(),
        "log-probabilities to which a number was added",
    ),
    "a tensor that is edited": (lambda z, r, keep, w, t: edited(z, r), "added to log-probabilities"),
    "a number that is learned": (
        lambda z, r, keep, w, t: generalised_by(z, r, w[0, 0].sigmoid()),
        "added to log-probabilities",
    ),
    "a clamped mixture": (
        lambda z, r, keep, w, t: kl(both(z, r)[2].clamp(min=1e-7).log(), z.log_softmax(-1), "sum"),
        "of the products of two heads",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    loss = REFUSED[name][0]
    beside = lambda z, r, keep, w, t: loss(z, r, keep, w, t) + F.cross_entropy(z, t)  # noqa: E731
    (gm,) = graphs_of(heads(beside), *operands())
    sites = rewrite(gm, config.Settings(min_vocab=0), "v").sites
    assert sites and not any(site.fused for site in sites)
    assert any(REFUSED[name][1] in site.reason for site in sites), [site.reason for site in sites]


def test_classes_in_front():
    def fn(x, w, y, u, keep, t):
        z, r = torch.matmul(w, x.t())[None], torch.matmul(u, y.t())[None]
        p, q = z.softmax(1), r.softmax(1)
        log_m = ((p + q) / 2).log()
        return (F.kl_div(log_m, p, reduction="none") + F.kl_div(log_m, q, reduction="none")).sum(1).mean()

    assert_same_as_eager(fn, operands(), fused=1, tolerance=2e-5)
