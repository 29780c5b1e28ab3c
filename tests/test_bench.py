"""The benchmark's parts, and one tiny run of it from its arguments to its report."""

import json
import multiprocessing
import re
import shlex
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.runtime.cache_dir_utils import cache_dir

from cce_inductor.bench import (
    arguments,
    compile_time,
    contenders,
    docs,
    measure,
    peers,
    plots,
    reference,
    report,
    rounds,
    step,
    sweep,
)
from cce_inductor.bench.cases import HEADS, IGNORE_INDEX, Case, cases, parse_shape
from cce_inductor.bench.factored import FACTORED, LOOPS, TWO_HEADS
from cce_inductor.bench.inputs import make_inputs
from cce_inductor.bench.main import RUN, main
from cce_inductor.bench.readers import READERS
from cce_inductor.instruments.child import GIB
from cce_inductor.instruments.memory import MIB
from cce_inductor.instruments.process import environment
from cce_inductor.instruments.training import Spec

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
        found = cases()
        assert len(found) == 10
        assert [case.ignored for case in found] == [0.0] * 9 + [0.75]
        assert cases([(8, 4, 16)], ["bf16"], 0.5) == [Case(8, 4, 16, "bf16", 0.5)]

    def test_a_gpu_has_the_models_heads_in_every_kind_of_activations(self):
        found = cases(device="cuda")
        assert {case.dtype for case in found} == {"bf16"} and {case.device for case in found} == {"cuda"}
        assert found[-1].ignored == 0.75
        normal = [case for case in found[:-1] if case.activations == "normal"]
        assert [(case.n, case.name) for case in normal] == [
            (8192, "Gemma 2 2B"),
            (8192, "Gemma 2 9B"),
            (8192, "Gemma 2 27B"),
            (8192, "Mistral NeMo"),
            (8192, "Phi 3.5 Mini"),
            (8192, "Llama 3 8B"),
            *((n, "Llama 3 8B") for n in (1024, 2048, 4096, 16384)),
            (8192, "SmolLM2-135M"),
        ]
        assert [replace(case, activations="normal") for case in found if case.activations == "calibrated"] == normal
        (real,) = (case for case in found if case.activations == "smollm2")
        assert real.label == "SmolLM2-135M: N=8192, D=576, V=49152, bf16, smollm2 activations"

    def test_real_activations_have_one_head(self):
        assert [case.v for case in cases(device="cuda") if case.activations == "smollm2"] == [49152]
        kinds = {
            shape: [case.activations for case in cases([shape], device="cuda")]
            for shape in ((8, 4, 16), (2048, 576, 49152))
        }
        assert kinds == {
            (8, 4, 16): ["normal", "calibrated"],
            (2048, 576, 49152): ["normal", "calibrated", "smollm2"],
        }

    def test_a_shape_has_a_name(self):
        assert parse_shape("llama 3 8b") == (8192, 4096, 128256)
        assert parse_shape("16384,4096,128256") == (16384, 4096, 128256)
        assert HEADS["Gemma 2 2B"] == (2304, 256000)

    def test_flops_are_one_gemm_or_three_over_the_rows_that_count(self):
        case = Case(8192, 4096, 128256)
        assert case.flops("loss") == 8_607_114_461_184
        assert case.flops("gradients") == 25_821_343_383_552
        assert replace(case, ignored=0.75).flops("loss") == case.flops("loss") // 4

    def test_autocast_shares_its_reference_with_fp32(self):
        assert replace(CASE, dtype="autocast").inputs_key == CASE.inputs_key
        assert replace(CASE, dtype="bf16").inputs_key != CASE.inputs_key

    @pytest.mark.parametrize("text", ["1,2", "1,2,x", "0,2,3", "", "1,2,3,4"])
    def test_a_shape_that_is_none(self, text):
        with pytest.raises(ValueError, match="is not N,D,V"):
            parse_shape(text)

    def test_what_does_not_fit_together_runs_in_groups(self):
        assert rounds.at_once(CASE, 24 * GIB) > 9
        assert rounds.at_once(Case(8192, 2304, 256000), 24 * GIB) == 1
        # 0.85 · 80 GiB less 36 GB for the one that runs, then 3.1 GB each; the GEMMs take 9.7 GB.
        large = Case(8192, 4608, 256000, "bf16", device="cuda")
        assert rounds.at_once(large, 80 * GIB) == 12
        assert rounds.at_once(large, 80 * GIB, gemm=True) == 8


def peaks_with_scratch() -> list[int]:
    """Peaks of the loss and of the gradients of a head that fills 64 MiB on its way; dW is 32 MiB."""
    x, weight, target = make_inputs(Case(8, 1024, 8192))

    def call(x, weight, target):
        scratch = torch.ones(64 * MIB, dtype=torch.uint8)
        return F.cross_entropy(F.linear(x, weight), target) + 0 * scratch[0]

    head = measure.Head(call, x, weight, target)
    head.timed("gradients")
    assert x.grad is None and weight.grad is None
    return [head.peak(mode)["above"] for mode in measure.MODES]


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
        # In a process of its own, as in the benchmark: where others have left holes in the heap, the scratch
        # comes from one, and freeing it gives nothing back to the system before the gradients are allocated.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            loss, gradients = fresh.submit(peaks_with_scratch).result()
        assert 55 * MIB < loss < 80 * MIB
        # The scratch is gone when the gradients come: what is left above them is the forward's peak less their size.
        assert 25 * MIB < gradients < 50 * MIB

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
        assert "ran in groups, one after the other" in text

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
        docs.write(docs.Section("sweep", "other", {}), tmp_path, "cpu", "bench sweep")
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
            ("--contender quack", "table on cpu has no contender quack, it has eager, compile,"),
            ("--shape 1,2", "is not N,D,V"),
            ("--contender nobody", "invalid choice: 'nobody'"),
            ("nonsense", "invalid choice: 'nonsense'"),
            ("sweep --shape 1,2,3", "sweep takes no --shape"),
            ("headline --dtype fp32 --dtype bf16", "headline takes one --dtype"),
            ("headline --shape 1,2,3 --shape 1,2,4", "headline takes one --shape"),
            ("--model some.gguf", "table takes no --model"),
            ("step --dtype autocast", "step on cpu has no dtype autocast, it has fp32, bf16"),
            (
                "step --contender quack",
                "has no contender quack, it has eager, ours+head, compile, compile+logits, ours+logits",
            ),
        ],
    )
    def test_errors_say_what_is_wrong(self, capsys, argv, message):
        with pytest.raises(SystemExit) as ended:
            arguments.parse(argv.split())
        assert ended.value.code == 2
        assert message in capsys.readouterr().err

    def test_repeatable(self):
        args = arguments.parse(["--shape=1,2,3", "--shape=4,5,6", "--contender=ours", "--contender=eager"])
        assert args.shape == ((1, 2, 3), (4, 5, 6))
        assert args.contender == ("eager", "ours")  # in the table's order

    def test_a_preset_has_values_that_an_option_replaces(self):
        args = arguments.parse(["large"])
        assert args.shape == ((2048, 576, 49152), (512, 640, 262144)) and args.dtype == ("fp32", "bf16")
        assert args.contender == ("eager", "compile", "ours")
        assert arguments.parse(["large", "--dtype=autocast"]).dtype == ("autocast",)
        assert arguments.parse(["large", "--quick"]).shape == ((64, 64, 4096),)
        assert arguments.parse([]).contender == contenders.names_on("cpu")

    def test_every_preset_can_be_run_and_is_in_the_help(self, capsys):
        assert set(RUN) == set(arguments.PRESETS)
        with pytest.raises(SystemExit):
            arguments.parse(["--help"])
        printed = capsys.readouterr().out
        assert all(f"  {name} " in printed for name in RUN)

    def test_every_table_of_the_documents_has_a_command_that_is_one(self):
        root = Path(__file__).parents[1]
        pages = [path.read_text() for path in (root / "README.md", *(root / "docs").rglob("*.md"))]
        commands = [c for page in pages for c in re.findall(r"`python -m cce_inductor bench ?([^`]*)`", page)]
        commands += [c for page in pages for c in re.findall(r'BENCH_ARGS="?([^"\s`]*)', page)]
        presets = {arguments.parse(shlex.split(command)).preset for command in commands if command != "--help"}
        assert presets == set(arguments.PRESETS)
        page = (root / "docs" / "benchmarks.md").read_text()
        sections = re.findall(r"<!-- bench:(\S+) -->\n(.*)", page)
        assert sections and all(first.startswith("`python ") for _, first in sections)

    def test_a_missing_checkpoint_is_an_error_of_one_line(self, tmp_path, capsys):
        assert main(["step", "--model", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("bench: --model ")


class TestRun:
    def test_a_contender_that_is_missing_says_why(self, monkeypatch):
        monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
        assert "pip install cut-cross-entropy" in contenders.CONTENDERS["cut_cross_entropy"].missing()
        assert contenders.CONTENDERS["eager"].missing() is None

    def test_groups_that_fit(self, monkeypatch, tmp_path):
        ran = []
        monkeypatch.setattr(rounds, "at_once", lambda case, memory, gemm: 2)
        monkeypatch.setattr(rounds, "_run_group", lambda result, rows, *rest, gemm: ran.append((len(rows), gemm)))
        result = rounds.run_case(CASE, rounds.Options(tmp_path, tmp_path, ("eager", "compile", "ours")))
        assert ran == [(2, True), (1, False)] and not result.interleaved

    @pytest.mark.slow
    def test_the_pass_takes_a_small_part_of_the_compile_time(self, tmp_path, capsys):
        pytest.importorskip("transformers")
        assert main(["compile-time", "--quick", "--out", str(tmp_path)]) == 0
        (one,) = json.loads((tmp_path / "cpu-compile-time.json").read_text())["compile-time"]
        assert one["fused"] == 1 and one["nodes"] > 50 and 0 < one["trace"] < one["total"]
        # So small a model compiles fast, and the pass looks at its few nodes all the same.
        assert one["trace"] < compile_time.LIMIT * one["total"]
        assert f"{one['trace'] / one['total']:.2%} of the time to compile" in capsys.readouterr().out

    @pytest.mark.slow
    def test_losses_that_read(self, tmp_path, capsys):
        assert main(["reads", "--quick", "--out", str(tmp_path)]) == 0
        found = json.loads((tmp_path / "cpu-reads.json").read_text())["reads"]
        assert {one["loss"] for one in found} == set(READERS)
        assert all(len(one["compile"]) == len(one["ours"]) == 1 for one in found)
        assert "| label_smoother |" in capsys.readouterr().out

    @pytest.mark.slow
    def test_factors_and_margins(self, tmp_path, capsys):
        assert main(["factors", "--quick", "--out", str(tmp_path)]) == 0
        found = json.loads((tmp_path / "cpu-factors.json").read_text())["factors"]
        assert [one["loss"] for one in found] == [name for name in (*FACTORED, *LOOPS) if "D = 576" not in name]
        for one in found:
            assert set(one["seconds"]) == {"eager", "compile", "ours", *(["base"] if one["base"] else [])}
        assert "| ArcFace |" in capsys.readouterr().out

    @pytest.mark.slow
    def test_two_heads(self, tmp_path, capsys):
        assert main(["two-heads", "--quick", "--out", str(tmp_path)]) == 0
        found = json.loads((tmp_path / "cpu-two-heads.json").read_text())["two-heads"]
        assert [one["loss"] for one in found] == [name for name in TWO_HEADS if "D = 576" not in name]
        assert all({*one["seconds"]} == {*one["peak"]} == {"eager", "compile", "ours"} for one in found)
        assert "| EMO, D = 1024, bf16 |" in capsys.readouterr().out

    @pytest.mark.slow
    def test_from_arguments_to_report(self, tmp_path, monkeypatch, capsys):
        preset = replace(arguments.PRESETS["table"], repeat=2)
        monkeypatch.setitem(arguments.PRESETS, "table", preset)
        # The cache of all tests: it knows what instructions the CPU has.
        monkeypatch.setattr(rounds, "environment", lambda _, device: environment(cache_dir(), device))
        argv = ["--shape=64,32,4096", "--dtype=fp32", "--contender=eager", "--contender=ours"]
        assert main([*argv, "--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]) == 0
        printed = capsys.readouterr().out
        assert "## cpu" in printed and "## gemm" in printed
        saved = json.loads((tmp_path / "out" / "cpu.json").read_text())
        (only,) = saved["cpu"]
        assert saved["machine"]["threads"] == torch.get_num_threads()
        assert [r["contender"] for r in only["rows"]] == ["eager", "ours"]
        for r in only["rows"]:
            assert r["failure"] == "" and r["note"] == ""
            assert [len(r["seconds"][mode]) for mode in measure.MODES] == [2, 2]
            assert set(r["memory"]) == set(measure.MODES)
            assert all(error < 1e-5 for error in r["error"].values())
        page = (tmp_path / "docs" / "benchmarks.md").read_text()
        assert "<!-- bench:cpu -->" in page and "![cpu](benchmarks/cpu.png)" in page
        assert (tmp_path / "docs" / "benchmarks" / "cpu.png").exists()
