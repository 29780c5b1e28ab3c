"""A loss outside the compiled model costs no more than under torch.compile alone: neither memory nor, where it reads
the deferred logits, a matrix product.

Both are counted, with `aot_eager` behind either backend; times are `python -m cce_inductor bench reads`.
"""

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from torch import nn
from torch._dynamo.utils import counters

from cce_inductor.bench.readers import HEADS, READERS, model

B, S, D, V = 2, 32, 16, 4096
# Hidden states and their gradient, a hundredth of the logits: autograd may make that before the weight's, or after it.
SLACK = 2 * B * S * D * 4 + 1024
# What needs no logits, of any head; and what needs those of a head with a softcap, whose slope is not that of a tanh.
SERVED = (
    *("label_smoother", "focal", "metric_before", "shifted", "in_pieces", "last_row", "sigmoids"),
    *("temperature_in_place", "temperature_of_a_copy", "forbidden_classes"),
)
READ_IF_CAPPED = ("last_row", "forbidden_classes")
OTHER_HEADS = ("label_smoother", "multi_margin", "metric_before", "forbidden_classes", "in_pieces", "last_row")


def compiled(fn, ours, **options):
    torch._dynamo.reset()
    return (
        torch.compile(fn, backend="cce", options={"compiler": "aot_eager", **options})
        if ours
        else torch.compile(fn, backend="aot_eager")
    )


def measured(step):
    """What a step takes once everything is compiled. It leaves no gradients: the meter would see the next free them."""
    for _ in range(2):
        step()
    with Allocations() as taken:
        step()
    return taken


def trained(head, loss, ours, backwards=1, dtype=None):
    """A training step of a model whose loss is outside: what it took, and its gradients. A dtype: in eager mode."""
    torch.manual_seed(1)
    made = model(head, D, V)
    x = torch.randn(B, S, D, dtype=next(made.parameters()).dtype)
    t = torch.randint(1, V, (B, S))
    run = compiled(made, ours)
    if dtype is not None:
        run, x = made.to(dtype), x.to(dtype)

    def backward():
        torch.manual_seed(2)
        value = loss(run(x), t)
        for left in reversed(range(backwards)):
            value.backward(retain_graph=left > 0)

    taken = measured(lambda: (backward(), made.zero_grad()))
    backward()
    return taken, [p.grad for p in made.parameters()]


def check(head, loss, backwards=1, reads=True):
    plain, expected = trained(head, loss, False, backwards)
    counters.clear()
    ours, got = trained(head, loss, True, backwards)
    assert counters["cce_inductor"]["deferred_materialized"] == (4 if reads else 0)
    most = plain.peak + SLACK if reads else 0.75 * plain.peak
    assert ours.peak <= most, f"{ours.peak / plain.peak:.2f} of plain torch.compile's peak"
    if reads:
        assert ours.products == plain.products, "the head was computed more than once"
    if reads:
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-4 if g.dtype == torch.float32 else 3e-2, atol=1e-6)
        return
    _, exact = trained(head, loss, False, backwards, torch.float64)
    for g, e, x in zip(got, expected, exact, strict=True):
        off, theirs = ((t.double() - x).norm() / x.norm() for t in (g, e))
        # Sums over 4096 classes that cancel: what either is off by is partly luck.
        assert off <= 1.25 * theirs + 8 * torch.finfo(g.dtype).eps, f"off by {off:.2e}, eager by {theirs:.2e}"


@pytest.mark.parametrize("name", READERS)
def test_a_loss(name):
    check("plain", READERS[name], reads=name not in SERVED)


@pytest.mark.parametrize("name", OTHER_HEADS)
@pytest.mark.parametrize("head", [HEADS[1], *(pytest.param(head, marks=pytest.mark.slow) for head in HEADS[2:])])
def test_a_loss_of_another_head(head, name):
    reads = name not in SERVED or (head == "capped" and name in READ_IF_CAPPED)
    check(head, READERS[name], reads=reads)


@pytest.mark.parametrize("head", ["plain", "capped"])
@pytest.mark.parametrize("name", ["label_smoother", "kl_to_given"])
def test_a_loss_with_two_backwards(name, head):
    check(head, READERS[name], backwards=2, reads=name not in SERVED)


@pytest.mark.parametrize("name", ["kl_to_given", "bce", "sigmoids"])
def test_a_loss_that_is_compiled_apart(name):
    plain, _ = trained("capped", compiled(READERS[name], False), False)
    ours, _ = trained("capped", compiled(READERS[name], True), True)
    assert ours.peak <= plain.peak + SLACK
    assert ours.products == plain.products


class WithLoss(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, t):
        z = self.body(x)
        return F.cross_entropy(z.flatten(0, 1), t.flatten()), z


@pytest.mark.usefixtures("a_mib_is_large")
@pytest.mark.parametrize("head", ["plain", "capped"])
@pytest.mark.parametrize("trains", [True, False], ids=["a second loss", "a metric"])
@pytest.mark.parametrize("name", ["label_smoother", "bce", "last_row"])
def test_logits_beside_a_fused_loss(name, trains, head):
    """Their head is computed for the loss and once more for the read, but there is no more memory."""
    peaks = []
    for ours in (False, True):
        made = WithLoss(model(head, D, V))
        run, x, t = compiled(made, ours, workspace_mb=1), torch.randn(B, S, D), torch.randint(1, V, (B, S))

        def step(run=run, made=made, x=x, t=t):
            loss, z = run(x, t)
            with torch.set_grad_enabled(trains):
                other = READERS[name](z, t)
            (loss + other if trains else loss).backward()
            made.zero_grad()

        peaks.append(measured(step).peak)
    assert peaks[1] <= peaks[0] + SLACK
