"""Losses that have to read the logits, as programs write them behind a compiled model.

None of them is fused where it is called eagerly on deferred logits, so all that can be asked of us is to cost no more
than ``torch.compile`` alone: the tests hold their memory to that, ``python -m cce_inductor bench reads`` their time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def label_smoother(z: Tensor, t: Tensor) -> Tensor:
    """Hugging Face's, of its Trainer."""
    log_p = -F.log_softmax(z, dim=-1)
    nll, smooth = log_p.gather(-1, t[..., None]), log_p.sum(-1, keepdim=True, dtype=torch.float32)
    return 0.9 * nll.mean() + 0.1 * smooth.mean() / z.shape[-1]


def focal(z: Tensor, t: Tensor) -> Tensor:
    p = F.softmax(z, -1).gather(-1, t[..., None])
    return (-((1 - p) ** 2) * p.log()).mean()


def ctc(z: Tensor, t: Tensor) -> Tensor:
    rows = torch.full((z.shape[0],), z.shape[1])
    return F.ctc_loss(F.log_softmax(z.float(), -1).transpose(0, 1), t[:, :4], rows, torch.full_like(rows, 4))


def _given(z: Tensor) -> Tensor:
    """A distribution over the classes for each row, made in little memory."""
    return torch.full((1,), 1 / z.shape[-1], dtype=z.dtype).expand(z.shape)


def kl_to_given(z: Tensor, t: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(z, -1), _given(z), reduction="batchmean")


def soft_targets(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), _given(z).flatten(0, 1))


def bce(z: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, _given(z))


def multi_margin(z: Tensor, t: Tensor) -> Tensor:
    return F.multi_margin_loss(z.float().view(-1, z.shape[-1]), t.view(-1))


def topk_masked(z: Tensor, t: Tensor) -> Tensor:
    least = z.topk(8, -1).values[..., -1:]
    return F.cross_entropy(z.masked_fill(z < least, -1e4).flatten(0, 1), t.flatten())


def entropy_in_fp32(z: Tensor, t: Tensor) -> Tensor:
    p = F.softmax(z.float(), -1)
    return -(p * torch.log(p + 1e-9)).sum(-1).mean()


def metric_before(z: Tensor, t: Tensor) -> Tensor:
    """An accuracy reads the logits with grad mode off, and the loss trains through them afterwards."""
    with torch.no_grad():
        accuracy = (z.topk(5, -1).indices == t[..., None]).float().sum(-1).mean()
    return F.cross_entropy(z.flatten(0, 1), t.flatten()) * (2 - accuracy)


def regularised(z: Tensor, t: Tensor) -> Tensor:
    return 1e-4 * (z * z).mean() + F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1))


def sampled(z: Tensor, t: Tensor) -> Tensor:
    """A policy gradient on tokens that are drawn from the logits themselves."""
    flat = z.view(-1, z.shape[-1])
    drawn = torch.multinomial(F.softmax(flat.detach().float(), -1), 1)
    return -F.log_softmax(flat, -1).gather(1, drawn).mean()


def temperature_in_place(z: Tensor, t: Tensor) -> Tensor:
    z.div_(0.7)
    return F.cross_entropy(z.flatten(0, 1), t.flatten())


def temperature_of_a_copy(z: Tensor, t: Tensor) -> Tensor:
    z = z.clone()
    z.div_(0.7)
    return F.cross_entropy(z.flatten(0, 1), t.flatten())


def forbidden_classes(z: Tensor, t: Tensor) -> Tensor:
    z[..., 5:9] = -1e4
    return F.cross_entropy(z.flatten(0, 1), t.flatten())


def read_then_viewed(z: Tensor, t: Tensor) -> Tensor:
    spread = z.abs().amax(-1).mean()
    return F.cross_entropy(z[:, :-1].flatten(0, 1), t[:, 1:].flatten()) + 1e-3 * spread


def shifted(z: Tensor, t: Tensor) -> Tensor:
    return -F.softmax(z[:, :-1], -1).gather(-1, t[:, 1:, None]).mean()


def shifted_and_copied(z: Tensor, t: Tensor) -> Tensor:
    flat = z[:, :-1].contiguous().view(-1, z.shape[-1])
    return F.multi_margin_loss(flat.float(), t[:, 1:].reshape(-1))


def in_pieces(z: Tensor, t: Tensor) -> Tensor:
    pieces = [
        F.softmax(a, -1).gather(-1, b[..., None]).mean() for a, b in zip(z.chunk(4, 1), t.chunk(4, 1), strict=True)
    ]
    return -torch.stack(pieces).sum()


def last_row(z: Tensor, t: Tensor) -> Tensor:
    return z[:, -1].tanh().mean()


def chosen_rows(z: Tensor, t: Tensor) -> Tensor:
    rows = t % 2 == 0
    return F.cross_entropy(z[rows], t[rows]) + z[rows].abs().mean()


def sigmoids(z: Tensor, t: Tensor) -> Tensor:
    return z.sigmoid().mean() + F.softplus(-z.gather(-1, t[..., None])).mean()


def hinge(z: Tensor, t: Tensor) -> Tensor:
    return F.relu(1 + z - z.gather(-1, t[..., None])).mean()


def spread(z: Tensor, t: Tensor) -> Tensor:
    return z.std(-1).mean()


Reader = Callable[[Tensor, Tensor], Tensor]
READERS: dict[str, Reader] = {
    loss.__name__: loss
    for loss in (
        label_smoother,
        focal,
        ctc,
        kl_to_given,
        soft_targets,
        bce,
        multi_margin,
        topk_masked,
        entropy_in_fp32,
        metric_before,
        regularised,
        sampled,
        temperature_in_place,
        temperature_of_a_copy,
        forbidden_classes,
        read_then_viewed,
        shifted,
        shifted_and_copied,
        in_pieces,
        last_row,
        chosen_rows,
        sigmoids,
        hinge,
        spread,
    )
}


class Capped(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return 30 * torch.tanh(z / 30)


class Upcast(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.float()


HEADS = ("plain", "biased", "capped", "bf16", "bf16 upcast")


def model(head: str, d: int, v: int) -> nn.Sequential:
    """A layer and a head, without a loss."""
    layers: list[nn.Module] = [nn.Linear(d, d), nn.Tanh(), nn.Linear(d, v, bias=head == "biased")]
    made = nn.Sequential(*layers).to(torch.bfloat16 if head.startswith("bf16") else torch.float32)
    if head in ("capped", "bf16 upcast"):
        made.append(Capped() if head == "capped" else Upcast())
    return made
