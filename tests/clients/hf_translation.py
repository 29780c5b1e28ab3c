# with: CCE_INDUCTOR=1
"""Hugging Face's Seq2SeqTrainer with label smoothing: T5, tied embeddings, a loss that the trainer computes itself."""

import client
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

client.watch()
torch.manual_seed(0)
config = T5Config(
    vocab_size=client.VOCAB,
    d_model=client.WIDTH,
    d_kv=32,
    d_ff=2 * client.WIDTH,
    num_layers=2,
    num_heads=2,
    dropout_rate=0.0,
    decoder_start_token_id=0,
)
arguments = Seq2SeqTrainingArguments(**client.arguments(torch_compile=True, label_smoothing_factor=0.1))
model = T5ForConditionalGeneration(config)
collator = DataCollatorForSeq2Seq(client.tokenizer(), model=model)
data = [{name: row.tolist() for name, row in example.items()} for example in client.rows()]
trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
trainer.train()
client.done(client.history(trainer, "loss"))
