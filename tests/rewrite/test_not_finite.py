"""Logits that are not finite: NaN and infinities stand where eager has them, in the value and in every gradient.

A grid of programs and troubles (troubles.py), with what differs by design (README.md).
Here the operators' eager implementation runs the rewritten programs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from against_eager import SETTINGS
from head_oracle import Head, cross_entropy
from troubles import IGNORED, PROGRAMS, TROUBLES, compare, data, run

from cce_inductor import backend, linear_cross_entropy, record

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Rounded to 16 bits, other logits are equal, and of equal ones the first counts.
OF_THE_LARGEST = ("argmax", "largest logit")


def rewritten(fn: Callable, settings=SETTINGS) -> Callable:
    def compiler(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        return backend.compile_graph(gm, inputs, settings, lambda rewritten, _: rewritten.forward)

    torch._dynamo.reset()
    return torch.compile(fn, backend=compiler, dynamic=False)


def differs(program: str, trouble: str, dtype: torch.dtype) -> bool:
    """Whether a pair is one of the differences that have a test of their own below."""
    overflows = "overflows" in trouble and dtype != torch.float32
    barred = "entropy" in program and ("-inf" in trouble and "bias" in trouble and "everywhere" not in trouble)
    return overflows or barred or trouble.startswith("weight")


def check(program: str, dtype: torch.dtype, settings=SETTINGS, rows: int = 12, tolerance: float = 0.0) -> None:
    fn = PROGRAMS[program]
    wrong = {}
    with record.collect() as graphs:
        compiled = rewritten(fn, settings)
        for trouble, change in TROUBLES.items():
            if not differs(program, trouble, dtype):
                tensors = data(dtype, rows)
                change(tensors)
                found = compare(run(compiled, tensors), run(fn, tensors), max(tolerance, TOLERANCE[dtype]))
                wrong |= {trouble: found} if found else {}
    assert all(site.fused for graph in graphs for site in graph.sites) and graphs[0].sites
    assert wrong == {}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("program", PROGRAMS)
def test_as_in_eager(program, dtype):
    if program in OF_THE_LARGEST and dtype != torch.float32:
        pytest.skip("other logits are equal in eager")
    check(program, dtype)


@pytest.mark.parametrize("kind", ["budget 0.01", "unbiased 0.01", "eps 0.0002"])
@pytest.mark.parametrize("program", ["mean", "none", "label smoothing", "logsumexp - target"])
def test_as_in_eager_under_a_filter(program, kind):
    """In two blocks of rows, of which one has no trouble."""
    check(program, torch.float32, replace(SETTINGS, grad_filter=kind), rows=200, tolerance=0.05)


def test_a_weight_that_is_not_finite_leaves_ignored_rows_alone():
    """To see what it does to them would take a pass over the weight. Every other row, and dW, is as in eager."""
    compiled, fn = rewritten(PROGRAMS["mean"]), PROGRAMS["mean"]
    for value in (torch.nan, torch.inf, -torch.inf):
        tensors = data(torch.float32)
        tensors[1][35, 2] = value
        ours, eager = run(compiled, tensors), run(fn, tensors)
        ignored = tensors[3] == IGNORED
        assert not ours["dx"][ignored].any() and eager["dx"][ignored].isnan().any()
        ours["dx"][ignored] = eager["dx"][ignored]
        assert compare(ours, eager, 1e-5) == []


def test_logits_beyond_float16_do_not_overflow():
    tensors, wide = data(torch.float16), data(torch.float64)
    for x, w, *_ in (tensors, wide):
        x[7], w[35, 0] = 0, 64.0
        x[7, 0] = 4096.0
    tensors[3][7] = wide[3][7] = 35
    ours, eager = run(rewritten(PROGRAMS["mean"]), tensors), run(PROGRAMS["mean"], tensors)
    exact = run(lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b), t, ignore_index=IGNORED), wide)
    assert eager["value"].isnan() and eager["dw"].isnan().all()
    assert ours["value"].isfinite() and abs(ours["value"] / exact["value"] - 1) < 0.05


def test_the_entropy_of_barred_classes_is_that_of_the_others():
    """In eager 0 * -inf is NaN."""
    fn = PROGRAMS["entropy"]
    tensors = data(torch.float32)
    tensors[2][[33, 35]] = -torch.inf
    left = [i for i in range(40) if i not in (33, 35)]
    rest = [tensors[0], tensors[1][left], tensors[2][left], tensors[3]]
    ours, want = run(rewritten(fn), tensors), run(fn, rest)
    assert run(fn, tensors)["value"].isnan().all()
    assert not ours["dw"][[33, 35]].any()
    ours |= {"dw": ours["dw"][left], "db": ours["db"][left]}
    assert compare(ours, want, 1e-5) == []


@pytest.mark.parametrize("arguments", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"z_loss": 0.01}], ids=str)
def test_the_direct_call(arguments):
    for change in TROUBLES.values():
        x, w, b, t = tensors = data(torch.float32)
        change(tensors)
        if not w.isfinite().all():
            continue
        head = Head(x, w, t, b)
        ours = head.gradients(linear_cross_entropy, ignore_index=IGNORED, **arguments)
        eager = head.gradients(cross_entropy, ignore_index=IGNORED, **arguments)
        assert compare(ours, eager, 1e-5) == []
