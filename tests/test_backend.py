"""The ways to turn the pass on, and what is handed on to PyTorch."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from capture import THROUGH_AOT
from torch._dynamo.utils import counters

import cce_inductor
from cce_inductor import config, record, switch


def rand(*shape):
    return torch.randn(*shape).requires_grad_()


def loss(h, w, t):
    return F.cross_entropy(F.linear(h, w), t)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    return rand(12, 8), rand(40, 8), torch.randint(0, 40, (12,))


@pytest.fixture
def enabled():
    cce_inductor.enable()
    yield
    cce_inductor.disable()


def test_by_name_and_by_function(inputs):
    for b in ("cce", cce_inductor.cce_backend):
        torch._dynamo.reset()
        torch.compile(loss, backend=b, options=THROUGH_AOT)(*inputs).backward()
    assert counters["cce_inductor"]["fused"] == 2
    assert "cce" in torch._dynamo.list_backends()


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager", "eager"])
def test_compilers(inputs, compiler):
    compiled = torch.compile(loss, backend="cce", options={"min_vocab": 0, "compiler": compiler})
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    assert counters["cce_inductor"]["fused"] == 1


@pytest.mark.parametrize("name", ["lowering.register", "other_graphs.forms", "defer_heads", "rewrite"])
def test_a_fault_of_ours_leaves_the_graph_as_it_is(inputs, monkeypatch, name):
    """As where a PyTorch that we do not know has lost something that we build on."""

    def gone(*args, **kwargs):
        raise AttributeError("module 'torch._inductor' has no attribute 'gone'")

    monkeypatch.setattr(f"cce_inductor.backend.{name}", gone)

    def returning(h, w, t):
        z = F.linear(h, w)
        return F.cross_entropy(z, t) if name != "defer_heads" else z

    expected = returning(*inputs)
    with record.collect() as found, config.patch(min_vocab=0):
        got = torch.compile(returning, backend="cce")(*inputs)
    torch.testing.assert_close(got, expected)
    ones = torch.ones_like(expected)
    for a, e in zip(*(torch.autograd.grad(x, inputs[:2], ones) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, e)
    assert counters["cce_inductor"]["fused"] == counters["cce_inductor"]["deferred"] == 0
    (graph,) = found
    assert [s.reason.startswith("internal error: AttributeError") for s in graph.sites] == [True] * (
        name != "defer_heads"
    )


def test_enable_gives_plain_compile_the_pass(inputs, enabled):
    def returning(h, w, t):
        z = F.linear(h, w)
        return F.cross_entropy(z, t), z

    with config.patch(min_vocab=0):
        value, logits = torch.compile(returning)(*inputs)
    assert switch.enabled() and counters["cce_inductor"] == {"fused": 1, "declined": 0, "deferred": 1}
    assert isinstance(logits, cce_inductor.deferred.DeferredLogits)
    torch.testing.assert_close(value, loss(*inputs))
    torch.testing.assert_close(logits + 0, F.linear(*inputs[:2]))


def test_enable_twice_and_disable(inputs):
    import torch._inductor.compile_fx as module

    original = module.compile_fx
    cce_inductor.enable()
    cce_inductor.enable()
    cce_inductor.disable()
    assert module.compile_fx is original and not switch.enabled()
    with config.patch(min_vocab=0):
        torch.compile(loss, options={"max_autotune": False})(*inputs)
    assert counters["cce_inductor"]["fused"] == 0


def test_the_pass_runs_once_where_both_hooks_are_on(inputs, enabled):
    # compile_fx calls itself for config patches, and the named backend goes through the wrapped one.
    torch.compile(loss, backend="cce", options={"min_vocab": 0, "max_autotune": False})(*inputs)
    assert counters["cce_inductor"]["fused"] == 1


def test_options_that_are_not_ours_reach_inductor(inputs):
    seen = []

    def user_pass(graph):
        seen.append([str(n.target) for n in graph.nodes if n.op == "call_function"])

    options = {"min_vocab": 0, "post_grad_custom_post_pass": user_pass, "fx_graph_cache": False}
    torch.compile(loss, backend="cce", options=options)(*inputs)
    assert any("linear_statistics" in target for graph in seen for target in graph)


def test_unknown_options_are_refused(inputs):
    with pytest.raises(Exception, match="min_vocap"):
        torch.compile(loss, backend="cce", options={"min_vocap": 0})(*inputs)
    with pytest.raises(Exception, match="workspace_mb"):
        torch.compile(loss, backend="cce", options={"workspace_mb": 0})(*inputs)


def test_mode(inputs):
    with config.patch(min_vocab=0):
        compiled = torch.compile(loss, backend="cce", mode="max-autotune-no-cudagraphs")
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))
        assert counters["cce_inductor"]["fused"] == 1
        torch._dynamo.reset()
        with pytest.raises(Exception, match="no-such-mode"):
            torch.compile(loss, backend="cce", mode="no-such-mode")(*inputs)


def test_module_compile_in_place(inputs):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(8, 40)

        def forward(self, h, t):
            z = self.head(h)
            return F.cross_entropy(z, t), z

    h, _, t = inputs
    model = Model()
    want, _ = model(h, t)
    model.compile(backend="cce", options=THROUGH_AOT)
    got, z = model(h, t)
    torch.testing.assert_close(got, want)
    assert isinstance(z, cce_inductor.deferred.DeferredLogits)


def test_checkpointed_training_step_runs_the_forward_once(inputs, monkeypatch):
    """The operator's outputs are saved, whatever an activation checkpoint around the trunk recomputes."""
    from cce_inductor.ops import reference

    calls = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda call: calls.append(1) or forward(call))
    trunk = torch.nn.Linear(8, 8)

    def step(h, w, t):
        h = torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(trunk(x)), h, use_reentrant=False)
        return F.cross_entropy(F.linear(h, w), t)

    torch.compile(step, backend="cce", options=THROUGH_AOT)(*inputs).backward()
    assert len(calls) == 1


def test_second_derivative_is_right_or_an_error_never_silence(inputs):
    h, w, t = inputs

    def twice(fn):
        (g,) = torch.autograd.grad(fn(h, w, t), h, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (h, w))

    eager = torch.compile(loss, backend="cce", options={"min_vocab": 0, "compiler": "eager"})
    for one, other in zip(twice(eager), twice(loss), strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()
    aot = torch.compile(loss, backend="cce", options=THROUGH_AOT)
    with pytest.raises(RuntimeError, match="double backward"):
        (g,) = torch.autograd.grad(aot(h, w, t), h, create_graph=True)
        g.sum().backward()


def test_two_backwards_give_the_same_gradients(inputs):
    value = torch.compile(loss, backend="cce", options=THROUGH_AOT)(*inputs)
    first = torch.autograd.grad(value, inputs[:2], retain_graph=True)
    second = torch.autograd.grad(value, inputs[:2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_out_of_range_target_is_an_error(inputs):
    h, w, t = inputs
    compiled = torch.compile(loss, backend="cce", options=THROUGH_AOT)
    for wrong in (40, -1):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            compiled(h, w, t.clone().fill_(wrong))


# In a process of its own: it would wait for ever. The backend of others, too.
BACKWARD_INSIDE = """
import torch, torch.nn.functional as F, cce_inductor
cce_inductor.cce_backend
w, h, t = torch.randn(64, 16, requires_grad=True), torch.randn(8, 16), torch.arange(8)
for backend, options in (("aot_eager", None), ("cce", {"compiler": "aot_eager", "min_vocab": 0})):
    def step(h):
        loss = F.cross_entropy(F.linear(h, w), t)
        return loss, *torch.autograd.grad(loss, w)
    for got, want in zip(torch.compile(step, backend=backend, options=options)(h), step(h)):
        torch.testing.assert_close(got, want)
"""


def test_a_backward_in_a_compiled_function_returns():
    subprocess.run([sys.executable, "-c", BACKWARD_INSIDE], check=True, timeout=120)


def test_import_is_light():
    """`import torch` imports the package when it looks for plugins: only the standard library may come with it."""
    code = (
        "import sys; before = set(sys.modules); import cce_inductor, cce_inductor._autoload as a; a.autoload(); "
        "print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] in ('torch', 'numpy', 'sympy')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": ""}, check=True)
    assert out.stdout.strip() == "[]"
