"""The rule of Cut Cross-Entropy (arXiv 2411.09009), against a loop over the tiles of all logits."""

import pytest
import torch
from head_oracle import Head, error, logits

import cce_inductor
from cce_inductor import config
from cce_inductor.ops.call import Attributes
from cce_inductor.ops.library import BACKWARD, FORWARD

N, V = 300, 700


def peaked_head() -> Head:
    """Two tiles of columns that matter to nobody, and four where those that do are scattered."""
    torch.manual_seed(0)
    head = Head.make(N, 16, V, torch.float64, bias=True)
    head.w *= 0.5
    head.bias = torch.cat([torch.full((256,), -9.0), torch.linspace(-4, 14, V - 256)[torch.randperm(V - 256)]]).double()
    head.target = head.bias.topk(60).indices[torch.randint(0, 60, (N,))]
    return head


def tile_loop(head: Head, row_mask, tangents, eps: float, in_order: bool, scale: float, cap: float | None):
    """(gradients of x, w and bias; how many tiles are left out)."""
    rows = torch.arange(N) if row_mask is None else row_mask.nonzero()[:, 0]
    x, target = head.x[rows], head.target[rows]
    z = logits(x, head.w, head.bias, scale, cap)
    p = z.softmax(1)
    one_hot = torch.nn.functional.one_hot(target, V).double()
    g, h, s = (t[rows, None] for t in tangents)
    dz = g * p + h * one_hot
    order = z.mean(0).argsort(descending=True) if in_order else torch.arange(V)
    left_out = 0
    for first in range(0, len(rows), 128):
        for start in range(0, V, 128):
            block, columns = slice(first, first + 128), order[start : start + 128]
            if ((p - one_hot)[block, columns].abs() < eps).all():
                dz[block, columns] = 0
                left_out += 1
    dz = (dz + s) * scale
    if cap is not None:
        dz = dz * (1 - (z / cap) ** 2)
    dx = torch.zeros_like(head.x)
    dx[rows] = dz @ head.w
    return [dx, dz.T @ x, dz.sum(0)], left_out


@pytest.mark.parametrize("order", ["", " sorted"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "names,scale,cap", [("lse target_logit", 1.0, 20.0), ("lse target_logit logit_sum", 0.8, None)]
)
def test_gradients_are_those_of_the_tiles_that_count(order, masked, names, scale, cap, small_tiles):
    head, eps = peaked_head(), 1e-3
    row_mask = torch.arange(N) % 3 != 1 if masked else None
    attributes = Attributes(scale=scale, softcap=cap or 0.0, grad_filter=f"eps {eps}{order}").args()
    operands, operand_names = [head.x, head.w, head.bias, head.target], "input weight bias target"
    out = FORWARD(operands, operand_names, row_mask, names, True, *attributes)
    assert len(out) == len(names.split()), "nothing but the statistics is left behind"
    tangents = [torch.randn(N, dtype=torch.float64) for _ in range(3)]
    if "logit_sum" not in names:
        tangents[2][:] = 0
    ours = BACKWARD(
        tangents[: len(out)], names, out, operands, operand_names, row_mask, names, "input weight bias", *attributes
    )
    expected, left_out = tile_loop(head, row_mask, tangents, eps, bool(order), scale, cap)
    tiles = 18 if row_mask is None else 12
    assert 0 < left_out < tiles
    for one, want in zip(ours, expected, strict=True):
        assert error(one, want) < 1e-13


def test_sorting_leaves_out_more():
    head, tangents = peaked_head(), [torch.ones(N, dtype=torch.float64)] * 3
    natural, sorted = (tile_loop(head, None, tangents, 1e-3, in_order, 1.0, None)[1] for in_order in (False, True))
    assert natural < sorted


def test_a_tile_of_rows_that_know_their_target_is_left_out():
    """Target and all, as in the paper: both of its parts of the gradient are small."""
    head = Head.make(128, 16, 256, torch.float64)
    head.x, head.target[:] = torch.ones(128, 16).double(), 200
    head.w[:], head.w[200] = 0, 2.0
    x, w = head.x.requires_grad_(), head.w.requires_grad_()
    for eps, dropped in ((1e-3, True), (1e-15, False)):
        with config.patch(grad_filter=("eps", eps)):
            loss = cce_inductor.linear_cross_entropy(x, w, head.target, reduction="sum")
        dx, dw = torch.autograd.grad(loss, [x, w])
        assert (not dx.any() and not dw.any()) == dropped


def test_a_row_of_nan_is_not_left_out():
    head = peaked_head()
    head.x[5] = torch.nan
    x, w = head.x.requires_grad_(), head.w.requires_grad_()
    with config.patch(grad_filter=("eps", 0.5, "sorted")):
        loss = cce_inductor.linear_cross_entropy(x, w, head.target, reduction="sum")
    dx, dw = torch.autograd.grad(loss, [x, w])
    assert dx[5].isnan().all() and dw.isnan().all() and dx[200:].isfinite().all()
