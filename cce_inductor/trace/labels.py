"""Masks of equal labels: which classes of each row they leave out, but for one that they keep.

In a batch of pairs other rows may be of the row's own kind: they are no negatives. Such a mask compares a label of
each row with one of each class, and leaves the positive where it is: ``(a[:, None] == b) & ~eye``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from ..graph import constants, memory, nodes
from ..graph.builder import Builder
from ..graph.facts import Fact
from ..graph.fakes import fake, is_number, is_tensor
from ..graph.memory import written_after
from ..graph.nodes import Op
from ..graph.refusal import Refused
from .marks import COMPARED, mark
from .operands import exact_dtype
from .reasons import LABELS
from .reductions import is_arange
from .shapes import is_row_vector, is_vocabulary_vector, same_shape
from .targets import base, counts, same_classes
from .values import Diagonal, Labels, Value

# What is added to logits to leave them out: from here on the sum is the number itself, but for its rounding.
OUT_OF_SIGHT = -1e9


class Numbers(NamedTuple):
    """What a tensor holds: at the class that is kept, with the row's label or another; at others of it; elsewhere."""

    kept: Any
    kept_of_another: Any
    same: Any
    elsewhere: Any


def _everywhere(number: Any) -> Numbers:
    return Numbers(number, number, number, number)


class Mask:
    """A tensor of the logits' shape that is made of one comparison of labels, and of marks of one class of each row.

    labels: what is compared. kept: the class that is marked; None for none. partial: as of `Mark`.
    """

    def __init__(self, node: Node, value: Value) -> None:
        """Refused for any other tensor."""
        self.node, self.value = node, value
        self.labels: Labels | None = None
        self.kept: Node | Diagonal | None = None
        self.partial = False
        self.numbers = self._read(node)
        if self.labels is None:
            raise Refused(*LABELS)

    @property
    def keeps_itself(self) -> bool:
        """Whether a row is the class of its own number, and so of its own label."""
        labels = self.labels
        assert labels is not None
        return self.value.has_diagonal and base(labels.rows) is base(labels.classes)

    def _read(self, node: Any) -> Numbers:
        if _is_plain(node):
            return _everywhere(node)
        if not is_tensor(node) or not same_shape(node, self.value):
            if is_tensor(node) and (number := constants.number(node)) is not None:
                return _everywhere(number)
            raise Refused(*LABELS)
        edit = memory.only_write(node)
        if edit is None and written_after(node):
            raise Refused(*LABELS)
        op = nodes.read(edit) if edit is not None else None
        return self._made(node) if op is None else self._edited(self._made(node), op)

    def _made(self, node: Node) -> Numbers:
        """What it holds before it is edited."""
        if (found := mark(node, self.value)) is not None:
            self.partial |= found.partial
            if not isinstance(found.at_target, bool):
                constant = found.at_target.terms[0]
                if constant[1]:
                    raise Refused(*LABELS)
                return self._of_kept(found.target, constant[0] + found.at_target.constant, found.elsewhere)
            return self._of_kept(found.target, found.at_target, found.elsewhere)
        if nodes.called(node) == "bool":
            return Numbers(*map(bool, self._read(node.args[0])))
        op = nodes.read(node)
        if op is not None and op.inplace and memory.only_write(op.args["input"]) is node:
            return self._read(op.args["input"])  # the tensor that it has written into
        if op is None or op.inplace:
            raise Refused(*LABELS)
        if op.has(Fact.CONSTANT) and _is_plain(number := op.args["fill_value"]):
            return _everywhere(number)
        if (compared := self._compared(op)) is not None:
            return compared
        if op.name == "scatter":
            return self._edited(self._read(op.args["input"]), op)
        rule = _RULES.get(op.name)
        if rule is None or op.args.get("alpha", 1) != 1 or op.args.get("rounding_mode") is not None:
            raise Refused(*LABELS)
        if fake(node).dtype == torch.bool and op.name in ("cast", "copy"):
            rule = bool
        names = _ARGUMENTS.get(op.name, ("input", "other"))
        return Numbers(*map(rule, *(self._read(op.args[name]) for name in names)))

    def _of_kept(self, target: Node | Diagonal, kept: Any, elsewhere: Any) -> Numbers:
        if self.kept is not None and not same_classes(self.kept, target):
            raise Refused(*LABELS)
        self.kept = target
        return Numbers(kept, kept, elsewhere, elsewhere)

    def _compared(self, op: Op) -> Numbers | None:
        """eq or ne of a label of each row and one of each class."""
        if op.name not in ("eq", "ne"):
            return None
        value = self.value
        for rows, classes in ((op.args["input"], op.args["other"]), (op.args["other"], op.args["input"])):
            if not (is_tensor(rows) and is_tensor(classes)) or not is_row_vector(rows, value) or counts(classes):
                continue
            of_classes = is_vocabulary_vector(fake(classes), value.fake, value.class_dim)
            whole = all(not fake(n).is_floating_point() and not fake(n).is_complex() for n in (rows, classes))
            if of_classes and whole and not written_after(rows) and not written_after(classes):
                found = Labels(rows, classes, len(value.rows))
                if self.labels is not None and found != self.labels:
                    raise Refused(*LABELS)
                self.labels = found
                same = op.name == "eq"
                return Numbers(same, not same, same, not same)
        return None

    def _edited(self, before: Numbers, edit: Op) -> Numbers:
        """What a number written at one class of each row makes of it."""
        if edit.name == "fill_diagonal" and self.value.has_diagonal and _is_plain(edit.args["fill_value"]):
            return self._written(Diagonal(), before, edit.args["fill_value"])
        if edit.name == "scatter" and edit.args.get("reduce") is None and is_row_vector(edit.args["index"], self.value):
            number = edit.args["value"] if edit.args["src"] is None else edit.args["src"]
            if edit.args["dim"] in (self.value.class_dim, self.value.class_dim - self.value.fake.dim()):
                return self._written(edit.args["index"], before, number)
        if edit.name in ("setitem", "masked_fill") and _is_plain(edit.args["value"]):
            index = edit.args["index" if edit.name == "setitem" else "mask"]
            of_rows = isinstance(index, tuple) and len(index) == 2 and all(map(is_tensor, index))
            if of_rows and self.value.fake.dim() == 2 and is_arange(index[0], self.value.lead_shape, 0):
                classes = Diagonal() if counts(index[1]) and self.value.has_diagonal else index[1]
                return self._written(classes, before, edit.args["value"])
            found = mark(index, self.value) if is_tensor(index) and fake(index).dtype == torch.bool else None
            if found is not None and (found.elsewhere, found.at_target) == (False, True):
                self.partial |= found.partial
                return self._written(found.target, before, edit.args["value"])
        raise Refused(*LABELS)

    def _written(self, classes: Node | Diagonal, before: Numbers, number: Any) -> Numbers:
        if not _is_plain(number):
            raise Refused(*LABELS)
        self._of_kept(classes, number, None)
        return before._replace(kept=number, kept_of_another=number)

    def filled(self, builder: Builder, number: float) -> tuple[Node, Node]:
        """Records what the classes that are left out hold, and how many they are, for each row, 1 wide."""
        of_mask = builder.proxy(self.node)
        same = of_mask.bool() if self.numbers.same else of_mask.logical_not()
        count = same.sum(self.value.class_dim, True).to(exact_dtype(self.value))
        return builder.call(torch.full_like, count, number).node, count.node


def left_out(op: Op, value: Value) -> tuple[Mask, float, bool] | None:
    """The mask with which an op leaves out classes of equal labels, what it puts there, and whether it keeps one.

    None for other ops; Refused for other masks.
    """
    args, name = op.args, op.name
    if name == "masked_fill" or name == "setitem":
        mask, number, there = args["mask" if name == "masked_fill" else "index"], args["value"], True
    elif name == "where":
        there = args["other"] is value.node
        mask, number = args["condition"], args["input" if there else "other"]
    elif name in ("add", "sub", "mul") and (args["input"] is value.node or name != "sub"):
        mask, number, there = args["other"] if args["input"] is value.node else args["input"], -math.inf, False
    else:
        return None
    if args.get("alpha", 1) != 1 or (value.kind == "exp") != (name == "mul") or value.picked or value.factor != 1.0:
        return None
    if not is_tensor(mask) or not same_shape(mask, value) or value.class_dim != value.fake.dim() - 1:
        return None
    made = Mask(mask, value)
    found = made.numbers if name != "sub" else Numbers(*map(operator.neg, made.numbers))
    if name in ("add", "sub") and found.same <= OUT_OF_SIGHT:
        number = found.same
    filled: Any = constants.number(number) if is_tensor(number) else number
    same, elsewhere = {"mul": (0, 1), "add": (number, 0), "sub": (number, 0)}.get(name, (there, not there))
    # Of a row's own class it is known that it has the row's label.
    itself = made.keeps_itself and not isinstance(made.kept, Node)
    known = itself or (made.kept is not None and found.kept == found.kept_of_another)
    keeps = found.kept == elsewhere
    fits = (found.same, found.elsewhere) == (same, elsewhere) and (keeps or found.kept == same)
    if not known or not fits or (made.partial and not keeps) or not is_number(filled) or not filled < math.inf:
        raise Refused(*LABELS)
    return made, float(filled), keeps


def log_count(number: Any, count: Any) -> Any:
    """The log-sum-exp of so many equal numbers, recorded: -inf of none."""
    return number.masked_fill(count.eq(0), -math.inf) + count.log()


def _is_plain(number: Any) -> bool:
    return isinstance(number, (bool, int, float))


_RULES: dict[str, Callable[..., Any]] = {
    "and": lambda a, b: bool(a) and bool(b),
    "or": lambda a, b: bool(a) or bool(b),
    "xor": lambda a, b: bool(a) != bool(b),
    "not": operator.not_,
    "neg": operator.neg,
    "add": operator.add,
    "sub": operator.sub,
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a and b if isinstance(a, bool) and isinstance(b, bool) else 0 if 0 in (a, b) else a * b,
    "cast": lambda a: a,
    "copy": lambda a: a,
    "detach": lambda a: a,
    "masked_fill": lambda a, mask, number: number if mask else a,
    "where": lambda mask, a, b: a if mask else b,
    **COMPARED,
}
_ARGUMENTS = {
    **dict.fromkeys(("not", "neg", "cast", "copy", "detach"), ("input",)),
    "masked_fill": ("input", "mask", "value"),
    "where": ("condition", "input", "other"),
}
