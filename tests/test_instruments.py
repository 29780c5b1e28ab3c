"""What the demo and the benchmark share: text, memory, child processes."""

import subprocess
import sys
import time
import types
from dataclasses import asdict

import pytest
import torch

from cce_inductor.bench import headline, rounds
from cce_inductor.bench.cases import Case
from cce_inductor.instruments import memory, training
from cce_inductor.instruments.child import GIB, Child, ChildError, Watch
from cce_inductor.instruments.data import CannotRun, batches, english_text, find_model
from cce_inductor.instruments.memory import MIB
from cce_inductor.instruments.process import environment

CASE = Case(64, 32, 4096)


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


class Echo(torch.nn.Module):
    """A language model as `transformers` has them: (batch, seq) ids to an object with a loss and logits."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50, bias=False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels):
        logits = self.head(self.embedding(input_ids))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return types.SimpleNamespace(loss=loss, logits=logits)


class TestTraining:
    @pytest.fixture
    def made(self, monkeypatch):
        """A function that makes the handlers of a training run, of a tiny model."""
        monkeypatch.setattr(training, "load_model", lambda path, dtype: Echo().to(dtype))
        monkeypatch.setattr(training, "load_tokens", lambda path, text: torch.arange(1000) % 50)
        monkeypatch.setitem(training.CALLS, "loss", lambda model: lambda ids: model(ids, ids).loss)
        monkeypatch.setitem(training.CALLS, "outputs", lambda model: lambda ids: model(ids, ids))

        def made(contender):
            spec = training.Spec(contender, "m", batch=2, seq=16, lr=0.1)
            return training.handlers({"spec": asdict(spec)})

        return made

    def test_steps_train_and_rest_counts_what_they_keep(self, made):
        do = made("loss")
        assert do["load"]() == {"rows": 32, "vocab": 50}
        steps = [do["step"]() for _ in range(20)]
        assert steps[-1]["loss"] < 0.1 * steps[0]["loss"]
        assert steps[1]["start"] >= steps[0]["start"] + steps[0]["seconds"]
        resting = do["rest"]()
        # 800 fp32 parameters, as many gradients and twice as many moments; a count of steps for either tensor.
        assert resting["state_bytes"] == 4 * 800 * 4 + 2 * 4 and resting["rest"] > 0

    def test_contenders_train_on_the_same(self, made):
        losses = []
        for contender in ("loss", "outputs"):
            do = made(contender)
            do["load"]()
            losses.append([do["step"]()["loss"] for _ in range(3)])
        assert losses[0] == losses[1]


class TestChild:
    def start(self, tmp_path, contender="eager", case=CASE, **how):
        job = {"case": case.__dict__, "contender": contender}
        return Child("bench.worker", job, tmp_path / "log", environment(tmp_path), **how)

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
        options = rounds.Options(tmp_path, tmp_path, ("eager",))
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
