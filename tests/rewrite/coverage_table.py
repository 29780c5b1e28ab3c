"""docs/coverage.md: which spellings and which models fuse. `make coverage` writes it, the slow tests compare it.

Each production of the grammar stands in a program that is plain otherwise. The families are those of the model matrix,
whose tests hold them to what is said of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import productions  # noqa: F401 - fills the grammar
from against_eager import Outcome, outcome
from grammar import DEFERRED, GRAMMAR, alone
from peaks import LOGITS, SIZES, peak, program

DOCUMENT = Path(__file__).parents[2] / "docs" / "coverage.md"
FORMS = 3
OUTSIDE = ("head", "between", "statistic")  # where the loss may be elsewhere than the head
FUSED = "fused"

HEADINGS = {
    "operand": ("Operands", "In front of the head `z = F.linear(h, w)`."),
    "head": ("Heads", "`h` has the shape (B, S, D), `w` (V, D), `wt` (D, V)."),
    "between": (
        "Between head and loss",
        "`z` are the logits; the targets `t` follow where rows are rearranged.",
    ),
    "statistic": (
        "Losses and statistics",
        "`zf` and `tf` are logits and targets of flat rows, `s` the targets without -100.",
    ),
    "escape": ("Logits that are returned", "Beside a loss. They are deferred: computed when they are read."),
}

INTRODUCTION = """\
# What fuses

`make coverage` writes this file: it runs each spelling below in a program that is plain otherwise, and says what the
pass made of it. Beside it stands what becomes of the same program where only the head is compiled: `outside`, where the
rest is called on its deferred logits, and `apart`, where it is compiled by itself. "read" means that the logits were
computed. The tests compose programs of these spellings at random and compare them with eager mode, fused or not
(`tests/rewrite/test_property.py`). What is declined stays as it was, with eager's results.
"""


@dataclass(frozen=True)
class Spelling:
    """A production of the grammar, its forms, and what became of it: "fused", or why not.

    elsewhere: the same where the head is compiled alone, with the rest called on its logits, and compiled apart.
    """

    part: str
    name: str
    forms: tuple[str, ...]
    result: str
    elsewhere: tuple[str, ...] = ()

    def row(self) -> str:
        code = "<br>".join(f"`{form}`".replace("|", "\\|") for form in self.forms)
        return f"| {self.name} | {code} | {' | '.join((self.result, *self.elsewhere))} |"


def spelling(part: str, name: str, outside: bool = False) -> Spelling:
    """Runs the forms of one production; outside: in the loop of a compiled head too."""
    results = {text: _verdict(outcome(program)) for text, program in alone(part, name, FORMS).items()}
    elsewhere: tuple[str, ...] = ()
    if outside and part in OUTSIDE:
        programs = alone(part, name, FORMS, sizes=DEFERRED).values()
        elsewhere = tuple(
            _numbered([_verdict_outside(outcome(program, apart=True, rest_compiled=compiled)) for program in programs])
            for compiled in (False, True)
        )
    if part == "statistic" and set(results.values()) == {NOTHING}:
        beside = {_verdict(outcome(program)) for program in alone(part, name, FORMS, beside_a_loss=True).values()}
        if beside == {FUSED}:
            return Spelling(part, name, tuple(results), f"{FUSED} beside a loss", elsewhere)
    return Spelling(part, name, tuple(results), _numbered(list(results.values())), elsewhere)


def _numbered(results: list[str]) -> str:
    """What became of the forms of a production: of each by its number, where it is not the same."""
    if len(set(results)) == 1:
        return results[0]
    return "<br>".join(f"{i}. {result}" for i, result in enumerate(results, 1))


def _verdict_outside(result: Outcome | None) -> str:
    if result is None:
        return "-"
    if result.wrong:
        return f"WRONG: {result.wrong}"
    if result.whole:
        return FUSED
    if not result.declined:
        return "not deferred"
    return ": ".join(["read", *result.reasons[:1]])


NOTHING = "no loss: nothing is looked for"


def _verdict(result: Outcome | None) -> str:
    assert result is not None, "eager refuses a plain program"
    if result.wrong:
        return f"WRONG: {result.wrong}"
    if result.whole:
        return FUSED
    if not result.fused and not result.declined:
        return NOTHING
    return "declined: " + "; ".join(dict.fromkeys(result.reasons))


def spellings(outside: bool = False) -> Iterator[Spelling]:
    """Every production, run."""
    for part, named in GRAMMAR.items():
        for name in named:
            yield spelling(part, name, outside)


def fusing() -> set[tuple[str, str]]:
    """The (part, name) of the productions that fuse in all their forms, as the document has them."""
    found, parts = set(), {heading: part for part, (heading, _) in HEADINGS.items()}
    part = ""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("## "):
            part = parts.get(line[3:], "")
        cells = line.strip("| ").split(" | ")
        if part and cells[2:3] == [FUSED] and cells[0] in GRAMMAR[part]:
            found.add((part, cells[0]))
    return found


def memory() -> list[str]:
    """The table of what each fused loss takes at its peak, against plain torch.compile, in logits tensors."""
    lines = ["## Memory\n", MEMORY, "| | plain torch.compile | ours |", "|---|---:|---:|"]
    fused = fusing()
    for name in GRAMMAR["statistic"]:
        of = program("statistic", name) if ("statistic", name) in fused else None
        if of is not None:
            lines.append(f"| {name} | {peak(of, False) / LOGITS:.2f} | {peak(of, True) / LOGITS:.2f} |")
    return [*lines, ""]


MEMORY = f"""\
The peak of a loss and its gradients above the operands, in tensors of the size of the logits,
{SIZES.b * SIZES.s} x {SIZES.v} in fp32, counted with `aot_eager` behind both. Scratch is never more
than the logits that are saved, whatever `workspace_mb` says, and `tests/rewrite/test_peaks.py` holds
every loss to at most plain's peak.
"""


def document() -> str:
    """The text of docs/coverage.md."""
    import models  # needs transformers, which those who only ask what is fusing may not have

    found = list(spellings(outside=True))
    lines = [INTRODUCTION]
    for part, (heading, about) in HEADINGS.items():
        rows = [one for one in found if one.part == part]
        fused = sum(one.result.startswith(FUSED) for one in rows)
        columns = ["", "as written", "", *(("outside", "apart") if part in OUTSIDE else ())]
        count = f"{fused} of {len(rows)} fuse"
        for i, where in enumerate(columns[3:]):
            count += f", {sum(one.elsewhere[i] == FUSED for one in rows)} {where}"
        lines += [f"## {heading}\n", f"{about} {count}.\n"]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [*(one.row() for one in rows), ""]
    lines += memory()
    lines += ["## Hugging Face models\n", FAMILIES, "| family | class | between head and loss | graphs | losses |"]
    lines += ["|---|---|---|---|---|"]
    for name, family in models.FAMILIES.items():
        losses = f"{family.fused} fused" if family.fused else f"{family.declined} declined: {family.reason}"
        lines.append(f"| {name} | `{family.model}` | {family.tail} | {family.graphs} | {losses} |")
    return "\n".join(lines) + "\n"


FAMILIES = """\
Tiny random configurations, `tests/test_models.py`: loss and gradients are eager's, no tensor as large as the logits is
made in forward and backward, and the logits that the model returns are deferred. Graphs are PyTorch's own.
"""

if __name__ == "__main__":
    print(document(), end="")
