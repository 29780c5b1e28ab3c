"""Which kernel and which schedule of the backward (docs/design.md) a head gets, by device, dtype and size.

Imports nothing heavy until it is asked: the backend asks before Inductor is needed.
"""

import os

import torch

from ..ops.call import MIB
from ..ops.choice import Choice, Problem
from .limits import CACHED_SHARE, LEAST_CHUNK, least_chunk_of_two
from .unsupported import unsupported_dtype

# Where dW can not be added up over chunks, the share of the rows whose logits must fit: with less than half, the pass
# over dW that multiplies it by the loss's tangent, and smaller blocks, take what is saved (at 0.2 nothing was gained).
LEAST_SHARE = 0.5


# Logits that take a larger part of the machine's memory are not written if that can be helped.
LARGE_LOGITS = 1 / 8


def choose(problem: Problem) -> Choice:
    """The answer of the lowerings to `Problem`."""
    if problem.device == "cuda" and problem.mixtures:
        return _without_kernel(problem, "a divergence of a mixture of two heads", "")
    if problem.device == "cuda" and not unsupported_dtype([*problem.dtypes, problem.compute_dtype]):
        at_once = problem.filter == "exact" and not problem.two_heads and _keeps_all_logits(problem)
        return Choice("Triton kernels", gradients_in_forward=at_once)
    if problem.device != "cpu":
        return Choice("eager implementation")
    from .cpu import element_dtype, unsupported

    dtype = unsupported_dtype([*problem.dtypes, problem.compute_dtype])
    reason = unsupported(problem.dtypes, problem.compute_dtype)
    if reason:
        cure = "compute the head and the loss in float32 or bfloat16" if dtype else "let Inductor use vector code"
        return _without_kernel(problem, reason, cure)
    element = element_dtype(problem.compute_dtype)
    keeps = _keeps_both_logits if problem.two_heads else _keeps_logits
    return Choice("C++ kernel", gradients_in_forward=keeps(problem, element))


def _without_kernel(problem: Problem, reason: str, cure: str) -> Choice:
    """The eager implementation, where memory is what is short: its passes cost more GEMMs than Inductor's own code.

    8 NVD against 6, for two heads 12 NVD against 8.
    """
    if problem.device == "cuda":
        memory = torch.cuda.get_device_properties(problem.device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if problem.logits_bytes < memory * LARGE_LOGITS:
        kind = "CPU" if problem.device == "cpu" else "GPU"
        refusal = f"there is no {kind} kernel for it ({reason}), and its logits fit in memory"
        return Choice("", refusal=refusal, cure=cure or "use compiler='aot_eager' where memory matters more than time")
    return Choice(f"eager implementation: {reason}")


def _keeps_all_logits(problem: Problem) -> bool:
    """Whether the workspace has room for every logit on a GPU, which saves the backward one GEMM of four."""
    if torch.float16 in (problem.compute_dtype, *problem.dtypes):
        return False
    # fp32, or 16 bits below the largest of 128 columns, in rows of whole tiles (cuda.py)
    tops = 0 if problem.compute_dtype == torch.float32 else 4 * problem.vocab / 128
    return problem.rows * ((problem.vocab + 256) * problem.compute_dtype.itemsize + tops) <= problem.workspace


def _keeps_logits(problem: Problem, element: torch.dtype) -> bool:
    """Whether enough logits fit in the workspace between the two passes of a kernel that forms gradients at once."""
    if problem.filter == "eps":
        return False
    if torch.float16 in (problem.compute_dtype, *problem.dtypes):
        # Gradients of float16 are kept from becoming 0 by the factor that the loss is scaled by, which comes later.
        return False
    workspace = min(problem.workspace, max(problem.logits_bytes, MIB))  # as the kernel does
    # What else the passes need: at least two panels of packed rows, as left and as right operand.
    packed = 2 * min(problem.rows, 128) * problem.width * element.itemsize
    if packed > workspace * (1 - CACHED_SHARE):
        return False
    fit = int(workspace * CACHED_SHARE) // max(1, problem.vocab * element.itemsize)
    if problem.weight_dtype in (torch.float32, torch.int8):  # dW is its own accumulator, or there is none
        return fit >= min(problem.rows, LEAST_CHUNK[element])
    return fit >= problem.rows * LEAST_SHARE


def _keeps_both_logits(problem: Problem, element: torch.dtype) -> bool:
    """The same of two heads, with which no filter applies: of enough rows, between two passes over a chunk of them.

    What a chunk adds to dW is rounded to the dtype of that.
    """
    if torch.float16 in (problem.compute_dtype, *problem.dtypes, *problem.other_dtypes):
        return False
    if any(dtype != torch.float32 for dtype in problem.trained):
        return False
    workspace = min(problem.workspace, max(2 * problem.logits_bytes, MIB))  # as the kernel does
    workspace -= 4 * (16 * problem.rows + 8 * problem.vocab)  # numbers of rows and of classes
    packed = 2 * min(problem.rows, 128) * (problem.width + problem.other_width) * element.itemsize
    if packed > workspace * (1 - CACHED_SHARE):
        return False
    fit = int(workspace * CACHED_SHARE) // max(1, 2 * problem.vocab * torch.float32.itemsize)
    return fit >= least_chunk_of_two(element, len(problem.trained))
