"""Registers the lowerings of the fused operators with Inductor."""

import functools


@functools.cache
def register() -> None:
    """Makes Inductor compile the fused operators with our templates. May be called any number of times."""
    from torch._inductor.lowering import register_lowering

    from ..ops.library import BACKWARD, FORWARD
    from ..ops.with_gradients import WITH_GRADIENTS
    from .cpu import backward, forward, with_gradients

    register_lowering(FORWARD, type_promotion_kind=None)(forward)
    register_lowering(BACKWARD, type_promotion_kind=None)(backward)
    register_lowering(WITH_GRADIENTS, type_promotion_kind=None)(with_gradients)
