"""The loss in another graph: losses over logits that another graph has deferred.

The model was compiled without its loss, or the graph broke between the two.  What arrives at the loss is a pending
:class:`DeferredLogits`, and it knows how it follows from the hidden states and the head's weight.  So its head is put
into the graph of the loss, and the pass does the rest as if it had always been there.  The backend asks for the
:func:`forms` that a graph can be compiled in; `eager_calls` puts the head into the graph of a single call.

Where the pass does not fuse such a loss, the logits are read: they are computed once, and remembered.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node

from .. import compat
from ..graph.builder import Builder, Proxy
from ..graph.fakes import example
from ..graph.regions import copy_graph
from ..rewrite.recipe import RECORDED, Logits
from ..rewrite.result import Rewritten
from ..trace.unnamed import GIVEN
from . import aliases
from .lazy import ALONG, WRITTEN
from .pending import Recipe
from .steps import Joint, Step, other_head
from .tensor import DeferredLogits

log = logging.getLogger(__name__)

aten = torch.ops.aten

# ---------------------------------------------------------------------------------- pending logits as nodes of a graph


class _NotRecordableError(Exception):
    """Pending logits follow from their head by a step that has no form in a graph.  The message names it."""


def _rank(z: Proxy) -> int:
    return example(z.node).dim()


def _index(z: Proxy, dim: int, at: Any) -> Proxy:
    return z[(slice(None),) * (dim % _rank(z)) + (at,)]


def _cast(z: Proxy, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Proxy:
    if device is not None and torch.device(device).type != example(z.node).device.type:
        raise _NotRecordableError(f"the logits were moved to {device}")
    return z if dtype is None else z.to(dtype)


# What each operator that can be a step is as a user writes it, on recorded tensors.
_WRITTEN: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda z: z.detach(),
    aten.clone.default: lambda z, memory_format=None: (
        z.clone() if memory_format in (None, torch.preserve_format) else z.contiguous(memory_format=memory_format)
    ),
    aten._to_copy.default: _cast,
    aten._softmax.default: lambda z, dim, half_to_float: z.softmax(
        dim, **({"dtype": torch.float32} if half_to_float else {})
    ),
    aten._log_softmax.default: lambda z, dim, half_to_float: z.log_softmax(
        dim, **({"dtype": torch.float32} if half_to_float else {})
    ),
    aten.view.default: lambda z, size: z.view(*size),
    aten._unsafe_view.default: lambda z, size: z.reshape(*size),
    aten.slice.Tensor: lambda z, dim=0, start=None, end=None, step=1: _index(z, dim, slice(start, end, step)),
    aten.select.int: _index,
    aten.logsumexp.default: lambda z, dim, keepdim=False: z.logsumexp(dim, keepdim),
    aten.sum.dim_IntList: lambda z, dim, keepdim: z.sum(dim, keepdim),
    aten.amax.default: lambda z, dim, keepdim: z.amax(dim, keepdim),
    aten.gather.default: lambda z, dim, index: z.gather(dim, index),
    aten.index_select.default: lambda z, dim, index: z.index_select(dim, index),
    **ALONG,
    aten.repeat.default: lambda z, repeats: z.repeat(*repeats),
    aten.cat.default: torch.cat,
    aten.stack.default: torch.stack,
    aten.unsqueeze.default: lambda z, dim: z.unsqueeze(dim),
    aten.squeeze.default: lambda z: z.squeeze(),
    aten.squeeze.dim: lambda z, dim: z.squeeze(dim),
    aten.squeeze.dims: lambda z, dim: z.squeeze(dim),
    aten.expand.default: lambda z, size, implicit=False: z.expand(*size),
    aten.t.default: lambda z: z.t(),
    aten.transpose.int: lambda z, dim0, dim1: z.transpose(dim0, dim1),
    aten.permute.default: lambda z, dims: z.permute(*dims),
    other_head: other_head,
    **WRITTEN,
}


def _record(recipe: Recipe, operands: Sequence[Proxy]) -> Proxy:
    """Records the logits of `recipe`."""
    assert isinstance(recipe.compute, Logits)
    logits, extras = recipe.compute.record(operands[: recipe.own]), [*operands[recipe.reads :]]
    if recipe.other is not None:
        other = recipe.other[0].record(operands[recipe.own : recipe.reads])  # type: ignore[attr-defined]
        extras.append(other if any(recipe.needs[recipe.own : recipe.reads]) else other.detach())
        logits = logits if any(recipe.needs[: recipe.own]) else logits.detach()
    z = _written(logits, recipe.steps, extras, {})
    return z if any(recipe.needs) else z.detach()


def _written(z: Proxy, steps: Sequence[Step | Joint], extras: Sequence[Proxy], known: dict[Any, Proxy]) -> Proxy:
    """Records steps on a tensor. known: what each step has made of each: parts of a joint one have steps in common."""
    for step in steps:
        if step.op not in _WRITTEN:
            raise _NotRecordableError(f"{step.op} lies between the head and the loss")
        key = z.node, step
        if key not in known:
            if isinstance(step, Joint):
                parts = [_written(z, part, extras, known) for part in step.parts]
                known[key] = step.of(parts, extras, _WRITTEN[step.op])
            else:
                known[key] = step(z, extras, _WRITTEN[step.op])
        z = known[key]
    return z


# ------------------------------------------------------------------------------------- graphs with logits as inputs


@dataclass
class Form:
    """A form that a graph can be compiled in: the graph, and its example inputs.

    inlined, read, unused: positions among the program's arguments of logits that the graph takes as the operands of
    their head, takes computed, or does not take. as_it_is: whether it is to be run without a compiler.
    """

    graph_module: GraphModule
    inputs: list[Any]
    inlined: frozenset[int] = frozenset()
    read: frozenset[int] = frozenset()
    unused: frozenset[int] = frozenset()
    as_it_is: bool = False

    def arguments(self, given: Sequence[Any]) -> list[Any]:
        """What to pass to the graph where the program passes `given`.

        Raises :class:`DeferredLogitsError` if the logits could be wrong by now.
        """
        # Reading one of several that share memory would end what the others are known by.
        operands = {i: given[i].operands() for i in self.inlined}
        result: list[Any] = []
        for i, argument in enumerate(given):
            if i in operands:
                result += operands[i]
            elif i not in self.unused:
                result.append(argument.materialize() if i in self.read else argument)
        return result

    def accepts(self, result: Rewritten) -> bool:
        """Whether nothing is left of the heads that were put into the graph, once it has been rewritten."""
        return not any(RECORDED in node.meta for node in result.graph_module.graph.nodes)


def forms(gm: GraphModule, inputs: Sequence[Any]) -> Iterator[Form]:
    """The forms of a captured graph, the best first; the last one accepts every result."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    logits = {i: x for i, n in enumerate(placeholders) if isinstance(x := example(n), DeferredLogits)}
    if not logits:
        # A part of a graph, given what another part, already compiled, gives for fake inputs: see
        # `wrap.computed_on_entry`.
        yield Form(gm, [_plain(x) if isinstance(x, DeferredLogits) else x for x in inputs])
        return
    if aliases.edited(gm):
        yield Form(gm, list(inputs), as_it_is=True)
        return
    used = {i: x for i, x in logits.items() if placeholders[i].users}
    pending = {i: recipe for i, x in used.items() if (recipe := usable(x)) is not None}
    if pending:
        operands = {i: (recipe, _fake_operands(logits[i], recipe)) for i, recipe in pending.items()}
        inlined = with_inlined(gm, inputs, logits, operands)
        if inlined is not None:
            yield inlined
    yield _form(gm, inputs, logits, {})


def usable(logits: DeferredLogits, grad: bool = True) -> Recipe | None:
    """The recipe of logits that can be put into a graph; None for others, such as computed ones.

    grad: whether gradients are recorded there.
    """
    recipe = logits.recipe()
    if recipe is not None and not grad:
        # A view that was made under no_grad says that it requires grad, and leads nowhere.
        recipe = replace(recipe, needs=(False,) * len(recipe.needs), connected=True)
    if recipe is None or not recipe.connected:
        return None
    other = recipe.compute if recipe.other is None else recipe.other[0]
    return recipe if isinstance(recipe.compute, Logits) and isinstance(other, Logits) else None


def _fake_operands(logits: DeferredLogits, recipe: Recipe) -> list[Tensor]:
    """The operands of fake logits, requiring grad as the real ones do."""
    return [t.detach().requires_grad_(need) for t, need in zip(logits.operands(), recipe.needs, strict=True)]


def with_inlined(
    gm: GraphModule,
    inputs: Sequence[Any],
    logits: dict[int, DeferredLogits],
    operands: dict[int, tuple[Recipe, list[Tensor]]],
) -> Form | None:
    """The form that takes some of a graph's `logits` as the operands of their head; None where there is none.

    logits, operands: by position among the graph's `inputs`; the latter with their recipe. Never raises: the reason is
    logged, and the caller reads the logits.
    """
    try:
        return _form(gm, inputs, logits, operands)
    except _NotRecordableError as reason:
        log.info("deferred logits are read where their loss is: %s", reason)
    except Exception:
        log.exception("cce_inductor could not put a head in front of its loss, and reads the logits there")
    return None


def _form(
    gm: GraphModule,
    inputs: Sequence[Any],
    logits: dict[int, DeferredLogits],
    inlined: dict[int, tuple[Recipe, list[Tensor]]],
) -> Form:
    """`gm` with some of its `logits` replaced by what they are computed from, and the others by plain tensors."""
    copy = copy_graph(gm)
    graph = copy.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    new_inputs: list[Any] = []
    operands: dict[int, list[Node]] = {}
    for i, (node, given) in enumerate(zip(placeholders, inputs, strict=True)):
        if i in inlined:
            _, fakes = inlined[i]
            operands[i] = [_operand(graph, node, k, fake) for k, fake in enumerate(fakes)]
            new_inputs += fakes
        elif i in logits and not node.users:
            graph.erase_node(node)
        elif i in logits:
            node.meta["example_value"] = _plain(logits[i])
            node.meta[GIVEN] = True
            node.meta.pop("grapharg", None)
            new_inputs.append(node.meta["example_value"])
        else:
            new_inputs.append(given)
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for i, nodes in operands.items():
        _put_head(graph, placeholders[i], inlined[i][0], nodes, first)
    graph.lint()
    copy.recompile()
    unused = frozenset(i for i in logits if not placeholders[i].users and i not in inlined)
    return Form(copy, new_inputs, frozenset(inlined), frozenset(logits.keys() - inlined.keys() - unused), unused)


def _operand(graph: Graph, placeholder: Node, k: int, fake: Tensor) -> Node:
    """A placeholder for operand `k` of the logits that `placeholder` stands for."""
    with graph.inserting_before(placeholder):
        node = graph.placeholder(f"{placeholder.name}_operand_{k}")
    node.meta["example_value"] = fake
    compat.set_source(node, compat.operand_source(placeholder, f"_operand_{k}"))
    return node


def _put_head(graph: Graph, placeholder: Node, recipe: Recipe, operands: Sequence[Node], before: Node) -> None:
    """Records the logits of `recipe` in front of a node, in the place of the placeholder that they were given by."""
    builder = Builder(graph, placeholder)
    # The dispatcher keeps symbolic sizes where torch 2.11's linear, in C++, would ask for their numbers.
    with graph.inserting_before(before), enable_python_dispatcher():
        z = _record(recipe, [builder.proxy(n) for n in operands])
    made, expected = example(z.node), example(placeholder)
    if made.shape != expected.shape or made.dtype != expected.dtype:
        raise AssertionError(f"logits came out as {made}, not {expected}; please report this")
    placeholder.replace_all_uses_with(z.node)
    graph.erase_node(placeholder)


def _plain(fake: DeferredLogits) -> Tensor:
    """A fake tensor as :meth:`DeferredLogits.materialize` gives a real one."""
    with compat.fake_mode_of(fake):
        plain = torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype, device=fake.device)
    return plain.requires_grad_(fake.requires_grad)
