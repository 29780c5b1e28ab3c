"""Training graphs whose GPU code the tests generate, without a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from unittest.mock import patch

import mock_cuda
import torch
from capture import graphs_of
from gpu_cases import SMALL
from torch._inductor.select_algorithm import AlgorithmSelectorCache

from cce_inductor import config
from cce_inductor.lowering import cuda_backward, cuda_call, cuda_forward, cuda_library, triton_configs
from cce_inductor.lowering.register import register
from cce_inductor.lowering.schedules import Round, Schedule, Sweep
from cce_inductor.lowering.triton_template import Tiles
from cce_inductor.ops.choice import Chooser
from cce_inductor.rewrite.run import rewrite
from cce_inductor.version import source_hash


def generate(
    fn: Callable,
    inputs: Sequence[torch.Tensor],
    capability: int = 90,
    tiles: Tiles | None = SMALL,
    workspace: int = 1 << 20,
    sweeps: tuple[Sweep, ...] = (),
    fastest: str = "slab",
    choose: Chooser | None = None,
    grad_filter: str = "exact",
    rounds: tuple[Round, ...] = (),
    library: bool = False,
) -> list[str]:
    """The wrappers of forward and backward of ``fn(*inputs)``, rewritten.

    tiles: the only configuration, if given. sweeps: the only schedule of the backward. Without any, the one named in
    `fastest` wins among those that fit; each of the others adds its wrapper before the backward's, as it was timed.
    rounds: those of a forward that leaves a bound, if given. library: whether PyTorch's GEMMs may make products
    wherever they can.
    """
    register()
    (gm,) = graphs_of(fn, *inputs)
    result = rewrite(gm, config.Settings(min_vocab=0, grad_filter=grad_filter), source_hash(), choose)
    assert result.fused or not result.sites, [str(site) for site in result.sites]
    for node in result.graph_module.graph.nodes:
        # A workspace below 1 MiB, so that slabs are several at sizes that the interpreter can run.
        node.args = tuple(workspace if isinstance(a, int) and a == 64 << 20 else a for a in node.args)
    result.graph_module.recompile()
    nodes = [node for node in result.graph_module.graph.nodes if node.op == "placeholder"]

    def only(kernel, operands, compute, device, tma, block_n=None, block_m=None, factors=False):
        shape = {"block_m": block_m or tiles.block_m, "block_n": block_n or tiles.block_n}
        return [replace(tiles, tma=tiles.tma and tma, **shape)]

    chosen = triton_configs.configurations if tiles is None else only
    schedules, cut, multiplies = cuda_backward.schedules, cuda_forward.rounds, cuda_library.multiplies

    def scheduled(*arguments, **options):
        return [Schedule("chosen", sweeps)] if sweeps else schedules(*arguments, **options)

    def timings(*arguments, **options):
        return lambda choices: {choice: float(choice.schedule.name != fastest) for choice in choices}

    def in_rounds(*arguments):
        return list(rounds) or cut(*arguments)

    with (
        mock_cuda.device(capability),
        patch.object(cuda_call, "configurations", chosen),
        patch.object(cuda_backward, "schedules", scheduled),
        patch.object(cuda_forward, "rounds", in_rounds),
        patch.object(cuda_library, "multiplies", lambda call: library and multiplies(call)),
        patch.object(AlgorithmSelectorCache, "make_benchmark_fn", timings),
        torch._inductor.config.patch(autotune_local_cache=False),
    ):
        return mock_cuda.wrappers(result.graph_module, [node.meta["example_value"] for node in nodes])
