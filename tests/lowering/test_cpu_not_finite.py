"""The CPU kernels where logits are not finite, and where they are large."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from head_oracle import check_error_rule
from operators import kernels
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "rewrite"))

from test_not_finite import TOLERANCE, differs
from troubles import IGNORED, PROGRAMS, TROUBLES, compare, data, run

pytestmark = pytest.mark.usefixtures("lowerings")


def with_entropy(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    entropy = -(z.softmax(1) * z.log_softmax(1)).sum(1)
    return F.cross_entropy(z, t, reduction="none") + 0.2 * entropy


def smoothed(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w, b), t, ignore_index=IGNORED, label_smoothing=0.1)


def large(rows: int, offset: float) -> list[Tensor]:
    """Logits with a component in common, rounded as such are. tests/ops/test_large_logits.py has exact ones."""
    x, w, b, t = data(torch.float32, rows)
    w[:, 0] = offset / 64
    x[:, 0] = 64 + 1e-3 * x[:, 0]
    return [x, w, b, t]


def in_eager(fn, tensors: list[Tensor]) -> dict[str, Tensor]:
    """In fp32 for bfloat16, whose products read a row of NaN into the one before it in some of oneDNN's versions."""
    narrow = tensors[0].dtype == torch.bfloat16
    return run(fn, [t.float() if narrow and t.is_floating_point() else t for t in tensors])


# Programs and settings, and how many kernels they are.
COMPILED = {
    "gradients in the forward": ("in the logits' dtype", torch.float32, {}, 1),
    "gradients in the forward, bfloat16": ("mean", torch.bfloat16, {}, 1),
    "a forward and a backward, smoothing": (smoothed, torch.float32, {"gradients_in_forward": False}, 2),
    "float16": ("none", torch.float16, {}, 2),
    "log-sum-exp": ("logsumexp", torch.float32, {}, 2),
    "every statistic": (with_entropy, torch.float32, {}, 2),
    "budget": ("logsumexp - target", torch.float32, {"grad_filter": 0.01}, 2),
    "budget, gradients in the forward": ("mean", torch.float32, {"grad_filter": 0.01}, 1),
}


# One that has both passes; the others are slow tests.
OFTEN = ("gradients in the forward, bfloat16",)


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in OFTEN else pytest.mark.slow) for c in COMPILED])
def test_compiled(case):
    """Not finite, as in eager; and large, by the error rule."""
    program, dtype, options, count = COMPILED[case]
    fn = PROGRAMS[program] if isinstance(program, str) else program
    compiled = torch.compile(fn, backend="cce", dynamic=False, options={"min_vocab": 2, **options})
    filtered = "grad_filter" in options
    rows = 200 if filtered else 70
    for trouble, change in TROUBLES.items():
        # A block done in full adds to what it has: dW may have NaN where eager has an infinity, as the README says.
        infinite = filtered and "entry" in trouble and "inf" in trouble
        if not infinite and not differs("entropy" if fn is with_entropy else str(program), trouble, dtype):
            tensors = data(dtype, rows)
            change(tensors)
            wrong = compare(run(compiled, tensors), in_eager(fn, tensors), 0.05 if filtered else TOLERANCE[dtype])
            assert wrong == [], trouble
    assert kernels() == count
    in_float64 = fn in (with_entropy, smoothed, PROGRAMS["in the logits' dtype"])  # if the logits are
    for offset in (4096.0, -4096.0) if in_float64 and not filtered else ():
        tensors = large(rows, offset)
        exact = run(fn, [t.double() if t.is_floating_point() else t for t in tensors])
        ours, eager = run(compiled, tensors), run(fn, tensors)
        if fn is smoothed:  # of the sum of the logits is known what one fp32 holds
            assert (ours.pop("value") - exact.pop("value")).abs() < abs(offset) * 2.0**-23
        check_error_rule(f"{case}, {offset}", ours, eager, exact, dtype)
