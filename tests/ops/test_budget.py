"""The bound that the forward leaves, and the contract of a backward under a budget, block by block."""

import pytest
import torch
import torch.nn.functional as F
from head_oracle import Head, error, logits
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cce_inductor.filters import Filter
from cce_inductor.ops import filtered, reference
from cce_inductor.ops.bound import BLOCK, LAST, ROW_CAP, beyond, blocks, bound_bytes, edges, encode, group, values
from cce_inductor.ops.call import Attributes, Call, bounded, sampled
from cce_inductor.ops.library import BACKWARD, FORWARD

NAMES = "lse target_logit"


@pytest.mark.parametrize(
    "text", ["exact", "budget 0.001953125", "unbiased 0.01", "eps 0.0002", "eps 0.0002 sorted", "budget 0.01 by 4"]
)
def test_filters_are_their_text(text):
    assert str(Filter.read(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "budget", "budget 0", "budget 1.5", "budget nan", "exact 0.1", "tau 0.1", "eps 0.1 by 2", "budget 0.1 by 3"],
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
    elif kind == "NaN row":
        head.x[n // 2, 3] = torch.nan
    return head


KINDS = ["random", "peaked", "flat", "late giant", "ties", "masked columns", "confident", "steep", "NaN row"]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 300),
    v=st.integers(2, 400),
    tau=st.sampled_from([2**-9, 1e-2, 0.1]),
    weighting=st.sampled_from(["mean", "signed", "one heavy row", "some rows", "zero", "one NaN"]),
    group=st.sampled_from([1, 1, 2, 4, 8]),
    slab=st.integers(7, 120),
    seed=st.integers(0, 1000),
)
def test_contract_holds_in_every_block(kind, n, v, tau, weighting, group, slab, seed):
    """Against float64: each block drops at most tau of its dense gradient, each row at most its cap of its own."""
    head = make(kind, n, v, seed)
    generator = torch.Generator().manual_seed(seed)
    g = torch.full((n,), 1 / n)
    if weighting == "signed":
        g = torch.randn(n, generator=generator)
    elif weighting == "one heavy row":
        g[n // 2] *= 100
    elif weighting == "zero":
        g *= 0
    elif weighting == "one NaN":
        g[n // 3] = torch.nan
    row_mask = torch.rand(n, generator=generator) < 0.6 if weighting == "some rows" else None
    assume(row_mask is None or row_mask.any())
    attributes = Attributes(grad_filter=str(Filter("budget", tau, group=group)))
    call = Call(
        {"input": head.x, "weight": head.w, "bias": head.bias, "target": head.target}, row_mask, NAMES, attributes
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
    rows = torch.arange(n) if row_mask is None else row_mask.nonzero()[:, 0]
    value = values(bound.device)[bound.long()]
    for b in range(blocks(len(rows))):
        own = rows[b * BLOCK : (b + 1) * BLOCK]
        assert torch.equal(keep[b], in_groups(keep[b], group).any(1).repeat_interleave(group)[:v]), "half a group"
        assert not (value[b] < in_groups(p[own].sum(0), group).sum(1)).any(), "the bound is below the mass"
        if p[own].isnan().any() or g[own].isnan().any():
            assert keep[b].all(), "what is not a number is not dropped"
            continue
        weight = g[own].double().abs()
        dropped = p[own] * ~keep[b]
        assert (weight @ dropped).sum() <= tau * (weight @ p[own]).sum() * (1 + 1e-5) + 1e-12
        assert ((dropped.sum(1) <= ROW_CAP * tau * p[own].sum(1) + 1e-5) | (weight == 0)).all()
        assert keep[b, head.target[own]].all()
    if kind == "flat":
        assert keep[: blocks(len(rows))].float().mean() > 1 - 2 * tau or v < 20


def in_groups(vector: torch.Tensor, group: int) -> torch.Tensor:
    """(groups, group), with zeros behind the last column."""
    return F.pad(vector, (0, -len(vector) % group)).view(-1, group)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_kept_columns(dtype, masked, group, small_tiles):
    """The operators, through autograd, against float64 with the same columns left out; and how far exact is away."""
    head = Head.make(300, 16, 400, dtype, bias=True)
    head.w *= 3
    row_mask = torch.arange(300) % 3 != 1 if masked else None
    attributes = Attributes(grad_filter=str(Filter("budget", 1e-2, group=group))).args()
    leaves = [t.detach().requires_grad_() for t in (head.x, head.w, head.bias)]
    operands, names = [*leaves, head.target], "input weight bias target"
    lse, target_logit, bound = FORWARD(operands, names, row_mask, NAMES, True, *attributes)
    assert bound.shape == (3, 400 // group) and bound.dtype == torch.uint8 and not bound.requires_grad
    assert len(FORWARD(operands, names, row_mask, NAMES, False, *attributes)) == 2
    g = torch.rand(300)
    ours = torch.autograd.grad(((lse - target_logit) * g).sum(), leaves)
    call = Call(dict(zip(names.split(), operands, strict=True)), row_mask, NAMES, Attributes(*attributes))
    keep = kept_columns(call, g, [lse.detach(), target_logit.detach(), bound])
    rows = torch.arange(300) if row_mask is None else row_mask.nonzero()[:, 0]
    exact = head.to(torch.float64)
    p = logits(exact.x, exact.w, exact.bias).softmax(1)
    dlogits = torch.zeros_like(p)
    block = torch.arange(len(rows)) // BLOCK
    dlogits[rows] = p[rows] * keep[block] * g[rows, None]
    dlogits[rows, head.target[rows]] -= g[rows]
    expected = [dlogits @ exact.w, dlogits.T @ exact.x, dlogits.sum(0)]
    assert 0.2 < keep[block].float().mean() < 0.99
    for one, want in zip(ours, expected, strict=True):
        assert error(one, want) < 8 * torch.finfo(dtype).eps


def test_a_row_that_would_lose_too_much_has_its_block_done_in_full():
    """Row 0 alone has mass in columns 10 to 109, of which the block as a whole could do without a fifth or more."""
    z = torch.full((128, 110), -50.0)
    z[0, 10:], z[1:, :10] = torch.linspace(0, 1, 100), 0.0
    target = torch.full((128,), 109)
    target[0] = 0
    x, w = torch.eye(128), z.T.contiguous()
    for kind in ("budget", "unbiased"):
        operands = {"input": x, "weight": w, "target": target, "seed": torch.tensor([3])}
        call = Call(operands, None, NAMES, Attributes(grad_filter=f"{kind} {2**-9!r}"))
        saved = filtered.forward(call)
        g = torch.ones(128)
        assert kept_columns(call, g, saved).all()
        g[0] = 0.0  # it has no gradient to lose
        assert 20 < (~kept_columns(call, g, saved)).sum() < 50


@pytest.mark.parametrize("kind", ["budget", "unbiased", "eps"])
@pytest.mark.parametrize("names,softcap", [("lse target_logit entropy", 0.0), ("lse target_logit logit_sum", 5.0)])
def test_what_no_bound_is_proved_for_stays_exact(kind, names, softcap):
    head = Head.make(200, 16, 300)
    operands, operand_names = [head.x, head.w, head.target], "input weight target"
    filter, exact = Attributes(softcap=softcap, grad_filter=f"{kind} 0.1"), Attributes(softcap=softcap)
    assert not bounded(names, filter) and not sampled(names, filter)
    out = FORWARD(operands, operand_names, None, names, True, *filter.args())
    assert len(out) == 3
    tangents = [torch.rand(200) for _ in range(3)]
    grads = [
        BACKWARD(tangents, names, out, operands, operand_names, None, names, "input weight", *attributes.args())
        for attributes in (filter, exact)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "names,softcap,bound,seed",
    [
        ("lse", 0.0, True, True),
        ("lse target_logit argmax", 5.0, True, True),
        ("lse target_logit logit_sum", 0.0, True, True),
        ("lse target_logit logit_sum", 5.0, False, False),
        ("lse entropy", 0.0, False, False),
        ("target_logit", 0.0, False, False),
    ],
)
def test_which_calls_leave_a_bound(names, softcap, bound, seed):
    for text, expected in {"exact": False, "budget 0.1": bound, "unbiased 0.1": bound, "eps 0.1": False}.items():
        attributes = Attributes(softcap=softcap, grad_filter=text)
        assert bounded(names, attributes) == expected
        assert sampled(names, attributes) == (seed and text == "unbiased 0.1")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sums_of_logits_are_exact_beside_a_budget(dtype, masked, weighted, small_tiles):
    """Label smoothing: columns are left out of the softmax's part of the gradient, and of no other."""
    head = Head.make(300, 16, 400, dtype, bias=True)
    head.w *= 3
    n, v = 300, 400
    row_mask = torch.arange(n) % 3 != 1 if masked else None
    column_weight = torch.rand(v) if weighted else None
    given = {"input": head.x, "weight": head.w, "bias": head.bias, "target": head.target}
    given |= {"column_weight": column_weight} if weighted else {}
    names, attributes = "lse target_logit logit_sum", Attributes(scale=0.7, grad_filter="budget 0.01")
    call = Call(given, row_mask, names, attributes)
    out = FORWARD(list(given.values()), " ".join(given), row_mask, names, True, *attributes.args())
    tangents = dict(zip(names.split(), torch.randn(3, n, dtype=out[0].dtype), strict=True))
    ours = BACKWARD(
        list(tangents.values()), names, out, list(given.values()), " ".join(given), row_mask, names,
        "input weight bias", *attributes.args(),
    )  # fmt: skip
    keep = kept_columns(call, tangents["lse"], out)
    assert 0.1 < keep.float().mean() < 0.95
    rows = torch.arange(n) if row_mask is None else row_mask.nonzero()[:, 0]
    exact = head.to(torch.float64)
    p = logits(exact.x, exact.w, exact.bias, scale=0.7).softmax(1)
    g, h, s = (t.double() for t in tangents.values())
    dlogits = torch.zeros_like(p)
    dlogits[rows] = p[rows] * keep[torch.arange(len(rows)) // BLOCK] * g[rows, None]
    dlogits[rows, head.target[rows]] += h[rows]
    dlogits[rows] += s[rows, None] * (torch.ones(v) if column_weight is None else column_weight).double()
    dlogits *= 0.7
    for one, want in zip(ours, [dlogits @ exact.w, dlogits.T @ exact.x, dlogits.sum(0)], strict=True):
        assert error(one, want) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "rows,vocab,workspace,expected",
    [
        (8192, 256_000, 64 << 20, 1),
        (32768, 131_072, 64 << 20, 1),  # 256 blocks of 128 KiB are exactly half
        (32769, 131_072, 64 << 20, 2),
        (65536, 256_000, 64 << 20, 4),
        (1 << 20, 256_000, 64 << 20, 8),  # 250 MiB still: no more than 8 share one
        (1 << 20, 49, 1 << 10, 4),
    ],
)
def test_large_bounds_are_grouped(rows, vocab, workspace, expected):
    assert group(rows, vocab, workspace, "cpu") == expected
    assert group(rows, vocab, workspace, "cuda") == 1
    columns = bound_bytes(rows, vocab, workspace) // blocks(rows)
    assert columns == -(-vocab // expected) and -(-vocab // columns) == expected


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_step_groups_where_the_number_of_rows_is_known(dynamic, monkeypatch):
    """The shape of a bound is that of the graph, whoever runs it: with symbolic rows nothing is grouped."""
    torch._dynamo.reset()
    head, workspace = Head.make(300, 16, 400), 2000
    seen = []
    forward = filtered.forward
    monkeypatch.setattr(filtered, "forward", lambda call: seen.append(out := forward(call)) or out)

    def step(x, w, target):
        lse, target_logit = FORWARD(
            [x, w, target], "input weight target", None, NAMES, False, *Attributes(
                grad_filter="budget 0.1", workspace=workspace
            ).args(),
        )  # fmt: skip
        return (lse - target_logit).mean()

    x, w = head.x.requires_grad_(), head.w.requires_grad_()
    torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)(x, w, head.target).backward()
    step(x, w, head.target).backward()
    assert [out[-1].shape for out in seen] == [(3, 400 if dynamic else 200), (3, 200)]


@pytest.mark.parametrize("kind", ["budget", "unbiased", "eps"])
def test_opcheck_under_a_filter(kind):
    head = Head.make(9, 5, 40)
    x, w = head.x.requires_grad_(), head.w.requires_grad_()
    operands, names = [x, w, head.target, torch.tensor([5])], "input weight target seed"
    attributes = Attributes(grad_filter=f"{kind} 0.01").args()
    torch.library.opcheck(FORWARD, (operands, names, None, NAMES, True, *attributes))
    saved = [t.detach() for t in FORWARD(operands, names, None, NAMES, True, *attributes)]
    tangents = [torch.rand(9), torch.rand(9)]
    arguments = [t.detach() for t in operands], names, None, NAMES, "input weight"
    torch.library.opcheck(BACKWARD, (tangents, NAMES, saved, *arguments, *attributes))
