"""Schedules as choices of Inductor's autotuner: each is compiled by itself and timed as a whole."""

import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.testing import rand_strided
from torch._inductor import ir
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.benchmarking import benchmarker
from torch._inductor.select_algorithm import NoValidChoicesError
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from .. import compat
from ..ops.call import Attributes
from ..version import source_hash
from .schedules import Schedule

log = logging.getLogger(__name__)

Run = Callable[[Schedule], list[Any]]
# While a schedule is compiled to be timed: its name.
_only: list[str] = []


def fastest(
    found: Sequence[Schedule],
    run: Run,
    operator: Any,
    tangents: dict[str, Any],
    saved: dict[str, Any],
    operands: dict[str, Any],
    row_mask: Any,
    needs: Sequence[str],
    attributes: Attributes,
) -> list[Any]:
    """What `run` gives for the schedule that is the fastest at calling the backward operator with these arguments."""
    if _only:
        found = [schedule for schedule in found if schedule.name == _only[-1]]
    config = torch._inductor.config
    if len(found) == 1 or config.deterministic or config.autotune_in_subproc:
        return run(found[0])
    lists = [list(tangents.values()), list(saved.values()), list(operands.values())]
    nodes = [ir.ExternKernel.realize_input(t) for t in (*lists[0], *lists[1], *lists[2])]
    nodes += [] if row_mask is None else [ir.ExternKernel.realize_input(row_mask)]

    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        parts, at = [], 0
        for values in lists:
            parts.append(list(tensors[at : at + len(values)]))
            at += len(values)
        mask = None if row_mask is None else tensors[-1]
        names = [" ".join(named) for named in (tangents, operands, saved, needs)]
        return operator(parts[0], names[0], parts[1], parts[2], names[1], mask, names[2], names[3], *attributes.args())

    layout = ir.FixedLayout(nodes[0].get_device_or_error(), torch.float32, [1], [1])
    choices = []
    for schedule in found:
        try:
            choices.append(ScheduleChoice(schedule, nodes, layout, call, run))
        except Exception:
            log.warning("the schedule %s of the backward cannot be compiled", schedule.name, exc_info=True)
    if not choices:
        return run(found[0])
    try:
        # One of the inputs will do: the choices make their own.
        compat.autotuned("cce_linear_statistics_backward", choices, nodes[:1], layout, {})
    except NoValidChoicesError:
        return run(found[0])
    (chosen,) = [choice for choice in choices if choice.results]
    return chosen.results


def _example(node: Any) -> torch.Tensor:
    """A tensor as the node will be, with its strides: numbers at random, targets that exist, rows that all count."""
    size, stride = ([int(s) for s in sizes] for sizes in (node.get_size(), node.get_stride()))  # static
    if node.get_dtype() == torch.bool:
        return torch.empty_strided(size, stride, dtype=torch.bool, device=node.get_device()).fill_(True)
    return rand_strided(size, stride, node.get_dtype(), node.get_device())


class ScheduleChoice(ir.ChoiceCaller):
    """One schedule. Its output node, of which nothing is used, puts the schedule's kernels into the graph."""

    def __init__(self, schedule: Schedule, nodes: list[Any], layout: ir.Layout, call: Callable, run: Run):
        about = [(n.get_size(), n.get_stride(), n.get_dtype()) for n in nodes]
        name = re.sub(r"\W+", "_", f"cce_schedule_{schedule.name}")
        super().__init__(name, nodes, layout, f"{schedule}, {about}, {source_hash()}")
        self.schedule, self.run = schedule, run
        self.results: list[Any] = []
        self.module = self._compiled(call)

    def _compiled(self, call: Callable) -> Any:
        """The operator alone, in this schedule. Now, since kernels are tuned meanwhile, and tuning cannot be nested."""
        with V.fake_mode:
            inputs = [ir.ir_node_to_tensor(node) for node in self.input_nodes]
            graph = make_fx(call)(*inputs)
        lowering = GraphLowering(
            graph, example_inputs=inputs, shape_env=V.graph._shape_env, is_backward=True, name=f"benchmark_{self.name}"
        )
        _only.append(self.schedule.name)
        try:
            with V.set_graph_handler(lowering):
                lowering.run(*inputs)
                return lowering.compile_to_module()
        finally:
            _only.pop()

    def benchmark(self, *args: Any, out: torch.Tensor) -> float:
        try:
            # The autotuner gives the base of a view, and a buffer once however many of its views are operands.
            tensors = [_example(node) for node in self.input_nodes]
            return benchmarker.benchmark_gpu(lambda: self.module.call(list(tensors)))
        except Exception:
            log.warning("the schedule %s of the backward cannot be timed", self.schedule.name, exc_info=True)
            return math.inf

    def output_node(self) -> Any:
        self.results = self.run(self.schedule)
        return self.results[0]

    def call_name(self) -> str:
        return self.name

    def to_callable(self) -> Any:
        return self.module.call

    def hash_key(self) -> str:
        return f"{self.name}-{self.description}"

    def info_dict(self) -> dict[str, Any]:
        return {"backend": "cce_inductor", "schedule": self.schedule.name}

    def autoheuristic_id(self) -> str:
        return self.name
