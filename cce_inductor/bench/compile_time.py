"""How much of a model's compile time the pass takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from . import report
from .docs import Section
from .rounds import Options, say

# SmolLM2-135M's shape, with random weights: `transformers.LlamaConfig`'s names.
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
QUICK = {**SHAPE, "vocab_size": 4096, "hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 2}
LIMIT = 0.05  # the share that is not to be reached


@dataclass(frozen=True)
class Compilation:
    """One cold compilation, forward and backward, in a process of its own. CPU seconds; `nodes` of the captured graph.

    total: the first training step less the second one. trace: the pass, without what it hands on to.
    """

    total: float
    trace: float
    nodes: int
    fused: int
    parameters: int

    @property
    def share(self) -> float:
        """Of the compile time, what the pass took."""
        return self.trace / self.total


def run(options: Options, quick: bool = False) -> Section:
    """Compiles the model as often as `repeat` says, each time with an empty cache."""
    shape = QUICK if quick else SHAPE
    found = []
    for turn in range(options.repeat):
        say(f"compile time: round {turn + 1} of {options.repeat}")
        with options.child("bench.compile_worker", {"shape": shape, "turn": turn}, f"compile-{turn}") as child:
            found.append(Compilation(**child.ask("measure", 10 * options.timeout)))
    return conclude(found)


def conclude(found: list[Compilation]) -> Section:
    """The compilations as a section."""
    one = found[0]
    head = ("", "the pass, CPU ms", "forward and backward compiled, CPU s", "share")
    rows = [[f"run {i}", f"{1000 * c.trace:,.0f}", f"{c.total:,.1f}", f"{c.share:.2%}"] for i, c in enumerate(found, 1)]
    worst = max(c.share for c in found)
    text = (
        f"A llama of SmolLM2's shape with {one.parameters / 1e6:,.1f} million random weights, a graph of {one.nodes:,} "
        f"nodes with {one.fused} fused loss, compiled for the CPU with empty caches; CPU time, the compiler's too. "
        f"The pass takes at most {worst:.2%} of the time to compile; the aim is less than {LIMIT:.0%}."
    )
    return Section("compile-time", f"{text}\n\n{report.markdown(head, rows)}", [asdict(c) for c in found])
