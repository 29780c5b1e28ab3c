"""The keep rule against brute force, the counts against lists done by hand, and a tiny run of the command."""

import json
from itertools import combinations

import pytest
import torch

from cce_inductor.bench import columns, masses
from cce_inductor.bench.main import main

# Three blocks, six columns.
KEPT = torch.tensor([[1, 0, 0, 1, 0, 0], [1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]], dtype=torch.bool)


def dense_gradient(x, weight, target):
    """|p| with equal tangents, without the targets' entries."""
    return (x @ weight.T).softmax(1).scatter(1, target[:, None], 0.0)


@pytest.fixture
def inputs():
    return 2 * torch.randn(300, 8), torch.randn(40, 8), torch.randint(40, (300,))


class TestMasses:
    def test_against_the_softmax(self, inputs):
        found = masses.measure(*inputs)
        blocks = dense_gradient(*inputs).split(128)
        torch.testing.assert_close(found.mass, torch.stack([block.sum(0) for block in blocks]))
        torch.testing.assert_close(found.gradient, torch.stack([block.sum() for block in blocks]))

    @pytest.mark.parametrize("known", ["row", "block", "batch"])
    @pytest.mark.parametrize("strided", [False, True])
    def test_one_pass_never_underestimates(self, monkeypatch, inputs, strided, known):
        monkeypatch.setattr(masses, "TILE", 4)
        x, weight, target = inputs[0], inputs[1], inputs[2] // 4  # a quarter of the columns are targets
        exact = masses.measure(x, weight, target).mass
        for splits in (1, 3):
            bound = masses.measure(x, weight, target, splits, strided, known).mass
            assert (bound >= exact * (1 - 1e-5)).all()
            assert (bound > 1.01 * exact).any()
            assert (bound <= masses.measure(x, weight, target, splits, strided).mass * (1 + 1e-5)).all()

    def test_running_lse_starts_anew_in_each_part(self, monkeypatch):
        monkeypatch.setattr(masses, "TILE", 1)
        logits = torch.zeros(1, 5)  # two parts of three tiles, the last one empty
        found = masses._running(logits, 2, strided=False).exp()
        torch.testing.assert_close(found, torch.tensor([[1.0, 2, 3, 1, 2]]))
        found = masses._running(logits, 2, strided=True).exp()
        torch.testing.assert_close(found, torch.tensor([[1.0, 1, 2, 2, 3]]))

    def test_made_targets_follow_the_softmax(self):
        x, weight, target = masses.made(600, 50, seed=1)
        assert x.shape == (600, weight.shape[1]) and len(weight) == 50
        expected = (x @ weight.T).softmax(1).sum(0)
        assert (torch.bincount(target, minlength=50) - expected).abs().max() < 4 * expected.max().sqrt()


class TestKeep:
    @pytest.mark.parametrize("budget", columns.BUDGETS.values())
    def test_contract(self, inputs, budget):
        x, weight, target = inputs
        kept = columns.keep(masses.measure(x, weight, target), budget)
        assert not kept.all()
        for keep, block in zip(kept, dense_gradient(x, weight, target).double().split(128), strict=True):
            assert block[:, ~keep].sum() <= budget * block.sum() * (1 + 1e-6)

    def test_no_larger_set_can_be_dropped(self):
        mass = torch.tensor([[3.0, 0.5, 2.0, 0.25, 1.0, 0.125, 4.0, 1.5]])
        for budget in (0.0, 0.01, 0.1, 0.3, 1.0):
            kept = columns.keep(masses.Masses(mass, mass.sum(1)), budget)
            allowed = budget * mass.sum()
            most = max(n for n in range(9) if any(sum(c) <= allowed for c in combinations(mass[0].tolist(), n)))
            assert int((~kept).sum()) == most

    def test_flat_softmax_keeps_nearly_all(self):
        mass = torch.ones(2, 1000)
        assert columns.keep(masses.Masses(mass, mass.sum(1)), 1e-2).sum(1).tolist() == [990, 990]


class TestCounts:
    def test_tiles(self):
        natural = torch.arange(6)
        # In tiles of two, the blocks take two, two and one of three; in tiles of four, one, one and one of two.
        assert columns.tile_work(KEPT, natural, 1) == 6 / 18
        assert columns.tile_work(KEPT, natural, 2) == 2 * 5 / 18
        assert columns.tile_work(KEPT, natural, 4) == 4 * 3 / 18
        assert columns.tile_work(KEPT, torch.tensor([0, 3, 2, 1, 4, 5]), 2) == 2 * 4 / 18

    def test_lists(self):
        assert columns.unions(KEPT, 2).int().tolist() == [[1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]]
        assert columns.list_work(KEPT, 1, 6, 1) == 6 / 18
        assert columns.list_work(KEPT, 1, 6, 2) == (2 + 4 + 2) / 18
        assert columns.list_work(KEPT, 1, 3, 2) == (2 + 2 + 2 + 2 + 2) / 18
        assert columns.list_work(KEPT, 2, 6, 1) == (3 * 2 + 1) / 18
        assert columns.list_work(KEPT, 3, 6, 4) == 4 * 3 / 18

    def test_order_by_blocks(self):
        # The third block has the shortest list and leads; then come the first and the second.
        order = columns.by_blocks(KEPT).tolist()
        assert order == [1, 4, 5, 0, 3, 2]

    def test_equal_sets_lie_together_and_neighbours_differ_in_one_block(self):
        kept = (torch.arange(64)[None, :] >> torch.arange(4)[:, None]) % 2 > 0  # every set four times
        kept[3, 63] = False  # the only block with a shorter list leads
        ordered = kept[:, columns.by_blocks(kept)]
        changes = (ordered[:, 1:] != ordered[:, :-1]).sum(0)
        assert changes.max() == 1 and int((changes > 0).sum()) == 15

    def test_schedules(self):
        kept = torch.zeros(32, 256, dtype=torch.bool)
        kept[:, :100] = True
        kept[0, 100:200] = True
        natural = torch.arange(256)
        ordered = dict.fromkeys(("natural", "by blocks"), natural)
        found = {count.schedule: count for count in columns.schedules(kept, ordered, 64)}
        dense, tiles, union = found["dense"], found["tiles of 128, by blocks"], found["union of all"]
        assert (dense.work, dense.total, dense.sums, dense.operands, dense.launches) == (1.0, 8.0, 1.0, 1.0, 2)
        assert dense.scratch == 2 * 32 * 128 * 256
        work = (31 * 128 + 256) / (32 * 256)  # the columns of the first block fill two tiles
        assert tiles.work == work == found["union of 1"].work
        assert tiles.total == 2 + 6 * work
        assert union.work == 1.0 and union.sums == 1.0
        # Every list is visited once: fp32 read and written; besides, zeros, the last read and dW itself.
        visits = 31 * 100 + 200
        assert found["union of 1"].sums == (8 * visits + 10 * 256) / (2 * 256)
        assert found["union of 1"].scratch == found["union of all"].scratch + 4 * 64 * 256
        assert found["union of 1"].launches == 64
        assert found["scatter in the tile"].work == (31 * 112 + 128 + 80) / (32 * 256)
        assert "tiles of 128, by blocks, anew every 16 blocks" in found


def test_command(tmp_path, capsys):
    assert main(["--columns", "--quick", "--output", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]) == 0
    printed = capsys.readouterr().out
    assert "### Made: N=512" in printed and "| tiles of 128, by blocks |" in printed and "| 16 parts |" in printed
    saved = json.loads((tmp_path / "out" / "cpu-columns.json").read_text())["columns"]
    (case,) = saved["cases"]
    assert set(case["kept"]) == set(case["schedules"]) == set(columns.BUDGETS)
    for name, kept in case["kept"].items():
        tiles = case["tiles"][name]
        assert kept <= tiles["by blocks"][0] <= tiles["by blocks"][-1] <= 1
        assert tiles["by blocks"][-1] < tiles["natural"][-1]
        assert saved["bounds"]["mass"][name] == kept <= saved["bounds"]["1 part"][name]
    assert "<!-- bench:columns -->" in (tmp_path / "docs" / "benchmarks.md").read_text()
