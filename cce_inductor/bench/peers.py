"""Other packages' fused losses: how each is called, and why it may not be available. Nothing here is required."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any

from ..instruments import protocol

Head = Callable[[Any, Any, Any], Any]
Missing = Callable[[], str | None]
# Of cut_cross_entropy's `impl`. The release on PyPI has the first only, its repository has the others too.
PRESETS = ("cce", "cce_exact", "cce_kahan", "cce_kahan_full_c", "cce_kahan_full_e", "cce_kahan_full_c_full_e")
DISTRIBUTIONS = {"quack": "quack-kernels", "cutlass": "nvidia-cutlass-dsl"}  # where it is not the package's own name


def needs_packages(*names: str) -> Missing:
    """A function that says which of the packages are not installed, or None."""

    def missing() -> str | None:
        absent = [name for name in names if importlib.util.find_spec(name) is None]
        wanted = " ".join(DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in absent)
        return f"not installed: pip install {wanted}" if absent else None

    return missing


def needs_cut_cross_entropy(impl: str) -> Missing:
    """Its first import takes Triton, also for the implementation that does not use it."""

    def missing() -> str | None:
        reason = needs_packages("cut_cross_entropy", "triton")()
        if reason:
            return reason
        try:
            from cut_cross_entropy.linear_cross_entropy import LinearCrossEntropyImpl
        except Exception as error:  # of another package's import may be any
            return protocol.reason(error)
        if impl.upper() in LinearCrossEntropyImpl.__members__:
            return None
        return f"cut-cross-entropy {importlib.metadata.version('cut-cross-entropy')} has no {impl}"

    return missing


def cut_cross_entropy(**how: Any) -> Callable[[], Head]:
    """Builds the package's loss with these arguments."""

    def build() -> Head:
        from cut_cross_entropy import linear_cross_entropy

        return lambda x, weight, target: linear_cross_entropy(x, weight, target, **how)

    return build


def liger(implementation: str = "") -> Callable[[], Head]:
    """`implementation`: what LIGER_KERNEL_IMPL selects when the package is first imported; "" is its own choice."""

    def build() -> Head:
        os.environ["LIGER_KERNEL_IMPL"] = implementation
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy

    return build


def quack() -> Head:
    """The package's loss, in chunks of rows."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy
