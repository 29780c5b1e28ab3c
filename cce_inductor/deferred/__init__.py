"""Deferred logits: tensors that stand for a head's product and compute it on first touch.

A model returns its logits beside its loss; a training loop reads the loss and drops the logits.  Once the loss is
fused, those returned logits are the last N x V tensor of the step.  In their place the program gets a
:class:`DeferredLogits`, which knows everything about them but their values.
"""

from .autograd import computed as computed
from .autograd import defer as defer
from .staleness import DeferredLogitsError as DeferredLogitsError
from .tensor import DeferredLogits as DeferredLogits
