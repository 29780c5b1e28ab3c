"""The backward under a budget on a GPU: each block of 128 rows with a list of columns of its own (ops/bound.py).

All of it is decided on the device, and every launch has a fixed grid. The columns are sorted by the set of blocks that
keep them; the backward goes over this order slab by slab. A slab takes as many columns as there are slots for: a column
that a block keeps is an entry, and its dlogits, of 128 rows, fills one slot. As many slabs are launched as a flat
softmax needs; the last ones are usually empty. Then the rows that lost too much have their blocks marked, and all is
done once more, in slabs that are empty if there is no such row.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch._inductor.utils import ceildiv

from ..ops.bound import BLOCK, OFFSET, ROW_CAP, STEPS
from .buffers import argsort, in_memory, iota, numbers, op, zeros
from .cuda_call import KernelCall
from .schedules import budget_slabs
from .triton_configs import chunk, kind

log = logging.getLogger(__name__)

TILE = 128


class Gradients(Protocol):
    """What is needed of the exact backward: its call and operands, its outputs, and their last step."""

    call: KernelCall
    given: dict[str, Any]
    needs: Any

    def outputs(self, makes: Any, add_dx: bool) -> dict[str, Any]: ...

    def finish(self, outputs: dict[str, Any]) -> None: ...


def run(backward: Gradients, saved: dict[str, Any], bound: Any, budget: float) -> bool:
    """Forms the gradients that `backward` needs. Its tangents are those of lse and target_logit at most.

    False if the workspace is too small for it, or would take too many slabs: every column may be kept.
    """
    made = _Budget(backward, saved, bound, budget)
    if made.slabs:
        made.run()
    else:
        log.info("every column is kept: the workspace is too small for a backward under a budget")
    return made.slabs > 0


class _Budget:
    def __init__(self, backward: Gradients, saved: dict[str, Any], bound: Any, budget: float):
        self.backward, self.call = backward, backward.call
        call = self.call
        self.tiles = math.ceil(call.v / TILE)
        self.blocks = ceildiv(call.n, BLOCK)
        item = call.compute.itemsize
        self.slabs, self.width = budget_slabs(call.hint, call.v, item, call.attributes.workspace)
        self.constants = {
            "WORDS": self.tiles * 4,
            "WIDTH": self.width,
            "CHUNK": chunk(kind(call.dtypes, call.compute)),
            "TAU": budget,
            "ROW_CAP": float(ROW_CAP),
            "STEPS": float(STEPS),
            "OFFSET": OFFSET,
            "SCAN": 2048,
            "PROGRAMS": 4 * torch.cuda.get_device_properties(call.device).multi_processor_count + 1,
        }
        self.made: dict[str, Any] = {"BOUND": in_memory(bound)}
        if "target" in call.operands and "target_logit" in saved:
            self.given = backward.given | {"TARGET_LOGIT": in_memory(saved["target_logit"])}
        else:  # the bound has the targets' mass
            self.given = {name: t for name, t in backward.given.items() if name != "TARGET"}

        call.examples = self._examples()

    def _examples(self) -> dict[str, Callable[[Any], torch.Tensor]]:
        """For the autotuner: the first slab, where all columns are kept in their natural order."""
        blocks, width, v = math.ceil(self.call.hint / BLOCK), self.width, self.call.v
        held, device = min(width, v), self.call.device

        def rows(count: int, each: int, step: int = 1) -> torch.Tensor:
            """(count, each) int32: 0, step, 2 * step, ... in each row."""
            return torch.arange(0, each * step, step, dtype=torch.int32, device=device).repeat(count, 1)

        def full(count: int, value: int) -> torch.Tensor:
            return torch.full((count,), value, dtype=torch.int32, device=device)

        words, slots = self.tiles * 4, blocks * width
        return {
            "START": lambda _: rows(self.slabs, blocks, width),
            "BASE": lambda _: rows(self.slabs, blocks, width),
            "NUMBER": lambda _: full(self.slabs * blocks, held).view(self.slabs, blocks),
            "RANGE": lambda _: rows(self.slabs, 2, min(width // TILE, self.tiles)),
            "MOST": lambda _: full(self.slabs, math.ceil(held / self.constants["CHUNK"])),
            "LIST": lambda _: torch.arange(slots, device=device).remainder(v).to(torch.int32),
            "PERM": lambda _: torch.arange(v, device=device),
            "BITS": lambda _: full(blocks * words, -1).view(blocks, words),
            "RUN": lambda _: rows(blocks, words + 1, 32),
            "OF_TILE": lambda _: rows(self.tiles, blocks),
            "IN_TILE": lambda _: full(self.tiles, blocks),
        }

    def launch(self, kernel: str, reads: str, writes: str, sizes: list[Any], **more: Any) -> None:
        """`reads`, `writes`: names of what was made so far, or is given."""
        known = {**self.given, **self.made}
        rows = ["INPUT", "WEIGHT", "INDEX", "COUNT"]
        inputs = {name: known[name] for name in [*rows, *reads.split()] if name in known}
        mutated = {name: known[name] for name in writes.split() if name in known}
        inputs |= {name: buffer for name, buffer in more.items() if name == "SLAB"}
        constants = self.constants | {name: value for name, value in more.items() if name != "SLAB"}
        self.call.launch(kernel, inputs, mutated, sizes, **constants)

    def run(self) -> None:
        call, backward = self.call, self.backward
        made, blocks, tiles = self.made, self.blocks, self.tiles
        self._order()
        slots = blocks * self.width
        int32, words = torch.int32, tiles * 4
        made |= {"BITS": call.empty([blocks, words], int32), "RUN": call.empty([blocks, words + 1], int32)}
        made["ENTRIES"] = call.empty([tiles], torch.int64)
        made |= {"OF_TILE": call.empty([tiles, blocks], int32), "IN_TILE": call.empty([tiles], int32)}
        made |= {name: call.empty([self.slabs, blocks], int32) for name in ("START", "NUMBER", "BASE")}
        made |= {"RANGE": call.empty([self.slabs, 2], int32), "MOST": call.empty([self.slabs], int32)}
        made |= {"LIST": call.empty([slots], int32), "DLOGITS": call.empty([slots, BLOCK], call.compute)}
        made["MASS"] = call.empty([ceildiv(slots, self.constants["CHUNK"]), BLOCK], torch.float32)
        made["TOTAL"] = zeros([blocks, BLOCK], torch.float32, call.device)
        made["FULL"] = call.empty([blocks], int32)
        outputs = backward.outputs(backward.needs, True)
        made |= outputs
        slabs = [numbers([index], call.device) for index in range(self.slabs)]
        for again in (False, True):
            self.launch("budget_bits", "MASK PERM FULL" if again else "MASK PERM", "BITS RUN", [blocks], AGAIN=again)
            self.launch("budget_tiles", "RUN", "OF_TILE IN_TILE ENTRIES", [tiles])
            plans = "START NUMBER BASE RANGE MOST"
            reads = "RUN ENTRIES FULL" if again else "RUN ENTRIES"
            self.launch("budget_plan", reads, plans, [self.slabs], AGAIN=again)
            for slab in slabs:
                self._slab(slab)
            if not again:
                reads = "TARGET LSE TARGET_LOGIT G_LSE RUN NUMBER START MASS TOTAL"
                self.launch("budget_check", reads, "FULL", [blocks], SLAB=numbers([self.slabs], call.device))
        backward.finish(outputs)

    def _order(self) -> None:
        """PERM, the columns sorted by the blocks that keep them, and MASK, which those are."""
        call, made, blocks = self.call, self.made, self.blocks
        made |= {name: call.empty([blocks], torch.int32) for name in ("EDGE", "CUT", "KEEPS")}
        self.launch("budget_select", "TARGET LSE TARGET_LOGIT G_LSE BOUND", "EDGE CUT KEEPS", [blocks])
        # The place of each block among those with shorter lists.
        keeps = made["KEEPS"]
        one, other = op("unsqueeze", keeps, 1), op("unsqueeze", keeps, 0)
        index = iota(blocks, call.device)
        earlier = op("lt.Tensor", op("unsqueeze", index, 0), op("unsqueeze", index, 1))
        equal = op("logical_and", op("eq.Tensor", other, one), earlier)
        shorter = op("logical_or", op("lt.Tensor", other, one), equal)
        place = op("sum.dim_IntList", shorter, [1])
        rank = op("full", [blocks], 0, dtype=torch.int64, device=call.device)
        made["RANK"] = in_memory(op("index_put", rank, [place], index))
        made["MASK"] = call.empty([blocks, self.tiles * 4], torch.int32)
        made["KEY"] = call.empty([call.v], torch.int64)
        self.launch("budget_mask", "TARGET BOUND EDGE CUT RANK", "MASK KEY", [call.v])
        made["PERM"] = argsort(made.pop("KEY"))

    def _slab(self, slab: Any) -> None:
        call, made, n = self.call, self.made, self.blocks * BLOCK
        self.launch("budget_list", "PERM BITS RUN NUMBER START BASE RANGE MASS", "LIST TOTAL", [self.blocks], SLAB=slab)
        reads = "BIAS TARGET LSE G_LSE G_TARGET_LOGIT FACTOR LIST NUMBER START MOST"
        self.launch("budget_dlogits", reads, "DLOGITS MASS", [n, self.width], SLAB=slab)
        if "DW" in made or "DB" in made:
            reads = "FACTOR DLOGITS PERM BITS RUN BASE RANGE OF_TILE IN_TILE"
            self.launch("budget_dw", reads, "DW DB", [self.width, call.d], SLAB=slab)
        if "DX" in made:
            self.launch("budget_dx", "DLOGITS LIST NUMBER START RANGE", "DX", [n, call.d], SLAB=slab)
