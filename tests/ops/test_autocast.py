"""Autocast: the operands are rounded tile by tile as `F.linear` rounds them; nothing is copied, gradients stay fp32."""

import pytest
import torch
import torch.nn.functional as F
from head_oracle import Head, check_error_rule, cross_entropy, error

import cce_inductor
from cce_inductor.ops import reference

MODES = {
    "eager": (None, False),
    "around a compiled region": ("aot_eager", False),
    "inside a compiled region": ("aot_eager", True),
}


def run(mode: str, fn):
    """`fn` as `mode` says, for calls with autocast to bf16."""
    backend, inside = MODES[mode]

    def with_autocast(f):
        def call(*args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return f(*args, **kwargs)

        return call

    if backend is None:
        return with_autocast(fn)
    if inside:
        return torch.compile(with_autocast(fn), backend=backend, fullgraph=True)
    return with_autocast(torch.compile(fn, backend=backend, fullgraph=True))


@pytest.fixture
def compute_dtypes(monkeypatch):
    """The compute dtypes of every forward and backward that runs."""
    seen = []
    forward, backward = reference.forward, reference.backward
    monkeypatch.setattr(reference, "forward", lambda call: seen.append(call.compute_dtype) or forward(call))
    monkeypatch.setattr(
        reference, "backward", lambda call, *rest: seen.append(call.compute_dtype) or backward(call, *rest)
    )
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp32_weights_under_bf16_autocast(mode, input_dtype, compute_dtypes, small_tiles):
    torch._dynamo.reset()
    head = Head.make(bias=True)
    head.x = head.x.to(input_dtype)
    result = head.gradients(run(mode, cce_inductor.linear_cross_entropy))
    assert compute_dtypes == [torch.bfloat16] * 2
    assert {name: t.dtype for name, t in result.items()} == {
        "loss": torch.float32,
        "dx": input_dtype,
        "dw": torch.float32,
        "db": torch.float32,
    }
    eager = head.gradients(run("eager", cross_entropy))
    rounded = head.to(torch.bfloat16).to(torch.float64)
    rounded.bias = head.bias.double()  # added in fp32
    exact = rounded.gradients(cross_entropy)
    check_error_rule(mode, result, eager, exact, torch.bfloat16 if input_dtype == torch.bfloat16 else torch.float32)
    # fp32 gradients are better than eager's, which are rounded to bf16 on the way.
    assert error(result["dw"], exact["dw"]) < 1e-5 < error(eager["dw"], exact["dw"])


@pytest.mark.parametrize("mode", MODES)
def test_fp64_is_left_alone(mode, compute_dtypes):
    torch._dynamo.reset()
    head = Head.make(dtype=torch.float64)
    result = head.gradients(run(mode, cce_inductor.linear_cross_entropy))
    exact = head.gradients(cross_entropy)
    assert compute_dtypes == [torch.float64] * 2
    assert all(error(result[name], exact[name]) < 1e-14 for name in exact)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_disabled_inside(mode, compute_dtypes):
    torch._dynamo.reset()
    head = Head.make()

    def loss(x, w, target):
        with torch.autocast("cpu", enabled=False):
            return cce_inductor.linear_cross_entropy(x, w, target)

    result, exact = head.gradients(run(mode, loss)), head.to(torch.float64).gradients(cross_entropy)
    assert compute_dtypes == [torch.float32] * 2
    assert all(error(result[name], exact[name]) < 1e-6 for name in exact)


def test_the_ambient_dtype_counts_and_the_backward_needs_no_autocast(compute_dtypes):
    head = Head.make()
    leaf = head.w.clone().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = cce_inductor.linear_cross_entropy(head.x, leaf, head.target)
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cce_inductor.linear_cross_entropy(head.x, leaf, head.target)
        loss.backward()
    assert compute_dtypes == [torch.float16] * 2 + [torch.bfloat16] * 2


def test_mixed_dtypes_need_autocast():
    head = Head.make()
    with pytest.raises(RuntimeError, match="input is torch.bfloat16 but weight is torch.float32.*autocast"):
        cce_inductor.linear_cross_entropy(head.x.bfloat16(), head.w, head.target)
    with pytest.raises(RuntimeError):
        F.linear(head.x.bfloat16(), head.w)


def test_no_copy_of_the_weight(monkeypatch):
    """Autocast keeps a 16-bit copy of every weight it casts; the operator reads the fp32 weight itself."""
    seen = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda call: seen.append(call.weight) or forward(call))
    head = Head.make()
    with torch.autocast("cpu", torch.bfloat16):
        cce_inductor.linear_cross_entropy(head.x, head.w, head.target)
    assert seen[0].data_ptr() == head.w.data_ptr() and seen[0].dtype == torch.float32
