"""Linear + cross-entropy without the logits, for unmodified PyTorch models under torch.compile.

    torch.compile(model, backend=cce_inductor.cce_backend)    # or backend="cce", with no import
    cce_inductor.enable()                                      # or CCE_INDUCTOR=1: plain torch.compile does it

Everything is loaded on first use: ``import torch`` imports this package when it looks for ``torch.backends`` plugins.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import config as config
    from .backend import cce_backend as cce_backend
    from .backend import defer_head as defer_head
    from .deferred import DeferredLogitsError as DeferredLogitsError
    from .ops.api import linear_cross_entropy as linear_cross_entropy
    from .ops.api import linear_logsumexp as linear_logsumexp
    from .ops.diagnostics import diagnostics as diagnostics
    from .ops.emo import emo_loss as emo_loss
    from .report import Report as Report
    from .report import Site as Site
    from .report import explain as explain
    from .sharding import shard_head as shard_head
    from .switch import disable as disable
    from .switch import enable as enable

_HOME = {
    "cce_backend": "backend",
    "enable": "switch",
    "disable": "switch",
    "defer_head": "backend",
    "shard_head": "sharding",
    "linear_cross_entropy": "ops.api",
    "linear_logsumexp": "ops.api",
    "emo_loss": "ops.emo",
    "diagnostics": "ops.diagnostics",
    "explain": "report",
    "Report": "report",
    "Site": "report",
    "DeferredLogitsError": "deferred",
}

__all__ = ["__version__", "config", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "config":
        return importlib.import_module(".config", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module("." + _HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
