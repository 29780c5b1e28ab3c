"""No fused loss takes more memory than plain torch.compile, where the workspace would hold more than all logits."""

import coverage_table
import pytest
from grammar import GRAMMAR
from peaks import LOGITS, peak, program

# Of each kind one; the others are the slow test's.
QUICK = (
    "cross_entropy",
    "cross_entropy, smoothed, class weights",
    "mixup",
    "cross_entropy of chunks of the logits",
    "z-loss",
    "entropy bonus",
    "largest logit with a gradient",
    "rank of the target",
)


def check(name):
    of = program("statistic", name)
    assert of is not None
    plain, ours = peak(of, False), peak(of, True)
    assert ours <= plain, f"{ours / LOGITS:.3f} logits tensors for {plain / LOGITS:.3f}"


@pytest.mark.parametrize("name", QUICK)
def test_a_fused_loss_takes_no_more_memory_than_plain(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in GRAMMAR["statistic"] if ("statistic", n) in coverage_table.fusing()])
def test_every_fused_loss_takes_no_more_memory_than_plain(name):
    check(name)
