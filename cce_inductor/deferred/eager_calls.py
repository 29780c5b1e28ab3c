"""Losses and statistics that are called eagerly on deferred logits."""

import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from .. import compat
from ..rewrite.recipe import Logits
from ..rewrite.result import Rewritten
from .autograd import defer
from .lazy import EXPONENTIALS
from .other_graphs import ENTRYWISE, Entry, aten, log, usable, with_inlined
from .pending import Recipe
from .tensor import ROWS, STATISTICS, DeferredLogits


class _NotTriedError(Exception):
    """A call on pending logits raised where it was tried on fake tensors: nothing is known of calls of its kind."""


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
        recipe = usable(logits, torch.is_grad_enabled())
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
            elif step.op in ENTRYWISE:
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
        whole = compute.class_dim == compute.rank - 1 and all(step.op in ENTRYWISE for step in recipe.steps)
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
        entry = with_inlined(gm, entry_inputs, {0: logits}, {0: (recipe, fakes)})
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
