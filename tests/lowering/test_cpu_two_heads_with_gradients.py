"""The CPU kernel that forms the gradients of two heads in the forward, against all logits in float64."""

import pytest
import torch
from head_oracle import some_rows
from operators import kernels
from test_cpu_two_heads import attributes
from test_two_heads import EVERY, at_once, compare, heads

from cce_inductor.ops.with_gradients import WITH_GRADIENTS

pytestmark = pytest.mark.usefixtures("lowerings")


def compiled(dynamic: bool | None = None):
    return torch.compile(lambda *arguments: WITH_GRADIENTS(*arguments), dynamic=dynamic)


def test_every_option_and_any_number_of_rows_and_classes():
    operator = compiled(dynamic=True)
    options = attributes(scale=0.7, softcap=6.0, other_scale=0.5, other_softcap=9.0, workspace=1 << 20)
    for n, v in ((137, 1003), (53, 301)):
        given = heads(n=n, d=100, other_d=70, v=v) | {"target": torch.arange(n) % v, "column_weight": torch.rand(v)}
        names = f"{EVERY} entropy target_logit logit_sum argmax"
        wanted = [name for name in given if name not in ("target", "column_weight")]
        compare(given, names, options, some_rows(n), wanted, operator, at_once)
    found = at_once(given, names, options, torch.zeros(53, dtype=torch.bool), operator, wanted)
    assert not any(t.any() for t in found.values())
    assert kernels() == 1
