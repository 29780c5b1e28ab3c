"""Called by ``import torch`` (entry-point group ``torch.backends``). Imports nothing unless CCE_INDUCTOR is set."""

import os


def autoload() -> None:
    """Turns the pass on for plain torch.compile where CCE_INDUCTOR=1. It can never make ``import torch`` fail."""
    if os.environ.get("CCE_INDUCTOR", "0").strip().lower() in ("", "0", "false", "off", "no"):
        return
    try:
        from .switch import enable

        enable()
    except Exception as error:
        import warnings

        warnings.warn(f"CCE_INDUCTOR is set, but cce_inductor could not be enabled: {error!r}", stacklevel=2)
