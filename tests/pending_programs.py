"""Random programs over pending logits: makers, aliases, copies, edits in place, readers, graph breaks.

A program is Python source, so that a failing one can be read and run by itself.  It is run three times: eagerly, which
is the judge; with the logits deferred and its pieces compiled by cce; and, only where those two differ, with the same
pieces compiled by PyTorch alone.  What PyTorch itself does not get right is none of ours.
"""

from __future__ import annotations

import contextlib
import linecache
import logging
import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

N, D, V = 6, 4, 24
OPTIONS = {"min_vocab": 2, "compiler": "aot_eager"}

# ------------------------------------------------------------------------------------------------ the grammar

# Of a matrix `{v}` of R rows and V classes.
ALIASES = (
    "{v}[1:]",
    "{v}[:-1]",
    "{v}[::2]",
    "{v}[1]",
    "{v}[:, 2:]",
    "{v}[..., None]",
    "{v}.view(-1)",
    "{v}.view({v}.shape)",
    "{v}.view_as({v})",
    "{v}.reshape(1, -1, {v}.shape[-1])",
    "{v}.t()",
    "{v}.mT",
    "{v}.transpose(0, 1)",
    "{v}.unsqueeze(0)",
    "{v}.unsqueeze(0).squeeze(0)",
    "{v}.detach()",
    "{v}.detach()[1:]",
    "{v}.data",
    "{v}.split(2)[1]",
    "{v}.chunk(2)[0]",
    "{v}.unbind(0)[0]",
    "{v}.narrow(0, 1, 2)",
    "{v}.select(1, 3)",
    "{v}.diagonal()",
    "{v}.expand(2, *{v}.shape)",
    "{v}.as_strided((2, 3), {v}.stride(), {v}.storage_offset())",
    "{v}.unfold(1, 2, 2)",
    "{v}.movedim(0, 1)",
    "{v}.contiguous()",
    "{v}.to({v}.dtype)",
    "{v}.requires_grad_()",
    "{v}.swapaxes(0, 1)",
    "torch.ops.aten.alias({v})",
)
COPIES = (
    "{v}.clone()",
    "{v}.float().double()",
    "{v}.float()",
    "{v} * 1.5",
    "{v} / 1.5",
    "{v}.log_softmax(-1)",
    "{v}.softmax(-1)",
    "{v}.exp()",
    "{v}.detach().clone()",
    "{v}.clone()[1:]",
    "torch.stack({v}.unbind(0))",
    "{v}.repeat(*([2] + [1] * ({v}.dim() - 1)))",
    "{v}.t().contiguous()",
    "{v} + 1.0",
    "1.0 - {v}",
    "{v} + torch.linspace(-1, 1, {v}.shape[-1], dtype={v}.dtype)",
    "{v}.masked_fill(torch.arange({v}.shape[-1]) > 3, -2.0)",
    "torch.where(torch.arange({v}.shape[-1]) > 3, {v}, -2.0)",
    "{v} * {v}.softmax(-1)",
    "{v} - {v}.logsumexp(-1, keepdim=True)",
    "{v} - {v}.detach().amax(-1, keepdim=True)",
    "{v} / {v}.exp().sum(-1, keepdim=True)",
    "{v} * F.one_hot(torch.ones({v}.shape[:-1], dtype=torch.long), {v}.shape[-1])",
    "{v}.topk(2)[0]",
    "torch.cat({v}.chunk(2), 0)",
    "torch.stack([{v}, {v} * 0.5])",
    "{v}.flip(0)",
    "{v}.roll(1, 0)",
    "{v}.index_select(-1, torch.arange({v}.shape[-1]).flip(0))",
    "{v}[..., torch.arange({v}.shape[-1]).flip(0)]",
    "({v} > 0.5).to({v}.dtype)",
    "torch.where({v} > 0.5, {v}, {v} * 2.0)",
    "torch.cos({v})",
    "torch.where(one_hot({v}).bool(), {v} - 0.3, {v})",
    "one_hot({v}) * torch.cos({v}) + (1.0 - one_hot({v})) * {v}",
    "{v}.scatter(-1, ones({v}), {v}.gather(-1, ones({v})) - 0.3)",
    "{v}.scatter_add(-1, ones({v}), torch.full_like(ones({v}), -0.3, dtype={v}.dtype))",
    "{v} / column({v})",
    "torch.cat([column({v}), {v}], -1)",
    "torch.cat([{v}, column({v})], -1)",
)
# Statements that write into the memory of `{v}`, of any shape.
EDITS = (
    "{v}.mul_(3.0)",
    "{v}.div_(0.5)",
    "{v}.add_(1.5)",
    "{v} /= 2.0",
    "{v} *= 1.5",
    "{v} += 0.5",
    "{v} -= {v}.mean()",
    "{v}[0] = 0.25",
    "{v}[..., -2:] = -5.0",
    "{v}[{v} > 0] = 0.5",
    "{v}.masked_fill_({v} < 0, -2.0)",
    "{v}.clamp_(-1.0, 1.0)",
    "{v}.copy_({v} * 2)",
    "{v}.zero_()",
    "{v}.fill_(0.5)",
    "{v}.sigmoid_()",
    "{v}.tanh_()",
    "{v}.exp_()",
    "{v}.neg_()",
    "F.relu_({v})",
    "F.leaky_relu({v}, 0.3, inplace=True)",
    "torch.mul({v}, 2.0, out={v})",
    "torch.add({v}.detach(), 1.0, out={v})",
    "torch.clamp({v}, max=0.5, out={v})",
    "torch._foreach_mul_([{v}], 2.0)",
    "torch._foreach_add_([{v}, {v}.clone()], 1.0)",
    "torch.ops.pending_programs.scale_({v}, 2.0)",
    "triple({v}, 2.0)",
    "Dirty.apply({v})",
    "{v}.data.mul_(2.0)",
    "{v}.detach().add_(1.0)",
    "{v}.index_fill_(0, torch.tensor([0]), 0.1)",
    "{v}.index_add_(0, torch.tensor([0]), {v}[:1].detach())",
    "{v}.addcmul_({v}.detach(), {v}.detach(), value=0.5)",
    "{v}.lerp_({v}.detach() * 2, 0.5)",
    "{v}.requires_grad_(True)",
    "numpy_edit({v})",
    "torch.nn.init.constant_({v}, 0.3)",
    "{v}.set_({v}.detach().clone() * 2)",
    "{v}.resize_({v}.shape)",
    "{v}.view(-1)[:3].mul_(2.0)",
    "{v}[1:].add_(1.0)",
    "{v}.t().mul_(1.5)",
    "{v}.cumsum_(-1)",
    "{v}.masked_fill_(torch.arange({v}.shape[-1]) > 3, -2.0)",
    "{v}[..., torch.arange({v}.shape[-1]) % 3 == 1] = -2.0",
    "{v}[..., 2] = -3.0",
    "{v}.index_fill_(-1, torch.tensor([0, 1]), -4.0)",
    "{v} += torch.linspace(-1, 1, {v}.shape[-1], dtype={v}.dtype)",
    "{v} -= {v}.detach().amax(-1, keepdim=True)",
    "{v}.sub_({v}.logsumexp(-1, keepdim=True).detach())",
    "{v}.mul_({v}.detach().softmax(-1))",
    "{v}.scatter_add_(-1, ones({v}), torch.full_like(ones({v}), -0.3, dtype={v}.dtype))",
    "{v}.mul_(one_hot({v}))",
)
MATRIX_EDITS = (
    "{v}.add_(torch.linspace(-1, 1, {v}.shape[-1], dtype={v}.dtype))",
    "{v}[:, 3] = {v}[:, 4]",
    "{v}[1:, :4] *= 2.0",
    "{v}.scatter_(1, torch.zeros({v}.shape[0], 1, dtype=torch.long), 0.5)",
    "{v}[torch.arange({v}.shape[0]), 0] = 1.0",
    "{v}.addmm_({v}[:, :2].detach(), {v}[:2].detach())",
    "{v}.fill_diagonal_(0.5)",
    "{v}[torch.arange({v}.shape[0]), target({v})] -= 0.3",
    "{v}.view(-1, {v}.shape[-1])[:, torch.arange({v}.shape[-1]) > 20] = -5.0",
    "{v}.view(1, *{v}.shape).div_(2.0)",
)
# Of logits without views: autograd replays those of a tensor subclass on the shape that their base has then.
SHAPE_EDITS = ("{v}.detach_()", "{v}.unsqueeze_(0)", "{v}.squeeze_(0)", "{v}.t_()", "{v}.transpose_(0, 1)")
TWO = (
    "{v}.add_({u})",
    "{v}.copy_({u})",
    "{v} += {u}",
    "{u}.mul_({v})",
    "torch._foreach_mul_([{v}, {u}], 2.0)",
    "torch.add({v}, {u}, out={v})",
    "{v}.set_({u})",
)
MODES = ("with torch.no_grad():", "with torch.enable_grad():", "with torch.inference_mode():")
READERS = (
    "out.append(({v} * {v}).mean())",
    "out.append({v}.sum())",
    "out.append({v}.detach().clone())",
    "out.append({v}.logsumexp(-1).mean())",
    "out.append({v}.requires_grad)",
    "out.append({v}.is_leaf)",
    "out.append(float({v}.detach().sum()))",
    "out.append(tuple({v}.shape))",
)
MATRIX_READERS = (
    "out.append(F.cross_entropy({v}, target({v})))",
    "out.append(F.cross_entropy({v}.float(), target({v})))",
    "out.append(F.nll_loss({v}.log_softmax(-1), target({v})))",
    "out.append(F.cross_entropy({v}[:-1], target({v})[:-1]))",
    "out.append({v}.log_softmax(-1).gather(-1, target({v})[:, None]).mean())",
    "out.append({v}.argmax(-1).sum())",
    "out.append(({v} >= {v}.gather(-1, target({v})[:, None])).sum())",
    "out.append({v}.max(-1).values.sum())",
    "out.append(F.cross_entropy({v}, one_hot({v})))",
    "out.append(F.cross_entropy({v}, 0.7 * one_hot({v}) + 0.3 * one_hot({v}).roll(1, -1)))",
    "out.append(-({v}.log_softmax(-1) * one_hot({v})).sum(-1).mean())",
    "out.append(F.cross_entropy({v} - 0.3 * one_hot({v}), torch.ones({v}.shape[0], dtype=torch.long)))",
)
# Of tensors that require grad; what they are given is compared as the numbers of a program are.
HOOKS = (
    "{v}.register_hook(lambda g: None)",
    "{v}.register_hook(lambda g: g)",
    "{v}.register_hook(lambda g: g * 1.5)",
    "{v}.register_hook(lambda g: out.append(({n}, g.sum())))",
    "{v}.register_hook(lambda g: out.append(({n}, g.clone())) or g)",
    "{v}.grad_fn.register_prehook(lambda gs: out.append(({n}, gs[0].sum())))",
    "{v}.retain_grad()",
)
RETURNS = ("", "{v}", "{v}[1:]", "{v}.view({v}.shape)", "({v}, {v} * 2)", "{v}.detach()", "({v}[:1], {v}[1:])")
BACKENDS = ("cce", "cce", "aot_eager", "eager", "cce fullgraph", "aot_eager fullgraph")


@dataclass
class Program:
    """lines of `run(head, h, w, compiled)`; pieces, functions that a line calls: name, arguments, lines, backend.

    large: whether the logits are taken for large ones, of which everything is recorded. behind: whether the head is
    taken for one that runs eagerly, with losses behind its logits in the autograd graph.
    """

    lines: list[str] = field(default_factory=list)
    pieces: list[tuple[str, str, list[str], str]] = field(default_factory=list)
    whole: bool = False  # compiled as one function, with graph breaks
    large: bool = False
    behind: bool = False

    def __str__(self) -> str:
        text = ""
        for name, arguments, lines, backend in self.pieces:
            body = "".join(f"    {line}\n" for line in lines)
            text += f"@compiled({backend!r})\ndef {name}({arguments}):\n{body}\n"
        body = "".join(f"    {line}\n" for line in self.lines)
        made = "F.linear(h, w)" if self.whole else "head(h, w)"
        mark = "@compiled('cce')\n" if self.whole else ""
        return f"{text}{mark}def run(h, w):\n    out = []\n    z = {made}\n{body}    return out\n"


class Writer:
    """Writes one program. compiled: the share of statements that stand in a compiled function."""

    def __init__(self, seed: int, kind: str) -> None:
        self.random = random.Random(seed)
        self.kind = kind
        self.program = Program(whole=kind == "whole", large=kind == "large", behind=kind == "hooks" and seed % 3 > 0)
        self.known = {"z": 2}  # variables, and their dimensions as far as they are known (0: any)
        self.count = 0
        self.edited = False

    def pick(self, choices: tuple[str, ...]) -> str:
        return self.random.choice(choices)

    def variable(self, matrix: bool = False) -> str:
        names = [n for n, rank in self.known.items() if rank == 2 or not matrix]
        return self.random.choice(names)

    def new(self, rank: int) -> str:
        self.count += 1
        name = f"v{self.count}"
        self.known[name] = rank
        return name

    def edit(self, v: str, matrix: bool) -> list[str]:
        self.edited = True
        others = [n for n in self.known if n != v]
        if v == "z" and not others and self.random.random() < 0.1:
            return [self.pick(SHAPE_EDITS).format(v=v)]
        if others and self.random.random() < 0.12:
            line = self.pick(TWO).format(v=v, u=self.random.choice(others))
        else:
            line = self.pick(EDITS + MATRIX_EDITS * 2 if matrix else EDITS).format(v=v)
        if self.random.random() < 0.3:
            # AOTAutograd itself fails on many edits in inference mode, and leaves the thread's state in disorder;
            # a tensor that is given the storage of an inference tensor is half of one.
            plain = self.kind == "whole" or v in ("a", "b") or "set_" in line or ".data =" in line
            return [self.pick(MODES[:2] if plain else MODES), f"    {line}"]
        return [line]

    def statement(self) -> list[str]:
        kind = self.random.choices(("alias", "copy", "edit", "read", "piece"), (3, 1.5, 4, 2.5, 3))[0]
        matrix = self.random.random() < 0.8
        v = self.variable(matrix)
        matrix = self.known[v] == 2
        if kind == "alias" or kind == "copy":
            form = self.pick(ALIASES if kind == "alias" else COPIES)
            same = matrix and form.split("}", 1)[1] in _MATRICES
            return [f"{self.new(2 if same else 0)} = {form.format(v=v)}"]
        if kind == "edit":
            return self.edit(v, matrix)
        if kind == "read":
            return [self.pick(READERS + MATRIX_READERS * 2 if matrix else READERS).format(v=v)]
        if self.kind in ("eager", "large"):
            return self.edit(v, matrix)
        # PyTorch crashes at a hook on a view whose base has been edited in some ways.
        crashes = self.edited
        # A hook that comes after the loss sees nothing of it, unless the loss is behind the logits anyway.
        lines = [*self.program.lines, *(line for _, _, piece, _ in self.program.pieces for line in piece)]
        early = self.program.behind or not any("out.append" in line for line in lines)
        if self.kind == "hooks" and early and not crashes and self.random.random() < 0.7:
            self.count += 1
            return [self.pick(HOOKS).format(v=v, n=self.count)]
        if self.kind == "whole":
            return ["torch._dynamo.graph_break()"]
        return self.piece(v, matrix)

    def piece(self, v: str, matrix: bool) -> list[str]:
        """A call of a compiled function that edits or reads one or two of the tensors, and hands some of them on."""
        names = [v]
        others = [n for n in self.known if n != v]
        if others and self.random.random() < 0.3:
            names.append(self.random.choice(others))
        given = dict(zip(names, ("a", "b"), strict=False))
        lines: list[str] = []
        what = self.random.random()
        if what < 0.75:
            inside = self.known
            self.known = {given[n]: inside[n] for n in names}
            lines += self.edit(given[self.random.choice(names)], matrix and len(names) == 1)
            if self.random.random() < 0.3:
                lines += self.edit("a", matrix)
            self.known = inside
        back = self.pick(RETURNS).format(v=given[self.random.choice(names)])
        if what >= 0.6:
            read = self.pick(READERS[:2] + (MATRIX_READERS if matrix else ())).format(v="a")
            lines += ["out = []", read]
            back = "out" if not back else f"(*out, {back})"
        lines.append(f"return {back}")
        name = f"piece{len(self.program.pieces)}"
        self.program.pieces.append((name, ", ".join(given.values()), lines, self.pick(BACKENDS)))
        kept = self.new(0)
        return [f"{kept} = first({name}({', '.join(names)}), out)"]

    def write(self, length: int) -> Program:
        for _ in range(length):
            before, pieces, known = list(self.program.lines), list(self.program.pieces), dict(self.known)
            self.program.lines += self.statement()
            # An error ends a program, and most random statements are one: of those only some stay.
            if self.random.random() < 0.85 and run(self.program, linear, eager).error:
                self.program.lines, self.program.pieces, self.known = before, pieces, known
        if self.kind == "whole":
            self.program.lines[:0] = ["torch._dynamo.graph_break()"] * (self.random.random() < 0.8)
        for v in self.known:
            self.program.lines.append(f"read(out, {v})")
        return self.program


_MATRICES = {
    form.split("}", 1)[1]
    for form in (
        *("{v}[1:]", "{v}[:-1]", "{v}[::2]", "{v}.view({v}.shape)", "{v}.view_as({v})", "{v}.unsqueeze(0).squeeze(0)"),
        *("{v}.detach()", "{v}.detach()[1:]", "{v}.data", "{v}.split(2)[1]", "{v}.chunk(2)[0]", "{v}.narrow(0, 1, 2)"),
        *("{v}.contiguous()", "{v}.to({v}.dtype)", "{v}.clone()", "{v}.float().double()", "{v}.float()", "{v} * 1.5"),
        *("{v} / 1.5", "{v}.log_softmax(-1)", "{v}.softmax(-1)", "{v}.exp()", "{v}.detach().clone()", "{v} + 1.0"),
        *("{v}.clone()[1:]", "{v}.requires_grad_()", "torch.stack({v}.unbind(0))"),
        *("torch.cat({v}.chunk(2), 0)", "{v}.flip(0)", "{v}.roll(1, 0)", "torch.cos({v})"),
        *(form for form in COPIES if form.startswith(("torch.where(", "one_hot(", "{v}.scatter", "{v}.index_select"))),
    )
}


def write(seed: int, kind: str) -> Program:
    """Program number `seed` of a kind: "eager", "large" (the same, of large logits), "pieces" (some of it in compiled
    functions), "hooks" (the same, with hooks, of a head that runs eagerly) or "whole" (all of it)."""
    writer = Writer(seed, kind)
    return writer.write(writer.random.randint(2, 6))


# ---------------------------------------------------------------------------------------------- what programs call


class Dirty(torch.autograd.Function):
    """Doubles its argument in place, and says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2.0)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2.0


_library = torch.library.Library("pending_programs", "DEF")
_library.define("scale_(Tensor(a!) x, float by) -> ()")
_library.impl("scale_", lambda x, by: (x.mul_(by), None)[1], "CompositeExplicitAutograd")


@torch.library.custom_op("pending_programs::triple", mutates_args={"x"})
def triple(x: Tensor, by: float) -> None:
    """Writes into its argument, as a kernel would."""
    x.copy_(x * by)


def numpy_edit(x: Tensor) -> None:
    """An edit that only the memory sees."""
    x.detach().numpy()[..., 0] = 0.75


def ones(x: Tensor) -> Tensor:
    """A class of each row, where `x` has the classes last."""
    return torch.ones(*x.shape[:-1], 1, dtype=torch.long)


def column(x: Tensor) -> Tensor:
    """A number for each row, where `x` has the classes last."""
    return torch.linspace(0.5, 2, x.shape[:-1].numel(), dtype=x.dtype).view(*x.shape[:-1], 1)


def one_hot(x: Tensor) -> Tensor:
    """The same class, in a tensor of the shape of `x`."""
    return F.one_hot(ones(x)[..., 0], x.shape[-1]).to(x.dtype)


def target(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0]) % x.shape[-1]


def first(result: Any, out: list[Any]) -> Any:
    """The last tensor of what a piece gave; the others are recorded."""
    if isinstance(result, (tuple, list)):
        *others, last = result
        for x in others:
            out.append(x)
        return last
    return result


def read(out: list[Any], v: Any) -> None:
    """What a tensor is in the end: its value and a term of the loss."""
    if isinstance(v, Tensor):
        out.append(v.sum() if v.requires_grad else v.clone())


# ------------------------------------------------------------------------------------------------------- running


@dataclass
class Outcome:
    """What a program gave: numbers and gradients, or its error."""

    values: list[Any] = field(default_factory=list)
    error: str = ""
    message: str = ""
    trace: str = ""


def _plain(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def run(program: Program, head: Callable, compiled: Callable[[str], Callable], number: int = 0) -> Outcome:
    """Runs a program on inputs that are the same every time, and differentiates it."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(N, D, generator=generator, dtype=torch.float64).requires_grad_()
    w = torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_()
    source, name = str(program), f"<pending program {number}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    given = {**globals(), "head": head, "compiled": compiled, "np": np}
    outcome = Outcome()
    try:
        exec(compile(source, name, "exec"), given)
        out = given["run"](h, w)
        outcome.values = [_plain(x) for x in out]
        terms = [x.double().sum() for x in out if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point()]
        given = len(out)
        if terms:
            grads = torch.autograd.grad(sum(terms), (h, w), allow_unused=True)
            seen = sorted(out[given:], key=lambda pair: pair[0])
            outcome.values += [_plain(x) for x in (*(x for _, x in seen), *grads)]
    except Exception as error:
        # Dynamo puts the place of an error in front of it, and its own advice behind.
        outcome.error, outcome.message = type(error).__name__, str(error)
        outcome.trace = traceback.format_exc()
        outcome.values = []
    return outcome


def same(got: Outcome, expected: Outcome) -> bool:
    """Whether two outcomes agree: all numbers to fp64's precision; of errors, that there is one."""
    if expected.error or got.error:
        return bool(expected.error) and bool(got.error)
    if len(got.values) != len(expected.values):
        return False
    return all(_close(a, b) for a, b in zip(got.values, expected.values, strict=True))


def _close(a: Any, b: Any) -> bool:
    if isinstance(b, Tensor):
        # Through a cast to float, kernels that add up in another order differ in its digits.
        return (
            isinstance(a, Tensor)
            and a.shape == b.shape
            and torch.allclose(a.double(), b.double(), rtol=2e-6, atol=2e-6, equal_nan=True)
        )
    if isinstance(b, float) and isinstance(a, float):
        return bool(np.isclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True))
    return bool(a == b)


def difference(got: Outcome, expected: Outcome) -> str:
    """Two outcomes side by side, where they differ."""
    if got.error or expected.error:
        trace = got.trace[-3500:]
        return f"error: {got.error or 'none'}, eager: {expected.error or 'none'}\n{trace}{expected.trace[-300:]}"
    lines = [f"{len(got.values)} values, eager {len(expected.values)}; the last two are gradients"]
    for i, (a, b) in enumerate(zip(got.values, expected.values, strict=False)):
        if not _close(a, b):
            text = [str(x).replace("\n", " ")[:150] for x in (a, b)]
            lines.append(f"value {i}: {text[0]}\n  eager  {text[1]}")
    return "\n".join(lines)


def eager(_backend: str) -> Callable:
    return lambda function: function


def with_cce(backend: str) -> Callable:
    name, *full = backend.split()
    if name == "cce":
        return torch.compile(backend="cce", options=OPTIONS, fullgraph=bool(full))
    return torch.compile(backend=name, fullgraph=bool(full))


def without_cce(backend: str) -> Callable:
    return with_cce(backend.replace("cce", "aot_eager"))


def linear(h: Tensor, w: Tensor) -> Tensor:
    return F.linear(h, w)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of programs that are wrong on purpose."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def check(program: Program, number: int = 0) -> tuple[str, Outcome, Outcome]:
    """What became of a program ("right", "error", "torch" for what PyTorch alone does not get right, "WRONG")."""
    with quiet():
        expected = run(program, linear, eager, number)
        if program.whole or program.pieces:
            torch._dynamo.reset()
        got = run(program, deferring_head(program.large, program.behind), with_cce, number)
        if same(got, expected):
            return ("error" if expected.error else "right"), got, expected
        # What is documented: another shape for logits by `set_` and the like; what AOTAutograd makes of tensor
        # subclasses that are edited where Dynamo may not leave that to eager mode.
        elsewhere = any(backend == "aot_eager fullgraph" for *_, backend in program.pieces)
        if got.error == "DeferredLogitsError" or (elsewhere and got.error == "BackendCompilerFailed"):
            return "limit", got, expected
        if "modified by an inplace operation" in expected.message and not got.error:
            return "lenient", got, expected  # what eager had saved for its backward, we compute again
        if not expected.error:
            # No version counts an edit of `.data`: eager's backward reads what is there then, and its gradients are of
            # no function. Ours may compute again what was there when it was saved.
            with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
                as_saved = run(program, linear, eager, number)
            if same(got, as_saved):
                return "lenient", got, expected
        if not program.whole and not program.pieces:
            return "WRONG", got, expected
        torch._dynamo.reset()
        plain = run(program, linear, without_cce, number)
        torch._dynamo.reset()
    return ("WRONG" if same(plain, expected) else "torch"), got, expected


_head: list[Callable] = []


def deferring_head(large: bool = False, behind: bool = False) -> Callable:
    """A compiled head whose logits are deferred, and are taken for `large` ones, or for those of an eager head."""
    from cce_inductor.deferred import DeferredLogits

    if not _head:
        _head.append(torch.compile(linear, backend="cce", options=OPTIONS))
    made = _head[0](torch.zeros(N, D, requires_grad=True), torch.zeros(V, D))
    assert isinstance(made, DeferredLogits), made

    def head(h: Tensor, w: Tensor) -> Tensor:
        z: Any = _head[0](h, w)
        z.head().large, z.head().eager = large, behind
        return z

    return head


def main() -> None:
    """Runs programs FROM..TO of a kind and prints those that are wrong: pending_programs.py KIND FROM TO."""
    import sys
    from collections import Counter

    kind, start, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    show = "-v" in sys.argv
    tally: Counter[str] = Counter()
    for number in range(start, end):
        program = write(number, kind)
        verdict, got, expected = check(program, number)
        tally[verdict] += 1
        if verdict == "WRONG" or show:
            print(f"---- {kind} {number}: {verdict}\n{program}")
            print(difference(got, expected))
            sys.stdout.flush()
    print(kind, dict(tally))


if __name__ == "__main__":
    main()
