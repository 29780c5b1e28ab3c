# with: CCE_INDUCTOR=1 CCE_INDUCTOR_EAGER_HEADS=1
# fuses nothing: TRL multiplies by lm_head.weight in a function of its own
"""TRL's KTOTrainer: answers that are wanted or not, a reference model."""

import client
from datasets import Dataset

try:
    from trl import KTOConfig, KTOTrainer
except ImportError:
    from trl.experimental.kto import KTOConfig, KTOTrainer

client.watch()
config = KTOConfig(
    **client.arguments(bf16=False, learning_rate=1e-3, max_length=client.LENGTH, gradient_checkpointing=False)
)
n = 2 * client.ROWS * client.STEPS
texts = [line.split() for line in client.text(n)]
data = Dataset.from_dict(
    {
        "prompt": [" ".join(line[:20]) + " " for line in texts],
        "completion": [" ".join(line[20:240]) for line in texts],
        "label": [i % 2 == 0 for i in range(n)],
    }
)
trainer = KTOTrainer(
    model=client.llama(), ref_model=client.llama(), args=config, train_dataset=data, processing_class=client.tokenizer()
)
trainer.train()
client.done(client.history(trainer, "loss"))
