"""Training graphs whose GPU code the tests generate, without a GPU."""

from collections.abc import Callable, Sequence
from unittest.mock import patch

import mock_cuda
import torch
from capture import graphs_of

from cce_inductor import config
from cce_inductor.lowering import triton_configs
from cce_inductor.lowering.register import register
from cce_inductor.lowering.triton_template import Tiles
from cce_inductor.rewrite.rewrite import rewrite
from cce_inductor.version import source_hash

# Small enough for the interpreter, and several blocks, tiles and steps of everything.
SMALL = Tiles(32, 32, 16, 2, 4)


def generate(
    fn: Callable,
    inputs: Sequence[torch.Tensor],
    capability: int = 90,
    tiles: Tiles | None = SMALL,
    dynamic: bool = False,
    workspace: int = 1 << 20,
) -> list[str]:
    """The wrappers of forward and backward of ``fn(*inputs)``, rewritten; `tiles`: the only configuration, if given."""
    import cce_inductor.lowering.cuda as lowering

    register()
    (gm,) = graphs_of(fn, *inputs, dynamic=dynamic)
    result = rewrite(gm, config.Settings(min_vocab=0), source_hash())
    assert result.fused, [str(site) for site in result.sites]
    for node in result.graph_module.graph.nodes:
        # A workspace below 1 MiB, so that slabs are several at sizes that the interpreter can run.
        node.args = tuple(workspace if isinstance(a, int) and a == 64 << 20 else a for a in node.args)
    result.graph_module.recompile()
    nodes = [node for node in result.graph_module.graph.nodes if node.op == "placeholder"]
    chosen = (lambda *a: [tiles]) if tiles is not None else triton_configs.configurations
    with mock_cuda.device(capability), patch.object(lowering, "configurations", chosen):
        return mock_cuda.wrappers(result.graph_module, [node.meta["example_value"] for node in nodes])
