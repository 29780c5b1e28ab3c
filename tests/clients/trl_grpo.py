# with: CCE_INDUCTOR=1 CCE_INDUCTOR_EAGER_HEADS=1
# fuses nothing: TRL multiplies by lm_head.weight in a function of its own
"""TRL's GRPOTrainer: answers are generated, their log-probabilities trained on."""

import client
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

client.watch()
config = GRPOConfig(
    **client.arguments(
        num_generations=client.ROWS,
        max_completion_length=64,
        bf16=False,
        learning_rate=1e-3,
        gradient_checkpointing=False,
        seed=0,
    )
)
texts = [line.split() for line in client.text(64)]
data = Dataset.from_dict({"prompt": [" ".join(line[:192]) + " " for line in texts]})


def reward(completions, **_):
    return [float(sum(map(ord, text)) % 97) for text in completions]


trainer = GRPOTrainer(
    model=client.llama(),
    reward_funcs=reward,
    args=config,
    train_dataset=data,
    processing_class=client.tokenizer(),
)
torch.manual_seed(0)
trainer.train()
client.done(client.history(trainer, "grad_norm", "entropy"))
