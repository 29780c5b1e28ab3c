"""Lowerings for CUDA GPUs: the Triton templates of the forward and of the exact backward.

Forward: every program owns a block of rows and a split of the vocabulary; the splits are merged by ordinary reductions
that Inductor generates. Backward: region by region of the logits (schedules.py), dlogits is written to the workspace,
in the compute dtype, and two GEMMs read it. No locks, no atomics, no size that depends on data: rows that do not count
are left out by a list of the others, made on the device.
"""

from .cuda_backward import backward as backward
from .cuda_backward import with_gradients as with_gradients
from .cuda_forward import forward as forward
