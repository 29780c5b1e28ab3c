"""Deferred logits behave as eager's, and stay unread until somebody looks.

Every test builds the same logits twice, once deferred and once with eager PyTorch, does the same to both, and
compares exactly.  ``reads`` counts how often the head was really computed.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from cce_inductor.deferred import DeferredLogits, DeferredLogitsError, defer, tensor

B, S, D, V = 2, 3, 4, 8


def linear(o: Sequence[Tensor]) -> Tensor:
    return F.linear(o[0], o[1])


def upcast(o: Sequence[Tensor]) -> Tensor:
    return F.linear(o[0], o[1]).float()


def capped(o: Sequence[Tensor]) -> Tensor:
    return torch.tanh(F.linear(o[0], o[1], o[2]) / 3) * 3


@dataclass
class Logits:
    """Logits with the leaves they came from."""

    logits: Any
    hidden: Tensor
    weight: nn.Parameter
    bias: nn.Parameter
    trunk: Tensor  # what the head is applied to: not a leaf, as in a model

    def grads(self) -> list[Tensor | None]:
        return [self.hidden.grad, self.weight.grad, self.bias.grad]


def build(
    lazy: bool,
    compute: Callable = capped,
    *,
    grad: bool = True,
    dtype: torch.dtype = torch.float32,
    large: bool = False,
) -> Logits:
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, S, D, generator=gen).to(dtype).requires_grad_(grad)
    weight = nn.Parameter(torch.randn(V, D, generator=gen).to(dtype), requires_grad=grad)
    bias = nn.Parameter(torch.randn(V, generator=gen).to(dtype), requires_grad=grad)
    trunk = hidden * 1.5
    operands = (trunk, weight, bias)
    out = compute(operands)
    if lazy:
        given = {"shape": out.shape, "dtype": out.dtype, "requires_grad": out.requires_grad}
        out = defer(compute, operands, fuse=lambda *_: NotImplemented, large=large, **given)
    return Logits(out, hidden, weight, bias, trunk)


def both(compute: Callable = capped, **kwargs: Any) -> tuple[Logits, Logits]:
    return build(True, compute, **kwargs), build(False, compute, **kwargs)


def count() -> int:
    return counters["cce_inductor"]["deferred_materialized"]


class Reads:
    """``with Reads() as reads: ...; reads.n`` materialisations."""

    def __enter__(self) -> Reads:
        self.start = count()
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    @property
    def n(self) -> int:
        return count() - self.start


def same(got: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert isinstance(got, Tensor)
        for what in ("shape", "dtype", "device", "requires_grad", "is_leaf"):
            assert getattr(got, what) == getattr(expected, what), what
        assert got.stride() == expected.stride()
        assert torch.equal(got.detach(), expected.detach())
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for g, e in zip(got, expected, strict=True):
            same(g, e)
    else:
        assert got == expected


# ------------------------------------------------------------------------------------------------- staying lazy

QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "shape": lambda x: x.shape,
    "size": lambda x: (x.size(), x.size(-1)),
    "len": len,
    "dim": lambda x: (x.dim(), x.ndim),
    "stride": lambda x: x.stride(),
    "numel": lambda x: (x.numel(), x.nbytes, x.itemsize, x.element_size()),
    "dtype": lambda x: (x.dtype, x.type(), torch.is_floating_point(x)),
    "device": lambda x: (x.device, x.is_cuda, x.is_cpu, x.get_device() if x.is_cuda else -1),
    "layout": lambda x: (x.layout, x.is_contiguous(), x.storage_offset(), x.is_sparse),
    "autograd": lambda x: (x.requires_grad, x.is_leaf, x.grad_fn is None, x.is_inference()),
    "isinstance": lambda x: (isinstance(x, Tensor), torch.is_tensor(x), x is not None),
    "dict_key": lambda x: {x: 1}[x],
    "pytree": lambda x: [leaf.shape for leaf in pytree.tree_leaves({"a": (x, [x])})],
    "same_tensor": lambda x: [y is x for y in (x.cpu(), x.to("cpu"), x.float(), x.contiguous(), x.to(x))],
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_about_anything_but_values_is_answered_without_them(name: str, grad: bool) -> None:
    with Reads() as reads:
        got, expected = both(grad=grad)
        same(QUESTIONS[name](got.logits), QUESTIONS[name](expected.logits))
        assert isinstance(got.logits, DeferredLogits) and not got.logits.is_materialized
    assert reads.n == 0


CLASSES = torch.arange(V)
FIRST = torch.ones(B, S, dtype=torch.long)

LAZY: dict[str, Callable[[Any], Any]] = {
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "clone": lambda x: x.clone(),
    "alias": torch.ops.aten.alias,
    "copy": copy.copy,
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "long": lambda x: x.long(),
    "to_dtype": lambda x: x.to(torch.float16),
    "to_other": lambda x: x.to(torch.zeros(1, dtype=torch.float64)),
    "to_copy": lambda x: x.to("cpu", copy=True, non_blocking=True),
    "clone_strides": lambda x: x.clone(memory_format=torch.contiguous_format),
    "chain": lambda x: x.detach().double().clone().bfloat16().cpu().float().contiguous(),
    "log_softmax": lambda x: x.log_softmax(-1),
    "log_softmax_dtype": lambda x: F.log_softmax(x, 1, dtype=torch.float64),
    "view": lambda x: x.view(-1, V),
    "reshape": lambda x: x.reshape(S, B * V),
    "reshape_copy": lambda x: x.mT.reshape(-1),
    "flatten": lambda x: x.flatten(0, 1),
    "unflatten": lambda x: x.unflatten(-1, (2, -1)),
    "index": lambda x: x[:, -1],
    "slice": lambda x: x[..., :-1, :],
    "slice_step": lambda x: x[:, ::2, 1:7:3],
    "transpose": lambda x: x.mT,
    "t": lambda x: x[0].t(),
    "permute": lambda x: x.permute(2, 0, 1),
    "unsqueeze": lambda x: x[None].unsqueeze(-1),
    "squeeze": lambda x: x[:1].squeeze(0),
    "squeeze_all": lambda x: x[:1].squeeze(),
    "squeeze_some": lambda x: x[:1, 1:2].squeeze((0, 1)),
    "expand": lambda x: x[:1].expand(2, -1, -1, -1),
    "gather": lambda x: x.gather(2, CLASSES[:3].expand(*x.shape[:2], 3)),
    "shifted": lambda x: x[..., :-1, :].contiguous().view(-1, V).float(),
    "split": lambda x: x.split(2, dim=1)[1],
    "split_with_sizes": lambda x: x.split([1, 2], dim=1)[1],
    "chunk": lambda x: x.chunk(2, -1)[1],
    "unbind": lambda x: x.unbind(1)[1],
    "unbind_rows": lambda x: torch.unbind(x)[-1],
    "view_of_view": lambda x: x.mT[:, 2:5].mT[0],
}


# Recorded: the same is done to every entry, with numbers and small tensors beside it.
ARITHMETIC: dict[str, Callable[[Any], Any]] = {
    "softmax": lambda x: x.softmax(-1),
    "softmax_dtype": lambda x: F.softmax(x, 1, dtype=torch.float64),
    "exp": lambda x: x.exp(),
    "exp_view": lambda x: x.mT.exp()[1],
    "mul": lambda x: 2 * x,
    "mul_by_own_softmax": lambda x: x.softmax(-1) * x.log_softmax(-1),
    "mul_by_own_logarithm": lambda x: x.log_softmax(-1) * x.log_softmax(-1).exp(),
    "mul_in_parts": lambda x: (lambda y: torch.exp(y) * y)(x[:, 1].log_softmax(-1)),
    "div": lambda x: x / 0.7,
    "temperature": lambda x: x / torch.tensor(0.7),
    "add": lambda x: x + torch.linspace(0, 1, V, dtype=x.dtype),
    "rsub": lambda x: 1 - x,
    "sub_of_rows": lambda x: x - torch.arange(S, dtype=x.dtype)[:, None],
    "masked_fill": lambda x: x.masked_fill(CLASSES > 3, -torch.inf),
    "where": lambda x: torch.where(CLASSES > 3, -1e4, x),
    "where_literal_behind": lambda x: torch.where(CLASSES > 3, x, -1e4),
    "tanh": lambda x: 5 * torch.tanh(x / 5),
    "pair_of_both": lambda x: x * x.softmax(-1),
    "pair_minus": lambda x: (x + CLASSES) - (x * 0.5),
    "cosine": lambda x: torch.cos(x),
    "where_of_two": lambda x: torch.where(F.one_hot(FIRST, V).bool(), x - 0.5, x),
    "scatter": lambda x: x.scatter(-1, FIRST[..., None], x.gather(-1, FIRST[..., None]) * 0.5),
    "scatter_number": lambda x: x.scatter(-1, FIRST[..., None], 0.5),
    "scatter_add": lambda x: x.scatter_add(-1, FIRST[..., None], torch.ones(B, S, 1, dtype=x.dtype)),
    "flip": lambda x: x.flip(1),
    "logsumexp": lambda x: x.logsumexp(0),
    "rot90": lambda x: x.rot90(1, (0, 1)),
    "roll": lambda x: x.roll(1, 1).roll(1),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "index_select": lambda x: x.index_select(1, torch.tensor([1, 0, 1])),
    "index": lambda x: x[..., CLASSES.flip(0)],
    "cat": lambda x: torch.cat([x[:, :1] * 2, x[:, 1:]], 1),
    "stack": lambda x: torch.stack([x, x.exp()], 1),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", [*LAZY, *ARITHMETIC])
def test_copies_and_casts_stay_lazy_and_then_read_as_eager(name: str, grad: bool) -> None:
    got, expected = both(upcast, grad=grad, dtype=torch.bfloat16, large=not grad)
    with Reads() as reads:
        a, b = ({**LAZY, **ARITHMETIC}[name](side.logits) for side in (got, expected))
        assert isinstance(a, DeferredLogits) and not a.is_materialized
        for what in ("shape", "dtype", "requires_grad", "is_leaf"):
            assert getattr(a, what) == getattr(b, what), what
        for what in ("stride", "storage_offset", "_is_view"):
            assert getattr(a, what)() == getattr(b, what)(), what
        assert reads.n == 0
        same(a, b)
        same(got.logits, expected.logits)  # both: the head was computed once for the whole chain
        assert reads.n == 1


@pytest.mark.parametrize("name", [*ARITHMETIC, "gather"])
def test_what_is_computed_without_a_gradient_is_there_when_the_weights_have_changed(name: str) -> None:
    """A metric that a program keeps, of logits that are not large."""
    got, expected = both(upcast, dtype=torch.bfloat16)
    kept = [{**LAZY, **ARITHMETIC}[name](side.logits.detach()) for side in (got, expected)]
    with torch.no_grad():
        got.weight.add_(1)
    same(*kept)


@pytest.mark.parametrize("name", ["float", "clone", "detach"])
def test_lazy_operators_stay_lazy_in_inference_mode(name: str) -> None:
    got, expected = both(grad=False, dtype=torch.bfloat16)
    with torch.inference_mode(), Reads() as reads:
        a, b = LAZY[name](got.logits), LAZY[name](expected.logits)
        assert reads.n == 0
        same(a, b)


FROM_SHAPE: dict[str, Callable[[Any], Any]] = {
    "empty_like": lambda x: torch.empty_like(x) * 0 == 7,
    "zeros_like": torch.zeros_like,
    "ones_like": lambda x: torch.ones_like(x, dtype=torch.float64),
    "full_like": lambda x: torch.full_like(x, 3),
    "rand_like": lambda x: torch.rand_like(x, generator=torch.Generator().manual_seed(1)),
    "randn_like": lambda x: torch.randn_like(x).isinf(),
    "new_empty": lambda x: x.new_empty((0, 3)),
    "new_zeros": lambda x: x.new_zeros(3),
    "new_ones": lambda x: x.new_ones((2, 2)),
    "new_full": lambda x: x.new_full((2,), 5.0),
    "new_empty_strided": lambda x: x.new_empty_strided((0, 3), (1, 7)),
}


@pytest.mark.parametrize("name", FROM_SHAPE)
def test_tensors_made_in_its_image_need_no_values(name: str) -> None:
    if name == "rand_like":
        FROM_SHAPE[name] = lambda x: (torch.manual_seed(1), torch.rand_like(x))[1]
    got, expected = both()
    with Reads() as reads:
        out = FROM_SHAPE[name](got.logits)
        assert not isinstance(out, DeferredLogits)
        same(out, FROM_SHAPE[name](expected.logits))
    assert reads.n == 0


def test_every_row_of_the_table_is_tested_above() -> None:
    tested = (
        set(LAZY)
        | set(ARITHMETIC)
        | set(FROM_SHAPE)
        | {"_to_copy", "_log_softmax", "_softmax", "_unsafe_view", "select", "gather"}
    )
    rules = {op.overloadpacket.__name__ for op in (*tensor.RULES.lazy, *tensor.RULES.joined)}
    assert {name for name in rules if name.startswith("_") or not name.endswith("_")} <= tested


# ------------------------------------------------------------------------------------------------ walks over outputs


def test_a_model_output_is_walked_without_reading() -> None:
    generic = pytest.importorskip("transformers.utils.generic")
    outputs = pytest.importorskip("transformers.modeling_outputs")
    assert issubclass(outputs.CausalLMOutputWithPast, generic.ModelOutput)
    got, expected = both()
    with Reads() as reads:
        out = outputs.CausalLMOutputWithPast(loss=torch.ones(()), logits=got.logits)
        assert list(out.keys()) == ["loss", "logits"]
        assert out[1] is out.logits is out["logits"] is out.to_tuple()[1] is dict(out.items())["logits"]
        assert copy.copy(out).logits is got.logits
        leaves, spec = pytree.tree_flatten(out)
        again = pytree.tree_unflatten([leaf.detach() for leaf in leaves], spec)
        assert isinstance(again.logits, DeferredLogits)
        assert "not computed yet" in repr(out)
        assert reads.n == 0
        same(again.logits, expected.logits.detach())
        assert reads.n == 1


def test_ddp_walks_the_output_without_reading() -> None:
    parallel = pytest.importorskip("torch.nn.parallel.distributed")
    got, _ = both()
    with Reads() as reads:
        found = list(parallel._find_tensors({"loss": got.trunk, "logits": [got.logits]}))
        assert found[1] is got.logits
        # What DDP(static_graph=True) and find_unused_parameters do with every output that requires grad.
        assert isinstance(got.logits.clone(), DeferredLogits)
    assert reads.n == 0


def test_trainer_and_accelerate_walk_the_output_without_reading() -> None:
    nested_detach = pytest.importorskip("transformers.trainer_pt_utils").nested_detach
    convert = pytest.importorskip("accelerate.utils.operations").convert_to_fp32
    got, expected = both(dtype=torch.bfloat16)
    with Reads() as reads:
        out = nested_detach(convert({"logits": (got.logits,)}))["logits"][0]
        assert isinstance(out, DeferredLogits) and out.dtype == torch.float32
        assert reads.n == 0
        same(out, expected.logits.float().detach())


# -------------------------------------------------------------------------------------------------------- reading


def stack_of_edits(x: Any) -> Tensor:
    buffer = torch.zeros(B, S, V)
    buffer[:] = x.detach()
    return buffer


READS: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda x: x.argmax(-1),
    "index_of_two": lambda x: x[torch.tensor([0, 0]), torch.tensor([0, 2])],
    "mask": lambda x: x[x.detach() > 0],
    "iterate": lambda x: [row.sum() for row in x],
    "cat_with_as_many": lambda x: torch.cat([x, torch.zeros(x.shape)], 1),
    "arithmetic": lambda x: (2 * x + x.exp()).cumsum(1),
    "product": lambda x: (x * x).cumsum(1),
    "softmax_read": lambda x: x.softmax(-1).cumsum(1),
    "exp_read": lambda x: x.exp().cumsum(1),
    "scaled": lambda x: (x / 2).cumsum(1),
    "own_softmax": lambda x: (x.softmax(-1) * x).cumsum(1),
    "topk": lambda x: x.topk(2)[1],
    "allclose": lambda x: torch.allclose(x, x),
    "item": lambda x: x[0, 0, 0].item(),
    "bool": lambda x: bool((x > 0).any()),
    "contains": lambda x: 123.0 in x,
    "copy_into": stack_of_edits,
    "out": lambda x: torch.add(x.detach(), 1, out=torch.empty(B, S, V)),
    "slice_read": lambda x: (x[..., :-1, :] + 0).cumsum(1),
    "transpose_read": lambda x: x.mT @ x,
    "diagonal": lambda x: x.diagonal(),
    "cross_entropy": lambda x: F.cross_entropy(x.view(-1, V).float(), torch.arange(B * S)),
    "vmap": lambda x: torch.vmap(lambda row: row.logsumexp(-1))(x),
    "func_grad": lambda x: torch.func.grad(lambda y: (y**2).sum())(x.detach()),
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(torch.cumsum, x, 1, use_reentrant=False),
    "foreach": lambda x: torch._foreach_mul([x, x.detach()], 2.0),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "numpy_force": lambda x: x.numpy(force=True),
    "asarray": lambda x: np.asarray(x.detach()),
    "array_dtype": lambda x: np.asarray(x.detach(), dtype=np.float64),
    "ufunc": lambda x: torch.as_tensor(np.add(x.detach(), 1)),
    "dlpack": lambda x: torch.from_dlpack(x.detach()),
    "numpy_dlpack": lambda x: np.from_dlpack(x.detach()),
    "data_ptr": lambda x: x.data_ptr() != 0,
    "untyped_storage": lambda x: x.untyped_storage().tolist(),
    "storage": lambda x: x.storage().tolist(),
    "is_shared": lambda x: (x.is_shared(), x.share_memory_() is x, x.is_shared()),
    "as_subclass": lambda x: x.as_subclass(Tensor),
    "str": lambda x: str(x.detach()),
    "format": lambda x: f"{x.detach()} {x.detach()!s}",
    "format_of_an_entry": lambda x: f"{x.detach()[0, 0, 0]:.3f} {x.detach().amax():8.2e}",
    "materialize": lambda x: x.materialize() if isinstance(x, DeferredLogits) else x.view(x.shape),
}


@pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:__array_wrap__")
@pytest.mark.parametrize("name", READS)
def test_every_other_use_reads_eagers_values_once(name: str) -> None:
    got, expected = both()
    with Reads() as reads:
        out = READS[name](got.logits)
        same(out, READS[name](expected.logits))
        assert got.logits.is_materialized and reads.n == 1
        # Views are of the logits' type, and everything else is plain.
        lazy = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, DeferredLogits)]
        assert all(leaf._base is got.logits and leaf.is_materialized for leaf in lazy)
        same(READS[name](got.logits), READS[name](expected.logits))
        same(got.logits, expected.logits)
    assert reads.n == 1


def test_numpy_of_logits_that_require_grad_is_eagers_error() -> None:
    for side in both():
        with pytest.raises(RuntimeError, match="Can't call numpy"):
            side.logits.numpy()


def test_memory_that_cannot_be_intercepted_is_an_error_and_no_null_pointer() -> None:
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(build(True, grad=False).logits)


def test_print_shows_the_values_and_repr_waits_for_them() -> None:
    got, expected = both()
    with Reads() as reads:
        assert repr(got.logits) == (
            "DeferredLogits(not computed yet, size=(2, 3, 8), dtype=torch.float32, requires_grad=True)"
        )
        assert reads.n == 0
        assert str(got.logits) == str(expected.logits).replace("MulBackward0", "DeferLogitsBackward")
        assert reads.n == 1
        assert repr(got.logits) == str(got.logits)


def test_a_head_that_computes_another_layout_reads_contiguous() -> None:
    hidden, weight = torch.randn(S, D), torch.randn(V, D)
    x = defer(lambda o: (o[1] @ o[0].t()).t(), (hidden, weight), shape=(S, V), dtype=hidden.dtype, requires_grad=False)
    same(x.materialize(), (weight @ hidden.t()).t().contiguous())


def test_raw_and_upcast_bf16_logits_are_bit_equal() -> None:
    for compute in (linear, upcast, capped):
        got, expected = both(compute, dtype=torch.bfloat16)
        same(got.logits, expected.logits)


# ---------------------------------------------------------------------------------------------- copies that leave


def saved(x: Any) -> Any:
    file = io.BytesIO()
    torch.save({"logits": x}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["logits"]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("leave", [saved, lambda x: pickle.loads(pickle.dumps(x))], ids=["torch.save", "pickle"])
def test_stored_as_a_plain_tensor(leave: Callable, grad: bool) -> None:
    got, expected = both(grad=grad)
    out = leave(got.logits)
    assert type(out) is Tensor
    same(out, leave(expected.logits))


def test_deepcopy_copies_leaves_and_refuses_others_as_eager_does() -> None:
    got, expected = both(grad=False)
    pair, pair_eager = (copy.deepcopy([s.logits, s.logits]) for s in (got, expected))
    same(pair, pair_eager)
    assert pair[0] is pair[1]
    pair[0].zero_()
    same(got.logits, expected.logits)
    for side in (got, expected):
        copies = copy.deepcopy([side.logits, side.logits.detach()])  # memory that is shared stays so
        copies[0].fill_(3)
        assert (copies[1] == 3).all()
    for side in both():
        with pytest.raises(RuntimeError, match="deepcopy protocol"):
            copy.deepcopy(side.logits)


# ------------------------------------------------------------------------------------------------- in-place edits


def masked(x: Any) -> Any:
    x[x.detach() < 0] = -float("inf")
    return x


EDITS: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda x: x.mul_(3),
    "div_": lambda x: x.__itruediv__(0.7),
    "masked": lambda x: masked(x).clamp(min=-2),
    "setitem": lambda x: (x.__setitem__((0, 0), -1.0), x)[1],
    "through_view": lambda x: (x[:, 0].zero_(), x)[1],
    "through_detach": lambda x: (x.detach().mul_(2), x)[1],
    "through_data": lambda x: (x.data.mul_(2), x)[1],
    "through_numpy": lambda x: (x.detach().numpy().__imul__(2), x)[1],
    "clone_then_edit": lambda x: x.clone().mul_(2) + x,
    "edit_then_cast": lambda x: x.add_(1).double(),
    "unsqueeze_": lambda x: x.unsqueeze_(0).mul(2),
    "transpose_": lambda x: x.transpose_(0, 1),
}


@pytest.mark.parametrize("name", EDITS)
def test_in_place_edits_and_their_gradients(name: str) -> None:
    got, expected = both()
    out, out_eager = EDITS[name](got.logits), EDITS[name](expected.logits)
    same(out, out_eager)
    same(got.logits, expected.logits)
    for result in (out, out_eager):
        (result * torch.arange(result.numel()).view(result.shape)).sum().backward()
    same(got.grads(), expected.grads())


EDITED: dict[str, Callable[[Any], Any]] = {
    "operator": lambda x: x.mul_(3),
    "view": lambda x: x[:, 0].zero_(),
    "flat_view": lambda x: x.view(-1)[3:].fill_(1),
    "numpy": lambda x: x.numpy().fill(5),
    "dlpack": lambda x: torch.from_dlpack(x).zero_(),
    "apply_": lambda x: x.apply_(lambda value: value + 1),
    "map_": lambda x: x.map_(torch.ones(B, S, V), lambda a, b: a + b),
    "map2_": lambda x: x.map2_(torch.ones(B, S, V), torch.ones(B, S, V), lambda a, b, c: a + b + c),
    "alias": lambda x: x.detach().add_(1),
    "out": lambda x: torch.add(torch.ones(B, S, V), 1, out=x),
    "foreach": lambda x: torch._foreach_add_([x], 1.0),
}


@pytest.mark.parametrize("edit", EDITED)
def test_an_edit_shows_in_aliases_and_not_in_earlier_copies(edit: str) -> None:
    got, expected = both(grad=False)
    held = []
    for side in (got, expected):
        x = side.logits
        held.append([x, x.detach(), x.data, copy.copy(x), x.clone(), x.double(), x.clone().bfloat16()])
        EDITED[edit](x)
    same(*held)


def test_an_edit_through_an_earlier_view_does_not_show_in_later_copies() -> None:
    got, expected = both(grad=False)
    held = []
    for side in (got, expected):
        view = side.logits[:, 0]
        held.append([side.logits.clone(), side.logits.double(), side.logits])
        view.zero_()
    same(*held)


def test_an_edit_between_use_and_backward_is_eagers_error() -> None:
    for side in both():
        y = side.logits.exp() * side.logits
        side.logits.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_exchanging_the_storage_is_refused() -> None:
    with pytest.raises(DeferredLogitsError, match="materialize"):
        build(True, grad=False).logits.resize_(1)


# ----------------------------------------------------------------------------------------------------- gradients


def test_gradients_through_the_logits_alone() -> None:
    for compute in (linear, upcast, capped):
        got, expected = both(compute, dtype=torch.bfloat16)
        for side in (got, expected):
            side.logits.float().softmax(-1).pow(2).sum().backward()
        same(got.grads(), expected.grads())


def test_gradients_through_logits_and_loss_together() -> None:
    got, expected = both()
    for side in (got, expected):
        loss = (side.trunk.sin().sum() + side.weight.cos().sum()) ** 2  # stands for the fused loss
        (loss + side.logits.double().logsumexp(-1).mean()).backward()
    same(got.grads(), expected.grads())


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_operands_get_no_gradient(frozen: str) -> None:
    grads = []
    for lazy in (True, False):
        side = build(False)
        leaves = {"hidden": side.hidden.detach(), "weight": side.weight, "bias": side.bias}
        leaves = {k: v.detach().clone().requires_grad_(k != frozen) for k, v in leaves.items()}
        operands = tuple(leaves.values())
        out = capped(operands)
        if lazy:
            out = defer(capped, operands, shape=out.shape, dtype=out.dtype, requires_grad=True)
        out.square().sum().backward()
        assert leaves[frozen].grad is None
        grads.append([v.grad for k, v in leaves.items() if k != frozen])
    same(*grads)


def test_an_operand_that_compute_does_not_use_gets_no_gradient() -> None:
    side = build(True, linear)  # is given the bias and leaves it alone
    side.logits.sum().backward()
    assert side.weight.grad is not None and side.bias.grad is None


def test_retain_grad_hooks_and_parameter_hooks_fire_once() -> None:
    seen: list[list[Tensor]] = []
    for side in both():
        seen.append([])
        side.logits.retain_grad()
        side.logits.register_hook(seen[-1].append)
        side.weight.register_hook(lambda g: g * 2)
        side.trunk.register_hook(lambda g: g * 3)
        side.logits.square().sum().backward()
        seen[-1] += [side.logits.grad, *side.grads()]
    same(*seen)


@pytest.mark.parametrize("compute", [linear, capped, lambda o: torch.tanh(capped(o))], ids=["linear", "capped", "tanh"])
def test_a_read_under_grad_mode_serves_the_backward_too(compute: Callable) -> None:
    runs: list[int] = []

    def counted(operands: Sequence[Tensor]) -> Tensor:
        runs.append(len(operands))
        return compute(operands)

    def edited(y: Tensor) -> Tensor:
        y = y + 0 if compute is not linear else y
        return y.mul_(2)

    def through(x: Tensor) -> Tensor:
        return x.exp().sum() + x.argmax()

    for use, n in (
        (through, 1),
        (lambda x: (x.detach().sum(), through(x))[1], 1),
        (lambda x: through(edited(x)), None),
    ):
        got, expected = build(True, counted), build(False, compute)
        runs.clear()
        for side in (got, expected):
            y = use(side.logits)
            y.backward(retain_graph=True)
        same(got.grads(), expected.grads())
        assert n is None or len(runs) == n
        for side in (got, expected):
            y = use(build(side is got, compute).logits)
            y.backward(retain_graph=True)
            y.backward()


def test_edits_of_values_that_a_backward_would_have_needed() -> None:
    got, expected = build(True, lambda o: torch.tanh(linear(o))), build(False, lambda o: torch.tanh(linear(o)) * 1)
    for side in (got, expected):
        side.logits.mul_(3)
        side.logits.exp().sum().backward()
    same(got.grads(), expected.grads())


def test_two_backwards_and_a_freed_graph() -> None:
    got, expected = both()
    for side in (got, expected):
        y = side.logits.square().sum()
        y.backward(retain_graph=True)
        y.backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.backward()
    same(got.grads(), expected.grads())


def test_second_derivatives() -> None:
    def f(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = defer(capped, (hidden, weight, bias), shape=(S, V), dtype=torch.float64, requires_grad=True)
        return z.exp().cumsum(0)

    shapes = ((S, D), (V, D), (V,))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_a_backward_that_brings_no_gradient_allocates_none() -> None:
    rows, vocab = 64, 4096
    hidden = torch.randn(rows, D, requires_grad=True)
    weight = nn.Parameter(torch.randn(vocab, D))
    logits = defer(linear, (hidden, weight), shape=(rows, vocab), dtype=torch.float32, requires_grad=True)
    through = torch.autograd.graph.get_gradient_edge(NoGradient.apply(logits))
    seed = torch.zeros(()).expand(rows, vocab)
    assert largest_allocation(lambda: torch.autograd.backward([through], [seed])) < rows * vocab
    assert weight.grad is None


def test_logits_that_do_not_require_grad_have_no_history() -> None:
    weight = nn.Parameter(torch.randn(V, D))
    x = defer(linear, (torch.randn(S, D), weight), shape=(S, V), dtype=torch.float32, requires_grad=False)
    assert not x.requires_grad and x.is_leaf and x.grad_fn is None
    assert not (x * 2).requires_grad


def test_logits_that_require_grad_do_so_in_a_no_grad_caller() -> None:
    with torch.no_grad():
        side = build(False)
        operands = (side.hidden, side.weight)
        x = defer(linear, operands, shape=(B, S, V), dtype=torch.float32, requires_grad=True)
    assert x.requires_grad and x.grad_fn is not None


class NoGradient(torch.autograd.Function):
    """Its input takes part in the backward but gets nothing, as an unused output of DDP does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def largest_allocation(fn: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        fn()
    return max((event.self_cpu_memory_usage for event in prof.events()), default=0)


def test_unused_logits_cost_nothing_in_forward_or_backward() -> None:
    rows, vocab = 64, 4096
    hidden = torch.randn(rows, D, requires_grad=True)
    weight = nn.Parameter(torch.randn(vocab, D))

    def train(read: bool) -> None:
        hidden.grad = None
        logits = defer(linear, (hidden, weight), shape=(rows, vocab), dtype=torch.float32, requires_grad=True)
        returned = [logits.double().clone(), logits.detach()]
        loss = hidden.sum() * weight.sum()
        (loss + logits.sum() if read else loss).backward()
        assert returned[0].requires_grad

    with Reads() as reads:
        assert largest_allocation(lambda: train(False)) < rows * vocab * 4 / 8
        assert reads.n == 0
        assert largest_allocation(lambda: train(True)) >= rows * vocab * 4


# --------------------------------------------------------------------------------------------------- surroundings


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_made_and_read_without_gradients(mode: Callable) -> None:
    with mode(), Reads() as reads:
        got, expected = both(grad=False)
        same(got.logits.argmax(-1), expected.logits.argmax(-1))
        same(got.logits[:, -1], expected.logits[:, -1])
        same(got.logits.mul_(2), expected.logits.mul_(2))
        assert torch.ops.aten.mul_.Tensor(got.logits, 1) is got.logits
    assert reads.n == 1
    assert got.logits.is_inference() == expected.logits.is_inference()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_read_without_gradients_and_trained_through_later(mode: Callable) -> None:
    got, expected = both()
    for side in (got, expected):
        with mode():
            alias = side.logits.detach()
            assert not side.logits[:, 0].exp().requires_grad
        assert torch.equal(alias, side.logits.detach())
        side.logits.mul_(2)
        side.logits.exp().sum().backward()
    same(got.grads(), expected.grads())


def test_ambient_autocast_does_not_reach_the_head() -> None:
    got, expected = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(got.logits, expected.logits)
        same(got.logits @ torch.ones(V, 2), expected.logits @ torch.ones(V, 2))  # but what comes after it
        (got.logits**2).sum().backward()
    (expected.logits**2).sum().backward()
    same(got.grads(), expected.grads())


# AOTAutograd computes the head in the consumer's graph: nothing is read, and nothing remembered.
@pytest.mark.parametrize(("backend", "n"), [("eager", 2), ("aot_eager", 0)])
def test_a_compiled_consumer_reads_the_right_values(backend: str, n: int) -> None:
    torch._dynamo.reset()
    consumer = torch.compile(lambda x: (x * 2).softmax(-1)[:, 1:] + x.shape[0], backend=backend)
    with Reads() as reads:
        for _ in range(2):
            got, expected = both()
            for side in (got, expected):
                consumer(side.logits).square().sum().backward()
            same(got.grads(), expected.grads())
    assert reads.n == n


def test_dynamo_does_not_compile_the_reading_itself() -> None:
    """A compiled function that reads deferred logits runs our frames; they are none of its business."""
    torch._dynamo.reset()
    compiled: list[str] = []

    def recording(gm: torch.fx.GraphModule, inputs: Any) -> Callable:
        compiled.extend(str(node.target) for node in gm.graph.nodes)
        return gm.forward

    @torch.compile(backend=recording)
    def consumer(batch: dict[str, Any]) -> Tensor:
        torch._dynamo.graph_break()
        lazy = batch["logits"].double()
        text = str(batch["logits"])
        batch["logits"].exp().sum().backward()
        return lazy * 2 + len(text) * 0

    for _ in range(2):
        got, expected = both()
        for side in (got, expected):
            same(consumer({"logits": side.logits}), side.logits.double() * 2)
        same(got.grads(), expected.grads())
    own = ("linear", "tanh", "_tensor_version", "reshape", "numel", "empty_strided")
    assert not [target for target in compiled if any(name in target for name in own)]


def test_fake_reads_are_not_counted_nor_remembered() -> None:
    with Reads() as reads, FakeTensorMode():
        operands = (torch.randn(S, D), torch.randn(V, D))
        x = defer(linear, operands, shape=(S, V), dtype=torch.float32, requires_grad=False)
        assert (x * 2).shape == (S, V)
        assert not x.is_materialized
    assert reads.n == 0


# ----------------------------------------------------------------------------------- reads that could be wrong


def step(side: Logits, optimizer: type[torch.optim.Optimizer], **kwargs: Any) -> None:
    side.weight.grad = torch.ones_like(side.weight)
    optimizer([side.weight], lr=0.1, **kwargs).step()


def regather(side: Logits) -> None:
    """What FSDP2 does: other values into the same storage, the version kept."""
    with torch.autograd._unsafe_preserve_version_counter(side.weight), torch.no_grad():
        side.weight.mul_(1.001)


WRONG: dict[str, tuple[str, Callable[[Logits], Any]]] = {
    "sgd": ("head's weight.*modified in place", lambda s: step(s, torch.optim.SGD)),
    "adamw": ("head's weight.*modified in place", lambda s: step(s, torch.optim.AdamW, foreach=True)),
    # Bumps no version on some releases: the sample sees it.
    "adamw_fused": ("head's weight", lambda s: step(s, torch.optim.AdamW, fused=True)),
    "hidden": ("hidden states.*modified in place", lambda s: s.trunk.detach().zero_()),
    "bias": ("operand 2.*modified in place", lambda s: s.bias.detach().zero_()),
    "freed": ("head's weight.*freed", lambda s: s.weight.untyped_storage().resize_(0)),
    "weight.data": ("head's weight.*overwritten", lambda s: s.weight.data.add_(1e-3)),
    "weight.data_row": ("head's weight.*overwritten", lambda s: s.weight.data[V - 1].zero_()),
    "weight.data_column": ("head's weight.*overwritten", lambda s: s.weight.data[:, D - 1].zero_()),
    "hidden.data": ("hidden states.*overwritten", lambda s: s.trunk.data.zero_()),
    "regathered": ("head's weight.*overwritten", regather),
}


# An optimizer has logits without a gradient computed before it changes what they are computed from.
OPTIMIZERS = ("sgd", "adamw", "adamw_fused")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_keeps_logits_without_a_gradient(name: str) -> None:
    side, expected = both(grad=False)
    WRONG[name][1](side)
    assert side.logits.is_materialized
    same(side.logits, expected.logits)


@pytest.mark.parametrize("name,grad", [(n, g) for n in WRONG for g in (True, False) if g or n not in OPTIMIZERS])
def test_a_late_read_is_a_named_error_with_a_cure(name: str, grad: bool) -> None:
    message, change = WRONG[name]
    side = build(True, grad=grad)
    later = side.logits.float().clone()
    change(side)
    for x in (side.logits, later):
        with pytest.raises(DeferredLogitsError, match=message) as error:
            x.argmax(-1)
        assert "defer_logits" in str(error.value) and ".materialize()" in str(error.value)
    assert "not computed yet" in repr(side.logits) and side.logits.shape == (B, S, V)


@pytest.mark.parametrize("name", WRONG)
def test_an_early_read_is_remembered_whatever_happens_later(name: str) -> None:
    side, expected = both(grad=False)
    side.logits.materialize()
    WRONG[name][1](side)
    same(side.logits, expected.logits)


def test_inference_tensors_have_no_version_but_are_still_watched() -> None:
    with torch.inference_mode():
        side, expected = both(grad=False)
        same(side.logits, expected.logits)
        side = build(True, grad=False)
        side.weight.zero_()
        with pytest.raises(DeferredLogitsError, match="overwritten"):
            side.logits.sum()


def test_an_edit_in_inference_mode_is_seen_outside() -> None:
    weight = torch.randn(V, D)
    with torch.inference_mode():
        x = defer(linear, (torch.randn(S, D), weight), shape=(S, V), dtype=torch.float32, requires_grad=False)
    weight[0, 1] += 1
    with pytest.raises(DeferredLogitsError, match="modified in place"):
        x.sum()


def test_a_replaced_weight_leaves_the_logits_as_they_were() -> None:
    side, expected = both()
    side.weight.data = torch.zeros(V, D)
    same(side.logits, expected.logits)


def test_nan_and_odd_layouts_are_no_false_alarm() -> None:
    weights = (torch.full((V, D), torch.nan), torch.randn(D, V).t(), torch.randn(V, 2 * D)[:, ::2])
    hiddens = (torch.randn(S, D), torch.randn(D), torch.zeros(0, D), torch.randn(1, D).expand(S, D))
    for original in weights:
        for hidden in hiddens:
            weight = torch.empty_strided(original.shape, original.stride()).copy_(original)
            out = F.linear(hidden, weight)
            x = defer(linear, (hidden, weight), shape=out.shape, dtype=out.dtype, requires_grad=False)
            torch.testing.assert_close(x.materialize(), out, rtol=0, atol=0, equal_nan=True)
            x = defer(linear, (hidden, weight), shape=out.shape, dtype=out.dtype, requires_grad=False)
            weight.data[:] = 7
            with pytest.raises(DeferredLogitsError, match="overwritten"):
                x.materialize()


def test_a_backward_through_changed_operands_is_an_error() -> None:
    for side in both():
        y = side.logits.sum()
        step(side, torch.optim.SGD)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
    side = build(True)
    y = side.logits.sum()
    side.weight.untyped_storage().resize_(0)
    with pytest.raises(DeferredLogitsError, match=r"head's weight.*freed"):
        y.backward()


# ------------------------------------------------------------------------------------------------------- memory


def test_what_is_no_longer_needed_is_let_go() -> None:
    class Recipe:
        def __call__(self, operands: Sequence[Tensor]) -> Tensor:
            return linear(operands)

    def alive() -> list[bool]:
        gc.collect()
        return [ref() is not None for ref in (recipe, value)]

    compute = Recipe()
    operands = (torch.randn(S, D), torch.randn(V, D))
    x = defer(compute, operands, shape=(S, V), dtype=torch.float32, requires_grad=False)
    recipe, value = weakref.ref(compute), weakref.ref(x._value)
    y = x.double()
    del compute, operands, x
    assert alive() == [True, True]
    y.sum()
    assert alive() == [False, False]  # neither the logits that it was cast from, nor what they were computed from


def test_pending_logits_do_not_keep_the_graph_behind_the_hidden_states() -> None:
    class Marker:
        pass

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, marker: Any) -> Tensor:
            ctx.marker = marker
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
            return g, None

    marker = Marker()
    alive = weakref.ref(marker)
    hidden = Identity.apply(torch.randn(S, D, requires_grad=True), marker)
    x = defer(linear, (hidden, torch.randn(V, D)), shape=(S, V), dtype=torch.float32, requires_grad=True)
    kept = x.detach()
    del x, hidden, marker
    gc.collect()
    assert alive() is None
    assert kept.sum().isfinite()
