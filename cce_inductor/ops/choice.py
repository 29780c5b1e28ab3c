"""What the rewrite asks of the kernels behind the operators, which it knows nothing of, and what they answer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """One head: (rows, width) @ (width, vocab), sizes as they were when the graph was captured.

    dtypes: of input, weight and bias. compute_dtype: what the operands are rounded to. workspace: bytes of scratch.
    logits_bytes: size of the logits that fusing saves. filter: the kind of the gradient filter (filters.py). two_heads:
    whether a second head's logits are compared with these. mixtures: whether by a divergence of a mixture of both.
    other_width, other_dtypes: of that head, as of the first one. trained: the dtypes of those of the two weights that
    have a gradient.
    """

    rows: int
    width: int
    vocab: int
    device: str
    dtypes: tuple[torch.dtype, ...]
    compute_dtype: torch.dtype
    workspace: int
    logits_bytes: int
    filter: str = "exact"
    two_heads: bool = False
    mixtures: bool = False
    other_width: int = 0
    other_dtypes: tuple[torch.dtype, ...] = ()
    trained: tuple[torch.dtype, ...] = ()

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.dtypes[1]


@dataclass(frozen=True)
class Choice:
    """kernel: what will run, for people. gradients_in_forward: whether to form the gradients of a linear loss there.

    refusal: why the site had better be left alone, or "". cure: what would change that.
    """

    kernel: str
    gradients_in_forward: bool = False
    refusal: str = ""
    cure: str = ""


Chooser = Callable[[Problem], Choice]
