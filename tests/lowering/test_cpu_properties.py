"""The error rule, as a property of the CPU kernels: shapes, strides, dtypes, ignored rows and extreme logits at random.

Each configuration is one dynamic kernel per pass, compiled once; sizes of 1, which Dynamo compiles apart, are in
test_cpu.py and test_cpu_with_gradients.py.
"""

import functools

import pytest
import torch
from head_oracle import Head, check_error_rule
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators import LOSS, Operator, differentiate, from_logits

from cce_inductor.ops.call import Attributes

pytestmark = pytest.mark.usefixtures("lowerings")

# name: dtype, compute dtype, whether gradients are formed in the forward, whether operands are strided
CONFIGURATIONS = {
    "float32, strided": (torch.float32, None, False, True),
    "float32, gradients in the forward": (torch.float32, None, True, False),
    "bfloat16, strided": (torch.bfloat16, None, False, True),
    "bfloat16, gradients in the forward": (torch.bfloat16, None, True, False),
    "float32 in bfloat16, gradients in the forward": (torch.float32, torch.bfloat16, True, False),
    "float16": (torch.float16, None, False, False),
}
# One of each dtype and of each form; the others are slow tests.
OFTEN = ("float32, strided", "bfloat16, gradients in the forward")
# 1 MiB: blocks, slabs and chunks are several at the larger sizes.
WORKSPACE = 1 << 20


def results(run):
    """(tangents, x, w, bias, target, row_mask) -> lse, target_logit, dx, dw, db."""

    def call(tangents, x, w, bias, target, row_mask):
        return run(Head(x, w, target, bias), tangents=tangents, row_mask=row_mask).values()

    return call


@functools.cache
def compiled(configuration: str):
    _, compute, early, _ = CONFIGURATIONS[configuration]
    return results(Operator(LOSS, at_once=early, dynamic=True, compute_dtype=compute, workspace=WORKSPACE).run)


plain = results(functools.partial(differentiate, from_logits(LOSS, Attributes()), names=LOSS))


def _large(head: Head) -> None:
    head.bias[::7], head.bias[3::7] = 1e4, -1e4


def _ties(head: Head) -> None:
    half = head.w.shape[0] // 2
    head.w[half : 2 * half], head.bias[half : 2 * half] = head.w[:half], head.bias[:half]


def _masked(head: Head) -> None:
    head.bias[::3] = -torch.inf
    head.target = (head.target // 3 * 3 + 1).clamp(max=head.w.shape[0] - 1)
    head.bias[-1] = 0


def _nan_row(head: Head) -> None:
    head.x[head.x.shape[0] // 2] = torch.nan


def _confident(head: Head) -> None:
    head.bias[head.target[::2]] += 20


KINDS = {"normal": lambda head: None, "1e4": _large, "ties": _ties, "-inf columns": _masked, "NaN row": _nan_row,
         "confident": _confident}  # fmt: skip


def size(most: int, least: int = 2):
    """A size: small, prime, one beside the kernels' own units, or anything."""
    edges = [2, 3, 5, 7, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 131, 257, 509]
    return st.sampled_from([e for e in edges if least <= e <= most]) | st.integers(least, most)


# `derandomize` draws the examples from the text of this function: an edit draws others.
@pytest.mark.parametrize(
    "configuration", [pytest.param(c, marks=() if c in OFTEN else pytest.mark.slow) for c in CONFIGURATIONS]
)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
# Errors are compared with eager's: of a handful of numbers those may be nearly 0 by luck, and what is drawn depends on
# hypothesis's version.
@given(n=size(700, 15), d=size(150), v=size(3000, 15), kind=st.sampled_from(sorted(KINDS)), some=st.integers(0, 3))
def test_error_rule(configuration, n, d, v, kind, some):
    dtype, compute, _, strided = CONFIGURATIONS[configuration]
    head = Head.make(n, d, v, dtype, bias=True, seed=n + d + v)
    KINDS[kind](head)
    if strided:
        head.x = head.x.repeat(1, 2)[:, ::2]
        head.w = head.w.t().contiguous().t()
    row_mask = torch.arange(n) % 4 >= some
    generator = torch.Generator().manual_seed(7)
    tangents = [(torch.rand(n, generator=generator) - 0.4) / n for _ in range(2)]

    def of(fn, head):
        out = fn(tangents, head.x, head.w, head.bias, head.target, row_mask)
        return dict(zip(["lse", "target_logit", "dx", "dw", "db"], out, strict=True))

    ours = of(compiled(configuration), head)
    eager, exact = of(plain, head if compute is None else head.to(compute)), of(plain, head.to(torch.float64))
    if kind == "NaN row" and not row_mask[n // 2]:
        # Eager multiplies the row's NaN by 0; a row that does not count leaves no trace here.
        assert all(t.isfinite().all() for t in ours.values())
        return
    check_error_rule(f"{configuration}: ({n}, {d}, {v}), {kind}", ours, eager, exact, compute or dtype)
