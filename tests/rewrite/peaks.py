"""The peak memory of a program's loss and gradients, by plain torch.compile and by this backend, counted.

Both hand on to `aot_eager`, so what is compared is the pass and its operators.
"""

from collections.abc import Callable

import torch
from allocations import Allocations
from grammar import Program, Sizes, alone

# Logits of 1 MiB, and a weight and hidden states that are small against them.
SIZES = Sizes(b=4, s=32, d=8, v=2048, spare=2)
LOGITS = 4 * SIZES.b * SIZES.s * SIZES.v


def program(part: str, name: str, beside_a_loss: bool = False) -> Program | None:
    """The production in plain surroundings, as large as `SIZES`; None for one that does not fit there."""
    found = alone(part, name, 1, beside_a_loss, SIZES, torch.float32)
    return next(iter(found.values()), None)


def peak(of: Program, ours: bool) -> int:
    """Bytes that the first output, the loss, and its gradients take while they are computed, above their operands."""
    torch._dynamo.reset()
    how = dict(backend="cce", options={"compiler": "aot_eager", "min_vocab": 0}) if ours else dict(backend="aot_eager")
    compiled: Callable = torch.compile(of.function(), **how)
    arguments = of.arguments()
    leaves = [x for x in arguments if x.requires_grad]

    def step() -> None:
        loss = compiled(*arguments)[0]
        if loss.requires_grad:
            torch.autograd.grad(loss.sum(), leaves, allow_unused=True)

    step()
    step()
    with Allocations() as taken:
        step()
    return taken.peak
