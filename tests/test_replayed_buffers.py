"""Deferred logits of graphs whose results lie in buffers that the next run overwrites, as CUDA graphs replay them.

The graphs are compiled by AOTAutograd with a compiler of ours that returns the very same tensors at every call, filled
anew without a change of their version. A read in time is right; a later one is the named error, or right where the
next run has left the same values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from cce_inductor import backend, compat, config
from cce_inductor.deferred import DeferredLogits, DeferredLogitsError, defer

B, S, D, V = 2, 6, 8, 40000
assert B * S * V * 4 > 2**20  # large logits: statistics are served
pytestmark = pytest.mark.usefixtures("a_mib_is_large")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.trunk(x)))
        return logits if t is None else (F.cross_entropy(logits.flatten(0, 1), t.flatten()), logits)


def _replayed(gm: torch.fx.GraphModule, _: Any) -> Callable:
    """A compiler whose functions return the same buffers every time."""
    buffers: list[Any] = []

    def run(*args: Any) -> list[Any]:
        made = [x.clone() if isinstance(x, Tensor) else x for x in gm(*args)]
        if not buffers:
            buffers[:] = made
        for buffer, value in zip(buffers, made, strict=True):
            if isinstance(buffer, Tensor) and buffer is not value:
                with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(buffer):
                    buffer.copy_(value)
        return buffers

    return make_boxed_func(run)


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    settings = config.split_options({"min_vocab": 0, "compiler": "aot_eager"})[0]
    compiler = aot_autograd(fw_compiler=_replayed)

    def compile_graph(gm: torch.fx.GraphModule, inputs: Any) -> Callable:
        return backend.compile_graph(gm, inputs, settings, compiler)

    return torch.compile(model, backend=compile_graph)


GEN = torch.Generator().manual_seed(1)
FIRST, SECOND = torch.randn(B, S, D, generator=GEN), torch.randn(B, S, D, generator=GEN)
TARGET = torch.randint(0, V, (B, S), generator=GEN)

READS: dict[str, Callable[[Any], Any]] = {
    "read": lambda z: z.float().cumsum(-1),
    "argmax": lambda z: z.argmax(-1),
    "logsumexp": lambda z: z.logsumexp(-1),
    "loss": lambda z: F.cross_entropy(z.flatten(0, 1), TARGET.flatten()),
}


@pytest.mark.parametrize("inside", [True, False], ids=["loss_inside", "loss_in_another_graph"])
@pytest.mark.parametrize("name", READS)
def test_a_read_after_the_next_run(name: str, inside: bool) -> None:
    model = Model()
    lazy = compiled(model)

    def logits_of(x: Tensor) -> Any:
        logits = lazy(x, TARGET)[1] if inside else lazy(x)
        assert isinstance(logits, DeferredLogits)
        return logits

    for _ in range(2):  # the buffers are made by the first run of all
        logits = logits_of(FIRST)
        in_time = READS[name](logits)
        torch.testing.assert_close(in_time, READS[name](model(FIRST)))
        logits, read = logits_of(FIRST), logits_of(FIRST)
        values = read.materialize().clone()
        logits_of(SECOND)
        with pytest.raises(DeferredLogitsError, match="hidden states.*overwritten"):
            READS[name](logits)
        torch.testing.assert_close(READS[name](read), READS[name](values))
        logits = logits_of(FIRST)
        logits_of(FIRST)
        torch.testing.assert_close(READS[name](logits), READS[name](model(FIRST)))


MESSAGE = f"Error: accessing tensor {compat.OVERWRITTEN} by a subsequent run. Stack trace: none."


def test_torch_has_the_message_that_is_looked_for() -> None:
    import torch._inductor.cudagraph_trees as trees

    assert f"accessing tensor {compat.OVERWRITTEN}" in inspect.getsource(trees)


@pytest.mark.parametrize("read", ["argmax", "logsumexp", "read"])
def test_a_pool_that_pytorch_has_invalidated(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.randn(B, S, D), torch.randn(V, D)
    logits = defer(lambda o: F.linear(*o), (hidden, weight), shape=(B, S, V), dtype=torch.float32, requires_grad=False)
    if hasattr(torch._C, "_set_storage_data_ptr_access_error_msg"):  # builds with CUDA have it, for any device
        torch._C._set_storage_data_ptr_access_error_msg(hidden.untyped_storage()._cdata, MESSAGE)
    else:

        def sample(_: Tensor) -> Tensor:
            raise RuntimeError(MESSAGE)

        monkeypatch.setattr("cce_inductor.deferred.staleness.sample", sample)
    with pytest.raises(DeferredLogitsError, match=r"hidden states.*overwritten.*CUDA graph.*materialize"):
        READS[read](logits)


def test_other_errors_of_a_device_are_not_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = defer(
        lambda o: F.linear(*o), (FIRST, torch.randn(V, D)), shape=(B, S, V), dtype=torch.float32, requires_grad=False
    )

    def sample(_: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("cce_inductor.deferred.staleness.sample", sample)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        logits.argmax(-1)
