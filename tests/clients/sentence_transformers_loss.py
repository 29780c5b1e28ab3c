# with: CCE_INDUCTOR=1 CCE_INDUCTOR_MIN_VOCAB=256
"""sentence-transformers: its in-batch negatives, one similarity of a compiled model's embeddings a pair."""

import client
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.EmbeddingBag(client.VOCAB, client.WIDTH)

    def forward(self, features):
        return {"sentence_embedding": self.words(features["input_ids"])}


client.watch()
torch.manual_seed(0)
model = Encoder()
loss_of = torch.compile(MultipleNegativesRankingLoss(model))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for batch in client.tokens(rows=2048 * client.STEPS, length=32).split(2048):
    loss = loss_of([{"input_ids": batch[:, :16]}, {"input_ids": batch[:, 16:]}], None)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
client.done(losses)
