"""What a large vocabulary costs when a prompt ends inside a token.

Source: Su, "A problem of large-vocabulary language models in continuing a text, and remedies",
https://kexue.fm/archives/9762. The more a vocabulary has whole words and phrases as tokens, the rarer is a text
whose tokens stop at another place, and the worse a model continues it. Remedies: train on stochastic segmentations,
or go back by one token at inference and continue with tokens that begin with its letters.

Byte-pair vocabularies of three sizes are made of the standard library's sources, and a transformer is trained with
each, on the deterministic segmentation and with BPE-dropout (Provilkov et al., arXiv 1910.13267). Prompts are cut
inside a token; the loss of the true continuation is measured as it stands and after going back by one token. The
second is the loss of the same letters, so the difference is what the cut costs.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from common import Claim, Effect, Effort, Panel, Program, Task, adam, compiled, main, mean, renew, shared, spread, train
from model import Transformer, causal, sources
from torch import Tensor

VOCABULARIES = (4096, 8192, 16384)
WIDTH, LAYERS, BATCH, SEQ = 64, 2, 8, 96
DROPOUT, TEXT, PROMPTS, CONTEXT, AHEAD = 0.2, 1_500_000, 128, 48, 4


class Cutter:
    """A byte-level BPE as ids and as the bytes of each token."""

    def __init__(self, size: int) -> None:
        from tokenizers import Tokenizer

        self.inner = Tokenizer.from_str(shared(f"bpe-{size}", lambda: made(size)))
        self.text = [""] * size
        for token, i in self.inner.get_vocab().items():
            self.text[i] = token  # in the alphabet of ByteLevel, where every byte is a letter

    def ids(self, text: str, dropout: float | None = None) -> list[int]:
        self.inner.model.dropout = dropout
        return self.inner.encode(text).ids


def made(size: int) -> str:
    from model import bpe

    return bpe(sources(TEXT), size)._tokenizer.to_str()


def batches(cutter: Cutter, text: str, dropout: float | None, seed: int) -> Iterator[tuple[Tensor]]:
    """Endless ids (batch, seq + 1), segmented anew at every step."""
    chance = random.Random(seed)
    while True:
        found: list[list[int]] = []
        while len(found) < BATCH:
            start = chance.randrange(len(text) - 12 * SEQ)
            ids = cutter.ids(text[start : start + 12 * SEQ], dropout)
            if len(ids) > SEQ:
                found.append(ids[: SEQ + 1])
        yield (torch.tensor(found),)


def make(size: int) -> Transformer:
    return Transformer(size, WIDTH, [causal] * LAYERS)


def task(seed: int) -> Task:
    torch.manual_seed(seed)
    size = VOCABULARIES[1]
    model = make(size)
    stream = batches(Cutter(size), sources(TEXT)[100_000:], None, seed)  # dropout can not be given a seed
    return Task(model.next_loss, stream, adam(model.parameters(), 3e-3), BATCH * SEQ * size * 4)


def prompts(cutter: Cutter, text: str) -> list[tuple[list[int], list[int], list[int], list[int], list[int]]]:
    """Texts that are cut inside a token of ASCII letters.

    For each: the prompt's ids; those of what follows; the prompt's without its last; those of its last token's letters
    with what follows; and all tokens that begin with those letters.
    """
    chance = random.Random(0)
    found: list[tuple[list[int], list[int], list[int], list[int], list[int]]] = []
    while len(found) < PROMPTS:
        start = chance.randrange(len(text) - 2000)
        whole = cutter.ids(text[start : start + 2000])[: CONTEXT + 1 + AHEAD]
        pieces = [cutter.inner.decode([i]) for i in whole]
        cut = pieces[CONTEXT]
        if len(cut) < 3 or not cut.isascii() or not cut.strip().isalnum():
            continue
        at = chance.randrange(2, len(cut))
        before, after = "".join(pieces[:CONTEXT]) + cut[:at], cut[at:] + "".join(pieces[CONTEXT + 1 :])
        prompt = cutter.ids(before)
        last = cutter.text[prompt[-1]]
        again = cutter.ids(cutter.inner.decode([prompt[-1]]) + after)
        if not cutter.text[again[0]].startswith(last):
            continue
        begin = [i for i, token in enumerate(cutter.text) if token.startswith(last)]
        found.append((prompt, cutter.ids(after), prompt[:-1], again, begin))
    return found


@torch.no_grad()
def costs(model: Transformer, cut: list) -> tuple[float, float]:
    """The mean loss of the true continuation in nats, as the prompt stands and after going back by one token."""
    plain, back = [], []
    for prompt, after, shorter, again, begin in cut:
        plain.append(-float(following(model, prompt, after).sum()))
        ids = torch.tensor([shorter])
        allowed = model.head(model(ids))[0, -1].log_softmax(-1)[begin].logsumexp(0)
        back.append(float(allowed - following(model, shorter, again).sum()))
    return mean(plain), mean(back)


def following(model: Transformer, before: list[int], after: list[int]) -> Tensor:
    """The log-probabilities of the ids that follow."""
    ids = torch.tensor(before + after)
    z = model.head(model(ids[None, :-1]))[0, len(before) - 1 :]
    return -F.cross_entropy(z, ids[len(before) :], reduction="none")


def effect(effort: Effort) -> Effect:
    """Every vocabulary, with and without dropout."""
    steps = effort.choose(40, 500)
    text = sources(TEXT)
    held_out, text = text[:100_000], text[100_000:]
    found: dict[tuple[int, float | None], list[tuple[float, float]]] = {}
    for size in VOCABULARIES:
        cutter = Cutter(size)
        cut, model = prompts(cutter, held_out), make(size)
        loss = compiled(model.next_loss)
        for dropout in (None, DROPOUT):
            found[size, dropout] = []
            for seed in effort.seeds:
                renew(model, functools.partial(make, size), seed)
                train(loss, adam(model.parameters(), 3e-3), batches(cutter, text, dropout, seed), steps)
                found[size, dropout].append(costs(model, cut))
    return told(found, steps, len(effort.seeds))


def told(found: dict[tuple[int, float | None], list[tuple[float, float]]], steps: int, seeds: int) -> Effect:
    """Losses of continuations, and what the cut costs."""
    table = [["vocabulary", "training", "loss of the continuation", "gone back by one token", "what the cut costs"]]
    for (size, dropout), runs in found.items():
        name = "deterministic" if dropout is None else "stochastic"
        table.append(
            [
                str(size),
                name,
                *(spread([run[i] for run in runs], 2) for i in (0, 1)),
                spread([a - b for a, b in runs], 2),
            ]
        )
    small, large = VOCABULARIES[0], VOCABULARIES[-1]

    def cost(size: int, dropout: float | None, seed: int) -> float:
        return found[size, dropout][seed][0] - found[size, dropout][seed][1]

    claims = [
        Claim("a prompt that ends inside a token is continued worse than after going back by one token", [
            all(cost(size, None, s) > 0 for size in VOCABULARIES) for s in range(seeds)
        ]),
        Claim(f"the cut costs more with {large} tokens than with {small}", [
            cost(large, None, s) > cost(small, None, s) for s in range(seeds)
        ]),
        Claim(f"stochastic segmentation in training lowers that cost ({large} tokens)", [
            cost(large, DROPOUT, s) < cost(large, None, s) for s in range(seeds)
        ]),
        Claim("stochastic segmentation also lowers the loss of the cut continuation itself", [
            found[large, DROPOUT][s][0] < found[large, None][s][0] for s in range(seeds)
        ]),
    ]  # fmt: skip
    lines = [
        (name, list(VOCABULARIES), [mean(cost(size, dropout, s) for s in range(seeds)) for size in VOCABULARIES])
        for name, dropout in (("deterministic", None), ("stochastic", DROPOUT))
    ]
    notes = [
        f"{steps} steps; losses are nats for the rest of the token and {AHEAD} more, over {PROMPTS} prompts. "
        "The article gives no figures."
    ]
    return Effect(
        table,
        claims,
        [Panel("What a cut inside a token costs", "tokens in the vocabulary", "nats", lines, log="x")],
        notes,
    )


if __name__ == "__main__":
    sys.exit(main(Program(__file__, __doc__ or "", task, effect, {"tokenizers": "pip install tokenizers"})))
