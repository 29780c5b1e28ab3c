# with: CCE_INDUCTOR=1
"""Hugging Face's Trainer, causal: `torch_compile=True`, an evaluation with metrics, resumed from a checkpoint."""

import client
from transformers import Trainer, TrainingArguments


def trainer(model, **options):
    arguments = TrainingArguments(
        output_dir=client.folder(),
        per_device_train_batch_size=client.ROWS,
        per_device_eval_batch_size=client.ROWS,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        torch_compile=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        save_steps=4,
        **options,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=client.rows(),
        eval_dataset=client.rows(client.ROWS),
        compute_metrics=lambda p: {"accuracy": float((p.predictions == p.label_ids).mean())},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )


client.watch()
first = trainer(client.llama(), max_steps=client.STEPS)
first.train()
losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
scores = first.evaluate()
again = trainer(client.llama(), max_steps=client.STEPS)
again.train(resume_from_checkpoint=f"{client.folder()}/checkpoint-4")
resumed = [entry["loss"] for entry in again.state.log_history if "loss" in entry][-2:]
client.done([*losses, scores["eval_loss"], scores["eval_accuracy"], *resumed])
