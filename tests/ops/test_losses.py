"""Every combination of the arguments of `linear_cross_entropy`, in every dtype, against PyTorch in float64."""

import itertools

import pytest
import torch
from head_oracle import DTYPES, Head, check_error_rule, cross_entropy, logits

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


def _lse_of_rows_that_count(x, w, t, bias, ignore_index, softcap):
    lse = logits(x, w, bias, softcap=softcap).logsumexp(1)
    return torch.where(t != ignore_index, lse, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_log_sum_exp_beside_the_loss(dtype, ignored, reduction, small_tiles):
    """A z-loss of one's own, differentiated with the loss."""
    head = Head.make(N, D, V, dtype, bias=True)
    ignore_index = _targets(head, ignored)
    tangent = torch.rand(N) if reduction == "none" else None

    def with_z_loss(loss, lse):
        return loss + 0.1 * (lse.square() if reduction == "none" else lse.square().sum())

    def ours(x, w, t, *, bias):
        given = {"bias": bias, "ignore_index": ignore_index, "reduction": reduction, "softcap": 3.0}
        loss, lse = cce_inductor.linear_cross_entropy(x, w, t, **given, return_lse=True)
        assert torch.equal(loss, cce_inductor.linear_cross_entropy(x, w, t, **given)) or loss.isnan()
        assert lse.shape == t.shape and lse.dtype == loss.dtype and not lse[t == ignore_index].any()
        return with_z_loss(loss, lse)

    def plain(x, w, t, *, bias):
        loss = cross_entropy(x, w, t, bias=bias, ignore_index=ignore_index, reduction=reduction, softcap=3.0)
        return with_z_loss(loss, _lse_of_rows_that_count(x, w, t, bias, ignore_index, 3.0))

    result, eager = head.gradients(ours, tangent), head.gradients(plain, tangent)
    check_error_rule("", result, eager, head.to(torch.float64).gradients(plain, tangent), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignored", ["none", "some", "all", "class 0"])
def test_log_sum_exp_and_target_logit(dtype, ignored, small_tiles):
    head = Head.make(N, D, V, dtype, bias=True)
    ignore_index, tangent = _targets(head, ignored), torch.rand(N) - 0.3

    def ours(x, w, t, *, bias):
        lse, target_logit = cce_inductor.linear_logsumexp(
            x, w, t, bias=bias, ignore_index=None if ignored == "none" else ignore_index, softcap=3.0
        )
        return 2 * lse - target_logit

    def plain(x, w, t, *, bias):
        z = logits(x, w, bias, softcap=3.0)
        own = z.gather(1, torch.where(t == ignore_index, 0, t)[:, None])[:, 0]
        return 2 * _lse_of_rows_that_count(x, w, t, bias, ignore_index, 3.0) - torch.where(t == ignore_index, 0, own)

    result, eager = head.gradients(ours, tangent), head.gradients(plain, tangent)
    check_error_rule("", result, eager, head.to(torch.float64).gradients(plain, tangent), dtype)


def test_rows_that_do_not_count_have_no_log_sum_exp_even_if_they_are_not_finite():
    head = Head.make()
    head.target[3], head.x[3] = -100, torch.inf
    _, lse = cce_inductor.linear_cross_entropy(head.x, head.w, head.target, return_lse=True)
    assert lse[3] == 0 and lse.isfinite().all() and lse[:3].all()
