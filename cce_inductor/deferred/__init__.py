"""Deferred logits: a tensor that stands for ``head(hidden)`` and computes it on first touch.

A model returns its logits beside its loss; a training loop reads the loss and drops the logits.  Once the loss is
fused, those returned logits are the last N x V tensor of the step.  In their place the program gets a
:class:`DeferredLogits`, which knows everything about them but their values.

The parts, from the inside out:

staleness     whether the operands of the head are still what they were when the logits were deferred
pending       a value that is not computed yet: from which head (``PendingHead``), by which operators since (``Step``),
              and in whose memory. Tensors that share all their elements share one ``PendingValue``
way           how autograd leads from a pending tensor to its heads
tensor        ``DeferredLogits``, the tensor subclass
lazy          the operators that are answered without the values
edits         edits of pending logits in place, recorded as what they make of them
on_values     every other operator: it runs on the values, hence on plain tensors
gradient      the gradient of logits whose loss is behind them in the autograd graph: pending too
autograd      :func:`defer`, which makes deferred logits, and their ``grad_fn``
aliases       what in a graph shares memory with deferred logits that it is given
other_graphs  the loss in another graph: a compiled graph that is given pending logits
eager_calls   a loss or statistic that is called eagerly on pending logits
calls         what such calls have in common, and the graph of one
wrap          a compiled function, with what has to be done to its arguments and results

Autograd sees ordinary operators on a tensor with a ``grad_fn``, so gradients through the logits, in-place edits and
views need nothing of their own; the dispatcher calls us below autograd.

A pending value knows how it follows from its head: ``steps``, the operators between.  So a loss over it can still be
computed from the hidden states, by whoever deferred it (``fuse`` of :func:`defer`, for an eager call) or by the
compiled graph that it is given to (:meth:`DeferredLogits.recipe`, :meth:`DeferredLogits.operands`).
"""

from . import edits as edits
from . import lazy as lazy  # these three hold the rules of DeferredLogits
from . import on_values as on_values
from .autograd import computed as computed
from .autograd import defer as defer
from .staleness import DeferredLogitsError as DeferredLogitsError
from .tensor import DeferredLogits as DeferredLogits
