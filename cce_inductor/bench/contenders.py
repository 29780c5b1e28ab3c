"""Every way to compute the loss, as a table: name, how it is built, and why it may not be available.

A builder returns ``fn(x, weight, target)``, which gives the loss, or the loss and the logits. It runs in the
contender's own process. A further contender is a row in `CONTENDERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import peers
from .cases import Case
from .peers import Head, Missing

EAGER = "eager"
COMPILE = "compile"
OURS = "ours"


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


def _ours(function: Head, **options: Any) -> Head:
    import cce_inductor

    return _compiled(function, backend=cce_inductor.cce_backend, options=options or None)


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


def _needs_config(name: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        import torch

        from .. import compat

        return None if compat.has_inductor_option(name) else f"torch {torch.__version__} has no {name}"

    return missing


def _needs_functional() -> str | None:
    import torch

    from .. import compat

    if compat.has_linear_cross_entropy():
        return None
    return f"torch {torch.__version__} has no F.linear_cross_entropy(options=...)"


def _needs_gradients_in_forward(device: str) -> Missing:
    """A row for the option off says something only where it is on, at least for a head whose logits all fit."""

    def missing() -> str | None:
        import torch

        from ..lowering.choose import choose
        from ..ops.choice import Problem

        size, dtype = 4096, torch.bfloat16
        roomy = Problem(size, size, size, device, (dtype, dtype), dtype, workspace=1 << 40, logits_bytes=2 * size**2)
        return None if choose(roomy).gradients_in_forward else "ours forms all gradients in the backward here"

    return missing


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
    """A way to compute the loss. `note` says something about itself after it has run."""

    name: str
    about: str
    build: Callable[[], Head]
    missing: Missing = _nothing  # why it can not run here; None if it can
    note: Callable[[], str] = _silent
    devices: tuple[str, ...] = ("cpu", "cuda")
    filter: Any = None  # the grad_filter, where that is what the contender is about
    kernel: bool = True  # whether its time is one of a kernel


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
    Contender(
        "cut_cross_entropy",
        'impl="torch_compile"',
        peers.cut_cross_entropy(impl="torch_compile"),
        peers.needs_cut_cross_entropy("torch_compile"),
    ),
    *(
        Contender(
            name,
            f'cut_cross_entropy, impl="{name}"',
            peers.cut_cross_entropy(impl=name),
            peers.needs_cut_cross_entropy(name),
            devices=("cuda",),
        )
        for name in peers.PRESETS
    ),
    Contender(
        "cce_no_filter",
        'cut_cross_entropy, impl="cce", filter_eps=None',
        peers.cut_cross_entropy(impl="cce", filter_eps=None),
        peers.needs_cut_cross_entropy("cce"),
        devices=("cuda",),
    ),
    Contender(
        "liger",
        "liger_kernel, its fused linear cross-entropy",
        peers.liger(),
        peers.needs_packages("liger_kernel"),
        devices=("cuda",),
    ),
    Contender(
        "liger_cutedsl",
        "... with LIGER_KERNEL_IMPL=cutedsl",
        peers.liger("cutedsl"),
        peers.needs_packages("liger_kernel", "cutlass"),
        devices=("cuda",),
    ),
    Contender(
        "quack",
        "quack.linear_cross_entropy.chunked_linear_cross_entropy",
        peers.quack,
        peers.needs_packages("quack", "cutlass"),
        devices=("cuda",),
    ),
    Contender(OURS, 'torch.compile(backend="cce"), returning the loss', lambda: _ours(_plain), note=_fused),
    Contender("ours+logits", "... returning the logits too, deferred", lambda: _ours(_with_logits), note=_fused),
    Contender(
        "ours, late gradients",
        "... returning the loss, options={'gradients_in_forward': False}",
        lambda: _ours(_plain, gradients_in_forward=False),
        _needs_gradients_in_forward("cuda"),
        _fused,
        devices=("cuda",),
    ),
    Contender(
        "ours, 2.5 GB",
        "... returning the loss, options={'workspace_mb': 2560}",
        lambda: _ours(_plain, workspace_mb=2560),
        note=_fused,
        devices=("cuda",),
    ),
)
CONTENDERS = {contender.name: contender for contender in _ALL}


# ---- the gradient filters, which only the preset sweep-budget compares

EXACT = "exact"
LATE = "exact, late gradients"
TAUS = (2.0**-11, 2.0**-9, 1e-2, 3e-2)
EPSILONS = (2.0**-14, 2.0**-12, 2.0**-10)
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def short(value: float) -> str:
    """2⁻⁹ for a power of two, else 4e-3."""
    mantissa, exponent = math.frexp(value)
    if mantissa == 0.5:
        return "2" + str(exponent - 1).translate(_SUPERSCRIPTS)
    return f"{value:.0e}".replace("e-0", "e-")


def _filtered(name: str, value: Any, kernel: bool = True) -> Contender:
    about = f'torch.compile(backend="cce", options={{"grad_filter": {value!r}}})'
    return Contender(name, about, lambda: _ours(_plain, grad_filter=value), note=_fused, filter=value, kernel=kernel)


_EXACT = (
    Contender(EXACT, 'torch.compile(backend="cce")', lambda: _ours(_plain, grad_filter="exact"), note=_fused),
    Contender(
        LATE,
        "... with options={'gradients_in_forward': False}",
        lambda: _ours(_plain, grad_filter="exact", gradients_in_forward=False),
        note=_fused,
    ),
)
FAMILIES: dict[str, tuple[Contender, ...]] = {
    "budget": tuple(_filtered(f"budget {short(tau)}", tau) for tau in TAUS),
    "unbiased": tuple(_filtered(f"unbiased {short(tau)}", ("unbiased", tau)) for tau in TAUS),
    "eps": tuple(_filtered(f"eps {short(eps)}", ("eps", eps), kernel=False) for eps in EPSILONS),
    "eps, sorted": tuple(
        _filtered(f"eps {short(eps)}, sorted", ("eps", eps, "sorted"), kernel=False) for eps in EPSILONS
    ),
}
KNOWN = CONTENDERS | {c.name: c for c in (*_EXACT, *(c for family in FAMILIES.values() for c in family))}


def with_diagnostics(name: str) -> Head | None:
    """A filtered contender that leaves the numbers of `cce_inductor.diagnostics`; None for others."""
    value = KNOWN[name].filter
    return None if value is None else _ours(_plain, grad_filter=value, diagnostics=True)


def names_on(device: str) -> tuple[str, ...]:
    """The contenders of a device, in the order of the table."""
    return tuple(name for name, contender in CONTENDERS.items() if device in contender.devices)


def build(name: str, case: Case) -> Head:
    """The contender `name` for a case. Autocast surrounds the forward, as in a training loop."""
    head = KNOWN[name].build()
    if case.dtype != "autocast":
        return head

    def autocast(x: Any, weight: Any, target: Any) -> Any:
        import torch

        with torch.autocast(case.device, torch.bfloat16):
            return head(x, weight, target)

    return autocast
