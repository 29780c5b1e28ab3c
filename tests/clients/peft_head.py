# with: CCE_INDUCTOR=1 CCE_INDUCTOR_EAGER_HEADS=1
"""PEFT: adapters on the layers and on the head, Hugging Face's Trainer, nothing compiled."""

import client
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

client.watch()
model = client.llama()
torch.manual_seed(0)
model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False))
arguments = TrainingArguments(
    output_dir=client.folder(),
    per_device_train_batch_size=client.ROWS,
    max_steps=client.STEPS,
    logging_steps=1,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
    learning_rate=1e-2,
    save_strategy="no",
)
trainer = Trainer(model=model, args=arguments, train_dataset=client.rows())
trainer.train()
client.done([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
