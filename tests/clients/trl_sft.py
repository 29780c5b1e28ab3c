# with: CCE_INDUCTOR=1 CCE_INDUCTOR_EAGER_HEADS=1
"""TRL's SFTTrainer with a `compute_loss_func`, Hugging Face's own loss: nothing is compiled."""

import client
from datasets import Dataset
from transformers.loss.loss_utils import ForCausalLMLoss
from trl import SFTConfig, SFTTrainer


def loss_of(outputs, labels, num_items_in_batch=None):
    return ForCausalLMLoss(outputs.logits, labels, client.VOCAB, num_items_in_batch)


client.watch()
config = SFTConfig(**client.arguments(bf16=False, max_length=client.LENGTH, gradient_checkpointing=False))
data = Dataset.from_dict({"text": client.text(2 * client.ROWS * client.STEPS)})
trainer = SFTTrainer(
    model=client.llama(),
    args=config,
    train_dataset=data,
    processing_class=client.tokenizer(),
    compute_loss_func=loss_of,
)
trainer.train()
client.done(client.history(trainer, "loss", "mean_token_accuracy", "entropy"))
