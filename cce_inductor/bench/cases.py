"""What is measured: a case is one head with its inputs, which the seed alone decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

ITEMSIZE = {"fp32": 4, "bf16": 2, "autocast": 4}  # bytes per element of the inputs, by dtype mode
LOGITS_ITEMSIZE = {"fp32": 4, "bf16": 2, "autocast": 2}
IGNORE_INDEX = -100
IGNORED = 0.75  # of the rows, in the case that has any

Shape = tuple[int, int, int]
# Of a head (D, V), and the models that have it.
HEADS: dict[str, tuple[int, int]] = {
    "Gemma 2 2B": (2304, 256000),
    "Gemma 2 9B": (3584, 256000),
    "Gemma 2 27B": (4608, 256000),
    "Mistral NeMo": (5120, 131072),
    "Phi 3.5 Mini": (3072, 32064),
    "Llama 3 8B": (4096, 128256),
    "SmolLM2-135M": (576, 49152),
}
NAMES = {head: name for name, head in HEADS.items()}
ROWS = 8192  # of a head that is asked for by its name
HEADLINE: Shape = (ROWS, *HEADS["Gemma 2 2B"])
SMOLLM2: Shape = (ROWS, *HEADS["SmolLM2-135M"])

SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": ((1024, 1024, 32768), (2048, 576, 49152), (512, 640, 262144)),
    "cuda": (
        *((ROWS, *head) for name, head in HEADS.items() if name != "SmolLM2-135M"),
        *((n, *HEADS["Llama 3 8B"]) for n in (1024, 2048, 4096, 16384)),
        SMOLLM2,
    ),
}
QUICK_SHAPES: tuple[Shape, ...] = ((64, 64, 4096),)
DTYPES = ("fp32", "autocast", "bf16")  # the first two have the same inputs, hence the same reference
DEFAULT_DTYPES = {"cpu": DTYPES, "cuda": ("bf16",)}
NORMAL, CALIBRATED, REAL = ACTIVATIONS = ("normal", "calibrated", "smollm2")
FLAT = "flat"  # nothing to drop; not in the table
KINDS = {"cpu": (NORMAL,), "cuda": ACTIVATIONS}


@dataclass(frozen=True)
class Case:
    """N rows of width D against a vocabulary of V, in a dtype mode of `DTYPES`, with one kind of `ACTIVATIONS`."""

    n: int
    d: int
    v: int
    dtype: str = "fp32"
    ignored: float = 0.0  # fraction of the targets that are IGNORE_INDEX
    seed: int = 0
    device: str = "cpu"
    activations: str = NORMAL

    @property
    def name(self) -> str:
        """Of a model that has such a head, or ""."""
        return NAMES.get((self.d, self.v), "")

    @property
    def label(self) -> str:
        """The case in one line, as a title."""
        name = f"{self.name}: " if self.name else ""
        # Where several kinds are compared, the title says which this is.
        kind = f", {self.activations} activations" if self.activations != NORMAL or self.device != "cpu" else ""
        ignored = f", {self.ignored:.0%} of the rows ignored" if self.ignored else ""
        return f"{name}N={self.n}, D={self.d}, V={self.v}, {self.dtype}{kind}{ignored}"

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
        """Of one logits tensor, in the dtype that the head computes in."""
        return self.n * self.v * LOGITS_ITEMSIZE[self.dtype]

    @property
    def inputs_key(self) -> Case:
        """Equal for cases with the same inputs: autocast computes otherwise, on the inputs of fp32."""
        return replace(self, dtype="fp32") if self.dtype == "autocast" else self

    def flops(self, mode: str) -> int:
        """What has to be computed at least: one GEMM for the loss, three with the gradients."""
        return (2 if mode == "loss" else 6) * self.counted * self.d * self.v


def parse_shape(text: str) -> Shape:
    """``"N,D,V"``, or the name of one of `HEADS` for `ROWS` of it; raises ValueError."""
    for name, head in HEADS.items():
        if text.strip().lower() == name.lower():
            return (ROWS, *head)
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 3 or min(numbers) < 1:
        raise ValueError(f"{text!r} is not N,D,V (three positive integers with commas), nor {', '.join(HEADS)}")
    return numbers[0], numbers[1], numbers[2]


def applies(activations: str, shape: Shape) -> bool:
    """Real hidden states have a head of their own."""
    return activations != REAL or shape[1:] == SMOLLM2[1:]


def cases(
    shapes: Sequence[Shape] | None = None,
    dtypes: Sequence[str] | None = None,
    ignored: float | None = None,
    quick: bool = False,
    device: str = "cpu",
) -> list[Case]:
    """The cases of a table, in every kind of activations that applies; with shapes given, of these and nothing more."""
    chosen = list(dict.fromkeys(shapes or (QUICK_SHAPES if quick else SHAPES[device])))
    modes = [mode for mode in DTYPES if mode in (dtypes or DEFAULT_DTYPES[device])]
    found = [
        Case(*shape, mode, ignored or 0.0, device=device, activations=kind)
        for shape, mode, kind in product(chosen, modes, KINDS[device])
        if applies(kind, shape)
    ]
    if ignored is None and not shapes:
        found.append(replace(found[0], ignored=IGNORED))
    return found
