"""The logits of K classes of each row, by the CPU kernels: against float64, and the calls that they are no part of."""

import pytest
import torch
from head_oracle import Head, some_rows
from operators import Operator, kernels
from test_entries import some_entries

pytestmark = pytest.mark.usefixtures("lowerings")

BESIDE = "lse target_logit entropy entry_logits logit_sum"


def test_every_option_and_any_number_of_rows_and_classes():
    operator = Operator(BESIDE, dynamic=True, scale=0.7, softcap=5.0, workspace=1 << 18)
    for n, k in ((137, 5), (53, 2), (300, 200)):
        head = Head.make(n, 100, 1003, bias=True, seed=n)
        tensors = {"column_weight": torch.rand(1003), "row_mask": some_rows(n), "entries": some_entries(n, k, 1003)}
        operator.check(f"{n} rows, {k} classes", head, **tensors)
    assert kernels() == 2


@pytest.mark.slow
def test_bfloat16_beside_the_target_itself():
    head = Head.make(130, 70, 2500, torch.bfloat16)
    entries = some_entries(130, 8, 2500)
    entries[:, 4] = entries[:, 6] = head.target
    Operator("lse lse_low target_logit entry_logits").run(head, entries=entries)
    Operator("lse target_logit entry_logits").check("bfloat16", head, entries=entries.t().contiguous().t())
    assert kernels() == 4


@pytest.mark.slow
def test_factors_and_a_frozen_weight():
    head = Head.make(96, 33, 300, bias=True).with_factors()
    operator = Operator("lse entry_logits", scale=0.7)
    operator.check("all", head, entries=some_entries(96, 7, 300))
    operator.check("no weight", head, needs="dx db drow_scale", entries=some_entries(96, 7, 300))


@pytest.mark.slow
def test_results_do_not_depend_on_who_computes_them(three_threads):
    head, entries = Head.make(700, 40, 3000), some_entries(700, 16, 3000)
    operator = Operator("lse entry_logits", workspace=1 << 20)
    operator.check_threads("threads", head, three_threads, entries=entries)


def test_a_class_outside_the_vocabulary_is_an_error():
    head, entries = Head.make(), some_entries(37, 5, 131)
    entries[4, 2] = 131
    with pytest.raises(RuntimeError, match="Target 131 is out of bounds"):
        Operator("lse entry_logits").run(head, entries=entries)


@pytest.mark.parametrize("names", ["entry_logits", "target_logit entry_logits"])
def test_entries_alone_need_no_product(names):
    head, entries = Head.make(64, 32, 2000, torch.bfloat16, bias=True), some_entries(64, 6, 2000)
    Operator(names, softcap=3.0).check(names, head, entries=entries, row_mask=some_rows(64))
    assert kernels() == 0


@pytest.mark.slow
def test_a_backward_of_the_entries_alone_needs_no_product():
    head, entries = Head.make(64, 32, 2000), some_entries(64, 6, 2000)
    tangents = [torch.zeros(64), torch.ones(64)]
    operator = Operator("lse entry_logits")
    ours = operator.run(head, tangents=tangents, entries=entries)
    plain = Operator("entry_logits").run(head, tangents=tangents[1:], entries=entries)
    for name in ("dx", "dw"):
        torch.testing.assert_close(ours[name], plain[name])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_filter_keeps_every_entry(dtype):
    """Kernels for all but the entries: a budget of almost nothing leaves the gradient what it is."""
    head, entries = Head.make(300, 40, 2000, dtype, bias=True), some_entries(300, 6, 2000)
    operator = Operator("lse target_logit entry_logits", grad_filter="budget 1e-9")
    operator.check("filtered", head, entries=entries, row_mask=some_rows(300))
    assert kernels() == 2


@pytest.mark.slow
def test_beside_a_log_sum_exp_without_the_target():
    head, entries = Head.make(200, 40, 1000), some_entries(200, 6, 1000)
    Operator("lse_rest target_logit entry_logits").check("rest", head, entries=entries)
    assert kernels() == 2
