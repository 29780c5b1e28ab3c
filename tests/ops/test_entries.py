"""The logits of K classes of each row: the eager implementation against all logits, and what it must not do."""

import itertools

import pytest
import torch
from head_oracle import DTYPES, Head, check_error_rule, logits, operands, some_rows, statistics
from torch.autograd import gradcheck

from cce_inductor.ops import picked, reference
from cce_inductor.ops.call import SCALES, Attributes
from cce_inductor.ops.library import BACKWARD, FORWARD

GROUPS = ("entry_logits", "lse entry_logits", "target_logit entry_logits", "lse target_logit entropy entry_logits")


def some_entries(n: int, k: int, v: int) -> torch.Tensor:
    """K classes for each row, among them the same twice and thrice, and the first and the last of all."""
    entries = torch.randint(v, (n, k), generator=torch.Generator().manual_seed(3))
    if k > 3:
        entries[:, 1] = entries[:, 0]
        entries[::2, 3] = entries[::2, 0]
        entries[1::2, 2:4] = torch.tensor([0, v - 1])
    return entries


def fused(names, attributes, row_mask=None):
    def call(given):
        return FORWARD(list(given.values()), " ".join(given), row_mask, names, False, *attributes.args())

    return call


def dense(names, attributes, row_mask=None):
    def call(given):
        factors = {name: given[name] for name in SCALES if name in given}
        cap = attributes.softcap or None, attributes.softcap_form
        z = logits(given["input"], given["weight"], given.get("bias"), attributes.scale, *cap, **factors)
        out = statistics(names, z, given["target"], entries=given["entries"])
        if row_mask is None:
            return out
        return [torch.where(row_mask if t.dim() == 1 else row_mask[:, None], t, 0) for t in out]

    return call


def results(call, head: Head, names: str, entries: torch.Tensor) -> dict[str, torch.Tensor]:
    """The statistics, and the gradients of all that has one, with tangents of both signs."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in head.leaves().items()}
    factors = {name: leaves[f"d{name}"] for name in SCALES if f"d{name}" in leaves}
    given = operands(leaves["dx"], leaves["dw"], head.target, leaves.get("db"), entries=entries, **factors)
    out = call(given)
    generator = torch.Generator().manual_seed(5)
    total = sum((t * (torch.rand(t.shape, generator=generator) - 0.4).to(t.dtype)).sum() for t in out)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return dict(zip([*names.split(), *leaves], [*(t.detach() for t in out), *gradients], strict=True))


def compare(case: str, head: Head, names: str, entries: torch.Tensor, attributes: Attributes, row_mask=None) -> None:
    ours, eager, exact = (
        results(call(names, attributes, row_mask), h, names, entries)
        for call, h in ((fused, head), (dense, head), (dense, head.to(torch.float64)))
    )
    assert ours["entry_logits"].shape == entries.shape
    check_error_rule(case, ours, eager, exact, head.x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", GROUPS)
@pytest.mark.parametrize("k", [0, 1, 5, 40], ids="{} classes".format)  # 40: more than an eighth of all
def test_values_and_gradients(k, names, dtype, small_tiles):
    softcaps = ((0.0, "tanh"), (2.0, "tanh"), (2.0, "rsqrt"))
    for bias, (softcap, form), masked in itertools.product((False, True), softcaps, (False, True)):
        head, entries = Head.make(dtype=dtype, bias=bias), some_entries(37, k, 131)
        attributes = Attributes(scale=0.7, softcap=softcap, softcap_form=form)
        case = f"bias={bias} softcap={softcap} {form} masked={masked}"
        compare(case, head, names, entries, attributes, some_rows(37) if masked else None)


@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("names", ["entry_logits", "lse entry_logits"])
@pytest.mark.parametrize("k", [5, 40])
def test_factors(which, names, k, small_tiles):
    head = Head.make(bias=True).with_factors(*which)
    for softcap, mask in itertools.product((0.0, 5.0), (None, some_rows(37))):
        compare(f"{softcap}", head, names, some_entries(37, k, 131), Attributes(scale=0.7, softcap=softcap), mask)


@pytest.mark.parametrize("workspace", [1, 4096])
def test_a_small_workspace(workspace):
    compare("small", Head.make(), "lse entry_logits", some_entries(37, 16, 131), Attributes(workspace=workspace))
    compare("small", Head.make(), "entry_logits", some_entries(37, 16, 131), Attributes(workspace=workspace))


@pytest.mark.parametrize("names", GROUPS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("v", [6, 40])
def test_gradcheck(names, masked, v):
    head, row_mask = Head.make(4, 3, v, torch.float64, True), some_rows(4) if masked else None
    leaves = [t.requires_grad_() for t in (head.x, head.w, head.bias)]
    attributes, entries = Attributes(scale=0.7, softcap=2.0), some_entries(4, 4, v)

    def fn(x, w, bias):
        return tuple(fused(names, attributes, row_mask)(operands(x, w, head.target, bias, entries=entries)))

    assert gradcheck(fn, leaves, fast_mode=False)


def test_second_derivatives_are_those_of_the_logits():
    head, entries, mask = Head.make(9, 5, 12, torch.float64, bias=True), some_entries(9, 4, 12), some_rows(9)
    found = []
    for call in (fused, dense):
        leaves = [t.detach().clone().requires_grad_() for t in (head.x, head.w, head.bias)]
        x, w, bias = leaves
        out = call("lse entry_logits", Attributes(), mask)(operands(x, w, head.target, bias, entries=entries))
        first = torch.autograd.grad(sum(t.square().sum() for t in out), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("names", ["entry_logits", "lse entry_logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [5, 40])
def test_opcheck(names, dtype, k):
    head, row_mask = Head.make(10, 8, 130, dtype, True), some_rows(10)
    given = operands(head.x, head.w, head.target, head.bias, entries=some_entries(10, k, 130))
    common = (" ".join(given), row_mask, names)
    attributes = Attributes(scale=0.7, softcap=3.0).args()
    for requires_grad in (False, True):
        leaves = [t.clone().requires_grad_(requires_grad and t.is_floating_point()) for t in given.values()]
        torch.library.opcheck(FORWARD, (leaves, *common, False, *attributes))
    saved = FORWARD(list(given.values()), *common, True, *attributes)
    tangents = [torch.randn_like(t) for t in saved]
    torch.library.opcheck(
        BACKWARD, (tangents, names, saved, list(given.values()), *common, "input weight bias", *attributes)
    )


@pytest.mark.parametrize("bad", [-1, 131])
def test_a_class_outside_the_vocabulary_is_an_error(bad):
    head, entries = Head.make(), some_entries(37, 5, 131)
    entries[4, 2] = bad
    for names in ("entry_logits", "lse entry_logits"):
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            fused(names, Attributes())(operands(head.x, head.w, head.target, entries=entries))
    # In a row that is not computed it is nobody's.
    fused(names, Attributes(), torch.arange(37) != 4)(operands(head.x, head.w, head.target, entries=entries))


@pytest.mark.parametrize(
    "entries,reason",
    [
        (torch.zeros(37, 3), "int64"),
        (torch.zeros(37, dtype=torch.int64), r"\(N, K\)"),
        (torch.zeros(36, 3, dtype=torch.int64), "37 rows"),
    ],
)
def test_entries_that_do_not_fit(entries, reason):
    head = Head.make()
    with pytest.raises(RuntimeError, match=reason):
        fused("entry_logits", Attributes())(operands(head.x, head.w, head.target, entries=entries))
    with pytest.raises(RuntimeError, match="needs entries"):
        fused("entry_logits", Attributes())(operands(head.x, head.w, head.target))


@pytest.mark.parametrize("k,tiles", [(5, False), (40, True)])
def test_tiles_are_multiplied_only_where_that_is_cheaper(k, tiles, monkeypatch):
    called = []
    original = reference.capped_tile
    monkeypatch.setattr(reference, "capped_tile", lambda *args: called.append(1) or original(*args))
    monkeypatch.setattr(reference, "dlogits", lambda *args, of=reference.dlogits: called.append(1) or of(*args))
    results(fused("entry_logits", Attributes()), Head.make(), "entry_logits", some_entries(37, k, 131))
    assert bool(called) == tiles


def test_the_weights_gradient_is_rounded_once():
    # 256 rows, whose shares of one row of dW are 1 and 2^-9: rounded one by one, bf16 would lose all but the first.
    x = torch.full((257, 4), 2.0**-9, dtype=torch.bfloat16)
    x[0] = 1.0
    w = torch.zeros(64, 4, dtype=torch.bfloat16, requires_grad=True)
    entries = torch.full((257, 1), 7)
    (out,) = fused("entry_logits", Attributes())({"input": x, "weight": w, "entries": entries})
    out.sum().backward()
    assert torch.equal(w.grad[7], torch.full((4,), 1.5, dtype=torch.bfloat16))
    assert w.grad.count_nonzero() == 4


def test_the_same_bits_twice(monkeypatch):
    head, entries = Head.make(300, 16, 1000), some_entries(300, 8, 1000)
    one, two = (results(fused("lse entry_logits", Attributes()), head, "lse entry_logits", entries) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    # Where an accelerator would add with atomics, sums go through a sort: here run on a CPU.
    total, places = torch.zeros(3, 4), torch.tensor([2, 0, 2])
    picked._add_at(total, places, torch.ones(3, 4))
    assert torch.equal(total, torch.tensor([[1.0] * 4, [0.0] * 4, [2.0] * 4]))


@pytest.mark.parametrize("text", ["budget 0.3", "unbiased 0.3", "eps 0.1"])
@pytest.mark.parametrize("k", [5, 40])
def test_no_filter_drops_an_entry(text, k):
    """The gradient of the entries alone is exact, whatever is left out of that of lse."""
    head, entries = Head.make(300, 16, 131, bias=True), some_entries(300, k, 131)
    exact = results(fused("entry_logits", Attributes()), head, "entry_logits", entries)
    leaves = [t.detach().clone().requires_grad_() for t in (head.x, head.w, head.bias)]
    given = operands(leaves[0], leaves[1], None, leaves[2], entries=entries)
    given["seed"] = torch.tensor([7])
    lse, out = fused("lse entry_logits", Attributes(grad_filter=text))(given)
    torch.testing.assert_close(out, exact["entry_logits"])
    tangent = torch.rand(out.shape, generator=torch.Generator().manual_seed(5)) - 0.4
    gradients = torch.autograd.grad((out * tangent).sum() + 0.0 * lse.sum(), leaves)
    for name, ours in zip(("dx", "dw", "db"), gradients, strict=True):
        torch.testing.assert_close(ours, exact[name])
