"""Eager calls on pending logits, one by one: what two have in common, and the graph of one.

An argument that is as large as the logits, one-hot or not, stands in the graph as what it is made of
(:class:`ByClasses`).
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map

from .. import compat
from ..graph.builder import Builder
from ..graph.spellings import functions_of
from .mixtures import Spread, spread
from .pending import Recipe
from .steps import Joint, Read, Step
from .tensor import DeferredLogits

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


def kind_of(pending: Sequence[Pending], call: Callable, args: Any, kwargs: Any) -> tuple:
    """What calls have in common that one function computes."""
    return (
        call,
        tuple((p.recipe, described(p.logits), tuple(map(described, p.operands))) for p in pending),
        tree_map(_argument, (args, tuple(kwargs.items()))),
        state(pending[0].logits.device.type),
    )


def state(device: str) -> tuple:
    """What a graph depends on beside its inputs: grad mode, inference mode, autocast."""
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast and torch.get_autocast_dtype(device),
    )


def _argument(x: Any) -> Any:
    if isinstance(x, ByClasses):
        return x.spread, described(x.classes)
    return described(x) if isinstance(x, Tensor) else x


def described(tensor: Tensor) -> tuple:
    """What a graph depends on of a tensor that it is given."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def in_form(compute: Callable[..., tuple], call: Callable) -> Callable:
    """`compute`, whose results are those of a graph, as `call` gives them: tensors that the program may edit."""

    def own(*given: Any) -> tuple:
        return tuple(t.clone() for t in compute(*given))  # the operator saves its own for the backward, or for others

    if call in _MAX:
        return lambda *given: torch.return_types.max(own(*given))
    if call in _TOPK:
        return lambda *given: torch.return_types.topk(own(*given))
    return lambda *given: own(*given)[0]


def call_graph(
    mode: FakeTensorMode, pending: Sequence[DeferredLogits], call: Callable, args: tuple, kwargs: dict[str, Any]
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
        with mode:
            fake = torch.empty_strided(z.size(), z.stride(), dtype=z.dtype, device=z.device)
        first.append(
            placeholder(f"logits_{len(inputs)}", fake.requires_grad_(z.requires_grad and torch.is_grad_enabled()))
        )

    def node_of(x: Any) -> Any:
        own = next((node for node, z in zip(first, pending, strict=True) if x is z), None)
        if own is not None:
            return own
        tensor = tensor_of(x)
        if tensor is None:
            return x
        node = placeholder(f"given_{len(inputs)}", mode.from_tensor(tensor, static_shapes=True))
        return node if x is tensor else (x, node)

    def spread(x: Any) -> Any:
        """The tensor that a call was given, of its classes."""
        if not isinstance(x, tuple) or not isinstance(x[0], ByClasses):
            return x
        with mode:
            return x[0].spread(Builder(graph, x[1]).proxy(x[1])).node

    new_args, new_kwargs = tree_map(node_of, (args, kwargs))
    new_args, new_kwargs = tuple(map(spread, new_args)), {k: spread(x) for k, x in new_kwargs.items()}
    if getattr(Tensor, call.__name__, None) is call:
        node = graph.call_method(call.__name__, new_args, new_kwargs)
    else:
        node = graph.call_function(call, new_args, new_kwargs)
    fake_args, fake_kwargs = torch.fx.node.map_arg((new_args, new_kwargs), lambda n: n.meta["example_value"])
    with mode:
        made = node.meta["example_value"] = call(*fake_args, **fake_kwargs)
    node.meta["stack_trace"] = compat.python_stack()
    results = [node]
    if not isinstance(made, Tensor):
        results = [graph.call_function(operator.getitem, (node, i)) for i in range(len(made))]
        for result, part in zip(results, made, strict=True):
            result.meta["example_value"] = part
    graph.output(tuple(results))
    return GraphModule(torch.nn.Module(), graph), inputs
