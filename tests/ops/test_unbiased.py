"""The unbiased filter: a sample of the columns that a budget would drop, reproducible from its seed.

What it takes is worked out again here, from the bound on, in plain Python and numpy.
"""

import math

import numpy as np
import pytest
import torch
from head_oracle import Head, error, min_cut
from torch.utils.checkpoint import checkpoint

import cce_inductor
from cce_inductor import config
from cce_inductor.filters import Filter
from cce_inductor.ops import filtered
from cce_inductor.ops.bound import BLOCK, LAST, THRESHOLDS, WEIGHT_CAP, hashed, values
from cce_inductor.ops.call import Attributes, Call
from cce_inductor.ops.library import BACKWARD, FORWARD

TAU = 0.05
NAMES = "lse target_logit"
V = 403
SEEDS = [0, 7, -5, (1 << 40) + 12345]  # of which the low 32 bits count


def numpy_hash(seed: int, block: int, columns: int) -> np.ndarray:
    """(columns,) uint32."""

    def mix(h: np.ndarray) -> np.ndarray:
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
        h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
        return h ^ (h >> np.uint32(16))

    with np.errstate(over="ignore"):
        start = np.array([seed % 2**32], np.uint32) ^ np.array([block], np.uint32) * np.uint32(0x9E3779B9)
        return mix(mix(start) ^ np.arange(columns, dtype=np.uint32) * np.uint32(0x85EBCA6B))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("block", [0, 1, 77_777])
def test_hash(seed, block):
    columns = 300_000
    found = hashed(torch.tensor([seed]), block, torch.arange(columns))
    assert np.array_equal(found.numpy(), numpy_hash(seed, block, columns).astype(np.int64))
    assert abs((found < 2**28).float().mean().item() - 1 / 16) < 5 * math.sqrt(1 / 16 / columns)


def test_probabilities_follow_the_bounds_and_weights_are_capped():
    value = values(torch.device("cpu"))
    for below, threshold in enumerate(THRESHOLDS):
        probability = max((value[100 - below] / value[100]).item(), 1 / WEIGHT_CAP)
        assert probability <= threshold / 2**24 * (1 + 1e-12) and threshold - probability * 2**24 < 1 + 1e-6
    assert min(THRESHOLDS) == THRESHOLDS[-1] == 2**24 // WEIGHT_CAP and THRESHOLDS[0] == 2**24


def thresholds_by_contract(call: Call, saved: list[torch.Tensor], g: torch.Tensor) -> np.ndarray:
    """(blocks of active rows, V): the 24-bit threshold of every column; 2^24 for what is taken for sure."""
    lse, target_logit, bound = (t.double().numpy() if t.is_floating_point() else t.numpy() for t in saved)
    rows = np.arange(len(lse)) if call.row_mask is None else call.row_mask.nonzero()[:, 0].numpy()
    size, v = call.filter.group, call.weight.shape[0]
    value = [2 ** (c / 6 - 35.25) for c in range(255)] + [math.inf]
    result = []
    for b in range(0, len(rows), BLOCK):
        own = rows[b : b + BLOCK]
        weight = np.abs(g.double().numpy()[own])
        allowed = call.filter.value * (weight * -np.expm1(target_logit[own] - lse[own])).sum() / weight.max()
        codes = bound[b // BLOCK]
        total, edge = 0.0, LAST + 1
        for code, count in enumerate(np.bincount(codes, minlength=LAST + 1)):
            total += count * value[code] if count else 0.0
            if total > allowed:
                edge = code
                break
        targets = set((call.operands["target"].numpy()[own] // size).tolist())
        block = []
        for j, code in enumerate(codes.tolist()):
            if code >= edge or j in targets:
                block.append(2**24)
            else:
                ratio = value[code] / value[edge] if edge < LAST else 0.0
                block.append(math.ceil(max(ratio * (1 - 1e-12), 1 / WEIGHT_CAP) * 2**24))
        result.append(np.repeat(block, size)[:v])
    return np.stack(result)


def problem(group: int, masked: bool, seed: int = 0) -> tuple[Call, list[torch.Tensor], torch.Tensor]:
    """A call in float64, what its forward saves, and tangents of the log-sum-exps."""
    head = Head.make(300, 8, V, torch.float64, bias=True)
    head.bias = torch.linspace(-8, 0, V, dtype=torch.float64)  # neighbours are alike, so that a group can be small
    head.target %= 30  # or every group would be the target of some row
    row_mask = torch.arange(300) % 3 != 1 if masked else None
    operands = {"input": head.x, "weight": head.w, "bias": head.bias, "target": head.target}
    operands["seed"] = torch.tensor([seed])
    attributes = Attributes(grad_filter=str(Filter("unbiased", TAU, group=group)))
    call = Call(operands, row_mask, NAMES, attributes)
    g = torch.rand(300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return call, filtered.forward(call), g


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_columns_and_weights(group, masked, seed):
    """Column by column: what is kept with weight 1, what the hash takes, and what that weighs."""
    call, saved, g = problem(group, masked, seed)
    threshold = thresholds_by_contract(call, saved, g)
    named = dict(zip([*NAMES.split(), "bound"], saved, strict=True))
    chosen = filtered.select(filtered.Operands(call), {"lse": g}, named, 50, 70)
    for b in range(len(threshold)):
        own = np.repeat(numpy_hash(seed, b, -(-V // group)), group)[:V]
        taken = (own >> 8) < threshold[b]
        columns, weights = zip(*(chosen.columns(b, slice(i, min(i + 37, V))) for i in range(0, V, 37)), strict=True)
        assert np.array_equal(torch.cat(columns).numpy(), taken.nonzero()[0])
        np.testing.assert_allclose(torch.cat(weights).numpy(), 2**24 / threshold[b][taken], rtol=1e-12)
        assert torch.cat(weights).min() >= 1 and torch.cat(weights).max() <= WEIGHT_CAP
        sure = threshold[b] == 2**24
        assert 0.1 < sure.mean() < 0.9 and sure.sum() < taken.sum() < V


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_the_mean_over_seeds_is_the_exact_gradient(group, masked):
    """Within the standard error that the probabilities give, which are of independent columns in each block."""
    call, saved, g = problem(group, masked)
    x, w, bias, target = (call.operands[name] for name in ("input", "weight", "bias", "target"))
    rows = torch.arange(300) if call.row_mask is None else call.row_mask.nonzero()[:, 0]
    excess = 2**24 / torch.from_numpy(thresholds_by_contract(call, saved, g)) - 1
    dense = torch.zeros(300, V, dtype=torch.float64)
    dense[rows] = ((x @ w.T + bias).softmax(1) * g[:, None])[rows]
    dlogits = dense.clone()
    dlogits[rows, target[rows]] -= g[rows]
    exact = {"dx": dlogits @ w, "dw": dlogits.T @ x, "db": dlogits.sum(0)}
    dense[rows, target[rows]] = 0
    # A group of columns is taken, or not, as one: its terms add up before they are squared.
    variance = {name: torch.zeros_like(t) for name, t in exact.items()}
    for b, own in enumerate(rows.split(BLOCK)):
        for j in range(0, V, group):
            part = slice(j, j + group)
            for name, where, term in (
                ("dx", own, dense[own, part] @ w[part]),
                ("dw", part, dense[own, part].T @ x[own]),
                ("db", part, dense[own, part].sum(0)),
            ):
                variance[name][where] += excess[b, j] * term**2

    times = 300
    mean = {name: torch.zeros_like(t) for name, t in exact.items()}
    for seed in range(times):
        operands = call.operands | {"seed": torch.tensor([seed])}
        grads = BACKWARD(
            [g, -g], NAMES, saved, list(operands.values()), " ".join(operands), call.row_mask, NAMES,
            "input weight bias", *call.attributes.args(),
        )  # fmt: skip
        for name, grad in zip(mean, grads, strict=True):
            mean[name] += grad / times
    for name, want in exact.items():
        squared, allowed = (mean[name] - want) ** 2, variance[name] / times
        assert (squared <= 36 * allowed + 1e-20).all(), f"{name}: more than 6 standard errors off"
        sampled = allowed > 1e-20
        assert 0.5 < (squared[sampled] / allowed[sampled]).mean() < 1.5, f"{name}: not as far off as a sample is"


def test_a_missing_or_unusable_seed_is_an_error():
    head = Head.make(9, 5, 40)
    attributes = Attributes(grad_filter="unbiased 0.01").args()
    operands, names = [head.x.requires_grad_(), head.w, head.target], "input weight target"
    with pytest.raises(RuntimeError, match="'unbiased 0.01' needs the operand seed"):
        FORWARD(operands, names, None, NAMES, False, *attributes)
    for seed in (torch.tensor(3), torch.tensor([3, 4]), torch.tensor([3.0]), torch.tensor([3], dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="seed must be one int64 of shape"):
            FORWARD([*operands, seed], names + " seed", None, NAMES, False, *attributes)
    with torch.no_grad():
        assert len(FORWARD(operands, names, None, NAMES, False, *attributes)) == 2


@pytest.mark.parametrize("text,drawn", [("unbiased 0.1", True), ("budget 0.1", False), ("exact", False)])
def test_nothing_is_drawn_where_it_is_not_needed(text, drawn):
    """The state of the random numbers is the user's: only a loss to be differentiated under this filter takes one."""
    head = Head.make(9, 5, 40)
    x = head.x.requires_grad_()

    def changed(**options) -> bool:
        before = torch.get_rng_state()
        direct(x, head.w, head.target, **options)
        return not torch.equal(before, torch.get_rng_state())

    with config.patch(grad_filter=text):
        assert changed() == drawn
        assert not changed(label_smoothing=0.1, softcap=5.0)
        with torch.no_grad():
            assert not changed()


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
