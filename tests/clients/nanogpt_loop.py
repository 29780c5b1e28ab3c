# with: CCE_INDUCTOR=1
"""A loop in nanoGPT's shape: one compiled model that returns logits and loss, gradients accumulated, autocast."""

import client
import torch
import torch.nn as nn
import torch.nn.functional as F


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(client.VOCAB, client.WIDTH), nn.Embedding(client.LENGTH, client.WIDTH)
        self.h = nn.Sequential(nn.Linear(client.WIDTH, client.WIDTH), nn.GELU(), nn.Linear(client.WIDTH, client.WIDTH))
        self.lm_head = nn.Linear(client.WIDTH, client.VOCAB, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        logits = self.lm_head(x + self.h(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


client.watch()
model = torch.compile(GPT())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
data = iter(client.tokens(length=client.LENGTH + 1).split(client.ROWS))
losses = []
for _ in range(client.STEPS):
    for _ in range(2):
        batch = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            logits, loss = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        (loss / 2).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
client.done(losses)
