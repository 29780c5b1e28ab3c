# with: CCE_INDUCTOR=1
"""litgpt: its GPT, compiled, under Fabric, with its `chunked_cross_entropy`."""

import client
import lightning
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy

client.watch()
fabric = lightning.Fabric(accelerator="cpu", devices=1)
config = Config(
    n_layer=2,
    n_head=2,
    n_embd=client.WIDTH,
    vocab_size=client.VOCAB,
    padded_vocab_size=client.VOCAB,
    block_size=client.LENGTH,
    intermediate_size=2 * client.WIDTH,
)
torch.manual_seed(0)
model = torch.compile(GPT(config))
model = fabric.setup(model)
optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))
data = fabric.setup_dataloaders(torch.utils.data.DataLoader(client.tokens(length=client.LENGTH + 1), client.ROWS))
losses = []
for _, batch in zip(range(client.STEPS), data, strict=False):
    loss = chunked_cross_entropy(model(batch[:, :-1].contiguous()), batch[:, 1:].contiguous())
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
client.done(losses)
