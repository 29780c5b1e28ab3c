"""Rows of which only the data knows the number, in one graph: `capture_dynamic_output_shape_ops`."""

import pytest
import torch
import torch.nn.functional as F
from capture import assert_same_as_eager
from torch._dynamo.utils import counters

B, S, D, V = 3, 20, 16, 64


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    t = torch.randint(0, V, (B, S))
    t[:, ::3] = -100
    return torch.randn(B, S, D).requires_grad_(), torch.randn(V, D).requires_grad_(), t


def mean_of(z, m, t):
    return F.cross_entropy(z[m], t[m])


# Of hidden states, weight and class indices: how many losses, and outputs that are deferred.
PROGRAMS = {
    "flat": (lambda h, w, t: mean_of(F.linear(h.flatten(0, 1), w), t.flatten() != -100, t.flatten()), 1, 0),
    "in three dimensions": (lambda h, w, t: mean_of(F.linear(h, w), t != -100, t), 1, 0),
    "shifted": (lambda h, w, t: mean_of(F.linear(h, w)[:, :-1], t[:, 1:] != -100, t[:, 1:]), 1, 0),
    "of the hidden states": (
        lambda h, w, t: (lambda m: F.cross_entropy(F.linear(h[m], w), t[m]))(t != -100),
        1,
        0,
    ),
    "by their places": (
        lambda h, w, t: mean_of(F.linear(h, w).flatten(0, 1), (t.flatten() != -100).nonzero()[:, 0], t.flatten()),
        1,
        0,
    ),
    "with the logits": (lambda h, w, t: (lambda z: (mean_of(z, t != -100, t), z))(F.linear(h, w)), 1, 1),
    "with their logits": (
        lambda h, w, t: (lambda z, m: (F.cross_entropy(z[m], t[m]), z[m]))(F.linear(h, w), t != -100),
        1,
        1,
    ),
    "log-probabilities": (
        lambda h, w, t: (lambda m: -F.linear(h, w)[m].log_softmax(-1).gather(-1, t[m][:, None]).mean())(t != -100),
        1,
        0,
    ),
    "each with a temperature": (
        lambda h, w, t: (lambda m: F.cross_entropy(F.linear(h, w)[m] / (1.0 + t[m][:, None] % 3), t[m]))(t != -100),
        1,
        0,
    ),
    "both halves": (
        lambda h, w, t: (lambda z, m: mean_of(z, m, t) + mean_of(z, ~m, t.clamp(min=0)))(F.linear(h, w), t != -100),
        2,
        0,
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_fuses_as_with_a_graph_break(name, inputs):
    fn, fused, deferred = PROGRAMS[name]
    counters["graph_break"].clear()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_same_as_eager(fn, inputs, fused, deferred, compiler="aot_eager")
    assert not counters["graph_break"]
