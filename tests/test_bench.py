"""The benchmark's parts, and one tiny run of it from its arguments to its report."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cce_inductor.bench import (
    arguments,
    contenders,
    docs,
    headline,
    measure,
    plots,
    reference,
    report,
    rounds,
    step,
    sweep,
)
from cce_inductor.bench.cases import IGNORE_INDEX, Case, cases, make_inputs, parse_shape
from cce_inductor.bench.launch import GIB, Child, ChildError, Watch, environment
from cce_inductor.bench.main import main
from cce_inductor.demo.memory import MIB
from cce_inductor.demo.run import Spec

CASE = Case(64, 32, 4096)


def row(name, loss, gradients, **rest):
    return rounds.Row(name, {"loss": loss, "gradients": gradients}, {"loss": 0, "gradients": 3 * MIB}, **rest)


def result(case=CASE, **rest):
    rows = [
        row("eager", [0.002, 0.004, 0.003], [0.020, 0.030, 0.040]),
        row("ours", [0.001, 0.001, 0.001], [0.010, 0.010, 0.010], error={"loss": 1e-7, "dx": 2e-6, "dW": 3e-6}),
        rounds.Row("cut_cross_entropy", failure="not installed: pip install cut-cross-entropy"),
    ]
    gemm = {"loss": [0.0005] * 3, "gradients": [0.005] * 3}
    return rounds.Result(case, rows, gemm=gemm, **rest)


class TestCases:
    def test_inputs_depend_on_the_seed_alone_and_have_their_scale(self):
        case = Case(256, 64, 4096, ignored=0.75)
        x, weight, target = make_inputs(case)
        again = make_inputs(case)
        assert all(torch.equal(a, b) for a, b in zip((x, weight, target), again, strict=True))
        assert not torch.equal(x, make_inputs(replace(case, seed=1))[0])
        assert 2 < float((x @ weight.T).detach().std()) < 3
        assert int((target != IGNORE_INDEX).sum()) == case.counted == 64
        assert make_inputs(replace(case, dtype="bf16"))[0].dtype == torch.bfloat16

    def test_the_table_has_every_dtype_and_ignored_rows(self):
        found = cases(None, None, None, seed=0, quick=False)
        assert len(found) == 10
        assert [case.ignored for case in found] == [0.0] * 9 + [0.75]
        assert cases([(8, 4, 16)], ["bf16"], 0.5, 3, False) == [Case(8, 4, 16, "bf16", 0.5, 3)]

    def test_autocast_shares_its_reference_with_fp32(self):
        assert replace(CASE, dtype="autocast").inputs_key == CASE.inputs_key
        assert replace(CASE, dtype="bf16").inputs_key != CASE.inputs_key

    @pytest.mark.parametrize("text", ["1,2", "1,2,x", "0,2,3", "", "1,2,3,4"])
    def test_a_shape_that_is_none(self, text):
        with pytest.raises(ValueError, match="is not N,D,V"):
            parse_shape(text)

    def test_what_does_not_fit_together_runs_one_after_the_other(self):
        assert rounds.fits_together(CASE, 9, 24 * GIB)
        assert not rounds.fits_together(Case(8192, 2304, 256000), 3, 24 * GIB)


class TestMeasure:
    def test_statistics(self):
        assert measure.Stats.of([3.0, 1.0, 10.0]) == measure.Stats(3.0, 1.0, 10.0)
        # The second round was twice as slow for both: the ratio is the same.
        assert measure.speedup([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == 2.0
        assert measure.speedup([], [1.0]) is None

    def test_relative_error_goes_block_by_block(self):
        b = torch.randn(100, 3, dtype=torch.float64)
        a = b + 1e-3
        expected = float((a - b).norm() / b.norm())
        assert measure.relative_error(a, b, rows=7) == pytest.approx(expected)
        assert measure.relative_error(b, b) == 0.0

    def test_peak_is_above_inputs_and_gradients(self):
        x, weight, target = make_inputs(Case(8, 1024, 8192))  # dW is 32 MiB

        def call(x, weight, target):
            scratch = torch.ones(64 * MIB, dtype=torch.uint8)
            return F.cross_entropy(F.linear(x, weight), target) + 0 * scratch[0]

        head = measure.Head(call, x, weight, target)
        head.timed("gradients")
        assert x.grad is None and weight.grad is None
        assert 55 * MIB < head.peak("loss")["above"] < 80 * MIB
        # The scratch is gone when the gradients come: what is left above them is the forward's peak less their size.
        assert 25 * MIB < head.peak("gradients")["above"] < 50 * MIB

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_reference_is_autograd_in_float64(self, monkeypatch, dtype):
        monkeypatch.setattr(reference, "ROWS", 7)
        monkeypatch.setattr(reference, "COLUMNS", 10)
        case = Case(20, 5, 33, dtype, ignored=0.25)
        x, weight, target = make_inputs(case)
        dx, dweight = torch.full((20, 5), torch.nan).double(), torch.full((33, 5), torch.nan).double()
        loss = reference.write(x, weight, target, dx, dweight)
        x64, w64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        expected = F.cross_entropy(x64 @ w64.T, target)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(dx, x64.grad)
        torch.testing.assert_close(dweight, w64.grad)


class TestReport:
    def test_table(self):
        text = report.case_section(result())
        assert "### N=64, D=32, V=4096, fp32" in text
        assert "| eager | 3.00 (2.00-4.00) | 1.00 |" in text
        assert "| ours | 1.00 (1.00-1.00) | 3.00 | 50% | 0.0 | 10.0 (10.0-10.0) | 3.00 | 50% | 3.0 | 1.0e-07 |" in text
        assert "| cut_cross_entropy | not installed: pip install cut-cross-entropy |" in text
        tables = [line for line in text.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in tables}) == 1

    def test_ignored_rows_are_no_useful_work(self):
        assert report.gemm_share(replace(CASE, ignored=0.75), "loss", [0.001], [0.001]) == "25%"
        assert report.gemm_share(CASE, "loss", [0.001], None) == ""

    def test_notes_say_what_a_cell_can_not(self):
        made = result(interleaved=False)
        made.rows[1].note, made.rows[1].failure = "fused nothing", "no answer within 5 s"
        text = report.case_section(made)
        assert "* ours: fused nothing" in text
        assert "* ours did not finish: no answer within 5 s" in text
        assert "one contender after the other" in text

    def test_everything_becomes_json_and_a_picture(self, tmp_path):
        assert json.loads(json.dumps(result().summary()))["rows"][1]["error"]["dx"] == 2e-6
        assert plots.cases([result()], tmp_path / "cases.png")
        over_n = [result(Case(n, 32, 4096)) for n in (64, 128)]
        over_v = [result(Case(64, 32, v)) for v in (4096, 8192)]
        section = sweep.conclude(over_n, over_v, tmp_path)
        assert section.plot.read_bytes().startswith(b"\x89PNG")
        assert "| 128 | 32 | 4096 |" in section.text and "| 64 | 32 | 8192 |" in section.text

    def test_training_steps(self, tmp_path):
        logits = 4 * 256 * 49152 * 4
        runs = [
            step.Steps("compile+logits", [2.0, 2.2, 2.1], [3 * logits] * 3, [2.5, 2.4, 2.3]),
            step.Steps("ours+logits", [1.0, 1.1, 1.05], [logits] * 3, [2.5, 2.4, 2.3]),
            step.Steps("compile", failure="no answer within 5 s"),
        ]
        section = step.conclude(Spec("", "some/m.gguf", batch=4, seq=256), runs, 49152, tmp_path)
        assert "One logits tensor is 192 MiB." in section.text
        assert "| ours+logits | 1,050 (1,000-1,100) | 2.00 | 192 | 2.30000 |" in section.text
        assert "| compile | no answer within 5 s |" in section.text
        assert section.data["spec"]["model"] == "m.gguf"
        assert section.plot.exists()

    def test_docs_hold_one_block_for_each_name(self, tmp_path):
        section = docs.Section("cpu", "first", {"a": 1})
        docs.write(section, tmp_path, "cpu", "bench")
        docs.write(docs.Section("sweep", "other", {}), tmp_path, "cpu", "bench --sweep")
        page = tmp_path / "benchmarks.md"
        page.write_text(page.read_text() + "\nWhere we lose.\n")
        docs.write(replace(section, text="second"), tmp_path, "cpu", "bench")
        text = page.read_text()
        assert text.startswith("# Benchmarks")
        assert text.endswith("\nWhere we lose.\n")
        assert "first" not in text and "second" in text and "other" in text
        assert sorted(p.name for p in (tmp_path / "benchmarks").iterdir()) == ["cpu-sweep.json", "cpu.json"]
        with pytest.raises(ValueError, match="not a pair"):
            docs.replaced("<!-- bench:cpu -->", "cpu", "text")


class TestArguments:
    @pytest.mark.parametrize(
        "argv, message",
        [
            ("--device cuda", "CPUs only so far"),
            ("--shape 1,2", "is not N,D,V"),
            ("--repeat 0", "is not a number of at least 1"),
            ("--ignored 1", "at least 0 and below 1"),
            ("--contender nobody", "invalid choice: 'nobody'"),
            ("--sweep --shape 1,2,3", "--shape goes with"),
            ("--headline --dtype fp32 --dtype bf16", "take one --dtype"),
            ("--memory-limit-gib 2", "goes with --headline"),
            ("--step --dtype autocast", "takes fp32 or bf16"),
            ("--step --contender eager", "--step has compile, compile+logits, ours+logits"),
        ],
    )
    def test_errors_say_what_is_wrong(self, capsys, argv, message):
        with pytest.raises(SystemExit) as ended:
            arguments.parse(argv.split())
        assert ended.value.code == 2
        assert message in capsys.readouterr().err

    def test_repeatable(self):
        args = arguments.parse(["--shape=1,2,3", "--shape=4,5,6", "--contender=ours", "--contender=eager"])
        assert args.shape == [(1, 2, 3), (4, 5, 6)]
        assert args.contender == ["ours", "eager"]

    def test_a_missing_checkpoint_is_an_error_of_one_line(self, tmp_path, capsys):
        assert main(["--step", "--model", str(tmp_path / "none"), "--output", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("bench: --model ")


class TestChild:
    def start(self, tmp_path, contender="eager", case=CASE, **how):
        job = {"case": case.__dict__, "contender": contender}
        return Child("worker", job, tmp_path / "log", environment(tmp_path, threads=1), **how)

    def test_watch_kills_what_grows_beyond_its_limit(self):
        grow = "import time; block = bytearray(400 << 20); time.sleep(30)"
        process = subprocess.Popen([sys.executable, "-c", grow])
        start = time.monotonic()
        with Watch(process, 100 * MIB) as watch:
            assert process.wait(timeout=20) == -9
        assert watch.killed and watch.peak() > 100 * MIB
        assert time.monotonic() - start < 20

    def test_a_limit_makes_a_large_allocation_fail_and_a_timeout_ends_the_child(self, tmp_path):
        case = Case(16384, 8, 32768)  # 2 GiB of logits
        options = rounds.Options(tmp_path, tmp_path, ("eager",), threads=1)
        outcome = headline.run_contender("eager", case, options, GIB)
        assert outcome.out_of_memory
        assert outcome.sentence(GIB).startswith("does not fit in 1.0 GiB (reached 0.")
        assert 0 < outcome.peak < 1.1 * GIB
        with self.start(tmp_path) as child, pytest.raises(ChildError, match="no answer within 0 s"):
            child.ask("inputs", 0.01)

    def test_an_error_and_a_death_come_with_their_reason(self, tmp_path):
        with self.start(tmp_path) as child, pytest.raises(ChildError, match="KeyError: 'nothing'"):
            child.ask("nothing", 60)
        with (
            Child("no_such_module", {}, tmp_path / "log", environment(tmp_path)) as child,
            pytest.raises(ChildError, match=r"ended with status 1: .*No module named"),
        ):
            child.ask("inputs", 60)


class TestRun:
    def test_a_contender_that_is_missing_says_why(self, monkeypatch):
        monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
        assert "pip install cut-cross-entropy" in contenders.CONTENDERS["cut_cross_entropy"].missing()
        assert contenders.CONTENDERS["eager"].missing() is None

    def test_from_arguments_to_report(self, tmp_path, capsys):
        argv = [
            "--shape=64,32,4096",
            "--dtype=fp32",
            "--contender=eager",
            "--contender=ours",
            "--repeat=2",
            "--threads=1",
        ]
        assert main([*argv, "--output", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]) == 0
        printed = capsys.readouterr().out
        assert "## cpu" in printed and "## gemm" in printed
        saved = json.loads((tmp_path / "out" / "cpu.json").read_text())
        (only,) = saved["cpu"]
        assert saved["machine"]["threads"] == 1
        assert [r["contender"] for r in only["rows"]] == ["eager", "ours"]
        for r in only["rows"]:
            assert r["failure"] == "" and r["note"] == ""
            assert [len(r["seconds"][mode]) for mode in measure.MODES] == [2, 2]
            assert set(r["memory"]) == set(measure.MODES)
            assert all(error < 1e-5 for error in r["error"].values())
        page = (tmp_path / "docs" / "benchmarks.md").read_text()
        assert "<!-- bench:cpu -->" in page and "![cpu](benchmarks/cpu.png)" in page
        assert (tmp_path / "docs" / "benchmarks" / "cpu.png").exists()
