# with: CCE_INDUCTOR=1
"""Hugging Face's Trainer, masked: BERT's head with its transform and bias."""

import client
import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments


def masked():
    generator = torch.Generator().manual_seed(2)
    made = []
    for row in client.tokens():
        hidden = torch.rand(row.shape, generator=generator) < 0.3
        made.append({"input_ids": row.masked_fill(hidden, 2), "labels": row.masked_fill(~hidden, -100)})
    return made


client.watch()
torch.manual_seed(0)
config = BertConfig(
    vocab_size=client.VOCAB,
    hidden_size=client.WIDTH,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=2 * client.WIDTH,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
arguments = TrainingArguments(**client.arguments(torch_compile=True))
trainer = Trainer(model=BertForMaskedLM(config), args=arguments, train_dataset=masked())
trainer.train()
client.done(client.history(trainer, "loss"))
