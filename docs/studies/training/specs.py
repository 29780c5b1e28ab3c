"""Which runs there are: every way of computing the head's gradient, every seed."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

EXACT = "exact"
# By the name that tables use: `grad_filter`.
FILTERS: dict[str, Any] = {
    EXACT: "exact",
    "budget 2⁻⁹": 2**-9,
    "budget 1e-2": 1e-2,
    "unbiased 2⁻⁹": ("unbiased", 2**-9),
    "eps 2⁻¹²": ("eps", 2**-12),
    "unbiased 1e-2": ("unbiased", 1e-2),
    "budget 2⁻¹⁰": 2**-10,
    "budget 2⁻¹¹": 2**-11,
    "budget 2⁻¹²": 2**-12,
    "unbiased 2⁻¹²": ("unbiased", 2**-12),
    "eps 2⁻¹², sorted": ("eps", 2**-12, "sorted"),
}
# The same training as exact but for rounding: how far two runs drift apart that nobody would call different.
EAGER, PERMUTED = "eager", "exact, permuted"
# Those that models are trained with, the most telling first; of the others only the gradients' errors are measured.
TRAINED = (EXACT, "budget 2⁻⁹", "unbiased 2⁻⁹", "eps 2⁻¹²", "budget 1e-2", "unbiased 1e-2", EAGER, PERMUTED)
LION: dict[str, Any] = {"optimizer": "Lion"}
LION_MODES = (EXACT, "budget 2⁻⁹", "unbiased 2⁻⁹", "budget 1e-2")


@dataclass(frozen=True)
class Pretraining:
    """One small language model trained from scratch.

    mode: a name in FILTERS, "eager" (F.cross_entropy over all logits) or "exact, permuted" (the vocabulary in another
    order). batch rows of seq tokens a step. vocab: ids beyond it are folded onto smaller
    ones. layers, width: of the model. compiled: the head and its loss, by torch.compile; if not, by the operators'
    eager implementation.
    """

    mode: str
    seed: int
    optimizer: str = "AdamW"
    steps: int = 2000
    batch: int = 2
    seq: int = 64
    vocab: int = 32768
    width: int = 32
    layers: int = 2
    lr: float = 2e-3
    every: int = 100  # steps between evaluations
    held_out: int = 2048  # tokens
    compiled: bool = False  # a model this small has so flat a softmax that the kernels would do most of it in full

    @property
    def name(self) -> str:
        return _file_name("pretraining", self.optimizer, self.mode, self.seed)


@dataclass(frozen=True)
class Finetuning:
    """A model trained on a few texts, all of them at every step, until it knows them by heart.

    The seed chooses the texts: `batch` of them, seq tokens each. layers: how many of the uppermost ones learn.
    """

    mode: str
    seed: int
    steps: int = 20
    batch: int = 2
    seq: int = 128
    layers: int = 10
    lr: float = 2e-4
    look: int = 5  # steps between looks at what the budget keeps
    compiled: bool = True

    @property
    def name(self) -> str:
        return _file_name("finetuning", self.mode, self.seed)


def _file_name(*parts: Any) -> str:
    plain = (unicodedata.normalize("NFKD", str(part)) for part in parts)
    return (
        "-".join("".join(c if c.isascii() and (c.isalnum() or c == ".") else "_" for c in p) for p in plain) + ".json"
    )


@dataclass(frozen=True)
class Plan:
    """All runs, those of a seed together, the most telling first."""

    pretraining: tuple[Pretraining, ...]
    finetuning: tuple[Finetuning, ...]
    rows: int  # of the model whose gradients' errors and row checks are measured before any training


def plan(quick: bool) -> Plan:
    """Everything that docs/accuracy.md shows; quick: tiny models and few steps."""
    small: dict[str, Any] = {}
    tuned: dict[str, Any] = {}
    if quick:
        small = {
            "vocab": 512,
            "steps": 12,
            "every": 4,
            "seq": 16,
            "width": 16,
            "layers": 1,
            "held_out": 64,
        }
        tuned = {"compiled": False, "steps": 6, "seq": 16, "look": 2}
    seeds = range(2 if quick else 3)
    runs = [Pretraining(mode, seed, **small) for seed in seeds for mode in TRAINED]
    runs += [Pretraining(mode, seed, **{**LION, **small}) for seed in range(2) for mode in LION_MODES]
    tuning = [Finetuning(mode, seed, **tuned) for seed in seeds for mode in TRAINED[:4]]
    return Plan(tuple(runs), tuple(tuning), 256 if quick else 1024)
