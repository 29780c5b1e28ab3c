"""Losses of logits with factors, margins, several classes a row or another head, as programs write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

S, M = 64.0, 0.5  # ArcFace's scale and margin


class Loss(nn.Module):
    """What the losses have besides the head: a gain for each class and a temperature for each row, which are learned.

    And another head over the same classes, which is not: its hidden states (N, D) and weight (V, D).
    """

    def __init__(self, name: str, shape: Shape, dtype: torch.dtype):
        super().__init__()
        rows, width, classes = shape
        self.function = (FACTORED | TWO_HEADS)[name][0]
        if name in TWO_HEADS:
            self.register_buffer("other_input", torch.randn(rows, width).to(dtype))
            self.register_buffer("other_weight", (torch.randn(classes, width) / width**0.5).to(dtype))
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, classes))
        self.temperature = nn.Parameter(torch.linspace(0.5, 1.5, rows)[:, None])

    def forward(self, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """The loss of x (N, D), weight (V, D) and class indices (N,)."""
        return self.function(self, x, weight, target)


def plain(loss: Loss, x: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), t)


def gain(loss: Loss, x: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight) * loss.gain, t)


def temperature(loss: Loss, x: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight) / loss.temperature, t)


def cosine(loss: Loss, x: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    """`arcface` without the margin. A loss of every row, and so none whose gradients the forward can form."""
    z = S * F.linear(F.normalize(x), F.normalize(weight))
    return F.cross_entropy(z, t, reduction="none").square().mean()


def arcface(loss: Loss, x: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    z = F.linear(F.normalize(x), F.normalize(weight))
    phi = z * math.cos(M) - (1.0 - z * z).clamp(0, 1).sqrt() * math.sin(M)
    phi = torch.where(z > math.cos(math.pi - M), phi, z - math.sin(math.pi - M) * M)
    one_hot = torch.zeros_like(z).scatter_(1, t[:, None], 1.0)
    z = S * (one_hot * phi + (1.0 - one_hot) * z)
    return F.cross_entropy(z, t, reduction="none").square().mean()


def entries(k: int) -> Callable[..., Tensor]:
    """Minus the log-probabilities of K classes of each row, as of a teacher's best."""

    def function(loss: Loss, x: Tensor, weight: Tensor, t: Tensor) -> Tensor:
        classes = (t[:, None] + 37 * torch.arange(k)) % weight.shape[0]
        return -F.linear(x, weight).log_softmax(-1).gather(-1, classes).mean()

    return function


def _others_logits(loss: Loss) -> Tensor:
    return F.linear(loss.other_input, loss.other_weight)  # type: ignore[arg-type]


def forward_kl(loss: Loss, x: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    """Distillation at temperature 2 (Hinton et al., arXiv 1503.02531)."""
    log_p, q = (F.linear(x, weight) / 2).log_softmax(-1), (_others_logits(loss) / 2).softmax(-1)
    return 4 * F.kl_div(log_p, q, reduction="batchmean")


def reverse_kl(loss: Loss, x: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    log_p = F.linear(x, weight).log_softmax(-1)
    return (log_p.exp() * (log_p - _others_logits(loss).log_softmax(-1))).sum(-1).mean()


def jsd(loss: Loss, x: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    """Generalised Jensen-Shannon divergence with beta = 0.5, as in GKD (arXiv 2306.13649)."""
    log_p, log_q = F.linear(x, weight).log_softmax(-1), _others_logits(loss).log_softmax(-1)
    log_m = torch.logsumexp(torch.stack([log_p - math.log(2), log_q - math.log(2)]), 0)
    parts = [F.kl_div(log_m, log_of, reduction="batchmean", log_target=True) for log_of in (log_q, log_p)]
    return 0.5 * parts[0] + 0.5 * parts[1]


def emo(loss: Loss, x: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    """Earth mover distance (arXiv 2310.04691): the expected embedding against the target's."""
    z, directions = F.linear(x, weight), F.normalize(weight.detach(), dim=-1)
    expected = z.softmax(-1) @ directions
    return F.cross_entropy(z, t) + (1 - (expected * directions[t]).sum(-1)).mean()


Shape = tuple[int, int, int]
FACTORED: dict[str, tuple[Callable[..., Tensor], str, Shape]] = {
    # name: the loss, the same one without the factor, and N, D, V
    "cross_entropy": (plain, "", (1024, 1024, 32768)),
    "a gain for each class": (gain, "cross_entropy", (1024, 1024, 32768)),
    "a temperature for each row": (temperature, "cross_entropy", (1024, 1024, 32768)),
    "cosines": (cosine, "", (256, 512, 262144)),
    "ArcFace": (arcface, "cosines", (256, 512, 262144)),
}
# The losses of K classes a row, by what `dtype_of` reads off the name.
for _shape in ((1024, 1024, 32768), (2048, 576, 49152)):
    for _dtype in ("fp32", "bf16"):
        _of = f"a row, D = {_shape[1]}, {_dtype}"
        FACTORED[f"1 class {_of}"] = (entries(1), "", _shape)
        FACTORED[f"64 classes {_of}"] = (entries(64), f"1 class {_of}", _shape)


# The losses of two heads over one vocabulary.
TWO_HEADS: dict[str, tuple[Callable[..., Tensor], str, Shape]] = {
    f"{_name}, D = {_shape[1]}, {_dtype}": (_loss, "", _shape)
    for _shape in ((1024, 1024, 32768), (2048, 576, 49152))
    for _dtype in ("fp32", "bf16")
    for _name, _loss in {"forward KL": forward_kl, "reverse KL": reverse_kl, "JSD": jsd, "EMO": emo}.items()
}


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a loss's operands."""
    return torch.bfloat16 if name.endswith("bf16") else torch.float32


QUICK: Shape = (32, 16, 4096)


def in_the_loop(backend: Any, compiled_loss: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A compiled head, with its cross-entropy outside, compiled apart or not. backend: None for eager mode."""

    def own(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def of_logits(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t)

    head = own if backend is None else torch.compile(own, backend=backend)
    compiles = compiled_loss and backend is not None
    loss = torch.compile(of_logits, backend=backend) if compiles else of_logits
    return lambda x, weight, t: loss(head(x, weight), t)


LOOPS = {"the loss in the training loop": False, "the loss in the training loop, compiled": True}
