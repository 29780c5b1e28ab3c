"""The harness that trains with each filter: its statistics on made numbers, its parts by hand, and a tiny run."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from run import main
from training import caps, driver, errors, paired, pretrain, specs, tables
from training.made import made
from training.model import Model
from training.optimizers import Lion
from training.specs import Finetuning, Pretraining


class TestPaired:
    def test_gap_of_made_numbers(self):
        base = {0: 10.0, 1: 20.0, 2: 30.0, 7: 5.0}
        found = paired.gap({0: 11.0, 1: 22.0, 2: 33.0, 3: 0.0}, base)  # 1, 2, 3: deviation 1
        assert (found.mean, found.count) == (2.0, 3)
        assert found.error == pytest.approx(1 / math.sqrt(3))
        assert found.half == pytest.approx(4.303 / math.sqrt(3)) and not found.excludes_zero
        assert paired.gap({0: 11.0, 1: 21.0, 2: 31.001}, base).excludes_zero

    def test_one_pair_has_no_error_bar_and_none_no_gap(self):
        found = paired.gap({0: 1.5}, {0: 1.0})
        assert found.mean == 0.5 and math.isnan(found.half) and not found.excludes_zero
        assert paired.gap({0: 1.0}, {1: 1.0}) is None

    @pytest.mark.parametrize("count", [2, 3, 5])
    def test_intervals_cover_the_mean_nineteen_times_of_twenty(self, count):
        generator = torch.Generator().manual_seed(count)
        draws = (3.0 + torch.randn(4000, count, generator=generator)).tolist()
        zero = dict.fromkeys(range(count), 0.0)
        gaps = [paired.gap(dict(enumerate(row)), zero) for row in draws]
        assert sum(abs(gap.mean - 3.0) <= gap.half for gap in gaps) / len(gaps) == pytest.approx(0.95, abs=0.012)

    def test_what_seeds_share_cancels(self):
        base = {seed: 100.0 * seed for seed in range(5)}
        found = paired.gap({seed: value + 0.25 for seed, value in base.items()}, base)
        assert found.mean == 0.25 and found.half == 0.0 and found.excludes_zero

    def test_spread(self):
        assert paired.spread({0: 1.0, 1: 3.0}) == (2.0, pytest.approx(math.sqrt(2)))
        assert math.isnan(paired.spread({0: 1.0})[1])


class TestTables:
    @staticmethod
    def made(mode, seed, loss):
        curve = [[step, 9.0] for step in range(3)] + [[step, loss + step % 2] for step in range(tables.LAST - 1)]
        curve.append([tables.LAST, loss - 2.0])
        return {"spec": {"mode": mode, "seed": seed}, "curve": curve, "training loss": [9.0] * 6 + [loss, loss]}

    def test_pretraining(self):
        runs = [self.made("exact", s, 5.0 + s) for s in range(3)]
        runs += [self.made("a", s, 5.0 + s + 0.1 * (s + 1)) for s in range(3)] + [self.made("b", 1, 6.5)]
        exact, a, b = tables.pretraining(runs).splitlines()[2:]
        assert exact == "| exact | 3 | 6.0000 (1.0000) |  |  | 6.0000 (1.0000) |  |"
        assert "| +0.2000 ± 0.2484 | 0/8 |" in a and "*" not in a
        assert b == "| b | 1 | 6.5000 | +0.5000 | 0/8 | 6.5000 | +0.5000 |"

    def test_outside(self):
        base = {seed: {"curve": [[1, 0.0], [2, 0.0]]} for seed in range(3)}
        mine = {seed: {"curve": [[1, 1.0 + 0.1 * seed], [2, 1.0 * seed]]} for seed in range(3)}
        assert tables.outside(mine, base) == "1/2"

    def test_steps_needed(self):
        assert tables.steps_needed({"losses": [3.0, 0.5, 0.09, 0.2]}) == 2
        assert tables.steps_needed({"losses": [3.0]}) == math.inf


def test_lion():
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimizer = Lion([weight], lr=0.5)
    for gradient in ([1e-20, -3.0, 0.0], [-1e-21, 3.0, 0.0]):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    # First: against the sign. Then 0.9 m + 0.1 g, with m = 0.01 g of the first step, has the new gradient's sign.
    assert weight.tolist() == [1.0, 1.0, 1.0]
    weight.grad = torch.tensor([1e-20, 1.0, 0.0])
    optimizer.step()
    assert weight.tolist() == [0.5, 0.5, 1.0]


def test_held_out_rows_are_not_trained_on():
    train, held_out = pretrain.split(torch.arange(1000), held_out=90, seq=9)
    assert len(held_out) == 10 and len(train) == 90
    assert sorted(torch.cat([train, held_out]).flatten().tolist()) == list(range(1000))


def test_permuting_the_vocabulary_changes_nothing():
    torch.manual_seed(0)
    model, ids, order = Model(50, 16, 1, 8), torch.randint(50, (2, 9)), torch.randperm(50)
    before = F.cross_entropy((model(ids[:, :-1]) @ model.head.T).flatten(0, 1), ids[:, 1:].flatten())
    model.permute(order)
    ids = order.argsort()[ids]
    after = F.cross_entropy((model(ids[:, :-1]) @ model.head.T).flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(after, before)


def test_gradients_of_reference():
    x, w, t = torch.randn(300, 8).double(), torch.randn(40, 8).double(), torch.randint(40, (300,))
    dx, dw = errors.reference(x, w, t)
    x.requires_grad_(), w.requires_grad_()
    F.cross_entropy(x @ w.T, t).backward()
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(dw, w.grad)


def test_made_targets_follow_the_softmax():
    x, weight, target = made(600, 50, seed=1)
    assert x.shape == (600, weight.shape[1]) and len(weight) == 50
    expected = (x @ weight.T).softmax(1).sum(0)
    assert (torch.bincount(target, minlength=50) - expected).abs().max() < 4 * expected.max().sqrt()


def test_what_rows_lose():
    x, w, t = 2 * torch.randn(300, 8), torch.randn(2000, 8), torch.randint(2000, (300,))
    budget = 0.05
    found = caps.examine(x, w, t, budget, torch.float32)
    assert len(found) == 3
    for block, rows in zip(found, torch.arange(300).split(128), strict=True):
        p = (x[rows] @ w.T).softmax(1).scatter(1, t[rows, None], 0.0)
        # Nearly the columns of least mass, as many as are dropped; never a target of the block.
        order = p.sum(0).index_fill(0, t[rows], torch.inf).argsort()
        dropped = order[: round((1 - block["kept"]) * 2000)]
        assert len(dropped) > 0 and p[:, dropped].sum() <= 1.1 * budget * p.sum()
        share = p[:, dropped].sum(1) / p.sum(1) / budget
        assert block["worst"] == pytest.approx(float(share.max()), rel=0.3)
        assert block["middle"] == pytest.approx(float(share.median()), rel=0.3)


def test_caps():
    blocks = [{"kept": 0.25, "worst": 10.0}, {"kept": 0.5, "worst": 20.0}]
    assert caps.under(blocks, 16) == (0.5, 0.625)
    assert caps.under(blocks, 64) == (0.0, 0.375) == caps.under(blocks, None)


class TestDriver:
    def test_done_runs_are_not_done_again(self, tmp_path):
        todo = [Finetuning("exact", 0), Finetuning("exact", 1)]
        done = []

        def run(spec):
            done.append(spec.seed)
            return {"spec": asdict(spec)}

        driver.finish(todo[:1], run, tmp_path)
        found = driver.finish(todo, run, tmp_path)
        assert done == [0, 1] and [result["spec"]["seed"] for result in found] == [0, 1]

    def test_no_more_than_is_done(self, tmp_path):
        assert driver.finish([Finetuning("exact", 0)], lambda spec: 1 / 0, tmp_path, more=False) == []

    def test_an_interrupted_run_leaves_nothing_behind(self, tmp_path):
        def run(spec):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            driver.finish([Finetuning("exact", 0)], run, tmp_path)
        assert not list(tmp_path.glob("*.json"))

    def test_every_run_has_a_file_of_its_own(self):
        for quick in (False, True):
            plan = specs.plan(quick)
            names = [spec.name for spec in (*plan.pretraining, *plan.finetuning)]
            assert len(set(names)) == len(names) and all(name.isascii() for name in names)


def test_two_runs_of_a_seed_are_the_same():
    spec = replace(specs.plan(quick=True).pretraining[0], steps=4, every=2)
    tokens = torch.randint(512, (4096,))
    first, second = (pretrain.run(spec, tokens) for _ in range(2))
    assert len(first["curve"]) == 2
    assert all(first[key] == second[key] for key in ("curve", "training loss", "zero rows", "words"))
    other = pretrain.run(replace(spec, seed=1), tokens)
    assert other["curve"] != first["curve"]


def test_groups():
    found = pretrain.groups(torch.tensor([0, 1, pretrain.RARE, pretrain.RARE + 1]))
    assert [found[name].int().tolist() for name in pretrain.GROUPS] == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


@pytest.mark.slow
def test_command(tmp_path, capsys):
    command = ["training", "--quick", "--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    page = (tmp_path / "docs" / "accuracy.md").read_text()
    assert page.startswith("# Accuracy")
    for name in ("errors", "fine-tuning", "row-cap", "pretraining", "words"):
        assert f"## {name}" in printed and f"<!-- bench:{name} -->" in page
        assert json.loads((tmp_path / "docs" / "accuracy" / f"cpu-{name}.json").read_text())[name]
    assert (tmp_path / "docs" / "accuracy" / "pretraining.svg").exists()
    runs = set((tmp_path / "out" / "runs").glob("*.json"))
    trained = [spec for spec in specs.plan(quick=True).pretraining if driver.supported(spec.mode)]
    assert {Pretraining(**asdict(spec)).name for spec in trained} <= {path.name for path in runs}
