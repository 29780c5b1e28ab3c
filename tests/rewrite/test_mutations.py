"""Every guard of the rules is needed: without it, some program that is refused is refused no longer, or otherwise.

A guard is an `if` whose body only raises `Refused`; of losses without a name, one whose body only leaves a node or a
head out. Each is taken out of the running code in turn, and the captured graphs of REFUSED and PROGRAMS are rewritten:
what becomes of one of them has to change. Only those in which a guard fires are rewritten without it.
"""

import ast
import contextlib
import inspect
import math
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from capture import graphs_of
from test_compared_heads import REFUSED as COMPARED
from test_in_batch import UNFUSED as IN_BATCH
from test_in_batch import similarities
from test_margins import UNFUSED
from test_mixed_heads import REFUSED as MIXED
from test_ranking import REFUSED as RANKINGS
from test_ranking import rank
from test_refusals import REFUSED
from test_unnamed import LOSSES, NOTHING

from cce_inductor import config
from cce_inductor.rewrite.run import rewrite
from cce_inductor.trace import (
    affine,
    at_target,
    codes,
    decompose,
    embeddings,
    functions,
    heads,
    indexing,
    interpreter,
    layout,
    log_mixtures,
    margins,
    masks,
    masks_of_two,
    merge_heads,
    pointwise,
    ranking,
    reductions,
    rsqrt_softcap,
    several,
    softmax,
    two_heads,
    unnamed,
)

pytestmark = pytest.mark.xdist_group("mutations")  # one worker captures the programs for all

B, S, D, V = 2, 6, 8, 40
MODULES = (
    *(heads, layout, indexing, pointwise, masks, margins, at_target, softmax, rsqrt_softcap, reductions, ranking),
    *(several, merge_heads, decompose, interpreter, unnamed, two_heads, functions, embeddings, masks_of_two),
    log_mixtures,
    affine,
)


def is_guard(node: ast.AST) -> bool:
    if not isinstance(node, ast.If) or node.orelse or len(node.body) != 1:
        return False
    raised = node.body[0]
    call = raised.exc if isinstance(raised, ast.Raise) else None
    return isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Refused"


def leaves_out(node: ast.AST) -> bool:
    """Whether a node is the guard of a search: its body only goes on, or says yes or no."""
    if not isinstance(node, ast.If) or node.orelse or len(node.body) != 1:
        return False
    (body,) = node.body
    return isinstance(body, ast.Continue) or (
        isinstance(body, ast.Return) and (body.value is None or isinstance(body.value, ast.Constant))
    )


class Without(ast.NodeTransformer):
    """Takes the guard out that starts at a line."""

    def __init__(self, line: int):
        self.line = line

    def visit_If(self, node: ast.If) -> ast.AST:
        if node.lineno == self.line:
            return ast.copy_location(ast.Pass(), node)
        return self.generic_visit(node)


class Recording(ast.NodeTransformer):
    """Lets every guard say that it fires: `FIRED` of the module gets its line."""

    def __init__(self, guards: Callable[[ast.AST], bool]):
        self.guards = guards

    def visit_If(self, node: ast.If) -> ast.AST:
        if self.guards(node):
            node.body.insert(0, ast.parse(f"FIRED.add((__name__, {node.lineno}))").body[0])
        return self.generic_visit(node)


@dataclass
class Guard:
    """Of a function of a module, one guard. path: the names that lead to the function."""

    module: types.ModuleType
    path: list[str]
    line: int
    name: str


def guards_of(module: types.ModuleType) -> list[Guard]:
    found = []
    tree = ast.parse(inspect.getsource(module))
    for owner in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]:
        for made in (n for n in owner.body if isinstance(n, ast.FunctionDef)):
            for guard in filter(kind_of(module), ast.walk(made)):
                path = [made.name] if owner is tree else [owner.name, made.name]
                name = f"{module.__name__.rpartition('.')[2]}.{'.'.join(path)}: {ast.unparse(guard.test)}"
                found.append(Guard(module, path, guard.lineno, name))
    return found


def kind_of(module: types.ModuleType) -> Callable[[ast.AST], bool]:
    return leaves_out if module in (unnamed, codes) else is_guard


def look_up(namespace: dict, path: list[str]) -> types.FunctionType:
    made = namespace[path[0]] if len(path) == 1 else vars(namespace[path[0]])[path[1]]
    return getattr(made, "__func__", made)  # of a staticmethod


@contextlib.contextmanager
def changed(module: types.ModuleType, change: ast.NodeTransformer, paths: list[list[str]]):
    """The functions of a module at `paths` run as `change` makes them."""
    namespace = dict(vars(module))
    made = ast.fix_missing_locations(change.visit(ast.parse(inspect.getsource(module))))
    exec(compile(made, str(module.__file__), "exec"), namespace)
    functions = [look_up(vars(module), path) for path in paths]
    whole = [function.__code__ for function in functions]
    for function, path in zip(functions, paths, strict=True):
        function.__code__ = look_up(namespace, path).__code__
    try:
        yield
    finally:
        for function, code in zip(functions, whole, strict=True):
            function.__code__ = code


Program = tuple[torch.fx.GraphModule, list, set]


def with_what_fires(modules, graphs: list[torch.fx.GraphModule], outcome: Callable) -> list[Program]:
    """Each graph with its outcome and the guards that fire while it is rewritten, as (module, line)."""
    made = []
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(changed(module, Recording(kind_of(module)), [g.path for g in guards_of(module)]))
        for gm in graphs:
            fired = set()
            for module in modules:
                module.FIRED = fired
            made.append((gm, outcome(gm), fired))
    return made


def survivors(module: types.ModuleType, programs: list[Program], outcome: Callable) -> set[str]:
    """The guards of a module without which the outcome of every program is the same."""
    found = set()
    for guard in guards_of(module):
        with changed(module, Without(guard.line), [guard.path]):
            fires = (p for p in programs if (module.__name__, guard.line) in p[2])
            if all(outcome(gm) == expected for gm, expected, _ in fires):
                found.add(guard.name)
    return found


def ce(z, t, **kwargs):
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), t.reshape(-1), **kwargs)


def linear(f):
    """A program over the logits of a head."""
    return lambda h, w, b, t: f(F.linear(h, w), t)


def in_batch(f):
    return lambda h, w, b, t: f(similarities(h.flatten(0, 1), w[: B * S]), t.flatten() % 4)


def compared(f):
    """A program over the logits of two heads, the first of which has a loss besides."""

    def program(h, w, b, t):
        x, t = h.flatten(0, 1), t.flatten()
        z, keep = F.linear(x, w), torch.arange(B * S)[:, None] % 3 != 0
        return f(z, F.linear(x.tanh(), w), keep, w, t), F.cross_entropy(z, t)

    return program


def without_bias(f):
    return lambda h, w, b, t: f(h, w, t)


def in_16_bits(f):
    return lambda h, w, b, t: f(F.linear(h.bfloat16(), w.bfloat16()), t)


def beside_a_loss(metric):
    return lambda z, t: (ce(z, t), metric(z, t))


EVEN = torch.arange(V) % 2 == 0
HEADS = {
    "columns that are picked": lambda h, w, b, t: ce(F.linear(h, F.one_hot(torch.arange(V) % D, D).float()), t),
    "a bias added in place to detached logits": lambda h, w, b, t: (lambda z: (z.add_(b), ce(z, t))[1])(
        F.linear(h, w).detach()
    ),
    "a bias on detached logits": lambda h, w, b, t: ce(F.linear(h, w).detach() + b, t),
    "a batch of weights": lambda h, w, b, t: ce(torch.bmm(h, torch.stack([w.t(), w.t() * 2])), t),
    "a batch of weights, einsum": lambda h, w, b, t: ce(torch.einsum("bsd,bvd->bsv", h, torch.stack([w, w])), t),
    "inner of batches": lambda h, w, b, t: ce(torch.inner(h, torch.stack([w, w])).flatten(2), t),
    "addmm without its bias": lambda h, w, b, t: ce(torch.addmm(b, h.view(-1, D), w.t(), beta=0), t),
    "capped, then added": lambda h, w, b, t: ce(F.linear(h, w).tanh() + F.linear(h, w.tanh()), t),
    "a batch of copies of a weight that is written into": lambda h, w, b, t: copied_weight(h, w, t),
    "rounded, then added": lambda h, w, b, t: ce(F.linear(h, w).bfloat16() + F.linear(h, w.tanh()).bfloat16(), t),
    "expanded by a sum": lambda h, w, b, t: ce(F.linear(h, w) + F.linear(h[:1], w.tanh()), t),
    "a sum of two dtypes": lambda h, w, b, t: ce(F.linear(h, w) + F.linear(h.bfloat16(), w.tanh().bfloat16()), t),
    "vocabularies of two dtypes": lambda h, w, b, t: ce(
        torch.cat([F.linear(h, w), F.linear(h.bfloat16(), w.bfloat16())], -1), t
    ),
    "two heads, one without gradient": lambda h, w, b, t: ce(
        torch.stack([F.linear(h, w), F.linear(h, w * 2).detach()]), torch.stack([t, t])
    ),
    "masked vocabularies": lambda h, w, b, t: ce(two(h, w).masked_fill(torch.arange(2 * V) > 70, -torch.inf), t),
    "argmax over two vocabularies": lambda h, w, b, t: ce(z := two(h, w), t) + (z.argmax(-1) * t).float().mean(),
    "max over two vocabularies": lambda h, w, b, t: ce(z := two(h, w), t) + z.max(-1).values.mean(),
    "topk over two vocabularies": lambda h, w, b, t: ce(z := two(h, w), t) + (z.topk(3).indices.float().mean()),
    "rank over two vocabularies": lambda h, w, b, t: (
        ce(z := two(h, w), t) + (z > z.gather(-1, t[..., None])).sum(-1).float().mean()
    ),
    "weighted smoothing over two vocabularies": lambda h, w, b, t: ce(
        two(h, w), t, weight=torch.cat([b, b]).detach(), label_smoothing=0.1
    ),
    "heads expanded": lambda h, w, b, t: ce(
        torch.stack([F.linear(h, w), F.linear(h, w * 2)])[None].expand(2, 2, B, S, V), t.expand(2, 2, B, S)
    ),
    "no head of two": lambda h, w, b, t: ce(torch.stack([F.linear(h, w), F.linear(h, w * 2)])[:0], t.expand(0, B, S)),
    "a stack of which concatenated heads are left out": lambda h, w, b, t: ce(
        torch.stack([F.linear(h, torch.cat([w, w])), two(h, w)])[0], t
    ),
    "edited after it was put together": lambda h, w, b, t: edited_member(h, w, t),
    "zeros like two vocabularies": lambda h, w, b, t: ce(z := two(h, w), t) + (torch.zeros_like(z) + t[0, 0]).mean(),
    "addmm of a matrix": lambda h, w, b, t: ce(torch.addmm(b.expand(B * S, V) * 1, h.view(-1, D), w.t()), t),
    "baddbmm of a batch": lambda h, w, b, t: ce(torch.baddbmm(b, h, torch.stack([w.t(), w.t()])), t),
    "einsum of three": lambda h, w, b, t: ce(torch.einsum("bsd,vd,v->bsv", h, w, b), t),
    "einsum that sums rows": lambda h, w, b, t: ce(torch.einsum("bsd,vd->sv", h, w), t[0]),
    "einsum over two dimensions": lambda h, w, b, t: ce(torch.einsum("bsd,sd->bs", h, w[:S]), t[:, 0] % S),
    "einsum without a contraction": lambda h, w, b, t: ce(
        torch.einsum("bd,vk->bdv", h[:, 0], w), t[:, :1].expand(B, D)
    ),
    "tensordot over nothing": lambda h, w, b, t: ce(torch.tensordot(h[0, 0], w[:, 0], 0), t.view(-1)[:D]),
    "tensordot over pairs": lambda h, w, b, t: ce(
        torch.tensordot(h[:, :2, :4], w.view(V, 2, 4), ([1, 2], [1, 2])), t[:, 0]
    ),
    "a convolution of several points": lambda h, w, b, t: F.cross_entropy(
        F.conv1d(h.mT, w.view(V, D, 1).expand(V, D, 3)), t[:, :4]
    ),
    "a strided convolution": lambda h, w, b, t: F.cross_entropy(F.conv1d(h.mT, w[:, :, None], stride=2), t[:, :3]),
    "a convolution without a batch": lambda h, w, b, t: F.cross_entropy(F.conv1d(h[0].mT, w[:, :, None]).mT, t[0]),
    "a root of another head": lambda h, w, b, t: ce(F.linear(h, w) / (F.linear(h, 2 * w).square() + 4).sqrt(), t),
    "integers": lambda h, w, b, t: ce(F.linear(h.long(), w.long()).float() + h.sum() * 0, t),
}
ROWS = {
    "view_as of another": lambda z, t: ce(z, t) + torch.empty(B * S, V).view_as(z).sum(),
    "unflatten of the classes": lambda z, t: ce(
        z.unflatten(2, (2, 2, V // 4)), t[..., None, None].expand(B, S, 2, 2) % 10
    ),
    "squeeze of the classes": lambda z, t: ce(z[..., :1].squeeze(-1), t[:, 0] % S),
    "a list of rows": lambda z, t: (z.__setitem__(([0, 1],), -1.0), ce(z, t))[1],
    "classes by int32": lambda z, t: ce(z.index_select(2, torch.arange(20, dtype=torch.int32)), t % 20),
    "one class": lambda z, t: ce(z.select(2, 3), t[:, 0] % S),
    "classes by a table": lambda z, t: ce(z[..., torch.arange(20).view(2, 10)].flatten(2), t % 20),
    "classes repeated": lambda z, t: ce(z.repeat(1, 1, 2), t),
    "classes repeated one by one": lambda z, t: ce(z.repeat_interleave(2, -1), t),
    "the vocabulary flipped": lambda z, t: ce(z.flip(-1), t),
    "the vocabulary rolled": lambda z, t: ce(z.roll(1, -1), t),
    "everything rolled": lambda z, t: ce(z.roll(1), t),
    "entries gathered": lambda z, t: ce(z.gather(1, (t % S)[:, :1, None].expand(-1, -1, 20)), t[:, :1] % 20),
    "entries gathered by a computed index": lambda z, t: ce(
        z.gather(1, (t[:, :1, None] + torch.arange(V)) % S), t[:, :1]
    ),
    "rows gathered of fewer sequences": lambda z, t: ce(
        z.gather(1, (t % S)[:1, :1, None].expand(-1, -1, V)), t[:1, :1]
    ),
    "an index expanded along rows": lambda z, t: ce(z.gather(1, (torch.arange(V) % S).expand(B, 1, V)), t[:, :1]),
    "indices apart": lambda z, t: ce(z[torch.tensor([0, 1]), None, torch.tensor([0, 2])], t[:, :1]),
    "a list": lambda z, t: ce(z[[1, 0]], t),
    "the classes unbound": lambda z, t: ce(torch.stack(z.unbind(-1), -1), t),
    "probabilities of listed classes": lambda z, t: (
        ce(z, t) - z.log_softmax(-1)[..., [1, 2]].gather(-1, t[..., None] % 2).mean()
    ),
    "broadcast to more rows": lambda z, t: ce(
        torch.broadcast_tensors(torch.zeros(3, B, S, V), z)[1], t.expand(3, B, S)
    ),
    "softmax of scaled log-probabilities": lambda z, t: ce((2 * z.log_softmax(-1)).log_softmax(-1), t),
    "rows of others": lambda z, t: ce(torch.cat([z, torch.zeros(1, S, V)]), torch.cat([t, t[:1]])),
    "the class dimension expanded": lambda z, t: ce(z[..., :1].expand(B, S, V), t),
    "probabilities of some classes": lambda z, t: -z.log_softmax(-1)[..., :20].gather(-1, t[..., None] % 20).mean(),
    "a view of another dtype": lambda z, t: ce(z.view(torch.float32) * z.view(torch.int32).float().detach(), t),
}
ENTRIES = {
    "cast to integers": lambda z, t: ce(z.to(torch.int64).to(torch.float32) + z.sum() * 0, t),
    "masked, then negated": lambda z, t: ce(-z.masked_fill(EVEN, -3.0), t),
    "a column of scales": lambda z, t: ce(z * torch.rand(1, 1, 1, 1), t),
    "a shifted temperature for each row, capped": lambda z, t: ce(torch.tanh(z / torch.ones(B, S, 1) + 1), t),
    "an integer tensor": lambda z, t: ce(z * torch.tensor(3), t),
    "a tensor behind a softcap": lambda z, t: ce(torch.tanh(z) * torch.tensor(3.0), t),
    "a float64 tensor": lambda z, t: ce(z * torch.tensor(3.0, dtype=torch.float64), t),
    "a float64 vector": lambda z, t: ce(z * torch.ones(1, dtype=torch.float64), t),
    "a mixture and class weights": lambda z, t: (
        ce(z, mixed(t, V).view(-1, V).unbind(1)[0].long())
        + F.cross_entropy(z.view(-1, V), mixed(t, V).view(-1, V), weight=torch.rand(V))
    ),
    "a product with a mixture, transposed": lambda z, t: ce(z, t) - (z.log_softmax(-1) * mixed(t, V)).mT.sum(1).mean(),
    "two one-hot masks": lambda z, t: (z.log_softmax(-1) * F.one_hot(t, V) * F.one_hot(t, V)).sum(-1).mean(),
    "a divisor": lambda z, t: ce(1.0 / z, t),
    "divided with rounding": lambda z, t: ce(torch.div(z, 2.0, rounding_mode="floor"), t),
    "tanh twice": lambda z, t: ce(torch.tanh(torch.tanh(z)), t),
    "tanh of masked logits": lambda z, t: ce(torch.tanh(z.masked_fill(EVEN, -3.0)), t),
    "inf added": lambda z, t: ce(z + float("inf"), t),
    "a float64 bias": lambda z, t: ce(z + torch.ones(V, dtype=torch.float64), t),
    "an integer bias": lambda z, t: ce(z + torch.arange(V), t),
    "integers added to rows": lambda z, t: ce(z + t[..., None], t),
    "rows shifted behind a mask": lambda z, t: ce(z.masked_fill(EVEN, -3.0) + torch.rand(B, S, 1), t),
    "exp over the sum of others": lambda z, t: (
        ce(z, t) + (z.exp() / (2 * z).exp().sum(-1, keepdim=True)).sum(-1).mean()
    ),
    "a bias behind a mask": lambda z, t: ce(z.masked_fill(EVEN, -3.0) + torch.ones(V), t),
    "softmax in float64": lambda z, t: F.nll_loss(z.log_softmax(-1, torch.float64).view(-1, V), t.view(-1)),
    "exp of scaled log-probabilities": lambda z, t: (2 * z.log_softmax(-1)).exp().gather(-1, t[..., None]).mean(),
    "log of scaled probabilities": lambda z, t: (2 * z.softmax(-1)).log().gather(-1, t[..., None]).mean(),
    "masked with inf": lambda z, t: ce(z.masked_fill(EVEN, float("inf")), t),
    "masked with a tensor": lambda z, t: ce(z.masked_fill(EVEN, torch.tensor(-3.0)), t),
    "a mask that is the logits": lambda z, t: ce(torch.ones(B, S, V).masked_fill(z > 0, 0.0) * z, t),
    "where keeps the logits": lambda z, t: ce(torch.where(EVEN[None], z, -3.0), t),
    "where of two logits": lambda z, t: ce(torch.where(EVEN, z * 2, z), t),
    "where of integers": lambda z, t: ce(torch.where(EVEN.byte().bool() & (t[..., None] > 3), -3.0, z), t),
    "written into another": lambda z, t: (lambda a: (a.__setitem__(0, z[0]), ce(a, t))[1])(torch.zeros(B, S, V)),
    "computed columns set": lambda z, t: (z.__setitem__((..., torch.arange(3)), -1.0), ce(z, t))[1],
    "columns set to a tensor": lambda z, t: (z.__setitem__((..., slice(3)), torch.ones(3)), ce(z, t))[1],
    "logits times logits": lambda z, t: ce(z * z.tanh(), t),
    "softmax times masked logits": lambda z, t: (lambda m: ce(m, t) + (m.softmax(-1) * m).sum(-1).mean())(
        z.masked_fill(EVEN, -3.0)
    ),
    "an edit under no_grad": lambda z, t: edited_without_gradient(z, t),
}
RSQRT = torch.rsqrt
ROOTS = {
    "a mask times the square": lambda z, t: ce(z * RSQRT(z.square() * F.one_hot(t, V) + 4), t),
    "a tensor times the square": lambda z, t: ce(z * RSQRT(z.square() * torch.tensor(2.0) + 4), t),
    "the square of probabilities": lambda z, t: ce(z, t) + z.softmax(-1).square().sum(-1).mean(),
    "the square of capped logits": lambda z, t: (lambda c: ce(c * RSQRT(c.square() + 4), t))(z.tanh()),
    "the square of masked logits": lambda z, t: (lambda m: ce(m * RSQRT(m.square() + 4), t))(z.masked_fill(EVEN, -3.0)),
    "the square of shifted logits": lambda z, t: (lambda m: ce(m * RSQRT(m.square() + 4), t))(z + torch.rand(B, S, 1)),
    "the third power": lambda z, t: ce(z * RSQRT(z.pow(3) + 4), t),
    "the root of logits": lambda z, t: ce(z * RSQRT(z + 4), t),
    "the root of a root": lambda z, t: ce(z * (z.square() + 4).sqrt().rsqrt(), t),
    "the root of a square alone": lambda z, t: ce(z * RSQRT(z.square()), t),
    "the root of a negated square": lambda z, t: ce(z * RSQRT(4 + z.square() * -0.1), t),
    "the root of an infinite number": lambda z, t: ce(z * RSQRT(z.square() + math.inf), t),
    "an infinite multiple of the square": lambda z, t: ce(z * RSQRT(z.square() * 1e300 * 1e300 + 4), t),
    "the root times zero as a divisor": lambda z, t: ce(z / ((z.square() + 4).sqrt() * 0), t),
    "a number over zero times the root": lambda z, t: ce(z * (1 / ((z.square() + 4).sqrt() * 0)), t),
    "probabilities times a root": lambda z, t: ce(z, t) + (z.softmax(-1) * RSQRT(z.square() + 4)).sum(-1).mean(),
    "times the root, not over it": lambda z, t: ce(z * (z.square() + 4).sqrt(), t),
    "over the inverse root": lambda z, t: ce(z / RSQRT(z.square() + 4), t),
    "the root over the logits": lambda z, t: ce((z.square() + 4).sqrt() / z, t),
    "times their square": lambda z, t: ce(z * z.square(), t),
    "the square over its root": lambda z, t: ce(z.square() / (z.square() + 4).sqrt(), t),
    "over the root, rounded": lambda z, t: ce(torch.div(z, (z.square() + 4).sqrt(), rounding_mode="floor"), t),
    "a number over the root, rounded": lambda z, t: ce(
        z * torch.div(9.0, (z.square() + 4).sqrt(), rounding_mode="floor"), t
    ),
    "over a number less than the root": lambda z, t: ce(z / (4 - z.square()).sqrt(), t),
    "added to the square with alpha": lambda z, t: ce(z * RSQRT(torch.add(z.square(), 4, alpha=2)), t),
    "a root of other rows": lambda z, t: ce(z * RSQRT(z.flip(1).square() + 4), t),
    "a root of another order": lambda z, t: ce(z.flip(1) * RSQRT(z.flip(1).square() + 4), t),
    "a root of shifted logits": lambda z, t: ce(z * RSQRT((z + 0.5).square() + 4), t),
    "a root of biased logits": lambda z, t: ce(z * RSQRT((z + torch.ones(V)).square() + 4), t),
    "two biases": lambda z, t: ce((z + torch.ones(V)) * RSQRT((z + torch.rand(V)).square() + 4), t),
    "a bias twice": lambda z, t: (lambda b: ce((z + b + b) * RSQRT((z + b).square() + 4), t))(torch.rand(V)),
    "a bias in another share": lambda z, t: (lambda b: ce((2 * z + b) * RSQRT((z + b).square() + 4), t))(torch.rand(V)),
    "zero times the logits": lambda z, t: ce(z * RSQRT((0 * z).square() + 4), t),
    "a root of other columns": lambda z, t: ce(z[..., :20] * RSQRT(z[..., 20:].square() + 4), t % 20),
    "a root of other dimensions": lambda z, t: (
        lambda a: F.cross_entropy(a.mT * RSQRT(a.square() + 4), t % S)  # S classes, of dimension 1 or 2
    )(z[..., :S]),
    "all rows times all roots": lambda z, t: ce(
        z.view(-1, 1, V) * RSQRT(z.view(1, -1, V).square() + 4), t.view(-1, 1).expand(-1, B * S)
    ),
    "columns set, times a root": lambda z, t: (
        lambda a: (a.__setitem__((..., slice(3)), -1.0), ce(a * RSQRT(z.square() + 4), t))[1]
    )(z.clone()),
    "one-hot logits times a root": lambda z, t: ce(z * F.one_hot(t, V) * RSQRT(z.square() + 4), t),
    "a mask times the root": lambda z, t: ce(z * (RSQRT(z.square() + 4) * F.one_hot(t, V)), t),
    "rounded logits times a root": lambda z, t: ce(z.bfloat16().float() * RSQRT(z.square() + 4), t),
    "a root of logits without a factor": lambda z, t: (lambda a: ce((z * a) * RSQRT(z.square() + 4), t))(torch.ones(1)),
    "masked logits times a root": lambda z, t: ce(z.masked_fill(EVEN, -3.0) * RSQRT(z.square() + 4), t),
    "shifted rows times a root": lambda z, t: ce((z + torch.rand(B, S, 1)) * RSQRT(z.square() + 4), t),
    "capped logits times a root": lambda z, t: ce(z.tanh() * RSQRT(z.square() + 4), t),
    "more dimensions than the root": lambda z, t: ce(z[None] * RSQRT(z.square() + 4), t[None]),
    "a root under no_grad": lambda z, t: ce(z * root_without_gradient(z), t),
    "the square of the logits summed": lambda z, t: ce(z, t) + z.square().sum(-1).mean(),
    "the root of columns": lambda z, t: ce(z[..., :20] * RSQRT(z.square() + 4)[..., :20], t % 20),
    "a root, rounded": lambda z, t: ce(z * RSQRT(z.bfloat16().square().float() + 4), t),
    "the square in place": lambda z, t: ce(z * RSQRT(z.clone().square_() + 4), t),
    "divided in place": lambda z, t: ce(z.div_((z.square() + 4).sqrt().detach()), t),
}
STATISTICS = {
    "smoothing by a tensor": lambda z, t: (
        ce(z, t, ignore_index=3, label_smoothing=0.1, reduction="mean") + z.square().mean()
    ),
    "int32 targets": lambda z, t: (
        ce(z, t) - z.log_softmax(-1).gather(-1, t[..., None].int().long()).mean() + z.abs().mean()
    ),
    "byte indices": lambda z, t: ce(z, t) - z.log_softmax(-1).view(-1, V)[torch.arange(B * S), t.view(-1).int()].mean(),
    "logsumexp in float64": lambda z, t: (
        z.log_softmax(-1).sum(-1, dtype=torch.float64).mean() + z.log_softmax(-1).gather(-1, t[..., None]).mean()
    ),
    "argmax of negated logits": lambda z, t: ce(z, t) + (-(z.log_softmax(-1))).argmax(-1).float().mean(),
    "argmax of masked logits": lambda z, t: (lambda m: ce(m, t) + m.argmax(-1).float().mean())(
        z.masked_fill(EVEN, -3.0)
    ),
    "sum of masked logits": lambda z, t: (lambda m: ce(m, t) + m.sum(-1).mean())(z.masked_fill(EVEN, -3.0)),
    "sum over rows": lambda z, t: ce(z, t) + z.sum(0).square().mean(),
    "entry of a masked product": lambda z, t: (
        ce(z, t) + (z.log_softmax(-1) * F.one_hot(t, V)).gather(-1, t[..., None]).mean()
    ),
    "several classes of fewer rows": lambda z, t: (
        ce(z, t) - z.log_softmax(-1).view(-1, V)[t.view(-1, 1) % 3, t.view(-1, 1).expand(-1, 2)].mean()
    ),
    "classes of fewer rows": lambda z, t: ce(z, t) - z.log_softmax(-1).gather(-1, t[:1, :, None]).mean(),
    "classes with a new dimension": lambda z, t: (
        ce(z, t) - z.log_softmax(-1).view(-1, V)[torch.arange(B * S), None, t.view(-1)].mean()
    ),
    "classes of some rows": lambda z, t: ce(z, t) - z.log_softmax(-1).view(-1, V)[t.view(-1) % 3, t.view(-1)].mean(),
    "logits as a target": lambda z, t: ce(z, t) + F.cross_entropy(torch.zeros(B * S, V), z.view(-1, V)),
    "logits of two heads": lambda z, t: ce(z.softmax(-1) * F.linear(z.detach(), torch.ones(V, V)), t),
    "a norm": lambda z, t: ce(z, t) + z.norm(),
}


def two(h, w):
    return torch.cat([F.linear(h, w), F.linear(h, w * 2)], -1)


def mixed(t, classes):
    return 0.4 * F.one_hot(t, classes) + 0.6 * F.one_hot(t.flip(0), classes)


def edited_member(h, w, t):
    a = F.linear(h, w)
    z = torch.cat([a, F.linear(h, w * 2)], -1)
    a.mul_(2)
    return ce(z, t)


RANKINGS_IN_16_BITS = {
    "rank of log-probabilities": lambda z, t: ce(z, t) + rank(z.log_softmax(-1), t).sum(),
    "rank of biased logits": lambda z, t: ce(z, t) + rank(z + torch.ones(V, dtype=z.dtype), t).sum(),
}


def copied_weight(h, w, t):
    w = w.detach() * 1
    copies = w.t()[None].repeat(B, 1, 1)
    w.zero_()
    return ce(torch.bmm(h, copies), t)


def edited_without_gradient(z, t):
    with torch.no_grad():
        z.mul_(2)
    return ce(z, t)


def root_without_gradient(z):
    with torch.no_grad():
        return RSQRT(z.square() + 4)


# Captured with symbolic sizes.
DYNAMIC = {
    "view_as a tensor of symbolic size": lambda z, t: ce(z.view_as(torch.empty(t.shape[0], t.shape[1], V)), t),
    "columns of a symbolic number": lambda z, t: ce(z.narrow(-1, 0, t.shape[1] + 20), t % 20),
    "a symbolic slice of the classes": lambda z, t: ce(z[..., : t.shape[1] + 20], t % 20),
    "times a symbolic size": lambda z, t: ce(z * t.shape[1], t),
    "the root of a symbolic size": lambda z, t: ce(z * RSQRT(z.square() + t.shape[1]), t),
    "the power of a symbolic size": lambda z, t: ce(z * RSQRT(z ** t.shape[1] + 1), t),
    "divided by a symbolic size": lambda z, t: ce(z / t.shape[1], t),
    "a symbolic class is ignored": lambda z, t: ce(z, t, ignore_index=t.shape[1]),
    "symbolic columns set": lambda z, t: (z.__setitem__((..., slice(t.shape[1])), -1.0), ce(z, t))[1],
    "a smoothed mixture over symbolic classes": lambda z, t: F.cross_entropy(
        z.mT.mT.flatten(0, 1), mixed(t, V).flatten(0, 1), label_smoothing=0.1
    ),
    "a one-hot tensor in another shape, of symbolic size": lambda z, t: (
        ce(z, t) - (z.log_softmax(-1) * F.one_hot(t.flatten(), V).view(z.shape)).sum(-1).mean()
    ),
    "two symbolic vocabularies": lambda z, t: ce(torch.cat([z, z * 2], -1), t),
    "two heads of symbolic sizes": lambda z, t: ce(torch.stack([z, z * 2]), torch.stack([t, t])),
    "addmm with a symbolic alpha": lambda z, t: ce(
        torch.addmm(torch.zeros(V), z.flatten(0, 1), torch.eye(V), alpha=t.shape[1]), t
    ),
    "added with a symbolic alpha": lambda z, t: ce(torch.add(z, torch.ones(V), alpha=t.shape[1]), t),
    "added a symbolic number of times": lambda z, t: ce(torch.add(z, z, alpha=t.shape[1]), t),
    "columns set of a symbolic number": lambda z, t: (z.__setitem__((..., slice(3, None)), -1.0), ce(z, t))[1],
    "a symbolic row": lambda z, t: ce(z[:, t.shape[1] - 2 :], t[:, t.shape[1] - 2 :]) + z.square().mean(),
}
# No program that runs reaches them on a CPU.
UNREACHED = {
    "pointwise.cast: new.device != old.device": "needs a second device",
    "reductions._loss: fake(indices).dtype != torch.int64": "eager's own error for most, and Dynamo's for uint8",
    "unnamed._may_have_a_loss: flow.vocab < settings.min_vocab": "no size is too small for these programs",
}
PROGRAMS = {
    **{name: linear(f) for name, (f, _, _) in REFUSED.items()},
    **{f"margin: {name}": linear(f) for name, (f, _) in UNFUSED.items()},
    **{f"in batch: {name}": in_batch(f) for name, (f, _) in IN_BATCH.items()},
    **{f"two heads: {name}": compared(f) for name, (f, _) in COMPARED.items()},
    **{f"mixed heads: {name}": compared(f) for name, (f, _) in MIXED.items()},
    **{f"unnamed: {name}": linear(f) for name, (f, _, _) in LOSSES.items()},
    **{f"nothing: {name}": without_bias(f) for name, f in NOTHING.items()},
    **HEADS,
    **{name: linear(f) for name, f in {**ROWS, **ENTRIES, **ROOTS, **STATISTICS}.items()},
    **{f"ranking: {name}": linear(beside_a_loss(metric)) for name, (metric, _, _) in RANKINGS.items()},
    **{name: in_16_bits(f) for name, f in RANKINGS_IN_16_BITS.items()},
}


def outcome(gm: torch.fx.GraphModule) -> list:
    return [(s.fused, s.reason, s.at) for s in rewrite(gm, config.Settings(min_vocab=0), "v").sites]


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    """The captured graph of each program, what becomes of it, and the guards that fire."""
    torch.manual_seed(0)
    inputs = [torch.randn(s).requires_grad_() for s in ((B, S, D), (V, D), (V,))] + [torch.randint(0, V, (B, S))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graphs = {name: graphs_of(program, *inputs)[-1] for name, program in PROGRAMS.items()}
        graphs |= {name: graphs_of(linear(program), *inputs, dynamic=True)[-1] for name, program in DYNAMIC.items()}
        return dict(zip(graphs, with_what_fires(MODULES, list(graphs.values()), outcome), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_none_of_the_programs_is_fused(programs):
    assert [name for name, (_, sites, _) in programs.items() if any(fused for fused, _, _ in sites)] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", MODULES, ids=[module.__name__.rpartition(".")[2] for module in MODULES])
def test_every_guard_is_needed(module, programs):
    unreached = {guard for guard in UNREACHED if guard.startswith(module.__name__.rpartition(".")[2] + ".")}
    assert survivors(module, list(programs.values()), outcome) == unreached
