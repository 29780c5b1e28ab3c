"""What the benchmark measures on a GPU, on a stand-in, and the inputs that it makes."""

import enum
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from cce_inductor.bench import (
    arguments,
    calibrated,
    contenders,
    docs,
    gemm,
    measure,
    peers,
    reference,
    report,
    rounds,
    smollm2,
    worker,
)
from cce_inductor.bench.cases import Case
from cce_inductor.bench.densities import densities
from cce_inductor.bench.inputs import make_inputs
from cce_inductor.instruments import machine, meters, protocol
from cce_inductor.instruments.child import GIB
from cce_inductor.instruments.memory import MIB
from cce_inductor.instruments.process import environment
from cce_inductor.ops.choice import Choice

CASE = Case(64, 32, 4096)


def row(name, loss, gradients, **rest):
    return rounds.Row(name, {"loss": loss, "gradients": gradients}, {"loss": 0, "gradients": 3 * MIB}, **rest)


class FakeGpu:
    """Stands in for `torch.cuda`: a clock that a call advances, and an allocator that counts what it is told."""

    class Event:
        clock = 0.0  # ms

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = FakeGpu.Event.clock

        def elapsed_time(self, end):
            assert FakeGpu.synchronized
            return end.at - self.at

    synchronized = False
    allocated = most = emptied = 0

    @classmethod
    def install(cls, monkeypatch):
        cls.Event.clock, cls.synchronized, cls.allocated, cls.most, cls.emptied = 0.0, False, 1000, 1000, 0
        monkeypatch.setattr(torch.cuda, "Event", cls.Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(cls, "synchronized", True))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: cls.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: cls.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(cls, "most", cls.allocated))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(cls, "emptied", cls.emptied + 1))

    @classmethod
    def allocate(cls, count):
        """For a moment."""
        cls.most = max(cls.most, cls.allocated + count)


class TestGpu:
    """What runs on a GPU only, on a stand-in; the rest of it on CPU tensors."""

    def test_time_is_the_median_between_events_after_a_warm_up(self, monkeypatch):
        FakeGpu.install(monkeypatch)
        lasts = iter([100.0, 4.0, 2.0, 3.0, 9.0, 1.0])

        def call():
            FakeGpu.Event.clock += next(lasts)

        assert meters.Cuda().seconds(call) == 0.003
        assert next(lasts, None) is None

    def test_memory_is_what_the_allocator_gave_out_above_inputs_and_gradients(self, monkeypatch):
        FakeGpu.install(monkeypatch)
        FakeGpu.most = 1 << 40  # of something earlier
        x, weight, target = make_inputs(CASE)

        def call(x, weight, target):
            FakeGpu.allocate(5 * MIB)
            return F.cross_entropy(F.linear(x, weight), target)

        head = measure.Head(call, x, weight, target, meters.Cuda())
        assert head.peak("loss")["above"] == 5 * MIB
        assert head.peak("gradients")["above"] == 5 * MIB - head.gradient_bytes()
        assert FakeGpu.emptied == 2 and FakeGpu.synchronized

    def test_workers_measure_with_the_devices_meter(self, monkeypatch, tmp_path):
        FakeGpu.install(monkeypatch)
        monkeypatch.setitem(meters.METERS, "cpu", meters.Cuda)
        case = Case(64, 32, 4096, activations="calibrated")
        job = {"case": case.__dict__, "contender": "eager", "cache": str(tmp_path), "folder": str(tmp_path)}
        do = worker.handlers(job)
        do["inputs"]()
        assert do["timed"](mode="gradients") == {"seconds": 0.0}
        assert do["peaks"]() == {"loss": 0, "gradients": 0}
        answer = reference.handlers(job)["compute"]()
        assert 0 < answer["densities"]["alive"] < answer["densities"]["0.001"] < 1
        assert all(error < 1e-5 for error in do["error"](folder=str(tmp_path), loss=answer["loss"]).values())
        ceiling = gemm.handlers(job)
        ceiling["inputs"]()
        assert ceiling["timed"](mode="gradients") == {"seconds": 0.0}

    def test_without_one_the_command_says_so(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit):
            arguments.parse(["--device", "cuda"])
        assert f"--device cuda: torch {torch.__version__} finds no CUDA GPU here" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "argv, message",
        [
            ("step", "step goes with --device cpu"),
            ("sweep-budget --shape 8,4,16", "sweep-budget takes no --shape"),
        ],
    )
    def test_arguments(self, monkeypatch, capsys, argv, message):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(SystemExit):
            arguments.parse(["--device", "cuda", *argv.split()])
        assert message in capsys.readouterr().err

    def test_the_table_has_every_known_way(self):
        names = contenders.names_on("cuda")
        assert names[:5] == ("eager", "compile", "compile+logits", "auto_chunker", "F.linear_cross_entropy")
        assert {*peers.PRESETS, "liger", "quack", "ours", "ours, late gradients", "ours, 2.5 GB"} < set(names)
        assert not {"liger", "quack", "cce"} & set(contenders.names_on("cpu"))

    def test_contenders_that_are_missing_say_why(self, monkeypatch):
        def reason(name):
            return contenders.CONTENDERS[name].missing()

        for early, expected in ((True, None), (False, "ours forms all gradients in the backward here")):
            choice = Choice("kernel", gradients_in_forward=early)
            monkeypatch.setattr("cce_inductor.lowering.choose.choose", lambda problem, choice=choice: choice)
            assert reason("ours, late gradients") == expected
        monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
        assert reason("liger") == "not installed: pip install liger-kernel"
        assert reason("liger_cutedsl") == "not installed: pip install liger-kernel nvidia-cutlass-dsl"
        assert reason("quack") == "not installed: pip install quack-kernels nvidia-cutlass-dsl"
        assert reason("cce_exact") == "not installed: pip install cut-cross-entropy triton"

    def test_a_preset_that_a_release_does_not_have(self, monkeypatch):
        module = types.ModuleType("cut_cross_entropy.linear_cross_entropy")
        module.LinearCrossEntropyImpl = enum.Enum("LinearCrossEntropyImpl", ["CCE", "TORCH_COMPILE"])
        monkeypatch.setitem(sys.modules, "cut_cross_entropy", types.ModuleType("cut_cross_entropy"))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: "25.1.1")
        assert contenders.CONTENDERS["cce_exact"].missing() == "cut-cross-entropy 25.1.1 has no cce_exact"
        assert contenders.CONTENDERS["cce"].missing() is None

    def test_want_of_memory_is_a_sentence(self):
        error = torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 15.62 GiB. GPU 0 has a total capacity of 79.19 GiB of which 1.00 GiB"
        )
        assert protocol.reason(error) == "OutOfMemoryError: CUDA out of memory. Tried to allocate 15.62 GiB"
        assert protocol.reason(KeyError("a")) == "KeyError: 'a'"

    def test_kernels_compile_side_by_side(self, tmp_path):
        assert int(environment(tmp_path, device="cuda")["TORCHINDUCTOR_COMPILE_THREADS"]) in range(1, 5)
        assert environment(tmp_path, device="cpu")["TORCHINDUCTOR_COMPILE_THREADS"] == "1"

    def test_table(self):
        case = Case(8192, 4096, 128256, "bf16", device="cuda", activations="calibrated")
        rows = [
            row("eager", [0.0172] * 3, [0.0516] * 3),
            row("ours", [0.0129] * 3, [0.0344] * 3, error={"loss": 1e-7, "dx": 2e-3, "dW": 3e-3}),
            rounds.Row("quack", failure="OutOfMemoryError: CUDA out of memory. Tried to allocate 15.62 GiB"),
        ]
        times = {"loss": [0.0120] * 3, "gradients": [0.0344] * 3}
        found = {"alive": 0.05, "0.01": 0.1, "0.001": 0.25}
        text = report.table([rounds.Result(case, rows, gemm=times, densities=found)])
        assert "between CUDA events" in text and "PyTorch's allocator" in text
        assert "### Llama 3 8B: N=8192, D=4096, V=128256, bf16, calibrated activations" in text
        # 8.607e12 flops in 12.9 ms; 25.821e12 in 34.4 ms.
        assert "| ours | 12.9 (12.9-12.9) | 1.33 | 667 | 93% | 0.0 |" in text
        assert "| 34.4 (34.4-34.4) | 1.50 | 751 | 100% | 3.0 | 1.0e-07 | 2.0e-03 | 3.0e-03 |" in text
        assert "| quack | OutOfMemoryError: CUDA out of memory. Tried to allocate 15.62 GiB |" in text
        assert "5.0% have an entry" in text and "25.0% hold all but 0.001 of the mass" in text
        assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
        rates = report.gemm_table([rounds.Result(case, rows, gemm=times)])
        assert "x Wᵀ, TFLOP/s" in rates and "| bf16 | 717 | 751 |" in rates
        assert rounds.Result(case, rows).summary()["flops"]["loss"] == case.flops("loss")

    def test_its_results_have_a_page_of_their_own(self, tmp_path):
        docs.write(docs.Section("cuda", "text", {}), tmp_path, "cuda", "bench --device cuda")
        assert "<!-- bench:cuda -->" in (tmp_path / "benchmarks-gpu.md").read_text()
        assert (tmp_path / "benchmarks-gpu" / "cuda.json").exists()
        assert not (tmp_path / "benchmarks.md").exists()

    def test_the_machine_is_the_gpu(self):
        about = machine.describe() | {
            "gpu": "NVIDIA H100 80GB HBM3",
            "gpu_memory": 80 * GIB,
            "multiprocessors": 132,
            "cuda": "13.0",
            "triton": "3.6.0",
        }
        start = "NVIDIA H100 80GB HBM3, 132 multiprocessors, 80 GiB, CUDA 13.0, Triton 3.6.0; "
        assert machine.sentence(about).startswith(start)


class TestActivations:
    @pytest.mark.parametrize(
        "vocab, rows, alive, kept, looser",
        [(49152, 256, 0.09, 0.146, 0.434), (262144, 128, 0.012, 0.015, 0.069)],
    )
    def test_calibrated_columns_are_as_sparse_as_in_trained_models(self, vocab, rows, alive, kept, looser):
        x, weight, target = make_inputs(Case(rows, 256, vocab, "bf16", activations="calibrated"))
        found = densities(x, weight)
        for measured, expected in zip(found.values(), (alive, kept, looser), strict=True):
            assert expected / 1.5 < measured < expected * 1.5
        assert x.dtype == weight.dtype == torch.bfloat16
        # Drawn from the softmax: the mean of the loss is about the entropy.
        z = (x @ weight.T).detach().float()
        p = z.softmax(1)
        entropy = -(p * p.clamp_min(1e-30).log()).sum(1).mean()
        assert float(F.cross_entropy(z, target)) == pytest.approx(float(entropy), rel=0.15)

    def test_parameters_lie_between_the_fitted_vocabularies(self):
        small, large = calibrated.FITTED.values()
        assert calibrated.parameters(32064) == small
        between = calibrated.parameters(128256)
        assert small.slope < between.slope < large.slope and small.shift < between.shift < large.shift
        assert calibrated.parameters(262144).height == pytest.approx(large.height)

    def test_targets_are_drawn_by_the_softmax(self, monkeypatch):
        monkeypatch.setattr(calibrated, "BLOCK", 3)
        x, weight = torch.ones(20000, 1), torch.tensor([0.1, 0.2, 0.3, 0.4]).log()[:, None]
        drawn = calibrated.draw(x, weight, torch.Generator().manual_seed(0))
        shares = drawn.bincount(minlength=4) / len(drawn)
        torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.01, rtol=0)

    def test_densities_of_a_softmax_that_is_known(self):
        # Two rows of a block look at one column each, of eight: the rest has e⁻²⁰ of the mass.
        x = torch.eye(2).mul(20.0)
        weight = F.pad(torch.eye(2), (0, 0, 0, 6))
        assert densities(x, weight) == {"alive": 0.25, "0.01": 0.25, "0.001": 0.25}
        assert densities(torch.zeros(2, 2), weight)["0.01"] == 1.0

    def test_real_ones_that_are_not_installed_say_so_in_every_row(self, monkeypatch, tmp_path):
        monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
        case = Case(64, 576, 49152, activations="smollm2")
        result = rounds.run_case(case, rounds.Options(tmp_path, tmp_path, ("eager", "ours")))
        assert [r.failure for r in result.rows] == ["not installed: pip install transformers"] * 2
        assert "| eager | not installed: pip install transformers |" in report.case_section(result)

    def test_real_ones_come_from_a_file(self, tmp_path):
        made = torch.randn(8, 576), torch.randn(16, 576), torch.arange(8)
        torch.save(list(made), tmp_path / "smollm2-8.pt")
        smollm2.write(tmp_path, 8, "cpu")  # is there already
        x, weight, target = make_inputs(Case(8, 576, 16, "bf16", activations="smollm2"), tmp_path)
        assert torch.equal(x, made[0].bfloat16()) and torch.equal(weight, made[1].bfloat16())
        assert torch.equal(target, made[2])
