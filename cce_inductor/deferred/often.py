"""Eager calls that come again and again: compiled, as the graph of their head was.

A call on pending logits runs the operators' eager implementation. That is there at once, and takes up to 2.6 times as
long as the kernels that the same loss gets in one graph with its head. A loss in a training loop comes in every step:
from its third call on it has those kernels too, if it is large enough for the compilation to pay.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .calls import in_form
from .other_graphs import Form

log = logging.getLogger(__name__)

# Calls of one kind before it is compiled, and kinds that are compiled for one head: as a rule they are shapes, and each
# takes seconds.
CALLS = 3
KINDS = 8
# Multiplications of one product of the hidden states and the weight. The kernels save 0.1 s for 2**32 on two cores.
LEAST = 1 << 28


@dataclass
class Often:
    """What computes a `call` of one kind: `compute`, and what `compile` makes of `form` once it has come often.

    compile: it is given a graph in which the pass has not been yet, and its inputs. None where the pass does not fuse
    it with the kernels that there are. so_far: how many kinds of calls on the same head are compiled.
    """

    call: Callable
    compute: Callable
    form: Form
    compile: Callable[[Form], Callable | None]
    so_far: list[Form]
    calls: int = 0

    def __call__(self, shared: Any, *given: Tensor) -> Any:
        """As `compute`: of a :class:`Shared` and of what the graph is given."""
        self.calls += 1
        if self.calls == CALLS and len(self.so_far) < KINDS:
            self._compile(given)
        return self.compute(shared, *given)

    def _compile(self, given: Sequence[Tensor]) -> None:
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in given]
        try:
            compiled = self.compile(Form(self.form.graph_module, inputs))
        except Exception:
            log.exception("cce_inductor could not compile a loss that is called eagerly, and goes on without")
            return
        if compiled is not None:
            self.so_far.append(self.form)
            in_form_of_call = in_form(compiled, self.call)
            self.compute = lambda shared, *given: in_form_of_call(*given)
