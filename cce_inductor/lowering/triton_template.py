"""Triton templates as Inductor choices: sources put together from `templates/*.py.jinja`, and how one is called."""

import functools
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate
from torch._inductor.virtualized import V

from .. import compat, version

# What stands for a piece in a template, and the file it is.
_NAMES = (
    *("sizes", "matrices", "grouped", "product", "logit", "softcapped", "slope", "nothing"),
    *("split_and_rows", "begin_of_logits", "of_logits", "running", "store_of_logits"),
    *("region", "log_softmax", "tangents", "store_dlogits"),
    *("block_rows", "slot", "kept_mass"),
)
PIECES = {name.upper(): name for name in _NAMES}
# Each head has its own of these: with OTHER_ in front of its mark, a piece is about the other head's.
_OF_HEAD = (
    *("INPUT", "WEIGHT", "BIAS", "ROW_SCALE", "COLUMN_SCALE", "SCALE", "SOFTCAP", "SOFTCAP_FORM", "COMPUTE", "EVEN_K"),
    *("D", "LSE", "LSE_LOW", "DLOGITS", "FACTOR"),
    *("stride_xm", "stride_xk", "stride_wn", "stride_wk", "depth", "product", "logit", "capped", "root"),
    *("top", "new_top", "shift", "rescale", "below", "power", "lse", "log_p", "p", "dlogits"),
)
_NAME_OF_HEAD = re.compile(rf"\b({'|'.join(_OF_HEAD)})\b")
DTYPES = {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}


def _source(name: str) -> str:
    """A template with its pieces in place, each indented as its mark is."""
    text = (version.templates_dir() / f"{name}.py.jinja").read_text()

    def piece(found: re.Match) -> str:
        indent, other, mark = found.groups()
        inner = _source(PIECES[mark])
        return textwrap.indent(_NAME_OF_HEAD.sub(_of_other, inner) if other else inner, indent)

    return re.sub(rf"^( *)\{{\{{ (OTHER_)?({'|'.join(PIECES)}) \}}\}}$", piece, text, flags=re.M)


def _of_other(name: re.Match) -> str:
    return ("OTHER_" if name[0].isupper() else "other_") + name[0]


@SymbolicGridFn
def _statistics_grid(rows, splits, meta, *, cdiv):
    return (cdiv(rows, meta["BLOCK_M"]) * splits, 1, 1)


@SymbolicGridFn
def _rows_grid(rows, meta, *, cdiv):
    return (cdiv(rows, meta["BLOCK_M"]), 1, 1)


@SymbolicGridFn
def _tiles_grid(height, width, meta, *, cdiv):
    return (cdiv(height, meta["BLOCK_M"]) * cdiv(width, meta["BLOCK_N"]), 1, 1)


@SymbolicGridFn
def _each_grid(number, meta):
    return (number, 1, 1)


@SymbolicGridFn
def _columns_grid(columns, meta, *, cdiv):
    return (cdiv(columns, meta["BLOCK_N"]), 1, 1)


@SymbolicGridFn
def _lasting_grid(height, width, meta, *, cdiv, min):
    # As many as run at a time, several times over, and an odd number: GROUPED gives every 8th the same block.
    return (min(cdiv(height, meta["BLOCK_M"]) * cdiv(width, meta["BLOCK_N"]), meta["PROGRAMS"]), 1, 1)


# By template; of the others each program has a tile.
GRIDS = {
    **dict.fromkeys(("linear_statistics", "two_heads"), _statistics_grid),
    "linear_statistics_early": _rows_grid,
    "budget_mask": _columns_grid,
    **dict.fromkeys(("budget_dlogits", "budget_dw", "budget_dx"), _lasting_grid),
    **{f"budget_{name}": _each_grid for name in ("select", "bits", "tiles", "plan", "list", "check")},
}


@functools.cache
def _template(name: str) -> TritonTemplate:
    """One per process: Inductor refuses a second template of the same name."""
    return TritonTemplate(name=f"cce_{name}", grid=GRIDS.get(name, _tiles_grid), source=_source(name))


@dataclass(frozen=True)
class Tiles:
    """One configuration of a kernel: block of rows, tile of columns, step of the sum, pipeline stages, warps.

    tma: operands that allow it are loaded by the tensor memory accelerator (sm_90 and later). warp_specialize: some
    warps load while others multiply (sm_100, with tma).
    """

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    tma: bool = False
    warp_specialize: bool = False

    def __str__(self) -> str:
        blocks = f"{self.block_m} x {self.block_n} x {self.block_k}, {self.num_stages} stages, {self.num_warps} warps"
        return blocks + ", TMA" * self.tma + ", specialised" * self.warp_specialize

    def options(self) -> dict[str, Any]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_stages": self.num_stages,
            "num_warps": self.num_warps,
            "TMA": self.tma,
            "WARP_SPECIALIZE": self.warp_specialize,
        }


def launch(
    name: str,
    inputs: Mapping[str, Any],
    mutated: Mapping[str, Any],
    device: torch.device,
    sizes: Sequence[Any],
    tiles: Sequence[Tiles],
    of_step: Callable[[int], Mapping[str, Any]],
    fake_inputs: Mapping[str, Callable[[Any], torch.Tensor]],
    **constants: Any,
) -> None:
    """Adds the kernel to the graph that is being lowered, in the configuration that is the fastest.

    inputs, mutated: buffers by the names the template knows them by; it writes to the mutated ones. sizes: the grid
    function's arguments. of_step: template variables for a step of the sum. fake_inputs: how the autotuner is to fill
    inputs that cannot hold anything. constants: more template variables.
    """
    arguments = {**inputs, **mutated}
    layout = ir.FixedLayout(device, torch.float32, [sympy.S.One], [sympy.S.One])
    nodes = list(arguments.values())
    choices: list[Any] = []
    for option in tiles:
        error = _template(name).maybe_append_choice(
            choices,
            input_nodes=tuple(nodes),
            layout=layout,
            mutated_inputs=list(mutated.values()),
            call_sizes=list(sizes),
            ARGUMENTS=repr(" ".join(arguments)),
            **of_step(option.block_k),
            **constants,
            **option.options(),
        )
        if error is not None and len(tiles) == 1:
            raise error
    generators = {i: fake_inputs[n] for i, n in enumerate(arguments) if n in fake_inputs}
    node = compat.autotuned(f"cce_{name}", choices, nodes, layout, generators)
    V.graph.no_fuse_buffer_names.add(node.get_name())
