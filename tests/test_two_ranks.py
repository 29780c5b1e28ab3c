"""DDP, FSDP2 and FSDP1 in two processes with different data, around a compiled model or compiled themselves.

The ranks run all cases once (`two_ranks`); every test looks at one of them, and at the same without us.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import two_ranks
from on_ranks import results_of
from torch import Tensor
from two_ranks import CASES, INSIDE, RANKS

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.xdist_group("ranks"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return results_of(two_ranks.programs, tmp_path_factory.mktemp("ranks"))(RANKS)


def close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for g, e in zip(got, expected, strict=True):
        assert (g.shape, g.dtype) == (e.shape, e.dtype)
        assert float((g - e).abs().max()) <= tolerance * float(e.abs().max())


@pytest.mark.parametrize("where", INSIDE)
@pytest.mark.parametrize("wrapper,order", CASES)
def test_two_ranks(wrapper: str, order: str, where: str, ranks: list[dict[Any, Any]]) -> None:
    for results in ranks:
        got, plain = results[wrapper, order, where], results[wrapper, None, where]
        assert isinstance(plain, dict) and isinstance(got, dict), (plain, got)
        tolerance = 3e-2 if "mixed" in wrapper else 1e-5
        for name in ("", "_of_read"):
            close([got[f"loss{name}"]], [plain[f"loss{name}"]], tolerance)
            close(got[f"grads{name}"], plain[f"grads{name}"], tolerance)
        # Without a graph the loss is called on the logits, wherever it stands.
        freed = wrapper in ("fsdp2_reshard", "fsdp2_head_apart") or wrapper.startswith("fsdp1")
        fused = where == "loss_inside" and "fsdp2_head" not in wrapper  # its hooks break the graph
        fused = fused if "compile" in order else not freed
        if fused:
            assert got["lazy"] and got["counts"] == {"fused": 1, "deferred_materialized": 0}
        # A weight that is taken back after the forward is of no use to a loss in another graph.
        assert got["lazy"] or (not fused and (freed or "fsdp2_head" in wrapper))
        if fused and wrapper == "fsdp2_reshard":
            assert "has been freed" in got["logits"]
        else:
            assert torch.equal(got["logits"], plain["logits"])
        if fused or isinstance(got["late"], str):
            assert "read too late: " in got["late"] and ".materialize()" in got["late"]
        else:  # a backward that went through the logits has computed them
            assert torch.equal(got["late"], plain["late"])


def test_the_ranks_have_different_data_and_the_same_gradients(ranks: list[dict[Any, Any]]) -> None:
    first, second = (results["ddp", None, "loss_inside"] for results in ranks)
    assert first["loss"] != second["loss"]
    close(first["grads"], second["grads"], 0.0)
