"""Scratch memory: what the operators allocate besides their results stays within the workspace, at any N and V."""

import math

import pytest
import torch
from allocations import Allocations
from head_oracle import Head

import cce_inductor
from cce_inductor.ops import reference
from cce_inductor.ops.call import Attributes
from cce_inductor.ops.library import BACKWARD, FORWARD

N, D, V = 2048, 64, 50_000
MIB = 1 << 20


def test_the_meter_sees_temporaries():
    with Allocations() as a:
        t = torch.ones(1000, 1000)
        (t + 1).sum()
    assert 8_000_000 <= a.peak < 8_100_000 and a.largest == 4_000_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workspace_mb", [8, 64])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_loss_and_gradients(dtype, workspace_mb, softcap):
    head = Head.make(N, D, V, dtype)
    head.target[:100] = -100
    x, w = head.x.requires_grad_(), head.w.requires_grad_()
    accumulator = 0 if dtype == torch.float32 else N * D * 4
    vectors = 64 * N * 8
    gradients = x.nbytes + w.nbytes
    with cce_inductor.config.patch(workspace_mb=workspace_mb):
        cce_inductor.linear_cross_entropy(x[:64], w, head.target[:64], softcap=softcap).backward()  # warm up
        x.grad = w.grad = None
        with Allocations() as forward:
            loss = cce_inductor.linear_cross_entropy(x, w, head.target, softcap=softcap)
        with Allocations() as backward:
            loss.backward()
    assert forward.peak <= workspace_mb * MIB + vectors
    assert backward.peak <= workspace_mb * MIB + gradients + accumulator + vectors
    assert max(forward.largest, backward.largest) <= max(workspace_mb * MIB, w.nbytes) < N * V * dtype.itemsize


WORKSPACE = MIB
SHAPES = {"long": (4000, 16, 300), "wide": (40, 16, 60_000), "deep": (64, 3000, 500), "balanced": (500, 200, 5000)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "dtype,compute_dtype",
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16), (torch.float64, None)],
    ids=str,
)
@pytest.mark.parametrize(
    "names,attributes,masked",
    [
        ("lse target_logit", {}, False),
        ("lse target_logit", {}, True),
        ("lse logit_sum entropy", {"softcap": 5.0}, True),
    ],
    ids=["loss", "row_mask", "entropy"],
)
def test_operators_at_a_tiny_workspace(shape, dtype, compute_dtype, names, attributes, masked, monkeypatch):
    check_tiny_workspace(shape, dtype, compute_dtype, names, attributes, masked, monkeypatch)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "names,attributes,masked",
    [
        ("lse target_logit logit_sum", {"grad_filter": "budget 0.01"}, True),
        ("lse target_logit", {"grad_filter": "unbiased 0.01", "softcap": 5.0}, False),
        ("lse target_logit", {"grad_filter": "eps 0.001"}, False),
    ],
    ids=["budget", "unbiased", "eps"],
)
@pytest.mark.slow
def test_filters_at_a_tiny_workspace(shape, dtype, names, attributes, masked, monkeypatch):
    check_tiny_workspace(shape, dtype, None, names, attributes, masked, monkeypatch)


def check_tiny_workspace(shape, dtype, compute_dtype, names, attributes, masked, monkeypatch):
    monkeypatch.setattr(reference, "SLAB_COLUMNS", math.inf)  # the workspace alone decides
    n, d, v = SHAPES[shape]
    head = Head.make(n, d, v, dtype)
    row_mask = torch.arange(n) % 2 == 0 if masked else None
    attributes = dict(attributes, compute_dtype=compute_dtype, workspace=WORKSPACE)
    vectors = 64 * n * 8
    operands, operand_names = [head.x, head.w, head.target, torch.tensor([5])], "input weight target seed"
    arguments = Attributes(**attributes).args()
    with Allocations() as forward:
        out = FORWARD(operands, operand_names, row_mask, names, True, *arguments)
    bound = sum(t.nbytes for t in out[len(names.split()) :])
    assert forward.peak <= WORKSPACE + vectors + bound
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    tangents = [torch.ones_like(t) for t in out[: len(names.split())]]
    arguments = (tangents, names, out, operands, operand_names, row_mask, names, "input weight", *arguments)
    with Allocations() as backward:
        BACKWARD(*arguments)
    accumulator = 0 if dtype == accumulate else n * d * accumulate.itemsize
    assert backward.peak <= WORKSPACE + head.x.nbytes + head.w.nbytes + accumulator + vectors
