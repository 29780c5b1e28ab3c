# with: CCE_INDUCTOR=1 CCE_INDUCTOR_EAGER_HEADS=1
"""TRL's GKDTrainer: a generalised Jensen-Shannon divergence of a student and a teacher."""

import client
from datasets import Dataset
from trl.experimental.gkd import GKDConfig, GKDTrainer

client.watch()
config = GKDConfig(
    output_dir=client.folder(),
    per_device_train_batch_size=client.ROWS,
    max_steps=client.STEPS,
    logging_steps=1,
    report_to=[],
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
    learning_rate=1e-3,
    save_strategy="no",
    max_length=client.LENGTH,
    gradient_checkpointing=False,
    lmbda=0.0,
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
client.done([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
