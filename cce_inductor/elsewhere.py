"""The loss elsewhere: losses over logits that another graph has deferred.

The model was compiled without its loss, or the graph broke between the two.  What arrives at the loss is a pending
:class:`DeferredLogits`, and it knows how it follows from the hidden states and the head's weight.  So its head is put
into the graph of the loss, and the pass does the rest as if it had always been there:

* a compiled graph that is given pending logits: the backend asks for its :func:`entries`;
* a loss that is called eagerly on pending logits: :class:`EagerCalls` makes a graph of that one call.

Where the pass does not fuse such a loss, the logits are read: they are computed once, and remembered.

A statistic of the rows that is asked for eagerly (a log-sum-exp, the entry of one class, the largest one, an entropy)
is served as a loss is, where the logits are larger than the workspace. Each costs a product with the weight of its own,
so several of them take longer than one read would, which is what they save the memory of.
"""

import logging
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.utils._pytree import tree_leaves, tree_map

from . import aliases, compat
from .deferred import EXPONENTIALS, ROWS, STATISTICS, DeferredLogits, Recipe, Step, defer, times
from .rewrite.builder import Builder
from .rewrite.defer import RECORDED, Logits
from .rewrite.rewrite import Rewritten, copy_graph
from .rewrite.unnamed import GIVEN
from .rewrite.values import example

log = logging.getLogger(__name__)

aten = torch.ops.aten

# ---------------------------------------------------------------------------------- pending logits as nodes of a graph


class _NotRecordableError(Exception):
    """Pending logits follow from their head by a step that has no form in a graph.  The message names it."""


class _NotTriedError(Exception):
    """A call on pending logits raised where it was tried on fake tensors: nothing is known of calls of its kind."""


def _rank(z: Proxy) -> int:
    return example(z.node).dim()


def _index(z: Proxy, dim: int, at: Any) -> Proxy:
    return z[(slice(None),) * (dim % _rank(z)) + (at,)]


def _cast(z: Proxy, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Proxy:
    if device is not None and torch.device(device).type != example(z.node).device.type:
        raise _NotRecordableError(f"the logits were moved to {device}")
    return z if dtype is None else z.to(dtype)


# What each lazy operator of `deferred` is as a user writes it, on recorded tensors.
_WRITTEN: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda z: z.detach(),
    aten.clone.default: lambda z, memory_format=None: z.clone(),
    aten._to_copy.default: _cast,
    aten.exp.default: lambda z: z.exp(),
    aten._softmax.default: lambda z, dim, half_to_float: z.softmax(
        dim, **({"dtype": torch.float32} if half_to_float else {})
    ),
    times: lambda z, first, second: _written(z, first) * _written(z, second),
    aten.mul.Tensor: lambda z, other: z * other,
    aten.div.Tensor: lambda z, other: z / other,
    aten._log_softmax.default: lambda z, dim, half_to_float: z.log_softmax(
        dim, **({"dtype": torch.float32} if half_to_float else {})
    ),
    aten.view.default: lambda z, size: z.view(*size),
    aten._unsafe_view.default: lambda z, size: z.view(*size),
    aten.slice.Tensor: lambda z, dim=0, start=None, end=None, step=1: _index(z, dim, slice(start, end, step)),
    aten.select.int: _index,
    aten.unsqueeze.default: lambda z, dim: z.unsqueeze(dim),
    aten.squeeze.dim: lambda z, dim: z.squeeze(dim),
    aten.t.default: lambda z: z.t(),
    aten.transpose.int: lambda z, dim0, dim1: z.transpose(dim0, dim1),
    aten.permute.default: lambda z, dims: z.permute(*dims),
}


def _record(recipe: Recipe, operands: Sequence[Proxy]) -> Proxy:
    """Records the logits of `recipe`."""
    assert isinstance(recipe.compute, Logits)
    z = _written(recipe.compute.record(operands), recipe.steps)
    return z if any(recipe.needs) else z.detach()


def _written(z: Proxy, steps: Sequence[Step]) -> Proxy:
    for step in steps:
        if step.op not in _WRITTEN:
            raise _NotRecordableError(f"{step.op} lies between the head and the loss")
        z = _WRITTEN[step.op](z, *step.args, **dict(step.kwargs))
    return z


# Steps that do the same to every entry, wherever it stands.
_ENTRYWISE = frozenset((aten.clone.default, aten._to_copy.default, aten.mul.Tensor, aten.div.Tensor))

# ------------------------------------------------------------------------------------- graphs with logits as inputs


@dataclass
class Entry:
    """A form that a graph can be compiled in: the graph, its example inputs, and its inputs for the program's own.

    inlined: positions of pending logits that the graph takes as the operands of their head. read: positions of
    those that it takes computed. unused: of those that it does not take at all. as_it_is: to be run without a compiler.
    """

    graph_module: GraphModule
    inputs: list[Any]
    inlined: frozenset[int] = frozenset()
    read: frozenset[int] = frozenset()
    unused: frozenset[int] = frozenset()
    as_it_is: bool = False

    def arguments(self, given: Sequence[Any]) -> list[Any]:
        """What to pass to the graph where the program passes `given`."""
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
        """Whether nothing is left of the logits that were put into the graph."""
        return not any(RECORDED in node.meta for node in result.graph_module.graph.nodes)


def entries(gm: GraphModule, inputs: Sequence[Any]) -> Iterator[Entry]:
    """The forms of a captured graph, the best first; the last one accepts every result."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    logits = {i: x for i, n in enumerate(placeholders) if isinstance(x := example(n), DeferredLogits)}
    if not logits:
        # A part of a graph that is given what another part, already compiled, gives for fake inputs: see `reading`.
        yield Entry(gm, [_plain(x) if isinstance(x, DeferredLogits) else x for x in inputs])
        return
    if aliases.edited(gm):
        yield Entry(gm, list(inputs), as_it_is=True)
        return
    used = {i: x for i, x in logits.items() if placeholders[i].users}
    pending = {i: recipe for i, x in used.items() if (recipe := _usable(x)) is not None}
    if pending:
        operands = {i: (recipe, _fake_operands(logits[i], recipe)) for i, recipe in pending.items()}
        inlined = _inlined(gm, inputs, logits, operands)
        if inlined is not None:
            yield inlined
    yield _entry(gm, inputs, logits, {})


def reading(compiled: Callable) -> Callable:
    """`compiled`, with pending logits, for which it was not compiled, computed on the way in."""

    def run(*args: Any) -> Any:
        return compiled(*(a.materialize() if isinstance(a, DeferredLogits) else a for a in args))

    return run


def _usable(logits: DeferredLogits, grad: bool = True) -> Recipe | None:
    """The recipe of pending logits that can be put into a graph. grad: whether gradients are recorded there."""
    recipe = logits.recipe()
    if recipe is not None and not grad:
        # A view that was made under no_grad says that it requires grad, and leads nowhere.
        recipe = replace(recipe, needs=(False,) * len(recipe.needs), connected=True)
    return recipe if recipe is not None and recipe.connected and isinstance(recipe.compute, Logits) else None


def _fake_operands(logits: DeferredLogits, recipe: Recipe) -> list[Tensor]:
    """The operands of fake logits, requiring grad as the real ones do."""
    return [t.detach().requires_grad_(need) for t, need in zip(logits.operands(), recipe.needs, strict=True)]


def _inlined(
    gm: GraphModule,
    inputs: Sequence[Any],
    logits: dict[int, DeferredLogits],
    operands: dict[int, tuple[Recipe, list[Tensor]]],
) -> Entry | None:
    """The form that takes the operands of some of its `logits`; None, and a word in the log, where there is none."""
    try:
        return _entry(gm, inputs, logits, operands)
    except _NotRecordableError as reason:
        log.info("deferred logits are read where their loss is: %s", reason)
    except Exception:
        log.exception("cce_inductor could not put a head in front of its loss, and reads the logits there")
    return None


def _entry(
    gm: GraphModule,
    inputs: Sequence[Any],
    logits: dict[int, DeferredLogits],
    inlined: dict[int, tuple[Recipe, list[Tensor]]],
) -> Entry:
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
    behind = next(n for n in graph.nodes if n.op != "placeholder")
    for i, nodes in operands.items():
        placeholder = placeholders[i]
        builder = Builder(graph, placeholder)
        # The dispatcher keeps symbolic sizes where torch 2.11's linear, in C++, would ask for their numbers.
        with graph.inserting_before(behind), enable_python_dispatcher():
            z = _record(inlined[i][0], [builder.proxy(n) for n in nodes])
        expected = example(placeholder)
        if example(z.node).shape != expected.shape or example(z.node).dtype != expected.dtype:
            raise AssertionError(f"logits came out as {example(z.node)}, not {expected}; please report this")
        placeholder.replace_all_uses_with(z.node)
        graph.erase_node(placeholder)
    graph.lint()
    copy.recompile()
    unused = frozenset(i for i in logits if not placeholders[i].users and i not in inlined)
    return Entry(copy, new_inputs, frozenset(inlined), frozenset(logits.keys() - inlined.keys() - unused), unused)


def _operand(graph: Graph, placeholder: Node, k: int, fake: Tensor) -> Node:
    with graph.inserting_before(placeholder):
        node = graph.placeholder(f"{placeholder.name}_operand_{k}")
    node.meta["example_value"] = fake
    compat.set_source(node, compat.operand_source(placeholder, f"_operand_{k}"))
    return node


def _plain(fake: DeferredLogits) -> Tensor:
    """A fake tensor as :meth:`DeferredLogits.materialize` gives a real one."""
    with compat.fake_mode_of(fake):
        plain = torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype, device=fake.device)
    return plain.requires_grad_(fake.requires_grad)


# ----------------------------------------------------------------------------------------- eager losses and statistics


@dataclass
class EagerCalls:
    """Computes what is called eagerly on pending logits, with the eager implementation of the operators.

    loss, statistic: they rewrite the graph of one call by the settings of the compilation that deferred the logits;
    the former keeps the record. What came out is kept for the next call of the same kind: a function, or None where
    the call is not fused.
    """

    loss: Callable[[Entry], Rewritten]
    statistic: Callable[[Entry], Rewritten]
    known: OrderedDict[Any, Callable | None] = field(default_factory=OrderedDict)
    of_rank: dict[tuple[Logits, int], Logits] = field(default_factory=dict)
    capacity: int = 256  # of shapes, as a rule

    def __call__(self, logits: DeferredLogits, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        recipe = _usable(logits, torch.is_grad_enabled())
        others = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x is not logits]
        if recipe is None or any(type(t) not in (Tensor, torch.nn.Parameter) for t in others):
            return NotImplemented
        if call not in (torch.argmax, Tensor.argmax) and any(step.op in EXPONENTIALS for step in recipe.steps):
            return NotImplemented  # from a log-sum-exp in fp32 they have fewer digits than eager's
        operands = logits.operands()  # or an error if they have changed: then the logits could not be read either
        if any(type(t) not in (Tensor, torch.nn.Parameter) for t in operands):
            return NotImplemented
        recipe, operands = self._of_rows(recipe, operands, logits.whole_shape()[-1])
        if call in ROWS:
            return self._taken(logits, recipe, operands, call, args, kwargs)
        device = logits.device.type
        key = (
            call,
            recipe,
            _described(logits),
            tuple(_described(t) for t in operands),
            tree_map(lambda x: _described(x) if isinstance(x, Tensor) else x, (args, tuple(kwargs.items()))),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.amp.is_autocast_available(device)
            and torch.is_autocast_enabled(device)
            and torch.get_autocast_dtype(device),
        )
        try:
            hash(key)
        except TypeError:  # an argument without a hash, such as a list
            return NotImplemented
        if key not in self.known:
            try:
                self.known[key] = self._make(recipe, logits, operands, call, args, kwargs)
            except _NotTriedError:
                return NotImplemented  # the next call may be right, or what it lacked may be there
            if len(self.known) > self.capacity:
                self.known.popitem(last=False)
        self.known.move_to_end(key)
        compute = self.known[key]
        if compute is None:
            return NotImplemented
        return compute(*operands, *others)

    def _of_rows(self, recipe: Recipe, operands: tuple[Tensor, ...], classes: int) -> tuple[Recipe, tuple[Tensor, ...]]:
        """The same logits, with their rows viewed and cut before the head.

        One graph then serves all pieces of one shape, where a program goes through the logits piece by piece.
        """
        compute, (hidden, _, *others) = recipe.compute, operands
        assert isinstance(compute, Logits)
        if compute.class_dim != compute.rank - 1 or any(t.dim() > 1 for t in others):
            return recipe, operands
        rows, kept = hidden, list(recipe.steps)
        for step in recipe.steps:
            if step.op in (aten.view.default, aten._unsafe_view.default) and step.args[0][-1:] == (classes,):
                rows = rows.reshape(*step.args[0][:-1], hidden.shape[-1])
            elif step.op in (aten.slice.Tensor, aten.select.int) and (*step.args, 0)[0] % rows.dim() < rows.dim() - 1:
                rows = step(rows)
            elif step.op in _ENTRYWISE:
                continue
            else:
                break
            kept.remove(step)
        compute = self._with_rank(compute, rows.dim())
        return replace(recipe, compute=compute, steps=tuple(kept), offset=0), (rows, *operands[1:])

    def _with_rank(self, compute: Logits, rank: int) -> Logits:
        """The same logits, of hidden states with so many dimensions."""
        known = (compute, rank)
        if known not in self.of_rank:
            self.of_rank[known] = replace(compute, rank=rank, class_dim=rank - 1)
        return self.of_rank[known]

    def _taken(
        self,
        logits: DeferredLogits,
        recipe: Recipe,
        operands: tuple[Tensor, ...],
        call: Callable,
        args: Any,
        kwargs: Any,
    ) -> Any:
        """Some rows of the logits, by a tensor: pending logits of those rows of the hidden states."""
        hidden, *others = operands
        compute = recipe.compute
        assert isinstance(compute, Logits)
        whole = compute.class_dim == compute.rank - 1 and all(step.op in _ENTRYWISE for step in recipe.steps)
        if not whole or hidden.shape[:-1] != logits.shape[:-1] or not _of_leading(hidden.dim() - 1, call, args, kwargs):
            return NotImplemented
        rows = call(hidden, *args[1:], **kwargs)
        shape = (*rows.shape[:-1], logits.whole_shape()[-1])
        grad = logits.requires_grad and torch.is_grad_enabled()
        compute = self._with_rank(compute, rows.dim())
        taken = defer(
            compute,
            (rows, *others),
            shape=shape,
            dtype=logits.whole_dtype(),
            requires_grad=grad,
            fuse=self,
            statistics=True,
        )
        for step in recipe.steps:
            taken = step(taken)
        return taken

    def _make(
        self, recipe: Recipe, logits: DeferredLogits, operands: Sequence[Tensor], call: Callable, args: Any, kwargs: Any
    ) -> Callable | None:
        """The rewritten graph of one call, as a function of the operands and the call's other tensors."""
        mode = FakeTensorMode()
        grad = torch.is_grad_enabled()
        try:
            gm, entry_inputs = _call_graph(mode, logits, call, args, kwargs)
        except Exception as error:  # what is wrong with the call is for the call to say
            log.info("deferred logits are read for %s, which could not be tried: %s", call.__name__, error)
            raise _NotTriedError from error
        fakes = [
            mode.from_tensor(t.detach(), static_shapes=True).requires_grad_(need and grad)
            for t, need in zip(operands, recipe.needs, strict=True)
        ]
        entry = _inlined(gm, entry_inputs, {0: logits}, {0: (recipe, fakes)})
        if entry is None:
            return None
        result = (self.statistic if call in STATISTICS else self.loss)(entry)
        return _in_form(result.graph_module.forward, call) if entry.accepts(result) else None


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


def _in_form(compute: Callable[..., tuple], call: Callable) -> Callable:
    """`compute`, whose results are those of a graph, as `call` gives them."""
    if call in (torch.max, Tensor.max):
        return lambda *given: torch.return_types.max(compute(*given))
    return lambda *given: compute(*given)[0]


def _described(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _call_graph(
    mode: FakeTensorMode, logits: DeferredLogits, call: Callable, args: tuple, kwargs: dict[str, Any]
) -> tuple[GraphModule, list[Any]]:
    """``call(*args, **kwargs)`` as a graph of its tensors, the logits first."""
    graph = Graph()
    inputs: list[Any] = []

    def placeholder(name: str, fake: Tensor) -> Node:
        node = graph.placeholder(name)
        node.meta["example_value"] = fake
        inputs.append(fake)
        return node

    with mode:
        fake = torch.empty_strided(logits.size(), logits.stride(), dtype=logits.dtype, device=logits.device)
    first = placeholder("logits", fake.requires_grad_(logits.requires_grad and torch.is_grad_enabled()))

    def node_of(x: Any) -> Any:
        if x is logits:
            return first
        if not isinstance(x, Tensor):
            return x
        return placeholder(f"given_{len(inputs)}", mode.from_tensor(x, static_shapes=True))

    new_args, new_kwargs = tree_map(node_of, (args, kwargs))
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
