"""The registered operators: values of every statistic, gradcheck, opcheck, flops."""

import itertools

import pytest
import test_two_heads
import torch
from head_oracle import DTYPES, Head, call_forward, error, logits, some_rows, statistics
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from cce_inductor.ops.call import Attributes
from cce_inductor.ops.gemm import MM
from cce_inductor.ops.library import BACKWARD, FORWARD
from cce_inductor.ops.statistics import TABLE

EVERY = "lse target_logit logit_sum entropy argmax"
GROUPS = ("lse", "target_logit", "logit_sum", "lse entropy", "argmax", "argmax target_logit lse", EVERY)
VARIANTS = list(
    itertools.product((False, True), (1.0, 0.7), ((None, "tanh"), (2.0, "tanh"), (2.0, "rsqrt")), (False, True))
)  # bias, scale, softcap and its form, row_mask


def test_the_table_is_covered():
    elsewhere = {"lse_low", "lse_rest", "lse_rest_low", "entry_logits"}  # in test_large_logits.py and others
    of_two_heads = {name for name, row in TABLE.items() if "other_input" in row.requires or name == "other_lse_low"}
    assert set(EVERY.split()) | elsewhere | of_two_heads == set(TABLE)
    assert of_two_heads == set(test_two_heads.EVERY.split()) - {"lse", "lse_low"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", GROUPS)
def test_values(names, dtype, small_tiles):
    column_weight = torch.rand(131)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for bias, scale, (softcap, form), masked in VARIANTS:
        head = Head.make(dtype=dtype, bias=bias)
        row_mask = some_rows(37) if masked else None
        how = {"scale": scale, "softcap": softcap or 0.0, "softcap_form": form}
        result = call_forward(head, names, bias=head.bias, row_mask=row_mask, column_weight=column_weight, **how)
        exact = head.to(torch.float64)
        z = logits(exact.x, exact.w, exact.bias, scale, softcap, form)
        for name, ours, want in zip(
            names.split(), result, statistics(names, z, head.target, column_weight), strict=True
        ):
            want = want if row_mask is None else torch.where(row_mask, want, 0)
            case = f"{name}, bias={bias} scale={scale} softcap={softcap} {form} masked={masked}"
            assert ours.shape == (37,), case
            if name == "argmax":
                assert torch.equal(ours, want), case
            else:
                assert ours.dtype == wide, case
                assert error(ours, want) < 8 * torch.finfo(wide).eps, case


def test_argmax_is_the_first_of_equal_logits(small_tiles):
    head = Head.make()
    head.w[7] = head.w[80] = head.w[119] = 100 * head.x.mean(0)
    (ours,) = call_forward(head, "argmax")
    assert torch.equal(ours, (head.x @ head.w.T).argmax(1))
    assert (ours == 7).any() and not (ours == 80).any()


@pytest.mark.parametrize("names", ["lse", "target_logit", "logit_sum", "lse entropy", EVERY])
@pytest.mark.parametrize("bias,scale,softcap,masked", VARIANTS, ids=str)
def test_gradcheck(names, bias, scale, softcap, masked, monkeypatch):
    monkeypatch.setattr("cce_inductor.ops.reference.BLOCK_ROWS", 2)
    monkeypatch.setattr("cce_inductor.ops.reference.SLAB_COLUMNS", 4)
    head = Head.make(4, 3, 6, torch.float64, bias)
    leaves = [t.requires_grad_() for t in (head.x, head.w, head.bias) if t is not None]
    column_weight = torch.rand(6, dtype=torch.float64)
    row_mask = some_rows(4) if masked else None

    def fn(*operands):
        inner = Head(operands[0], operands[1], head.target)
        out = call_forward(
            inner,
            names,
            bias=operands[2] if bias else None,
            column_weight=column_weight,
            row_mask=row_mask,
            scale=scale,
            softcap=softcap[0] or 0.0,
            softcap_form=softcap[1],
        )
        return tuple(t for t in out if t.is_floating_point())

    assert gradcheck(fn, leaves, fast_mode=False)


OPCHECK_CASES = {
    "one statistic": {"names": "lse"},
    "a loss": {"names": "lse target_logit"},
    "every statistic": {"names": EVERY},
    "bias": {"names": "lse target_logit", "bias": True},
    "class weights": {"names": "lse logit_sum", "column_weight": True},
    "row_mask": {"names": "lse target_logit", "row_mask": True},
    "all at once": {
        "names": EVERY,
        "bias": True,
        "column_weight": True,
        "row_mask": True,
        "scale": 0.7,
        "softcap": 3.0,
    },
    "the other softcap": {"names": "lse target_logit", "bias": True, "softcap": 3.0, "softcap_form": "rsqrt"},
    "compute dtype": {"names": "lse target_logit", "compute_dtype": torch.bfloat16},
}


@pytest.mark.parametrize(
    "case,dtype",
    [(case, torch.float32) for case in OPCHECK_CASES]
    + [("all at once", dtype) for dtype in DTYPES if dtype != torch.float32],
    ids=str,
)
def test_opcheck(case, dtype):
    options = dict(OPCHECK_CASES[case])
    names, bias, weighted, masked = (options.pop(k, False) for k in ("names", "bias", "column_weight", "row_mask"))
    head = Head.make(10, 8, 30, dtype, bias)
    operands = {"input": head.x, "weight": head.w, "target": head.target}
    operands |= {"bias": head.bias} if bias else {}
    operands |= {"column_weight": torch.rand(30).to(dtype)} if weighted else {}
    row_mask = some_rows(10) if masked else None
    attributes = Attributes(**options).args()
    common = ([t.clone() for t in operands.values()], " ".join(operands), row_mask, names)

    for requires_grad in (False, True):
        leaves = [
            t.clone().requires_grad_(requires_grad and name in ("input", "weight", "bias"))
            for name, t in operands.items()
        ]
        torch.library.opcheck(FORWARD, (leaves, *common[1:], False, *attributes))

    saved = FORWARD(*common, True, *attributes)
    differentiable = {name: t for name, t in zip(names.split(), saved, strict=True) if t.is_floating_point()}
    for needs in ("input weight bias" if bias else "input weight", "weight"):
        tangents = [torch.randn_like(t) for t in differentiable.values()]
        arguments = (tangents, " ".join(differentiable), saved, *common, needs, *attributes)
        torch.library.opcheck(BACKWARD, arguments)


def test_unknown_statistics_and_operands_are_errors():
    head = Head.make()
    with pytest.raises(ValueError, match="expected names out of .*lse"):
        call_forward(head, "lse median")
    with pytest.raises(ValueError):
        call_forward(head, "")
    with pytest.raises(RuntimeError, match="entropy needs lse"):
        call_forward(head, "entropy")
    with pytest.raises(RuntimeError, match="needs target"):
        FORWARD([head.x, head.w], "input weight", None, "target_logit", False, *Attributes().args())
    with pytest.raises(RuntimeError, match="softcap_form must be one of .*tanh.*, got 'sin'"):
        call_forward(head, "lse", softcap=2.0, softcap_form="sin")
    with pytest.raises(RuntimeError, match="unknown operands"):
        FORWARD([head.x, head.w], "input heavy", None, "lse", False, *Attributes().args())


def test_flops():
    head = Head.make(10, 8, 30)
    gemm = 2 * 10 * 8 * 30
    with FlopCounterMode(display=False) as counter:
        call_forward(head, "lse target_logit")
    assert counter.get_total_flops() == gemm
    # The gradients wanted decide what the backward costs: its logits, dx, dW.
    for needs, total in (("xw", 4), ("x", 3), ("w", 3)):
        head = Head.make(10, 8, 30)
        head.x.requires_grad_("x" in needs)
        head.w.requires_grad_("w" in needs)
        with FlopCounterMode(display=False) as counter:
            sum(t.sum() for t in call_forward(head, "lse target_logit")).backward()
        assert counter.get_total_flops() == total * gemm, needs


def test_opcheck_of_the_product_in_place():
    torch.library.opcheck(MM, (torch.empty(3, 4), torch.randn(3, 5), torch.randn(5, 4)))
