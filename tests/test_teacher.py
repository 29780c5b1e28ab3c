"""Another model's logits, without a gradient, from a graph of its own: no loss outside needs any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture import FUSE_ALL
from torch import Tensor, nn
from torch._dynamo.utils import counters

import cce_inductor
from cce_inductor import config
from cce_inductor.deferred import DeferredLogits

N, D, V = 1024, 16, 512
pytestmark = pytest.mark.usefixtures("a_mib_is_large")


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.trunk, self.head = nn.Linear(width, width), nn.Linear(width, V, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.trunk(x)))


def compiled(fn: Any, **options: Any) -> Any:
    return torch.compile(fn, backend="cce", options={**FUSE_ALL, **options})


def data(rows: int = N) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, D), torch.randn(rows, 24), torch.randint(0, V, (rows,))


def gkd(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """As TRL's GKD trainer: per entry, weights in tensors, rows picked at the end."""
    p, q = F.log_softmax(z / 0.9, dim=-1), F.log_softmax(r / 0.9, dim=-1)
    beta = torch.tensor(0.3, dtype=p.dtype, device=p.device)
    mixture = torch.logsumexp(torch.stack([p + torch.log1p(-beta), q + torch.log(beta)]), dim=0)
    of_teacher = F.kl_div(mixture, q, reduction="none", log_target=True)
    of_student = F.kl_div(mixture, p, reduction="none", log_target=True)
    counts = t % 3 > 0
    return (beta * of_teacher + (1 - beta) * of_student)[counts].sum() / counts.sum()


# Of the student's logits, the teacher's, and classes.
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kl_div": lambda z, r, t: 4 * F.kl_div(F.log_softmax(z / 2, -1), F.softmax(r / 2, -1), reduction="batchmean"),
    "kl_div of logarithms": lambda z, r, t: F.kl_div(z.log_softmax(-1), r.log_softmax(-1), log_target=True),
    "probabilities": lambda z, r, t: F.cross_entropy(z, r.float().softmax(dim=-1)),
    "beside the label's": lambda z, r, t: (
        F.cross_entropy(z, t) + F.kl_div(z.log_softmax(-1), r.softmax(-1), reduction="sum") / N
    ),
    "a difference": lambda z, r, t: ((q := r.softmax(-1)) * (q.log() - z.log_softmax(-1))).sum(-1).mean(),
    "rows that count": lambda z, r, t: (
        F.kl_div(z.log_softmax(-1), r.softmax(-1), reduction="none").sum(-1)[t % 3 > 0].mean()
    ),
    "rows that count, of both": lambda z, r, t: F.kl_div(
        z[t % 3 > 0].log_softmax(-1), r[t % 3 > 0].softmax(-1), reduction="batchmean"
    ),
    "a product": lambda z, r, t: -(r.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "the teacher first": lambda z, r, t: F.kl_div(r.log_softmax(-1), z.log_softmax(-1), log_target=True),
    "both directions": lambda z, r, t: (
        (p := z.log_softmax(-1)), (q := r.log_softmax(-1)), ((p.exp() - q.exp()) * (p - q)).sum() / N
    )[-1],
    "cooler, beside the label's": lambda z, r, t: (
        F.cross_entropy(z, t) + ((q := (r / 3).log_softmax(-1)).exp() * (q - (z / 3).log_softmax(-1))).sum(-1).mean()
    ),
    "a mixture": lambda z, r, t: (
        (p := z.softmax(-1)), (q := r.softmax(-1)), (m := ((p + q) / 2).log()),
        0.5 * ((p * (p.log() - m)).sum(-1) + (q * (q.log() - m)).sum(-1)).mean(),
    )[-1],
    "differences at the label": lambda z, r, t: (
        (z.log_softmax(-1) - r.log_softmax(-1)).gather(-1, t[:, None]).square().mean()
    ),
    "GKD": gkd,
    "GKD, shifted": lambda z, r, t: gkd(
        *(x.unflatten(0, (2, -1))[:, :-1] for x in (z, r)), t.unflatten(0, (2, -1))[:, 1:]
    ),
    "an expected value": lambda z, r, t: (z.softmax(-1) * r).sum(-1).mean(),
}  # fmt: skip


def frozen(student: Any, teacher: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        r = teacher(y)
    return student(x), r


# The logits of the two, in the order in which programs compute them.
LOGITS: dict[str, Callable[[Any, Any, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "frozen": frozen,
    "detached": lambda student, teacher, x, y: (student(x), teacher(y).detach()),
    "trained": lambda student, teacher, x, y: (student(x), teacher(y)),
    "itself": lambda student, teacher, x, y: (student(x), student(1.1 * x)),
}


def step(student: Any, teacher: Any, loss: Any, inputs: tuple[Tensor, Tensor, Tensor], how: str) -> list[Any]:
    x, y, t = inputs
    made = loss(*LOGITS[how](student, teacher, x, y), t)
    return [made, *torch.autograd.grad(made, [*student.parameters(), *teacher.parameters()], allow_unused=True)]


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "where,how",
    [
        *(("compiled", "frozen"), ("eager", "frozen"), ("eager", "trained")),
        *(pytest.param("eager", how, marks=pytest.mark.slow) for how in ("detached", "itself")),
        ("heads", "frozen"),
    ],
)
def test_a_loss_outside_of_both_models(name: str, where: str, how: str) -> None:
    torch._dynamo.reset()
    loss = LOSSES[name]
    student, teacher, inputs = Model(D), Model(24), data()
    expected = step(student, teacher, loss, inputs, how)
    ours = compiled(student), compiled(teacher), compiled(loss) if where == "compiled" else loss
    if where == "heads":  # which run eagerly
        ours = student, teacher, loss
        for model in (student, teacher):
            cce_inductor.defer_head(model.head)
    counters["cce_inductor"].clear()
    with config.patch(**FUSE_ALL):
        for _ in range(2):
            for got, want in zip(step(*ours, inputs, how), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    # Where Dynamo breaks the graph, at a mask, a tensor as large as the logits leaves it.
    reads = 4 if name.startswith("GKD") and where == "compiled" else 0
    assert counters["cce_inductor"]["deferred_materialized"] == reads


@pytest.mark.parametrize("how", ["frozen", "trained"])
def test_what_follows_from_two_heads_is_read_as_eager_has_it(how: str) -> None:
    """Its entries, and the gradients of a loss that is not fused."""
    torch._dynamo.reset()
    student, teacher, inputs = Model(D), Model(24), data()
    costs = torch.randn(N, V)

    def difference(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        d = z.log_softmax(-1) - r.log_softmax(-1)
        assert not isinstance(z, DeferredLogits) or not d.is_materialized
        return (d * costs).square().sum() + d[:3].abs().max()

    ours = step(compiled(student), compiled(teacher), difference, inputs, how)
    for got, want in zip(ours, step(student, teacher, difference, inputs, how), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["frozen", "trained"])
def test_what_follows_from_two_heads_may_be_detached(how: str) -> None:
    """It has the value of the tensor that a gradient reaches: the two are not one function of the logits."""
    torch._dynamo.reset()
    student, teacher, inputs = Model(D), Model(24), data()

    def loss(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        p, q = z.log_softmax(-1), r.log_softmax(-1)
        d = p - q
        return (d.detach() * p.exp()).sum(-1).mean() + ((d - d.detach()) * q.exp()).sum(-1).mean()

    ours = step(compiled(student), compiled(teacher), loss, inputs, how)
    for got, want in zip(ours, step(student, teacher, loss, inputs, how), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


# With what has a gradient beside logits that have none: a temperature s of one element.
DETACHED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "probabilities": lambda z, r, s: -((r / s).softmax(-1).detach() * (z / s).log_softmax(-1)).sum(-1).mean(),
    "no_grad": lambda z, r, s: (lambda q: -(q * z.log_softmax(-1)).sum(-1).mean())(without_grad(lambda: r / s)),
    "before": lambda z, r, s: (z.softmax(-1) * (r * s).detach().log_softmax(-1)).sum(-1).mean(),
    "itself": lambda z, r, s: -((z.detach() / s).softmax(-1) * (z / s).log_softmax(-1)).sum(-1).mean(),
    "a sum": lambda z, r, s: F.cross_entropy((1 + s) * z - (s * r).detach(), torch.arange(N) % V),
}


def without_grad(fn: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return fn().softmax(-1)


@pytest.mark.parametrize("how", ["frozen", "trained"])
@pytest.mark.parametrize("name", DETACHED)
def test_what_is_detached_gives_no_gradient_to_what_is_beside(name: str, how: str) -> None:
    torch._dynamo.reset()
    student, teacher, (x, y, _) = Model(D), Model(24), data()
    found = []
    for one, other in ((student, teacher), (compiled(student), compiled(teacher))):
        s = torch.tensor(1.5, requires_grad=True)
        with torch.set_grad_enabled(how == "trained"):
            r = other(y)
        of = [*student.parameters(), s, *(teacher.parameters() if how == "trained" else ())]
        found.append(torch.autograd.grad(DETACHED[name](one(x), r, s), of, allow_unused=True))
    for want, got in zip(*found, strict=True):
        # A head whose logits are detached has no gradient in eager mode, and one of 0 where they are read.
        want, got = (torch.zeros(()) if t is None else t for t in (want, got))
        torch.testing.assert_close(got, want.expand_as(got), rtol=1e-4, atol=1e-6)


def test_dead_code_does_not_keep_a_head_in_another_graph() -> None:
    torch._dynamo.reset()
    student, teacher, (x, y, _) = Model(D), Model(24), data()

    def weighed(z: Tensor, r: Tensor) -> Tensor:
        log_q = r.log_softmax(-1)
        q = log_q.exp()
        entropy = -(q * log_q).sum(-1)
        return (entropy * (q * (log_q - z.log_softmax(-1))).sum(-1)).mean()

    counters["cce_inductor"].clear()
    got = compiled(weighed)(*frozen(compiled(student), compiled(teacher), x, y))
    torch.testing.assert_close(got, weighed(*frozen(student, teacher, x, y)), rtol=1e-4, atol=1e-6)
    assert counters["cce_inductor"]["deferred_materialized"] == 0


def test_what_follows_from_two_heads_in_a_graph_of_its_own() -> None:
    """Compiled functions take it as what it follows from, and are compiled for other such tensors apart."""
    torch._dynamo.reset()
    student, teacher, (x, y, _) = Model(D), Model(24), data()
    of = compiled(lambda q, d: (q * d).sum(-1).mean())
    counters["cce_inductor"].clear()

    def loss(student: Any, teacher: Any, of: Any) -> Tensor:
        z, r = frozen(student, teacher, x, y)
        p, q = z.log_softmax(-1), r.log_softmax(-1)
        return of(q.exp(), q - p) + 2 * of(p.exp(), p - q)

    ours = compiled(student), compiled(teacher), of
    for _ in range(2):
        got, want = loss(*ours), loss(student, teacher, lambda q, d: (q * d).sum(-1).mean())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        for a, b in zip(*(torch.autograd.grad(made, list(student.parameters())) for made in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_edit_of_one_of_two_weights_is_noticed() -> None:
    torch._dynamo.reset()
    student, teacher, (x, y, t) = Model(D), Model(24), data()
    z, r = frozen(compiled(student), compiled(teacher), x, y)
    d = z.log_softmax(-1) - r.log_softmax(-1)
    with torch.no_grad():
        teacher.head.weight.mul_(0.9)
    with pytest.raises(cce_inductor.DeferredLogitsError, match="modified in place"):
        d.gather(-1, t[:, None])


def test_logits_of_few_rows_or_of_inference_mode_are_plain() -> None:
    torch._dynamo.reset()
    model = compiled(Model(D))
    x, _, _ = data()
    with torch.no_grad():
        assert isinstance(model(x), DeferredLogits)
        assert type(model(x[:64])) is Tensor  # in the same graph, or one for other sizes
        assert type(compiled(Model(D), defer_without_loss=False)(x)) is Tensor
    with torch.inference_mode():
        assert type(model(x)) is Tensor
    torch._dynamo.reset()
    with torch.inference_mode():
        assert type(compiled(Model(D))(x)) is Tensor


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_logits_that_are_kept_while_their_weight_is_trained(make: Any) -> None:
    """Those of an old policy: computed before the optimizer changes it."""
    torch._dynamo.reset()
    model, (x, _, t) = Model(D), data()
    ours, optimizer = compiled(model), make(model.parameters(), lr=0.1)
    with torch.no_grad():
        old, want = ours(x), model(x)
    counters["cce_inductor"].clear()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(ours(x), t).backward()
        optimizer.step()
    assert counters["cce_inductor"]["deferred_materialized"] == 1
    torch.testing.assert_close(old + 0, want)


def test_the_teacher_is_not_computed_for_the_students_optimizer() -> None:
    torch._dynamo.reset()
    student, teacher, (x, y, t) = Model(D), Model(24), data()
    ours, optimizer = compiled(student), torch.optim.SGD(student.parameters(), lr=0.1)
    with torch.no_grad():
        kept = compiled(teacher)(y)
    counters["cce_inductor"].clear()
    F.cross_entropy(ours(x), t).backward()
    optimizer.step()
    assert isinstance(kept, DeferredLogits) and not kept.is_materialized


def test_an_edit_of_the_weight_is_noticed() -> None:
    """As of an average of the student's weights, between the teacher's forward and a read."""
    torch._dynamo.reset()
    teacher, (_, y, _) = Model(24), data()
    with torch.no_grad():
        logits = compiled(teacher)(y)
        teacher.head.weight.mul_(0.9)
    with pytest.raises(cce_inductor.DeferredLogitsError, match="modified in place"):
        logits.sum()
