"""The demo's parts, without a training run: data, measurement, verdict, report."""

import json
import math
from dataclasses import replace

import pytest
import torch

from cce_inductor.demo import check, main, report
from cce_inductor.demo.launch import run_contender
from cce_inductor.demo.run import Run
from cce_inductor.instruments import memory
from cce_inductor.instruments.data import CannotRun, batches, english_text, find_model
from cce_inductor.instruments.training import FUSED, PLAIN, Spec

MIB = memory.MIB
LOSSES = [2.8, 2.7, 2.6]


def make_run(contender, losses=None, counters=None, peak=1000, dtype="fp32"):
    """A finished run of three steps; `peak` MiB in the steps after the first, 700 MiB at rest."""
    losses = losses or LOSSES
    run = Run(Spec(contender, "m.gguf", dtype=dtype, steps=len(losses), batch=2, seq=128))
    run.record({"event": "start", "rows": 256, "vocab": 49152})
    run.record({"event": "resting", "state_bytes": 500 * MIB, "rest": 700 * MIB})
    for i, loss in enumerate(losses):
        level = peak if i else 2000
        run.record({"event": "step", "loss": loss, "seconds": 2.0 + i, "peak": level * MIB, "start": 10.0 * i})
    run.record({"event": "end", "counters": counters or {}})
    run.times = [i / 10 for i in range(300)]
    run.rss = [(700 + i) * MIB for i in range(300)]
    return run


def pair(fused_losses=None, fused=1, dtype="fp32"):
    counters = {"fused": fused, "deferred": 1} if fused else {}
    return make_run(PLAIN, dtype=dtype), make_run(FUSED, fused_losses, counters, peak=850, dtype=dtype)


class TestData:
    def test_batches_depend_on_the_seed_alone(self):
        tokens = torch.arange(1000)

        def first(seed, n=9):
            stream = batches(tokens, batch=4, seq=32, seed=seed)
            return torch.stack([next(stream) for _ in range(n)])

        assert first(0).shape == (9, 4, 32)
        assert torch.equal(first(0), first(0))
        assert not torch.equal(first(0), first(1))

    def test_a_pass_repeats_no_row_and_rows_are_consecutive_text(self):
        stream = batches(torch.arange(1000), batch=4, seq=32, seed=0)  # 31 rows: 7 batches a pass
        rows = torch.cat([next(stream) for _ in range(7)])
        assert len(rows[:, 0].unique()) == 28
        assert torch.equal(rows - rows[:, :1], torch.arange(32).expand(28, 32))

    def test_too_little_text_says_so(self):
        with pytest.raises(CannotRun, match="31 rows of 32 tokens, fewer than a batch of 32"):
            next(batches(torch.arange(1000), batch=32, seq=32, seed=0))

    def test_text_is_long_english_and_the_same_every_time(self):
        text = english_text()
        assert len(text) > 300_000
        assert text.count(" the ") > 3000
        assert text == english_text()

    def test_model_path(self, tmp_path):
        (tmp_path / "tiny.gguf").touch()
        assert find_model(str(tmp_path)) == tmp_path
        assert find_model(str(tmp_path / "tiny.gguf")) == tmp_path / "tiny.gguf"
        with pytest.raises(CannotRun, match="neither a checkpoint directory nor a .gguf file"):
            find_model(str(tmp_path / "none"))


class TestMemory:
    def test_sampler_and_kernel_see_an_allocation(self):
        memory.trim()
        memory.reset_peak()
        before = memory.rss()
        with memory.RssSampler(interval=0.001) as sampler:
            block = torch.ones(200 * MIB, dtype=torch.uint8)
            sampler.sample()
            del block
        assert 190 * MIB < sampler.peak() - before < 260 * MIB
        assert memory.peak_rss() - before > 190 * MIB
        assert sampler.times == sorted(sampler.times)

    def test_sampler_stops_when_the_process_is_gone(self):
        assert not memory.RssSampler(pid=2**30).sample()

    def test_tied_and_viewed_tensors_count_once(self):
        weight = torch.zeros(1000, 10)
        assert memory.tensor_bytes([weight, weight.t(), weight[5:], torch.zeros(7)]) == 40_000 + 28

    def test_envelope_keeps_the_peak(self):
        times = [i / 1000 for i in range(10_000)]
        values = [9000 if i == 6543 else i % 7 for i in range(10_000)]
        kept_times, kept = memory.envelope(times, values, bins=100)
        assert len(kept) <= 100
        assert kept_times == sorted(kept_times)
        assert kept[kept_times.index(6.543)] == 9000


class TestVerdict:
    def test_equal_runs_are_fine(self):
        assert check.problems(*pair()) == []

    def test_rounding_is_allowed_and_grows(self):
        tolerance = check.TOLERANCES["fp32"]
        assert tolerance.at(5) > tolerance.at(1) > tolerance.at(0)
        within = [a * (1 + 0.9 * tolerance.at(i)) for i, a in enumerate(LOSSES)]
        assert check.problems(*pair(within)) == []

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("step", [0, 2])
    def test_losses_that_part_name_the_step(self, dtype, step):
        losses = list(LOSSES)
        losses[step] *= 1 + 2 * check.TOLERANCES[dtype].at(step)
        (problem,) = check.problems(*pair(losses, dtype=dtype))
        assert f"step {step}" in problem
        assert "part by more than rounding" in problem

    def test_a_loss_that_is_not_finite(self):
        (problem,) = check.problems(*pair([2.8, math.nan, 2.6]))
        assert "step 1 is not finite" in problem

    def test_nothing_fused(self):
        (problem,) = check.problems(*pair(fused=0))
        assert "fused nothing" in problem

    def test_plain_must_be_plain(self):
        plain, fused = pair()
        plain.counters = {"fused": 1}
        (problem,) = check.problems(plain, fused)
        assert "ran with cce_inductor in it" in problem


class TestReport:
    def test_figures(self):
        plain, fused = pair()
        assert plain.logits_bytes == 256 * 49152 * 4 == 48 * MIB
        assert plain.peak == 1000 * MIB  # the first step, with compilation, is apart
        assert plain.peak_above == 300 * MIB
        assert plain.process_bytes == 200 * MIB
        assert plain.seconds_per_step == 3.5
        assert plain.whole_peak == 2000 * MIB
        assert fused.peak_above == 150 * MIB

    def test_logits_are_counted_in_the_dtype_of_the_weights(self):
        assert pair(dtype="bf16")[0].logits_bytes == 24 * MIB

    def test_table(self):
        text = report.table(*pair([2.8, 2.70001, 2.6]))
        lines = text.splitlines()
        assert lines[0].split() == [PLAIN, FUSED]
        assert "loss, step 1 2.700000 2.700010" in " ".join(text.split())
        assert "largest difference of the losses: 1.00e-05 in step 1" in text
        assert "peak memory saved: 150 MiB = 3.12 logits tensors of 256 x 49152 fp32 (48 MiB)" in text
        assert "losses fused 0 1" in " ".join(text.split())
        assert "logits deferred 0 1" in " ".join(text.split())

    @pytest.mark.parametrize(
        "fused_losses, fused, status",
        [(None, 1, 0), ([2.8, 2.7, 2.7], 1, 1), (None, 0, 1)],
        ids=["agrees", "losses_part", "nothing_fused"],
    )
    def test_exit_status_and_files(self, tmp_path, capsys, fused_losses, fused, status):
        plain, other = pair(fused_losses, fused)
        assert main.conclude(plain, other, tmp_path, seconds=60.0) == status
        assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
        saved = json.loads((tmp_path / "demo.json").read_text())
        assert saved["plain"]["losses"] == LOSSES
        assert saved["fused"]["peak_above"] == 150 * MIB
        assert len(saved["problems"]) == status
        assert capsys.readouterr().err.count("FAILED") == status


class TestCommandLine:
    def test_a_missing_checkpoint_is_an_error_of_one_line(self, tmp_path, capsys):
        assert main.main(["--model", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("demo: --model ")

    def test_too_few_steps(self):
        with pytest.raises(SystemExit):
            main.main(["--steps", "1"])

    def test_worker_that_fails_shows_its_log(self, tmp_path):
        spec = replace(Spec(PLAIN, str(tmp_path / "none")), steps=2)
        with pytest.raises(CannotRun, match=r"ended with status 1; the end of"):
            run_contender(spec, tmp_path / "log", lambda event: None)
