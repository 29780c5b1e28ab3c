"""The parts of docs/accuracy.md, from the runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cce_inductor.bench.docs import Section
from cce_inductor.bench.smollm2 import of_model
from cce_inductor.instruments.data import english_text, load_tokens

from . import caps, driver, errors, finetune, pictures, pretrain, tables
from .made import made
from .specs import LION, Finetuning, Plan, Pretraining, plan

PAGE = "accuracy"
SEQ = 512  # tokens a text, where the model is looked at before training
QUICK_VOCAB = 512
SEED = 0  # of the texts and the made head that are looked at before training

ERRORS = """\
Gradients of a mean loss in bf16, operands and results, relative to float64 on the same operands (Frobenius norm); and
of single rows of dW, each relative to itself. "exact" and the filters add up in fp32 and round once, here as
everywhere; "eager" is `F.cross_entropy(F.linear(x, W).float(), t)`, which rounds the logits and their gradient. The
filters are the operators' eager implementation, which drops all that it may."""

GAP = """\
Gap: mean of the differences to exact with the same seed, ± half of the 95 % interval (Student's t); * marks an interval
without 0, and one seed has none."""

PRETRAINING = """\
{tokens:,} tokens of Python's help topics, {vocab} words (the tokenizer's other ids are folded onto them); {layers}
layers of width {width}, {rows} rows a step, bf16 autocast over fp32 weights. The same weights, batches and order for
every mode of a seed. Held-out: exact loss of {held_out} tokens, mean of the last {last} evaluations; training: mean of
the last quarter of the steps; with the standard deviation over seeds. Curve: at how many evaluations the interval of
the gap is without 0; one of twenty is expected by chance, and neighbours are not independent. "eager" and "exact,
permuted" (the vocabulary in another order) differ from exact by rounding alone: their gaps show how far runs drift
apart that are the same training. The filters are the operators' eager
implementation, which drops all that a filter may: the kernels would do most of these blocks in full, since a softmax
this flat keeps more than 85 % of the columns. {gap}"""

WORDS = """\
What became of words by how often they were a target: never, up to three times ("rare"), more often; over held-out
positions, in the end. Values for exact (standard deviation over seeds), for the others the gap to exact.
Rows of dW that are exactly zero: the mean over the steps. Second moment: Adam's, of the head, mean over the group's
rows; for exact the value, for the others the ratio to exact's."""

FINETUNING = """\
{model}, its upper {layers} layers and its head (untied) trained on {rows} tokens of the help topics, all of them at
every step, for {steps} steps with AdamW, bf16 autocast over fp32 weights; the seed chooses the texts. The steps needed
are in the order of the seeds; the final loss is the mean of the last {last} steps; other texts are as many tokens that
were not trained on. {gap}"""

CAPS = """\
The budget τ = 2⁻⁹ bounds what a block of 128 rows loses; a single row may lose a larger share of its own gradient. A
block one of whose rows loses more than a cap, in multiples of τ, is done in full. "Kept": columns by the budget alone.
"Full": blocks done in full because of the cap, "computed": columns computed then. "Before" is {model} over {rows} rows
of English; the others are every look at every fine-tuning run, by the loss at that step."""


class Inputs:
    """What the runs read, loaded when the first of them needs it."""

    def __init__(self, model: Path | None) -> None:
        self.model = model

    @cached_property
    def tokens(self) -> torch.Tensor:
        """(tokens,) int64: the text as the model reads it, or made ones."""
        if self.model is not None:
            return load_tokens(self.model, english_text())
        words = torch.rand(4096, generator=torch.Generator().manual_seed(0))
        return (QUICK_VOCAB**words - 1).long()

    def subject(self, layers: int) -> finetune.Subject:
        """A fresh model whose uppermost layers learn."""
        return finetune.Small(QUICK_VOCAB, 16, 64) if self.model is None else finetune.Checkpoint(self.model, layers)


def heads(inputs: Inputs, rows: int) -> dict[str, Any]:
    """Errors and row checks of a head before any training of ours."""
    found = made(rows, QUICK_VOCAB, SEED) if inputs.model is None else of_model(inputs.model, rows, SEQ, SEED)
    modes = errors.modes_for(driver.supported)
    return {
        "errors": errors.measure(*found, modes, torch.bfloat16),
        "blocks": caps.examine(*found, finetune.BUDGET, torch.bfloat16),
    }


def run(model: Path | None, folder: Path, pictures_folder: Path, more: bool) -> Iterator[Section]:
    """Every section, each as soon as its runs are done; without a model a tiny made one.

    more: False does no runs, and takes those that are done.
    """
    todo = plan(quick=model is None)
    inputs = Inputs(model)
    name = "a made head" if model is None else model.name
    before = driver.once(folder / "heads.json", lambda: heads(inputs, todo.rows))
    modes = errors.modes_for(driver.supported)
    tuned = driver.finish(
        todo.finetuning,
        lambda spec: finetune.run(spec, lambda: inputs.subject(spec.layers), inputs.tokens, modes),
        folder,
        more,
    )
    yield _errors(before, tuned, name, todo)
    if tuned:
        yield _finetuning(tuned, name, todo.finetuning[0], pictures_folder)
    yield _caps(before, tuned, name, todo)
    trained = driver.finish(todo.pretraining, lambda spec: pretrain.run(spec, inputs.tokens), folder, more)
    if trained:
        yield from _pretraining(trained, todo.pretraining[0], pictures_folder)


def _errors(before: dict[str, Any], tuned: list[dict[str, Any]], name: str, todo: Plan) -> Section:
    parts = {f"{name} over {todo.rows} rows of English, before training": before["errors"]}
    for run in tuned:
        if "errors" in run:
            key = f"After fine-tuning on the texts of seed {run['spec']['seed']}, over those texts"
            parts[key] = run["errors"]
    body = "\n\n".join(f"{where}:\n\n{tables.errors(found)}" for where, found in parts.items())
    return Section("errors", ERRORS + "\n\n" + body, parts, page=PAGE)


def _finetuning(runs: list[dict[str, Any]], name: str, spec: Finetuning, folder: Path) -> Section:
    about = FINETUNING.format(
        model=name, layers=spec.layers, rows=spec.batch * spec.seq, steps=spec.steps, last=tables.LAST, gap=GAP
    )
    picture = folder / "fine-tuning.svg"
    pictures.finetuning(runs, picture)
    data = [{key: value for key, value in run.items() if key not in ("errors", "blocks")} for run in runs]
    return Section("fine-tuning", f"{about}\n\n{tables.finetuning(runs)}", data, picture, PAGE)


def _caps(before: dict[str, Any], runs: list[dict[str, Any]], name: str, todo: Plan) -> Section:
    table = tables.row_caps(before["blocks"], runs)
    data = {"before": before["blocks"], "runs": [{"spec": run["spec"], "blocks": run["blocks"]} for run in runs]}
    return Section("row-cap", f"{CAPS.format(model=name, rows=todo.rows)}\n\n{table}", data, page=PAGE)


def _pretraining(runs: list[dict[str, Any]], spec: Pretraining, folder: Path) -> Iterator[Section]:
    found = {}
    for optimizer in ("AdamW", LION["optimizer"]):
        of = [run for run in runs if run["spec"]["optimizer"] == optimizer]
        if of:
            found[f"{optimizer}, {of[0]['spec']['steps']} steps"] = of
    about = PRETRAINING.format(
        tokens=runs[0]["text"]["train"],
        vocab=runs[0]["text"]["vocab"],
        layers=spec.layers,
        width=spec.width,
        rows=spec.batch * spec.seq,
        held_out=runs[0]["text"]["held out"],
        last=tables.LAST,
        gap=GAP,
    )
    picture = folder / "pretraining.svg"
    pictures.pretraining(found, picture)
    body = [f"### {title}\n\n{tables.pretraining(of)}" for title, of in found.items()]
    yield Section("pretraining", "\n\n".join([about, *body]), runs, picture, PAGE)
    body = [f"### {title}\n\n{tables.words(of)}" for title, of in found.items()]
    words = [{key: run[key] for key in ("spec", "words", "logits", "second moments")} for run in runs]
    yield Section("words", "\n\n".join([WORDS, *body]), words, page=PAGE)
