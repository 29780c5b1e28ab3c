"""Eager calls on pending logits, one by one: what two have in common, and the graph of one.

An argument that is as large as the logits, one-hot or not, stands in the graph as what it is made of
(:class:`ByClasses`).
"""

import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map

from .. import compat
from ..graph.builder import Builder, unhooked
from ..graph.spellings import functions_of
from .mixtures import Spread, spread
from .other_graphs import Form, with_inlined
from .pending import Recipe
from .steps import Joint, Read, Step
from .tensor import DeferredLogits

log = logging.getLogger(__name__)

_MAX, _TOPK = functions_of("max"), functions_of("topk")


@dataclass(frozen=True)
class ByClasses:
    """An argument of a loss that is as large as its logits, by what it follows from: class probabilities, one-hot."""

    spread: Spread
    classes: Tensor


def tensor_of(x: Any) -> Tensor | None:
    """The tensor that an argument of a call is, or follows from."""
    return x.classes if isinstance(x, ByClasses) else x if isinstance(x, Tensor) else None


def by_classes(x: Any, logits: DeferredLogits) -> Any:
    """An argument of a loss, by the classes of its rows where it is as large as the logits and follows from those."""
    if type(x) is not Tensor or x.shape != logits.shape or not x.is_floating_point():
        return x
    found = spread(x)
    return x if found is None else ByClasses(found[0], found[1].tensor)


def same_classes(extras: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Which of the class indices that the steps read and a call is given hold the same numbers, each with the first.

    By their places, extras before others. A margin at the target is one only where the loss is of that target.
    """
    if not any(t.dtype == torch.int64 and t.dim() for t in extras):
        return ()
    found: list[tuple[int, Tensor]] = []
    same: list[tuple[int, int]] = []
    for i, t in enumerate((*extras, *others)):
        if t.dtype != torch.int64 or not t.dim():
            continue
        flat = t.detach().reshape(-1)
        first = next((k for k, known in found if known.shape == flat.shape and torch.equal(known, flat)), None)
        if first is None:
            found.append((i, flat))
        else:
            same.append((i, first))
    return tuple(same)


def read_as_one(gm: GraphModule, same: Sequence[tuple[int, int]], reads: int) -> None:
    """Lets a graph read the first of inputs that hold the same numbers in the place of the others."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"][reads:]
    for i, first in same:
        of, source = placeholders[i], placeholders[first]
        builder = Builder(gm.graph, source)
        with gm.graph.inserting_after(placeholders[-1]):
            shape = of.meta["example_value"].shape
            made = source if source.meta["example_value"].shape == shape else None
            made = made or builder.proxy(source).reshape(shape).node
        of.replace_all_uses_with(made)
    gm.recompile()


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether none of them is of a tensor subclass."""
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


@dataclass(frozen=True)
class Pending:
    """Pending logits that a call is given, and what they follow from."""

    logits: DeferredLogits
    recipe: Recipe
    operands: tuple[Tensor, ...]


def with_numbers(recipe: Recipe, operands: Sequence[Tensor]) -> Recipe:
    """A recipe whose steps have the numbers that they read from tensors of one element, which no gradient reaches."""
    extras = operands[recipe.reads :]

    def number(argument: Any) -> Any:
        if not isinstance(argument, Read) or argument.spread is not None or argument.index < 0:
            return argument
        extra = extras[argument.index]
        return extra.item() if extra.dim() == 0 and not extra.requires_grad else argument

    def written(step: Step | Joint) -> Step | Joint:
        made = step._replace(args=tuple(map(number, step.args)))
        return (
            made if isinstance(made, Step) else made._replace(parts=tuple(tuple(map(written, p)) for p in made.parts))
        )

    return replace(recipe, steps=tuple(map(written, recipe.steps)))


def described(tensor: Tensor) -> tuple:
    """What a graph depends on of a tensor that it is given."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def state(device: str) -> tuple:
    """What a graph depends on beside its inputs: grad mode, inference mode, autocast."""
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast and torch.get_autocast_dtype(device),
    )


def without_rows(tensor: Tensor) -> tuple:
    """The same, but for how many rows there are: for what the sizes mean, see :class:`Fakes`."""
    return tensor.dim(), tensor.is_contiguous(), tensor.dtype, tensor.device, tensor.requires_grad


class Fakes:
    """Fake tensors in the places of a call's own: of their sizes, or of any number of rows.

    rows: the sizes of now that stand for a number of rows, of the hidden states; none where all sizes are as they are.
    """

    def __init__(self, rows: Sequence[int] = ()) -> None:
        self._rows = {size for size in rows if size > 1}
        self._env = ShapeEnv() if self._rows else None
        self.mode = FakeTensorMode(shape_env=self._env)
        self._symbols: dict[int, Any] = {}
        self._count = 0

    def of(self, tensor: Tensor, needs: bool = False, leading: int | None = None) -> Tensor:
        """In the place of this tensor, whose first `leading` dimensions may be rows; requiring grad if it `needs`."""
        if self._env is None:
            return self.mode.from_tensor(tensor.detach(), static_shapes=True).requires_grad_(needs)
        may = [(leading is None or i < leading) and size in self._rows for i, size in enumerate(tensor.shape)]
        sizes = [DimDynamic.DUCK if rows else DimDynamic.STATIC for rows in may]
        self._count += 1
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=sizes)
        source = ConstantSource(f"given_{self._count}")
        fake = self.mode.from_tensor(tensor.detach(), symbolic_context=context, source=source)
        self._symbols |= {tensor.shape[i]: fake.shape[i] for i, rows in enumerate(may) if rows}
        return fake.requires_grad_(needs)

    def of_rows(self, hidden: Tensor, needs: bool) -> Tensor:
        """In the place of hidden states (..., D)."""
        return self.of(hidden, needs, hidden.dim() - 1)

    def fixed(self, tensor: Tensor, needs: bool) -> Tensor:
        """In the place of a tensor without rows, such as a weight."""
        return self.of(tensor, needs, 0)

    def logits(self, logits: Tensor, needs: bool) -> Tensor:
        """In the place of logits (..., V)."""
        with self.mode:
            if self._env is None:
                fake = torch.empty_strided(logits.size(), logits.stride(), dtype=logits.dtype, device=logits.device)
            elif not logits.is_contiguous():
                raise ValueError("logits of any number of rows are contiguous")
            else:
                sizes = [self._symbols.get(size, size) for size in logits.shape[:-1]]
                fake = torch.empty(*sizes, logits.shape[-1], dtype=logits.dtype, device=logits.device)
        return fake.requires_grad_(needs)

    def guards(self, inputs: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], bool]:
        """Whether what was compiled for these fake tensors takes others of the same kind. Asked behind the compilation.

        Raises ValueError if it is for one number of rows only.
        """
        env = self._env
        if env is None:
            return lambda given: True
        if any(not symbol.node.expr.free_symbols for symbol in self._symbols.values()):
            raise ValueError("it was compiled for one number of rows")
        code = env.produce_guards_expression([t for t in inputs if isinstance(t, FakeTensor)])
        return lambda given: code is None or env.evaluate_guards_expression(code, given)


def in_form(function: Callable, made: tuple) -> Any:
    """The results of the graph of a call, as `function` gives them: tensors that the program may edit."""
    own = tuple(t.clone() for t in made)  # the operator saves its own for the backward, or for others
    if function in _MAX:
        return torch.return_types.max(own)
    return torch.return_types.topk(own) if function in _TOPK else own[0]


class NotTriedError(Exception):
    """A call on pending logits raised where it was tried on fake tensors: nothing is known of calls of its kind."""


@dataclass(frozen=True)
class Call:
    """``function(*args, **kwargs)``, called eagerly on pending logits. same: see :func:`same_classes`."""

    function: Callable
    pending: Sequence[Pending]
    args: tuple
    kwargs: dict[str, Any]
    same: tuple[tuple[int, int], ...] = ()

    @property
    def kind(self) -> tuple:
        """What calls have in common that one graph computes. It has a hash if the arguments have."""
        return self._kind(described)

    @property
    def kind_for_any_rows(self) -> tuple:
        """The same, whatever their number of rows."""
        return self._kind(without_rows)

    def _kind(self, known: Callable[[Tensor], tuple]) -> tuple:
        def argument(x: Any) -> Any:
            if isinstance(x, ByClasses):
                return x.spread, known(x.classes)
            return known(x) if isinstance(x, Tensor) else x

        return (
            self.function,
            tuple((p.recipe, known(p.logits), tuple(map(known, p.operands))) for p in self.pending),
            tree_map(argument, (self.args, tuple(self.kwargs.items()))),
            state(self.pending[0].logits.device.type),
            self.same,
        )

    def form(self, fakes: Fakes) -> Form | None:
        """Its graph, with the heads in front of it; None, for a reason that has been logged, if there is none.

        Raises NotTriedError for a call that raises.
        """
        grad = torch.is_grad_enabled()
        heads = {}
        for i, p in enumerate(self.pending):
            (hidden, weight, *rest), (n, m, *needs) = p.operands, p.recipe.needs
            made = [fakes.of_rows(hidden, n and grad), fakes.fixed(weight, m and grad)]
            heads[i] = (p.recipe, [*made, *(fakes.of(t, need and grad) for t, need in zip(rest, needs, strict=True))])
        logits = [p.logits for p in self.pending]
        try:
            gm, inputs = call_graph(fakes, logits, self.function, self.args, self.kwargs)
        except Exception as error:  # what is wrong with the call is for the call to say
            name = self.function.__name__
            log.info("deferred logits are read for %s, which could not be tried: %s", name, error, exc_info=True)
            raise NotTriedError from error
        form = with_inlined(gm, inputs, dict(enumerate(logits)), heads)
        if form is not None:
            read_as_one(form.graph_module, self.same, self.pending[0].recipe.reads)
        return form


def call_graph(
    fakes: Fakes, pending: Sequence[DeferredLogits], call: Callable, args: tuple, kwargs: dict[str, Any]
) -> tuple[GraphModule, list[Any]]:
    """``call(*args, **kwargs)`` as a graph of its tensors, the pending ones first."""
    graph = Graph()
    inputs: list[Any] = []

    def placeholder(name: str, fake: Tensor) -> Node:
        node = graph.placeholder(name)
        node.meta["example_value"] = fake
        inputs.append(fake)
        return node

    first = []
    for z in pending:
        needs = z.requires_grad and torch.is_grad_enabled()
        first.append(placeholder(f"logits_{len(inputs)}", fakes.logits(z, needs)))

    def node_of(x: Any) -> Any:
        own = next((node for node, z in zip(first, pending, strict=True) if x is z), None)
        if own is not None:
            return own
        tensor = tensor_of(x)
        if tensor is None:
            return x
        node = placeholder(f"given_{len(inputs)}", fakes.of(tensor, tensor.requires_grad))
        return node if x is tensor else (x, node)

    def spread(x: Any) -> Any:
        """The tensor that a call was given, of its classes."""
        if not isinstance(x, tuple) or not isinstance(x[0], ByClasses):
            return x
        with fakes.mode:
            return x[0].spread(Builder(graph, x[1]).proxy(x[1])).node

    new_args, new_kwargs = tree_map(node_of, (args, kwargs))
    new_args, new_kwargs = tuple(map(spread, new_args)), {k: spread(x) for k, x in new_kwargs.items()}
    if getattr(Tensor, call.__name__, None) is call:
        node = graph.call_method(call.__name__, new_args, new_kwargs)
    else:
        node = graph.call_function(call, new_args, new_kwargs)
    fake_args, fake_kwargs = torch.fx.node.map_arg((new_args, new_kwargs), lambda n: n.meta["example_value"])
    with fakes.mode, unhooked():
        made = node.meta["example_value"] = call(*fake_args, **fake_kwargs)
    node.meta["stack_trace"] = compat.python_stack()
    results = [node]
    if not isinstance(made, Tensor):
        results = [graph.call_function(operator.getitem, (node, i)) for i in range(len(made))]
        for result, part in zip(results, made, strict=True):
            result.meta["example_value"] = part
    graph.output(tuple(results))
    return GraphModule(torch.nn.Module(), graph), inputs
