"""Statistics of two heads over one vocabulary, in the eager implementation, against all logits in float64."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from head_oracle import logits
from torch import Tensor

from cce_inductor.ops.call import MIB, Attributes
from cce_inductor.ops.library import FORWARD
from cce_inductor.ops.with_gradients import WITH_GRADIENTS

N, D, OTHER_D, V = 37, 16, 11, 301
LOWS = "lse lse_low other_lse other_lse_low"
PAIRS = "expected_other cross_entropy other_cross_entropy divergence other_divergence"
EVERY = f"{LOWS} {PAIRS}"
DIFFERENTIATED = [*PAIRS.split(), "lse", "entropy", "target_logit", "logit_sum", "entry_logits"]
# What is there for the backward alone.
FOR_BACKWARD = ("_low", ".own", ".other")


def plain(name: str, z: Tensor, r: Tensor, given: dict[str, Tensor]) -> Tensor:
    """A statistic from all logits, by PyTorch's own functions for it. given: operands."""
    if "(" in name:
        return of_mixture(name, z, r)
    target = given.get("target")
    p, q, log_p, log_q = z.softmax(1), r.softmax(1), z.log_softmax(1), r.log_softmax(1)
    every: dict[str, Callable[[], Tensor]] = {
        "lse": lambda: z.logsumexp(1),
        "other_lse": lambda: r.logsumexp(1),
        "expected_other": lambda: torch.einsum("nv,nv->n", p, r),
        "cross_entropy": lambda: F.cross_entropy(z, q, reduction="none"),
        "other_cross_entropy": lambda: F.cross_entropy(r, p, reduction="none"),
        "divergence": lambda: F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1),
        "other_divergence": lambda: F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1),
        "entropy": lambda: torch.distributions.Categorical(logits=z, validate_args=False).entropy(),
        "target_logit": lambda: z.gather(1, target[:, None])[:, 0],
        "entry_logits": lambda: z.gather(1, given["entries"]),
        "logit_sum": lambda: z @ given["column_weight"].to(z.dtype),
        "argmax": lambda: z.argmax(1),
    }
    return every[name]()


def of_mixture(name: str, z: Tensor, r: Tensor) -> Tensor:
    """A divergence of ops/divergences.py from all logits, as TRL and Liger write it."""
    kind, w = name.removesuffix(")").split("(")
    log_p, log_q = z.log_softmax(1), r.log_softmax(1)
    if kind.startswith("other_"):
        kind, log_p, log_q = kind.removeprefix("other_"), log_q, log_p
    w = float(w)
    log_m = torch.logsumexp(torch.stack([log_p + math.log(1 - w), log_q + math.log(w)]), 0)
    of_p, of_q = (F.kl_div(log_m, log, reduction="none", log_target=True).sum(1) for log in (log_p, log_q))
    return {
        "jensen_shannon": lambda: (1 - w) * of_p + w * of_q,
        "skew": lambda: of_p,
        "mixture": lambda: -(log_p.exp() * log_m).sum(1),
    }[kind]()


def heads(
    dtype: torch.dtype = torch.float32, close: float | None = None, bias: bool = True, n=N, d=D, other_d=OTHER_D, v=V
) -> dict[str, Tensor]:
    """Operands by name. close: how far the second head is from the first, which then has its width."""
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    x, w, b = rand(n, d), rand(v, d, scale=0.5), rand(v)
    if close is None:
        others = rand(n, other_d), rand(v, other_d, scale=0.6), rand(v)
    else:
        others = x + close * rand(n, d), w.clone(), b.clone()
    given = {"input": x, "weight": w, "bias": b}
    given |= {f"other_{name}": t for name, t in zip(given, others, strict=True)}
    return given if bias else {name: t for name, t in given.items() if not name.endswith("bias")}


def both_logits(given: dict[str, Tensor], attributes: Attributes) -> list[Tensor]:
    result = []
    for prefix in ("", "other_"):
        own = {n: given.get(prefix + n) for n in ("input", "weight", "bias", "row_scale", "column_scale")}
        scale, cap, form = (getattr(attributes, prefix + name) for name in ("scale", "softcap", "softcap_form"))
        factors = {n: own[n] for n in ("row_scale", "column_scale")}
        result.append(logits(own["input"], own["weight"], own["bias"], scale, cap or None, form, **factors))
    return result


def run(given: dict[str, Tensor], names: str, attributes: Attributes, mask: Tensor | None = None, operator=FORWARD):
    """The statistics by name, from the operator, or without one from all logits."""
    if operator is not None:
        out = operator(list(given.values()), " ".join(given), mask, names, False, *attributes.args())
        return dict(zip(names.split(), out, strict=True))
    z, r = both_logits(given, attributes)
    found = {n: plain(n, z, r, given) for n in names.split() if not n.endswith(FOR_BACKWARD)}
    return (
        found if mask is None else {n: torch.where(mask.view(-1, *[1] * (t.dim() - 1)), t, 0) for n, t in found.items()}
    )


def is_differentiated(name: str) -> bool:
    return name in DIFFERENTIATED or ("(" in name and not name.endswith(FOR_BACKWARD))


def tangent(name: str, n: int) -> Tensor:
    """What the rows of a statistic weigh in a sum of all: (n,) numbers of both signs, in float64."""
    k = DIFFERENTIATED.index(name) if name in DIFFERENTIATED else sum(map(ord, name)) % 97
    return torch.sin(torch.arange(n, dtype=torch.float64) * (k + 1) + k)


def differentiate(given, names, attributes, mask=None, operator=FORWARD, wanted=None):
    """Statistics, and the gradients of a sum of them with weights of both signs, by name."""
    wanted = [n for n in given if given[n].is_floating_point()] if wanted is None else wanted
    leaves = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in given.items()}
    out = run(leaves, names, attributes, mask, operator)
    total = 0
    for name in filter(is_differentiated, out):
        t = out[name] if out[name].dim() == 1 else out[name] @ torch.linspace(0.5, -1, out[name].shape[1]).to(out[name])
        total = total + (t * tangent(name, len(t)).to(t)).sum()
    grads = torch.autograd.grad(total, [leaves[n] for n in wanted])
    return {n: t.detach() for n, t in out.items()} | {f"d{n}": g for n, g in zip(wanted, grads, strict=True)}


def at_once(given, names, attributes, mask=None, operator=WITH_GRADIENTS, wanted=None):
    """As `differentiate`, by the operator that forms gradients in the forward; without one, by `differentiate`."""
    if operator is None:
        return differentiate(given, names, attributes, mask, None, wanted)
    wanted = [n for n in given if given[n].is_floating_point()] if wanted is None else wanted
    n, wide = given["input"].shape[0], torch.promote_types(given["input"].dtype, torch.float32)
    tangents = {name: tangent(name, n).to(wide) for name in names.split() if is_differentiated(name)}
    call = list(tangents.values()), " ".join(tangents), list(given.values()), " ".join(given), mask, names
    out = operator(*call, " ".join(wanted), *attributes.args())
    return dict(zip([*names.split(), *(f"d{name}" for name in wanted)], out, strict=True))


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def compare(
    given, names, attributes, mask=None, wanted=None, operator=FORWARD, how=differentiate, narrow=torch.float64
) -> None:
    """Ours is as close to float64 as eager mode in the same dtype: docs/design.md's rule of errors.

    how: `differentiate` or `at_once`. narrow: what eager mode computes in where that is not the operands' dtype.
    """
    exact = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    reference = differentiate(exact, names, attributes, mask, None, wanted)
    ours = how(given, names, attributes, mask, operator, wanted)
    least = {n: t.to(narrow) if t.is_floating_point() and narrow != torch.float64 else t for n, t in given.items()}
    eager = differentiate(least, names, attributes, mask, None, wanted)
    for name, value in reference.items():
        if not value.is_floating_point():
            assert torch.equal(ours[name], value), name
            continue
        dtype = least[name[1:]].dtype if name[1:] in given else ours[name].dtype
        # In float64 the reference is no more exact than what is compared.
        bound = 1.25 * error(eager[name], value) + (2 if dtype != torch.float64 else 100) * torch.finfo(dtype).eps
        assert error(ours[name], value) <= bound, (name, error(ours[name], value), bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_statistics_and_gradients(dtype, masked, small_tiles):
    mask = torch.arange(N) % 3 != 0 if masked else None
    softcap = Attributes(scale=0.7, softcap=6.0, other_scale=0.5, other_softcap=9.0)
    for attributes in (Attributes(), softcap, Attributes(other_scale=2.0)):
        compare(heads(dtype), EVERY, attributes, mask)


@pytest.mark.parametrize("name", PAIRS.split())
def test_each_alone(name, small_tiles):
    needed = "lse lse_low" if name == "expected_other" else LOWS
    compare(heads(bias=False), f"{needed} {name}", Attributes())


def test_beside_statistics_of_the_first_head(small_tiles):
    given = heads() | {"target": torch.arange(N) % V}
    compare(given, f"{LOWS} divergence entropy target_logit", Attributes())


def test_factors_of_both_heads(small_tiles):
    generator = torch.Generator().manual_seed(2)
    factors = {
        f"{prefix}{name}": torch.rand(size, generator=generator) + 0.5
        for prefix in ("", "other_")
        for name, size in (("row_scale", N), ("column_scale", V))
    }
    compare(heads() | factors, EVERY, Attributes(scale=0.9, softcap=7.0))


@pytest.mark.parametrize("frozen", ["", "other_"])
def test_what_nobody_needs_is_not_computed(frozen, small_tiles):
    given = heads()
    wanted = [n for n in given if n.startswith("other_") != (frozen == "other_")]
    every = differentiate(given, EVERY, Attributes())
    some = differentiate(given, EVERY, Attributes(), wanted=wanted)
    for name in wanted:
        torch.testing.assert_close(some[f"d{name}"], every[f"d{name}"])


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("name", ["divergence", "other_divergence"])
def test_divergence_of_heads_that_are_close(distance, name, small_tiles):
    for offset in (0.0, 500.0):
        given = heads(close=distance)
        given["bias"] = given["bias"] + offset
        given["other_bias"] = given["other_bias"] + offset
        compare(given, f"{LOWS} {name}", Attributes(), wanted=["input", "weight", "other_input"])


def test_equal_heads_have_no_divergence_and_no_gradient(small_tiles):
    given = heads(close=0.0)
    found = differentiate(given, f"{LOWS} divergence other_divergence", Attributes(), wanted=["input", "other_input"])
    weights = {n: torch.zeros(N) for n in ("divergence", "other_divergence")}
    for name, zero in weights.items():
        assert torch.equal(found[name], zero)
    only = {**given, "input": given["input"].clone().requires_grad_()}
    run(only, f"{LOWS} divergence", Attributes())["divergence"].sum().backward()
    assert torch.equal(only["input"].grad, torch.zeros(N, D))


def test_a_class_without_mass_adds_nothing(small_tiles):
    given = heads()
    given["bias"][:7] = -torch.inf
    given["other_bias"][:7] = -torch.inf
    names = f"{LOWS} divergence other_divergence cross_entropy"
    found = differentiate(given, names, Attributes(), wanted=["input", "other_weight"])
    kept = {n: t if n.endswith("input") else t[7:] for n, t in given.items()}
    expected = differentiate(kept, names, Attributes(), wanted=["input", "other_weight"])
    assert not found["dother_weight"][:7].any()
    found["dother_weight"] = found["dother_weight"][7:]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    alone = {**given, "other_bias": torch.zeros(V)}
    assert run(alone, f"{LOWS} divergence", Attributes())["divergence"].isposinf().all()


def test_no_active_row_and_no_rows():
    given = heads()
    leaves = {n: t.clone().requires_grad_() for n, t in given.items()}
    out = run(leaves, EVERY, Attributes(), torch.zeros(N, dtype=torch.bool))
    assert not any(t.any() for t in out.values())
    out["divergence"].sum().backward()
    assert not any(t.grad.any() for t in leaves.values())


def check_second_derivatives(every: str, names: Sequence[str]) -> None:
    """Of a sum of `names`, the operator's against those of all logits. every: what the operator is asked for."""
    given = {n: t[:9].double() if n.endswith("input") else t[:40].double() for n, t in heads().items()}
    leaves = [{n: t.clone().requires_grad_() for n, t in given.items()} for _ in range(2)]
    found = []
    for own, operator in zip(leaves, (FORWARD, None), strict=True):
        out = run(own, every, Attributes(), operator=operator)
        total = sum((out[n] * (k + 1)).sum() for k, n in enumerate(names))
        first = torch.autograd.grad(total, list(own.values()), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), list(own.values())))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact)


def check_numerical_gradients(every: str, names: Sequence[str]) -> None:
    given = {n: t[:5].double() if n.endswith("input") else t[:17].double() for n, t in heads().items()}

    def loss(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = run(dict(zip(given, tensors, strict=True)), every, Attributes(softcap=5.0))
        return tuple(out[n] for n in names)

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in given.values()], fast_mode=True)


def test_second_derivatives():
    check_second_derivatives(EVERY, PAIRS.split())


def test_gradcheck():
    check_numerical_gradients(EVERY, PAIRS.split())


@pytest.mark.parametrize("mask", [False, True])
def test_opcheck(mask):
    given = {n: t.requires_grad_() for n, t in heads().items()}
    rows = torch.arange(N) % 2 == 0 if mask else None
    args = list(given.values()), " ".join(given), rows, EVERY, True, *Attributes(other_softcap=5.0).args()
    torch.library.opcheck(FORWARD, args)


def test_autocast_is_that_of_both_products():
    given = heads()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(given, EVERY, Attributes())
    expected = run(given, EVERY, Attributes(compute_dtype=torch.bfloat16, other_compute_dtype=torch.bfloat16))
    for name, value in expected.items():
        assert torch.equal(found[name], value)


def test_exact_under_every_filter():
    given = heads()
    for text in ("budget 0.1", "eps 0.1"):
        filtered = differentiate(given, EVERY, Attributes(grad_filter=text))
        for name, value in differentiate(given, EVERY, Attributes()).items():
            assert torch.equal(filtered[name], value)


@pytest.mark.parametrize("shape", [(4000, 16, 300), (40, 16, 60_000), (64, 1500, 500)], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_scratch_is_bounded(shape, frozen):
    n, d, v = shape
    given = {"input": torch.randn(n, d), "weight": torch.randn(v, d) * 0.1}
    given |= {"other_input": torch.randn(n, 24), "other_weight": torch.randn(v, 24) * 0.1}
    wanted = [name for name in given if not (frozen and name.startswith("other_"))]
    leaves = {name: t.requires_grad_(name in wanted) for name, t in given.items()}
    with Allocations() as memory:
        run(leaves, f"{LOWS} divergence", Attributes(workspace=MIB))["divergence"].sum().backward()
    results = sum(leaves[name].nbytes for name in wanted) + 64 * n * 8
    least = 2 * 512 * (d + 24) * 4  # narrower tiles would spare nothing that counts
    assert memory.peak <= MIB + results + least


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda g: g.pop("other_weight"), "a second head needs other_weight too"),
        (lambda g: g.update(other_input=g["other_input"][1:]), "must have the rows and classes of the first"),
        (lambda g: g.update(other_weight=g["other_weight"][:, 1:]), "other_weight .* differ in their last dimension"),
        (lambda g: g.update(other_bias=g["other_bias"][1:]), "other_bias must be"),
        (lambda g: g.update(other_input=g["other_input"].bfloat16()), "other_input is torch.bfloat16 but other_weight"),
        (lambda g: g.update({n: g[n].double() for n in g if n.startswith("other_")}), "float64 or none"),
        (lambda g: [g.pop(n) for n in list(g) if n.startswith("other_")], "statistic other_lse needs other_input"),
    ],
)
def test_bad_input(change, reason):
    given = heads()
    change(given)
    with pytest.raises(RuntimeError, match=reason):
        run(given, EVERY.replace("expected_other cross_entropy other_cross_entropy ", ""), Attributes())
