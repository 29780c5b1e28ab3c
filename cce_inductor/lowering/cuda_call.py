"""What all kernels for GPUs are given: operands, sizes, buffers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._inductor.lowering import empty_strided
from torch._inductor.virtualized import V

from .. import compat
from ..ops.bound import BLOCK
from ..ops.call import OTHER, SCALES, Attributes
from .buffers import in_memory, iota, op, own
from .schedules import whole_tiles
from .triton_configs import CACHED_TILE, TABLE, configurations
from .triton_template import DTYPES, launch
from .unsupported import Apart, Unsupported, unsupported_dtype

# A split of the vocabulary should be worth a program of its own.
LEAST_SPLIT = 2048
# What the kernel leaves behind for each statistic, by split.
PARTS = {
    "lse": ["LSE"],
    "lse_low": ["LSE", "LSE_LOW"],
    "target_logit": ["TARGET_LOGIT"],
    "logit_sum": ["LOGIT_SUM"],
    "entropy": ["LSE", "ENTROPY"],
    "argmax": ["BEST", "ARGMAX"],
}


class KernelCall:
    """What every kernel of a call needs: operands in memory, the rows that count, options."""

    def __init__(
        self,
        operands: dict[str, Any],
        row_mask: Any,
        attributes: Attributes,
        rest: bool = False,
        rows: dict[str, Any] | None = None,
    ):
        """rows: of a call over the same rows, its own, so that they are listed once."""
        if "entries" in operands:
            raise Apart("the kernels for GPUs know no entries")
        self.attributes, self.rest = attributes, rest
        self.compute = attributes.compute_dtype or operands["input"].get_dtype()
        reason = unsupported_dtype(
            [self.compute, *(d for t in operands.values() if (d := t.get_dtype()) != torch.int64)]
        )
        if reason:
            raise Unsupported(reason)
        self.given = operands
        self.operands = {name: in_memory(t) for name, t in operands.items()}
        self.input, self.weight = self.operands["input"], self.operands["weight"]
        self.device = self.input.get_device()
        self.n = self.input.get_size()[0]
        # Kernels with symbolic D and V spill registers; N alone stays symbolic.
        self.d = V.graph.sizevars.guard_int(self.input.get_size()[1])
        self.v = V.graph.sizevars.guard_int(self.weight.get_size()[0])
        if not self.d or not self.v:
            raise Unsupported("the hidden states or the vocabulary are empty")
        self.row_mask = row_mask
        # How the autotuner is to fill inputs that cannot hold anything.
        self.examples: dict[str, Callable[[Any], torch.Tensor]] = {}
        self._rows = rows

    @property
    def rows(self) -> dict[str, Any]:
        """INDEX, the active rows in order and then the others, and COUNT, how many are active; nothing if all are."""
        if self._rows is None:
            self._rows = {} if self.row_mask is None else self._compacted(self.row_mask)
        return self._rows

    @property
    def counted(self) -> dict[str, Any]:
        """COUNTED, whether a row is active, for kernels that take the rows in their own order."""
        return {} if self.row_mask is None else {"COUNTED": in_memory(self.row_mask)}

    def _compacted(self, row_mask: Any) -> dict[str, Any]:
        rank = op("cumsum", row_mask, 0, dtype=torch.int64)
        rank.realize()
        count = op("slice.Tensor", rank, 0, self.n - 1, self.n)
        rows = iota(self.n, self.device)
        behind = op("sub.Tensor", op("add.Tensor", rows, count), rank)
        place = op("where.self", row_mask, op("sub.Tensor", rank, 1), behind)
        index = op("full", [self.n], 0, dtype=torch.int64, device=self.device)
        return {"INDEX": in_memory(op("index_put", index, [place], rows)), "COUNT": own(count)}

    def named(self, *names: str) -> dict[str, Any]:
        return {name.upper(): self.operands[name] for name in names if name in self.operands}

    @property
    def precision(self) -> str:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"

    @property
    def hint(self) -> int:
        return int(V.graph.sizevars.optimization_hint(self.n, fallback=8192))

    @property
    def static(self) -> bool:
        return isinstance(self.n, (int, sympy.Integer))

    @property
    def matrices(self) -> list[Any]:
        return [self.input, self.weight]

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [t.get_dtype() for t in self.matrices]

    @property
    def constants(self) -> dict[str, Any]:
        """Template variables for how this head's logits are made."""
        return {
            "COMPUTE": DTYPES[self.compute],
            "SCALE": float(self.attributes.scale),
            "SOFTCAP": float(self.attributes.softcap),
            "SOFTCAP_FORM": repr(self.attributes.softcap_form),
        }

    def launch(self, kernel: str, inputs: dict, mutated: dict, sizes: Sequence[Any], **constants: Any) -> None:
        """Adds a kernel to the graph."""
        launch_for({"": self}, kernel, inputs, mutated, sizes, **constants)

    def narrowest(self, *kernels: str) -> int:
        """Columns of the narrowest tile that one of these kernels may have, in any variant."""
        variants = [kernel + variant for kernel in kernels for variant in ("", ", added")]
        known = [name for name in variants if name in TABLE[90]]
        tiles = [t for k in known for t in configurations(k, self.dtypes, self.compute, self.device, True)]
        return min(t.block_n for t in tiles)

    def empty(self, size: Sequence[Any], dtype: torch.dtype) -> Any:
        buffer = empty_strided(list(size), None, dtype=dtype, device=self.device)
        buffer.realize()
        return buffer


def launch_for(
    heads: Mapping[str, KernelCall], kernel: str, inputs: dict, mutated: dict, sizes: Sequence[Any], **constants: Any
) -> None:
    """Adds a kernel to the graph. heads: by what stands before the names of their operands, the first one's nothing."""
    call = heads[""]
    tma = compat.can_use_tma(*(t for head in heads.values() for t in head.matrices["INDEX" in inputs :]))
    block_n = CACHED_TILE if "CACHED" in mutated else None
    variant = ", kept" * bool("CACHED" in mutated or constants.get("CACHED")) + ", added" * ("DW_SUM" in mutated)
    variant += ", products" * bool("PRODUCTS" in inputs or constants.get("IN_PLACE"))
    variant += ", bound" * ("BOUND" in mutated)
    block_m = BLOCK if "BOUND" in mutated else None
    if kernel == "budget_dlogits":
        block_n = constants["CHUNK"]
    factors = any(name.removeprefix(OTHER.upper()).lower() in SCALES for name in inputs)
    dtypes = [dtype for head in heads.values() for dtype in head.dtypes]
    widest = max((head.compute for head in heads.values()), key=lambda dtype: dtype.itemsize)
    found = configurations(kernel + variant, dtypes, widest, call.device, tma, block_n, block_m, factors)
    launch(
        kernel,
        inputs,
        mutated,
        call.device,
        sizes,
        found,
        lambda step: {f"{prefix}EVEN_K": head.d % step == 0 for prefix, head in heads.items()},
        {
            "COUNT": lambda t: torch.full((1,), call.hint, dtype=torch.int64, device=call.device),
            "INDEX": lambda t: torch.arange(call.hint, device=call.device),
            "ROUND": lambda t: torch.tensor([0, min(whole_tiles(call.v), 4096), call.v, 0], device=call.device),
            "COUNTED": lambda t: torch.ones(call.hint, dtype=torch.bool, device=call.device),
            **call.examples,
        },
        KERNEL=repr(kernel + variant),
        PRECISION=repr(call.precision),
        REST=call.rest,
        GROUP=8,
        **{prefix + name: value for prefix, head in heads.items() for name, value in head.constants.items()},
        **constants,
    )
