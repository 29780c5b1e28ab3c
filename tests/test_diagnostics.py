"""How the numbers of filtered backwards travel: out of compiled and eager code, to `diagnostics` and `explain`."""

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import cce_inductor
from cce_inductor import config
from cce_inductor.ops import diagnostics
from cce_inductor.ops.call import Attributes
from cce_inductor.ops.library import BACKWARD, FORWARD

V, D = 600, 16
OPTIONS = {"min_vocab": 0, "grad_filter": 0.02, "diagnostics": True}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch.manual_seed(0)
    torch._dynamo.reset()
    monkeypatch.setattr(diagnostics, "_meters", {})
    # Else AOTAutograd frees, in a first backward, what a second one would need.
    with torch._functorch.config.patch(donated_buffer=False):
        yield


def compiled(fn, dynamic=None, **options):
    return torch.compile(fn, backend=cce_inductor.cce_backend, options=OPTIONS | options, dynamic=dynamic)


def make(n=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h, w = torch.randn(n, D, generator=generator), 2 * torch.randn(V, D, generator=generator)
    return h.requires_grad_(), w.requires_grad_(), torch.randint(V, (n,), generator=generator)


def written(h, w, t):
    return F.cross_entropy(F.linear(h, w), t)


def direct(h, w, t):
    return cce_inductor.linear_cross_entropy(h, w, t)


def expected(h, w, t, grad_filter="budget 0.02"):
    """The backward operator's own numbers for a mean."""
    attributes = Attributes(grad_filter=grad_filter).args()
    call = [h.detach(), w.detach(), t, torch.zeros(5)], "input weight target diagnostics", None, "lse target_logit"
    g = torch.full_like(h[:, 0], 1 / len(h)).detach()
    saved = FORWARD(*call, True, *attributes)
    (numbers,) = BACKWARD([g, -g], "lse target_logit", saved, *call, "diagnostics", *attributes)
    return dict(zip(diagnostics.NAMES, numbers.tolist(), strict=True))


def only():
    (numbers,) = cce_inductor.diagnostics()
    return numbers


def check(numbers, backwards, *wanted):
    """Averages over blocks; the worst row of all."""
    blocks = [one["blocks"] for one in wanted]
    assert (numbers["blocks"], numbers["backwards"]) == (sum(blocks), backwards)
    for name in ("kept", "full", "dropped"):
        mean = sum(one[name] * b for one, b in zip(wanted, blocks, strict=True)) / sum(blocks)
        assert numbers[name] == pytest.approx(mean, rel=1e-5), name
    assert numbers["worst"] == pytest.approx(max(one["worst"] for one in wanted), rel=1e-5)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_loss(compiler):
    """Each backward counts, a second one through the same graph too; gradients are those without diagnostics."""
    step = compiled(written, compiler=compiler)
    plain = compiled(lambda *inputs: written(*inputs), compiler=compiler, diagnostics=False)
    h, w, t = make()
    loss = step(h, w, t)
    loss.backward(retain_graph=True)
    want = expected(h, w, t)
    assert 0.2 < want["kept"] < 0.95 and want["dropped"] > 0 and want["worst"] > want["dropped"]
    check(only(), 1, want)
    loss.backward()
    check(only(), 2, want, want)
    assert only()["filter"] == "budget 0.02"
    assert (
        only()["site"].startswith("torch.nn.functional.cross_entropy at ") and "test_diagnostics.py:" in only()["site"]
    )
    ours, (h.grad, w.grad) = (h.grad, w.grad), (None, None)
    for _ in range(2):
        plain(h, w, t).backward()
    for a, b in zip(ours, (h.grad, w.grad), strict=True):
        assert torch.equal(a, b)
    check(only(), 2, want, want)


def test_other_numbers_of_rows_are_the_same_site():
    step = compiled(written, dynamic=True, compiler="aot_eager")
    every = [make(n, seed=n) for n in (300, 128, 517)]
    for inputs in every:
        step(*inputs).backward()
    check(only(), 3, *(expected(*inputs) for inputs in every))


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_inductor(dynamic):
    """Through the lowerings the bound may be another, and with it what is kept: the contract is the same."""
    step = compiled(written, dynamic=dynamic)
    every = [make(n, seed=n) for n in ((300, 140) if dynamic else (300,))]
    for h, w, t in every:
        loss = step(h, w, t)
        loss.backward(retain_graph=True)
        loss.backward()
    numbers, want = only(), [expected(*inputs) for inputs in every]
    assert numbers["backwards"] == 2 * len(every)
    assert numbers["blocks"] == 2 * sum(one["blocks"] for one in want)
    assert min(one["kept"] for one in want) * 0.9 < numbers["kept"] < 1
    assert 0 < numbers["dropped"] <= 0.02 and numbers["dropped"] < numbers["worst"] < 1


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("rematerialized", [False, True])
def test_direct_calls(backend, rematerialized):
    def step(h, w, t):
        return checkpoint(direct, h, w, t, use_reentrant=False) if rematerialized else direct(h, w, t)

    h, w, t = make()
    with config.patch(grad_filter=0.02, diagnostics=True):
        run = step if backend is None else torch.compile(step, backend=backend, fullgraph=True)
        run(h, w, t).backward()
        run(h, w, t).backward()
    check(only(), 2, expected(h, w, t), expected(h, w, t))
    assert only()["site"].startswith("cce_inductor.linear_cross_entropy at ")
    assert f"test_diagnostics.py:{direct.__code__.co_firstlineno + 1}" in only()["site"]


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_loss_inside_a_checkpoint(compiler):
    step = compiled(written, compiler=compiler)
    h, w, t = make()
    checkpoint(step, h, w, t, use_reentrant=False).backward()
    assert (only()["backwards"], only()["blocks"]) == (1, 3)
    assert 0 < only()["dropped"] <= 0.02


def test_losses_of_one_line_are_apart():
    def both(h, w, t):
        pairs = zip(h.split(128), (w, w.flip(0)), t.split(128), strict=True)
        first, second = (F.cross_entropy(F.linear(part, u), v) for part, u, v in pairs)
        return first + 100 * second

    h, w, t = make(256)
    compiled(both, compiler="aot_eager")(h, w, t).backward()
    one, two = cce_inductor.diagnostics()
    assert two["site"] == one["site"] + " #2"
    check(one, 1, expected(h[:128], w, t[:128]))
    check(two, 1, expected(h[128:], w.flip(0), t[128:]))


def test_chunks_of_one_weight_are_one_site():
    def both(h, w, t):
        pairs = zip(h.split(128), t.split(128), strict=True)
        return sum(F.cross_entropy(F.linear(part, w), u, reduction="sum") for part, u in pairs)

    h, w, t = make(256)
    compiled(both, compiler="aot_eager")(h, w, t).backward()
    check(only(), 1, expected(h, w, t))


def test_calls_in_a_loop_are_one_site():
    h, w, t = make(384)
    with config.patch(grad_filter=0.02, diagnostics=True):
        pairs = list(zip(h.split(128), t.split(128), strict=True))
        sum(direct(part, w, u) for part, u in pairs).backward()
    check(only(), 3, *(expected(part, w, u) for part, u in pairs))


@pytest.mark.parametrize("grad_filter", ["unbiased 0.02", "eps 0.01", "eps 0.01 sorted"])
def test_every_filter_has_numbers(grad_filter):
    h, w, t = make()
    compiled(written, grad_filter=grad_filter, compiler="aot_eager")(h, w, t).backward()
    assert only()["filter"] == grad_filter and only()["blocks"] == 3
    assert 0 < only()["kept"] <= 1


def test_what_leaves_none():
    h, w, t = make(20)
    for options in ({"grad_filter": "exact"}, {"diagnostics": False}):
        torch._dynamo.reset()
        compiled(written, compiler="aot_eager", **options)(h, w, t).backward()
    torch._dynamo.reset()
    step = compiled(written, compiler="aot_eager")
    with torch.no_grad():
        assert not step(h, w, t).requires_grad
    assert not step(h.detach(), w.detach(), t).requires_grad
    torch.autograd.grad(step(h, w, t), [h, w])
    smoothed = compiled(
        lambda h, w, t: F.cross_entropy(30 * torch.tanh(F.linear(h, w) / 30), t, label_smoothing=0.1),
        compiler="aot_eager",
    )
    smoothed(h, w, t).backward()  # nothing is dropped of it
    assert cce_inductor.diagnostics() == []


def test_reset():
    h, w, t = make()
    with config.patch(grad_filter=0.02, diagnostics=True):
        direct(h, w, t).backward()
        before = only()
        assert before["backwards"] == 1 and cce_inductor.diagnostics(reset=True) == [before]
        assert cce_inductor.diagnostics() == []
        direct(h[:128], w, t[:128]).backward()
    check(only(), 1, expected(h[:128], w, t[:128]))


def test_explain_has_what_was_gathered():
    h, w, t = make()
    options = {name: value for name, value in OPTIONS.items() if name != "diagnostics"}
    with config.patch(**options):
        before = str(cce_inductor.explain(written, h, w, t))
        compiled(written, compiler="aot_eager")(h, w, t).backward()
        after = cce_inductor.explain(written, h, w, t)
    (site,) = after.sites
    assert site.filter == "budget 0.02" and site.bound_bytes == 3 * V
    assert "grad_filter: budget 0.02; a bound of ⌈300/128⌉·600 bytes, 0.0 MiB, is kept" in str(after)
    assert "gathered" not in before
    assert f"gathered: budget 0.02: {expected(h, w, t)['kept']:.1%} of the columns computed" in str(after)


def test_explain_without_a_filter_that_applies():
    h, w, t = make()

    def smoothed(h, w, t):
        return F.cross_entropy(30 * torch.tanh(F.linear(h, w) / 30), t, label_smoothing=0.1)

    with config.patch(min_vocab=0, grad_filter=0.02):
        for fn, filter in ((smoothed, "exact"), (written, "budget 0.02")):
            (site,) = cce_inductor.explain(fn, h, w, t).sites
            assert site.filter == filter
        assert "grad_filter: exact; no bound is kept" in str(cce_inductor.explain(smoothed, h, w, t))
    with config.patch(min_vocab=0, grad_filter=("eps", 0.01)):
        assert "grad_filter: eps 0.01; no bound is kept" in str(cce_inductor.explain(written, h, w, t))
