"""The numbers that a filtered backward leaves, against a dense softmax in float64.

What was computed is read off dW itself: in a block of rows, a column that was left out has a row of zeros, and one that
was sampled a row that is too long by its weight.
"""

import pytest
import torch
from head_oracle import Head, logits

from cce_inductor.ops.bound import BLOCK, ROW_CAP
from cce_inductor.ops.call import Attributes
from cce_inductor.ops.diagnostics import NAMES
from cce_inductor.ops.library import BACKWARD, FORWARD

STATISTICS = "lse target_logit"
V = 700
FILTERS = ["budget 0.05", "unbiased 0.05", "eps 0.02", "eps 0.02 sorted"]


def operators(head, g, row_mask, grad_filter, needs="weight diagnostics", tangents=STATISTICS):
    """The results of a backward with the tangents g and -g."""
    attributes = Attributes(grad_filter=grad_filter).args()
    operands = {"input": head.x, "weight": head.w, "bias": head.bias, "target": head.target}
    operands |= {"seed": torch.tensor([7])} if grad_filter.startswith("unbiased") else {}
    operands |= {"diagnostics": torch.zeros(5)}
    call = list(operands.values()), " ".join(operands), row_mask, STATISTICS
    saved = FORWARD(*call, True, *attributes)
    given = {"lse": g, "target_logit": -g}
    named = [given[name] for name in tangents.split()]
    found = BACKWARD(named, tangents, saved, *call, needs, *attributes)
    return dict(zip(needs.split(), found, strict=True))


def dense(head):
    """The softmax in float64, the target's entries left out."""
    p = logits(head.x.double(), head.w.double(), head.bias.double()).softmax(1)
    return p.scatter(1, head.target[:, None], 0)


def weights(head, rows, g, grad_filter):
    """(V,): the weight that each column got in one block of rows, read off its gradient; rows are at most BLOCK."""
    block = Head(head.x[rows], head.w, head.target[rows], head.bias)
    every = dense(block) * g[rows, None]
    every[torch.arange(len(rows)), block.target] = 0
    own = torch.zeros(head.w.shape[0]).bool()
    own[block.target] = True
    got = operators(block, g[rows], None, grad_filter)["weight"].double()
    ratio = (got * (every.T @ block.x.double())).sum(1) / (every.T @ block.x.double()).square().sum(1)
    return torch.where(own, got.any(1).double(), ratio.where(got.any(1), 0.0))


def peaked(n, seed):
    """Later columns are likelier, and the targets: whole tiles of the earlier ones may be left out."""
    head = Head.make(n, 16, V, bias=True, seed=seed)
    head.bias += torch.linspace(0, 14, V)
    head.target = V - 1 - head.target % 200
    return head


@pytest.mark.parametrize("grad_filter", FILTERS)
@pytest.mark.parametrize("masked", [False, True])
def test_numbers_of_one_block(grad_filter, masked):
    head = peaked(BLOCK, 3)
    g = torch.rand(BLOCK) + 0.1
    row_mask = torch.arange(BLOCK) % 3 != 1 if masked else None
    rows = torch.arange(BLOCK) if row_mask is None else row_mask.nonzero()[:, 0]
    numbers = operators(head, g, row_mask, grad_filter)["diagnostics"].double()
    weight = weights(head, rows, g, grad_filter)
    certain = (weight - 1).abs() < 1e-3
    p = dense(head)[rows]
    lost = p @ (~certain).double()
    rest = p.sum(1)
    g = g[rows].double()
    assert 0 < (weight != 0).sum() < V
    assert grad_filter[0] != "u" or ((weight != 0) & ~certain).any()
    expected = {
        "kept": (weight != 0).double().mean(),
        "full": 0.0,
        "dropped": (g @ lost) / (g @ rest),
        "worst": (lost / rest).max(),
        "blocks": 1.0,
    }
    for name, number in zip(NAMES, numbers, strict=True):
        assert number == pytest.approx(float(expected[name]), rel=1e-3, abs=1e-5), name


def test_numbers_of_several_blocks_are_those_of_each():
    """300 rows are blocks of 128, 128 and 44; the second's tangents are all zero."""
    head, tau = peaked(300, 5), 0.05
    g = torch.rand(300) + 0.1
    g[128:256] = 0
    kept = torch.zeros(3, V).bool()
    for b, rows in enumerate(torch.arange(300).split(BLOCK)):
        kept[b] = weights(head, rows, torch.where(g == 0, 1e-30, g), f"budget {tau}") != 0 if b != 1 else False
    kept[1, head.target[128:256]] = True  # nothing else has a gradient
    numbers = dict(zip(NAMES, operators(head, g, None, f"budget {tau}")["diagnostics"].tolist(), strict=True))
    p = dense(head)
    lost = (p * ~kept[torch.arange(300) // BLOCK]).sum(1)
    rest, weight = p.sum(1), g.double()
    assert numbers["kept"] == pytest.approx(float(kept.double().mean()), rel=1e-6)
    assert numbers["dropped"] == pytest.approx(float(weight @ lost / (weight @ rest)), rel=1e-3)
    assert numbers["worst"] == pytest.approx(float((lost / rest)[weight > 0].max()), rel=1e-3)
    assert (numbers["full"], numbers["blocks"]) == (0.0, 3.0)
    assert 0 < numbers["dropped"] <= tau and 0 < numbers["worst"] <= ROW_CAP * tau


def test_a_row_that_would_lose_too_much_has_its_block_done_in_full():
    """The last row looks at words that no other row does, and counts for little: the budget alone would drop them."""
    tau = 0.005
    head = Head.make(2 * BLOCK, 16, V, bias=True, seed=1)
    head.bias[: V // 2] += 8
    head.x[-1] = 0
    head.x[-1, 0], head.w[V // 2 :, 0], head.w[: V // 2, 0] = 20.0, 1.0, 0.0
    head.x[:-1, 0] = 0
    head.target[-1] = 0
    g = torch.ones(2 * BLOCK)
    g[-1] = 1e-3
    numbers = dict(zip(NAMES, operators(head, g, None, f"budget {tau}")["diagnostics"].tolist(), strict=True))
    assert numbers["full"] == 0.5
    assert 0.5 < numbers["kept"] < 1
    lost = dense(head)[-1, V // 2 :].sum()
    assert lost > ROW_CAP * tau > numbers["worst"] > 0
    g[-1] = 0  # a row without a gradient can lose what it likes
    relaxed = dict(zip(NAMES, operators(head, g, None, f"budget {tau}")["diagnostics"].tolist(), strict=True))
    assert relaxed["full"] == 0 and relaxed["kept"] < numbers["kept"]


@pytest.mark.parametrize("grad_filter", FILTERS)
def test_without_rows_or_without_a_dense_part(grad_filter):
    head = peaked(BLOCK, 2)
    g = torch.ones(BLOCK)
    nobody = torch.zeros(BLOCK, dtype=torch.bool)
    assert operators(head, g, nobody, grad_filter)["diagnostics"].tolist() == [0, 0, 0, 0, 0]
    only_target = operators(head, g, None, grad_filter, tangents="target_logit")
    assert only_target["diagnostics"].tolist() == [1, 1, 0, 0, 1]


def test_nothing_is_dropped_of_a_flat_softmax():
    head = Head.make(BLOCK, 16, 200, bias=True)
    head.w *= 0
    head.bias *= 0
    kept, full, dropped, worst, _ = operators(head, torch.ones(BLOCK), None, "budget 0.001")["diagnostics"].tolist()
    assert (kept, full) == (1.0, 1.0) and dropped == 0 and worst == 0


@pytest.mark.parametrize("grad_filter", FILTERS)
def test_gradients_are_the_same_with_and_without(grad_filter):
    head = peaked(BLOCK, 2)
    g = torch.rand(BLOCK)
    with_numbers = operators(head, g, None, grad_filter, "input weight bias diagnostics")
    without = operators(head, g, None, grad_filter, "input weight bias")
    assert all(torch.equal(without[name], with_numbers[name]) for name in without)


def test_an_operand_of_another_kind_is_an_error():
    head = Head.make(4, 8, 20)
    operands = [head.x, head.w, head.target, torch.zeros(4)]
    with pytest.raises(RuntimeError, match="diagnostics must be 5 float32"):
        FORWARD(operands, "input weight target diagnostics", None, STATISTICS, True, *Attributes().args())
