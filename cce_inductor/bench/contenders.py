"""Every way to compute the loss, as a table: name, how it is built, and why it may not be available.

A builder returns ``fn(x, weight, target)``, which gives the loss, or the loss and the logits. It runs in the
contender's own process. A further contender is a row in `CONTENDERS`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EAGER = "eager"
COMPILE = "compile"
OURS = "ours"

Head = Callable[[Any, Any, Any], Any]


def _plain(x: Any, weight: Any, target: Any) -> Any:
    """As a Hugging Face model writes it: in fp32 `.float()` does nothing."""
    import torch.nn.functional as F

    return F.cross_entropy(F.linear(x, weight).float(), target)


def _with_logits(x: Any, weight: Any, target: Any) -> Any:
    import torch.nn.functional as F

    logits = F.linear(x, weight)
    return F.cross_entropy(logits.float(), target), logits


def _compiled(function: Head, **how: Any) -> Head:
    import torch

    return torch.compile(function, dynamic=False, **how)


def _ours(function: Head) -> Head:
    import cce_inductor

    return _compiled(function, backend=cce_inductor.cce_backend)


# Its gates compare the logits with weight and hidden states together and hold at few real shapes: lowered, so
# that it shows what it can do.
_CHUNKER_OPTIONS = {
    "auto_chunker.enable": True,
    "auto_chunker.output_size_threshold": 0,
    "auto_chunker.amplify_ratio_threshold": 0,
}


def _functional() -> Head:
    import torch
    import torch.nn.functional as F

    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight, target: F.linear_cross_entropy(x, weight, target, options=options)


def _cut_cross_entropy() -> Head:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, weight, target: linear_cross_entropy(x, weight, target, impl="torch_compile")


def _needs_config(name: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        import torch
        import torch._inductor.config

        return None if hasattr(torch._inductor.config, name) else f"torch {torch.__version__} has no {name}"

    return missing


def _needs_functional() -> str | None:
    import torch

    if hasattr(torch.nn.functional, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no F.linear_cross_entropy(options=...)"


def _needs_package(name: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        return None if importlib.util.find_spec(name) else f"not installed: pip install {name.replace('_', '-')}"

    return missing


def _needs_cut_cross_entropy() -> str | None:
    # Its first import takes Triton, also for the implementation that does not use it.
    return _needs_package("cut_cross_entropy")() or _needs_package("triton")()


# ---- what each says about itself after it has run, for the notes under the table


def _chunked() -> str:
    import torch._inductor.metrics as metrics

    count = getattr(metrics, "num_auto_chunking", None)
    if count is None:
        return "thresholds lowered; whether it chunked is unknown"
    return "thresholds lowered, chunked" if count else "thresholds lowered, yet it chunked nothing: plain Inductor ran"


def _fused() -> str:
    from torch._dynamo.utils import counters

    return "" if counters["cce_inductor"].get("fused") else "fused nothing"


def _nothing() -> None:
    return None


def _silent() -> str:
    return ""


@dataclass(frozen=True)
class Contender:
    name: str
    about: str
    build: Callable[[], Head]
    missing: Callable[[], str | None] = _nothing  # why it can not run here; None if it can
    note: Callable[[], str] = _silent
    devices: tuple[str, ...] = ("cpu",)


_ALL = (
    Contender(EAGER, "F.cross_entropy(F.linear(x, W).float(), t)", lambda: _plain),
    Contender(COMPILE, "torch.compile of that, returning the loss", lambda: _compiled(_plain)),
    Contender("compile+logits", "... returning the logits too", lambda: _compiled(_with_logits)),
    Contender(
        "auto_chunker",
        "torch.compile with Inductor's auto_chunker",
        lambda: _compiled(_plain, options=_CHUNKER_OPTIONS),
        _needs_config("auto_chunker"),
        _chunked,
    ),
    Contender("F.linear_cross_entropy", "with LinearCrossEntropyOptions()", _functional, _needs_functional),
    Contender("cut_cross_entropy", 'impl="torch_compile"', _cut_cross_entropy, _needs_cut_cross_entropy),
    Contender(OURS, 'torch.compile(backend="cce"), returning the loss', lambda: _ours(_plain), note=_fused),
    Contender("ours+logits", "... returning the logits too, deferred", lambda: _ours(_with_logits), note=_fused),
)
CONTENDERS = {contender.name: contender for contender in _ALL}


def build(name: str, dtype: str) -> Head:
    """The contender `name` for a dtype mode. Autocast surrounds the forward, as in a training loop."""
    head = CONTENDERS[name].build()
    if dtype != "autocast":
        return head

    def autocast(x: Any, weight: Any, target: Any) -> Any:
        import torch

        with torch.autocast("cpu", torch.bfloat16):
            return head(x, weight, target)

    return autocast
