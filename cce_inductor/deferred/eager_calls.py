"""Losses and statistics that are called eagerly on pending logits.

The call becomes a graph of its own, with the head in front of it, which the pass rewrites; what comes out is run by the
eager implementation of the operators. A loss that comes often is compiled (`often`).

Such a statistic of the rows is a log-sum-exp, the entry of one class, the largest one, an entropy. Those of the same
rows come from one product with the weight (`shared`). If logits that are not large (`trace.heads`) are read in the
end, that product was one too many: the next time they are read at once.
"""

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..graph.spellings import FUNCTIONS, METHODS, functions_of
from ..ops.library import FORWARD
from ..rewrite.recipe import Logits
from ..rewrite.result import Rewritten
from .autograd import Largest, Rows, defer
from .calls import (
    ByClasses,
    Call,
    Fakes,
    NotTriedError,
    Pending,
    are_plain,
    by_classes,
    in_form,
    same_classes,
    tensor_of,
    with_numbers,
)
from .entries import Entries
from .gradient import behind, gradients
from .lazy import WRITTEN
from .mixtures import Spread
from .often import Kernels
from .other_graphs import Form, usable
from .pending import Known, Recipe
from .shared import Shared, share
from .steps import Extra, Joint, Read, Step, autocast_now
from .tensor import COMPARISONS, LOSSES, ROWS, STATISTICS, DeferredLogits

log = logging.getLogger(__name__)

aten = torch.ops.aten

_MAX, _TOPK, _KL_DIV = functions_of("max"), functions_of("topk"), functions_of("kl_div")


# So many graphs that differ in nothing but a number.
_NUMBERS = 8


@dataclass
class EagerCalls:
    """Computes what is called eagerly on pending logits: the ``fuse`` of :func:`defer`.

    loss, statistic: they rewrite the graph of one call by the settings of the compilation that deferred the logits; the
    former records what became of the loss. kernels: what compiles calls that come often, if anything does. known: what
    came out, for the next call of the same kind: a function, or None where the call is not fused. of_rank: the same
    logits for another number of dimensions, as one object each, so that calls of one kind have one recipe. capacity: of
    how many kinds something is known; they are shapes as a rule. numbers: by what calls do but for the numbers in it,
    which numbers graphs have been made for. One that is another each time, such as an annealed temperature, would make
    a graph each time.
    reads: whether logits that are not large were read after a statistic of theirs had been computed without
    them, for which that was one product too many: from then on they are read at once.
    """

    loss: Callable[[Form], Rewritten]
    statistic: Callable[[Form], Rewritten]
    kernels: Kernels | None = None
    known: OrderedDict[Any, Callable | None] = field(default_factory=OrderedDict)
    of_rank: dict[tuple[Logits, int], Logits] = field(default_factory=dict)
    capacity: int = 256
    numbers: dict[Any, set] = field(default_factory=lambda: defaultdict(set))
    reads: bool = False

    def __call__(self, logits: DeferredLogits, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """``call(*args, **kwargs)``, in eager's shape and dtype, or NotImplemented where it has to read the logits.

        Raises :class:`DeferredLogitsError` if these could be wrong by now.
        """
        if call is Tensor.__getitem__ and not any(isinstance(i, Tensor) for i in tree_leaves(args[1])):
            return NotImplemented  # a view
        head, given = logits.head(), (args, kwargs)
        trains = logits.requires_grad and torch.is_grad_enabled()
        if not head.large and ((call not in LOSSES and self.reads) or (call in ROWS and not trains)):
            log.info("deferred logits are read for %s: they are small, and would be read in the end", call.__name__)
            return NotImplemented
        if call in _TOPK and trains:
            return self._largest(logits, call, args, kwargs)
        if call in COMPARISONS or call in LOSSES:
            args, kwargs = tree_map(lambda x: by_classes(x, logits), (args, kwargs))
        others = [x for x in map(tensor_of, tree_leaves((args, kwargs))) if x is not None and x is not logits]
        second = next((x for x in others if call in COMPARISONS and isinstance(x, DeferredLogits)), None)
        others = [x for x in others if x is not second]
        if not are_plain(others):
            return NotImplemented
        if call in _KL_DIV and not _has_pending_target(call, args, kwargs):
            return NotImplemented
        first = self._reached(logits)
        if first is None:
            return NotImplemented
        # Those whose gradient somebody waits for.
        waiting = [z for z in (logits, second) if z is not None and z.waits]
        if waiting and call in STATISTICS and any(t.requires_grad for t in others):
            return NotImplemented
        shared = head.shared.of(first.operands, self.kernels.forward if self.kernels else FORWARD)
        first = self._of_rows(first)
        if call in ROWS:
            index = _rows_and_classes(args[1], logits) if call is Tensor.__getitem__ else None
            if index is not None:
                return self._entries_at(logits, *index)
            return _rows_of(logits, call, args, kwargs) if waiting else self._taken(first, call, args, kwargs)
        pending = [first]
        if second is not None:
            beside = self._reached(second)
            if beside is None:
                return NotImplemented
            pending.append(self._of_rows(beside))
        same = same_classes(first.operands[first.recipe.reads :], others) if second is None else ()
        found = self._function(Call(call, pending, args, kwargs, same))
        if found is None:
            return NotImplemented
        if call in STATISTICS and not head.large:
            head.on_read = self._was_read
        tensors = (*(t for p in pending for t in p.operands), *others)
        run = partial(self._run, *found, shared)
        if waiting:
            own = [t for p in pending if any(p.logits is z for z in waiting) for t in p.operands]
            made = _behind(waiting, own, run, tensors, call, *given)
        else:
            made = run(*tensors)
        if call in STATISTICS:
            _remember(logits, call, args, kwargs, made)
        return made

    def _run(self, call: Call, compute: Callable, shared: Shared, *tensors: Tensor) -> Any:
        """What a call gives, from the operands of its logits and its other tensors: by kernels if it came often."""
        compiled = None
        if self.kernels is not None and call.function not in STATISTICS:
            compiled = self.kernels.of_loss(call, tensors)
        return in_form(call.function, compute(shared, *tensors) if compiled is None else compiled(*tensors))

    def _function(self, call: Call) -> tuple[Call, Callable] | None:
        """What computes calls of this kind, known or made now, and the call as it takes it; None where it is not fused.

        A number in a tensor beside the logits is an input of the graph. If no loss is found so, it is one with that
        number: the weight of a mixture has to be known.
        """
        compute = self._of_kind(call)
        if compute is None and any(p.recipe.other is not None for p in call.pending):
            numbered = [replace(p, recipe=with_numbers(p.recipe, p.operands)) for p in call.pending]
            if [p.recipe for p in numbered] != [p.recipe for p in call.pending]:
                call = replace(call, pending=numbered)
                compute = self._of_kind(call)
        return None if compute is None else (call, compute)

    def _of_kind(self, call: Call) -> Callable | None:
        kind = call.kind
        try:
            hash(kind)
        except TypeError:  # an argument without a hash, such as a list
            return None
        if kind not in self.known:
            first, spreads = call.pending[0], [x.spread for x in call.args if isinstance(x, ByClasses)]
            if self._has_too_many_numbers(first.recipe, first.logits, call.function, spreads):
                return None
            try:
                self.known[kind] = self._make(call)
            except NotTriedError:
                return None  # the next call may be right, or what it lacked may be there
            if len(self.known) > self.capacity:
                self.known.popitem(last=False)
        self.known.move_to_end(kind)
        return self.known[kind]

    def _reached(self, logits: DeferredLogits) -> Pending | None:
        """Logits with what they follow from, if they can be put into a graph; None for others.

        Raises :class:`DeferredLogitsError` if an operand has changed: then they could not be read either.
        """
        recipe = usable(logits, torch.is_grad_enabled())
        operands = () if recipe is None else logits.operands()
        return Pending(logits, recipe, operands) if recipe is not None and are_plain(operands) else None

    def _has_too_many_numbers(
        self, recipe: Recipe, logits: DeferredLogits, call: Callable, spreads: Sequence[Spread]
    ) -> bool:
        numbers: list[Any] = [*spreads]
        steps = _without_numbers(recipe.steps, numbers)
        seen = self.numbers[call, steps, logits.shape]
        seen.add(tuple(numbers))
        if len(seen) > _NUMBERS:
            log.info("deferred logits are read for %s: a number in it is another one each time", call.__name__)
        return len(seen) > _NUMBERS

    def _largest(self, logits: DeferredLogits, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The largest logits and their classes: the former pending, as most programs ask for the latter only."""
        if not args:
            return NotImplemented
        detached: Any = logits.detach()
        made = self(detached, call, (detached, *args[1:]), kwargs)
        if made is NotImplemented or 2 * made[1].numel() > logits.numel():
            return NotImplemented
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        with torch._C.DisableTorchFunctionSubclass():
            return torch.return_types.topk((Largest.apply(logits, dim, made[1]), made[1]))

    def _was_read(self) -> None:
        self.reads = True

    def _of_rows(self, given: Pending) -> Pending:
        """The same logits, with their rows viewed and cut before the head.

        One graph then serves all pieces of one shape, where a program goes through the logits piece by piece.
        """
        recipe, classes = given.recipe, given.logits.whole_shape()[-1]
        compute, (hidden, *rest) = recipe.compute, given.operands
        assert isinstance(compute, Logits)
        if compute.class_dim != compute.rank - 1 or any(t.dim() > 1 for t in rest[1:]) or recipe.other is not None:
            return given
        rows, left = hidden, list(recipe.steps)
        for step in recipe.steps:
            if _is_entrywise(step):
                continue
            if isinstance(step, Joint):
                break
            if step.op in (aten.view.default, aten._unsafe_view.default) and step.args[0][-1:] == (classes,):
                rows = rows.reshape(*step.args[0][:-1], hidden.shape[-1])
            elif step.op in (aten.slice.Tensor, aten.select.int) and (*step.args, 0)[0] % rows.dim() < rows.dim() - 1:
                rows = step(rows)
            else:
                break
            left.remove(step)
        compute = self._with_rank(compute, rows.dim())
        recipe = replace(recipe, compute=compute, steps=tuple(left), offset=0)
        return replace(given, recipe=recipe, operands=(rows, *rest))

    def _with_rank(self, compute: Logits, rank: int) -> Logits:
        """The same logits, of hidden states with so many dimensions."""
        known = (compute, rank)
        if known not in self.of_rank:
            self.of_rank[known] = replace(compute, rank=rank, class_dim=rank - 1)
        return self.of_rank[known]

    def _entries_at(self, logits: DeferredLogits, rows: Tensor, classes: Tensor) -> Any:
        """``logits[rows, classes]`` of (N, V) logits, or NotImplemented: a class of each row, or K of every one."""
        classes = torch.where(classes < 0, classes + logits.shape[1], classes)  # a negative one counts from the end
        one = classes.dim() == 1
        if len(rows) == len(logits) and torch.equal(rows.flatten(), torch.arange(len(rows), device=rows.device)):
            made = self(logits, Tensor.gather, (logits, -1, classes[:, None] if one else classes), {})
            return made.squeeze(-1) if one and made is not NotImplemented else made
        if not one:
            return NotImplemented
        taken = logits[rows]
        made = taken.gather(-1, classes[:, None]).squeeze(-1)
        if logits._value.pending:
            like = logits.size(), logits.stride(), logits.storage_offset()
            values = made.detach().clone()
            logits._value.memory.entries.append(Entries(*like, -1, classes.clone(), values, rows.clone()))
        return made

    def _taken(self, given: Pending, call: Callable, args: Any, kwargs: Any) -> Any:
        """Rows of the logits, by a tensor: pending logits of those rows of the hidden states, or NotImplemented."""
        logits, recipe, operands = given.logits, given.recipe, given.operands
        (hidden, weight, *others), extras = operands[: recipe.reads], operands[recipe.reads :]
        compute = recipe.compute
        assert isinstance(compute, Logits)
        whole = compute.class_dim == compute.rank - 1 and all(map(_is_entrywise, recipe.steps))
        whole &= all(t.dim() <= 1 for t in (*others, *extras))  # a second head has rows too
        whole &= recipe.other is None
        if not whole or hidden.shape[:-1] != logits.shape[:-1] or not _of_leading(hidden.dim() - 1, call, args, kwargs):
            return NotImplemented
        rows = call(hidden, *args[1:], **kwargs)
        shape = (*rows.shape[:-1], logits.whole_shape()[-1])
        taken: Any = defer(
            self._with_rank(compute, rows.dim()),
            (rows, weight, *others),
            shape=shape,
            dtype=logits.whole_dtype(),
            requires_grad=logits.requires_grad and torch.is_grad_enabled(),
            fuse=self,
            large=logits.head().large,
            alone=logits.head().alone,
        )
        if not logits.head().large:
            taken.head().on_read = self._was_read
        for step in recipe.steps:
            taken = step(taken, extras)
        return taken

    def _make(self, call: Call) -> Callable | None:
        """The rewritten graph of one call, as a function of the operands and the call's other tensors.

        None, for a reason that has been logged, where it is not fused.
        """
        form = call.form(Fakes())
        if form is None:
            return None  # it has logged why
        result = (self.statistic if call.function in STATISTICS else self.loss)(form)
        if not form.accepts(result):
            reasons = [site.reason for site in result.sites] or ["it is no statistic of the rows that is served"]
            log.info("deferred logits are read for %s: %s", call.function.__name__, "; ".join(reasons))
            return None
        return share(result.graph_module).forward


def _behind(
    logits: Sequence[DeferredLogits],
    own: Sequence[Tensor],
    run: Callable,
    given: Sequence[Tensor],
    call: Callable,
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """``run(*given)``, which gives what ``call(*args, **kwargs)`` does, behind the logits in the autograd graph."""
    mode, values = autocast_now(logits[0].device), [z.as_now() for z in logits]

    def dense(grads: Sequence[Tensor | None], others: Sequence[Tensor] | None) -> Sequence[Tensor]:
        plain = [value(others is not None) for value in values]

        def known(x: Any) -> Any:
            return next((t for z, t in zip(logits, plain, strict=True) if x is z), x)

        with mode(), torch.enable_grad():
            made = call(*tree_map(known, args), **tree_map(known, kwargs))
        return gradients(made, grads, plain, others)

    form: Any = tuple

    def parts(*given: Tensor) -> Sequence[Any]:
        nonlocal form
        made = run(*given)
        form = type(made)
        return [made] if isinstance(made, Tensor) else list(made)

    made = behind(logits, own, given, parts, dense)
    return made[0] if issubclass(form, Tensor) else form(made)


def _rows_of(logits: DeferredLogits, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Rows of logits, by a tensor: behind the logits in the autograd graph, or NotImplemented."""
    leading = logits.shape[:-1]
    if not _of_leading(logits.dim() - 1, call, args, kwargs):
        return NotImplemented
    numbers = torch.arange(leading.numel(), device=logits.device).view(leading)
    taken = call(numbers, *args[1:], **kwargs)
    made: Any = Rows.apply(logits.reshape(-1, logits.shape[-1]), taken.flatten())
    return made.view(*taken.shape, logits.shape[-1])


def _has_pending_target(call: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a divergence is one number, of logits from others, pending too, or from the classes of rows."""
    given = FUNCTIONS[call][1].bind(*args, **kwargs)
    given.apply_defaults()
    target = given.arguments["target"]
    return given.arguments["reduction"] != "none" and isinstance(target, (DeferredLogits, ByClasses))


# Functions that give entries of logits as they are.
_ENTRIES = ("gather", "take_along_dim", "max", "amax", "topk")
# What each statistic that programs go on with, beside the logits, is to the dispatcher.
_OPERATORS = {
    "logsumexp": aten.logsumexp.default,
    "sum": aten.sum.dim_IntList,
    "amax": aten.amax.default,
    "max": aten.amax.default,
    "gather": aten.gather.default,
    "take_along_dim": aten.gather.default,
}


def _remember(logits: DeferredLogits, call: Callable, args: tuple, kwargs: dict[str, Any], made: Any) -> None:
    """Notes what a call has given: entries of the logits, and a statistic that the program may put beside them."""
    name, signature = FUNCTIONS.get(call) or METHODS[call.__name__]
    given = signature.bind(*args, **kwargs).arguments
    dims = given.get("dim", -1 if name == "topk" else None)
    if dims is None or dims == () or given.get("dtype") is not None:
        return  # of all entries
    dims = tuple(dims) if isinstance(dims, (tuple, list)) else (dims,)
    keepdim = given.get("keepdim", False)
    index = given.get("index", given.get("indices"))
    values = made if isinstance(made, Tensor) else made[0]
    if name in _OPERATORS:
        beside, extras = (dims, keepdim), []
        if index is not None:
            beside, extras = (dims[0], Read(0)), [Extra(index.expand(values.shape))]
        known = Known(values, logits._value, Step.of(_OPERATORS[name], beside, {}), extras)
        logits.head().known.append(known)
    if name not in _ENTRIES:
        return
    if name in ("max", "topk"):
        index = made[1]
    if name in ("max", "amax") and not keepdim:
        values, index = values.unsqueeze(dims[0]), None if index is None else index.unsqueeze(dims[0])
    if index is not None:
        index = index.expand(values.shape).clone()
    values = values.detach().clone()
    entries = Entries(logits.size(), logits.stride(), logits.storage_offset(), dims[0], index, values)
    logits._value.memory.entries.append(entries)


def _rows_and_classes(index: Any, logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows and the class of each, or (rows, 1) and (rows, K), where an index of (N, V) logits has these; else None."""
    if not isinstance(index, tuple) or len(index) != 2 or logits.dim() != 2:
        return None
    index = tuple(torch.tensor(i, device=logits.device) if isinstance(i, (range, list)) else i for i in index)
    if not all(isinstance(i, Tensor) and i.dim() in (1, 2) and i.dtype == torch.int64 for i in index):
        return None
    rows, classes = index
    several = rows.dim() == 2 and rows.shape == (len(classes), 1) and classes.dim() == 2
    return (rows, classes) if several or (rows.dim() == 1 and rows.shape == classes.shape) else None


def _without_numbers(steps: Iterable[Step | Joint], numbers: list[float]) -> tuple:
    """Steps with None in the place of each number that an operator on every entry has, which is put into `numbers`."""

    def without(argument: Any) -> Any:
        if isinstance(argument, (float, int)):
            numbers.append(argument)
            return None
        return argument

    made: list[Any] = []
    for step in steps:
        if isinstance(step, Joint):
            made.append((step.op, *(_without_numbers(steps, numbers) for steps in step.parts)))
        else:
            made.append((step.op, tuple(map(without, step.args))) if step.op in WRITTEN else step)
    return tuple(made)


def _is_entrywise(step: Step | Joint) -> bool:
    """Whether a step does the same to every row, where what it reads besides has one number for each class, or one."""
    if isinstance(step, Joint):
        plain = step.op in WRITTEN and not any(isinstance(a, Read) for a in step.args)
        return plain and all(_is_entrywise(own) for steps in step.parts for own in steps)
    if step.op in (aten._softmax.default, aten._log_softmax.default):
        return step.args[0] == -1
    of_rows = any(isinstance(a, Read) and a.spread for a in step.args)
    return not of_rows and (step.op in WRITTEN or step.op in (aten.clone.default, aten._to_copy.default))


def _of_leading(leading: int, call: Callable, args: Any, kwargs: Any) -> bool:
    """Whether an index with tensors is of the first dimensions only, of which there are `leading`."""
    if call is not Tensor.__getitem__:
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return isinstance(dim, int) and 0 <= dim < leading
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    tensors = [i for i in index if isinstance(i, Tensor)]
    plain = all(isinstance(i, (int, slice)) and not isinstance(i, bool) for i in index if not isinstance(i, Tensor))
    taken = sum(i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1 for i in index)
    return bool(tensors) and plain and taken <= leading
