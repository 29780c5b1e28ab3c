"""The C++ kernels of divergences that need the normalised logits of two heads, against all logits in float64."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from allocations import Allocations
from head_oracle import some_rows
from operators import kernels
from test_cpu_two_heads import attributes, compiled
from test_divergences import EVERY, JSD, with_parts
from test_two_heads import compare, differentiate, heads, run

from cce_inductor.lowering import register
from cce_inductor.lowering.choose import choose
from cce_inductor.lowering.vector_code import body
from cce_inductor.ops import divergences
from cce_inductor.ops.call import MIB
from cce_inductor.ops.choice import Problem
from cce_inductor.ops.divergences import VALUE, Divergence

pytestmark = pytest.mark.usefixtures("lowerings")


def test_every_option_and_any_number_of_rows_and_classes():
    operator = compiled(dynamic=True)
    options = attributes(scale=0.7, softcap=6.0, other_scale=0.5, other_softcap=9.0, workspace=1 << 20)
    for n, v in ((137, 1003), (53, 301)):
        given = heads(n=n, d=100, other_d=70, v=v)
        compare(given, EVERY, options, some_rows(n), operator=operator)
    found = differentiate(given, EVERY, options, torch.zeros(53, dtype=torch.bool), operator)
    assert not any(t.any() for t in found.values())
    assert kernels() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.slow
def test_sixteen_bits_beside_other_statistics(dtype):
    given = heads(dtype, n=130, d=70, other_d=33, v=2500) | {"target": torch.arange(130)}
    wanted = [name for name in given if name != "target"]
    names = f"{with_parts(JSD)} divergence entropy target_logit"
    compare(given, names, attributes(), wanted=wanted, operator=compiled())
    assert kernels() == 2


@pytest.mark.slow
def test_logits_are_computed_again_where_no_strip_fits():
    given = heads(n=150, v=20_000)
    compare(given, with_parts(JSD, "skew(0.1)"), attributes(workspace=8 * MIB), operator=compiled())
    assert kernels() == 2


@pytest.mark.slow
def test_close_and_equal_heads():
    operator, names = compiled(), with_parts("jensen_shannon(0.3)", "skew(0.1)")
    for distance in (1e-1, 1e-2, 1e-3):
        compare(
            heads(close=distance), names, attributes(), wanted=["input", "weight", "other_input"], operator=operator
        )
    given = {name: t.requires_grad_() for name, t in heads(close=0.0).items()}
    out = run(given, names, attributes(), operator=operator)
    assert not out[JSD].any() and not out["skew(0.1)"].any()
    (out[JSD].sum() + out["skew(0.1)"].sum()).backward()
    assert all(t.grad.abs().max() < 1e-6 for t in given.values())
    assert kernels() == 4


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["", "other_"], ids=["the first head", "the other head"])
def test_what_nobody_needs_is_not_computed(frozen):
    given = heads(n=70, v=500)
    wanted = [name for name in given if name.startswith("other_") != (frozen == "other_")]
    compare(given, EVERY, attributes(), wanted=wanted, operator=compiled())
    assert kernels() == 2


@pytest.mark.slow
def test_classes_without_mass_and_rows_that_are_not_finite():
    given = heads(n=40, v=400)
    given["bias"][:7] = given["other_bias"][:7] = -torch.inf
    given["other_bias"][7:9] = -torch.inf
    given["input"][3] = torch.inf
    wanted = [name for name in given if "bias" not in name]
    found = differentiate(given, EVERY, attributes(), wanted=wanted, operator=compiled())
    reference = differentiate(given, EVERY, attributes(), wanted=wanted)
    for name, value in reference.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.slow
def test_results_do_not_depend_on_who_computes_them(three_threads):
    given, operator = heads(n=700, d=40, v=3000), compiled()
    options = attributes(workspace=1 << 20)
    first, second = (differentiate(given, with_parts(JSD), options, operator=operator) for _ in range(2))
    assert {threads for tasks, threads in three_threads() if tasks > 2} == {3}
    assert all(torch.equal(first[name], second[name]) for name in first)
    compare(given, with_parts(JSD), options, operator=operator)


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [6000, 60_000])
def test_scratch_is_bounded(vocab):
    n, d = 500, 96
    given = {"input": torch.randn(n, d), "weight": torch.randn(vocab, d) * 0.1}
    given |= {"other_input": torch.randn(n, 24), "other_weight": torch.randn(vocab, 24) * 0.1}
    given = {name: t.bfloat16().requires_grad_() for name, t in given.items()}
    options, operator = attributes(workspace=8 * MIB), compiled()

    def step() -> None:
        run(given, with_parts(JSD), options, operator=operator)[JSD].sum().backward()

    step()  # compiles
    for t in given.values():
        t.grad = None
    with Allocations() as memory:
        step()
    results = sum(t.nbytes for t in given.values() if t.requires_grad) + 64 * n * 8
    assert memory.peak <= 8 * MIB + results


@pytest.mark.slow
def test_another_divergence_is_one_function(monkeypatch):
    """Total variation: a row of the table is all that is written of it, for the kernels as well."""
    monkeypatch.setitem(divergences.TABLE, "total_variation", lambda p, q: (p.exp() - q.exp()).abs() / 2)
    given, name = heads(n=70, v=500), "total_variation()"
    wanted = [n for n in given if "bias" not in n]
    found = differentiate(given, with_parts(name), attributes(), wanted=wanted, operator=compiled())
    assert kernels() == 2
    z, r = (given[p + "input"] @ given[p + "weight"].T + given[p + "bias"] for p in ("", "other_"))
    torch.testing.assert_close(found[name], (z.softmax(1) - r.softmax(1)).abs().sum(1) / 2)
    for result, value in differentiate(given, with_parts(name), attributes(), wanted=wanted).items():
        torch.testing.assert_close(found[result], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_operator_that_has_vector_code(monkeypatch):
    def of_all(log_p, log_q):
        p, q = log_p.exp(), log_q.exp()
        first = (p - q).abs() / (1 + p).sqrt() - 2 * torch.sign(p - q) * q
        return first + (3 - torch.reciprocal(2 + q)) * torch.log(q + 1) / 2 + torch.log1p(p) * torch.expm1(-q)

    monkeypatch.setitem(divergences.TABLE, "of_all", of_all)
    given, name = heads(n=70, v=500), "of_all()"
    found = differentiate(given, with_parts(name), attributes(), operator=compiled())
    assert kernels() == 2
    for result, value in differentiate(given, with_parts(name), attributes()).items():
        torch.testing.assert_close(found[result], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_divergence_without_vector_code_runs_the_eager_implementation(monkeypatch):
    monkeypatch.setitem(divergences.TABLE, "of_cosines", lambda p, q: torch.cos(p.exp()) * q.exp())
    given, name = heads(n=70, v=500), "of_cosines()"
    found = differentiate(given, with_parts(name), attributes(), operator=compiled())
    assert kernels() == 0
    for result, value in differentiate(given, with_parts(name), attributes()).items():
        torch.testing.assert_close(found[result], value)


def test_a_device_without_such_kernels(monkeypatch):
    monkeypatch.setattr(register, "WITH_MIXTURES", ())
    given, names = heads(n=30, v=200), with_parts(JSD)
    found = differentiate(given, names, attributes(workspace=3 << 20), operator=compiled())
    assert kernels() == 0
    for result, value in differentiate(given, names, attributes(workspace=3 << 20)).items():
        torch.testing.assert_close(found[result], value)


def test_on_a_gpu_small_logits_are_left_to_the_compiler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1 << 30))
    dtypes = (torch.float32, torch.float32)
    small = Problem(64, 32, 500, "cuda", dtypes, torch.float32, MIB, 128_000, two_heads=True, mixtures=True)
    assert "a divergence of a mixture of two heads" in choose(small).refusal
    assert choose(replace(small, logits_bytes=1 << 29)).kernel.startswith("eager implementation")


def test_vector_code():
    lines = [line.strip() for line in body(Divergence("skew", (0.1,)), [VALUE]).splitlines()]
    assert lines == [
        "const Vec t2 = exp(log_p);",
        "const Vec t3 = t2.neg();",
        "const Vec t4 = log_q - log_p;",
        "const Vec t5 = t4.expm1();",
        "const Vec t6 = t5 * Vec(0.1f);",
        "const Vec t7 = t6.log1p();",
        "const Vec t8 = t3 * t7;",
        "out[0] = t8;",
    ]
