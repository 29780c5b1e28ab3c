"""What the tests of graphs share: capture what Dynamo gives a backend, compare a compiled function with eager."""

import os

import torch
from torch._dynamo.utils import counters

import cce_inductor

THROUGH_AOT = {"min_vocab": 0, "compiler": "aot_eager"}
# The rewritten graph is run as it is; `make test-all` puts AOTAutograd behind it, which takes twice the time.
FUSE_ALL = {"min_vocab": 0, "compiler": os.environ.get("CCE_TEST_COMPILER", "eager")}


def graphs_of(fn, *inputs, dynamic=None):
    """The graph modules that Dynamo captures from ``fn(*inputs)``."""
    found = []

    def backend(gm, example_inputs):
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, dynamic=dynamic)(*inputs)
    return found


def text(gm):
    """A graph as one line per node: what a person needs to compare two of them."""

    def show(argument):
        if isinstance(argument, torch.fx.Node):
            return f"%{argument.name}"
        if isinstance(argument, (list, tuple)):
            inside = ", ".join(map(show, argument))
            return f"[{inside}]" if isinstance(argument, list) else f"({inside})"
        return repr(argument)

    lines = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        arguments = [show(a) for a in node.args] + [f"{k}={show(v)}" for k, v in node.kwargs.items()]
        lines.append(
            f"{node.name} = {name}({', '.join(arguments)})" if node.op != "output" else f"return {show(node.args[0])}"
        )
    return "\n".join(lines)


def leaves(fn, inputs):
    """The tensors whose gradients a run produces: inputs, and parameters of modules that `fn` closes over."""
    found = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    for cell in getattr(fn, "__closure__", None) or ():
        if isinstance(cell.cell_contents, torch.nn.Module):
            found += [p for p in cell.cell_contents.parameters() if p.requires_grad]
    return found


def run(fn, inputs, of):
    """The outputs of ``fn(*inputs)`` and the gradients of its first output with respect to the leaves of `of`."""
    outputs = fn(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    params = leaves(of, inputs)
    if not outputs[0].requires_grad:
        return outputs, [None] * len(params)
    return outputs, torch.autograd.grad(outputs[0].float().sum(), params, allow_unused=True)


def assert_same_as_eager(fn, inputs, fused, deferred=0, dynamic=None, tolerance=1e-5, **options):
    """Compiles `fn` and compares every output and gradient with eager; asserts how many losses were fused."""
    torch._dynamo.reset()
    before = dict(counters["cce_inductor"])
    want, want_grads = run(fn, inputs, fn)
    compiled = torch.compile(fn, backend=cce_inductor.cce_backend, dynamic=dynamic, options={**FUSE_ALL, **options})
    got, got_grads = run(compiled, inputs, fn)
    for a, b in zip(want, got, strict=True):
        if not isinstance(a, torch.Tensor):
            assert a == b
            continue
        assert (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)
        torch.testing.assert_close(b.detach(), a.detach(), rtol=tolerance, atol=tolerance, equal_nan=True)
    for a, b in zip(want_grads, got_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * a.abs().max().item(), equal_nan=True)
    counted = {k: counters["cce_inductor"][k] - before.get(k, 0) for k in ("fused", "deferred")}
    assert counted == {"fused": fused, "deferred": deferred}
