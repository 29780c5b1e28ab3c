"""Random programs: the rewritten graph gives eager's outputs and gradients, whether anything was fused or not.

`-s` prints how many programs fused, by production; `-m slow` runs thousands.
"""

import logging
from typing import Any

import productions  # noqa: F401 - fills the grammar
import pytest
import torch
from against_eager import Tally, outcome
from coverage_table import FUSED, fusing, spellings
from grammar import DEFERRED, Choices, Draft, Program, generate, shrink


@pytest.fixture(autouse=True)
def quiet():
    """Pytest listens to every logger, and torch then writes its structured trace: a third of the time."""
    trace = logging.getLogger("torch.__trace")
    level = trace.level
    trace.setLevel(logging.CRITICAL)
    yield
    trace.setLevel(level)


def check(
    seeds: range,
    dtype: torch.dtype = torch.float64,
    dynamic: bool | None = None,
    only: Any = None,
    apart: bool = False,
) -> Tally:
    """Runs the programs of some seeds; a wrong one is made as short as it can be, and printed.

    apart: whether only the head is compiled, and all that follows called on its deferred logits.
    """
    tally = Tally()
    for seed in seeds:
        program = generate(seed, dtype, only, DEFERRED if apart else None)
        result = outcome(program, dynamic, apart)
        if result is None:
            tally.skipped += 1
            continue
        if result.wrong:

            def fails(candidate: Program) -> bool:
                again = outcome(candidate, dynamic, apart)
                return again is not None and bool(again.wrong)

            program = shrink(program, fails)
            again = outcome(program, dynamic, apart)
            pytest.fail(f"seed {seed}: {again.wrong if again else result.wrong}\n{program}", pytrace=False)
        tally.add(program, result)
    print(f"\n{dtype}, dynamic={dynamic}, seeds {seeds}, {tally.skipped} skipped by eager: {tally}")
    return tally


# What the generator found, made as short as it could be.
FOUND = {
    "exponentials over their mean": (
        "z = F.linear(h, w)",
        "p = z.exp() / z.exp().mean(-1, keepdim=True)",
        "r0 = p.gather(-1, t.clamp(min=0)[..., None]).mean() + F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1))",
    ),
    "exponentials over the sum of their double": (
        "z = F.linear(h, w)",
        "p = z.exp() / (2 * z.exp()).sum(-1, keepdim=True)",
        "r0 = p.gather(-1, t.clamp(min=0)[..., None]).mean() + F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1))",
    ),
    "less the logarithm of the mean of the exponentials": (
        "z = F.linear(h, w)",
        "p = z - z.exp().mean(-1, keepdim=True).log()",
        "r0 = p.gather(-1, t.clamp(min=0)[..., None]).mean() + F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1))",
    ),
    "less the logarithm of the sum of doubled exponentials": (
        "z = F.linear(h, w)",
        "p = z - (2 * z.exp()).sum(-1, keepdim=True).log()",
        "r0 = p.gather(-1, t.clamp(min=0)[..., None]).mean() + F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1))",
    ),
    "a number behind a factor for each row, capped by a root": (
        "z = F.linear(h, w)",
        "z = torch.linspace(0.5, 1.5, z[..., 0].numel(), dtype=z.dtype).view(z.shape[:-1])[..., None] * z + 1.0",
        "z = z / (1 + 0.1 * z.square()).sqrt()",
        "r0 = F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1))",
    ),
    "a bias with a gradient on detached logits": (
        "z = F.linear(h, w).detach() + b",
        "r0 = F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1))",
    ),
    "a bias with a gradient added to detached logits in place": (
        "z = F.linear(h, w).detach()",
        "z += b",
        "r0 = F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1))",
    ),
    "a bias with a gradient added in place to logits that have none": (
        "with torch.no_grad(): z = F.linear(h, w)",
        "z += b",
        "r0 = F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1))",
    ),
    "logits edited in place, returned with a view of them": (
        "z = F.linear(h, w)",
        "z = z.mul_(0.5)",
        "r0 = z[-1]",
        "r1 = z",
        "r2 = F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1))",
    ),
    "logits edited in place, returned with a view of them, without a loss": (
        "z = F.linear(h, w).mul_(0.5)",
        "y = z[:1].mul_(3.0)",
        "z.sub_(0.25)",
        "r0 = y[0]",
        "r1 = z",
    ),
    "one number added to all logits": (
        "z = temperature - 0.5 * F.linear(h, w)",
        "z = (z + temperature.view(1, 1)) * temperature.exp().view(1, 1, 1)",
        "r0 = F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1)) + z.logsumexp(-1).square().mean()",
        "r1 = z[-1]",
    ),
    "one number added to all logits, of which some classes are taken": (
        "z = torch.tanh((F.linear(h, w) + temperature) / 5) * 5",
        "r0 = z[..., : z.shape[-1] - 1].logsumexp(-1).mean()",
        "r1 = F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1), label_smoothing=0.1)",
        "r2 = (z > z.gather(-1, t.clamp(min=0)[..., None])).sum(-1)",
    ),
    "a temperature with a gradient on detached logits": (
        "z = F.linear(h, w).detach() * temperature",
        "r0 = F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1))",
    ),
    "a number added, smoothed with class weights": (
        "z = F.linear(h, w) + 1.5",
        "r0 = F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1), class_weight, label_smoothing=0.2)",
    ),
    "masked columns and ignored targets": (
        "z = F.linear(h, w).masked_fill(pad, float('-inf'))",
        "r0 = F.cross_entropy(z.view(-1, z.shape[-1]), F.pad(t, (0, 1), value=-100)[..., 1:].reshape(-1))",
    ),
    "masked columns of negated logits": (
        "z = (-F.linear(h, w)).masked_fill(pad, -1e4)",
        "r0 = F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1))",
    ),
    "one reduction ignores a class, another does not": (
        "z = F.linear(h, w)",
        "s = t.clamp(min=0)",
        "r0 = F.cross_entropy(z.view(-1, z.shape[-1]), s.view(-1), ignore_index=1)",
        "r1 = z.log_softmax(-1).gather(-1, s.unsqueeze(-1)).squeeze(-1)",
    ),
    "logits with columns filled in place, returned": (
        "z = F.linear(h, w)",
        "z[..., 3:] = -1e4",
        "r0 = F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1))",
        "r1 = z.clone()",
    ),
    "log-probabilities over two vocabularies, returned": (
        "z = torch.cat([F.linear(h, w), F.linear(h, few)], dim=-1)",
        "r0 = z.log_softmax(2)",
        "r1 = -z.log_softmax(-1).gather(-1, t.clamp(min=0)[..., None]).mean()",
    ),
    "negated log-probabilities over two vocabularies": (
        "z = torch.cat([F.linear(h, w), F.linear(h, few)], dim=-1)",
        "p = -F.log_softmax(z, dim=-1)",
        "r0 = p.gather(-1, t.clamp(min=0)[..., None]).mean() + p.sum(-1).mean()",
    ),
    "the only row over two vocabularies, stacked": (
        "z = torch.cat([F.linear(h, w), F.linear(h, few)], dim=-1)[:1]",
        "z = torch.stack(z.unbind(0))",
        "r0 = F.cross_entropy(z.view(-1, z.shape[-1]), t[:1].view(-1))",
    ),
    "one of two heads, detached": (
        "z = torch.stack([F.linear(h, w), F.linear(h, w2)]).detach()[0]",
        "r0 = F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1))",
    ),
    "shifted rows put together in another order": (
        "y = F.linear(h, w).view(-1, w.shape[0]) + torch.arange(t.numel())[:, None] * 1.0",
        "y = torch.cat([y[1:], y[:1]])",
        "r0 = F.cross_entropy(y, t.view(-1))",
        "r1 = y.logsumexp(-1)",
    ),
    "half a log-sum-exp subtracted": (
        "z = F.linear(h, w)",
        "r0 = -torch.sub(z, z.logsumexp(-1, keepdim=True), alpha=0.5).gather(-1, t.clamp(min=0)[..., None]).mean()",
    ),
    "subtracted from a bias": (
        "z = torch.sub(b, F.linear(h, w), alpha=0.5)",
        "r0 = F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1))",
    ),
    "a one-hot tensor written into": (
        "z = F.linear(h, w)",
        "q = F.one_hot(t.clamp(min=0), z.shape[-1]).to(z.dtype)",
        "q[..., 1:3] = 0.25",
        "r0 = -(z.log_softmax(-1) * q).sum(-1).mean()",
    ),
    "targets written into after they were made one-hot": (
        "z = F.linear(h, w)",
        "s = t.clamp(min=0)",
        "q = F.one_hot(s, z.shape[-1]).to(z.dtype)",
        "s.zero_()",
        "r0 = -(z.log_softmax(-1) * q).sum(-1).mean()",
    ),
    "a mixture of a narrower dtype": (
        "z = F.linear(h, w)",
        "s = t.clamp(min=0)",
        "q = 0.6 * F.one_hot(s, z.shape[-1]) + 0.4 * F.one_hot(s.flip(0), z.shape[-1])",
        "r0 = -(z.log_softmax(-1) * q).sum(-1).mean()",
    ),
    "targets made after the first loss": (
        "z = F.linear(h, w)",
        "r0 = F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1), reduction='sum')",
        "s = t.roll(1, -1) * 1",
        "r1 = F.cross_entropy(z.view(-1, z.shape[-1]), s.view(-1), reduction='none')",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    for seed in range(5):  # with and without ignored targets and spare columns
        draft = Draft(Choices(seed, torch.float64))
        draft.write(*FOUND[name])
        draft.results = [line[:2] for line in FOUND[name] if line.startswith("r")]
        result = outcome(draft.program())
        assert result is None or not result.wrong, result.wrong


@pytest.mark.parametrize("first", [0, pytest.param(60, marks=pytest.mark.slow)])
def test_random_programs(first):
    tally = check(range(first, first + 60))
    assert tally.fused >= 0.3 * tally.programs > 9


def test_what_fuses_alone_fuses_together():
    """The trace is an algebra: programs of what it has a rule for fuse whole, but for few pairs without a form."""
    tally = check(range(500, 550), only=fusing())
    assert tally.fused >= 0.8 * tally.programs > 28


def test_random_programs_outside_the_graph_of_the_head():
    """With those that read the logits in the end; tests/test_outside.py is of those that need not."""
    tally = check(range(700, 760), apart=True)
    assert tally.fused >= 0.25 * tally.programs > 10


def test_dynamic_shapes():
    check(range(400, 414), dynamic=True)


@pytest.mark.slow
def test_the_coverage_table_is_current():
    """`make coverage` writes it."""
    now = {(one.part, one.name) for one in spellings() if one.result == FUSED}
    assert now == fusing()


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 4000, 500))
def test_thousands_of_random_programs(first):
    check(range(first, first + 500))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(5000, 6000, 500))
def test_a_thousand_random_programs_outside_the_graph_of_the_head(first):
    check(range(first, first + 500), apart=True)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_thousands_of_programs_of_what_fuses(dtype, dynamic):
    check(range(4000, 4500), dtype, dynamic, only=fusing())
