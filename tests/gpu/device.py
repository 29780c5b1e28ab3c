"""The device of these tests, and their training runs as a script: ``python device.py eager|cce|"cce late" steps``."""

import json
import os
import sys

import torch
import torch.nn.functional as F

import cce_inductor

# "cpu" lets the tests themselves be tried where there is no GPU.
DEVICE = os.environ.get("CCE_TEST_DEVICE", "cuda")


class Model(torch.nn.Module):
    """A causal language model of two layers, without a clue that its loss is to be fused."""

    def __init__(self, vocab: int, width: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, width)
        layer = torch.nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        hidden = self.layers(self.embedding(tokens), mask=mask)
        return F.cross_entropy(self.head(hidden).float().flatten(0, 1), targets.flatten())


def text(vocab: int, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens whose successors are mostly one of three, after a fixed rule: there is something to learn."""
    tokens = torch.empty(batch, length + 1, dtype=torch.int64)
    tokens[:, 0] = torch.randint(vocab, (batch,), generator=generator)
    for i in range(length):
        step = torch.randint(3, (batch,), generator=generator)
        noise = torch.randint(vocab, (batch,), generator=generator)
        follow = (tokens[:, i] * 31 + 17 * step + 7) % vocab
        tokens[:, i + 1] = torch.where(torch.rand(batch, generator=generator) < 0.1, noise, follow)
    return tokens


def train(kind: str, steps: int) -> list[float]:
    """The losses of a training run in bf16 autocast, the same data and the same beginning for every kind."""
    vocab, width, batch, length = 8192, 256, 16, 128
    torch.manual_seed(0)
    model = Model(vocab, width).to(DEVICE)
    # Late: gradients in the backward, in slabs, and the rest of its kernels.
    options = {"gradients_in_forward": False, "workspace_mb": 1} if kind == "cce late" else {}
    how = {"backend": "eager"} if kind == "eager" else {"backend": cce_inductor.cce_backend, "options": options}
    compiled = torch.compile(model, **how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        tokens = text(vocab, batch, length, generator).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = compiled(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [loss.item() for loss in losses]


if __name__ == "__main__":
    print(json.dumps(train(sys.argv[1], int(sys.argv[2]))))
