"""The CPU kernel that forms gradients of two heads in the forward, against all logits in float64; when it is chosen."""

from dataclasses import replace

import pytest
import torch
from allocations import Allocations
from head_oracle import some_rows
from operators import kernels
from test_cpu_two_heads import attributes
from test_divergences import JSD, with_parts
from test_two_heads import EVERY, LOWS, at_once, compare, heads

from cce_inductor.lowering.choose import choose
from cce_inductor.ops.call import MIB
from cce_inductor.ops.choice import Problem
from cce_inductor.ops.library import BACKWARD, FORWARD
from cce_inductor.ops.with_gradients import WITH_GRADIENTS

pytestmark = pytest.mark.usefixtures("lowerings")


def compiled(dynamic: bool | None = None):
    return torch.compile(lambda *arguments: WITH_GRADIENTS(*arguments), dynamic=dynamic)


def test_chunks_of_any_number_of_rows_and_classes():
    """Both ways of a divergence and the cross-entropy in one call; one chunk, several, and no row that counts."""
    names = f"{LOWS} divergence other_divergence target_logit"
    operator, options = compiled(dynamic=True), attributes(scale=0.7, other_softcap=9.0, workspace=2 * MIB)
    for n, v in ((437, 1003), (50, 301)):
        given = heads(n=n, d=100, other_d=70, v=v) | {"target": torch.arange(n) % v}
        wanted = [name for name in given if name != "target"]
        compare(given, names, options, some_rows(n), wanted, operator, at_once)
    found = at_once(given, names, options, torch.zeros(n, dtype=torch.bool), operator, wanted)
    assert not any(t.any() for t in found.values())
    assert kernels() == 1


def test_a_frozen_teacher_under_autocast():
    """Weights of fp32 that are multiplied in bfloat16, in chunks; a divergence of the mixture beside."""
    given, names = heads(n=300, d=70, other_d=33, v=1200), f"{with_parts(JSD)} divergence"
    wanted = [name for name in given if "other" not in name]
    narrow = torch.bfloat16
    options = attributes(workspace=2 * MIB, compute_dtype=narrow, other_compute_dtype=narrow)
    compare(given, names, options, wanted=wanted, operator=compiled(), how=at_once, narrow=narrow)
    assert kernels() == 1


@pytest.mark.slow
@pytest.mark.parametrize("workspace", [64 * MIB, 2 * MIB, 1 << 18], ids=["one chunk", "chunks", "nothing kept"])
@pytest.mark.parametrize("form", ["tanh", "rsqrt"])
def test_every_option(workspace, form):
    operator = compiled()
    options = attributes(
        scale=0.7, softcap=6.0, softcap_form=form, other_scale=0.5, other_softcap=9.0, workspace=workspace
    )
    given = heads(n=337, d=100, other_d=70, v=1003)
    given |= {"target": torch.arange(337), "column_weight": torch.rand(1003)}
    names = f"{EVERY} entropy target_logit logit_sum argmax"
    wanted = [name for name in given if name not in ("target", "column_weight")]
    compare(given, names, options, some_rows(337), wanted, operator, at_once)
    compare(given, names, options, None, wanted, operator, at_once)


@pytest.mark.slow
@pytest.mark.parametrize("workspace", [64 * MIB, 2 * MIB, 1 << 18], ids=["one chunk", "chunks", "nothing kept"])
@pytest.mark.parametrize("frozen", ["other_", "none"])
def test_divergences_of_a_mixture(workspace, frozen):
    given, names = heads(n=237, d=50, other_d=30, v=1003), with_parts(JSD, "skew(0.1)", "other_mixture(0.7)")
    wanted = [name for name in given if not name.startswith(frozen)]
    compare(given, names, attributes(workspace=workspace), some_rows(237), wanted, compiled(), at_once)
    assert kernels() == 1


@pytest.mark.slow
def test_factors_of_both_heads():
    generator = torch.Generator().manual_seed(2)
    given = heads(n=596, d=33, other_d=20, v=1300)
    for prefix in ("", "other_"):
        for name, size in (("row_scale", 596), ("column_scale", 1300)):
            given[prefix + name] = torch.rand(size, generator=generator) + 0.5
    for workspace in (2 * MIB, 64 * MIB):
        options = attributes(scale=0.9, softcap=7.0, workspace=workspace)
        compare(given, f"{LOWS} divergence expected_other", options, operator=compiled(), how=at_once)
    assert kernels() == 2


@pytest.mark.slow
def test_rows_that_are_not_finite_and_classes_without_mass():
    """As the two operators give them one after the other, but for the tangent of lse, which is NaN in such rows."""
    given = heads(n=140, v=400)
    given["bias"][:7] = given["other_bias"][:7] = -torch.inf
    given["input"][3], given["other_input"][77] = torch.inf, torch.nan
    names, tangents, needs = (
        f"{with_parts(JSD)} {EVERY.removeprefix(LOWS)}",
        f"lse {JSD} divergence",
        "input weight other_input",
    )
    options, g = attributes(workspace=MIB).args(), torch.rand(3, 140)
    call = list(given.values()), " ".join(given), None, names

    def late(g, *operands):
        saved = FORWARD(list(operands), call[1], None, names, True, *options)
        given = [torch.where(saved[0].isfinite(), g[0], torch.nan), g[1], g[2]]
        return *saved, *BACKWARD(given, tangents, saved, list(operands), *call[1:], needs, *options)

    found = compiled()(list(g), tangents, *call, needs, *options)
    for ours, want in zip(found, late(g, *call[0]), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert kernels() == 1
    assert found[-3][[3, 77]].isnan().all() and found[-3].isnan().any(1).sum() == 2


@pytest.mark.slow
def test_results_do_not_depend_on_who_computes_them(three_threads):
    given, operator, names = heads(n=700, d=40, v=3000), compiled(), f"{with_parts(JSD)} divergence"
    options = attributes(workspace=4 * MIB)
    first, second = (at_once(given, names, options, operator=operator) for _ in range(2))
    assert {threads for tasks, threads in three_threads() if tasks > 2} == {3}
    assert all(torch.equal(first[name], second[name]) for name in first)
    compare(given, names, options, operator=operator, how=at_once)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names,compute,frozen",
    [
        (f"{LOWS} divergence", torch.float32, "none"),
        (f"{LOWS} divergence", torch.bfloat16, "other_"),
        (with_parts(JSD), torch.float32, "other_"),
        (with_parts(JSD), torch.bfloat16, "none"),
    ],
    ids=["float32", "bfloat16, frozen", "mixture, float32, frozen", "mixture, bfloat16"],
)
def test_scratch_is_bounded(names, compute, frozen):
    """And is used: 128 rows of both heads' logits are 5.9 MiB."""
    given = heads(n=1500, d=96, other_d=24, v=6000)
    wanted = [name for name in given if not name.startswith(frozen)]
    options, operator = attributes(workspace=10 * MIB, compute_dtype=compute, other_compute_dtype=compute), compiled()
    at_once(given, names, options, operator=operator, wanted=wanted)  # compiles
    with Allocations() as memory:
        found = at_once(given, names, options, operator=operator, wanted=wanted)
    results = sum(t.nbytes for t in found.values())
    assert 6 * MIB < memory.peak - results <= 10 * MIB + 64 * 1500
    assert kernels() == 1


def test_a_gradient_of_sixteen_bits_runs_the_eager_implementation():
    given = heads(torch.bfloat16, n=40)
    compare(given, f"{LOWS} divergence", attributes(), operator=compiled(), how=at_once)
    assert kernels() == 0


def test_where_it_pays():
    fp32, bf16 = torch.float32, torch.bfloat16
    problem = Problem(
        1024, 1024, 32768, "cpu", (fp32, fp32), fp32, 64 * MIB, 1024 * 32768 * 4, two_heads=True, other_width=1024,
        other_dtypes=(fp32, fp32, fp32), trained=(fp32,),
    )  # fmt: skip

    def chosen(**change) -> bool:
        return choose(replace(problem, **change)).gradients_in_forward

    assert chosen() and chosen(trained=(fp32, fp32)) and chosen(mixtures=True)
    assert chosen(rows=10**5, logits_bytes=10**5 * 32768 * 4)  # chunks: any number of rows
    assert chosen(vocab=65536) and not chosen(vocab=65536, trained=(fp32, fp32))  # 90 rows at a time
    assert not chosen(vocab=131072)
    assert not chosen(trained=(bf16,)) and chosen(other_dtypes=(bf16, bf16, bf16))
    assert not chosen(other_dtypes=(torch.float16,) * 3)
    assert not chosen(rows=50, logits_bytes=50 * 32768 * 4)  # no more is kept than is saved
    assert not chosen(device="cuda")
