# with: CCE_INDUCTOR=1
"""Hugging Face's Trainer, causal: `torch_compile=True`, an evaluation with metrics, resumed from a checkpoint."""

import client
from transformers import Trainer, TrainingArguments


def trainer(model):
    saved = {"save_strategy": "steps", "save_steps": 4}
    given = client.arguments(per_device_eval_batch_size=client.ROWS, torch_compile=True, **saved)
    return Trainer(
        model=model,
        args=TrainingArguments(**given),
        train_dataset=client.rows(),
        eval_dataset=client.rows(client.ROWS),
        compute_metrics=lambda p: {"accuracy": float((p.predictions == p.label_ids).mean())},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )


client.watch()
first = trainer(client.llama())
first.train()
scores = first.evaluate()
again = trainer(client.llama())
again.train(resume_from_checkpoint=f"{client.folder()}/checkpoint-4")
resumed = client.history(again, "loss")[-2:]
client.done([*client.history(first, "loss"), scores["eval_loss"], scores["eval_accuracy"], *resumed])
