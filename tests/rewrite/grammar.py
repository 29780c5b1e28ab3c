"""Random programs from a grammar: operands, a head, steps between, statistics, escapes.

A program is Python source: a failure prints as a function that a person can run. It is written a line at a time, and
each line runs as it is written, on real tensors: shapes are read, not predicted, and a line that eager refuses is taken
back. The logits are always called `z` and have their classes along dimension `c`; the targets `t` have the shape of the
other dimensions, and every step that rearranges the rows of `z` does the same to `t`.

A program is made from choices, each the name of a production and a seed, so that a shorter one that still fails can be
found by leaving some out (`shrink`). The productions are in `productions`.
"""

import ast
import contextlib
import linecache
import math
import random
import re
import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

IGNORED = -100
VERDICTS = ("fuse", "may", "barrier")


class Inapplicable(Exception):
    """A production does not fit what is written so far."""


@dataclass(frozen=True)
class Production:
    """One way to write one part. weight: how often, against 1.

    verdict: "fuse" where the logits can still be left out; "may" where nobody promises it; "barrier" where nothing of
    this head can have a fused form.
    """

    part: str
    name: str
    write: Callable[["Draft"], None]
    verdict: str
    weight: float


GRAMMAR: dict[str, dict[str, Production]] = {part: {} for part in ("operand", "head", "between", "statistic", "escape")}


def production(part: str, name: str, verdict: str = "fuse", weight: float = 1.0) -> Callable:
    """Registers a function that writes its part into a draft."""

    def register(write: Callable[["Draft"], None]) -> Callable[["Draft"], None]:
        assert name not in GRAMMAR[part], f"two productions are called {name!r}"
        GRAMMAR[part][name] = Production(part, name, write, verdict, weight)
        return write

    return register


def spelling(part: str, name: str, *lines: str, verdict: str = "fuse", weight: float = 1.0) -> None:
    """A production that is a few lines of text."""
    production(part, name, verdict, weight)(lambda d: d.write(*lines))


# ---- inputs: what a name stands for in every program; a program's parameters are the names that it reads


@dataclass(frozen=True)
class Sizes:
    """Batch, sequence, width, vocabulary, and how many columns at its end no target names."""

    b: int
    s: int
    d: int
    v: int
    spare: int


# With a vocabulary for which logits are deferred.
DEFERRED = Sizes(b=2, s=5, d=4, v=40, spare=2)


def _normal(*shape: int) -> Callable:
    return lambda g, dtype: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def _uniform(*shape: int) -> Callable:
    return lambda g, dtype: (torch.rand(shape, generator=g, dtype=torch.float64) + 0.5).to(dtype).requires_grad_()


def _labels(n: Sizes, ignored: bool) -> Callable:
    def make(g: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
        t = torch.randint(0, n.v - n.spare, (n.b, n.s), generator=g)
        return torch.where(torch.rand(n.b, n.s, generator=g) < 0.3, IGNORED, t) if ignored else t

    return make


def _narrow(make: Callable, dtype: torch.dtype) -> Callable:
    return lambda g, _: make(g, torch.float64).detach().to(dtype).requires_grad_()


def inputs(n: Sizes, ignored: bool) -> dict[str, Callable[[torch.Generator, torch.dtype], torch.Tensor]]:
    """Every name a program may read, and what draws its tensor."""
    return {
        "h": _normal(n.b, n.s, n.d),
        "h2": _normal(n.b, n.s, n.d),
        "w": _normal(n.v, n.d),
        "w2": _normal(n.v, n.d),
        "wt": _normal(n.d, n.v),
        "few": _normal(2, n.d),
        "w_long": _normal(n.v + 2, n.d),
        "w_wide": _normal(n.v, n.d + 2),
        "w_cube": _normal(n.v, 1, n.d),
        "w_narrow": _narrow(_normal(n.v, n.d), torch.float16),
        "w_codes": lambda g, _: torch.randint(-127, 128, (n.v, n.d), generator=g, dtype=torch.int8),
        "gain": _uniform(n.v, 1),
        "gain_d": _uniform(n.d),
        "down": _normal(2, n.d),
        "up": _normal(n.v, 2),
        "mix": _normal(n.d, n.d),
        "rows_of_w": lambda g, _: torch.randperm(n.v + 2, generator=g)[: n.v],
        "b": _normal(n.v),
        "b2": _normal(n.v),
        "temperature": _uniform(),
        "temperature1": _uniform(1),
        "class_weight": lambda g, dtype: _uniform(n.v)(g, dtype).detach(),
        "pad": lambda g, _: torch.arange(n.v) >= n.v - n.spare,
        "columns": lambda g, _: torch.randperm(n.v, generator=g),
        "t": _labels(n, ignored),
        "t2": _labels(n, False),
        "advantage": lambda g, dtype: _normal(n.b, n.s)(g, dtype).detach(),
    }


def names(source: str) -> set[str]:
    """The variables that some lines read or write."""
    return {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}


@dataclass(frozen=True)
class Choices:
    """All that a program is made from: the seed of its sizes and tensors, their dtype, and (part, name, seed) steps."""

    seed: int
    dtype: torch.dtype
    steps: tuple[tuple[str, str, int], ...] = ()


_MODULES: dict[str, Any] = {"torch": torch, "F": F, "math": math}


@dataclass(frozen=True)
class Program:
    """Source of a function ``program``, and the tensors of its parameters, by name."""

    source: str
    choices: Choices
    tensors: dict[str, torch.Tensor]
    verdict: str

    def function(self, called: str = "program", **beside: Any) -> Callable:
        """The function, with its source where tracebacks (and Dynamo's stack traces) look for it.

        beside: what else it may call.
        """
        name = f"<program {hash(self.source) & 0xFFFFFFFF:08x}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        namespace: dict[str, Any] = _MODULES | beside
        exec(compile(self.source, name, "exec"), namespace)
        return namespace[called]

    def with_head_apart(self, compile: Callable, rest_compiled: bool = False) -> Callable:
        """The function, with the product that gives the logits in one of its own, which ``compile(fn)`` compiles.

        rest_compiled: whether what follows the product is in another one, which is compiled too.
        """
        lines = self.source.splitlines()
        at = next(i for i, line in enumerate(lines) if line.strip().startswith("z = "))
        known = {*self.tensors, *names("\n".join(line.strip() for line in lines[1:at]))}
        made, behind = lines[at].strip()[4:], lines[at + 1 :]
        read = ", ".join(sorted(names(made) & known - {"z", *_MODULES}))
        beside: dict[str, Any] = {"head": compile(self._part("head", read, [f"    return {made}"]))}
        if rest_compiled:
            given = ", ".join(sorted({"z", *names(textwrap.dedent("\n".join(behind)).replace("return ", "")) & known}))
            beside["rest"] = compile(self._part("rest", given, behind))
            behind = [f"    return rest({given})"]
        source = "\n".join([*lines[:at], f"    z = head({read})", *behind]) + "\n"
        return Program(source, self.choices, {}, self.verdict).function(**beside)

    def _part(self, name: str, parameters: str, lines: list[str]) -> Callable:
        source = f"def {name}({parameters}):\n" + "\n".join(lines) + "\n"
        return Program(source, self.choices, {}, self.verdict).function(name)

    def arguments(self) -> list[torch.Tensor]:
        """Fresh copies of the tensors: a program may write into what it is given."""
        return [t.detach().clone().requires_grad_(t.requires_grad) for t in self.tensors.values()]

    def __str__(self) -> str:
        shapes = ", ".join(f"{k}: {str(t.dtype)[6:]}{list(t.shape)}" for k, t in self.tensors.items())
        return f"# {shapes}\n# {self.choices}\n{self.source}"


class Draft:
    """A program that is being written, with the values of its variables so far."""

    def __init__(self, choices: Choices, sizes: Sizes | None = None):
        rng = random.Random(choices.seed)
        b, s, d = rng.randint(1, 3), rng.randint(1, 5), rng.randint(2, 5)
        # A vocabulary as large as another dimension is where a shape alone does not tell the classes.
        v = max(5, rng.choice([7, 11, 11, 13, b * s, s, d + 3, 2 * s]))
        ignored = rng.random() < 0.4
        self.sizes = sizes or Sizes(b, s, d, v, rng.choice([0, 2]))
        self.largest = max(4096, 8 * self.sizes.b * self.sizes.s * self.sizes.v)
        self.dtype = choices.dtype
        self.rng = rng
        self.c = 2
        self.lines: list[str] = []
        self.results: list[str] = []
        self.steps: list[tuple[str, str, int]] = []
        self.choices = choices
        self.verdict = "fuse"
        generator = torch.Generator().manual_seed(choices.seed)
        self.inputs = {k: make(generator, self.dtype) for k, make in inputs(self.sizes, ignored).items()}
        self.env: dict[str, Any] = dict(_MODULES)
        self.env.update((k, t.detach().clone().requires_grad_(t.requires_grad)) for k, t in self.inputs.items())

    @property
    def z(self) -> torch.Tensor:
        return self.env["z"]

    @property
    def t(self) -> torch.Tensor:
        return self.env["t"]

    @property
    def rank(self) -> int:
        return self.z.dim()

    @property
    def v(self) -> int:
        return self.z.shape[self.c]

    @property
    def last(self) -> bool:
        """Whether the classes are the last dimension."""
        return self.c == self.rank - 1

    def axis(self, row: int) -> int:
        """The dimension of `z` that is dimension `row` of `t`."""
        return row if row < self.c else row + 1

    def row(self, least: int = 1) -> int:
        """One of the dimensions of `t`, at random, of a size of at least `least`."""
        found = [k for k, n in enumerate(self.t.shape) if n >= least]
        self.need(bool(found))
        return self.rng.choice(found)

    def need(self, condition: bool) -> None:
        if not condition:
            raise Inapplicable

    def pick(self, *texts: Any) -> Any:
        return self.rng.choice(texts)

    def write(self, *lines: str) -> None:
        """Appends lines, and runs them."""
        for line in lines:
            try:
                exec(line, self.env)
            except Exception as error:  # what eager refuses, no program has
                raise Inapplicable(f"{line}: {error}") from error
            self.lines.append(line)

    def both(self, of_logits: str, of_targets: str, c: int | None = None) -> None:
        """A step that rearranges rows: expressions of `z` and `t`. `c`: where the classes are then."""
        self.write(f"z = {of_logits}", f"t = {of_targets}")
        self.c = self.c if c is None else c

    def at(self, row: int, what: str) -> str:
        """``[:, what]`` for dimension `row` of the logits, in one of its spellings."""
        k = self.axis(row)
        return self.pick(f"[{':, ' * k}{what}]", f"[..., {what}{', :' * (self.rank - k - 1)}]")

    def along(self, vector: str) -> str:
        """A (V,) tensor shaped so that it lies along the classes."""
        behind = self.rank - self.c - 1
        return f"{vector}.view({', '.join(['-1'] + ['1'] * behind)})" if behind else vector

    def result(self, expression: str) -> None:
        """Another thing that the program returns."""
        name = f"r{len(self.results)}"
        self.write(f"{name} = {expression}")
        self.results.append(name)

    def _check(self) -> None:
        """What every production must leave behind."""
        rows = list(self.z.shape)
        v = rows.pop(self.c)
        assert list(self.t.shape) == rows, f"rows {rows}, targets {list(self.t.shape)}:\n" + "\n".join(self.lines)
        self.need(0 < self.z.numel() <= self.largest and int(self.t.max()) < v)

    def apply(self, part: str, name: str, seed: int) -> None:
        """Writes one production, or raises Inapplicable and leaves the draft as it was."""
        found = GRAMMAR[part][name]
        lines, env, results, c = list(self.lines), dict(self.env), list(self.results), self.c
        tensors = [(x, x.detach().clone()) for x in env.values() if isinstance(x, torch.Tensor)]
        self.rng = random.Random(seed)
        try:
            found.write(self)
            if "z" in self.env:
                self._check()
        except Inapplicable:
            self.lines, self.env, self.results, self.c = lines, env, results, c
            if any(not torch.equal(x.nan_to_num(), old.nan_to_num()) for x, old in tensors):
                raise Spoilt from None
            raise
        self.verdict = max(self.verdict, found.verdict, key=VERDICTS.index)
        self.steps.append((part, name, seed))

    def program(self) -> Program:
        body = [*self.lines, f"return {', '.join(self.results)},"]
        read = names("\n".join(self.lines))
        parameters = [name for name in self.inputs if name in read]
        source = f"def program({', '.join(parameters)}):\n" + "".join(f"    {line}\n" for line in body)
        choices = Choices(self.choices.seed, self.dtype, tuple(self.steps))
        return Program(source, choices, {n: self.inputs[n] for n in parameters}, self.verdict)


class Spoilt(Exception):
    """A line failed after another had changed a tensor in place: the draft is of no use any more."""


def _chosen(part: str, rng: random.Random, only: Collection[tuple[str, str]] | None) -> str:
    found = [p for p in GRAMMAR[part].values() if only is None or (part, p.name) in only]
    return rng.choices(found, [p.weight for p in found])[0].name


def _parts(rng: random.Random) -> list[str]:
    """What a program consists of, in order."""
    parts = ["operand"] * rng.choice([0, 0, 0, 1, 1, 2]) + ["head"]
    parts += ["between"] * rng.choice([0, 1, 1, 2, 2, 3, 4, 5])
    parts += rng.choice([["statistic"]] * 5 + [["statistic", "statistic"], ["statistic", "between", "statistic"]])
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        parts.insert(rng.randint(parts.index("head") + 1, len(parts)), "escape")
    return parts


def generate(
    seed: int,
    dtype: torch.dtype = torch.float64,
    only: Collection[tuple[str, str]] | None = None,
    sizes: Sizes | None = None,
) -> Program:
    """The program of a seed: always the same one.

    only: the (part, name) of the productions to use; None: all. sizes: by the seed where it is None.
    """
    rng = random.Random(seed)
    while True:
        draft = Draft(Choices(rng.getrandbits(30), dtype), sizes)
        try:
            for part in _parts(rng):
                for _ in range(30):
                    with contextlib.suppress(Inapplicable):
                        draft.apply(part, _chosen(part, rng, only), rng.getrandbits(30))
                        break
        except Spoilt:
            continue
        if any(part == "statistic" for part, _, _ in draft.steps):
            return draft.program()


def alone(
    part: str,
    name: str,
    forms: int = 1,
    beside_a_loss: bool = False,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Program]:
    """Programs in which one production stands in the plainest surroundings, by its text: up to so many forms of it."""
    head = ("head", "F.linear with bias" if name.startswith("bias") else "F.linear")
    loss = ("statistic", "cross_entropy")
    needs = {
        "squeeze": "unsqueeze",
        "view with more dimensions": "view(-1, V)",
        "cross_entropy, classes in dimension one": "view(-1, V)",
    }
    needs |= dict.fromkeys((n for n in GRAMMAR[part] if n.startswith("the diagonal")), "view(-1, V)")
    in_front = [("between", needs[name])] if name in needs else []
    itself = (part, name)
    steps = {
        "operand": [itself, head, loss],
        "head": [itself, loss],
        "between": [head, *in_front, itself, loss],
        "statistic": [head, *in_front, *([loss] if beside_a_loss else []), itself],
        "escape": [head, loss, itself],
    }[part]
    found: dict[str, tuple[str, Program]] = {}
    for seed in range(100):
        draft = Draft(Choices(seed, dtype), sizes)
        text = ""
        try:
            for step in steps:
                before = len(draft.lines)
                draft.apply(*step, seed)
                if step == itself:
                    text = "; ".join(draft.lines[before:])
        except (Inapplicable, Spoilt):
            continue
        found.setdefault(re.sub(r"\d+", "1", text), (text, draft.program()))  # other sizes make no other form
        if len(found) == forms:
            break
    return dict(found.values())


def replay(choices: Choices) -> Program | None:
    """The program of some choices, without those that do not fit; None where nothing is left to return."""
    draft = Draft(choices)
    try:
        for part, name, seed in choices.steps:
            with contextlib.suppress(Inapplicable):
                draft.apply(part, name, seed)
    except (Spoilt, KeyError):  # KeyError: no head, no logits
        return None
    return draft.program() if draft.results else None


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """A shorter program that still fails: choices are left out one at a time, as long as that helps."""
    shorter = True
    while shorter:
        shorter = False
        for i in reversed(range(len(program.choices.steps))):
            steps = program.choices.steps[:i] + program.choices.steps[i + 1 :]
            candidate = replay(Choices(program.choices.seed, program.choices.dtype, steps))
            if candidate is not None and len(candidate.choices.steps) < len(program.choices.steps) and fails(candidate):
                program, shorter = candidate, True
    return program
