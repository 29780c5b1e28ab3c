"""Divergences that need the normalised logits of two heads, in the eager implementation, against all logits."""

import pytest
import torch
from allocations import Allocations
from test_two_heads import (
    LOWS,
    N,
    check_numerical_gradients,
    check_second_derivatives,
    compare,
    differentiate,
    heads,
    run,
)
from torch import Tensor

from cce_inductor.ops import divergences, reference
from cce_inductor.ops.call import MIB, Attributes
from cce_inductor.ops.divergences import Divergence
from cce_inductor.ops.library import FORWARD
from cce_inductor.ops.statistics import parse

JSD = "jensen_shannon(0.3)"
NAMES = (JSD, "jensen_shannon(0.5)", "skew(0.1)", "other_skew(0.9)", "mixture(0.2)", "other_mixture(0.7)")


def with_parts(*names: str) -> str:
    """The statistics that a call needs for these divergences."""
    return " ".join([LOWS, *(f"{name}{part}" for name in names for part in divergences.PARTS)])


EVERY = with_parts(*NAMES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients(dtype, masked, small_tiles):
    mask = torch.arange(N) % 3 != 0 if masked else None
    softcap = Attributes(scale=0.7, softcap=6.0, other_scale=0.5, other_softcap=9.0)
    for attributes in (Attributes(), softcap):
        compare(heads(dtype), EVERY, attributes, mask)


def test_tiles_are_computed_again_where_they_do_not_fit(monkeypatch):
    given = heads()
    kept = differentiate(given, EVERY, Attributes())
    monkeypatch.setattr(reference, "_KEPT_ROWS", 10**9)
    monkeypatch.setattr(reference, "SLAB_COLUMNS", 50)
    given["input"] = given["input"].repeat(30, 1)  # rows that do not fit
    given["other_input"] = given["other_input"].repeat(30, 1)
    again = run(given, EVERY, Attributes(workspace=MIB // 4))
    for name, value in again.items():
        torch.testing.assert_close(value[:N], kept[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("name", NAMES[:4])
def test_heads_that_are_close(distance, name, small_tiles):
    for offset in (0.0, 500.0):
        given = heads(close=distance)
        given["bias"] = given["bias"] + offset
        given["other_bias"] = given["other_bias"] + offset
        compare(given, with_parts(name), Attributes(), wanted=["input", "weight", "other_input"])


def test_equal_heads_have_no_divergence(small_tiles):
    given = {name: t.requires_grad_() for name, t in heads(close=0.0).items()}
    found = run(given, with_parts(JSD, "skew(0.1)"), Attributes())
    assert not found[JSD].any() and not found["skew(0.1)"].any()
    found[JSD].sum().backward(retain_graph=True)
    assert not any(t.grad.any() for t in given.values())
    found["skew(0.1)"].sum().backward()
    assert all(t.grad.abs().max() < 1e-6 for t in given.values())


def test_a_class_without_mass_adds_nothing(small_tiles):
    given = heads()
    given["bias"][:7] = given["other_bias"][:7] = -torch.inf
    found = differentiate(given, EVERY, Attributes(), wanted=["input", "weight", "other_weight"])
    kept = {n: t if n.endswith("input") else t[7:] for n, t in given.items()}
    expected = differentiate(kept, EVERY, Attributes(), wanted=["input", "weight", "other_weight"])
    for name in ("dweight", "dother_weight"):
        assert not found[name][:7].any()
        found[name] = found[name][7:]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_a_class_that_one_head_excludes_counts_with_the_mixture():
    given = heads()
    given["other_bias"][0] = -torch.inf
    jsd = run(given, with_parts("jensen_shannon(0.3)"), Attributes())[JSD]
    z, r = (given[p + "input"] @ given[p + "weight"].T + given[p + "bias"] for p in ("", "other_"))
    p, q = z.double().softmax(1), r.double().softmax(1)
    m = 0.7 * p + 0.3 * q
    exact = 0.7 * (p * (p / m).log()).sum(1) + 0.3 * torch.where(q == 0, 0, q * (q / m).log()).sum(1)
    torch.testing.assert_close(jsd.double(), exact, rtol=1e-5, atol=1e-7)


def test_rows_that_are_not_finite_give_nan():
    given = heads()
    given["input"][3] = torch.inf
    found = differentiate(given, with_parts(JSD), Attributes(), wanted=["input", "other_input"])
    for name in (JSD, "dinput", "dother_input"):
        assert found[name][3].isnan().all() and found[name][4:].isfinite().all()


def test_second_derivatives():
    check_second_derivatives(EVERY, NAMES)


def test_gradcheck():
    check_numerical_gradients(EVERY, NAMES)


@pytest.mark.parametrize("mask", [False, True])
def test_opcheck(mask):
    given = {n: t.requires_grad_() for n, t in heads().items()}
    rows = torch.arange(N) % 2 == 0 if mask else None
    args = list(given.values()), " ".join(given), rows, with_parts(JSD), True, *Attributes(other_softcap=5.0).args()
    torch.library.opcheck(FORWARD, args)


def test_autocast_is_that_of_both_products():
    given = heads()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(given, EVERY, Attributes())
    expected = run(given, EVERY, Attributes(compute_dtype=torch.bfloat16, other_compute_dtype=torch.bfloat16))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("frozen", ["", "other_"])
def test_what_nobody_needs_is_not_computed(frozen, small_tiles):
    given = heads()
    wanted = [n for n in given if n.startswith("other_") != (frozen == "other_")]
    every = differentiate(given, EVERY, Attributes())
    some = differentiate(given, EVERY, Attributes(), wanted=wanted)
    for name in wanted:
        torch.testing.assert_close(some[f"d{name}"], every[f"d{name}"])


@pytest.mark.parametrize("shape", [(4000, 16, 300), (40, 16, 60_000), (1200, 16, 3000)], ids=str)
def test_scratch_is_bounded(shape):
    n, d, v = shape
    given = {"input": torch.randn(n, d), "weight": torch.randn(v, d) * 0.1}
    given |= {"other_input": torch.randn(n, 24), "other_weight": torch.randn(v, 24) * 0.1}
    leaves = {name: t.requires_grad_() for name, t in given.items()}
    workspace = 4 * MIB
    with Allocations() as memory:
        run(leaves, with_parts(JSD), Attributes(workspace=workspace))[JSD].sum().backward()
    results = sum(t.nbytes for t in leaves.values()) + 64 * n * 8
    assert memory.peak <= workspace + results + 2 * 512 * (d + 24) * 4


def test_another_divergence_is_one_function(monkeypatch, small_tiles):
    """Total variation: a row of the table is all that is written of it."""

    def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()).abs() / 2

    monkeypatch.setitem(divergences.TABLE, "total_variation", total_variation)
    given = {name: t.double() for name, t in heads().items()}
    leaves = [{name: t.clone().requires_grad_() for name, t in given.items()} for _ in range(2)]
    ours = run(leaves[0], with_parts("total_variation()"), Attributes())["total_variation()"]
    z, r = (leaves[1][p + "input"] @ leaves[1][p + "weight"].T + leaves[1][p + "bias"] for p in ("", "other_"))
    plain = (z.softmax(1) - r.softmax(1)).abs().sum(1) / 2
    torch.testing.assert_close(ours, plain)
    weights = torch.linspace(-1, 1, N, dtype=torch.float64)
    for value in (ours, plain):
        (value * weights).sum().backward()
    for name in given:
        torch.testing.assert_close(leaves[0][name].grad, leaves[1][name].grad)


def test_names():
    assert Divergence.read("jensen_shannon(0.3)") == Divergence("jensen_shannon", (0.3,))
    assert str(Divergence("skew", (0.1,))) == "skew(0.1)"
    for name in ("jensen_shannon", "jensen_shannon(0.3", "unknown(0.3)", "jensen_shannon(0.3).third"):
        with pytest.raises(ValueError, match="expected names out of"):
            parse(name)
    with pytest.raises(RuntimeError, match=r"statistic jensen_shannon\(0.3\) needs jensen_shannon\(0.3\).own"):
        run(heads(), f"{LOWS} {JSD}", Attributes())


def test_exact_under_every_filter():
    given, names = heads(), with_parts(JSD)
    exact = differentiate(given, names, Attributes())
    for text in ("budget 0.1", "eps 0.1"):
        for name, value in differentiate(given, names, Attributes(grad_filter=text)).items():
            assert torch.equal(exact[name], value)
