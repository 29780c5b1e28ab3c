"""The C++ kernels with a weight of int8, which has no gradient."""

import pytest
import torch
import torch.nn.functional as F
from head_oracle import some_rows
from operators import EVERY, LOSS, Operator, kernels
from test_codes import NEEDS, quantised

import cce_inductor

pytestmark = pytest.mark.usefixtures("lowerings")


def test_every_option_in_many_blocks_and_slabs():
    head = quantised(torch.float32, True, True, n=300, d=90, v=1003, bias=True)
    operator = Operator(EVERY, scale=0.7, softcap=5.0, workspace=1 << 20)
    operator.check("float32", head, needs=NEEDS, column_weight=torch.rand(1003), row_mask=some_rows(300))
    assert kernels() == 2


@pytest.mark.slow
def test_bfloat16_transposed_and_strided():
    head = quantised(torch.bfloat16, n=130, d=71, v=2500)
    head.w = head.w.t().contiguous().t()
    head.x = head.x.repeat(1, 2)[:, ::2]
    Operator(LOSS).check("bfloat16", head, needs=NEEDS)
    assert kernels() == 2


@pytest.mark.slow
def test_gradients_in_the_forward():
    """In one chunk, and in several."""
    for dtype, workspace in ((torch.float32, 1 << 20), (torch.bfloat16, 64 << 20)):
        head = quantised(dtype, n=500, d=90, v=1003, bias=True)
        operator = Operator(LOSS, at_once=True, workspace=workspace)
        operator.check(f"{dtype}", head, row_mask=some_rows(500), needs=NEEDS)
    assert kernels() == 2


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [False, True])
def test_a_compiled_program_with_a_budget(at_once):
    """What it drops is within the budget."""
    head = quantised(classes=False, n=300, d=40, v=1500, bias=True)
    given = [head.x.requires_grad_(), head.bias.requires_grad_()]

    def loss(x, bias):
        return F.cross_entropy(F.linear(x, head.w.to(x.dtype), bias) * 0.05, head.target)

    options = {"min_vocab": 0, "grad_filter": 0.02, "gradients_in_forward": at_once}
    compiled = torch.compile(loss, backend=cce_inductor.cce_backend, options=options)
    results = [(value := fn(*given), *torch.autograd.grad(value, given)) for fn in (compiled, loss)]
    assert kernels() == 2 - at_once
    (ours, dx, db), (theirs, *exact) = results
    torch.testing.assert_close(ours, theirs)
    for mine, want in zip((dx, db), exact, strict=True):
        assert 0 < (mine - want).norm() / want.norm() < 0.05
