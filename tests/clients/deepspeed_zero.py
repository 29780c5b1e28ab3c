# with: CCE_INDUCTOR=1 CCE_INDUCTOR_EAGER_HEADS=1
"""DeepSpeed, ZeRO-2: its engine around an uncompiled model of Hugging Face's."""

import os

import client
import deepspeed

client.watch()
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
model = client.llama()
engine, *_ = deepspeed.initialize(
    model=model,
    model_parameters=model.parameters(),
    dist_init_required=True,
    config={
        "train_micro_batch_size_per_gpu": client.ROWS,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    },
)
losses = []
for batch in client.tokens().split(client.ROWS)[: client.STEPS]:
    loss = engine(input_ids=batch, labels=batch).loss
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
client.done(losses)
