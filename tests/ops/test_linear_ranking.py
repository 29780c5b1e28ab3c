"""The operator of rankings: the largest logits and counts of comparisons, as torch gives them for the whole logits."""

import pytest
import torch
import torch.nn.functional as F
from test_memory import MIB, Allocations

from cce_inductor.ops.ranking import COMPARISONS, RANKING, RESULTS

EVERY = " ".join(RESULTS)


def call(operands, results=EVERY, k=3, scale=1.0, softcap=0.0, compute=None, dtype=None, workspace=64 * MIB):
    """The results by name."""
    compute = compute or operands["weight"].dtype
    settings = scale, softcap, "tanh", compute, dtype or compute, workspace, ""
    out = RANKING(list(operands.values()), " ".join(operands), results, k, *settings)
    return dict(zip(results.split(), out, strict=True))


def expected(z, numbers, k=3):
    counts = {name: compare(z, numbers).sum(1) for name, compare in COMPARISONS.items()}
    values, indices = z.topk(k)
    return {"values": values, "indices": indices, **counts}


def operands(n, d, v, dtype, integers=False):
    """With `integers` many logits are equal, and every order of adding gives the same bits."""

    def make(*shape):
        return (torch.randint(-2, 3, shape) if integers else torch.randn(shape)).to(dtype)

    torch.manual_seed(0)
    return {"input": make(n, d), "weight": make(v, d)}


@pytest.mark.parametrize("with_target", [True, False])
@pytest.mark.parametrize("workspace", [64 * MIB, 1 << 14, 1 << 10, 1])
@pytest.mark.parametrize("n,v", [(30, 700), (1, 5), (200, 5), (0, 9)])
def test_any_tiles(with_target, workspace, n, v):
    given = operands(n, 6, v, torch.float64)
    z = F.linear(*given.values())
    target = torch.randint(0, v, (n,))
    numbers = z.gather(1, target[:, None]) if with_target else torch.randn(n, 1, dtype=torch.float64)
    given |= {"target": target} if with_target else {"threshold": numbers[:, 0]}
    got = call(given, workspace=workspace)
    for name, want in expected(z, numbers).items():
        torch.testing.assert_close(got[name], want, rtol=1e-12, atol=1e-12)


def test_everything_between_the_head_and_the_comparison():
    given = operands(20, 8, 90, torch.float64)
    bias, shift, factor = torch.randn(90).double(), torch.randn(90).double(), torch.tensor(0.7).double()
    filled = torch.full((90,), torch.nan).double()
    filled[::7] = -2.5
    z = 1.5 * (F.linear(*given.values(), bias) * factor + shift)
    z = torch.where(filled.isnan(), 4 * torch.tanh(z / 4), filled)
    numbers = z[:, 14:15]  # one of those that are filled
    given |= {"bias": bias, "shift": shift, "factor": factor, "filled": filled, "target": torch.full((20,), 14)}
    for workspace in (64 * MIB, 1 << 12):
        got = call(given, scale=1.5, softcap=4.0, workspace=workspace)
        for name, want in expected(z, numbers).items():
            torch.testing.assert_close(got[name], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("workspace", [64 * MIB, 1 << 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_logits_are_counted_as_eager_counts_them(dtype, workspace):
    given = operands(40, 5, 600, dtype, integers=True)
    target = torch.randint(0, 600, (40,))
    z = F.linear(*given.values())
    want = expected(z, z.gather(1, target[:, None]))
    got = call({**given, "target": target}, workspace=workspace)
    assert (want["ge"] - want["gt"]).max() > 10
    for name in ("values", *COMPARISONS):
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workspace", [64 * MIB, 1 << 16])
def test_no_target_outranks_itself(dtype, workspace):
    """Whatever its logit is rounded to."""
    given = operands(300, 200, 500, dtype)
    target = F.linear(*given.values()).argmax(1)
    got = call({**given, "target": target}, workspace=workspace)
    assert (got["ge"] - got["gt"]).min() >= 1 and (got["le"] + got["gt"]).eq(500).all()


def test_operands_are_rounded_as_under_autocast():
    given = operands(40, 64, 300, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z = F.linear(*given.values())
        got = call(given, "values indices", compute=torch.bfloat16)
        wide = call(given, "values indices")
    assert torch.equal(got["values"], z.topk(3).values) and got["values"].dtype == torch.bfloat16
    assert torch.equal(wide["values"], F.linear(*given.values()).topk(3).values)


def test_operator_is_well_behaved():
    given = operands(7, 4, 30, torch.float32) | {"target": torch.randint(0, 30, (7,))}
    given["weight"].requires_grad_()
    settings = 1.0, 0.0, "tanh", torch.float32, torch.float32, MIB, ""
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(RANKING, (list(given.values()), " ".join(given), EVERY, 3, *settings), test_utils=checks)
    assert not any(r.requires_grad for r in call(given).values())


def test_wrong_calls():
    given = operands(4, 3, 9, torch.float32)
    with pytest.raises(IndexError, match="Target 9"):
        call({**given, "target": torch.tensor([0, 1, 2, 9])}, "gt", 0)
    with pytest.raises(RuntimeError, match="a target or a threshold"):
        call(given, "gt", 0)
    with pytest.raises(RuntimeError, match="expected some of"):
        call(given, "median")


def test_not_a_number():
    """As torch has it: the largest of all, and nothing compares with it."""
    given = operands(3, 4, 50, torch.float32)
    given["weight"][17] = torch.nan
    z = F.linear(*given.values())
    numbers = torch.zeros(3, 1)
    for workspace in (MIB, 1 << 9):
        got = call({**given, "threshold": numbers[:, 0]}, workspace=workspace)
        for name, want in expected(z, numbers).items():
            torch.testing.assert_close(got[name], want, equal_nan=True)


@pytest.mark.parametrize("results", ["values indices", "gt", "values indices gt ge"])
@pytest.mark.parametrize(
    "dtype,compute", [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize("n,d,v", [(300, 64, 20_000), (40, 64, 60_000)])
@pytest.mark.parametrize("workspace_mb", [2, 16])
def test_scratch_stays_within_the_workspace(results, dtype, compute, n, d, v, workspace_mb):
    given = operands(n, d, v, dtype)
    if "gt" in results:
        given["target"] = torch.randint(0, v, (n,))
    call(given, results, compute=compute)  # warm up
    with Allocations() as used:
        out = call(given, results, compute=compute, workspace=workspace_mb * MIB)
    rows = 8 * sum(x.nbytes for x in out.values()) + n * 256
    assert used.peak <= workspace_mb * MIB + rows, f"{used.peak} and {rows}"
