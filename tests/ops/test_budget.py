"""The bound that the forward leaves, and the contract of a backward under a budget, block by block."""

import pytest
import torch
from head_oracle import Head, error, logits
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cce_inductor.ops import filtered, reference
from cce_inductor.ops.bound import BLOCK, LAST, ROW_CAP, beyond, blocks, edges, encode, values
from cce_inductor.ops.call import Attributes, Call
from cce_inductor.ops.filters import Filter
from cce_inductor.ops.library import BACKWARD, FORWARD

NAMES = "lse target_logit"


@pytest.mark.parametrize("text", ["exact", "budget 0.001953125", "unbiased 0.01", "eps 0.0002", "eps 0.0002 sorted"])
def test_filters_are_their_text(text):
    assert str(Filter.read(text)) == text


@pytest.mark.parametrize(
    "text", ["", "budget", "budget 0", "budget 1.5", "budget nan", "exact 0.1", "tau 0.1", "sorted"]
)
def test_unknown_filters_are_errors(text):
    with pytest.raises(ValueError, match="grad_filter"):
        Filter.read(text)


def test_a_code_stands_for_at_least_its_mass_and_little_more():
    mass = torch.cat([torch.logspace(-10, 2.1, 5000), torch.tensor([0.0, 128.0, 1e-30])])
    value = values(mass.device)[encode(mass).long()]
    assert (value >= mass.double()).all()
    large = mass > 1e-9
    assert (value[large] <= mass[large] * 1.13).all()
    assert encode(torch.tensor([torch.nan, torch.inf, 1e9])).tolist() == [LAST] * 3


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_least_columns_are_dropped_while_they_fit(step):
    # Codes of 2^-1, 2^-2, 2^-2, 2^-3 and "any", from the least: 1/8, then 3/8, then 5/8, then 9/8.
    codes = torch.tensor([[205, 199, 199, 193, 255]] * 6, dtype=torch.uint8)
    value = values(codes.device)
    assert [value[c].item() for c in (205, 199, 193)] == pytest.approx([2**-1.0833, 2**-2.0833, 2**-3.0833], rel=1e-4)
    unit = value[193].item()
    allowed = torch.tensor([0.9, 1.1, 3.1, 5.1, 9.1, torch.nan], dtype=torch.float64) * unit
    expected = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 1], [1, 0, 1, 0, 1], [1, 0, 0, 0, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
    assert kept(codes, allowed, step).int().tolist() == expected
    assert kept(codes[:1], torch.tensor([torch.inf]).double(), step).int().tolist() == [[0, 0, 0, 0, 1]]
    assert not kept(codes[:1, :4], torch.tensor([torch.inf]).double(), step).any()


def kept(codes: torch.Tensor, allowed: torch.Tensor, step: int) -> torch.Tensor:
    """Which columns each block keeps, (blocks, V) bool."""
    edge, start = edges(codes, allowed, step)
    return beyond(codes, torch.arange(codes.shape[1]), edge[:, None], start[:, None])


def kept_columns(call: Call, g: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
    """Which columns the blocks of active rows compute for sure, (blocks, V) bool; g: the tangent of lse."""
    named = dict(zip([*call.statistics.split(), "bound"], saved, strict=True))
    chosen = filtered.select(filtered.Operands(call), {"lse": g}, named, 50, 70)
    every = slice(0, call.weight.shape[0])
    return torch.stack([chosen.certain(b, every) for b in range(chosen.edge.shape[0])])


def make(kind: str, n: int, v: int, seed: int) -> Head:
    """Heads of every temper."""
    head = Head.make(n, 16, v, bias=True, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if kind == "peaked":
        head.w *= 6
    elif kind == "flat":
        head.w *= 0.01
        head.bias *= 0
    elif kind == "late giant":  # the running log-sum-exp learns of it last
        head.bias[-1] = 30.0
    elif kind == "ties":
        head.w[:] = head.w[0]
        head.bias[:] = 0
    elif kind == "masked columns":
        head.bias[torch.rand(v, generator=generator) < 0.5] = -torch.inf
        head.bias[head.target] = 0.0
    elif kind == "confident":
        head.x = head.w[head.target] * 4
    elif kind == "steep":
        head.bias = torch.linspace(0, 25, v)
    return head


KINDS = ["random", "peaked", "flat", "late giant", "ties", "masked columns", "confident", "steep"]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 300),
    v=st.integers(2, 400),
    tau=st.sampled_from([2**-9, 1e-2, 0.1]),
    weighting=st.sampled_from(["mean", "signed", "one heavy row", "some rows"]),
    slab=st.integers(7, 120),
    seed=st.integers(0, 1000),
)
def test_contract_holds_in_every_block(kind, n, v, tau, weighting, slab, seed):
    """Against float64: each block drops at most tau of its dense gradient, each row at most its cap of its own."""
    head = make(kind, n, v, seed)
    generator = torch.Generator().manual_seed(seed)
    g = torch.full((n,), 1 / n)
    if weighting == "signed":
        g = torch.randn(n, generator=generator)
    elif weighting == "one heavy row":
        g[n // 2] *= 100
    active = torch.rand(n, generator=generator) < 0.6 if weighting == "some rows" else None
    assume(active is None or active.any())
    attributes = Attributes(grad_filter=f"budget {tau!r}")
    call = Call(
        {"input": head.x, "weight": head.w, "bias": head.bias, "target": head.target}, active, NAMES, attributes
    )
    before = reference.SLAB_COLUMNS
    reference.SLAB_COLUMNS = slab  # the running log-sum-exp, and with it the bound, depends on the slabs
    try:
        saved = filtered.forward(call)
    finally:
        reference.SLAB_COLUMNS = before
    bound, keep = saved[-1], kept_columns(call, g, saved)
    z = logits(head.x.double(), head.w.double(), head.bias.double())
    p = z.softmax(1).scatter(1, head.target[:, None], 0)
    rows = torch.arange(n) if active is None else active.nonzero()[:, 0]
    value = values(bound.device)[bound.long()]
    for b in range(blocks(len(rows))):
        own = rows[b * BLOCK : (b + 1) * BLOCK]
        assert (value[b] >= p[own].sum(0)).all(), "the bound is below the mass"
        weight = g[own].double().abs()
        dropped = p[own] * ~keep[b]
        assert (weight @ dropped).sum() <= tau * (weight @ p[own]).sum() * (1 + 1e-5) + 1e-12
        assert (dropped.sum(1) <= ROW_CAP * tau * p[own].sum(1) + 1e-5).all()
        assert keep[b, head.target[own]].all()
    if kind == "flat":
        assert keep[: blocks(len(rows))].float().mean() > 1 - 2 * tau or v < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_kept_columns(dtype, masked, small_tiles):
    """The operators, through autograd, against float64 with the same columns left out; and how far exact is away."""
    head = Head.make(300, 16, 400, dtype, bias=True)
    head.w *= 3
    active = torch.arange(300) % 3 != 1 if masked else None
    tau = 1e-2
    attributes = Attributes(grad_filter=f"budget {tau}").args()
    leaves = [t.detach().requires_grad_() for t in (head.x, head.w, head.bias)]
    operands, names = [*leaves, head.target], "input weight bias target"
    lse, target_logit, bound = FORWARD(operands, names, active, NAMES, True, *attributes)
    assert bound.shape == (3, 400) and bound.dtype == torch.uint8 and not bound.requires_grad
    assert len(FORWARD(operands, names, active, NAMES, False, *attributes)) == 2
    g = torch.rand(300)
    ours = torch.autograd.grad(((lse - target_logit) * g).sum(), leaves)
    call = Call(dict(zip(names.split(), operands, strict=True)), active, NAMES, Attributes(*attributes))
    keep = kept_columns(call, g, [lse.detach(), target_logit.detach(), bound])
    rows = torch.arange(300) if active is None else active.nonzero()[:, 0]
    exact = head.to(torch.float64)
    p = logits(exact.x, exact.w, exact.bias).softmax(1)
    dacc = torch.zeros_like(p)
    block = torch.arange(len(rows)) // BLOCK
    dacc[rows] = p[rows] * keep[block] * g[rows, None]
    dacc[rows, head.target[rows]] -= g[rows]
    expected = [dacc @ exact.w, dacc.T @ exact.x, dacc.sum(0)]
    assert 0.2 < keep[block].float().mean() < 0.99
    for one, want in zip(ours, expected, strict=True):
        assert error(one, want) < 8 * torch.finfo(dtype).eps


def test_dense_statistics_stay_exact():
    """What the budget is not proved for leaves no bound, and drops nothing."""
    head = Head.make(200, 16, 300)
    operands, names = [head.x, head.w, head.target], "input weight target"
    every = "lse target_logit entropy"
    budget, exact = Attributes(grad_filter="budget 0.1").args(), Attributes().args()
    out = FORWARD(operands, names, None, every, True, *budget)
    assert len(out) == 3
    tangents = [torch.rand(200) for _ in range(3)]
    grads = [
        BACKWARD(tangents, every, out, operands, names, None, every, "input weight", *attributes)
        for attributes in (budget, exact)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_opcheck_with_a_bound():
    head = Head.make(9, 5, 40)
    x, w = head.x.requires_grad_(), head.w.requires_grad_()
    arguments = [x, w, head.target], "input weight target", None, NAMES
    attributes = Attributes(grad_filter="budget 0.01").args()
    torch.library.opcheck(FORWARD, (*arguments, True, *attributes))
    saved = [t.detach() for t in FORWARD(*arguments, True, *attributes)]
    tangents = [torch.rand(9), torch.rand(9)]
    operands = [x.detach(), w.detach(), head.target]
    torch.library.opcheck(BACKWARD, (tangents, NAMES, saved, operands, *arguments[1:], "input weight", *attributes))
