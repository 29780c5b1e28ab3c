"""A small transformer, and texts that every Python brings along."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
BASE = 10000.0  # of the rotations


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE (Su et al., arXiv 2104.09864): x (..., seq, head width) turned by angles that grow with positions (seq,)."""
    half = x.shape[-1] // 2
    frequencies = BASE ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angles = positions.to(x.dtype)[:, None] * frequencies
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with RoPE to what came before."""
    positions = torch.arange(q.shape[-2], device=q.device)
    return F.scaled_dot_product_attention(rotated(q, positions), rotated(k, positions), v, is_causal=True)


def both_ways(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with RoPE to everything."""
    positions = torch.arange(q.shape[-2], device=q.device)
    return F.scaled_dot_product_attention(rotated(q, positions), rotated(k, positions), v)


class Layer(nn.Module):
    """Attention and an MLP on (batch, seq, width), each with a norm in front and a residual."""

    def __init__(self, width: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, seq, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).reshape(batch, seq, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """Ids (batch, seq) to hidden states (batch, seq, width); `head` makes logits of them. attend: by layer."""

    def __init__(
        self, vocab: int, width: int, attend: Sequence[Attend], heads: int = 4, classes: int | None = None
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.layers = nn.Sequential(*(Layer(width, heads, one) for one in attend))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, classes or vocab, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.layers(self.embedding(ids)))

    def next_loss(self, ids: Tensor) -> Tensor:
        """The mean cross-entropy of every id (batch, seq) but the first, in nats."""
        logits = self.head(self(ids[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def sources(limit: int) -> str:
    """So many characters of the standard library's own modules, in the order of their names."""
    parts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        parts.append(text)
        size += len(text)
        if size >= limit:
            break
    return "\n".join(parts)[:limit]


def bpe(text: str, size: int, dropout: float | None = None):  # type: ignore[no-untyped-def]
    """A byte-level BPE tokenizer of so many tokens, trained on a text."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer(dropout=dropout)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), vocab_size=size, min_frequency=2, show_progress=False)
    return tokenizer


def rows(tokens: Tensor, batch: int, seq: int, seed: int) -> Iterator[tuple[Tensor]]:
    """Endless batches (batch, seq) of pieces of the tokens, from places that the seed alone decides."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - seq, (batch, 1), generator=generator)
        yield (tokens[starts + torch.arange(seq)],)
