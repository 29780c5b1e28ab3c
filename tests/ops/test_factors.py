"""Logits multiplied by a factor for each row and for each class: the eager implementation against all logits."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from head_oracle import Head, some_rows

from cce_inductor.ops.call import SCALES, Attributes
from cce_inductor.ops.library import FORWARD

sys.path.insert(0, str(Path(__file__).parent.parent / "lowering"))
from operators import EVERY, compare, differentiate, forward, from_logits

FACTORS = {"rows": (True, False), "classes": (False, True), "both": (True, True)}


@pytest.mark.parametrize("which", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics_and_gradients(which, dtype, small_tiles):
    for bias, masked, softcap in itertools.product((False, True), (False, True), (0.0, 5.0)):
        head = Head.make(dtype=dtype, bias=bias).with_factors(*FACTORS[which])
        mask = some_rows(head.x.shape[0]) if masked else None
        attributes = Attributes(scale=0.7, softcap=softcap)
        for names in (EVERY, "target_logit"):
            ours = differentiate(forward(names, attributes), head, names, row_mask=mask)
            compare(f"{which}, {names}", ours, head, names, attributes, row_mask=mask)


@pytest.mark.parametrize("needs", ["drow_scale", "dcolumn_scale", "drow_scale dcolumn_scale db"])
def test_gradients_of_factors_alone(needs, small_tiles):
    head, attributes = Head.make(bias=True).with_factors(), Attributes()
    every = differentiate(forward(EVERY, attributes), head, EVERY)
    some = differentiate(forward(EVERY, attributes), head, EVERY, needs)
    assert {*some} == {*EVERY.split(), *needs.split()}
    for name in needs.split():
        torch.testing.assert_close(some[name], every[name])


def test_second_derivatives_are_those_of_the_logits():
    head = Head.make(9, 5, 12, torch.float64, bias=True).with_factors()
    given = {name: t.detach().requires_grad_() for name, t in head.leaves().items()}

    def loss(fn, dx, dw, db, drow_scale, dcolumn_scale):
        out = fn(dx, dw, head.target, db, row_scale=drow_scale, column_scale=dcolumn_scale)
        return sum((t * (k + 1)).sum() for k, t in enumerate(out))

    names = "lse target_logit entropy"
    results = []
    for fn in (forward(names, Attributes()), from_logits(names, Attributes())):
        first = torch.autograd.grad(loss(fn, *given.values()), list(given.values()), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), list(given.values())))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(
    "name,shape,reason",
    [("row_scale", (3,), "one per row"), ("column_scale", (5,), "must be"), ("row_scale", (37, 1), "one")],
)
def test_a_factor_of_another_shape(name, shape, reason):
    head = Head.make()
    with pytest.raises(RuntimeError, match=reason):
        names = f"input weight target {name}"
        FORWARD([head.x, head.w, head.target, torch.ones(shape)], names, None, "lse", False, *Attributes().args())


@pytest.mark.parametrize("name", SCALES)
def test_no_filter_applies(name):
    head = Head.make().with_factors()
    attributes = Attributes(grad_filter="budget 0.01")
    with pytest.raises(RuntimeError, match="need the filter 'exact'"):
        names = f"input weight target {name}"
        FORWARD([head.x, head.w, head.target, getattr(head, name)], names, None, "lse", False, *attributes.args())
