"""How the softmax's mass lies on the columns of the vocabulary, by block of rows: a real model's, or a made one's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x (N, D), W (V, D), targets (N,)

BLOCK = 128  # rows
TILE = 128  # columns after which the forward knows a new running lse
# The made model: logits = -ZIPF ln(rank) + normal parts with these deviations, one per text and one per row.
# 128-row blocks keep some 5 % of 262144 columns at a budget of 4e-3, 256-row blocks 1.2 times as many.
ZIPF, TEXT, ROW, WIDTH = 1.78, 1.6, 3.5, 64
TEXT_ROWS = 512


@dataclass(frozen=True)
class Masses:
    """mass (B, V): by block and column the sum of p over the rows whose target is another; gradient (B,): of 1 - p_t.

    With equal tangents, `gradient` is the L1 norm of a block's dense gradient and `mass` what a column adds to it.
    """

    mass: torch.Tensor
    gradient: torch.Tensor


def measure(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    splits: int = 0,
    strided: bool = False,
    known: str = "row",
) -> Masses:
    """Exact, or with `splits` the bound a forward leaves that goes over the vocabulary once, in that many parts.

    The parts are ranges of tiles, or every `splits`-th tile. What a part knows of a row's lse before it begins are the
    logits at the targets of the "row", of its "block" or of the whole "batch".
    """
    import torch

    found, gradient = [], []
    everything = target.unique()
    for rows, block_target in zip(x.split(BLOCK), target.split(BLOCK), strict=True):
        logits = rows @ weight.T
        lse = logits.logsumexp(1, keepdim=True)
        at = block_target[:, None]
        target_logit = logits.gather(1, at)
        gradient.append((1 - (target_logit - lse).exp()).sum())
        if splits:
            start = target_logit
            if known != "row":
                seen = everything if known == "batch" else block_target.unique()
                start = logits[:, seen].logsumexp(1, keepdim=True)
            lse = torch.maximum(_running(logits, splits, strided), start)
        found.append((logits - lse).exp_().scatter_(1, at, 0).sum(0))
    return Masses(torch.stack(found), torch.stack(gradient))


def _running(logits: torch.Tensor, splits: int, strided: bool) -> torch.Tensor:
    """(rows, V): the lse of a part's tiles up to and with the column's own."""
    from torch.nn.functional import pad

    rows, v = logits.shape
    tiles = pad(logits, (0, -v % (TILE * splits)), value=-math.inf).view(rows, -1, TILE).logsumexp(2)
    shape, along = ((rows, -1, splits), 1) if strided else ((rows, splits, -1), 2)
    return tiles.view(shape).logcumsumexp(along).view(rows, -1).repeat_interleave(TILE, 1)[:, :v]


def of_model(path: Path, rows: int, seq: int, seed: int, device: str = "cpu") -> Inputs:
    """Hidden states, head and next tokens of English text, in pieces of `seq` tokens; fp32, on `device`.

    Raises DemoError if the text is too short.
    """
    import torch

    from ..demo.data import DemoError, batches, english_text, load_model, load_tokens

    tokens = load_tokens(path, english_text()).to(device)
    if len(tokens) < -(-rows // seq) * (seq + 1):
        raise DemoError(f"the text has {len(tokens)} tokens, too few for {rows} rows")
    model = load_model(path, torch.float32).eval().to(device)
    text = batches(tokens, 1, seq + 1, seed)
    hidden, target = [], []
    with torch.no_grad():
        for _ in range(-(-rows // seq)):
            ids = next(text)
            hidden.append(model.base_model(input_ids=ids[:, :-1]).last_hidden_state[0])
            target.append(ids[0, 1:])
    return torch.cat(hidden)[:rows], model.get_output_embeddings().weight.detach(), torch.cat(target)[:rows]


def made(rows: int, v: int, seed: int) -> Inputs:
    """A model whose words have Zipf's frequencies; targets are drawn from its own softmax."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    texts = -(-rows // TEXT_ROWS)
    x = (TEXT * normal(texts, 1, WIDTH) + ROW * normal(texts, TEXT_ROWS, WIDTH)).view(-1, WIDTH)[:rows]
    rank = torch.randperm(v, generator=generator) + 1.0
    weight = torch.cat([-ZIPF * rank.log()[:, None], normal(v, WIDTH) / math.sqrt(WIDTH)], 1)
    x = torch.cat([torch.ones(rows, 1), x], 1)
    drawn = torch.rand(rows, 1, generator=generator)
    target = [
        torch.searchsorted((part @ weight.T).softmax(1).cumsum(1), at)[:, 0].clamp_(max=v - 1)
        for part, at in zip(x.split(BLOCK), drawn.split(BLOCK), strict=True)
    ]
    return x, weight, torch.cat(target)
