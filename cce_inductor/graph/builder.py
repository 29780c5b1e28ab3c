"""Writes nodes into a graph by running Python on FX proxies.

Every new node gets the metadata that Dynamo's own nodes have: AOTAutograd's cache refuses a graph with nodes that lack
`example_value`.
"""

import contextlib
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .. import compat
from .fakes import example

if TYPE_CHECKING:

    class Proxy(fx.Proxy):
        """A recorded tensor. FX gives its proxies a tensor's operators at import, where no type checker looks."""

        def __getitem__(self, index: Any) -> "Proxy": ...
        def __add__(self, other: Any) -> "Proxy": ...
        def __radd__(self, other: Any) -> "Proxy": ...
        def __sub__(self, other: Any) -> "Proxy": ...
        def __rsub__(self, other: Any) -> "Proxy": ...
        def __mul__(self, other: Any) -> "Proxy": ...
        def __rmul__(self, other: Any) -> "Proxy": ...
        def __truediv__(self, other: Any) -> "Proxy": ...
        def __rtruediv__(self, other: Any) -> "Proxy": ...
        def __lt__(self, other: Any) -> "Proxy": ...
        def __gt__(self, other: Any) -> "Proxy": ...
        def __getattr__(self, name: str) -> Any: ...

else:
    Proxy = fx.Proxy

_INHERITED = ("stack_trace", "nn_module_stack", "source_fn_stack")


def _as_it_is(saved: Any) -> Any:
    return saved


class _Tracer(fx.proxy.GraphAppendingTracer):
    def __init__(self, graph: Graph, like: Node):
        super().__init__(graph)
        self.like = like
        self.fake_mode = next(
            value.fake_mode for n in graph.nodes if hasattr(value := example(n), "fake_mode") and n.op == "placeholder"
        )

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        node.meta.update({k: self.like.meta[k] for k in _INHERITED if k in self.like.meta})
        node.meta["example_value"] = self._run(node)
        return node

    def create_arg(self, a: Any) -> Any:
        # Row maps carry arguments of the user's own nodes: sizes and bounds that are nodes already.
        return a if isinstance(a, Node) else super().create_arg(a)

    def _run(self, node: Node) -> Any:
        """The fake result of a node, in the grad mode that the loss it serves was recorded in."""
        if node.op == "get_attr":
            return self.fake_mode.from_tensor(getattr(self.graph.owning_module, str(node.target)), static_shapes=True)
        values = map_arg((node.args, node.kwargs), example)
        args, kwargs = values
        function: Callable = getattr(args[0], node.target) if node.op == "call_method" else node.target  # type: ignore
        grad = bool(getattr(example(self.like), "requires_grad", False))
        with self.fake_mode, torch.set_grad_enabled(grad), unhooked():
            return function(*args[1:], **kwargs) if node.op == "call_method" else function(*args, **kwargs)


def unhooked() -> contextlib.AbstractContextManager[Any]:
    """Keeps fake tensors from the hooks of a checkpoint around the first call, which are for what the call saves."""
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


class Builder:
    """Inserts nodes in front of `like`, which they serve: they take its source location."""

    def __init__(self, graph: Graph, like: Node):
        self.graph, self.like = graph, like
        self.tracer = _Tracer(graph, like)

    def proxy(self, node: Node) -> Proxy:
        return Proxy(node, self.tracer)

    def run(self, function: Callable, *args: Any) -> Any:
        """Runs `function` on the arguments, with the nodes it records placed in front of `like`."""
        with self.graph.inserting_before(self.like):
            return function(*args)

    def again(self, node: Node, args: tuple, kwargs: dict[str, Any]) -> Proxy:
        """Records what a node does, once more, of other arguments."""
        return self.tracer.create_proxy(node.op, node.target, args, kwargs)  # type: ignore[return-value]

    def parameter(self, name: str, value: torch.nn.Parameter) -> Proxy:
        """Adds a parameter to the graph's module and reads it."""
        module = self.graph.owning_module
        assert module is not None
        name = next(numbered for i in itertools.count() if not hasattr(module, numbered := f"{name}_{i}"))
        module.register_parameter(name, value)
        compat.name_parameter(module, name)
        return self.tracer.create_proxy("get_attr", name, (), {})  # type: ignore[return-value]

    def call(self, target: Callable, *args: Any, **kwargs: Any) -> Proxy:
        """Records one call that does not dispatch on proxies, such as an operator overload on a list of tensors."""
        return self.tracer.create_proxy("call_function", target, args, kwargs)  # type: ignore[return-value]
