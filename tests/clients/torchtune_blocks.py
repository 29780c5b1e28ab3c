# with: CCE_INDUCTOR=1 CCE_INDUCTOR_EAGER_HEADS=1
"""torchtune: layers compiled one by one, its chunked loss compiled apart, chunks of the hidden states in the head."""

import client
import torch
from torchtune.models.llama3 import llama3
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.training import compile_loss, compile_model

client.watch()
torch.manual_seed(0)
model = llama3(
    vocab_size=client.VOCAB,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    embed_dim=client.WIDTH,
    max_seq_len=client.LENGTH,
    intermediate_dim=2 * client.WIDTH,
)
loss_of = CEWithChunkedOutputLoss()
model.set_num_output_chunks(loss_of.num_output_chunks)
compile_model(model, verbose=False)
loss_of = compile_loss(loss_of, verbose=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for batch in client.tokens(length=client.LENGTH + 1).split(client.ROWS)[: client.STEPS]:
    loss = loss_of(model(batch[:, :-1]), batch[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
client.done(losses)
