"""What the fused operators must agree with: plain PyTorch on all logits, and the rule that says how closely."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from cce_inductor.ops.call import Attributes
from cce_inductor.ops.library import FORWARD
from cce_inductor.ops.losses import CrossEntropy
from cce_inductor.ops.losses import cross_entropy as from_statistics
from cce_inductor.ops.with_gradients import ATTACH, WITH_GRADIENTS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def logits(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    form="tanh",
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    if row_scale is None and column_scale is None:
        z = F.linear(x, w, bias) * scale
    else:
        z = F.linear(x, w)
        z = z if column_scale is None else z * column_scale.to(z.dtype)
        z = z if bias is None else z + bias
        z = (z if row_scale is None else z * row_scale.to(z.dtype)[:, None]) * scale
    if form == "rsqrt" and softcap:
        return softcap * z * torch.rsqrt(z.square() + softcap**2)
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def cross_entropy(
    x, w, target, *, bias=None, class_weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, scale=1.0,
    softcap=None, z_loss=0.0,
) -> Tensor:  # fmt: skip
    """`linear_cross_entropy` as one writes it with all logits at hand."""
    z = logits(x, w, bias, scale, softcap)
    class_weight = None if class_weight is None else class_weight.to(z.dtype)
    loss = F.cross_entropy(z, target, class_weight, None, ignore_index, None, reduction, label_smoothing)
    if not z_loss:
        return loss
    counted = target != ignore_index
    squared = torch.where(counted, z_loss * z.logsumexp(1) ** 2, 0)
    if reduction == "mean":
        return loss + squared.sum() / counted.sum()
    return loss + (squared if reduction == "none" else squared.sum())


def statistics(
    names: str,
    z: Tensor,
    target: Tensor | None = None,
    column_weight: Tensor | None = None,
    entries: Tensor | None = None,
    row_label: Tensor | None = None,
    class_label: Tensor | None = None,
) -> list[Tensor]:
    """The statistics named, from all logits."""
    log_p = z.log_softmax(1)

    def rest() -> Tensor:
        others = z.scatter(1, target[:, None], -torch.inf)
        if row_label is None or class_label is None:
            return others.logsumexp(1)
        return others.masked_fill(row_label[:, None] == class_label[None, :], -torch.inf).logsumexp(1)

    every: dict[str, Callable[[], Tensor]] = {
        "lse": lambda: z.logsumexp(1),
        "target_logit": lambda: z.gather(1, target[:, None])[:, 0],
        "entry_logits": lambda: z.gather(1, entries),
        "lse_rest": rest,
        "logit_sum": lambda: z.sum(1) if column_weight is None else z @ column_weight.to(z.dtype),
        "entropy": lambda: -(log_p.exp() * log_p).sum(1),
        "argmax": lambda: z.argmax(1),
    }
    return [every[name]() for name in names.split()]


@dataclass
class Head:
    """A small head with data: N rows, D width, V vocabulary, values as a trained model has them."""

    x: Tensor
    w: Tensor
    target: Tensor
    bias: Tensor | None = None
    extra: dict = field(default_factory=dict)
    row_scale: Tensor | None = None  # (N,)
    column_scale: Tensor | None = None  # (V,)

    @staticmethod
    def make(n=37, d=16, v=131, dtype=torch.float32, bias=False, seed=0) -> "Head":
        g = torch.Generator().manual_seed(seed)
        return Head(
            torch.randn(n, d, generator=g).to(dtype),
            (torch.randn(v, d, generator=g) * 0.5).to(dtype),
            torch.randint(v, (n,), generator=g),
            torch.randn(v, generator=g).to(dtype) if bias else None,
        )

    def with_factors(self, rows: bool = True, classes: bool = True) -> "Head":
        """With fp32 factors of both signs, one of them 0."""
        factors = {"row_scale": self.x.shape[0]} if rows else {}
        factors |= {"column_scale": self.w.shape[0]} if classes else {}
        wide = torch.promote_types(self.x.dtype, torch.float32)
        made = {name: torch.linspace(-0.5, 1.5, n, dtype=wide) for name, n in factors.items()}
        for factor in made.values():
            factor[3] = 0.0
        return replace(self, **made)

    def with_codes(self) -> "Head":
        """With a weight of int8, the least and the largest of them included."""
        w = (self.w.double() * 60).round().clamp(-128, 127).to(torch.int8)
        w[0, 0], w[1, 0] = -128, 127
        return replace(self, w=w)

    def to(self, dtype: torch.dtype) -> "Head":
        """In that dtype; factors are fp32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = {"x": dtype, "w": dtype, "bias": dtype, "row_scale": wide, "column_scale": wide}
        given = {name: getattr(self, name) for name in dtypes}
        return replace(self, **{name: t if t is None else t.to(dtypes[name]) for name, t in given.items()})

    def leaves(self) -> dict[str, Tensor]:
        """What may have a gradient, by the gradient's name."""
        others = {"db": self.bias, "drow_scale": self.row_scale, "dcolumn_scale": self.column_scale}
        return {"dx": self.x, "dw": self.w} | {name: t for name, t in others.items() if t is not None}

    def gradients(self, loss: Callable[..., Tensor], tangent: Tensor | None = None, **kwargs) -> dict[str, Tensor]:
        """The loss and the gradients of x, w and bias, by name. `tangent` weighs a loss per row."""
        leaves = {name: t.detach().clone().requires_grad_() for name, t in self.leaves().items()}
        bias = leaves.get("db")
        value = loss(leaves["dx"], leaves["dw"], self.target, **({} if bias is None else {"bias": bias}), **kwargs)
        scalar = value if tangent is None else (value * tangent.to(value.dtype)).sum()
        grads = torch.autograd.grad(scalar, list(leaves.values()))
        return {"loss": value.detach(), **dict(zip(leaves, grads, strict=True))}


def some_rows(n: int) -> Tensor:
    """A mask of two rows out of three."""
    return torch.arange(n) % 3 != 1


def error(result: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error; NaN and infinities must stand in the same places."""
    result, exact = result.double(), exact.double()
    finite = exact.isfinite()
    torch.testing.assert_close(result.masked_fill(finite, 0), exact.masked_fill(finite, 0), equal_nan=True)
    difference = (result - exact).masked_fill(~finite, 0).norm().item()
    norm = exact.masked_fill(~finite, 0).norm().item()
    return difference / norm if norm else difference


def check_error_rule(case: str, result: dict, eager: dict, exact: dict, dtype: torch.dtype) -> None:
    """At most 1.25 times eager's error in the same dtype, plus two units in the last place.

    In float64 eager is its own yardstick and its error 0; the sums run in another order here. Where eager has NaN and
    float64 has not (oneDNN's bfloat16 products read a row of NaN into the one before it), only the units are allowed.
    """
    for name in exact:
        ours, theirs = error(result[name], exact[name]), error(eager[name], exact[name])
        theirs = 0.0 if math.isnan(theirs) else theirs
        bound = 1.25 * theirs + (64 if dtype == torch.float64 else 2) * torch.finfo(dtype).eps
        assert ours <= bound, f"{case}: {name} is off by {ours:.2e}, allowed {bound:.2e} (eager: {theirs:.2e})"


def operands(
    x: Tensor, w: Tensor, target: Tensor, bias=None, column_weight=None, **others: Tensor | None
) -> dict[str, Tensor]:
    """The operands that are given, by the names the operators know them by."""
    every = {"input": x, "weight": w, "target": target, "bias": bias, "column_weight": column_weight, **others}
    return {name: t for name, t in every.items() if t is not None}


def call_forward(head: Head, names: str, *, bias=None, column_weight=None, row_mask=None, training=False, **attributes):
    """The forward operator on a head; `attributes` are those of `cce_inductor.ops.call.Attributes`."""
    given = operands(head.x, head.w, head.target, bias, column_weight)
    arguments = Attributes(**attributes).args()
    return FORWARD(list(given.values()), " ".join(given), row_mask, names, training, *arguments)


def loss_with_gradients(x: Tensor, w: Tensor, target: Tensor, bias: Tensor | None, loss: CrossEntropy) -> Tensor:
    """A mean whose gradients are formed in the forward, put together as the rewrite puts it."""
    given = operands(x, w, target, bias)
    row_mask = target != loss.ignore_index
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    share = torch.where(row_mask, row_mask.to(wide) / row_mask.sum(), 0)
    own = 1.0 - loss.label_smoothing
    known = {"lse": share, "target_logit": -own * share}
    if loss.label_smoothing:
        known["logit_sum"] = share * (-loss.label_smoothing / w.shape[0])
    leaves = {name: t for name, t in given.items() if name != "target"}
    out = WITH_GRADIENTS(
        list(known.values()), " ".join(known), list(given.values()), " ".join(given), row_mask, loss.statistics,
        " ".join(leaves), *Attributes().args(),
    )  # fmt: skip
    names = loss.statistics.split()
    value = from_statistics(dict(zip(names, out, strict=False)), target, row_mask, None, w.shape[0], loss)
    return ATTACH(value, list(leaves.values()), list(out[len(names) :])).to(x.dtype)


def min_cut(gm, example_inputs):
    """What Inductor does for autograd, without its code generation."""
    run = lambda graph, inputs: make_boxed_func(graph.forward)  # noqa: E731
    return aot_autograd(fw_compiler=run, bw_compiler=run, partition_fn=min_cut_rematerialization_partition)(
        gm, example_inputs
    )
