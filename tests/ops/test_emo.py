"""`emo_loss` against the formulas of EMO (arXiv 2310.04691) with all logits in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cce_inductor

N, D, V, WIDE = 33, 16, 257, 24


def problem(dtype: torch.dtype = torch.float64, other_cost: bool = False) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    made = {"x": torch.randn(N, D, generator=g, dtype=torch.float64)}
    made["w"] = torch.randn(V, D, generator=g, dtype=torch.float64) * 0.5
    made["bias"] = torch.randn(V, generator=g, dtype=torch.float64) * 0.3
    if other_cost:
        made["cost"] = torch.randn(V, WIDE, generator=g, dtype=torch.float64)
    made = {name: t.to(dtype) for name, t in made.items()}
    made["y"] = torch.randint(0, V, (N,), generator=g)
    made["y"][::4] = -100
    return made


def plain(x, w, y, *, bias=None, cost=None, scale=1.0, softcap=None, mode, limit=3.0, detach_target=False, reduction):
    """By the package's own steps: one-hot tensors, two products with the normalised cost matrix."""
    z = F.linear(x, w, bias) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    keep = (y != -100).to(z.dtype)
    hot = F.one_hot(y.clamp(min=0), V).to(z.dtype)
    e = F.normalize((w if cost is None else cost).detach(), dim=1)
    q = z.softmax(1)
    emo = 1 - ((hot @ e) * ((q - (q * hot).detach() if detach_target else q) @ e)).sum(1)
    emo = emo * keep
    mle = F.cross_entropy(z, y, reduction="none")
    if mode == "adaptive":
        ratio = mle.detach() / (emo.detach() + 1e-10)
        rows = 0.5 * (ratio.clamp(max=limit) * emo + mle) if limit else 0.5 * (ratio * emo + mle)
    elif mode == "sum":
        rows = emo.detach() / (mle.detach() + 1e-10) * mle + emo
    else:
        rows = emo
    return rows if reduction == "none" else rows.sum() / (keep.sum() if reduction == "mean" else 1)


def differentiate(loss, given: dict[str, Tensor], **options) -> list[Tensor]:
    leaves = {n: t.clone().requires_grad_(t.is_floating_point() and n != "cost") for n, t in given.items()}
    beside = {n: leaves[n] for n in ("bias", "cost") if n in leaves}
    out = loss(leaves["x"], leaves["w"], leaves["y"], **beside, **options)
    weights = torch.arange(1, out.numel() + 1, dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [leaves["x"], leaves["w"], leaves["bias"]])]


@pytest.mark.parametrize("mode", ["emo", "adaptive", "sum"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_mode(mode, reduction, small_tiles):
    for limit, detach_target, other_cost in itertools.product((None, 3.0), (False, True), (False, True)):
        options = {"mode": mode, "limit": limit, "detach_target": detach_target, "reduction": reduction}
        given = problem(other_cost=other_cost)
        ours = differentiate(cce_inductor.emo_loss, given, **options, scale=0.8, softcap=6.0)
        for found, exact in zip(ours, differentiate(plain, given, **options, scale=0.8, softcap=6.0), strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["emo", "adaptive", "sum"])
def test_errors_are_no_larger_than_eagers(dtype, mode, small_tiles):
    options, given = {"mode": mode, "reduction": "mean"}, problem(dtype)
    exact = differentiate(plain, {n: t.double() if n != "y" else t for n, t in given.items()}, **options)
    ours, eager = (differentiate(loss, given, **options) for loss in (cce_inductor.emo_loss, plain))
    for found, rounded, value in zip(ours, eager, exact, strict=True):
        errors = [((t.double() - value).norm() / value.norm()).item() for t in (found, rounded)]
        assert errors[0] <= 1.25 * errors[1] + 2 * torch.finfo(found.dtype).eps


def test_leading_dimensions_and_rows_that_do_not_count():
    given = problem(torch.float32)
    x, y = given["x"][:32].reshape(4, 8, D), given["y"][:32].reshape(4, 8)
    rows = cce_inductor.emo_loss(x, given["w"], y, reduction="none")
    assert rows.shape == (4, 8) and not rows[y == -100].any() and (rows[y != -100] > 0).all()
    nothing = cce_inductor.emo_loss(x, given["w"], torch.full_like(y, -100))
    assert nothing == 0


@pytest.mark.parametrize(
    "options,reason",
    [
        ({"mode": "mle"}, "mode must be one of"),
        ({"reduction": "total"}, "reduction must be one of"),
        ({"cost": torch.zeros(V + 1, 3)}, "cost must be"),
    ],
)
def test_bad_input(options, reason):
    given = problem(torch.float32)
    with pytest.raises(ValueError, match=reason):
        cce_inductor.emo_loss(given["x"], given["w"], given["y"], **options)
