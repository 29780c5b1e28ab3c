"""The fused operators: schema, fake kernels, autograd, autocast, the eager reference and the table of statistics.

Importing this package registers nothing (``import torch`` may import it while it reads ``TORCH_LOGS``);
`cce_inductor.ops.library` does.
"""
