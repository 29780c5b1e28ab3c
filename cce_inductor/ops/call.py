"""The arguments of a fused operator, in one value.

The operators' schema is variadic so that a new operand, statistic or saved tensor does not change it: tensors travel in
lists, and a string of names beside each list says what they are. `Call` is that convention read back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..filters import Filter
from .bound import group
from .softcap import FORMS
from .statistics import Statistic, parse

# Labels of the rows and of the classes: where two are equal, lse_rest leaves the class out.
LABELS = ("row_label", "class_label")
OPERANDS = (
    "input",
    "weight",
    "bias",
    "row_scale",
    "column_scale",
    "target",
    *LABELS,
    "entries",
    "column_weight",
    "seed",
    "diagnostics",
    "other_input",
    "other_weight",
    "other_bias",
    "other_row_scale",
    "other_column_scale",
)
MIB = 1 << 20
# The operand "seed" is a number below this.
SEEDS = 1 << 32
# The gradient of "diagnostics" are numbers about the backward (diagnostics.py).
OF_HEAD = ("input", "weight", "bias", "row_scale", "column_scale")
# Those of a second head over the same classes, whose width may be another one.
OTHER = "other_"
DIFFERENTIABLE_OPERANDS = (*OF_HEAD, "diagnostics", *(OTHER + name for name in OF_HEAD))
# Factors of the product: logits = softcap(scale * row_scale_i * (column_scale_v * (input_i . weight_v) + bias_v)).
SCALES = ("row_scale", "column_scale")


@dataclass(frozen=True)
class Attributes:
    """What is not a tensor: the same values go to the forward and to the backward operator.

    scale: factor of the logits before the softcap. softcap: `cap` of cap * tanh(u / cap), 0.0 for none. softcap_form:
    "tanh", or another function in its place (softcap.py).
    compute_dtype: dtype the operands are rounded to before they are multiplied (accumulation is fp32, or fp64 for
    fp64); None means what `F.linear` would do: the autocast dtype if autocast is on, the operands' own otherwise.
    grad_filter: which columns the backward computes (filters.py). workspace: bytes of scratch. version: see
    `cce_inductor.version`. other_...: the same of the second head.
    """

    scale: float = 1.0
    softcap: float = 0.0
    softcap_form: str = "tanh"
    compute_dtype: torch.dtype | None = None
    grad_filter: str = "exact"
    workspace: int = 64 << 20
    version: str = ""
    other_scale: float = 1.0
    other_softcap: float = 0.0
    other_softcap_form: str = "tanh"
    other_compute_dtype: torch.dtype | None = None

    def args(self) -> tuple:
        """In the order of the schema; without those of a second head where they are the schema's defaults."""
        of_one = sum(not f.name.startswith(OTHER) for f in fields(self))
        given = [f for f in fields(self)[of_one:] if getattr(self, f.name) != f.default]
        return tuple(getattr(self, f.name) for f in (fields(self) if given else fields(self)[:of_one]))

    @property
    def of_other(self) -> "Attributes":
        """Those of the second head, as a head's own."""
        return replace(
            self,
            scale=self.other_scale,
            softcap=self.other_softcap,
            softcap_form=self.other_softcap_form,
            compute_dtype=self.other_compute_dtype,
        )


@dataclass(frozen=True)
class Call:
    """One call of an operator, with its operands by name. `row_mask` is a (N,) mask of rows that count, or None."""

    operands: dict[str, Tensor]
    row_mask: Tensor | None
    statistics: str
    attributes: Attributes

    @staticmethod
    def read(operands: list[Tensor], names: str, row_mask: Tensor | None, stats: str, attributes: tuple) -> "Call":
        return Call(dict(zip(names.split(), operands, strict=True)), row_mask, stats, Attributes(*attributes))

    @property
    def input(self) -> Tensor:
        return self.operands["input"]

    @property
    def weight(self) -> Tensor:
        return self.operands["weight"]

    @property
    def other(self) -> "Call | None":
        """The second head, as the one of a call by itself, or None."""
        if OTHER + "input" not in self.operands:
            return None
        theirs = {n.removeprefix(OTHER): t for n, t in self.operands.items() if n.startswith(OTHER)}
        return replace(self, operands=theirs, attributes=self.attributes.of_other)

    @property
    def rows(self) -> list[Statistic]:
        """The statistics asked for, as rows of the table."""
        return parse(self.statistics)

    def shape(self, statistic: Statistic) -> tuple:
        """The shape of a statistic: (N,), or (N, K) of those of the entries."""
        of_entries = "entries" in statistic.requires
        return tuple(self.operands["entries"].shape) if of_entries else tuple(self.input.shape[:1])

    @property
    def filter(self) -> Filter:
        return Filter.read(self.attributes.grad_filter)

    @property
    def filtered(self) -> bool:
        """Whether the backward leaves out columns."""
        return filtered(self.statistics, self.attributes)

    @property
    def bounded(self) -> bool:
        """Whether a forward in training leaves a bound to the backward."""
        return bounded(self.statistics, self.attributes)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.attributes.compute_dtype or self.input.dtype

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """Dtype of logits tiles, accumulators and statistics."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def workspace(self) -> int:
        """Bytes of scratch: what is allowed, and with the accumulator of dx never more than the logits that are saved.

        That accumulator is fp32, (N, D); where it takes more than half of the logits, half of them remain. Nor is it
        less than MIB, or than tiles of some hundred rows and columns need: where the logits are as small as that, tiles
        smaller still would take all the time and spare nothing that counts. The narrower they are, the looser is a
        bound: that has sixteen times as much.
        """
        (n, d), v = self.input.shape, self.weight.shape[0]
        logits = n * v * self.compute_dtype.itemsize
        accumulator = 0 if self.input.dtype == self.accumulate_dtype else n * d * self.accumulate_dtype.itemsize
        tiles = 512 * d * self.accumulate_dtype.itemsize
        least = 16 * MIB if self.bounded else MIB
        return min(self.attributes.workspace, max(logits - accumulator, logits // 2, tiles, least))

    def grouped(self) -> "Call":
        """This call with the columns of its bound grouped as its size asks for, unless its filter says how already."""
        if not self.bounded or self.filter.group > 1:
            return self
        x = self.input
        size = group(x.shape[0], self.weight.shape[0], self.attributes.workspace, x.device.type)
        text = str(replace(self.filter, group=size))
        return replace(self, attributes=replace(self.attributes, grad_filter=text))


def filtered(statistics: str, attributes: Attributes) -> bool:
    """Whether the backward of these statistics leaves out columns: what no bound is proved for stays exact."""
    if Filter.read(attributes.grad_filter).kind == "exact" or "lse" not in statistics.split():
        return False
    return all(row.allows_filter(attributes.softcap) for row in parse(statistics))


def bounded(statistics: str, attributes: Attributes) -> bool:
    """Whether a forward in training leaves a bound: for a filter that goes by one."""
    kind = Filter.read(attributes.grad_filter).kind
    return kind in ("budget", "unbiased") and filtered(statistics, attributes)


def sampled(statistics: str, attributes: Attributes) -> bool:
    """Whether a forward in training needs the operand "seed", which the backward's sample of columns comes from."""
    return Filter.read(attributes.grad_filter).kind == "unbiased" and bounded(statistics, attributes)


def saved_names(statistics: str, saved: Sequence) -> list[str]:
    """What a backward is given of the forward's results: the statistics and, where there is one, the bound."""
    return [*statistics.split(), "bound"][: len(saved)]


def cut(stop: int, step: int, start: int = 0) -> Iterator[slice]:
    """start : stop in pieces of `step`."""
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"cce_inductor: {message}")


def check(call: Call, training: bool = False, needs: str = "") -> None:
    """Raises RuntimeError, saying what is wrong, for operands whose shapes or dtypes do not fit together.

    training: for a forward that leaves what the backward reads, or the backward that reads it. needs: names of the
    operands whose gradients are asked for.
    """
    ops = call.operands
    unknown = set(ops) - set(OPERANDS)
    _check(not unknown, f"unknown operands {sorted(unknown)}; expected some of {OPERANDS}")
    _check("input" in ops and "weight" in ops, "the operands input and weight are needed")
    _check_head(call, "", needs)
    _check_other(call, needs)
    _check(
        not {*SCALES} & {*ops} or not call.filtered,
        f"logits with a factor for each row or class need the filter 'exact', got {call.attributes.grad_filter!r}",
    )
    _check_rows(call)
    _check_seed_and_slot(call, training)
    asked = {*call.statistics.split()}
    _check(
        not {"lse", "lse_low", "entropy"} & asked or "lse_rest" not in asked,
        "lse and lse_rest are statistics of two calls: they are one sum, with the target and without",
    )
    for row in call.rows:
        missing = [r for r in row.requires if r not in ops and r not in call.statistics.split()]
        _check(not missing, f"statistic {row.name} needs {', '.join(missing)}")


def _check_seed_and_slot(call: Call, training: bool) -> None:
    """What a filter draws its sample by, and where its numbers go."""
    ops, x = call.operands, call.input
    if training and sampled(call.statistics, call.attributes):
        _check("seed" in ops, f"the filter {str(call.filter)!r} needs the operand seed, an int64 tensor of shape (1,)")
    if "diagnostics" in ops:
        slot = ops["diagnostics"]
        _check(
            slot.dtype == torch.float32 and slot.shape == (5,) and slot.device == x.device,
            f"diagnostics must be 5 float32 on {x.device}, got {slot.dtype} {_shape(slot)} on {slot.device}",
        )
    if "seed" in ops:
        seed = ops["seed"]
        _check(
            seed.dtype == torch.int64 and seed.shape == (1,) and seed.device == x.device,
            f"seed must be one int64 of shape (1,) on {x.device}, got {seed.dtype} {_shape(seed)} on {seed.device}",
        )


def _check_head(call: Call, prefix: str, needs: str) -> None:
    """The operands of one head, which the messages call by their names with the prefix. needs: as in `check`."""
    ops, attributes = call.operands, call.attributes
    form = attributes.softcap_form
    _check(form in FORMS, f"{prefix}softcap_form must be one of {FORMS}, got {form!r}")
    x, w = call.input, call.weight
    codes = w.dtype == torch.int8
    for name in (*OF_HEAD, "column_weight"):
        if name in ops:
            t, or_codes = ops[name], " or int8" * (name == "weight")
            floats = t.is_floating_point() or (name == "weight" and codes)
            _check(floats, f"{prefix}{name} must be floating point{or_codes}, got {t.dtype}")
            _check(t.device == x.device, f"{prefix}{name} is on {t.device}, input on {x.device}")
    _check(
        call.compute_dtype.is_floating_point,
        f"{prefix}compute_dtype must be floating point, got {call.compute_dtype}",
    )
    _check(not codes or f"{prefix}weight" not in needs.split(), "a weight of int8 has no gradient")
    _check(
        x.dim() == 2 and w.dim() == 2,
        f"{prefix}input must be (N, D) and {prefix}weight (V, D), got {_shape(x)} and {_shape(w)}",
    )
    _check(
        x.shape[1] == w.shape[1],
        f"{prefix}input {_shape(x)} and {prefix}weight {_shape(w)} differ in their last dimension; weight is (V, D), "
        "as in F.linear",
    )
    for name in ("bias", "column_weight", "column_scale"):
        if name in ops:
            _check(ops[name].shape == w.shape[:1], f"{prefix}{name} must be ({w.shape[0]},), got {_shape(ops[name])}")
    if attributes.compute_dtype is None:
        for name in ("weight", "bias"):
            dtype = ops[name].dtype if name in ops and not (name == "weight" and codes) else x.dtype
            _check(
                x.dtype == dtype,
                f"{prefix}input is {x.dtype} but {prefix}{name} is {dtype}: cast one of them, or use autocast",
            )
    if "row_scale" in ops:
        scale = ops["row_scale"]
        _check(
            scale.shape == x.shape[:1], f"{prefix}row_scale must be {_shape(x)[:1]}, one per row, got {_shape(scale)}"
        )


def _check_other(call: Call, needs: str) -> None:
    """The second head, where there is one."""
    names = [name for name in call.operands if name.startswith(OTHER)]
    if not names:
        return
    missing = {OTHER + "input", OTHER + "weight"} - {*names}
    _check(not missing, f"a second head needs {' and '.join(sorted(missing))} too")
    other = call.other
    assert other is not None
    _check_head(other, OTHER, needs)
    _check(
        other.input.device == call.input.device, f"other_input is on {other.input.device}, input on {call.input.device}"
    )
    sizes = other.input.shape[0], other.weight.shape[0]
    own = call.input.shape[0], call.weight.shape[0]
    _check(sizes == own, f"the second head must have the rows and classes of the first, {own}, got {sizes}")
    _check(
        other.accumulate_dtype == call.accumulate_dtype,
        f"both heads must be float64 or none, got {call.compute_dtype} and {other.compute_dtype}",
    )


def _check_rows(call: Call) -> None:
    """What has one entry for each row."""
    ops, x = call.operands, call.input
    if "target" in ops:
        t = ops["target"]
        _check(t.dtype == torch.int64, f"target must hold class indices of dtype torch.int64, got {t.dtype}")
        _check(t.shape == x.shape[:1], f"target must have one class per row, {_shape(x)[:1]}, got {_shape(t)}")
    _check_labels(call)
    if "entries" in ops:
        e = ops["entries"]
        _check(e.dtype == torch.int64, f"entries must hold class indices of dtype torch.int64, got {e.dtype}")
        _check(
            e.dim() == 2 and e.shape[0] == x.shape[0],
            f"entries must be (N, K), K classes for each of {x.shape[0]} rows, got {_shape(e)}",
        )
    if call.row_mask is not None:
        mask = call.row_mask
        _check(
            mask.dtype == torch.bool and mask.shape == x.shape[:1],
            "row_mask must be bool, with one entry per row",
        )


def _check_labels(call: Call) -> None:
    ops, given = call.operands, {*LABELS} & {*call.operands}
    _check(len(given) != 1, f"row_label and class_label come together, got {' '.join(given)} alone")
    for name, of in zip(LABELS, (call.input, call.weight), strict=True) if given else ():
        t, size = ops[name], _shape(of)[:1]
        _check(t.dtype == torch.int64, f"{name} must hold labels of dtype torch.int64, got {t.dtype}")
        _check(tuple(t.shape) == size, f"{name} must be {size}, got {_shape(t)}")


def _shape(t: Tensor) -> tuple:
    return tuple(t.shape)
