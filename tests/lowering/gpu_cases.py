"""The losses and shapes that the GPU kernels are tested with, in Triton's interpreter and on a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from test_two_heads import DIFFERENTIATED, both_logits
from test_two_heads import plain as from_logits

from cce_inductor.lowering.schedules import Round, Sweep
from cce_inductor.lowering.triton_configs import CACHED_TILE
from cce_inductor.lowering.triton_template import Tiles
from cce_inductor.ops.call import Attributes
from cce_inductor.ops.library import FORWARD
from cce_inductor.version import source_hash

# Small enough for the interpreter, and several blocks, tiles and steps of everything.
SMALL = Tiles(32, 32, 16, 2, 4)


@dataclass(frozen=True)
class Case:
    """One graph: sizes, dtype of the operands, and the loss as a function of (x, w, b, t): one, or one for each row."""

    loss: Callable
    reference: Callable | None = None  # the same from all logits, where the loss calls an operator itself
    n: int = 70
    d: int = 24
    v: int = 333
    dtype: torch.dtype = torch.float32
    transposed: bool = False  # W
    strided: bool = False  # x
    sharp: float = 1.0
    dynamic: bool = False
    autocast: bool = False
    sweeps: tuple[Sweep, ...] = ()  # the schedule of the backward
    tiles: Tiles = SMALL
    early: bool = False  # gradients formed in the forward
    infinite: bool = False  # one column's logits are
    offset: float = 0.0  # of all logits, which are exact: what is off is what is made of them
    not_a_number: bool = False  # one row that counts, and one that does not
    ignored: bool = False  # every row is
    budget: float = 0.0  # 0: exact
    rounds: tuple[Round, ...] = ()  # of a forward that leaves a bound
    giant: bool = False  # the last logit of every row is the largest by far
    confident: bool = False  # one row is: what is left of its softmax is little, and in a column of its own
    kernels: int = 4  # of ours, that differ
    zero: bool = False  # loss and gradients are, exactly
    library: bool = False  # products are PyTorch's GEMMs' where they can be

    @property
    def compute(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.dtype

    def data(self, device: str = "cpu") -> list[torch.Tensor]:
        """x, w, b in the case's dtype, and t."""
        torch.manual_seed(0)
        x, w, b = torch.randn(self.n, self.d), torch.randn(self.v, self.d) / 4 * self.sharp, torch.randn(self.v)
        t = torch.randint(0, self.v, (self.n,))
        if self.infinite:
            b[7], t = torch.inf, t % 7
        if self.offset:
            x, w, b = ((tensor * 16).round() / 16 for tensor in (x, w, b))
            x[:, 0], w[:, 0] = 1.0, self.offset
        if self.not_a_number:
            x[2, 1] = x[4, 1] = torch.nan
        if self.giant:
            b[-1] = 30.0
        if self.confident:
            x[:, -1], w[:, -1], x[5] = 0.0, 0.0, 0.0
            x[5, -1], w[t[5], -1], w[100, -1], b[100] = 1.0, 30.0, 41.5, -20.0
        if self.reference is None:
            t[2::5] = -100
        if self.ignored:
            t[:] = -100
        x, w, b = (tensor.to(device, self.dtype) for tensor in (x, w, b))
        x = x.repeat(1, 2)[:, ::2] if self.strided else x
        return [x, w.t().contiguous().t() if self.transposed else w, b, t.to(device)]

    def function(self) -> Callable:
        """The loss under the case's autocast."""

        def loss(x, w, b, t):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
                return self.loss(x, w, b, t)

        return loss

    @property
    def softcap(self) -> str:
        """Its form, of 5.0 and behind a scale of 0.7; "" for none."""
        return {capped: "tanh", rooted: "rsqrt"}.get(self.loss, "")

    def tangent(self, t: torch.Tensor) -> torch.Tensor:
        """Of the log-sum-exp of each row, for the losses that a budget is tested with."""
        if self.loss is weighted_rows:
            return torch.linspace(-1, 2, len(t)) * (t >= 0)
        return (t >= 0).float() * (1024.0 if self.loss is scaled else 1.0) / (t >= 0).sum()

    def eager(self, data: list[torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Loss and gradients from all logits, in float64 or as the case has it."""
        *leaves, t = data
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in leaves]
        with torch.autocast(t.device.type, torch.bfloat16, enabled=self.autocast and dtype != torch.float64):
            value = (self.reference or self.loss)(*leaves, t)
        return named(value.detach(), torch.autograd.grad(value, leaves, torch.ones_like(value)))


def named(value: torch.Tensor, gradients: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(["loss", "dx", "dw", "db"], [value, *gradients], strict=False))


def plain(x, w, b, t):
    return F.cross_entropy(F.linear(x, w, b).float(), t)


def with_entropy(x, w, b, t):
    z = F.linear(x, w, b)
    entropy = -(z.softmax(1) * z.log_softmax(1)).sum(1)
    return F.cross_entropy(z, t) + 0.2 * entropy.mean()


def softcapped(x, w, b, t):
    z = 5.0 * torch.tanh(F.linear(x, w, b) * 0.7 / 5.0)
    return F.cross_entropy(z.float(), t, label_smoothing=0.1)


def capped(x, w, b, t):
    return F.cross_entropy((5.0 * torch.tanh(F.linear(x, w, b) * 0.7 / 5.0)).float(), t)


def widely_capped(x, w, b, t):
    return F.cross_entropy((50.0 * torch.tanh(F.linear(x, w, b) / 50.0)).float(), t)


def rooted(x, w, b, t):
    u = F.linear(x, w, b) * 0.7
    return F.cross_entropy((5.0 * u * torch.rsqrt(u.square() + 25.0)).float(), t)


def by_angles(x, w, b, t):
    """`rooted` by sin(atan(t)) = t / sqrt(1 + t²), which infinite logits do not make NaN."""
    u = (F.linear(x, w, b).float() if x.dtype != torch.float64 else F.linear(x, w, b)) * 0.7
    return F.cross_entropy(5.0 * torch.sin(torch.atan(u / 5.0)), t)


def weighted_rows(x, w, b, t):
    loss = F.cross_entropy(F.linear(x, w, b).float(), t, reduction="none")
    return (loss * torch.linspace(-1, 2, loss.shape[0], device=x.device)).sum()


def class_weights(x, w, b, t):
    weight = torch.linspace(0.5, 2, w.shape[0], device=x.device)
    return F.cross_entropy(F.linear(x, w, b).float(), t, weight=weight, label_smoothing=0.2)


def one_buffer(x, w, b, t):
    both = torch.cat([w, x])
    return plain(both[w.shape[0] :], both[: w.shape[0]], b, t)


def scaled(x, w, b, t):
    return plain(x, w, b, t) * 1024  # as a GradScaler does


def _combined(lse, target_logit, logit_sum, entropy, argmax, t):
    return (0.3 * lse - target_logit + 0.01 * logit_sum + 0.2 * entropy).mean() + (argmax == t).float().mean()


BUDGET_ATTRIBUTES = Attributes(version=source_hash(), grad_filter="budget 0.01").args()


def each_counts(x, w, b, t):
    """Called as an operator, without a mask."""
    if x.dtype == torch.float64:
        return F.cross_entropy(F.linear(x, w, b), t)
    names = "input weight bias target", None, "lse target_logit"
    lse, target_logit, *_ = FORWARD([x, w, b, t], *names, True, *BUDGET_ATTRIBUTES)
    return (lse - target_logit).mean()


NAMES = "lse target_logit logit_sum entropy argmax"
ATTRIBUTES = Attributes(version=source_hash()).args()


def every_statistic(x, w, b, t):
    return _combined(*FORWARD([x, w, b, t], "input weight bias target", None, NAMES, True, *ATTRIBUTES), t)


def every_statistic_from_logits(x, w, b, t):
    z = F.linear(x, w, b)
    log_p = z.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    return _combined(z.logsumexp(1), z.gather(1, t[:, None])[:, 0], z.sum(1), entropy, z.argmax(1), t)


def _factors(x, w):
    """One for each row and one for each class, some of them 0 or negative, with gradients."""
    rows, classes = (t[:, 0].to(torch.promote_types(x.dtype, torch.float32)) for t in (x, w))
    return rows / 2, torch.where(w[:, 1] > 0, classes * 4, classes - classes.detach())


def some_rows(x, w, b, t):
    """Rows that do not count, called as an operator, may hold NaN: nothing comes of it."""
    out = FORWARD([x, w, b, t], "input weight bias target", x[:, 1] > -1, NAMES, True, *ATTRIBUTES)
    return _combined(*out, t)


def some_rows_from_logits(x, w, b, t):
    mask = x[:, 1] > -1
    z = torch.where(mask[:, None], F.linear(torch.where(mask[:, None], x, 0.0), w, b), 0.0)
    log_p = z.log_softmax(1)
    stats = z.logsumexp(1), z.gather(1, t[:, None])[:, 0], z.sum(1), -(log_p.exp() * log_p).sum(1), z.argmax(1)
    return _combined(*(value * mask for value in stats), t)


def with_factors(x, w, b, t):
    rows, classes = _factors(x, w)
    names = "input weight bias row_scale column_scale target"
    out = FORWARD([x, w, b, rows, classes, t], names, x[:, 1] > -1, NAMES, True, *ATTRIBUTES)
    return _combined(*out, t) * (1024.0 if x.dtype == torch.float16 else 1.0)


def with_factors_from_logits(x, w, b, t):
    rows, classes = _factors(x, w)
    z = (F.linear(x, w) * classes.to(x) + b) * rows.to(x)[:, None]
    mask = x[:, 1] > -1
    log_p = z.log_softmax(1)
    stats = z.logsumexp(1), z.gather(1, t[:, None])[:, 0], z.sum(1), -(log_p.exp() * log_p).sum(1), z.argmax(1)
    return _combined(*(value * mask for value in stats), t) * (1024.0 if x.dtype == torch.float16 else 1.0)


def quantised(x, w, b, t):
    """A weight of int8, exact in any dtype, times one number for each class, which alone has a gradient."""
    codes = (w.detach() * 32).to(torch.int8)
    return F.cross_entropy(F.linear(x, codes.to(x.dtype) * (w[:, :1] / 8), b).float(), t)


LOWS = "lse lse_low other_lse other_lse_low"
FUNCTIONS = f"{LOWS} expected_other cross_entropy other_cross_entropy divergence other_divergence"


def _narrow(t):
    return t if t.dtype == torch.float64 else t.bfloat16()


# How the second head is made of x, w and b.
SECOND = {
    "narrower": lambda x, w, b: {"input": x[:, 7:], "weight": w[:, 7:], "bias": b.flip(0)},
    "frozen": lambda x, w, b: {"input": x[:, 7:].detach(), "weight": w[:, 7:].detach()},
    "bfloat16": lambda x, w, b: {"input": _narrow(x[:, 8:]).detach(), "weight": _narrow(w[:, 8:]).detach()},
    "close": lambda x, w, b: {"input": (x + x.flip(1) / 128).detach(), "weight": w.detach(), "bias": b.detach()},
    "equal": lambda x, w, b: {"input": x * 1, "weight": w * 1, "bias": b * 1},
    "factors": lambda x, w, b: dict(
        zip(
            ("input", "weight", "row_scale", "column_scale"),
            (x[:, 7:], w[:, 7:], *(factor + 0.5 for factor in _factors(x, w))),
            strict=True,
        )
    ),
}


def two_heads(names: str, second: str, frozen: bool = False, **options) -> dict[str, Callable]:
    """A loss for each row of these statistics, by the operator and from all logits. frozen: the first head."""
    attributes = Attributes(**options, version=source_hash())
    functions = [name for name in names.split() if name in DIFFERENTIATED]
    differentiable = [name for name in functions if name != "lse" or "target_logit" in names]

    def operands(x, w, b, t):
        given = {"input": x, "weight": w, "bias": b}
        given = {name: tensor.detach() for name, tensor in given.items()} if frozen else given
        given |= {f"other_{name}": tensor for name, tensor in SECOND[second](x, w, b).items()}
        given |= {"target": t} if "target_logit" in names else {}
        columns = torch.linspace(0.5, 2, w.shape[0], device=x.device)
        return given | ({"column_weight": columns} if "logit_sum" in names else {})

    def combined(found, x, t):
        """(N,)."""
        scale = torch.linspace(-1, 2, x.shape[0], device=x.device) * (1024.0 if x.dtype == torch.float16 else 1.0) / 64
        value = sum((k + 1) / 4 * found[name] for k, name in enumerate(differentiable)) * scale
        value = value + (found["argmax"] == t).float() if "argmax" in found else value
        return torch.where(x[:, 1] > -1, value, 0.0)

    def loss(x, w, b, t):
        given = operands(x, w, b, t)
        out = FORWARD(list(given.values()), " ".join(given), x[:, 1] > -1, names, True, *attributes.args())
        return combined(dict(zip(names.split(), out, strict=True)), x, t)

    def reference(x, w, b, t):
        given = operands(x, w, b, t)
        z, r = both_logits(given, attributes)
        found = {name: from_logits(name, z, r, given) for name in names.split() if not name.endswith("_low")}
        return combined(found, x, t)

    return {"loss": loss, "reference": reference}


def distilled(x, w, b, t):
    """As people write it, from a frozen teacher of another width, beside the cross-entropy."""
    z, r = F.linear(x, w, b), F.linear(x[:, 7:], w[:, 7:]).detach()
    z, r = (logits if x.dtype == torch.float64 else logits.float() for logits in (z, r))
    log_p, log_q = (z / 2).log_softmax(1), (r / 2).log_softmax(1)
    rows = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    return (rows * (t >= 0)).sum() / 16 + F.cross_entropy(z, t)


REST = "lse_rest lse_rest_low target_logit logit_sum argmax"


def _labels(x, w, b, t):
    """Of the rows, and of the classes: 11 of them. Dynamo takes the inputs in the order in which they are seen."""
    assert x.shape[1] == w.shape[1] and b.shape == w.shape[:1]
    return t % 11 << 40, torch.arange(w.shape[0], device=w.device) % 11 << 40


def margin(x, w, b, t, *labels):
    names = "input weight bias target" + " row_label class_label" * bool(labels)
    rest, low, target_logit, *others = FORWARD([x, w, b, t, *labels], names, None, REST, True, *ATTRIBUTES)
    return _with_margin((rest - target_logit) + low, target_logit, *others, t)


def margin_from_logits(x, w, b, t, *labels):
    z = F.linear(x, w, b)
    target_logit = z.gather(1, t[:, None])[:, 0]
    rest = z.scatter(1, t[:, None], -torch.inf)
    for of_rows, of_classes in [labels] if labels else []:
        rest = rest.masked_fill(of_rows[:, None] == of_classes, -torch.inf)
    rest = rest.logsumexp(1)
    return _with_margin(rest - target_logit, target_logit, z.sum(1), z.argmax(1), t)


def with_labels(x, w, b, t):
    return margin(x, w, b, t, *_labels(x, w, b, t))


def with_labels_from_logits(x, w, b, t):
    return margin_from_logits(x, w, b, t, *_labels(x, w, b, t))


def _with_margin(difference, target_logit, logit_sum, argmax, t):
    # softplus, written out: the interpreter has none.
    loss = difference.clamp(min=0) + torch.log(1 + torch.exp(-difference.abs())) + 0.2 * target_logit
    return (loss + 0.01 * logit_sum).mean() + (argmax == t).float().mean()


EVERY = ("input", "weight", "bias")
# Three rounds of the forward, in whole tiles; the last split knows all columns before it.
THREE = (Round(0, 256, 512, 0), Round(512, 512, 1280, 2), Round(1280, 512, 1700, 4))
NARROW = (Round(0, 128, 256, 0), Round(256, 256, 640, 2), Round(640, 256, 800, 4))
BUDGET = Case(plain, n=300, v=1700, d=40, sharp=3.0, budget=1e-2, rounds=THREE)
# Products of all rows with slabs of 256 columns, and all GEMMs, are PyTorch's.
PRODUCTS = (Sweep(0, 256, EVERY, True, True),)
LIBRARY = Case(every_statistic, every_statistic_from_logits, library=True, sweeps=PRODUCTS, kernels=2)
FACTORS = Case(with_factors, with_factors_from_logits, d=40)
# Both heads have gradients: a dW and a dx for each.
BOTH = 6
TWO_HEADS = Case(**two_heads(FUNCTIONS, "narrower"), kernels=BOTH)
# The cross-entropy has rows of its own, and so a call.
DISTILLED = 8
# The forward keeps logits in tiles of this many columns.
KEEPING = replace(SMALL, block_n=CACHED_TILE)
CASES = {
    "float32": Case(plain),
    "bfloat16": Case(plain, dtype=torch.bfloat16),
    "float16": Case(scaled, dtype=torch.float16),
    "float32 in bfloat16": Case(plain, autocast=True),
    "softcap, scale and smoothing": Case(softcapped),
    "softcap by a root, infinite logits": Case(rooted, by_angles, infinite=True),
    "tangents of both signs": Case(weighted_rows),
    "class weights": Case(class_weights),
    "peaked": Case(plain, sharp=8.0, dtype=torch.bfloat16),
    "flat": Case(plain, sharp=0.01, dtype=torch.bfloat16),
    "one row": Case(plain, n=1),
    "every row ignored": Case(plain, dtype=torch.bfloat16, ignored=True),
    "every row ignored, float16": Case(scaled, dtype=torch.float16, ignored=True),
    "one step of everything": Case(plain, n=32, d=16, v=256),
    "weight stored (D, V), x strided": Case(plain, transposed=True, strided=True),
    "rows that Inductor would pad": Case(plain, n=33, d=1030, dtype=torch.bfloat16),
    "operands in one buffer": Case(one_buffer),
    "vocabulary in splits": Case(plain, n=33, v=4500, d=20),
    "any number of rows": Case(plain, dynamic=True),
    "every statistic": Case(every_statistic, every_statistic_from_logits),
    "every statistic, splits": Case(every_statistic, every_statistic_from_logits, n=33, v=4500, d=20),
    "every statistic, TMA": Case(every_statistic, every_statistic_from_logits, tiles=replace(SMALL, tma=True)),
    "slab, library": replace(LIBRARY, sweeps=(Sweep(0, 256, EVERY, True),), kernels=2),
    "slab, library, bfloat16": Case(
        plain, dtype=torch.bfloat16, library=True, sweeps=(Sweep(0, 256, EVERY, True),), kernels=2
    ),
    # dlogits are made twice, of other slabs.
    "separate, library": replace(
        LIBRARY, sweeps=(Sweep(32, 512, EVERY[:1], True), Sweep(0, 256, EVERY[1:], True)), kernels=3
    ),
    "separate, library, bfloat16": Case(
        plain,
        dtype=torch.bfloat16,
        library=True,
        sweeps=(Sweep(32, 512, EVERY[:1], True), Sweep(0, 256, EVERY[1:], True)),
        kernels=3,
    ),
    "library": LIBRARY,
    "library, bfloat16": Case(plain, dtype=torch.bfloat16, library=True, sweeps=PRODUCTS, kernels=2),
    "library, every statistic, bfloat16": replace(LIBRARY, dtype=torch.bfloat16),
    "library, peaked": Case(plain, sharp=8.0, dtype=torch.bfloat16, library=True, sweeps=PRODUCTS, kernels=2),
    "library, softcap, scale and smoothing": Case(softcapped, library=True, sweeps=PRODUCTS, kernels=2),
    "library, softcap by a root": Case(rooted, dtype=torch.bfloat16, library=True, sweeps=PRODUCTS, kernels=2),
    "library, class weights, splits": Case(class_weights, n=33, v=4500, d=20, library=True, sweeps=PRODUCTS, kernels=2),
    "library, weight stored (D, V), x strided": Case(
        plain, transposed=True, strided=True, library=True, sweeps=PRODUCTS, kernels=2
    ),
    "library, any number of rows": Case(plain, dynamic=True, library=True, sweeps=PRODUCTS, kernels=2),
    "library, one row": Case(plain, n=1, library=True, kernels=2),
    "library, every row ignored": Case(
        plain, dtype=torch.bfloat16, ignored=True, library=True, sweeps=PRODUCTS, kernels=2
    ),
    "library, infinite logits": Case(plain, infinite=True, library=True, sweeps=PRODUCTS, kernels=2),
    "library, large logits": Case(with_entropy, offset=4096.0, library=True, sweeps=PRODUCTS, kernels=2),
    "library, NaN": Case(plain, not_a_number=True, library=True, sweeps=PRODUCTS, kernels=2),
    "library, NaN in rows that do not count": Case(
        some_rows, some_rows_from_logits, not_a_number=True, library=True, sweeps=PRODUCTS, kernels=2
    ),
    "slab, NaN in rows that do not count": Case(some_rows, some_rows_from_logits, not_a_number=True),
    "library, margin and labels": Case(with_labels, with_labels_from_logits, library=True, sweeps=PRODUCTS, kernels=2),
    "gradients in the forward, library, float32": Case(softcapped, early=True, library=True, kernels=2),
    "gradients in the forward, library, bfloat16": Case(
        plain, dtype=torch.bfloat16, early=True, library=True, kernels=2
    ),
    "gradients in the forward, library, peaked": Case(
        plain, dtype=torch.bfloat16, sharp=8.0, early=True, library=True, kernels=2
    ),
    "gradients in the forward, library, NaN": Case(
        plain, dtype=torch.bfloat16, not_a_number=True, early=True, library=True, kernels=2
    ),
    "gradients in the forward, library, a wide softcap": Case(
        widely_capped, dtype=torch.bfloat16, sharp=60.0, early=True, library=True, kernels=2
    ),
    "gradients in the forward, library, flat": Case(
        plain, dtype=torch.bfloat16, sharp=0.01, early=True, library=True, kernels=2
    ),
    "blocks": Case(plain, dtype=torch.bfloat16, sweeps=(Sweep(32, 256, EVERY),)),
    "chunk": Case(softcapped, sweeps=(Sweep(32, 512, EVERY),)),
    "chunk of float32 weights in bfloat16": Case(plain, autocast=True, sweeps=(Sweep(32, 512, EVERY),)),
    "separate": Case(
        plain, dtype=torch.bfloat16, sweeps=(Sweep(32, 512, EVERY[:1]), Sweep(0, 256, EVERY[1:])), kernels=5
    ),
    "blocks in float16": Case(scaled, dtype=torch.float16, sweeps=(Sweep(32, 256, EVERY),)),
    "TMA": Case(plain, dtype=torch.bfloat16, tiles=replace(SMALL, tma=True)),
    "TMA, weight stored (D, V)": Case(
        plain, v=336, dtype=torch.bfloat16, transposed=True, tiles=replace(SMALL, tma=True)
    ),
    "TMA, x as well": Case(
        every_statistic, every_statistic_from_logits, dtype=torch.bfloat16, tiles=replace(SMALL, tma=True)
    ),
    "TMA, in blocks": Case(class_weights, tiles=replace(SMALL, tma=True), sweeps=(Sweep(32, 256, EVERY),)),
    "gradients in the forward, float32": Case(softcapped, early=True, tiles=KEEPING),
    "gradients in the forward, bfloat16": Case(plain, dtype=torch.bfloat16, early=True, tiles=KEEPING),
    "gradients in the forward, peaked": Case(plain, dtype=torch.bfloat16, sharp=8.0, early=True, tiles=KEEPING),
    "gradients in the forward, autocast": Case(plain, autocast=True, early=True, tiles=KEEPING),
    "gradients in the forward, softcap by a root": Case(rooted, dtype=torch.bfloat16, early=True, tiles=KEEPING),
    "gradients in the forward, a wide softcap": Case(
        widely_capped, dtype=torch.bfloat16, sharp=60.0, early=True, tiles=KEEPING
    ),
    "gradients in the forward, infinite logits": Case(
        plain, dtype=torch.bfloat16, infinite=True, early=True, tiles=KEEPING
    ),
    "gradients in the forward, NaN": Case(plain, dtype=torch.bfloat16, not_a_number=True, early=True, tiles=KEEPING),
    "gradients in the forward, large logits": Case(plain, offset=4096.0, early=True, tiles=KEEPING),
    "infinite logits": Case(plain, infinite=True),
    "NaN in float16": Case(scaled, dtype=torch.float16, not_a_number=True),
    "large logits": Case(with_entropy, offset=4096.0),
    "large logits, splits": Case(with_entropy, offset=-4096.0, n=33, v=4500, d=20),
    "factors": FACTORS,
    "factors, bfloat16": replace(FACTORS, dtype=torch.bfloat16, sweeps=(Sweep(0, 256, EVERY),)),
    "factors, float16": replace(FACTORS, dtype=torch.float16),
    "factors, blocks": replace(FACTORS, dtype=torch.bfloat16, sweeps=(Sweep(32, 256, EVERY),)),
    "factors, chunk": replace(FACTORS, sweeps=(Sweep(32, 512, EVERY),)),
    "factors, TMA": replace(FACTORS, tiles=replace(SMALL, tma=True)),
    "codes": Case(quantised),
    "codes, bfloat16, blocks": Case(quantised, dtype=torch.bfloat16, sweeps=(Sweep(32, 256, EVERY),)),
    "codes, float32 in bfloat16": Case(quantised, autocast=True),
    "codes, TMA": Case(quantised, d=32, dtype=torch.bfloat16, tiles=replace(SMALL, tma=True)),
    "codes, gradients in the forward": Case(quantised, dtype=torch.bfloat16, early=True, tiles=KEEPING),
    "margin": Case(margin, margin_from_logits, sharp=4.0),
    "margin and labels, splits": Case(with_labels, with_labels_from_logits, n=33, v=4500, d=20),
    "margin, bfloat16, splits": Case(margin, margin_from_logits, n=33, v=4500, d=20, dtype=torch.bfloat16),
    "two heads": Case(distilled, kernels=DISTILLED),
    "two heads, bfloat16": Case(distilled, dtype=torch.bfloat16, kernels=DISTILLED),
    "two heads, every function": TWO_HEADS,
    "two heads, every function, float16": replace(TWO_HEADS, dtype=torch.float16),
    "two heads, every function, splits": replace(TWO_HEADS, n=33, v=4500, d=20),
    "two heads, TMA": Case(
        **two_heads(f"{LOWS} divergence", "bfloat16"), d=24, dtype=torch.bfloat16, tiles=replace(SMALL, tma=True)
    ),
    "two heads, any number of rows": Case(distilled, dynamic=True, kernels=DISTILLED),
    "two heads, softcaps": Case(
        **two_heads(FUNCTIONS, "narrower", scale=0.7, softcap=5.0, other_softcap=4.0, other_softcap_form="rsqrt"),
        kernels=BOTH,
    ),
    "two heads, beside statistics of one": Case(
        **two_heads(f"{LOWS} divergence entropy target_logit logit_sum argmax", "narrower"),
        dtype=torch.bfloat16,
        kernels=BOTH,
    ),
    "two heads, the first frozen": Case(**two_heads(f"{LOWS} divergence", "narrower", frozen=True)),
    "two heads, an expected value": Case(
        **two_heads("lse lse_low target_logit expected_other", "narrower"), kernels=BOTH
    ),
    "two heads of two dtypes": Case(**two_heads(f"{LOWS} divergence other_cross_entropy", "bfloat16")),
    "two heads, factors": Case(**two_heads(f"{LOWS} divergence other_divergence", "factors"), kernels=BOTH),
    "two heads that are close": Case(**two_heads(f"{LOWS} divergence other_divergence", "close")),
    "two heads that are equal": Case(**two_heads(f"{LOWS} divergence other_divergence", "equal"), zero=True),
    "two heads, every row ignored": Case(distilled, dtype=torch.bfloat16, ignored=True, kernels=DISTILLED),
    "budget": BUDGET,
    "budget, bfloat16": replace(BUDGET, dtype=torch.bfloat16),
    "budget, float16": replace(BUDGET, loss=scaled, dtype=torch.float16),
    "budget, float32 in bfloat16": replace(BUDGET, autocast=True),
    "budget, peaked": replace(BUDGET, dtype=torch.bfloat16, sharp=8.0),
    "budget, flat": replace(BUDGET, dtype=torch.bfloat16, sharp=0.01),
    "budget, one huge logit at the end": replace(BUDGET, giant=True),
    "budget, tangents of both signs": replace(BUDGET, loss=weighted_rows),
    "budget, a row that loses too much": replace(BUDGET, confident=True),
    "budget, softcap and scale": replace(BUDGET, loss=capped, budget=0.05),
    "budget, softcap by a root": replace(BUDGET, loss=rooted, budget=0.05),
    "budget, every row counts": replace(
        BUDGET, loss=each_counts, reference=each_counts, n=256, v=512, rounds=THREE[:1]
    ),
    "budget, any number of rows": replace(BUDGET, dynamic=True),
    "budget, every row ignored": replace(BUDGET, ignored=True),
    "budget, NaN": replace(BUDGET, n=80, d=24, v=800, not_a_number=True, rounds=NARROW),
    "budget, smoothing": replace(BUDGET, loss=softcapped, dtype=torch.bfloat16),
}
