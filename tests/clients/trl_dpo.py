# with: CCE_INDUCTOR=1 CCE_INDUCTOR_EAGER_HEADS=1
# fuses nothing: TRL multiplies by lm_head.weight in a function of its own
"""TRL's DPOTrainer: log-probabilities of chosen and rejected answers, a reference model, metrics of the logits."""

import client
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

client.watch()
config = DPOConfig(
    **client.arguments(
        per_device_train_batch_size=client.ROWS // 2,
        bf16=False,
        learning_rate=1e-3,
        max_length=client.LENGTH,
        gradient_checkpointing=False,
    )
)
n = 2 * client.ROWS * client.STEPS
texts = [line.split() for line in client.text(2 * n)]
data = Dataset.from_dict(
    {
        "prompt": [" ".join(line[:20]) + " " for line in texts[:n]],
        "chosen": [" ".join(line[20:240]) for line in texts[:n]],
        "rejected": [" ".join(line[20:230]) for line in texts[n:]],
    }
)
trainer = DPOTrainer(
    model=client.llama(), ref_model=client.llama(), args=config, train_dataset=data, processing_class=client.tokenizer()
)
trainer.train()
client.done(client.history(trainer, "loss", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"))
