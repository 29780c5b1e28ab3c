"""A weight of int8, which is read in place: the eager implementations against all logits, and against a copy of it."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from head_oracle import Head, call_forward, operands, some_rows

import cce_inductor
from cce_inductor.ops.call import Attributes
from cce_inductor.ops.library import BACKWARD, FORWARD
from cce_inductor.ops.ranking import RANKING

sys.path.insert(0, str(Path(__file__).parent.parent / "lowering"))
from operators import EVERY, LOSS, compare, differentiate, forward, with_gradients

NEEDS = "dx db drow_scale dcolumn_scale"


def quantised(dtype=torch.float32, rows=False, classes=True, **how) -> Head:
    """A head with codes, and factors that make its logits as large as others' are."""
    head = Head.make(dtype=dtype, **how).with_factors(rows, classes).with_codes()
    return head if head.column_scale is None else replace(head, column_scale=head.column_scale / 30)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_statistics_and_gradients(dtype, small_tiles):
    for bias, masked, factors in itertools.product((False, True), (False, True), ((False, True), (True, True))):
        head = quantised(dtype, *factors, bias=bias)
        mask = some_rows(head.x.shape[0]) if masked else None
        attributes = Attributes(scale=0.7, softcap=5.0 if masked else 0.0)
        for names in (EVERY, "target_logit", "lse_rest target_logit"):
            ours = differentiate(forward(names, attributes), head, names, NEEDS, row_mask=mask)
            compare(names, ours, head, names, attributes, needs=NEEDS, row_mask=mask)


def test_without_factors_and_in_another_compute_dtype(small_tiles):
    for dtype in (None, torch.bfloat16, torch.float16):
        head, attributes = quantised(classes=False, bias=True), Attributes(scale=0.02, compute_dtype=dtype)
        ours = differentiate(forward(EVERY, attributes), head, EVERY, NEEDS)
        compare(f"{dtype}", ours, head, EVERY, attributes, needs=NEEDS)


def test_autocast_gives_the_compute_dtype():
    head = quantised(classes=False)
    with torch.autocast("cpu", torch.bfloat16):
        ours = call_forward(head, LOSS, scale=0.02)
    explicit = call_forward(head, LOSS, scale=0.02, compute_dtype=torch.bfloat16)
    assert all(map(torch.equal, ours, explicit)) and not torch.equal(ours[0], call_forward(head, LOSS, scale=0.02)[0])


def as_floats(head: Head) -> Head:
    return replace(head, w=head.w.to(head.x.dtype))


@pytest.mark.parametrize("grad_filter", ["budget 0.05", "unbiased 0.05", "eps 0.01", "eps 0.01 sorted"])
def test_filters(grad_filter):
    attributes, given = Attributes(scale=0.05, grad_filter=grad_filter), {}
    if "unbiased" in grad_filter:
        given["seed"] = torch.tensor([7])

    def run(head):
        x, w, bias = head.x.clone().requires_grad_(), head.w, head.bias.clone().requires_grad_()
        tensors = operands(x, w, head.target, bias) | given
        lse, target_logit = FORWARD([*tensors.values()], " ".join(tensors), None, LOSS, False, *attributes.args())
        return lse, *torch.autograd.grad((lse - target_logit).sum(), [x, bias])

    head = quantised(classes=False, bias=True)
    for ours, theirs in zip(run(head), run(as_floats(head)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_in_the_forward():
    head, attributes = quantised(bias=True), Attributes()
    tangents = [torch.linspace(-1, 1, len(head.target)), torch.linspace(0, 1, len(head.target))]
    call = with_gradients(LOSS, attributes)
    given = head.target, head.bias

    def gradients(w, **how):
        return call(tangents, head.x, w, *given, column_scale=head.column_scale, **how)

    with pytest.raises(RuntimeError, match="int8 has no gradient"):
        gradients(head.w, needs="input weight")
    found = gradients(head.w)
    lse, target_logit, dx, _, *others = gradients(as_floats(head).w)
    for ours, theirs in zip(found, (lse, target_logit, dx, *others), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives():
    head = Head.make(9, 5, 12, torch.float64, bias=True).with_factors().with_codes()
    head = replace(head, column_scale=head.column_scale / 30)
    results = []
    for one in (head, as_floats(head)):
        x = one.x.clone().requires_grad_()
        factors = {"row_scale": one.row_scale, "column_scale": one.column_scale}
        out = forward("lse entropy", Attributes())(x, one.w, one.target, one.bias, **factors)
        (first,) = torch.autograd.grad(sum(t.sum() for t in out), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x))
    torch.testing.assert_close(*results)


def test_rankings():
    head = quantised(torch.bfloat16, classes=False)
    every = [
        RANKING(
            [head.x, w, head.target], "input weight target", "values indices gt", 3, 0.02, 0.0, "tanh", torch.bfloat16,
            torch.float32, 1 << 14, "",
        )
        for w in (head.w, as_floats(head).w)
    ]  # fmt: skip
    assert all(map(torch.equal, *every))


def test_direct_calls():
    head = quantised(classes=False)
    one, other = (cce_inductor.linear_cross_entropy(head.x, w, head.target) for w in (head.w, as_floats(head).w))
    torch.testing.assert_close(one, other)


WRONG = {
    "other integers": (
        {"w": torch.zeros(131, 16, dtype=torch.int16)},
        {},
        "floating point or int8, got torch.int16",
    ),
    "hidden states of int8": ({"x": torch.zeros(37, 16, dtype=torch.int8)}, {}, "input must be floating point, got"),
    "computed in int8": ({}, {"compute_dtype": torch.int8}, "compute_dtype must be floating point, got torch.int8"),
    "a bias of another dtype": ({"bias": torch.zeros(131, dtype=torch.int8)}, {}, "bias must be floating point, got"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name):
    tensors, attributes, message = WRONG[name]
    head = replace(quantised(classes=False), **tensors)
    with pytest.raises(RuntimeError, match=message):
        call_forward(head, LOSS, bias=head.bias, **attributes)


def test_a_backward_is_not_asked_for_its_gradient():
    head = quantised(classes=False)
    saved = call_forward(head, LOSS, training=True)
    given = operands(head.x, head.w, head.target)
    call = [torch.ones(37)], "lse", saved, [*given.values()], " ".join(given), None, LOSS
    with pytest.raises(RuntimeError, match="int8 has no gradient"):
        BACKWARD(*call, "input weight", *Attributes().args())
    (dx,) = BACKWARD(*call, "input", *Attributes().args())
    assert dx.isfinite().all() and dx.any()
