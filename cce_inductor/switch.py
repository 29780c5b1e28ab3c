"""Plain PyTorch with our pass: ``enable()``, as `CCE_INDUCTOR=1` does it, and ``disable()``."""

import functools
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from . import config, eager_heads, notice
from .backend import compile_graph

_original_compile_fx: Callable | None = None


def enable() -> None:
    """Gives every later ``torch.compile(model)`` with the default backend the same pass, as `CCE_INDUCTOR=1` does.

    With the knob `eager_heads`, heads that run eagerly give pending logits too.
    """
    global _original_compile_fx
    import torch._inductor.compile_fx as module

    if _original_compile_fx is not None:
        return
    original = _original_compile_fx = module.compile_fx

    @functools.wraps(original)
    def compile_fx(model_: Any, example_inputs_: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(model_, GraphModule):
            return original(model_, example_inputs_, *args, **kwargs)
        return compile_graph(
            model_, example_inputs_, config.current(), lambda gm, inputs: original(gm, inputs, *args, **kwargs)
        )

    module.compile_fx = compile_fx
    eager_heads.enable()
    notice.start()


def disable() -> None:
    """Undoes `enable`. What is already compiled stays as it is: call ``torch._dynamo.reset()`` to compile it anew."""
    global _original_compile_fx
    import torch._inductor.compile_fx as module

    if _original_compile_fx is not None:
        module.compile_fx = _original_compile_fx  # type: ignore[assignment]
        _original_compile_fx = None
    eager_heads.disable()
    notice.stop()


def enabled() -> bool:
    """Whether plain ``torch.compile`` uses the pass."""
    return _original_compile_fx is not None
