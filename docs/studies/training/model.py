"""A language model as small as its vocabulary is large."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 4


class Layer(nn.Module):
    """Attention and an MLP on hidden states (batch, seq, width), each with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, seq, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Model(nn.Module):
    """Ids (batch, seq) to hidden states (batch, seq, width). The head's weight is its own: the embedding is another."""

    def __init__(self, vocab: int, width: int, layers: int, seq: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocab, width), nn.Embedding(seq, width)
        self.layers = nn.Sequential(*(Layer(width) for _ in range(layers)))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Parameter(torch.empty(vocab, width))
        for weight in (self.embedding.weight, self.position.weight, self.head):
            nn.init.normal_(weight, std=0.02 if weight is self.head else 1.0 / width**0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (batch, seq) to hidden states (batch, seq, width)."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.norm(self.layers(self.embedding(ids) + self.position(positions)))

    def permute(self, order: Tensor) -> None:
        """Give word `order[j]` the number j."""
        with torch.no_grad():
            for weight in (self.embedding.weight, self.head):
                weight.copy_(weight[order].clone())
