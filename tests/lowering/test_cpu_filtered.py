"""The C++ kernels of the forward that leaves a bound and of the backward under a filter, budget or unbiased.

What a backward computes is read off its dW: x has one more column for each block of 128 rows, 1 in that block's rows
and 0 elsewhere, where the weight is 0. There dW is the sum of the block's dlogits in each column: 0 for a column that
the block leaves out, and too long by its weight for one that it samples.

One kernel takes every shape, so each configuration is compiled once and serves all tests here.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.fx.experimental._config as symbolic
import torch.nn.functional as F
from head_oracle import Head, check_error_rule, error, logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators import LOSS, kernels
from test_budget import KINDS as EVERY_KIND
from test_budget import make
from test_memory import Allocations
from torch import Tensor

import cce_inductor
from cce_inductor import version
from cce_inductor.filters import Filter
from cce_inductor.lowering import cpu
from cce_inductor.lowering.register import register
from cce_inductor.ops import filtered, reference
from cce_inductor.ops.bound import BLOCK, ROW_CAP, blocks, values
from cce_inductor.ops.call import Attributes, Call
from cce_inductor.ops.library import BACKWARD, FORWARD

pytestmark = pytest.mark.xdist_group("filtered")  # one worker compiles for all

# Small enough that the check of every row is one: ROW_CAP * TAU < 1.
TAU = 0.005
BUDGET, UNBIASED = f"budget {TAU}", f"unbiased {TAU}"
# A row of NaN is among the extremes below: its mass compares with nothing.
KINDS = [kind for kind in EVERY_KIND if kind != "NaN row"]
# Columns of x that say which block a row is in: as many blocks as a call has here at most.
INDICATORS = 5


@functools.cache
def source() -> str:
    """Of the templates as they are now: a test may have edited them."""
    return version.hash_files(version.PACKAGE, version.templates_dir())


@dataclass(frozen=True)
class Configuration:
    """What kernels are compiled for: all that is no tensor, and the dtype."""

    dtype: torch.dtype = torch.float32
    grad_filter: str = BUDGET
    workspace: int = 64 << 20
    statistics: str = LOSS
    operands: str = "input weight bias target"
    needs: str = "input weight bias diagnostics"
    scale: float = 1.0
    softcap: float = 0.0
    softcap_form: str = "tanh"
    compute_dtype: torch.dtype | None = None

    def logits(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return logits(x, w, bias, self.scale, self.softcap or None, self.softcap_form)

    @property
    def unbiased(self) -> bool:
        return self.grad_filter.startswith("unbiased")

    @property
    def attributes(self) -> Attributes:
        return Attributes(
            scale=self.scale, softcap=self.softcap, softcap_form=self.softcap_form, compute_dtype=self.compute_dtype,
            grad_filter=self.grad_filter, workspace=self.workspace, version=source(),
        )  # fmt: skip

    @property
    def tangents(self) -> str:
        return " ".join(name for name in self.statistics.split() if name != "argmax")

    @property
    def names(self) -> str:
        return f"{self.operands} diagnostics" + " seed" * self.unbiased


FLOAT32 = Configuration()
# dW of bfloat16 is finished slab by slab, and a block that fails its check is found when others are rounded already.
SMALL = Configuration(torch.bfloat16, workspace=1 << 20)
SAMPLED, SAMPLED_SMALL = replace(FLOAT32, grad_filter=UNBIASED), replace(SMALL, grad_filter=UNBIASED)
CONFIGURATIONS = {
    "float32": FLOAT32,
    "bfloat16, 1 MiB": SMALL,
    "float32, unbiased": SAMPLED,
    "bfloat16, 1 MiB, unbiased": SAMPLED_SMALL,
}
# One of each dtype and of each filter; the others are slow tests.
OFTEN = ("float32", "bfloat16, 1 MiB, unbiased")
every_configuration = pytest.mark.parametrize(
    "configuration",
    [pytest.param(c, id=name, marks=() if name in OFTEN else pytest.mark.slow) for name, c in CONFIGURATIONS.items()],
)


@pytest.fixture(scope="module", autouse=True)
def shared_kernels():
    """Kernels stay from test to test, and sizes that happen to be equal are not taken for one.

    All are compiled from the same two functions, which is more often than Dynamo expects of one.
    """
    register()
    forget_kernels()
    with symbolic.patch(use_duck_shape=False), torch._dynamo.config.patch(recompile_limit=64):
        yield
    forget_kernels()


class Kernel:
    """A compiled function of one operator, which must be one kernel made of our templates, for every call."""

    def __init__(self, function: Callable):
        self.compiled, self.kernels = torch.compile(function, fullgraph=True, dynamic=True), 0

    def __call__(self, *arguments):
        before = kernels()
        out = self.compiled(*arguments)
        self.kernels += kernels() - before
        assert self.kernels == 1
        return out


def forward_of(configuration: Configuration) -> Callable:
    # A filter's kind and its number make no difference to what the forward leaves.
    arguments = replace(configuration.attributes, grad_filter=BUDGET).args()
    operands, statistics = f"{configuration.operands} diagnostics", configuration.statistics
    return lambda given, row_mask: FORWARD(given, operands, row_mask, statistics, True, *arguments)


def backward_of(configuration: Configuration, grad_filter: str | None = None) -> Callable:
    attributes = configuration.attributes
    arguments = (attributes if grad_filter is None else replace(attributes, grad_filter=grad_filter)).args()
    operands, names, needs = configuration.names, configuration.statistics, configuration.needs
    tangent_names = configuration.tangents
    return lambda tangents, saved, given, row_mask: BACKWARD(
        tangents, tangent_names, saved, given, operands, row_mask, names, needs, *arguments
    )


@functools.cache
def forward_kernel(configuration: Configuration) -> Kernel:
    return Kernel(forward_of(configuration))


@functools.cache
def backward_kernel(configuration: Configuration) -> Kernel:
    return Kernel(backward_of(configuration))


@dataclass
class Case:
    """A head whose x and w have the indicators of blocks; `row_mask`: always a mask, of which all may be true."""

    head: Head
    row_mask: Tensor
    column_weight: Tensor | None = None
    seed: int = 12345

    @staticmethod
    def of(head: Head, row_mask: Tensor | None = None, **more) -> "Case":
        n = head.x.shape[0]
        row_mask = torch.ones(n, dtype=torch.bool) if row_mask is None else row_mask
        rows = row_mask.nonzero()[:, 0]
        assert n > BLOCK and blocks(len(rows)) <= INDICATORS
        indicator = head.x.new_zeros(n, INDICATORS)
        indicator[rows, torch.arange(len(rows)) // BLOCK] = 1
        wide = head.w.new_zeros(head.w.shape[0], INDICATORS)
        x, w = torch.cat([head.x, indicator], 1), torch.cat([head.w, wide], 1)
        return Case(replace(head, x=x, w=w), row_mask, **more)

    @property
    def rows(self) -> Tensor:
        """The active rows, in order."""
        return self.row_mask.nonzero()[:, 0]

    @property
    def block(self) -> Tensor:
        """The block of each active row."""
        return torch.arange(int(self.row_mask.sum())) // BLOCK

    def operands(self, names: str) -> list[Tensor]:
        every = {
            "input": self.head.x, "weight": self.head.w, "bias": self.head.bias, "target": self.head.target,
            "column_weight": self.column_weight, "seed": torch.tensor([self.seed]), "diagnostics": torch.zeros(5),
        }  # fmt: skip
        return [every[name] for name in names.split()]

    def softmax(self, configuration: Configuration) -> Tensor:
        """(active rows, V) in float64, 0 at the rows' own targets: the dense gradient for tangents of 1."""
        wide = self.head.to(torch.float64)
        p = configuration.logits(wide.x, wide.w, wide.bias).softmax(1)[self.rows]
        return p.scatter(1, self.head.target[self.rows, None], 0) if "target" in configuration.operands else p


def saved_by(configuration: Configuration, case: Case) -> list[Tensor]:
    key = replace(configuration, grad_filter=BUDGET, needs="")
    return forward_kernel(key)(case.operands(f"{configuration.operands} diagnostics"), case.row_mask)


def gradients(configuration: Configuration, case: Case, tangents: list[Tensor], saved: list[Tensor]) -> dict:
    out = backward_kernel(configuration)(tangents, saved, case.operands(configuration.names), case.row_mask)
    return dict(zip(configuration.needs.split(), out, strict=True))


def eager_gradients(configuration: Configuration, case: Case, tangents, saved, grad_filter: str | None = None) -> dict:
    function = backward_of(configuration, grad_filter)
    needs = configuration.needs.split()
    return dict(zip(needs, function(tangents, saved, case.operands(configuration.names), case.row_mask), strict=True))


def loss_tangents(g: Tensor) -> list[Tensor]:
    """Those of sum_i g_i (lse_i - target_logit_i)."""
    return [g, -g]


def reference_weights(configuration: Configuration, case: Case, g: Tensor, saved: list[Tensor]) -> Tensor:
    """(blocks, V): the weight that the eager implementation gives each column, 0 where it leaves the column out."""
    operands = dict(zip(configuration.names.split(), case.operands(configuration.names), strict=True))
    call = Call(operands, case.row_mask, configuration.statistics, configuration.attributes)
    named = dict(zip([*configuration.statistics.split(), "bound"], saved, strict=True))
    chosen = filtered.select(filtered.Operands(call), {"lse": g}, named, 50, 700)
    v = case.head.w.shape[0]
    weight = torch.zeros(chosen.edge.shape[0], v, dtype=torch.float64)
    for b in range(weight.shape[0]):
        columns, factor = chosen.columns(b, slice(0, v))
        weight[b, columns] = 1.0 if factor is None else factor.double()
    return weight


def exact_gradients(configuration: Configuration, case: Case, tangents: list[Tensor], weight: Tensor | None) -> dict:
    """In float64 with all logits at hand, the dense part of lse's gradient weighed by block and column."""
    wide = case.head.to(torch.float64)
    leaves = {"input": wide.x, "weight": wide.w} | ({} if wide.bias is None else {"bias": wide.bias})
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    bias = leaves.get("bias")
    z = configuration.logits(leaves["input"], leaves["weight"], bias)
    named = dict(zip(configuration.tangents.split(), tangents, strict=True))
    rows = case.rows
    target = case.head.target[rows] if "target" in configuration.operands else None
    named = {name: t.double()[rows] for name, t in named.items()}
    part = z.detach()[rows].softmax(1) * named["lse"][:, None]
    if weight is not None:
        part = part * weight[case.block]
    if target is not None:
        part = part.scatter_add(1, target[:, None], named["target_logit"][:, None])
    if "logit_sum" in named:
        c = torch.ones(z.shape[1]) if case.column_weight is None else case.column_weight
        part = part + named["logit_sum"][:, None] * c.double()
    dz = torch.zeros_like(z).index_copy(0, rows, part)
    wanted = [name for name in leaves if name in configuration.needs.split()]
    found = torch.autograd.grad(z, [leaves[name] for name in wanted], dz)
    return dict(zip(wanted, found, strict=True))


def computed(case: Case, ours: dict) -> Tensor:
    """(blocks, V): the sum of dlogits over the rows of each block, as the kernel formed it; 0 for what it left out."""
    return ours["weight"][:, -INDICATORS:].t()[: blocks(len(case.rows))]


def check(name: str, configuration: Configuration, case: Case, tangents, saved=None, kept=(0.05, 0.8)) -> dict:
    """The kernel's gradients from the saved tensors under the error rule, the same twice, and its diagnostics.

    kept: between which shares of the columns the eager implementation computes; where it is more than 0.8 the kernel
    may compute everything.
    """
    saved = saved_by(configuration, case) if saved is None else saved
    ours, again = (gradients(configuration, case, tangents, saved) for _ in range(2))
    assert all(torch.equal(ours[key], again[key]) for key in ours), name
    weight = reference_weights(configuration, case, tangents[0], saved)
    share = (weight != 0).double().mean()
    assert kept[0] <= share <= kept[1], f"{name}: {share} kept"
    everything = share > 0.8 and ours["diagnostics"][0] == 1
    eager = eager_gradients(configuration, case, tangents, saved, "exact" if everything else None)
    exact = exact_gradients(configuration, case, tangents, None if everything else weight)
    numbers, expected = ours.pop("diagnostics"), eager.pop("diagnostics")
    check_error_rule(name, ours, eager, exact, configuration.compute_dtype or configuration.dtype)
    torch.testing.assert_close(numbers, expected, rtol=1e-3, atol=1e-5, msg=lambda text: f"{name}: {text}")
    for key, tensor in ours.items():
        leaf = {"input": case.head.x, "weight": case.head.w, "bias": case.head.bias}[key]
        assert (tensor.dtype, tensor.shape) == (leaf.dtype, leaf.shape)
    return ours


def peaked(n: int, d: int, v: int, dtype=torch.float32, seed: int = 0, factor: float = 5.0) -> Head:
    head = Head.make(n, d, v, dtype, bias=True, seed=seed)
    head.w *= factor * (16 / d) ** 0.5
    return head


def signed(n: int) -> Tensor:
    return (torch.rand(n, generator=torch.Generator().manual_seed(3)) - 0.4) / n


def two_thirds(n: int) -> Tensor:
    return torch.arange(n) % 3 != 1


# ---- the bound ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "configuration", [FLOAT32, pytest.param(SMALL, marks=pytest.mark.slow)], ids=["float32", "bfloat16, 1 MiB"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_never_below_the_mass(kind, configuration):
    """One split of the vocabulary (many rows) and several, in rounds (few)."""
    for n, v, row_mask in [
        (600, 1500, None),
        (400, 3000, two_thirds(400)),
        (200, 3, None),
        (131, 4000, two_thirds(131)),
    ]:
        case = Case.of(make(kind, n, v, seed=n).to(configuration.dtype), row_mask)
        lse, target_logit, bound = saved_by(configuration, case)
        p, value = case.softmax(configuration), values(bound.device)[bound.long()]
        assert bound.shape == (blocks(n), v) and (bound[blocks(len(case.rows)) :] == 0).all()
        for b in range(blocks(len(case.rows))):
            mass = p[case.block == b].sum(0)
            assert (value[b] >= mass).all(), f"{kind}, {n} rows: block {b}"
        wide = case.head.to(torch.float64)
        z = logits(wide.x, wide.w, wide.bias)[case.rows]
        assert error(lse[case.rows], z.logsumexp(1)) < 1e-6
        assert error(target_logit[case.rows], z.gather(1, case.head.target[case.rows, None])[:, 0]) < 1e-6
        assert not lse[~case.row_mask].any() and not target_logit[~case.row_mask].any()


def test_the_bound_is_little_above_the_mass(monkeypatch):
    """With one split: as the eager implementation's where its slabs are the kernel's tiles. With more: the first round
    knows one tile of each of `splits`, the last everything. Differences in steps of the code, 12 % each. (With AVX2,
    whose tiles have fewer rows, 0.101 for the first.)"""
    monkeypatch.setattr(reference, "SLAB_COLUMNS", 128)
    for n, most in ((600, 0.15), (140, 6.0)):
        head = peaked(n, 40, 3000)
        case = Case.of(head)
        operands = dict(zip(FLOAT32.names.split(), case.operands(FLOAT32.names), strict=True))
        eager = filtered.forward(Call(operands, None, LOSS, replace(FLOAT32.attributes, workspace=1 << 30)))[-1]
        bound = saved_by(FLOAT32, case)[-1]
        assert (bound.double() - eager.double()).mean() <= most, n


# ---- gradients from the same saved tensors --------------------------------------------------------------------------


@every_configuration
def test_gradients_are_those_of_the_kept_columns(configuration):
    """Rows in three blocks, of which the last is not full; targets that share a column; a softmax with few large p."""
    for n, d, v, row_mask in [(300, 40, 4000, None), (390, 33, 2500, two_thirds(390)), (257, 300, 1001, None)]:
        case = Case.of(peaked(n, d, v, configuration.dtype), row_mask)
        case.head.target[::5] = 7
        check(f"({n}, {d}, {v})", configuration, case, loss_tangents(torch.rand(n) / n))
        check(f"({n}, {d}, {v}), signed", configuration, case, loss_tangents(signed(n)))


def test_results_do_not_depend_on_the_number_of_threads():
    """Of up to as many columns as are worked on at a time on one thread."""
    case = Case.of(peaked(300, 40, 400))
    saved, tangents, before = saved_by(FLOAT32, case), loss_tangents(torch.rand(300)), torch.get_num_threads()
    assert (reference_weights(FLOAT32, case, tangents[0], saved) != 0).double().mean() < 0.85
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            kernel = backward_kernel(FLOAT32).compiled  # Dynamo compiles it anew for another number
            found.append(kernel(tangents, saved, case.operands(FLOAT32.names), case.row_mask))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


AUTOCAST = Configuration(
    torch.float32, workspace=1 << 20, compute_dtype=torch.bfloat16, scale=0.9, statistics="lse target_logit logit_sum",
    operands="input weight bias target column_weight", needs="weight bias diagnostics",
)  # fmt: skip
CAPPED = Configuration(
    torch.float16, statistics="lse target_logit argmax", operands="input weight target", needs="input diagnostics",
    scale=1.5, softcap=60.0,
)  # fmt: skip
ROOTED = Configuration(scale=1.5, softcap=150.0, softcap_form="rsqrt")


def transposed(case: Case) -> Case:
    """The same with a weight that lies column-major in memory, and an input of which every second column counts."""
    head = case.head
    x, w = head.x.repeat_interleave(2, 1)[:, ::2], head.w.t().contiguous().t()
    return replace(case, head=replace(head, x=x, w=w))


@pytest.mark.slow
def test_autocast_strided_operands_a_frozen_trunk_and_the_sum_of_logits():
    """The gradient of logit_sum (label smoothing) stands apart and is never filtered."""
    n, v = 300, 2500
    for row_mask in (None, two_thirds(n)):
        case = transposed(Case.of(peaked(n, 33, v), row_mask, column_weight=torch.rand(v)))
        tangents = [torch.rand(n) / n, signed(n), signed(n) / v]
        saved = FORWARD(
            case.operands(AUTOCAST.names), AUTOCAST.names, case.row_mask, AUTOCAST.statistics, True,
            *AUTOCAST.attributes.args(),
        )  # fmt: skip
        check("autocast", AUTOCAST, case, tangents, saved)


@pytest.mark.slow
def test_float16_with_a_softcap_and_a_frozen_head():
    case = Case.of(peaked(300, 40, 3000), two_thirds(300))
    case.head = replace(case.head.to(torch.float16), bias=None)
    *_, bound = saved = saved_by(CAPPED, case)
    mass = torch.stack([p.sum(0) for p in case.softmax(CAPPED).split(BLOCK)])
    assert (values(bound.device)[bound.long()][: len(mass)] >= mass).all()
    check("float16", CAPPED, case, loss_tangents(torch.rand(300)), saved)


@pytest.mark.slow
def test_the_softcap_by_a_root():
    case = Case.of(peaked(300, 40, 3000), two_thirds(300))
    case.head = replace(case.head, x=case.head.x * 2)
    *_, bound = saved = saved_by(ROOTED, case)
    mass = torch.stack([p.sum(0) for p in case.softmax(ROOTED).split(BLOCK)])
    assert (values(bound.device)[bound.long()][: len(mass)] >= mass).all()
    check("float32", ROOTED, case, loss_tangents(torch.rand(300)), saved)


# ---- the contract ---------------------------------------------------------------------------------------------------


def size(most: int):
    edges = [e for e in (1, 2, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1031) if e <= most]
    return st.sampled_from(edges) | st.integers(1, most)


def weighting(kind: str, n: int, generator: torch.Generator) -> Tensor:
    g = torch.full((n,), 1 / n)
    if kind == "signed":
        g = torch.randn(n, generator=generator)
    elif kind == "one heavy row":
        g[n // 2] *= 100
    elif kind == "zero rows":
        g[::3] = 0
    return g


@every_configuration
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    n=size(INDICATORS * BLOCK), v=size(2500), kind=st.sampled_from(KINDS), inactive=st.integers(0, 100),
    weights=st.sampled_from(["mean", "signed", "one heavy row", "zero rows"]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_contract(configuration, n, v, kind, inactive, weights, seed):
    """Against float64: what each block and each row lose of their own dense gradient. What is sampled counts as lost,
    and has its weight instead."""
    v = max(v, 2)
    every = max(n + inactive, BLOCK + 1)
    generator = torch.Generator().manual_seed(seed)
    row_mask = torch.zeros(every, dtype=torch.bool)
    row_mask[torch.randperm(every, generator=generator)[:n]] = True
    case = Case.of(make(kind, every, v, seed).to(configuration.dtype), row_mask, seed=seed * 7919)
    saved = saved_by(configuration, case)
    g = weighting(weights, every, generator)
    ours = gradients(configuration, case, loss_tangents(g), saved)
    assert all(t.isfinite().all() for t in ours.values())
    assert not ours["input"][~row_mask].any()
    g, p, lse = g[case.rows].double().abs(), case.softmax(configuration), saved[0][case.rows].double()
    found, sampled = computed(case, ours).double(), torch.zeros(blocks(n), v, dtype=torch.bool)
    dense = torch.zeros(blocks(n), v, dtype=torch.float64).index_add(0, case.block, p * (g[:, None]))
    own = torch.zeros(blocks(n), v, dtype=torch.bool)
    own[case.block, case.head.target[case.rows]] = True
    if configuration.unbiased and weights != "signed":
        ratio = torch.where(own | (found == 0) | (dense < 1e-25), 1.0, found / dense)
        assert ((ratio > 0.9) & (ratio < 16.2)).all()
        sampled = ratio > 1.06  # the least weight of a sampled column is 1.12
    kept = (found != 0) & ~sampled
    unknown = 1.2e-7 * (2 + lse.abs())  # of lse, and with it of what is left to other columns than the target
    total = torch.zeros(blocks(n), dtype=torch.float64)
    lost = (p * ~kept[case.block]).sum(1)
    if not configuration.unbiased or weights != "signed":
        dropped = total.index_add(0, case.block, g * lost)
        allowed = total.index_add(0, case.block, g * (p.sum(1) + unknown))
        assert (dropped <= TAU * allowed * (1 + 1e-4)).all()
        counts = g > 0
        assert (lost <= ROW_CAP * TAU * (p.sum(1) + unknown) + 2 * unknown)[counts].all()
    assert (found != 0).double().mean() - 1e-6 <= ours["diagnostics"][0] <= 1
    if kind == "peaked" and weights == "mean" and v > 1000:
        assert ours["diagnostics"][0] < 0.9, "nothing is left out at all"


# ---- blocks done in full ---------------------------------------------------------------------------------------------


def with_an_odd_row(n: int, v: int, dtype: torch.dtype) -> tuple[Case, Tensor]:
    """The last row looks at the first word and, as much, at the half of the words that no other row does, and counts
    for little: the budget alone would leave those out, and the check of every row has its block done in full."""
    head = Head.make(n, 16, v, bias=True, seed=1)
    half = v // 2
    head.bias[:half] += 8
    head.bias[0] = head.bias[half:].logsumexp(0)
    head.x[:, 0], head.x[-1] = 0, 0
    head.x[-1, 0], head.w[:, 0], head.w[half:, 0], head.w[0, 0] = 20, 0, 1, 1
    head.target %= half
    head.target[-1] = 1
    g = torch.ones(n)
    g[-1] = 1e-3
    return Case.of(head.to(dtype)), g


@every_configuration
def test_a_block_whose_row_would_lose_too_much_is_done_in_full(configuration):
    """In fp32 the rest is added; where slabs of a 16-bit dW are rounded already, everything is done again."""
    n, v = 3 * BLOCK, 4000
    case, g = with_an_odd_row(n, v, configuration.dtype)
    saved = saved_by(configuration, case)
    ours = check("one block in full", configuration, case, loss_tangents(g), saved, kept=(0.34, 0.84))
    found = computed(case, ours)
    assert (found[2] != 0).all()
    assert (found[:2] == 0).double().mean() > 0.2
    numbers = gradients(configuration, case, loss_tangents(g), saved)["diagnostics"]
    assert numbers[1] == pytest.approx(1 / 3) and numbers[4] == 3
    assert case.softmax(configuration)[-1, v // 2 :].sum() > ROW_CAP * TAU
    # What each of its columns has is what the exact gradient has, no sample.
    p = case.softmax(configuration)[case.block == 2]
    own = case.head.target[2 * BLOCK :]
    others = torch.ones(v, dtype=torch.bool).index_fill(0, own, False)
    want = g[2 * BLOCK :].double() @ p
    tolerance = 1e-4 if configuration.dtype == torch.float32 else 2e-2
    assert error(found[2][others], want[others]) < tolerance


@every_configuration
def test_a_flat_softmax_is_computed_in_full(configuration):
    n, v = 300, 1200
    head = Head.make(n, 24, v, configuration.dtype, bias=True)
    head.w *= 0.01
    head.bias *= 0
    case, tangents = Case.of(head), loss_tangents(torch.ones(n) / n)
    ours = gradients(configuration, case, tangents, saved_by(configuration, case))
    assert ours.pop("diagnostics").tolist() == [1, 1, 0, 0, 3]
    eager = eager_gradients(configuration, case, tangents, saved_by(configuration, case), "exact")
    exact = exact_gradients(configuration, case, tangents, None)
    check_error_rule("flat", ours, eager, exact, configuration.dtype)


# ---- extremes --------------------------------------------------------------------------------------------------------


def ordinary(v: int = 1003, dtype=torch.float32) -> Case:
    return Case.of(peaked(300, 16, v, dtype))


def nan_row(case: Case, g: Tensor) -> None:
    case.head.x[140, 3] = torch.nan


def nan_tangent(case: Case, g: Tensor) -> None:
    g[140] = torch.nan


def infinite_logit(case: Case, g: Tensor) -> None:
    case.head.bias[700] = torch.inf
    case.head.target %= 700


def infinite_logit_without_tangents(case: Case, g: Tensor) -> None:
    infinite_logit(case, g)
    g[128:256] = 0


def masked_columns(case: Case, g: Tensor) -> None:
    case.head.bias[::3] = -torch.inf
    case.head.target = case.head.target // 3 % 300 * 3 + 1


def masked_everywhere(case: Case, g: Tensor) -> None:
    case.head.bias[:] = -torch.inf


def masked_target(case: Case, g: Tensor) -> None:
    case.head.bias[11] = -torch.inf
    case.head.target[[3, 200]] = 11


def zero_block(case: Case, g: Tensor) -> None:
    g[128:256] = 0


def zero_tangents(case: Case, g: Tensor) -> None:
    g[:] = 0


def one_target(case: Case, g: Tensor) -> None:
    case.head.target[:] = 500


def giant_at_the_end(case: Case, g: Tensor) -> None:
    case.head.bias[-1] = 40.0


def heavy_row(case: Case, g: Tensor) -> None:
    g[50] *= 100


EXTREMES = [
    nan_row, nan_tangent, infinite_logit, infinite_logit_without_tangents, masked_columns, masked_everywhere,
    masked_target, zero_block, zero_tangents, one_target, giant_at_the_end, heavy_row,
]  # fmt: skip


@pytest.mark.parametrize("configuration", [FLOAT32, SAMPLED_SMALL], ids=["float32", "bfloat16, 1 MiB, unbiased"])
@pytest.mark.parametrize("edit", EXTREMES, ids=lambda edit: edit.__name__)
def test_extremes_as_the_reference(edit, configuration):
    """NaN stands in the same places, and the same is kept."""
    case, g = ordinary(dtype=configuration.dtype), torch.rand(300) / 300
    edit(case, g)
    saved = saved_by(configuration, case)
    operands = case.operands(f"{configuration.operands} diagnostics")
    for ours, eager in zip(saved[:2], forward_of(configuration)(operands, case.row_mask)[:2], strict=True):
        assert error(ours, eager) < 2e-6
    ours = gradients(configuration, case, loss_tangents(g), saved)
    eager = eager_gradients(configuration, case, loss_tangents(g), saved)
    tolerance = 1e-5 if configuration.dtype == torch.float32 else 1e-2
    for name in ours:
        assert error(ours[name], eager[name]) <= tolerance, name


@every_configuration
def test_small_vocabularies_and_few_active_rows(configuration):
    """Fewer columns than a tile has at least; none is left of which the targets are all."""
    for v, count in [(2, 300), (3, 1), (31, 129), (33, 2), (5, 256), (1500, 5), (200, 128)]:
        row_mask = torch.zeros(330, dtype=torch.bool)
        row_mask[torch.randperm(330)[:count]] = True
        case = Case.of(peaked(330, 20, v, configuration.dtype, seed=v), row_mask)
        check(f"{count} rows, {v} columns", configuration, case, loss_tangents(torch.rand(330)), kept=(0, 1))


@every_configuration
def test_no_active_row(configuration):
    case = Case.of(peaked(200, 16, 500, configuration.dtype), torch.zeros(200, dtype=torch.bool))
    saved = saved_by(configuration, case)
    ours = gradients(configuration, case, loss_tangents(torch.ones(200)), saved)
    assert not any(t.any() for t in (*saved, *ours.values()))


def test_argmax_beside_a_bound_is_the_first_of_equal_logits():
    """Rounds give each split of the vocabulary tiles that do not follow one another."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        head = Head(torch.ones(140, 16), torch.zeros(3000, 16), torch.zeros(140, dtype=torch.int64))
        equal = torch.randperm(3000, generator=generator)[:7]
        head.w[equal] = 0.125
        argmax = saved_by(CAPPED, Case.of(head.to(torch.float16)))[2]
        assert (argmax == equal.min()).all()


# ---- kernels of their own --------------------------------------------------------------------------------------------


def forget_kernels() -> None:
    torch._dynamo.reset()
    for cached in (source, forward_kernel, backward_kernel):
        cached.cache_clear()


@pytest.fixture
def compiled_anew():
    """Nothing is kept from the tests before, nor for those after."""
    forget_kernels()
    yield
    forget_kernels()


@pytest.mark.slow
@pytest.mark.parametrize("configuration", [FLOAT32, SAMPLED_SMALL], ids=["float32", "bfloat16, 1 MiB, unbiased"])
def test_the_kernels_of_avx2(configuration, compiled_anew):
    with torch._inductor.config.patch({"cpp.simdlen": 256}):
        assert not cpu.multiplies_bfloat16()
        test_the_bound_is_never_below_the_mass("peaked", configuration)
        test_gradients_are_those_of_the_kept_columns(configuration)
        test_a_block_whose_row_would_lose_too_much_is_done_in_full(configuration)
        test_small_vocabularies_and_few_active_rows(configuration)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 16, 700), (300, 1, 700), (300, 16, 1)], ids=str)
def test_one_row_width_one_and_one_column(shape, compiled_anew):
    """Sizes that Dynamo compiles apart."""
    head = peaked(*shape)
    case = Case(head, torch.ones(shape[0], dtype=torch.bool))
    check(str(shape), SAMPLED, case, loss_tangents(torch.rand(shape[0])), kept=(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("needs", ["input", "weight", "bias"])
def test_one_gradient_alone(needs, compiled_anew):
    configuration = replace(SMALL, needs=f"{needs} diagnostics")
    check(needs, configuration, Case.of(peaked(300, 40, 3000, torch.bfloat16)), loss_tangents(torch.rand(300)))


@pytest.mark.slow
@pytest.mark.parametrize("grad_filter", [BUDGET, UNBIASED])
def test_logsumexp_without_targets(grad_filter, compiled_anew):
    configuration = Configuration(grad_filter=grad_filter, statistics="lse", operands="input weight bias")
    case = Case.of(peaked(300, 40, 3000))
    *_, bound = saved = saved_by(configuration, case)
    mass = torch.stack([p.sum(0) for p in case.softmax(configuration).split(BLOCK)])
    assert (values(bound.device)[bound.long()] >= mass).all()
    check("no targets", configuration, case, [torch.rand(300)], saved)


@pytest.mark.slow
def test_three_threads(three_threads, compiled_anew):
    """More columns than are worked on at a time; on another number of threads they are added up in other parts."""
    case = Case.of(peaked(300, 40, 6000))
    check("three threads", FLOAT32, case, loss_tangents(torch.rand(300)))
    assert {threads for tasks, threads in three_threads() if tasks > 2} == {3}


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("configuration", [SMALL, SAMPLED_SMALL], ids=["budget", "unbiased"])
def test_scratch_stays_within_the_workspace(configuration):
    n, d, v = 640, 160, 9000
    case = Case.of(peaked(n, d, v, configuration.dtype))
    tangents, vectors = loss_tangents(torch.rand(n)), 16 * n * 4
    for _ in range(2):  # the first time compiles
        with Allocations() as forward:
            saved = saved_by(configuration, case)
        with Allocations() as backward:
            ours = gradients(configuration, case, tangents, saved)
    assert 0.01 < ours["diagnostics"][0] < 0.8
    results = case.head.x.nbytes + case.head.w.nbytes + case.head.bias.nbytes
    assert forward.peak <= configuration.workspace + vectors + saved[-1].nbytes
    assert results <= backward.peak <= configuration.workspace + vectors + results + case.head.x.numel() * 4
    assert max(forward.largest, backward.largest) < n * v


# ---- torch.compile ---------------------------------------------------------------------------------------------------

FILTERS = {"budget": (0.01, 0.0), "unbiased": (("unbiased", 0.01), 0.1)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["budget", "unbiased"])
def test_a_compiled_model(kind):
    """Rows that are ignored, a site found by the rewrite; with label smoothing in one of the two."""
    grad_filter, smoothing = FILTERS[kind]
    n, d, v = 400, 24, 6000
    head = peaked(n, d, v)
    head.target[::4] = -100

    def loss(x, w, bias):
        return F.cross_entropy(F.linear(x, w, bias), head.target, label_smoothing=smoothing)

    options = {"grad_filter": grad_filter, "gradients_in_forward": False, "diagnostics": True}
    compiled = torch.compile(loss, backend=cce_inductor.cce_backend, options=options)

    def step(function, seed: int = 0) -> list[Tensor]:
        torch.manual_seed(seed)
        leaves = [t.detach().clone().requires_grad_() for t in head.leaves().values()]
        value = function(*leaves)
        value.backward()
        return [value.detach(), *(t.grad for t in leaves)]

    cce_inductor.diagnostics(reset=True)
    before = kernels()
    ours, want = step(compiled), step(loss)
    assert kernels() - before == 2
    (numbers,) = cce_inductor.diagnostics(reset=True)
    assert numbers["filter"] == str(Filter.of(grad_filter)) and numbers["blocks"] == blocks(300)
    assert 0.01 < numbers["kept"] < 0.8 and 0 < numbers["dropped"] <= 0.01
    assert error(ours[0], want[0]) < 1e-6, "the loss itself is exact"
    for one, exact in zip(ours[1:], want[1:], strict=True):
        assert 1e-5 < error(one, exact) < 0.05
    assert all(torch.equal(a, b) for a, b in zip(ours, step(compiled), strict=True))
    other = step(compiled, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True)) == (kind == "budget")
