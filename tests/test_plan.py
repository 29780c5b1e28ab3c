"""The planner: sizes of known models, the paper's arithmetic, and what is added up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cce_inductor.__main__ import main
from cce_inductor.plan import GIB, PAPER, Model, Plan, paper

GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
LLAMA3 = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA2 = LLAMA3 | {
    "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
    "intermediate_size": 13824, "vocab_size": 32000,
}  # fmt: skip


def written(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


# As Hugging Face counts them.
@pytest.mark.parametrize(
    "config,parameters", [(GPT2, 124_439_808), (LLAMA3, 8_030_261_248), (LLAMA2, 13_015_864_320)], ids=["2", "3", "13"]
)
def test_parameters_of_known_models(config, parameters, tmp_path):
    assert Model.read(written(tmp_path, config)).parameters == parameters


def test_parameters_are_those_of_a_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = transformers.LlamaConfig(**sizes, intermediate_size=48, vocab_size=99, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    assert Model.read(str(tmp_path)).parameters == sum(p.numel() for p in model.parameters())


def test_the_papers_arithmetic_gives_the_papers_growth():
    rows = [line.split("|")[1:4] for line in paper().splitlines()[2:]]
    assert [name.strip() for name, *_ in rows] == list(PAPER)
    assert all(float(given) == float(found) for _, given, found in rows)


def test_the_docs_have_the_table():
    docs = Path(__file__).parent.parent / "docs" / "distributed.md"
    assert paper() in docs.read_text()


def plan(**changes):
    return replace(Plan(Model("m", 4, 256, 50_000, 10_000_000), 8, GIB, "fsdp"), **changes)


def test_the_largest_batch_fits_and_one_token_more_does_not():
    for strategy in ("fsdp", "tp", "ddp"):
        for way in ("eager", "compile", "ours"):
            made = plan(strategy=strategy)
            most = made.largest(way)

            def needs(tokens, made=made, way=way):
                return made.states() + made.head() + made.loss(way, tokens) + made.activations(tokens)

            assert needs(most) <= made.memory < needs(most + 1), (strategy, way)


def test_strategies():
    """By hand, of 10 M parameters, 16 bytes each, and a head of 50,000 x 256 in 16 bits."""
    assert plan().states() == 20e6 and plan(strategy="ddp").states() == 160e6
    assert plan().head() == 2 * 25.6e6 and plan(strategy="ddp").head() == plan(strategy="tp").head() == 0
    assert plan().traffic("ours", 100) == plan().traffic("eager", 100) == 2 * 25.6e6 * 7 / 8
    of_hidden = 2 * 100 * 256 * 2 * 7 / 8
    assert plan(strategy="tp").traffic("eager", 100) == 100 * 50_000 * 2 * 7 / 8 + of_hidden
    assert plan(strategy="tp").traffic("ours", 100) == 3 * 4 * 100 * 7 + of_hidden


def test_nothing_fits():
    assert plan(memory=1e6).largest("ours") == 0


def test_command(tmp_path, capsys):
    folder = written(tmp_path, LLAMA3)
    arguments = ["plan", "--model", folder, "--gpus", "16", "--memory", "80", "--usable", "1", "--tokens", "4096"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    eager = 4096 * 128256 * 10 / GIB
    assert f"logits, their gradients, scratch | {eager:.2f} |" in out and "16 GPUs by fsdp" in out
    assert main(["plan", "--paper"]) == 0
    for wrong, words in (
        (["--model", str(tmp_path / "none.json")], "No such file"),
        (["--model", written(tmp_path, {"a": 1})], "num_hidden_layers"),
        ([], "--model"),
        (["--model", folder, "--gpus", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(["plan", *wrong])
        assert words in capsys.readouterr().err
