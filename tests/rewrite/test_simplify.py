"""Operands that are expanded to the logits' shape, and what is made in their dtype: eager's numbers, fused."""

import pytest
import torch
import torch.nn.functional as F
from capture import assert_same_as_eager, graphs_of

from cce_inductor.graph import simplify
from cce_inductor.graph.regions import copy_graph

N, D, V = 12, 8, 40


def ce(z, t):
    return F.cross_entropy(z, t)


def repeated(b, z):
    return b.repeat(len(z), 1)


def edited(b, z, number):
    made = repeated(b, z)
    made[0] += number
    return made


# Of the logits (N, V), a number for each class and for each row, and the classes.
FUSED = {
    "an expanded prior": lambda z, b, r, t: ce(z + b.unsqueeze(0).expand(z.shape[0], -1), t),
    "... its logarithm": lambda z, b, r, t: ce(z + (2 * b.square() + 1).expand_as(z).log(), t),
    "a repeated prior": lambda z, b, r, t: ce(z - 0.5 * repeated(b, z), t),
    "an expanded gain": lambda z, b, r, t: ce(z * torch.broadcast_to(b, z.shape).exp(), t),
    "expanded temperatures": lambda z, b, r, t: ce(z / r.expand(-1, V), t),
    "a prior in the logits' dtype": lambda z, b, r, t: ce(z + b.double().type_as(z), t),
    "an expanded mask": lambda z, b, r, t: ce(z.masked_fill((b > 9).expand_as(z), -1e4), t),
    "... in place": lambda z, b, r, t: ce((z * 1.0).masked_fill_((b > 9)[None].expand(N, -1), -1e4), t),
    "... the condition of where": lambda z, b, r, t: ce(torch.where(~(b < 9).repeat(len(z), 1), -1e4, z), t),
    "class weights in their dtype": lambda z, b, r, t: F.cross_entropy(z, t, weight=b.detach().abs().double().to(z)),
}
NOT_FUSED = {
    "a prior whose first row is another": lambda z, b, r, t: ce(z + edited(b, z, 1.0), t),
    "a prior repeated over the classes": lambda z, b, r, t: ce(z + b[:8].repeat(N, V // 8), t),
    "rows and classes": lambda z, b, r, t: ce(z + (b * r), t),
}


def operands():
    torch.manual_seed(0)
    x, w, b = (torch.randn(shape).requires_grad_() for shape in ((N, D), (V, D), (V,)))
    return x, w, b, (torch.rand(N, 1) + 0.5).requires_grad_(), torch.randint(0, V, (N,))


@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
@pytest.mark.parametrize("name", FUSED)
def test_fused(name, dynamic):
    assert_same_as_eager(
        lambda x, w, b, r, t: FUSED[name](F.linear(x, w), b, r, t), operands(), fused=1, dynamic=dynamic
    )


@pytest.mark.parametrize("name", NOT_FUSED)
def test_not_fused(name):
    assert_same_as_eager(lambda x, w, b, r, t: NOT_FUSED[name](F.linear(x, w), b, r, t), operands(), fused=0)


def test_nothing_is_looked_for_behind_residual_connections(monkeypatch):
    """Whether something is written to is asked of expanded tensors only: each time the whole graph is gone through."""
    asked = []
    monkeypatch.setattr(simplify, "written", lambda *given: asked.append(given) or False)

    def fn(x, w, b):
        for _ in range(12):
            x = x + F.gelu(x) * torch.sigmoid(x)
        return F.linear(x, w) + b.expand(N, -1)

    x, w, b, *_ = operands()
    (gm,) = graphs_of(fn, x, w, b)
    simplify.broadcast(copy_graph(gm).graph)
    assert len(asked) == 1
