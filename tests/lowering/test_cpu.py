"""The CPU kernels, compiled by Inductor, against float64 and the eager reference.

A kernel takes some ten seconds to compile, so each configuration here covers several options at once.
"""

import pytest
import torch
import torch.nn.functional as F
from head_oracle import Head, error, some_rows
from operators import EVERY, LOSS, Operator, differentiate, forward, kernels
from test_memory import Allocations

import cce_inductor
from cce_inductor.lowering import cpu, cpu_template, unsupported

pytestmark = pytest.mark.usefixtures("lowerings")


def test_every_option_float32_and_any_number_of_rows():
    operator = Operator(EVERY, dynamic=True, scale=0.7, softcap=5.0, workspace=1 << 18)
    for n in (137, 53, 300):
        head = Head.make(n, 100, 1003, bias=True, seed=n)
        tensors = {"column_weight": torch.rand(1003), "row_mask": some_rows(n)}
        operator.check(f"{n} rows", head, **tensors)
    assert kernels() == 2
    again = [operator.run(head, **tensors) for _ in range(2)]
    assert all(torch.equal(again[0][name], again[1][name]) for name in again[0])


@pytest.mark.slow
def test_the_softcap_by_a_root():
    """Small logits, logits far beyond it, and infinite ones, which a program that squares them makes NaN."""
    operator = Operator(EVERY, scale=0.7, softcap=5.0, softcap_form="rsqrt", workspace=1 << 18)
    tensors = {"column_weight": torch.rand(1003), "row_mask": some_rows(137)}
    for times in (1.0, 50.0):
        head = Head.make(137, 100, 1003, bias=True)
        head.x *= times
        operator.check(f"times {times}", head, **tensors)
    head.bias[3], head.bias[700:] = torch.inf, -1e25
    infinite = operator.run(head, **tensors)
    head.bias[3], head.bias[700:] = 1e8, -1e8
    finite = operator.run(head, **tensors)
    for name, value in infinite.items():
        assert value.isfinite().all() and error(value, finite[name]) < 1e-5, name
    assert not infinite["db"][700:].any() and not infinite["db"][3]
    assert kernels() == 2


def test_bfloat16_transposed_weight():
    head = Head.make(130, 70, 2500, torch.bfloat16)
    head.w = head.w.t().contiguous().t()
    Operator(LOSS).check("bfloat16", head)
    assert kernels() == 2


@pytest.mark.slow
def test_float16_frozen_trunk_and_strided_rows():
    head = Head.make(96, 33, 300, torch.float16, bias=True)
    head.x = head.x.repeat(1, 2)[:, ::2]
    Operator(LOSS).check("float16", head, needs="dw db")
    assert kernels() == 2


@pytest.mark.slow
def test_float32_weights_in_bfloat16():
    """What autocast asks for: rounded operands, and a gradient of the weight in fp32."""
    head = Head.make(64, 48, 500, bias=True)
    Operator(LOSS, compute_dtype=torch.bfloat16).check("autocast", head)
    assert kernels() == 2


SHAPES = {
    # These share one graph; a size of 1 is compiled for itself.
    "any": [(131, 7, 3), (7, 17, 1031), (257, 31, 509), (2100, 5, 6)],
    "of one row": [(1, 16, 131)],
    "of width one": [(37, 1, 131)],
    "of one column": [(37, 16, 1)],
    "one of everything": [(1, 1, 1)],
}


@pytest.mark.parametrize("kind", [k if k == "any" else pytest.param(k, marks=pytest.mark.slow) for k in SHAPES])
def test_shapes(kind):
    operator = Operator(LOSS, dynamic=True)
    with torch._dynamo.config.patch(specialize_int=False, assume_static_by_default=False):
        for shape in SHAPES[kind]:
            operator.check(str(shape), Head.make(*shape, bias=True))


def extreme_heads() -> dict[str, Head]:
    large, ties, masked, nan, blind = (Head.make(40, 16, 131, bias=True, seed=s) for s in range(5))
    large.bias[::7], large.bias[3::7] = 1e4, -1e4
    ties.w[5] = ties.w[60] = ties.w[130] = 100 * ties.x.mean(0)
    ties.bias[[5, 60, 130]] = 0
    masked.bias[::3] = -torch.inf
    nan.x[4, 3] = torch.nan
    blind.bias[:] = -torch.inf
    return {"1e4": large, "ties": ties, "-inf columns": masked, "NaN row": nan, "-inf everywhere": blind}


def test_extreme_logits_as_the_reference():
    operator = Operator("lse target_logit entropy argmax")
    reference = forward(operator.names, operator.attributes)
    for case, head in extreme_heads().items():
        ours, want = operator.run(head), differentiate(reference, head, operator.names)
        for name, value in want.items():
            difference = (ours[name] != value).sum() if name == "argmax" else error(ours[name], value)
            # Entropy is a difference of logits: of numbers around 1e4, seven digits leave three.
            assert difference <= (2e-3 if case == "1e4" else 2e-6), f"{case}: {name} differs by {difference}"


def test_a_statistic_that_no_template_computes_is_left_to_the_eager_implementation(monkeypatch):
    """Kernels of both passes would leave out what they do not know of, and say nothing."""
    monkeypatch.setattr(unsupported, "STATISTICS", ("lse", "target_logit"))
    for at_once in (False, True):
        Operator(EVERY, at_once=at_once).check("none but the loss's", Head.make(20, 16, 300))
    assert kernels() == 0
    Operator(LOSS).check("the loss's", Head.make(20, 16, 300))
    assert kernels() == 2


@pytest.mark.slow
def test_loss_alone_with_rows_ignored_and_targets_out_of_bounds():
    """Unused outputs, a pointwise consumer of the only one in use, and the checks of the targets."""
    compiled = torch.compile(lambda x, w, t: cce_inductor.linear_cross_entropy(x, w, t, reduction="none") * 2)
    head = Head.make(50, 16, 1000)
    head.target[::4] = -100
    want = F.cross_entropy(F.linear(head.x, head.w), head.target, reduction="none") * 2
    with torch.no_grad():
        torch.testing.assert_close(compiled(head.x, head.w, head.target), want)
        assert kernels() == 1
        for wrong in (-1, 1000, 2**40):
            head.target[11] = wrong
            with pytest.raises((IndexError, RuntimeError), match=f"Target {wrong} is out of bounds.*1000 classes"):
                compiled(head.x, head.w, head.target)
        head.target[:] = -100
        assert compiled(head.x, head.w, head.target).count_nonzero() == 0
        lse_only = torch.compile(lambda x, w, t: cce_inductor.linear_logsumexp(x, w, t)[0].exp())
        head = Head.make(50, 16, 1000)
        torch.testing.assert_close(
            lse_only(head.x, head.w, head.target), F.linear(head.x, head.w).logsumexp(1).exp(), rtol=1e-5, atol=0
        )


def test_views_of_one_buffer():
    """Input and weight may lie in one tensor, at offsets of their own."""

    def fn(both, t):
        both = both * 2
        return cce_inductor.linear_cross_entropy(both[:40, 1:], both[40:, :-1], t)

    both = torch.randn(340, 25, requires_grad=True)
    target = torch.randint(300, (40,))
    value = torch.compile(fn)(both, target)
    want = F.cross_entropy(F.linear((both * 2)[:40, 1:], (both * 2)[40:, :-1]), target)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(torch.autograd.grad(value, both), torch.autograd.grad(want, both), rtol=1e-4, atol=2e-6)
    assert kernels() == 2


def test_float64_runs_the_eager_implementation():
    head = Head.make(20, 8, 60, torch.float64)
    Operator(LOSS).check("float64", head)
    assert kernels() == 0


def test_scratch_stays_within_the_workspace():
    n, d, v, workspace = 3000, 320, 9000, 4 << 20
    compiled = Operator(LOSS, workspace=workspace).compiled
    head = Head.make(n, d, v, torch.bfloat16)
    head.w = head.w.t().contiguous().t()
    x, w = head.x.requires_grad_(), head.w.requires_grad_()
    tangents = [torch.rand(n) for _ in range(2)]
    for _ in range(2):  # the first time compiles
        with Allocations() as forward:
            out = compiled(x, w, head.target)
        with Allocations() as backward:
            torch.autograd.backward(out, tangents, inputs=[x, w])
        gradients, x.grad, w.grad = x.nbytes + w.nbytes, None, None
    vectors = 16 * n * 4
    assert kernels() == 2
    assert forward.peak <= workspace + vectors
    assert backward.peak <= workspace + vectors + gradients + n * d * 4
    assert max(forward.largest, backward.largest) < n * v  # never the logits, in any dtype


def test_three_threads(three_threads):
    head = Head.make(137, 71, 1003, bias=True)
    operator = Operator(LOSS, workspace=1 << 18)
    operator.check_threads("three threads", head, three_threads, row_mask=some_rows(137))
    assert kernels() == 2


# A plain loop with the signature of at::native::cpublas::brgemm.
NAIVE_BRGEMM = r"""
#include <c10/util/BFloat16.h>
#ifndef NAIVE_BRGEMM
#define NAIVE_BRGEMM
namespace naive {
template <typename T>
void brgemm(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const T* a, const T* b, float* c,
    bool vnni) {
  const int64_t pair = sizeof(T) == 2 ? 2 : 1;
  TORCH_CHECK(vnni == (pair == 2) && k % pair == 0);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = add ? c[i * ldc + j] : 0.f;
      for (int64_t p = 0; p < k; ++p)
        sum += static_cast<float>(a[i * lda + p]) * static_cast<float>(b[(p / pair * ldb + j) * pair + p % pair]);
      c[i * ldc + j] = sum;
    }
}
inline void brgemm_release(bool) {}
}  // namespace naive
#endif
"""


@pytest.fixture
def as_on_avx512(edit_template, monkeypatch):
    """The templates' path for CPUs with AVX-512: its panels and tiles, and a plain loop in the place of its GEMM."""
    edit_template("tiles.cpp.jinja", "#if defined(CPU_CAPABILITY_AVX512)", "#if 1")
    header = cpu_template._Template.header

    def with_naive(self):
        lines = header(self)
        lines.splice(NAIVE_BRGEMM)
        return lines

    monkeypatch.setattr(cpu_template._Template, "header", with_naive)
    monkeypatch.setattr(cpu_template, "BRGEMM", "naive::brgemm")
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_the_kernels_of_avx512_on_any_cpu(dtype, as_on_avx512):
    operator = Operator(LOSS, scale=1.5, softcap=20.0, workspace=1 << 18)
    head = Head.make(133, 71, 1001, dtype, bias=True)
    if dtype == torch.bfloat16:
        head.w = head.w.t().contiguous().t()
    operator.check("AVX-512", head, row_mask=some_rows(133))
    # A confident row: p of the target is 1 to the last bit of bfloat16, and its gradient must survive.
    head.bias[head.target] += 12
    operator.check("confident rows", head, row_mask=some_rows(133))
    assert kernels() == 2


@pytest.mark.slow
def test_cpp_wrapper_and_max_autotune():
    head = Head.make(64, 33, 301, bias=True)
    with torch._inductor.config.patch(cpp_wrapper=True, max_autotune=True):
        Operator(LOSS).check("cpp_wrapper", head)
        assert kernels() == 2
        head.target[5] = 301
        with pytest.raises((IndexError, RuntimeError), match="Target 301 is out of bounds"):
            Operator(LOSS).run(head)


@pytest.mark.slow
def test_logits_far_apart_behind_a_wide_softcap_in_16_bits(as_on_avx512):
    """What is kept for the second pass says of a logit 64 or more below the largest only that: its slope is lost."""
    for form, names in (("tanh", LOSS), ("rsqrt", f"{LOSS} logit_sum")):
        head = Head.make(133, 71, 1001, torch.bfloat16, bias=True)
        head.w *= 16
        operator = Operator(names, at_once=True, scale=1.5, softcap=60.0, softcap_form=form)
        operator.check(form, head, row_mask=some_rows(133))


@pytest.mark.parametrize(
    "dtype,workspace,at_once",
    [
        (torch.float32, 1 << 20, False),  # many blocks and slabs
        pytest.param(torch.bfloat16, 4 << 20, True, marks=pytest.mark.slow),
        pytest.param(torch.float32, 64 << 20, False, marks=pytest.mark.slow),  # one of each
        pytest.param(torch.float32, 4 << 20, True, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 64 << 20, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 1 << 20, False, marks=pytest.mark.slow),
    ],
)
def test_factors_of_rows_and_of_classes(dtype, workspace, at_once):
    wide = dtype == torch.float32
    head = Head.make(300, 90, 1003, dtype, bias=wide).with_factors()
    operator = Operator(EVERY, at_once, scale=0.7, softcap=5.0 if wide else 0.0, workspace=workspace)
    operator.check("factors", head, row_mask=some_rows(300))


@pytest.mark.slow
def test_factors_and_frozen_operands():
    operator = Operator(LOSS)
    head = Head.make(300, 90, 1003).with_factors()
    every, some = operator.run(head), operator.run(head, "drow_scale dcolumn_scale")
    assert all(torch.equal(some[name], every[name]) for name in some) and "dw" not in some
    for which in ((True, False), (False, True)):
        operator.check("one kind", Head.make(130, 40, 500).with_factors(*which))
