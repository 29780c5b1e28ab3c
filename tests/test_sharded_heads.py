"""Heads that no rank has whole, where each rank has its own tokens: `shard_head`, and graphs that gather their weights.

Values and gradients are those of one process in float64: the mean over ranks of each rank's loss, as under FSDP and
DDP. The ranks run all cases once (`sharded_heads`); on two ranks, under `make test-all` also on three and four.
"""

from __future__ import annotations

from typing import Any

import pytest
import sharded_heads
import torch
import torch.distributed as dist
from head_oracle import check_error_rule
from on_ranks import Results, results_of
from sharded_heads import CASES, MORE, SIZES, exact

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.xdist_group("ranks"),
]
MORE_RANKS = (pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow))
RANKS = (2, *MORE_RANKS)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of(sharded_heads.programs, tmp_path_factory.mktemp("ranks"))


def of(name: str, n: int, ranks: Results) -> list[Any]:
    """What every rank has found."""
    found = [results[name] for results in ranks(n)]
    assert all(not isinstance(made, str) for made in found), found
    return found


def named(loss: torch.Tensor, grads: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"loss": loss, **{f"gradient {i}": g for i, g in enumerate(grads)}}


def gathered_because(how: str, name: str, vocab: int, n: int) -> str:
    """Why the site says that a head is gathered, "" where it is not, or where it is what was asked for."""
    if how == "gather":
        return ""
    if name == "entropy":
        return "the ranks' parts of entropy are not put together"
    if -(-vocab // n) * (n - 1) >= vocab:
        return "it has so few classes that a rank has none"
    return ""


@pytest.mark.parametrize(
    "n,case",
    [
        *((2, case) for case in CASES),
        *(pytest.param(n, case, marks=pytest.mark.slow) for n in (3, 4) for case in MORE),
    ],
    ids=str,
)
def test_is_as_in_one_process(n: int, case: Any, ranks: Results) -> None:
    _, how, name, vocab, bias, dtype = case
    losses, grads = exact(vocab, bias, name, n, torch.float64)
    plain_losses, plain = exact(vocab, bias, name, n, dtype)
    reason = gathered_because(how, name, vocab, n)
    swapped = how in ("swap", "stream") or (how == "auto" and n * sharded_heads.N < vocab)
    for rank, results in enumerate(ranks(n)):
        found = results[case]
        assert isinstance(found, dict), found
        assert found["fused"] >= 1 and not found["read"], found["sites"]
        assert all(reason in kernel for kernel in found["kernels"])
        assert all(("not gathered, exact" in kernel) == (swapped and not reason) for kernel in found["kernels"])
        ours, theirs = named(found["loss"], found["grads"]), named(plain_losses[rank], plain)
        check_error_rule(str(case), ours, theirs, named(losses[rank], grads), dtype)


@pytest.mark.parametrize("n", RANKS)
def test_trains_as_fsdp_does(n: int, ranks: Results) -> None:
    """Accumulated and clipped gradients, AdamW; the head in a group with another layer."""
    for found in of("training", n, ranks):
        for how in ("swap", "stream"):
            for name, parameter in found["None"].items():
                torch.testing.assert_close(found[how][name], parameter, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", RANKS)
def test_different_numbers_of_rows(n: int, ranks: Results) -> None:
    """The shards may pass by any number of tokens. Where the tokens travel, all ranks raise the same error."""
    everyone = of("different rows", n, ranks)
    for compiled in (False, True):
        (error,) = {found["swap", compiled] for found in everyone}
        assert "different numbers of rows, [36" in error and "'stream'" in error
        for found in everyone:
            assert found["stream", compiled] == ""
            torch.testing.assert_close(found["grads", compiled], [*found["exact"]], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", MORE_RANKS)
def test_a_rank_without_a_target(n: int, ranks: Results) -> None:
    """In one graph for any number of rows."""
    for rank, found in enumerate(of("without target", n, ranks)):
        for how in ("swap", "stream"):
            for rows in (sharded_heads.N, sharded_heads.N - 5, sharded_heads.N - 9):
                is_nan, grads = found[how, rows]
                assert is_nan == (rank == n - 1)
                torch.testing.assert_close(grads, [*found["exact", rows]], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", RANKS)
def test_logits_may_be_read_by_all_ranks(n: int, ranks: Results) -> None:
    for found in of("read", n, ranks):
        for way in ("inside", "eager", "SimpleFSDP"):
            assert found[way, "lazy"]
            for part in ("before", "evaluation"):
                torch.testing.assert_close(found[way, part], found["z"], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found[way, "grads"], [*found["exact"]], rtol=1e-12, atol=1e-14)


def test_what_it_does_not_take(ranks: Results) -> None:
    for found in of("refused", 2, ranks):
        assert found["tied"].startswith("ValueError: the head's weight is tied: Embedding has it too")
        assert "Untie them" in found["tied"] and "leave the head to FSDP" in found["tied"]
        assert found["conv"].startswith("TypeError: shard_head takes a torch.nn.Linear")
        assert found["two"].startswith("ValueError: shard_head needs a mesh of one dimension, got one of 2")
        assert found["how"].startswith("ValueError: schedule must be one of 'gather', 'swap', 'stream', 'auto', got")
        assert found["one dimension"] == ""
        assert found["twice"].startswith("ValueError: the head's weight is sharded already")


@pytest.mark.parametrize("n", RANKS)
def test_a_read_of_one_rank_ends(n: int, ranks: Results) -> None:
    first, *others = (results["lonely"] for results in ranks(n))
    assert others == [[]] * (n - 1) and len(first) == 2, (first, others)
    for error in first:
        assert error.startswith("DeferredLogitsError") and "within 1 seconds" in error


def test_an_internal_error_is_raised(ranks: Results) -> None:
    """Without the rewrite this rank would take part in other collectives than those that have done it."""
    for results in ranks(2):
        assert (
            "OnOneRankError: cce_inductor: internal error in the rewrite of a head that is spread over ranks"
            in results["faulty"]
        )


@pytest.mark.parametrize("n", RANKS)
def test_collectives_in_graphs(n: int, ranks: Results) -> None:
    for found in of("graphs", n, ranks):
        assert found["gather"]["forward"] == {"all_gather_into_tensor": 1}
        assert found["gather"]["backward"] == {"reduce_scatter_tensor": 1}
        assert found["swap"]["forward"] == {"all_gather_into_tensor": 3, "all_to_all_single": 1}
        assert found["swap"]["backward"] == {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
        assert found["stream"]["forward"] == {"all_to_all_single": n - 1}
        assert found["stream"]["backward"] == {"all_to_all_single": 2 * (n - 1)}
        rows, width, whole = sharded_heads.N, sharded_heads.D, (80, sharded_heads.D)
        assert whole in found["gather"]["shapes"]
        for how in ("swap", "stream"):
            assert whole not in found[how]["shapes"]
            assert not any(s[-1] in (80, -(-80 // n)) and len(s) > 1 for s in found[how]["shapes"] if s)
        assert (n * rows, width) in found["swap"]["shapes"] and (n * rows, width) not in found["stream"]["shapes"]


@pytest.mark.parametrize("n", MORE_RANKS)
def test_bytes_that_are_sent(n: int, ranks: Results) -> None:
    """The formulas of docs/distributed.md, in bytes; fp32, 2 statistics of which both have a tangent."""
    rows, d, v = SIZES.values()
    shard, hidden, others = -(-v // n) * d * 4, rows * d * 4, n - 1
    for found in of("counted", n, ranks):
        gather, swap, stream = (found[how] for how in ("gather", "swap", "stream"))
        assert gather["forward"] == {"all_gather_into_tensor": [others * shard]}
        assert gather["backward"] == {"reduce_scatter_tensor": [others * shard]}
        assert swap["forward"] == {
            "all_gather_into_tensor": [others * 8, others * rows * 2 * 8, others * hidden],
            "all_to_all_single": [others * rows * 2 * 4],
        }
        assert swap["backward"] == {
            "all_gather_into_tensor": [others * rows * 3 * 4],
            "reduce_scatter_tensor": [others * hidden],
        }
        assert stream["forward"] == {"all_to_all_single": [shard] * others}
        assert stream["backward"] == {"all_to_all_single": [shard] * 2 * others}


@pytest.mark.parametrize("n", MORE_RANKS)
def test_bytes_that_are_allocated(n: int, ranks: Results) -> None:
    """Neither logits nor, but for `gather`, the whole weight. Scratch is 1 MiB; the peak counts x, W's shard and dW."""
    rows, d, v = SIZES.values()
    shard, hidden, scratch = -(-v // n) * d * 4, rows * d * 4, 1 << 20
    for found in of("counted", n, ranks):
        gather, swap, stream = (found[how] for how in ("gather", "swap", "stream"))
        assert gather["largest"] >= v * d * 4 and gather["peak"] >= 2 * v * d * 4
        # One allocation of the size of a slab of logits is scratch.
        for made in (swap, stream):
            assert made["largest"] <= max(shard, n * hidden, scratch) < min(rows * v * 4 // n, v * d * 4)
        assert swap["peak"] <= 2 * shard + (2 * n + 3) * hidden + 1.5 * scratch
        # Its own shard, one that is there and one on the way; two gradients of a shard; x, and dx twice.
        assert stream["peak"] <= 5 * shard + 4 * hidden + 1.5 * scratch
