"""Sizes that the choice of a form and the kernels have to agree on."""

import torch

# A chunk of rows whose logits are kept costs one more pass over W and dW: with fewer rows that takes longer than the
# GEMM it saves, on two cores with 20 GB/s and 230 (fp32) or 460 (bfloat16) GFLOP/s.
LEAST_CHUNK = {torch.float32: 128, torch.bfloat16: 256}


def least_chunk_of_two(element: torch.dtype, trained: int) -> int:
    """The same of two heads, `trained` of whose weights have a gradient.

    A chunk saves two GEMMs, and costs another read of both weights, and of each that is trained one more and two passes
    over its dW: 5 passes where one head costs 4 for a GEMM, or 8. So about half as many rows suffice with a frozen
    teacher, and as many are needed without one.
    """
    return LEAST_CHUNK[element] // 2 * max(1, trained)


# The part of the workspace that holds kept logits. (At 0.8 the rows of two chunks no longer stay packed: 6 % slower.)
CACHED_SHARE = 0.75


def sixteen_bits_hold(softcap: float) -> bool:
    """Whether 16 bits can keep logits for a second pass, behind a softcap if there is one (0.0 for none).

    They hold how far below the largest a logit is, up to 64. What is further below has no p that counts, but behind a
    softcap it has a slope.
    """
    return 2 * softcap < 63
