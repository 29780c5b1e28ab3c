"""Every combination of the arguments of `linear_cross_entropy`, in every dtype, against PyTorch in float64."""

import itertools

import pytest
import torch
from head_oracle import DTYPES, Head, check_error_rule, cross_entropy

import cce_inductor

N, D, V = 37, 16, 131
IGNORED = {"none": [], "some": slice(5, 17), "all": slice(0, N)}


def _targets(head: Head, ignored: str) -> int:
    """Puts the ignored class into the targets; returns `ignore_index`."""
    if ignored == "class 0":
        head.target[::3] = 0
        return 0
    head.target[IGNORED[ignored]] = -100
    return -100


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignored", ["none", "some", "all", "class 0"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_argument(dtype, ignored, reduction, small_tiles):
    generator = torch.Generator().manual_seed(1)
    class_weight = torch.rand(V, generator=generator) + 0.1
    tangent = torch.randn(N, generator=generator) if reduction == "none" else None
    for bias, softcap, scale, weighted, smoothing, z_loss in itertools.product(
        (False, True), (None, 2.0), (1.0, 0.7), (False, True), (0.0, 0.1), (0.0, 1e-2)
    ):
        head = Head.make(N, D, V, dtype, bias)
        arguments = {
            "ignore_index": _targets(head, ignored),
            "reduction": reduction,
            "softcap": softcap,
            "scale": scale,
            "class_weight": class_weight if weighted else None,
            "label_smoothing": smoothing,
            "z_loss": z_loss,
        }
        result = head.gradients(cce_inductor.linear_cross_entropy, tangent, **arguments)
        eager = head.gradients(cross_entropy, tangent, **arguments)
        exact = head.to(torch.float64).gradients(cross_entropy, tangent, **arguments)
        check_error_rule(f"bias={bias} {arguments}", result, eager, exact, dtype)
        assert result["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert all(result[name].dtype == dtype for name in exact if name != "loss")
