"""Training loops that others have written: Hugging Face's Trainer and Lightning's, with a model compiled in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from capture import FUSE_ALL
from test_other_graphs import Counted

import cce_inductor

V = 211


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def rows(n: int) -> list[dict[str, Any]]:
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (n, 9), generator=gen)
    return [{"input_ids": row, "labels": row} for row in ids]


def in_place(model: Any) -> Any:
    model.compile(backend=cce_inductor.cce_backend, options=FUSE_ALL)
    return model


@pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.slow), True], ids=["fp32", "bf16"])
def test_hugging_face_trainer(tmp_path: Path, bf16: bool) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    seen: list[tuple] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    def run(model: Any, metrics: Any) -> tuple[list[float], dict[str, float]]:
        torch._dynamo.reset()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            max_steps=4,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=bf16,
            disable_tqdm=True,
            seed=0,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=rows(16),
            eval_dataset=rows(8),
            compute_metrics=metrics,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, trainer.evaluate()

    losses, scores = run(llama(), compute_metrics)
    for metrics, reads in ((None, 0), (compute_metrics, 2)):  # one for each batch of the evaluation
        with Counted() as c:
            got, got_scores = run(in_place(llama()), metrics)
        assert got == pytest.approx(losses, rel=2e-2 if bf16 else 1e-4)
        assert got_scores["eval_loss"] == pytest.approx(scores["eval_loss"], rel=2e-2 if bf16 else 1e-4)
        if metrics is not None:
            assert got_scores["eval_accuracy"] == pytest.approx(scores["eval_accuracy"])
        assert c.fused >= 1 and c.reads == reads
    assert seen == [(8, 9, V)] * 2


def test_generation_is_plain_and_right() -> None:
    ids = rows(2)[0]["input_ids"][None]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = llama().generate(ids, **options)
    model = in_place(llama())
    with Counted() as c:
        assert torch.equal(model.generate(ids, **options), expected)
    assert (c.deferred, c.reads) == (0, 0)


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model: Any, inside: bool) -> None:
            super().__init__()
            self.model, self.inside, self.seen = model, inside, []

        def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            if self.inside:
                return self.model(**batch).loss
            logits = self.model(input_ids=batch["input_ids"]).logits
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            loss = self.loss(batch)
            self.seen.append(loss.item())
            return loss

        def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
            self.log("valid", self.loss(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def run(model: Any, inside: bool, precision: str) -> list[float]:
        torch._dynamo.reset()
        module = Module(model, inside)
        trainer = lightning.Trainer(
            max_steps=4,
            accelerator="cpu",
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        loader = torch.utils.data.DataLoader(rows(16), batch_size=4)
        trainer.fit(module, loader, torch.utils.data.DataLoader(rows(4), batch_size=4))
        return [*module.seen, float(trainer.callback_metrics["valid"])]

    for inside in (True, False):
        for precision, tolerance in (("32-true", 1e-4), ("bf16-mixed", 2e-2)):
            expected = run(llama(), inside, precision)
            with Counted() as c:
                got = run(in_place(llama()), inside, precision)
            assert got == pytest.approx(expected, rel=tolerance)
            assert c.fused >= 1 and c.reads == 0
