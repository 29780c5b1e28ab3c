"""The C++ kernels of two heads over one vocabulary, against all logits in float64."""

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from head_oracle import some_rows
from operators import kernels
from test_entries import some_entries
from test_two_heads import EVERY, LOWS, compare, differentiate, heads, run

import cce_inductor
from cce_inductor import version
from cce_inductor.ops.call import MIB, Attributes
from cce_inductor.ops.library import FORWARD

pytestmark = pytest.mark.usefixtures("lowerings")


def compiled(dynamic: bool | None = None):
    """The operator, compiled. Its lists of tensors are arguments: nothing is a constant but names and attributes."""
    return torch.compile(lambda *arguments: FORWARD(*arguments), dynamic=dynamic)


def attributes(**options) -> Attributes:
    return Attributes(**options, version=version.hash_files(version.PACKAGE, version.templates_dir()))


def test_every_option_and_any_number_of_rows_and_classes():
    operator = compiled(dynamic=True)
    options = attributes(scale=0.7, softcap=6.0, other_scale=0.5, other_softcap=9.0, workspace=1 << 20)
    for n, v in ((137, 1003), (53, 301)):
        given = heads(n=n, d=100, other_d=70, v=v) | {"target": torch.arange(n) % v, "column_weight": torch.rand(v)}
        names = f"{EVERY} entropy target_logit logit_sum argmax"
        wanted = [name for name in given if name not in ("target", "column_weight")]
        compare(given, names, options, some_rows(n), wanted, operator)
    found = differentiate(given, names, options, torch.zeros(53, dtype=torch.bool), operator, wanted)
    assert not any(t.any() for t in found.values())
    assert kernels() == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_beside_what_is_of_one_head(dtype):
    given = heads(dtype, n=130, d=70, other_d=33, v=2500)
    given |= {"target": torch.arange(130), "entries": some_entries(130, 8, 2500)}
    wanted = [name for name in given if given[name].is_floating_point()]
    names = f"{LOWS} expected_other divergence entropy target_logit entry_logits"
    compare(given, names, attributes(), wanted=wanted, operator=compiled())
    assert kernels() == 2


@pytest.mark.slow
def test_heads_of_two_dtypes():
    given = heads(n=100, d=64, other_d=48, v=700)
    given |= {name: t.bfloat16() for name, t in heads(n=100, d=64, other_d=48, v=700).items() if "other" in name}
    wanted = [name for name in given if "other" not in name]
    given["weight"] = given["weight"].t().contiguous().t()
    compare(given, f"{LOWS} divergence other_cross_entropy", attributes(), wanted=wanted, operator=compiled())
    assert kernels() == 2


@pytest.mark.slow
def test_factors_of_both_heads():
    generator = torch.Generator().manual_seed(2)
    given = heads(n=96, d=33, other_d=20, v=300)
    for prefix in ("", "other_"):
        for name, size in (("row_scale", 96), ("column_scale", 300)):
            given[prefix + name] = torch.rand(size, generator=generator) + 0.5
    compare(given, EVERY, attributes(scale=0.9, softcap=7.0), operator=compiled())
    assert kernels() == 2


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["", "other_"], ids=["the first head", "the other head"])
def test_what_nobody_needs_is_not_computed(frozen):
    given = heads(n=70, v=500)
    wanted = [name for name in given if name.startswith("other_") != (frozen == "other_")]
    compare(given, EVERY, attributes(), wanted=wanted, operator=compiled())
    assert kernels() == 2


@pytest.mark.slow
def test_close_and_equal_heads():
    operator = compiled()
    names = f"{LOWS} divergence other_divergence"
    for distance in (1e-1, 1e-2, 1e-3):
        compare(heads(close=distance), names, attributes(), wanted=list(heads()), operator=operator)
    given = {name: t.requires_grad_() for name, t in heads(close=0.0).items()}
    out = run(given, names, attributes(), operator=operator)
    assert not out["divergence"].any() and not out["other_divergence"].any()
    # Both send back p (log p - log q - 0), which is 0.
    (out["divergence"].sum() + out["other_divergence"].sum()).backward()
    assert not any(t.grad.any() for t in given.values())
    assert kernels() == 2


@pytest.mark.slow
def test_classes_without_mass():
    given = heads(n=40, v=400)
    given["bias"][:7] = given["other_bias"][:7] = -torch.inf
    wanted = [name for name in given if "bias" not in name]
    found = differentiate(given, EVERY, attributes(), wanted=wanted, operator=compiled())
    reference = differentiate(given, EVERY, attributes(), wanted=wanted)
    for name, value in reference.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_results_do_not_depend_on_who_computes_them(three_threads):
    given, operator = heads(n=700, d=40, v=3000), compiled()
    options = attributes(workspace=1 << 20)
    first, second = (differentiate(given, f"{LOWS} divergence", options, operator=operator) for _ in range(2))
    assert {threads for tasks, threads in three_threads() if tasks > 2} == {3}
    assert all(torch.equal(first[name], second[name]) for name in first)
    compare(given, f"{LOWS} divergence", options, operator=operator)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_scratch_is_bounded(frozen):
    n, d, v = 2000, 96, 6000
    given = {"input": torch.randn(n, d), "weight": torch.randn(v, d) * 0.1}
    given |= {"other_input": torch.randn(n, 24), "other_weight": torch.randn(v, 24) * 0.1}
    given = {name: t.bfloat16().requires_grad_(not (frozen and "other" in name)) for name, t in given.items()}
    options, operator = attributes(workspace=4 * MIB), compiled()

    def step() -> None:
        run(given, f"{LOWS} divergence", options, operator=operator)["divergence"].sum().backward()

    step()  # compiles
    for t in given.values():
        t.grad = None
    with Allocations() as memory:
        step()
    results = sum(t.nbytes for t in given.values() if t.requires_grad) + 64 * n * 8
    assert memory.peak <= 4 * MIB + results < given["input"].shape[0] * v * 2


@pytest.mark.slow
@pytest.mark.parametrize("early", [True, False])
def test_a_compiled_program(early):
    """Distillation as people write it, from a frozen teacher: by one kernel, or by two."""
    given = heads(n=64, v=800)
    leaves = {name: t.requires_grad_("other" not in name) for name, t in given.items()}

    def loss(input, weight, bias, other_input, other_weight, other_bias):
        z, r = F.linear(input, weight, bias) / 2, F.linear(other_input, other_weight, other_bias) / 2
        return F.kl_div(z.log_softmax(1), r.softmax(1), reduction="batchmean") * 4

    options = {"min_vocab": 0, "strict": True, "gradients_in_forward": early}
    function = torch.compile(loss, backend=cce_inductor.cce_backend, options=options)
    wanted = [t for t in leaves.values() if t.requires_grad]
    ours, theirs = ((value := fn(*leaves.values()), *torch.autograd.grad(value, wanted)) for fn in (function, loss))
    assert kernels() == (1 if early else 2)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, plain)
