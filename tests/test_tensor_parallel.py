"""Heads that are split over ranks: one loss of all of them, without any rank's logits. On two and on three ranks.

Values and gradients are those of one process in float64. The ranks run all cases once (`tensor_parallel`).
"""

from __future__ import annotations

from typing import Any

import pytest
import tensor_parallel
import torch
import torch.distributed as dist
from on_ranks import Results, results_of
from tensor_parallel import CASES, MORE

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.xdist_group("ranks"),
]
RANKS = (2, pytest.param(3, marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of(tensor_parallel.programs, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    "n,case",
    [*((2, case) for case in CASES), *(pytest.param(3, case, marks=pytest.mark.slow) for case in CASES + MORE)],
    ids=str,
)
def test_is_one_head(n: int, case: Any, ranks: Results) -> None:
    for found in (results[case] for results in ranks(n)):
        assert isinstance(found, dict), found
        assert found["reads"] == (case[1] == "returned, trained through")
        if case[2] < n:  # a rank has no part of the logits
            assert not found["fused"] and "a tensor-parallel head" in found["reasons"][0]
        else:
            assert found["fused"] >= 1, found["reasons"]
        torch.testing.assert_close(found["value"].double(), found["exact"], rtol=1e-5, atol=1e-6)
        for g, e in found["grads"]:
            assert float((g - e).abs().max()) <= 1e-5 * float(e.abs().max()) + 1e-7
    first, *others = (results[case]["value"] for results in ranks(n))
    assert all(torch.equal(first, value) for value in others)


@pytest.mark.parametrize("n", RANKS)
def test_one_collective_in_the_forward_and_one_for_the_hidden_states(n: int, ranks: Results) -> None:
    for results in ranks(n):
        assert results["collectives"] == {"forward": {"all_gather_into_tensor": 1}, "backward": {"all_reduce": 1}}


@pytest.mark.parametrize("n", RANKS)
def test_a_read_of_one_rank_ends(n: int, ranks: Results) -> None:
    for rank, results in enumerate(ranks(n)):
        errors = results["lonely"]
        assert len(errors) == 2, errors
        for error in errors:
            if rank == 0:
                assert f"rank 0 reads logits of a head that is spread over ranks {list(range(n))}" in error
                assert f"ranks {list(range(1, n))} did not within 1 seconds" in error
            else:
                assert f"rank {rank} reads" in error and "another one has given up waiting" in error


@pytest.mark.parametrize("n", RANKS)
def test_a_fault_of_ours_is_an_error_on_its_rank(n: int, ranks: Results) -> None:
    for results in ranks(n):
        assert "a head that is spread over ranks, which others may have done" in results["failing"]


def test_a_model_of_hugging_face_that_its_plan_has_split(ranks: Results) -> None:
    for found in (results["hugging face"] for results in ranks(2)):
        assert isinstance(found, dict), found
        assert (found["fused"], found["reads"]) == (1, 0)
        for g, e in found["pairs"]:
            assert float((g - e).abs().max()) <= 1e-5 * float(e.abs().max()) + 1e-7
