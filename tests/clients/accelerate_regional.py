# with: CCE_INDUCTOR=1 CCE_INDUCTOR_EAGER_HEADS=1
"""Accelerate with regional compilation: each block is compiled by itself, the head and the loss run eagerly."""

import client
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin

client.watch()
plugin = TorchDynamoPlugin(backend="inductor", use_regional_compilation=True)
accelerator = Accelerator(cpu=True, dynamo_plugin=plugin)
model = client.llama()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
data = torch.utils.data.DataLoader(client.rows(), batch_size=client.ROWS)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
losses = []
for _, batch in zip(range(client.STEPS), data, strict=False):
    loss = model(**batch).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
client.done(losses)
