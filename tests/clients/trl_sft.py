# with: CCE_INDUCTOR=1 CCE_INDUCTOR_EAGER_HEADS=1
"""TRL's SFTTrainer with a `compute_loss_func`, Hugging Face's own loss: nothing is compiled."""

import client
from datasets import Dataset
from transformers.loss.loss_utils import ForCausalLMLoss
from trl import SFTConfig, SFTTrainer


def loss_of(outputs, labels, num_items_in_batch=None):
    return ForCausalLMLoss(outputs.logits, labels, client.VOCAB, num_items_in_batch)


client.watch()
config = SFTConfig(
    output_dir=client.folder(),
    per_device_train_batch_size=client.ROWS,
    max_steps=client.STEPS,
    logging_steps=1,
    report_to=[],
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
    learning_rate=1e-2,
    save_strategy="no",
    max_length=client.LENGTH,
    gradient_checkpointing=False,
)
data = Dataset.from_dict({"text": client.text(2 * client.ROWS * client.STEPS)})
trainer = SFTTrainer(
    model=client.llama(),
    args=config,
    train_dataset=data,
    processing_class=client.tokenizer(),
    compute_loss_func=loss_of,
)
trainer.train()
history = [entry for entry in trainer.state.log_history if "loss" in entry]
client.done([entry[k] for entry in history for k in ("loss", "mean_token_accuracy", "entropy") if k in entry])
