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
arguments = TrainingArguments(**client.arguments())
trainer = Trainer(model=model, args=arguments, train_dataset=client.rows())
trainer.train()
client.done(client.history(trainer, "loss"))
