"""The mainstream: losses as people write them must fuse, with eager's values, gradients, shapes and dtypes."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from capture import assert_same_as_eager

B, S, D, V = 2, 6, 8, 40


def rand(*shape, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, dtype=torch.float32) * scale).to(dtype).requires_grad_()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def hidden(dtype=torch.float32):
    return rand(B, S, D, dtype=dtype)


def labels(ignored=-100):
    t = torch.randint(0, V, (B, S))
    t[0, :2] = ignored
    return t


# ---- spellings of a head

LINEAR = nn.Linear(D, V)
EMBEDDING = nn.Embedding(V, D)

HEADS = {
    "F.linear": lambda h, w, b: F.linear(h, w),
    "F.linear with bias": lambda h, w, b: F.linear(h, w, b),
    "x @ w.T": lambda h, w, b: h @ w.T,
    "x @ w.t() + bias": lambda h, w, b: h @ w.t() + b,
    "bias + x @ w": lambda h, w, b: b + h @ w.t(),
    "matmul": lambda h, w, b: torch.matmul(h, w.transpose(0, 1)),
    "mm of flat rows": lambda h, w, b: torch.mm(h.view(-1, D), w.t()).view(B, S, V),
    "addmm": lambda h, w, b: torch.addmm(b, h.view(-1, D), w.t()).view(B, S, V),
    "bias of shape (1, V)": lambda h, w, b: F.linear(h, w) + b[None],
    "subtracted bias": lambda h, w, b: F.linear(h, w) - b,
    "computed weight": lambda h, w, b: F.linear(h, w * 0.5),
    "expanded hidden": lambda h, w, b: F.linear(h[:1].expand(B, S, D), w),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    head = HEADS[name]

    def fn(h, w, b, t):
        return F.cross_entropy(head(h, w, b).view(-1, V), t.view(-1))

    assert_same_as_eager(fn, (hidden(), rand(V, D), rand(V), labels()), fused=1)


def test_weight_stored_transposed():
    def fn(h, w, t):
        return F.cross_entropy((h @ w).view(-1, V), t.view(-1))

    assert_same_as_eager(fn, (hidden(), rand(D, V), labels()), fused=1)


def test_modules_and_tied_weights():
    lin, emb = nn.Linear(D, V), nn.Embedding(V, D)

    def untied(h, t):
        return nn.CrossEntropyLoss()(lin(h).flatten(0, 1), t.flatten())

    def tied(t):
        logits = F.linear(emb(t.clamp(min=0)), emb.weight)
        return nn.CrossEntropyLoss()(logits.view(-1, V), t.view(-1))

    assert_same_as_eager(untied, (hidden(), labels()), fused=1)
    assert_same_as_eager(tied, (labels(),), fused=1)


# ---- between the head and the loss

BETWEEN = {
    "float": lambda z: z.float(),
    "to dtype": lambda z: z.to(torch.float32),
    "to other": lambda z: z.to(torch.zeros(1)),
    "contiguous": lambda z: z.contiguous(),
    "reshape": lambda z: z.reshape(B * S, V).reshape(B, S, V),
    "unsqueeze and squeeze": lambda z: z.unsqueeze(0).squeeze(0),
    "two transposes": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "permute there and back": lambda z: z.permute(2, 0, 1).permute(1, 2, 0),
    "scale": lambda z: z * 0.5,
    "scale from the left, twice": lambda z: 2 * (3 * z),
    "divided by a temperature": lambda z: z / 0.7,
    "negative scale": lambda z: -z,
    "softcap": lambda z: 5 * torch.tanh(z / 5),
    "softcap with different constants": lambda z: torch.tanh(z / 5) * 7.0,
    "negative softcap": lambda z: -5 * torch.tanh(z / 5),
    "softcap of scaled logits": lambda z: 30.0 * torch.tanh((z * 0.5) / 30.0),
    "scale behind the softcap": lambda z: (5 * torch.tanh(z / 5)) / 2,
}


@pytest.mark.parametrize("name", BETWEEN)
def test_between(name):
    between = BETWEEN[name]

    def fn(h, w, t):
        return F.cross_entropy(between(F.linear(h, w)).reshape(-1, V), t.view(-1))

    assert_same_as_eager(fn, (hidden(), rand(V, D), labels()), fused=1)


def test_bias_behind_a_scale_is_folded():
    def fn(h, w, b, c, t):
        logits = (F.linear(h, w, b) * 0.5 + c) / 3
        return F.cross_entropy(logits.view(-1, V), t.view(-1))

    assert_same_as_eager(fn, (hidden(), rand(V, D), rand(V), rand(V), labels()), fused=1)


def test_the_softcap_of_modded_nanogpt():
    """https://github.com/KellerJordan/modded-nanogpt in 2025: capped in fp32, a sum over all rows."""

    def fn(h, w, t):
        logits = F.linear(h, w).float()
        logits = 15 * logits * torch.rsqrt(logits.square() + 225)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), t.view(-1), reduction="sum")

    assert_same_as_eager(fn, (hidden(), rand(V, D), labels()), fused=1)


def test_bias_inside_a_softcap():
    def fn(h, w, b, t):
        logits = 4 * torch.tanh((F.linear(h, w) + b) / 4)
        return F.cross_entropy(logits.view(-1, V), t.view(-1))

    assert_same_as_eager(fn, (hidden(), rand(V, D), rand(V), labels()), fused=1)


def test_shifted_logits_and_shifted_labels():
    def logits_shifted(h, w, t):
        z = F.linear(h, w).float()[..., :-1, :].contiguous()
        return F.cross_entropy(z.view(-1, V), t[..., 1:].contiguous().view(-1))

    def labels_shifted(h, w, t):
        z = F.linear(h, w).float()
        return F.cross_entropy(z.view(-1, V), F.pad(t, (0, 1), value=-100)[..., 1:].reshape(-1))

    def rows_sliced(h, w, t):
        return F.cross_entropy(F.linear(h, w)[:, -3:].reshape(-1, V), t[:, -3:].reshape(-1))

    for fn in (logits_shifted, labels_shifted, rows_sliced):
        assert_same_as_eager(fn, (hidden(), rand(V, D), labels()), fused=1)


# ---- losses

WEIGHT = torch.rand(V)

LOSSES = {
    "positional": lambda z, t: F.cross_entropy(z, t, None, None, -100, None, "mean", 0.0),
    "keywords": lambda z, t: F.cross_entropy(input=z, target=t, reduction="mean"),
    "class weights": lambda z, t: F.cross_entropy(z, t, WEIGHT),
    "class weights, sum": lambda z, t: F.cross_entropy(z, t, weight=WEIGHT, reduction="sum"),
    "class weights, none": lambda z, t: F.cross_entropy(z, t, weight=WEIGHT, reduction="none").square().sum(),
    "label smoothing": lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1),
    "label smoothing with class weights": lambda z, t: F.cross_entropy(z, t, WEIGHT, label_smoothing=0.2),
    "label smoothing, softcap": lambda z, t: F.cross_entropy(3 * torch.tanh(z / 3), t, label_smoothing=0.1),
    "none, weighted": lambda z, t: (F.cross_entropy(z, t, reduction="none") * torch.arange(B * S)).sum(),
    "sum over a count": lambda z, t: F.cross_entropy(z, t, reduction="sum") / (t != -100).sum(),
    "module": lambda z, t: nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1)(z, t),
    "log_softmax and nll_loss": lambda z, t: F.nll_loss(F.log_softmax(z, dim=-1), t),
    "log_softmax in fp32, nll_loss sum": lambda z, t: F.nll_loss(z.log_softmax(1, torch.float32), t, reduction="sum"),
    "NLLLoss with class weights": lambda z, t: nn.NLLLoss(weight=WEIGHT)(nn.LogSoftmax(dim=1)(z), t),
    "perplexity": lambda z, t: F.cross_entropy(z, t).exp(),
    "focal": lambda z, t: (lambda c: ((1 - (-c).exp()) ** 2 * c).mean())(F.cross_entropy(z, t, reduction="none")),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    loss = LOSSES[name]

    def fn(h, w, t):
        return loss(F.linear(h, w).view(-1, V), t.view(-1))

    assert_same_as_eager(fn, (hidden(), rand(V, D), labels()), fused=1)


def test_ignore_index_that_is_a_class():
    def fn(h, w, t):
        return F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1), ignore_index=0)

    assert_same_as_eager(fn, (hidden(), rand(V, D), labels(ignored=0)), fused=1)


def test_every_row_ignored():
    def fn(h, w, t):
        return F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))

    assert_same_as_eager(fn, (hidden(), rand(V, D), torch.full((B, S), -100)), fused=1)


def test_class_dimension_one_of_three():
    def fn(h, w, t):
        return F.cross_entropy(F.linear(h, w).transpose(1, 2), t)

    def none(h, w, t):
        per_token = F.cross_entropy(F.linear(h, w).permute(0, 2, 1), t, reduction="none")
        return per_token.mean(1).square().sum(), per_token

    assert_same_as_eager(fn, (hidden(), rand(V, D), labels()), fused=1)
    assert_same_as_eager(none, (hidden(), rand(V, D), labels()), fused=1)


def test_one_row_without_a_batch():
    def fn(h, w, t):
        return F.cross_entropy(F.linear(h, w)[0, -1], t[0, -1])

    assert_same_as_eager(fn, (hidden(), rand(V, D), labels()), fused=1)


def test_two_losses_of_one_head_share_an_operator():
    def fn(h, w, t):
        z = F.linear(h, w).view(-1, V)
        return F.cross_entropy(z, t.view(-1)) + F.cross_entropy(z, t.view(-1), reduction="none").square().mean()

    assert_same_as_eager(fn, (hidden(), rand(V, D), labels()), fused=2)


def test_smoothed_and_weighted_losses_do_not_mix_their_weights():
    def fn(h, w, t):
        z, t = F.linear(h, w).view(-1, V), t.view(-1)
        return F.cross_entropy(z, t, WEIGHT) + F.cross_entropy(z, t, label_smoothing=0.1)

    assert_same_as_eager(fn, (hidden(), rand(V, D), labels()), fused=2)


def test_several_heads_and_an_auxiliary_loss():
    router = nn.Linear(D, 4)

    def fn(h, w, w2, t):
        aux = F.softmax(router(h), -1).mean(0).square().sum()
        first = F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))
        second = F.cross_entropy(F.linear(h.tanh(), w2).view(-1, V), t.roll(1, 1).view(-1))
        return first + 0.3 * second + 0.01 * aux

    assert_same_as_eager(fn, (hidden(), rand(V, D), rand(V, D), labels()), fused=2)


# ---- dtypes and autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_survive(dtype):
    def fn(h, w, t):
        return F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))

    tolerance = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-12}[dtype]
    inputs = (hidden(dtype), rand(V, D, dtype=dtype), labels())
    assert_same_as_eager(fn, inputs, fused=1, tolerance=tolerance)


def test_ambient_autocast():
    def fn(h, w, t):
        return F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_as_eager(fn, (hidden(), rand(V, D), labels()), fused=1, tolerance=3e-2)


def test_autocast_region_that_ends_between_head_and_loss():
    """The head's dtype is what counts: an operator placed at the loss would run in fp32 and differ from eager."""

    def fn(h, w, t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = F.linear(h, w)
        return F.cross_entropy(z.float().view(-1, V), t.view(-1))

    h, w, t = hidden(), rand(V, D), labels()
    assert_same_as_eager(fn, (h, w, t), fused=1, tolerance=3e-2)
    exact = F.cross_entropy(F.linear(h.bfloat16().double(), w.bfloat16().double()).view(-1, V), t.view(-1))
    compiled = torch.compile(fn, backend="cce", options={"min_vocab": 0, "compiler": "aot_eager"})(h, w, t)
    torch.testing.assert_close(compiled.double(), exact, rtol=1e-6, atol=0)


def test_loss_in_autocast_with_the_head_outside():
    def fn(h, w, t):
        z = F.linear(h, w)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(z.view(-1, V), t.view(-1))

    assert_same_as_eager(fn, (hidden(), rand(V, D), labels()), fused=1)


# ---- what requires a gradient, shapes


def test_frozen_operands_stay_without_gradient():
    def fn(h, w, t):
        return F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))

    assert_same_as_eager(fn, (hidden().detach(), rand(V, D), labels()), fused=1)
    assert_same_as_eager(fn, (hidden(), rand(V, D).detach(), labels()), fused=1)


def test_no_grad_around_the_head_the_loss_or_both():
    def head(h, w, t):
        with torch.no_grad():
            z = F.linear(h, w)
        return F.cross_entropy(z.view(-1, V), t.view(-1)) + h.sum()

    def loss(h, w, t):
        z = F.linear(h, w)
        with torch.no_grad():
            value = F.cross_entropy(z.view(-1, V), t.view(-1))
        return value + h.sum(), value

    def detached(h, w, t):
        return F.cross_entropy(F.linear(h, w).detach().view(-1, V), t.view(-1)) + w.sum()

    def metric_first(h, w, t):
        z = F.linear(h, w).view(-1, V)
        with torch.no_grad():
            metric = F.cross_entropy(z, t.view(-1))
        return F.cross_entropy(z, t.view(-1)), metric

    inputs = (hidden(), rand(V, D), labels())
    for fn, fused in ((head, 1), (loss, 1), (detached, 1), (metric_first, 2)):
        assert_same_as_eager(fn, inputs, fused=fused)


def test_dynamic_shapes():
    def sizes(h, w, t):
        b, s, _ = h.shape
        z = F.linear(h, w)
        return F.cross_entropy(z.view(b * s, -1), t.view(b * s))

    def of_logits(h, w, t):
        z = F.linear(h, w)[:, :-1]
        return F.cross_entropy(z.reshape(z.size(0) * z.size(1), z.size(-1)), t[:, 1:].reshape(-1)), z.size(1)

    for fn in (sizes, of_logits):
        assert_same_as_eager(fn, (hidden(), rand(V, D), labels()), fused=1, dynamic=True)


def test_dynamic_batch_compiles_once():
    def fn(h, w, t):
        return F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(fn, backend="cce", dynamic=True, options={"min_vocab": 0, "compiler": "aot_eager"})
    w = rand(V, D)
    for batch in (2, 3, 5):
        h, t = rand(batch, S, D), torch.randint(0, V, (batch, S))
        torch.testing.assert_close(compiled(h, w, t), fn(h, w, t))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.utils.counters["cce_inductor"]["fused"] == 1


# ---- logits returned

RETURNED = {
    "raw": (lambda z: z, lambda z: z),
    "upcast and raw": (lambda z: z.float(), lambda z: z),
    "scaled": (lambda z: z * 0.25, None),
    "capped": (lambda z: 5 * torch.tanh(z / 5), None),
    "capped by rsqrt": (lambda z: 5 * z.float() * torch.rsqrt(z.float().square() + 25), None),
    "upcast": (lambda z: z.float(), None),
    "viewed": (lambda z: z.view(-1, V), None),
    "shifted": (lambda z: z[:, :-1], lambda z: z),
    "transposed": (lambda z: z.transpose(0, 1), lambda z: z.transpose(0, 1)),
    "detached": (lambda z: z, lambda z: z.detach()),
}


@pytest.mark.parametrize("name", RETURNED)
def test_returned_logits_are_deferred(name):
    between, returned = RETURNED[name]

    def fn(h, w, t):
        raw = F.linear(h, w)
        z = between(raw)
        t = {S: t, S - 1: t[:, 1:], B: t.t()}[z.shape[1] if z.dim() == 3 else S]
        return F.cross_entropy(z.reshape(-1, V), t.reshape(-1)), z if returned is None else returned(raw)

    assert_same_as_eager(fn, (hidden(), rand(V, D), labels()), fused=1, deferred=1)


def test_returned_logits_with_biases_and_a_cast_weight():
    def fn(h, w, b, c, t):
        z = (F.linear(h, w.to(torch.float32), b) + c) * 0.5
        return F.cross_entropy(z.view(-1, V), t.view(-1)), z

    inputs = (hidden(), rand(V, D, dtype=torch.bfloat16), rand(V), rand(V), labels())
    assert_same_as_eager(fn, inputs, fused=1, deferred=1)


def test_logits_returned_twice_are_one_tensor():
    def fn(h, w, t):
        z = F.linear(h, w)
        return F.cross_entropy(z.view(-1, V), t.view(-1)), z, z

    h, w, t = hidden(), rand(V, D), labels()
    _, a, b = torch.compile(fn, backend="cce", options={"min_vocab": 0, "compiler": "aot_eager"})(h, w, t)
    assert a is b


def test_a_loss_on_the_returned_logits_adds_its_gradient():
    def fn(h, w, t):
        z = F.linear(h, w)
        return F.cross_entropy(z.view(-1, V), t.view(-1)), z

    h, w, t = hidden(), rand(V, D), labels()
    grads = []
    for f in (fn, torch.compile(fn, backend="cce", options={"min_vocab": 0, "compiler": "aot_eager"})):
        loss, z = f(h, w, t)
        grads.append(torch.autograd.grad(loss + z.square().mean(), (h, w)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_without_deferral_the_logits_are_real_and_the_loss_still_fuses():
    def fn(h, w, t):
        z = F.linear(h, w)
        return F.cross_entropy(z.view(-1, V), t.view(-1)), z

    inputs = (hidden(), rand(V, D), labels())
    assert_same_as_eager(fn, inputs, fused=1, deferred=0, defer_logits=False)
    options = {"min_vocab": 0, "compiler": "aot_eager", "defer_logits": False}
    torch._dynamo.reset()
    _, z = torch.compile(fn, backend="cce", options=options)(*inputs)
    assert type(z) is torch.Tensor
