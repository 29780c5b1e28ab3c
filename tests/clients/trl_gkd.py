# with: CCE_INDUCTOR=1 CCE_INDUCTOR_EAGER_HEADS=1
"""TRL's GKDTrainer: a generalised Jensen-Shannon divergence of a student and a teacher."""

import client
from datasets import Dataset
from trl.experimental.gkd import GKDConfig, GKDTrainer

client.watch()
config = GKDConfig(
    **client.arguments(
        bf16=False, learning_rate=1e-3, max_length=client.LENGTH, gradient_checkpointing=False, lmbda=0.0
    )
)
n = 2 * client.ROWS * client.STEPS
texts = [line.split() for line in client.text(n)]
data = Dataset.from_dict(
    {
        "messages": [
            [
                {"role": "user", "content": " ".join(line[:20])},
                {"role": "assistant", "content": " ".join(line[20:])},
            ]
            for line in texts
        ]
    }
)
trainer = GKDTrainer(
    model=client.llama(),
    teacher_model=client.llama(hidden_size=2 * client.WIDTH),
    args=config,
    train_dataset=data,
    processing_class=client.tokenizer(),
)
trainer.train()
client.done(client.history(trainer, "loss"))
