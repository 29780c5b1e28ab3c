"""What is measured: a case is one head with its inputs, which the seed alone decides."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ITEMSIZE = {"fp32": 4, "bf16": 2, "autocast": 4}  # bytes per element of the inputs, by dtype mode
LOGITS_ITEMSIZE = {"fp32": 4, "bf16": 2, "autocast": 2}
IGNORE_INDEX = -100
LOGITS_STD = 2.5  # of the logits: what a half-trained model has

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = ((1024, 1024, 32768), (2048, 576, 49152), (512, 640, 262144))
QUICK_SHAPES: tuple[Shape, ...] = ((64, 64, 4096),)
HEADLINE: Shape = (8192, 2304, 256000)  # Gemma 2 2B
DTYPES = ("fp32", "autocast", "bf16")  # the first two have the same inputs, hence the same reference
IGNORED = 0.75  # of the rows, in the case that has any


@dataclass(frozen=True)
class Case:
    """N rows of width D against a vocabulary of V, in a dtype mode of `DTYPES`."""

    n: int
    d: int
    v: int
    dtype: str = "fp32"
    ignored: float = 0.0  # fraction of the targets that are IGNORE_INDEX
    seed: int = 0
    device: str = "cpu"
    activations: str = "normal"

    @property
    def label(self) -> str:
        ignored = f", {self.ignored:.0%} of the rows ignored" if self.ignored else ""
        return f"N={self.n}, D={self.d}, V={self.v}, {self.dtype}{ignored}"

    @property
    def counted(self) -> int:
        """Rows whose loss counts."""
        return self.n - round(self.n * self.ignored)

    @property
    def input_bytes(self) -> int:
        """Of x and W, and as much again for their gradients."""
        return (self.n + self.v) * self.d * ITEMSIZE[self.dtype]

    @property
    def logits_bytes(self) -> int:
        return self.n * self.v * LOGITS_ITEMSIZE[self.dtype]

    @property
    def inputs_key(self) -> Case:
        """Equal for cases with the same inputs: autocast computes otherwise, on the inputs of fp32."""
        return replace(self, dtype="fp32") if self.dtype == "autocast" else self

    def flops(self, mode: str) -> int:
        """What has to be computed at least: one GEMM for the loss, three with the gradients."""
        return (2 if mode == "loss" else 6) * self.counted * self.d * self.v


def parse_shape(text: str) -> Shape:
    """``"N,D,V"``; raises ValueError."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 3 or min(numbers) < 1:
        raise ValueError(f"{text!r} is not N,D,V: three positive integers with commas")
    return numbers[0], numbers[1], numbers[2]


def cases(
    shapes: list[Shape] | None, dtypes: list[str] | None, ignored: float | None, seed: int, quick: bool
) -> list[Case]:
    """The cases of the main table; with anything chosen by hand, that and nothing more."""
    chosen = list(dict.fromkeys(shapes or (QUICK_SHAPES if quick else SHAPES)))
    modes = [mode for mode in DTYPES if mode in (dtypes or DTYPES)]
    found = [Case(*shape, dtype=mode, ignored=ignored or 0.0, seed=seed) for shape in chosen for mode in modes]
    if ignored is None and not shapes:
        found.append(Case(*chosen[0], dtype=modes[0], ignored=IGNORED, seed=seed))
    return found


def make_inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (N, D) and W (V, D), which require gradients, and the targets (N,).

    Filled block by block, so that nothing larger than the inputs themselves is ever alive.
    """
    import torch

    generator = torch.Generator().manual_seed(case.seed)
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32

    def normal(rows: int, scale: float) -> Any:
        made = torch.empty(rows, case.d, dtype=dtype)
        for block in made.split(4096):
            block.copy_(torch.randn(block.shape, generator=generator).mul_(scale))
        return made.requires_grad_()

    x, weight = normal(case.n, LOGITS_STD), normal(case.v, 1 / math.sqrt(case.d))
    target = torch.randint(case.v, (case.n,), generator=generator)
    target[torch.randperm(case.n, generator=generator)[case.counted :]] = IGNORE_INDEX
    return x, weight, target
