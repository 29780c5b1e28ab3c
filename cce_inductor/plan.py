"""What the loss of a model takes on each of many GPUs, and the largest batch that fits: arithmetic, nothing is run.

Of a Hugging Face config.json. Counted are the weights with their gradients and the optimizer, the activations that
checkpointing keeps (one tensor of hidden states for each layer), and the head with its loss. How many bytes a logit
takes is what `bench` measured at the peak (docs/benchmarks.md); the rest of a step (attention, the allocator's gaps,
the layer that is recomputed) is not counted: `--usable` leaves room for it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 1 << 30
STRATEGIES = ("fsdp", "tp", "ddp")
# Bytes at the peak for each logit, of 16 bits and of 32. Eager has the loss in fp32; torch.compile returns the logits.
LOGIT_BYTES = {"eager": {2: 10, 4: 8}, "compile": {2: 4, 4: 8}}
WAYS = ("eager", "compile", "ours")
# Sizes and activations of Table A3 of the paper (arXiv 2411.09009): N = 65,536 tokens, logits in fp32 once, 8 bytes for
# each parameter, 16 GPUs with 75 GiB of 80 usable. Layers, width, vocabulary, parameters, and the growth it gives.
PAPER = {
    "GPT-2": (12, 768, 50257, 124_439_808, 11.9),
    "Gemma 2 (2B)": (26, 2304, 256000, 2_614_341_888, 9.5),
    "Llama 3 (8B)": (32, 4096, 128256, 8_030_261_248, 3.0),
    "Llama 2 (13B)": (40, 5120, 32000, 13_015_864_320, 1.3),
}


@dataclass(frozen=True)
class Model:
    """Sizes of a model: layers, width, vocabulary, and all parameters."""

    name: str
    layers: int
    width: int
    vocab: int
    parameters: int

    @staticmethod
    def read(path: str) -> Model:
        """Of a config.json, or the folder that has one. Raises ValueError for a file without the sizes it needs."""
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        config = json.loads(file.read_text())
        config = config.get("text_config", config)

        def size(*names: str, default: int | None = None) -> int:
            value = next((config[n] for n in names if config.get(n) is not None), default)
            if not isinstance(value, int):
                raise ValueError(f"{file} has none of {', '.join(names)}: it must be a language model's config.json")
            return value

        layers, width = size("num_hidden_layers", "n_layer"), size("hidden_size", "n_embd")
        vocab, heads = size("vocab_size"), size("num_attention_heads", "n_head")
        head = size("head_dim", default=width // heads)
        inner = size("intermediate_size", "n_inner", default=4 * width)
        of_attention = 2 * width * head * (heads + size("num_key_value_heads", default=heads))
        of_gpt = "n_embd" in config
        of_layer = of_attention + (2 if of_gpt else 3) * width * inner + (13 if of_gpt else 2) * width
        tied = config.get("tie_word_embeddings", True)
        embeddings = (1 if tied else 2) * vocab * width + (size("n_positions") * width if of_gpt else 0)
        name = config.get("_name_or_path") or file.parent.name or str(file)
        return Model(name, layers, width, vocab, layers * of_layer + embeddings + (2 if of_gpt else 1) * width)


@dataclass(frozen=True)
class Plan:
    """A model on many GPUs.

    gpus: how many. memory: usable bytes of each. strategy: one of STRATEGIES. dtype_bytes: of hidden states and logits.
    parameter_bytes: of a parameter with its gradient and its optimizer state. workspace: bytes of our scratch.
    """

    model: Model
    gpus: int
    memory: float
    strategy: str
    dtype_bytes: int = 2
    parameter_bytes: int = 16
    workspace: int = 64 << 20

    def states(self) -> float:
        """Bytes of weights, gradients and optimizer state on each GPU."""
        share = 1 if self.strategy == "ddp" else self.gpus
        return self.model.parameters * self.parameter_bytes / share

    def head(self) -> float:
        """Bytes of the head on each GPU beside `states`: under FSDP it is gathered, and so is its gradient."""
        return 2 * self.model.vocab * self.model.width * self.dtype_bytes if self.strategy == "fsdp" else 0

    def loss(self, way: str, tokens: float) -> float:
        """Bytes of logits, their gradients and scratch on each GPU, for so many tokens there."""
        if way == "ours":
            dx_sum = self.model.width * 4 if self.dtype_bytes < 4 else 0
            return self.workspace + tokens * dx_sum
        return tokens * self.model.vocab * LOGIT_BYTES[way][self.dtype_bytes]

    def activations(self, tokens: float) -> float:
        """Bytes of the hidden states that checkpointing keeps."""
        return tokens * self.model.layers * self.model.width * self.dtype_bytes

    def traffic(self, way: str, tokens: float) -> float:
        """Bytes that each GPU receives in a step for the head and its loss.

        FSDP gathers the head and scatters the sum of its gradients; DDP's all-reduce does both with the gradient. Split
        over ranks, logits are gathered, or with us three numbers a row, and the gradient of hidden states is reduced.
        """
        p, m = self.gpus, self.model
        head = m.vocab * m.width * self.dtype_bytes * (p - 1) / p
        if self.strategy != "tp":
            return 2 * head
        rows = 3 * 4 * tokens * (p - 1) if way == "ours" else tokens * m.vocab * self.dtype_bytes * (p - 1) / p
        return rows + 2 * tokens * m.width * self.dtype_bytes * (p - 1) / p

    def largest(self, way: str) -> int:
        """The most tokens that fit on each GPU, 0 for none. Under tensor parallelism all GPUs see the same ones."""
        fixed = self.states() + self.head() + self.loss(way, 0)
        per_token = self.activations(1) + self.loss(way, 1) - self.loss(way, 0)
        return max(0, int((self.memory - fixed) / per_token))


def table(plan: Plan, tokens: int) -> str:
    """The plan as a table in Markdown, in GiB."""
    m = plan.model
    rows: list[tuple[str, Any]] = [
        ("weights, gradients, optimizer", lambda way: _gib(plan.states())),
        ("the head, gathered, and its gradient", lambda way: _gib(plan.head())),
        ("activations", lambda way: _gib(plan.activations(tokens))),
        ("logits, their gradients, scratch", lambda way: _gib(plan.loss(way, tokens))),
        ("received for head and loss, a step", lambda way: _gib(plan.traffic(way, tokens))),
        ("largest batch, tokens on a GPU", lambda way: f"{plan.largest(way):,}"),
        ("times eager's", lambda way: _times(plan.largest(way), plan.largest("eager"))),
    ]
    lines = [
        f"{m.name}: {m.layers} layers, D = {m.width:,}, V = {m.vocab:,}, {m.parameters / 1e9:.2f} B parameters; "
        f"{plan.gpus} GPUs by {plan.strategy}, {plan.memory / GIB:g} GiB usable and {tokens:,} tokens on each. GiB:",
        "",
        "| | eager | torch.compile, logits returned | ours |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {name} | {' | '.join(value(way) for way in WAYS)} |" for name, value in rows),
    ]
    return "\n".join(lines)


def paper() -> str:
    """Table A3 of the paper, and what the same models come to with what is measured here."""
    lines = [
        "| model | the paper's growth | by its arithmetic | eager, tokens on a GPU | ours | growth |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, (layers, width, vocab, parameters, growth) in PAPER.items():
        plan = Plan(Model(name, layers, width, vocab, parameters), 16, 75 * GIB, "fsdp", parameter_bytes=8)
        theirs = 1 + 4 * vocab / plan.activations(1)
        eager, ours = plan.largest("eager"), plan.largest("ours")
        lines.append(f"| {name} | {growth} | {theirs:.1f} | {eager:,} | {ours:,} | {_times(ours, eager)} |")
    return "\n".join(lines)


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def _times(a: int, b: int) -> str:
    return f"{a / b:.1f}" if b else "only ours fits" if a else "none fits"


def main(arguments: list[str]) -> int:
    """Prints the plan of a model."""
    parser = argparse.ArgumentParser(prog="python -m cce_inductor plan", description=__doc__)
    parser.add_argument("--model", metavar="FOLDER", help="a Hugging Face config.json, or its folder")
    parser.add_argument("--gpus", type=int, default=8, help="how many (default 8)")
    parser.add_argument("--memory", type=float, default=80, metavar="GiB", help="of each (default 80)")
    parser.add_argument("--usable", type=float, default=0.9, help="share of it that is planned with (default 0.9)")
    parser.add_argument(
        "--strategy", choices=STRATEGIES, default="fsdp", help="how ranks share the model (default fsdp)"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="on each GPU, for the table (default 8192)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of logits (default bf16)")
    parser.add_argument(
        "--parameter-bytes", type=int, default=16, help="of a parameter, its gradient and optimizer state (default 16)"
    )
    parser.add_argument("--workspace-mb", type=int, default=512, help="the knob workspace_mb (default 512)")
    parser.add_argument("--paper", action="store_true", help="the models of the paper's Table A3 instead")
    args = parser.parse_args(arguments)
    if args.paper:
        print(paper())
        return 0
    if args.model is None:
        parser.error("--model FOLDER is needed, or --paper")
    if args.gpus < 1 or args.tokens < 1 or not 0 < args.usable <= 1:
        parser.error("--gpus and --tokens must be at least 1, --usable above 0 and at most 1")
    try:
        model = Model.read(args.model)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    memory, size = args.memory * args.usable * GIB, {"bf16": 2, "fp32": 4}[args.dtype]
    plan = Plan(model, args.gpus, memory, args.strategy, size, args.parameter_bytes, args.workspace_mb << 20)
    print(table(plan, args.tokens))
    return 0
