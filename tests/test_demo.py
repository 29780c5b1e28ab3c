"""The demo's parts, without a training run: data, measurement, verdict, report."""

import json
import math
from dataclasses import replace

import pytest

from cce_inductor.demo import check, main, report
from cce_inductor.demo.launch import run_contenders
from cce_inductor.demo.run import Run
from cce_inductor.instruments import memory
from cce_inductor.instruments.data import CannotRun, english_text
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

    def test_last_lines_say_what_was_saved_and_where_to_look(self, tmp_path, capsys):
        (tmp_path / "report.html").write_text("made by the worker")
        main.conclude(*pair(), tmp_path, seconds=60.0)
        last = capsys.readouterr().out.partition("minutes in all")[2]
        assert "the loss of step 2 is 2.60000 with torch.compile alone and 2.60000 with cce_inductor" in last
        # 300 and 150 MiB above the level at rest; a logits tensor is 48 MiB
        assert "A step took 150 MiB less memory, 150 MiB instead of 300 MiB" in last
        assert "3.1 tensors of logits, each of 256 x 49152, were never written" in last
        assert f"{tmp_path / 'report.html'}: the model's graph" in last and f"{tmp_path / 'demo.png'}: " in last
        assert 'torch.compile(model, backend="cce")' in last

    def test_last_lines_own_up_where_nothing_was_saved(self, tmp_path):
        plain, fused = pair()
        plain.peaks = [level - 200 * MIB for level in plain.peaks]
        assert "No memory was saved: a step took 50 MiB more." in report.in_words(plain, fused, tmp_path)

    def test_two_runs_that_part_claim_nothing(self, tmp_path, capsys):
        main.conclude(*pair([2.8, 2.7, 2.7]), tmp_path, seconds=60.0)
        assert "Both trained alike" not in capsys.readouterr().out


class TestProgress:
    def test_a_pipe_gets_a_line_a_step(self, capsys):
        lines = main.Lines(2)
        lines("", {"event": "phase", "phase": "compiling"})
        for contender in (PLAIN, FUSED):
            lines(contender, None)
            lines(contender, {"event": "step", "loss": 2.5, "seconds": 4.0})
        lines.close()
        assert capsys.readouterr().err.splitlines() == [
            "compiling ...",
            "torch.compile: step 1 of 2, loss 2.5000, 4.0 s",
            "cce_inductor: step 1 of 2, loss 2.5000, 4.0 s",
        ]

    def test_a_terminal_gets_a_bar(self, capsys):
        bar = main.Bar(1)
        bar("", {"event": "phase", "phase": "compiling"})
        bar(PLAIN, {"event": "step", "loss": 2.5, "seconds": 4.0})
        bar(FUSED, None)
        bar.close()
        text = capsys.readouterr().err
        assert "compiling" in text and "1/2" in text and "torch.compile=2.5000" in text


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
            run_contenders([spec], tmp_path, lambda contender, event: None)


@pytest.mark.slow
def test_the_demo_of_a_tiny_model(tmp_path, capsys):
    """From end to end, with a vocabulary that is fused: exit status, a line a step, the page of its graph."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=5000, special_tokens=["?"])
    words.train_from_iterator([english_text()], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "model")
    sizes = dict(vocab_size=5000, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    small = ["--steps", "2", "--batch", "2", "--seq", "64"]
    assert main.main(["--model", str(tmp_path / "model"), "--out", str(out), *small]) == 0
    said = capsys.readouterr()
    assert [line.split(",")[0] for line in said.err.splitlines() if "step" in line][2:] == [
        "torch.compile: step 2 of 2",
        "cce_inductor: step 2 of 2",
    ]
    assert "1 fused, 0 declined" in (out / "report.html").read_text()
    assert "linear_statistics" in (out / "report.html").read_text()
    assert f"{out / 'report.html'}: the model's graph" in said.out and "Both trained alike" in said.out
    saved = json.loads((out / "demo.json").read_text())
    assert saved["fused"]["counters"]["fused"] == 1 and saved["plain"]["counters"] == {}
