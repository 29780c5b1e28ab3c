"""The unbiased filter: a sample of the columns that a budget would drop, reproducible from its seed."""

import pytest
import torch
from head_oracle import Head, error, min_cut
from torch.utils.checkpoint import checkpoint

import cce_inductor
from cce_inductor import config

TAU = 0.05


def loss(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(x @ w.T, target)


COMPILE = {"min_vocab": 0, "compiler": "aot_eager", "grad_filter": ("unbiased", TAU)}


def checkpointed(function):
    return lambda *arguments: checkpoint(function, *arguments, use_reentrant=False)


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, **options)


REWRITTEN = {"backend": cce_inductor.cce_backend, "options": COMPILE}
direct = cce_inductor.linear_cross_entropy
WAYS = {
    "direct": lambda: direct,
    "direct, checkpointed": lambda: checkpointed(direct),
    "direct, compiled": lambda: compiled(direct, backend="aot_eager"),
    "direct, checkpointed, compiled": lambda: compiled(checkpointed(direct), backend=min_cut),
    "rewritten": lambda: compiled(loss, **REWRITTEN),
    "rewritten, checkpointed": lambda: checkpointed(compiled(loss, **REWRITTEN)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_seed_reproduces_a_step(way):
    """Of one forward, every backward agrees; of one random state, every step; and those of all ways with the direct."""
    torch._dynamo.reset()
    head = Head.make(300, 16, 400)

    def gradients(step, seed: int, times: int = 1) -> list[torch.Tensor]:
        leaves = [head.x.clone().requires_grad_(), head.w.clone().requires_grad_()]
        torch.manual_seed(seed)
        value = step(*leaves, head.target)
        found = [value.detach()]
        for _ in range(times):
            torch.rand(3)  # whatever else draws numbers in between
            found += torch.autograd.grad(value, leaves, retain_graph=times > 1)
        return found

    with config.patch(grad_filter=("unbiased", TAU)):
        step, want = WAYS[way](), gradients(direct, 0)
        value, dx, dw, *again = gradients(step, 0, times=1 if "checkpoint" in way else 2)
        assert not again or (torch.equal(dx, again[0]) and torch.equal(dw, again[1]))
        assert all(torch.equal(a, b) for a, b in zip([value, dx, dw], gradients(step, 0), strict=True))
        assert all(error(a, b) < 1e-6 for a, b in zip([value, dx, dw], want, strict=True))
        other, *different = gradients(step, 1)
        assert torch.equal(value, other), "the loss itself is exact"
        assert error(dx, different[0]) > 1e-4 and error(dw, different[1]) > 1e-4
