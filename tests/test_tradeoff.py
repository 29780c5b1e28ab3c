"""`bench sweep-budget`: its measures, its tables, and a tiny run."""

import json

import pytest
import torch

import cce_inductor
from cce_inductor import config
from cce_inductor.bench import arguments, contenders, main, measure, rounds, smollm2, tradeoff
from cce_inductor.bench.cases import CALIBRATED, FLAT, Case
from cce_inductor.bench.inputs import make_inputs
from cce_inductor.filters import Filter
from cce_inductor.instruments.data import CannotRun

CASE = Case(256, 64, 4096, activations=CALIBRATED)


class TestMeasures:
    def test_errors_of_rows(self):
        reference = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
        value = torch.tensor([[3.0, 4.5], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
        assert measure.row_errors(value, reference, rows=2).tolist() == [0.1, 1.0, 0.0, torch.inf, 0.0]
        assert measure.row_summary(value[:3], reference[:3])["zero"] == pytest.approx(2 / 3)

    def test_quantiles_are_over_the_rows(self):
        reference = torch.ones(1001, 1, dtype=torch.float64)
        value = 1 + torch.arange(1001)[torch.randperm(1001)][:, None].double() / 1000
        found = measure.row_summary(value, reference)
        assert [found[str(q)] for q in measure.QUANTILES] == pytest.approx([0.5, 0.9, 0.99, 0.999])

    def test_a_flat_softmax_is_flat(self):
        for dtype in ("fp32", "bf16"):
            x, weight, _ = make_inputs(Case(64, 64, 4096, dtype, activations=FLAT))
            p = (x.float() @ weight.float().T).softmax(1).detach()
            assert (p * 4096 - 1).abs().max() < 0.1
            assert weight.requires_grad and weight.abs().max() > 0

    def test_too_little_text_is_an_error(self, monkeypatch):
        monkeypatch.setattr(smollm2, "load_tokens", lambda path, text: torch.arange(100))
        with pytest.raises(CannotRun, match="the text has 100 tokens, too few for 99 rows"):
            smollm2.of_model(None, 99, 33, seed=0)


class TestContenders:
    def test_numbers_are_short(self):
        assert [contenders.short(v) for v in (2**-9, 2**-12, 4e-3, 3e-2)] == ["2⁻⁹", "2⁻¹²", "4e-3", "3e-2"]

    def test_filters_are_known_by_name_and_stay_out_of_the_table(self):
        filters = [c for family in contenders.FAMILIES.values() for c in family]
        assert len(filters) == 14
        assert contenders.KNOWN["unbiased 1e-2"].filter == ("unbiased", 1e-2)
        assert {str(Filter.of(c.filter)).split()[0] for c in filters} == {"budget", "unbiased", "eps"}
        assert not {c.name for c in filters} & {*contenders.names_on("cpu"), *contenders.names_on("cuda")}
        assert {c.name for c in filters} < {name for group in tradeoff.GROUPS for name in group}

    def test_what_a_filter_did_is_read_off_a_backward(self):
        from cce_inductor.bench import worker

        cce_inductor.diagnostics(reset=True)  # a contender has a process of its own
        do = worker.handlers({"case": CASE.__dict__, "contender": "eager", "cache": ""})
        do["inputs"]()
        assert do["diagnostics"]() == {}
        torch._dynamo.reset()
        with config.patch(compiler="aot_eager"):
            do = worker.handlers({"case": CASE.__dict__, "contender": "budget 1e-2", "cache": ""})
            do["inputs"]()
            numbers = do["diagnostics"]()
        assert numbers["filter"] == "budget 0.01" and numbers["blocks"] == 2
        assert 0 < numbers["dropped"] <= 1e-2


def row(name, seconds=None, **rest):
    times = {} if seconds is None else {"loss": seconds, "gradients": seconds}
    return rounds.Row(name, times, **rest)


def results():
    error = {"loss": 1e-7, "dx": 2e-3, "dW": 3e-3}
    rows = {"0.5": 1e-4, "0.9": 1e-3, "0.99": 1e-2, "0.999": 1.0, "zero": 0.25}
    filter = {"kept": 0.5, "full": 0.125, "dropped": 1e-3, "worst": 0.03}
    eager = row("eager", [1.0, 2.0], error={"loss": 0, "dx": 1e-2, "dW": 1.5e-2}, rows=rows | {"zero": 0.0})
    exact = [row("exact", [2.0, 4.0], error=error, rows=rows), row("exact, late gradients", [4.0, 8.0])]
    budgets = [
        row(f"budget {tau}", [1.0, 2.0], error=error, rows=rows, filter=filter) for tau in ("2⁻⁹", "1e-2")
    ]  # fmt: skip
    unbiased = row("unbiased 2⁻⁹", [3.0, 6.0], error=error, rows=rows, filter=filter)
    eps = row("eps 2⁻¹²", error=error, rows=rows, filter=filter)
    slow = row("eager", [9.0, 9.0], error=error)
    failed = rounds.Row("unbiased 1e-2", failure="no answer within 5 s")
    return [
        rounds.Result(CASE, [eager, *exact, *budgets]),
        rounds.Result(CASE, [slow, unbiased, failed]),
        rounds.Result(CASE, [eps]),
    ]


class TestReport:
    def test_costs(self):
        text = tradeoff.cost_table(results())
        assert "| eager | 1,500 (1,000-2,000) | 1.00 | 0.50 | 0.25 | 6.00 |" in text
        assert "| exact, late gradients | 6,000 (4,000-8,000) | 4.00 | 2.00 | 1.00 | 8.00 |" in text
        assert "| 1.00 | 0.50 | 0.25 | 5.00 | 50.0% | 12.5% | 1.0e-03 | 3.0e-02 |" in text  # 2 + 6/2
        # Its ratio is to eager in its own rounds, which had no exact contender.
        assert "| unbiased 2⁻⁹ | 4,500 (3,000-6,000) | 0.50 |  |  | 5.00 |" in text
        assert "| unbiased 1e-2 | no answer within 5 s |" in text
        assert "| eps 2⁻¹² |  |  |  |  | 6.00 | 50.0% |" in text  # 4 + 4/2
        assert text.count("| eager |") == 1

    def test_errors(self):
        text = tradeoff.error_table(results())
        assert "| budget 1e-2 | 2.0e-03 | 3.0e-03 | 1.0e-04 | 1.0e-03 | 1.0e-02 | 1.0e+00 | 25.00% |" in text
        assert "rows of dW, 99.9 %" in text and "exact, late gradients" not in text

    def test_targets(self):
        text = tradeoff.target_table({"fp32": results(), "bf16": results()})
        assert text.count("| 2⁻⁹ |") == text.count("| 1e-2 |") == 2
        assert "| 2⁻⁹ | bf16 | 1.00 | 0.50 | 2.0e-03 | 1.0e-02 | 3.0e-03 | 1.5e-02 |" in text

    def test_flat(self):
        same = [row("eager", [1.0]), row("exact", [2.0]), row("exact, late gradients", [4.0]), row("budget 2⁻⁹", [4.2])]
        text = tradeoff.flat_table([rounds.Result(CASE, same), rounds.Result(CASE, same)])
        assert "| budget 2⁻⁹ | 2.10 | 1.05 | 2.10 | 1.05 |" in text

    def test_pictures_are_the_same_for_the_same_results(self, tmp_path):
        found = {"fp32": results(), "bf16": results()}
        points = tradeoff.points(found["fp32"])
        assert points["budget"][0] == {"work": 5.0, "time": 1.0, "loss": 1e-7, "dx": 2e-3, "dW": 3e-3}
        assert points["eps"][0]["time"] is None and points["eps"][0]["work"] == 6.0
        drawn = []
        for _ in range(2):
            options = rounds.Options(tmp_path, tmp_path, ())
            section = tradeoff.conclude(found, [found["fp32"][0]], options)
            drawn.append(section.plot.read_bytes())
        assert drawn[0] == drawn[1] and b"<svg" in drawn[0]
        assert "N=256, D=64, V=4096, synthetic" in section.text and json.dumps(section.data)


@pytest.mark.parametrize(
    "argv, message",
    [
        ("sweep-budget --shape 1,2,3", "sweep-budget takes no --shape"),
        ("sweep-budget --contender eager", "sweep-budget takes no --contender"),
    ],
)
def test_arguments_that_do_not_go_with_it(capsys, argv, message):
    with pytest.raises(SystemExit):
        arguments.parse(argv.split())
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_command(tmp_path, monkeypatch, capsys):
    """Two filters, from their processes to the documentation."""
    monkeypatch.setattr(tradeoff, "GROUPS", (("eager", "budget 1e-2"), ("eps 2⁻¹⁰, sorted",)))
    monkeypatch.setattr(tradeoff, "FLAT_GROUP", ("eager", "budget 2⁻⁹"))
    monkeypatch.setattr(tradeoff, "FEW", ("budget 1e-2", "budget 2⁻⁹", "eps 2⁻¹⁰, sorted"))
    argv = ["sweep-budget", "--quick", "--dtype", "fp32"]
    assert main.main([*argv, "--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]) == 0
    printed = capsys.readouterr().out
    assert "### Budgets against eager" in printed and "did not finish" not in printed
    data = json.loads((tmp_path / "out" / "cpu-sweep-budget.json").read_text())["sweep-budget"]
    rows = {one["contender"]: one for result in data["fp32"] for one in result["rows"]}
    assert all(one["failure"] == "" for result in (*data["fp32"], *data["flat"]) for one in result["rows"])
    assert rows["eager"]["error"]["dW"] < 1e-5 < rows["budget 1e-2"]["error"]["dW"] < 1e-1
    assert 0 < rows["budget 1e-2"]["filter"]["dropped"] <= 1e-2
    assert rows["eps 2⁻¹⁰, sorted"]["seconds"] == {} and rows["eps 2⁻¹⁰, sorted"]["filter"]["kept"] > 0
    assert [one["contender"] for one in data["flat"][0]["rows"]] == ["eager", "budget 2⁻⁹"]
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "![sweep-budget](benchmarks/sweep-budget.svg)" in page
    assert (tmp_path / "docs" / "benchmarks" / "sweep-budget.svg").exists()
