"""Heads whose weight is int8 codes: they are read in place, by the operator and by deferred logits."""

import pytest
import torch
import torch.nn.functional as F
from capture import assert_same_as_eager, graphs_of
from test_mutations import survivors, with_what_fires

import cce_inductor
from cce_inductor import config
from cce_inductor.rewrite.run import rewrite
from cce_inductor.trace import codes

B, S, D, V = 2, 6, 8, 40
SETTINGS = config.Settings(min_vocab=0)


def ce(z, t):
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), t.reshape(-1))


def inputs(dtype=torch.float32):
    """Hidden states, codes, a number for each class, a bias, one number for all, labels."""
    torch.manual_seed(0)
    h, s, b = torch.randn(B, S, D), torch.rand(V) / 60 + 0.01, torch.randn(V)
    q = torch.randint(-128, 128, (V, D), dtype=torch.int8)
    h, s, b = (t.to(dtype).requires_grad_() for t in (h, s, b))
    return h, q, s, b, torch.tensor(0.02, dtype=dtype, requires_grad=True), torch.randint(0, V, (B, S))


def under_no_grad(h, q, s, b, a, t):
    with torch.no_grad():
        w = q.to(h.dtype) * s[:, None]
    return ce(F.linear(h, w * a, b), t)


def written(h, q, s, b, a, t):
    q = q + 0
    w = q.to(h.dtype)
    q.zero_()
    return ce(F.linear(h, w, b) * s, t)


def rescaled(h, q, s, b, a, t):
    s = s * 1
    w = q.to(h.dtype) * s[:, None]
    s.mul_(2)
    return ce(F.linear(h, w, b), t) + s.sum()


def bigger(h, q, s, b, a, t):
    w = q.to(h.dtype)
    w.mul_(0.01)
    return ce(F.linear(h, w, b), t)


READ = {
    "(x @ q.to(dtype).T) * scale": lambda h, q, s, b, a, t: ce((h @ q.to(h.dtype).T) * s, t),
    "F.linear(x, q.to(dtype)) * scale": lambda h, q, s, b, a, t: ce(F.linear(h, q.to(h.dtype)) * s, t),
    "float()": lambda h, q, s, b, a, t: ce(F.linear(h, q.float(), b) * 0.01, t),
    "type_as, mT": lambda h, q, s, b, a, t: ce(h @ q.type_as(h).mT * s, t),
    "transposed codes": lambda h, q, s, b, a, t: ce(h @ q.t().to(h.dtype) * s, t),
    "cast twice": lambda h, q, s, b, a, t: ce(F.linear(h, q.double().to(h.dtype)) * s, t),
    "dequantised": lambda h, q, s, b, a, t: ce(F.linear(h, q.to(h.dtype) * s[:, None], b), t),
    "dequantised, no cast": lambda h, q, s, b, a, t: ce(F.linear(h, s[:, None] * q, b), t),
    "dequantised by division": lambda h, q, s, b, a, t: ce(F.linear(h, q.to(h.dtype) / (1 / s)[:, None], b), t),
    "dequantised (D, V)": lambda h, q, s, b, a, t: ce(h @ (q.t().to(h.dtype) * s) + b, t),
    "one number": lambda h, q, s, b, a, t: ce(F.linear(h, q.to(h.dtype) * a, b), t),
    "one number and a constant": lambda h, q, s, b, a, t: ce(F.linear(h, q.to(h.dtype) * a / 3.0 * 2, b), t),
    "a number in front": lambda h, q, s, b, a, t: ce(F.linear(h, torch.mul(0.01, q.to(h.dtype)), b), t),
    "two numbers": lambda h, q, s, b, a, t: ce(F.linear(h, q.to(h.dtype) * s[:, None] * a, b), t),
    "and a gain": lambda h, q, s, b, a, t: ce(F.linear(h, q.to(h.dtype) * s[:, None], b) * (1 + b), t),
    "first classes": lambda h, q, s, b, a, t: ce(F.linear(h, q.to(h.dtype) * s[:, None], b)[..., :30], t % 30),
    "first codes": lambda h, q, s, b, a, t: ce(F.linear(h, q[:30].to(h.dtype) * s[:30, None]), t % 30),
    "convolution": lambda h, q, s, b, a, t: F.cross_entropy(
        F.conv1d(h.mT, q[..., None].to(h.dtype) * s[:, None, None], b), t
    ),
    "detached": lambda h, q, s, b, a, t: ce(F.linear(h, (q.to(h.dtype) * s.detach()[:, None]), b), t),
    "under autocast": lambda h, q, s, b, a, t: in_bfloat16(h, q, s, b, t),
    "a maximum, an argmax and a ranking": lambda h, q, s, b, a, t: several(F.linear(h, q.to(h.dtype)) * 0.01, t),
    "a maximum of dequantised": lambda h, q, s, b, a, t: (
        lambda z: ce(z, t) + z.detach().max(-1).values.mean() + z.argmax(-1).float().mean()
    )(F.linear(h, q.to(h.dtype) * s[:, None], b)),
}


def in_bfloat16(h, q, s, b, t):
    with torch.autocast("cpu", torch.bfloat16):
        return ce(F.linear(h, q.to(h.dtype), b).float() * s, t)


def several(z, t):
    return ce(z, t) + z.detach().max(-1).values.mean() + z.topk(3).indices.float().mean()


# Fused as well, by a copy of the weight.
COPIED = {
    "int16": lambda h, q, s, b, a, t: ce(F.linear(h, q.short().to(h.dtype)) * s, t),
    "a gain for each width": lambda h, q, s, b, a, t: ce(F.linear(h, q.to(h.dtype) * s[:D]), t),
    "rounded": lambda h, q, s, b, a, t: ce(
        F.linear(h, torch.div(q.to(h.dtype), s[:, None].detach(), rounding_mode="floor") / 999), t
    ),
    "one row of codes": lambda h, q, s, b, a, t: ce(F.linear(h, q[:1].to(h.dtype) / (s[:, None] * 999), b), t),
    "numbers in float64": lambda h, q, s, b, a, t: ce(F.linear(h, (q * s[:, None].double()).to(h.dtype), b), t),
    "an offset": lambda h, q, s, b, a, t: ce(F.linear(h, (q.to(h.dtype) - 3) * s[:, None], b), t),
    "a function of the codes": lambda h, q, s, b, a, t: ce(F.linear(h, torch.tanh(q.to(h.dtype)), b), t),
    "divided by nothing": lambda h, q, s, b, a, t: ce(F.linear(h, q.to(h.dtype) / 0.0, b), t),
    "a product of codes": lambda h, q, s, b, a, t: ce(F.linear(h, q.to(h.dtype) * q.float() / 9999, b), t),
    "the weight leaves the graph": lambda h, q, s, b, a, t: (
        lambda w: (ce(F.linear(h, w, b), t), w)
    )(q.to(h.dtype) * s[:, None]),
    "multiplied under no_grad": under_no_grad,
    "codes that are written to": written,
    "numbers that are written to": rescaled,
    "a weight that is written to": bigger,
}  # fmt: skip


def in_place(fn, settings=SETTINGS) -> tuple[bool, list[str], str]:
    """Whether the rewritten graph gives int8 to an operator, what it makes of the weight's size, and its text."""
    (gm,) = graphs_of(fn, *inputs())
    result = rewrite(gm, settings, "v")
    assert result.fused, [str(site) for site in result.sites]
    ours = [n for n in result.graph_module.graph.nodes if "cce_inductor" in str(n.target)]
    given = [a.meta["example_value"].dtype for n in ours for a in n.args[0]]
    made = [
        n.name
        for n in result.graph_module.graph.nodes
        if isinstance(t := n.meta.get("example_value"), torch.Tensor) and t.is_floating_point() and t.numel() >= 30 * D
        and t.numel() != B * S * D
    ]  # fmt: skip
    return torch.int8 in given, made, str(result.graph_module.code)


@pytest.mark.parametrize("name", READ)
def test_codes_are_read_in_place(name):
    """As eager, and without a node that is as large as the weight in floats."""
    tolerance = 2e-2 if name == "under autocast" else 1e-4
    assert_same_as_eager(READ[name], inputs(), fused=1, tolerance=tolerance)
    assert in_place(READ[name])[:2] == (True, [])


@pytest.mark.parametrize("name", COPIED)
def test_other_weights_are_copied(name):
    assert in_place(COPIED[name])[0] is False
    if name != "divided by nothing":
        assert_same_as_eager(COPIED[name], inputs(), fused=1, tolerance=1e-4)


def test_in_bfloat16_as_close_as_eager():
    """What eager rounds in between, the weight and the logits, is not rounded here."""
    for name in ("dequantised", "(x @ q.to(dtype).T) * scale", "one number"):
        exact = READ[name](*inputs(torch.float64))
        eager = READ[name](*inputs(torch.bfloat16)).double()
        torch._dynamo.reset()
        options = {"min_vocab": 0, "compiler": "aot_eager"}
        compiled = torch.compile(READ[name], backend=cce_inductor.cce_backend, options=options)
        ours = compiled(*inputs(torch.bfloat16)).double()
        assert (ours - exact).abs() <= 1.25 * (eager - exact).abs() + 2 * torch.finfo(torch.bfloat16).eps * exact


def test_a_filter_has_no_factors():
    """A cast alone is read in place under any filter; numbers for the classes would keep it from being applied."""
    settings = config.Settings(min_vocab=0, grad_filter="budget 0.01")
    read, made, text = in_place(READ["float()"], settings)
    assert read and not made and "budget" in text
    read, made, text = in_place(READ["dequantised"], settings)
    assert not read and len(made) == 2 and "budget" in text


RETURNED = {
    "a cast": lambda h, q, s, b, a, t: F.linear(h, q.to(h.dtype), b),
    "scaled behind": lambda h, q, s, b, a, t: F.linear(h, q.to(h.dtype)) * s,
    "dequantised": lambda h, q, s, b, a, t: F.linear(h, q.to(h.dtype) * s[:, None] * a / 2, b) + b,
    "dequantised (D, V)": lambda h, q, s, b, a, t: h @ (q.t().to(h.dtype) * s),
}


@pytest.mark.parametrize("name", RETURNED)
@pytest.mark.parametrize("beside", [True, False])
def test_logits_that_leave_hold_the_codes(name, beside):
    """Beside a loss, or in a graph of their own; read, and with a loss outside."""
    head = RETURNED[name]

    def fn(*given):
        z = head(*given)
        return (ce(z, given[-1]), z) if beside else z

    def program(function, read):
        given = inputs()
        z = made[1] if isinstance(made := function(*given), tuple) else made
        loss = ce(z, given[-1])
        if read:
            loss = loss + z.square().mean()
        return loss, *torch.autograd.grad(loss, [x for x in given if x.requires_grad], allow_unused=True)

    torch._dynamo.reset()
    options = {"min_vocab": 0, "defer_without_loss": True, "compiler": "aot_eager"}
    compiled = torch.compile(fn, backend=cce_inductor.cce_backend, options=options)
    given = inputs()
    z = made[1] if isinstance(made := compiled(*given), tuple) else made
    held = [operand.alias for operand in z._value.origin.head.operands]
    assert any(t.data_ptr() == given[1].data_ptr() for t in held)
    assert not any(t.is_floating_point() and t.numel() == V * D for t in held)
    for read in (False, True):
        for ours, theirs in zip(program(compiled, read), program(fn, read), strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_logits_in_another_graph():
    """Its operator reads the codes as well, which the first graph has left to it."""
    options = {"min_vocab": 0, "defer_without_loss": True, "compiler": "aot_eager"}
    for name, head in RETURNED.items():
        torch._dynamo.reset()
        model = torch.compile(head, backend=cce_inductor.cce_backend, options=options)
        criterion = torch.compile(ce, backend=cce_inductor.cce_backend, options=options)
        results = []
        for one, other in ((model, criterion), (head, ce)):
            given = inputs()
            loss = other(one(*given), given[-1])
            results.append([loss, *torch.autograd.grad(loss, [given[0]])])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore")
def test_every_guard_is_needed():
    """Without it, what becomes of some program is something else."""
    given = inputs()
    programs = [graphs_of(fn, *given)[0] for fn in (*READ.values(), *COPIED.values())]

    def outcome(gm):
        result = rewrite(gm, SETTINGS, "v")
        return result.graph_module.code, [site.reason for site in result.sites]

    assert survivors(codes, with_what_fires([codes], programs, outcome), outcome) == set()
