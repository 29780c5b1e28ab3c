"""The many spellings of an op, brought to one canonical name with named arguments.

A row of `SPELLINGS` says: these functions and these tensor methods are `name`, their parameters are called so, this is
known of the op, and there is the rule for what it makes of logits. A new spelling of a known op is a word in its row; a
new op is a row, and a function in the module of `trace` that the row names.
"""

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .. import compat
from .facts import EDIT, EXACT, EXPAND, INTO, NOTHING, RESHAPE, ROWS, SHARED, VIEW, Fact

# The rule of ops that move rows along the dimensions they name, whatever they do there.
ALONG = "layout.along"


@dataclass(frozen=True)
class Spelling:
    """One op: what it is called, by whom, what is known of it, and where the rules for it are.

    name: the canonical one. parameters: in order, as in a signature, ``"input dim=None"``; a leading ``*`` collects the
    rest in a tuple, and what stands behind that is given by keyword only. functions, methods: the spellings.

    Rules are named as ``module.function`` below `trace`. head: reads the result as logits of a head. several: for more
    than one tensor of logits; it comes first. beside: for logits and what may be a statistic of theirs. rules: for one
    tensor of logits; they compete in this order, and the first that does not give None has it. A name that stands twice
    has everything but its spellings in its first row.
    """

    name: str
    parameters: str
    functions: tuple[Callable, ...] = ()
    methods: tuple[str, ...] = ()
    facts: Fact = NOTHING
    rules: tuple[str, ...] = ()
    head: str = ""
    beside: str = ""
    several: str = ""

    @property
    def signature(self) -> inspect.Signature:
        kinds = inspect.Parameter
        parameters = []
        kind: Any = kinds.POSITIONAL_OR_KEYWORD
        for text in self.parameters.split():
            name, _, default = text.partition("=")
            if name.startswith("*"):
                parameters.append(kinds(name[1:], kinds.VAR_POSITIONAL))
                kind = kinds.KEYWORD_ONLY
            else:
                parameters.append(kinds(name, kind, default=eval(default) if default else kinds.empty))
        return inspect.Signature(parameters)


_CROSS_ENTROPY = (
    "input target weight=None size_average=None ignore_index=-100 reduce=None reduction='mean' label_smoothing=0.0"
)
_NLL = "input target weight=None size_average=None ignore_index=-100 reduce=None reduction='mean'"
_DIAGONAL = "input offset=0 dim1=0 dim2=1"
_KL_DIV = "input target size_average=None reduce=None reduction='mean' log_target=False"
_REDUCE = "input dim=None keepdim=False dtype=None"
_FACTORY = "dtype=None layout=None device=None requires_grad=False memory_format=None pin_memory=False out=None"
_PARTS = Fact.PURE

SPELLINGS = (
    # heads
    Spelling("linear", "input weight bias=None", (F.linear, torch._C._nn.linear), head="heads.linear"),
    Spelling(
        "matmul",
        "input other",
        (torch.matmul, operator.matmul, torch.mm, torch.bmm, torch.linalg.matmul),
        ("matmul", "mm", "bmm", "__matmul__"),
        head="heads.matmul",
    ),
    Spelling(
        "addmm",
        "bias input other beta=1 alpha=1",
        (torch.addmm, torch.baddbmm),
        ("addmm", "baddbmm"),
        head="heads.addmm",
    ),
    Spelling("mv", "input other", (torch.mv,), ("mv",), head="heads.matmul"),
    Spelling("inner", "input other", (torch.inner,), ("inner",), head="heads.inner"),
    Spelling("tensordot", "input other dims=2 out=None", (torch.tensordot,), head="heads.tensordot"),
    Spelling("einsum", "equation *operands", (torch.einsum, torch.functional.einsum), head="heads.einsum"),
    Spelling("vecdot", "input other dim=-1 out=None", (torch.linalg.vecdot,)),
    Spelling("xlogy", "input other", (torch.xlogy, torch.special.xlogy), ("xlogy",)),
    Spelling("entr", "input", (torch.special.entr,)),
    Spelling("lerp", "input end weight", (torch.lerp,), ("lerp",), Fact.ENTRYWISE),
    Spelling("logaddexp", "input other", (torch.logaddexp,), ("logaddexp",), Fact.ENTRYWISE),
    Spelling(
        "convolution",
        "input weight bias=None stride=1 padding=0 dilation=1 groups=1",
        (torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d),
        head="heads.convolution",
    ),
    # entries
    Spelling(
        "cast",
        "input *rest",
        (),
        ("to", "float", "double", "half", "bfloat16", "long", "int", "type", "type_as", "cpu", "cuda"),
        EXACT | Fact.HANDS_ON | Fact.OF_SQUARES,
        ("pointwise.cast",),
    ),
    Spelling(
        "mul",
        "input other",
        (operator.mul, torch.mul, torch.multiply),
        ("mul", "multiply", "__mul__", "__rmul__"),
        EXACT | Fact.IN_PLACE | Fact.ANY_PLACE | Fact.OF_SQUARES,
        ("pointwise.mul",),
        several="several.multiplied",
    ),
    Spelling(
        "div",
        "input other rounding_mode=None",
        (operator.truediv, torch.div, torch.true_divide, torch.divide),
        ("div", "true_divide", "divide", "__truediv__"),
        INTO | Fact.ANY_PLACE | Fact.OF_SQUARES,
        ("pointwise.div",),
        beside="softmax.over_sum",
        several="several.divided",
    ),
    Spelling(
        "add",
        "input other alpha=1",
        (operator.add, torch.add),
        ("add", "__add__", "__radd__"),
        EXACT | Fact.IN_PLACE | Fact.ANY_PLACE | Fact.OF_SQUARES,
        ("pointwise.add",),
        several="several.added",
    ),
    Spelling(
        "sub",
        "input other alpha=1",
        (operator.sub, torch.sub, torch.subtract),
        ("sub", "subtract", "__sub__"),
        EXACT | Fact.IN_PLACE | Fact.ANY_PLACE,
        ("pointwise.sub",),
        beside="softmax.minus_lse",
        several="several.added",
    ),
    Spelling("rsub", "input other alpha=1", (torch.rsub,), ("__rsub__",), Fact.ENTRYWISE),
    Spelling(
        "neg",
        "input",
        (operator.neg, torch.neg, torch.negative),
        ("neg", "negative", "__neg__"),
        EDIT,
        ("pointwise.neg",),
    ),
    Spelling("tanh", "input", (torch.tanh, F.tanh), ("tanh",), INTO, ("pointwise.tanh",)),
    Spelling(
        "sigmoid", "input", (torch.sigmoid, F.sigmoid, torch.special.expit), ("sigmoid",), INTO, ("pointwise.sigmoid",)
    ),
    Spelling("square", "input", (torch.square,), ("square",), Fact.ENTRYWISE, ("rsqrt_softcap.square",)),
    Spelling("sqrt", "input", (torch.sqrt,), ("sqrt",), Fact.ENTRYWISE | Fact.OF_SQUARES, ("rsqrt_softcap.sqrt",)),
    Spelling("rsqrt", "input", (torch.rsqrt,), ("rsqrt",), Fact.ENTRYWISE | Fact.OF_SQUARES, ("rsqrt_softcap.rsqrt",)),
    Spelling(
        "pow",
        "input exponent",
        (operator.pow, torch.pow),
        ("pow", "__pow__"),
        Fact.ENTRYWISE | Fact.OF_SQUARES,
        ("rsqrt_softcap.pow",),
    ),
    Spelling(
        "function",
        "input other=None",
        (
            *(torch.cos, torch.sin, torch.tan, torch.acos, torch.arccos, torch.asin, torch.arcsin, torch.abs),
            *(torch.relu, F.relu, torch.minimum, torch.maximum),
        ),
        ("cos", "sin", "tan", "acos", "arccos", "asin", "arcsin", "abs", "relu", "minimum", "maximum"),
        Fact.ENTRYWISE,
    ),
    Spelling("exp", "input", (torch.exp,), ("exp",), Fact.ENTRYWISE, ("softmax.exp",)),
    Spelling("log", "input", (torch.log,), ("log",), Fact.ENTRYWISE, ("softmax.log",)),
    Spelling(
        "clamp", "input min=None max=None", (torch.clamp, torch.clip), ("clamp", "clip"), EXACT, ("softmax.clamp",)
    ),
    Spelling("detach", "input", (torch.detach, compat.DATA), ("detach",), SHARED, ("pointwise.detach",)),
    # masks over the vocabulary
    Spelling("masked_fill", "input mask value", (torch.masked_fill,), ("masked_fill",), EDIT, ("masks.masked_fill",)),
    Spelling("where", "condition input other", (torch.where,), (), EXACT | Fact.ANY_PLACE, ("masks.where",)),
    Spelling("setitem", "input index value", (operator.setitem,), ("__setitem__",), Fact.IN_PLACE, ("masks.setitem",)),
    Spelling(
        "scatter",
        "input dim index src=None value=None reduce=None",
        (torch.scatter,),
        ("scatter",),
        Fact.IN_PLACE,
        ("masks.scatter",),
    ),
    Spelling("fill", "input value", (), ("fill",), Fact.IN_PLACE),
    Spelling("fill_diagonal", "input fill_value wrap=False", (), ("fill_diagonal",), Fact.IN_PLACE, ("masks.scatter",)),
    Spelling(
        "scatter_add", "input dim index src", (torch.scatter_add,), ("scatter_add",), Fact.IN_PLACE, ("masks.scatter",)
    ),
    # comparisons
    Spelling(
        "gt",
        "input other",
        (operator.gt, torch.gt, torch.greater),
        ("gt", "greater", "__gt__"),
        EXACT,
        beside="ranking.compared",
    ),
    Spelling(
        "ge",
        "input other",
        (operator.ge, torch.ge, torch.greater_equal),
        ("ge", "greater_equal", "__ge__"),
        EXACT,
        beside="ranking.compared",
    ),
    Spelling(
        "lt",
        "input other",
        (operator.lt, torch.lt, torch.less),
        ("lt", "less", "__lt__"),
        EXACT,
        beside="ranking.compared",
    ),
    Spelling(
        "le",
        "input other",
        (operator.le, torch.le, torch.less_equal),
        ("le", "less_equal", "__le__"),
        EXACT,
        beside="ranking.compared",
    ),
    Spelling("isinf", "input", (torch.isinf,), ("isinf",), EXACT),
    Spelling("and", "input other", (operator.and_, torch.bitwise_and, torch.logical_and), ("logical_and",), EXACT),
    Spelling("or", "input other", (operator.or_, torch.bitwise_or, torch.logical_or), ("logical_or",), EXACT),
    Spelling("xor", "input other", (operator.xor, torch.bitwise_xor, torch.logical_xor), ("logical_xor",), EXACT),
    Spelling("not", "input", (operator.invert, torch.logical_not, torch.bitwise_not), ("logical_not",), EDIT),
    Spelling("not", "input", (), ("bitwise_not",)),
    Spelling("eq", "input other", (operator.eq, torch.eq), ("eq", "__eq__"), EXACT),
    Spelling("ne", "input other", (operator.ne, torch.ne, torch.not_equal), ("ne", "not_equal", "__ne__"), EXACT),
    # rows: views
    Spelling("view", "input *size", (), ("view", "reshape"), RESHAPE, ("layout.view",), several="several.grouped"),
    Spelling("view_as", "input other", (), ("view_as", "reshape_as"), RESHAPE, ("layout.view_as",)),
    Spelling("reshape", "input shape", (torch.reshape,), (), RESHAPE, ("layout.reshape",), several="several.grouped"),
    Spelling("flatten", "input start_dim=0 end_dim=-1", (torch.flatten,), ("flatten",), RESHAPE, ("layout.flatten",)),
    Spelling(
        "unflatten",
        "input dim sizes",
        (torch.unflatten,),
        ("unflatten",),
        RESHAPE,
        ("layout.unflatten",),
        several="several.grouped",
    ),
    Spelling("unsqueeze", "input dim", (torch.unsqueeze,), ("unsqueeze",), RESHAPE, ("layout.unsqueeze",)),
    Spelling("squeeze", "input dim=None", (torch.squeeze,), ("squeeze",), RESHAPE, ("layout.squeeze",)),
    Spelling(
        "copy",
        "input memory_format=None",
        (torch.clone,),
        ("contiguous", "clone"),
        RESHAPE | Fact.ENTRYWISE,
        ("layout.copy",),
    ),
    Spelling("copy", "input", (), ("to_dense",)),
    Spelling("expand", "input *size", (), ("expand",), EXPAND, ("layout.expand",)),
    Spelling("expand_as", "input other", (), ("expand_as",), EXPAND, ("layout.expand_as",)),
    Spelling("broadcast_to", "input size", (torch.broadcast_to,), ("broadcast_to",), EXPAND, ("layout.expand",)),
    Spelling(
        "transpose",
        "input dim0 dim1",
        (torch.transpose, torch.swapaxes, torch.swapdims),
        ("transpose", "swapaxes", "swapdims"),
        VIEW,
        ("layout.transpose",),
    ),
    Spelling(
        "movedim",
        "input source destination",
        (torch.movedim, torch.moveaxis),
        ("movedim", "moveaxis"),
        VIEW,
        ("layout.movedim",),
    ),
    Spelling("t", "input", (torch.t,), ("t",), VIEW, ("layout.t",)),
    Spelling("permute", "input *dims", (), ("permute",), VIEW, ("layout.permute",)),
    Spelling("permute", "input dims", (torch.permute,)),
    # As ``z.mT``: Dynamo has no function of its own for it (`compat.attribute_read`). Not PURE: it may read a shape.
    Spelling("getattr", "input name", (), (), VIEW & ~Fact.PURE, ("layout.getattr",)),
    # rows: by indices
    Spelling(
        "getitem",
        "input index",
        (operator.getitem,),
        ("__getitem__",),
        VIEW,
        ("reductions.getitem", "indexing.getitem"),
    ),
    Spelling("select", "input dim index", (torch.select,), ("select",), VIEW, ("indexing.select",)),
    Spelling("narrow", "input dim start length", (torch.narrow,), ("narrow",), VIEW, ("indexing.narrow",)),
    Spelling(
        "index_select",
        "input dim index",
        (torch.index_select,),
        ("index_select",),
        ROWS & ~Fact.EACH_ONCE,
        ("indexing.index_select",),
    ),
    Spelling(
        "gather",
        "input dim index sparse_grad=False",
        (torch.gather,),
        ("gather",),
        (ROWS & ~Fact.EACH_ONCE) | Fact.PICKS,
        ("reductions.gather", "indexing.gather"),
    ),
    Spelling("diagonal", _DIAGONAL, (torch.diagonal,), ("diagonal",), Fact.PICKS, several="several.diagonal"),
    Spelling("diagonal", "input offset=0", (torch.diag,), ("diag",)),
    # rows: copies
    Spelling(
        "repeat_interleave",
        "input repeats dim=None output_size=None",
        (torch.repeat_interleave,),
        ("repeat_interleave",),
        ROWS & ~Fact.EACH_ONCE,
        ("layout.repeat_interleave",),
    ),
    Spelling("repeat", "input *sizes", (), ("repeat",), (ROWS & ~Fact.EACH_ONCE) | Fact.REPEATS, ("layout.repeat",)),
    Spelling("flip", "input dims", (torch.flip,), (), ROWS, (ALONG,)),
    Spelling("flip", "input *dims", (), ("flip",)),
    Spelling("roll", "input shifts dims=None", (torch.roll,), ("roll",), ROWS, (ALONG,)),
    Spelling("rot90", "input k=1 dims=(0,1)", (torch.rot90,), ("rot90",), ROWS, (ALONG,)),
    # rows: parts, and put together
    Spelling(
        "split",
        "input split_size_or_sections dim=0",
        (torch.split, torch.functional.split),
        ("split",),
        _PARTS,
        ("layout.split",),
    ),
    Spelling("chunk", "input chunks dim=0", (torch.chunk,), ("chunk",), _PARTS, ("layout.chunk",)),
    Spelling(
        "tensor_split",
        "input indices_or_sections dim=0",
        (torch.tensor_split,),
        ("tensor_split",),
        _PARTS,
        ("layout.tensor_split",),
    ),
    Spelling("unbind", "input dim=0", (torch.unbind,), ("unbind",), _PARTS, ("layout.unbind",)),
    Spelling(
        "broadcast_tensors",
        "*tensors",
        (torch.broadcast_tensors, torch.functional.broadcast_tensors),
        several="several.broadcast",
    ),
    Spelling(
        "cat",
        "tensors dim=0",
        (torch.cat, torch.concat, torch.concatenate),
        facts=Fact.PURE,
        several="several.joined",
    ),
    Spelling("cat", "tensors dim=1", (torch.hstack,)),
    Spelling("stack", "tensors dim=0", (torch.stack,), facts=Fact.PURE, several="several.joined"),
    # metadata
    # Dynamo checks a size that only the data knows as soon as it is there.
    Spelling("size", "input dim=None", (torch.ops.aten.sym_size.int,), ("size",), Fact.METADATA),
    Spelling(
        "metadata",
        "input *rest",
        (torch.ops.aten.sym_numel.default, torch.ops.aten.sym_size.default),
        ("dim", "ndimension", "numel", "nelement", "stride", "is_contiguous"),
        Fact.METADATA,
    ),
    # A new tensor of one number, its `fill_value`.
    Spelling("full", f"size fill_value {_FACTORY}", (torch.full,), (), Fact.METADATA | Fact.CONSTANT),
    Spelling("full", f"input fill_value {_FACTORY}", (torch.full_like,)),
    Spelling("full", f"input size fill_value {_FACTORY}", (), ("new_full",)),
    Spelling("full", f"*size fill_value=0.0 {_FACTORY}", (torch.zeros,)),
    Spelling("full", f"input *size fill_value=0.0 {_FACTORY}", (torch.zeros_like,), ("new_zeros",)),
    Spelling("full", f"*size fill_value=1.0 {_FACTORY}", (torch.ones,)),
    Spelling("full", f"input *size fill_value=1.0 {_FACTORY}", (torch.ones_like,), ("new_ones",)),
    Spelling("eye", f"n m=None {_FACTORY}", (torch.eye,)),
    # softmax
    Spelling(
        "log_softmax",
        "input dim=None _stacklevel=3 dtype=None",
        (F.log_softmax,),
        (),
        Fact.NORMALISES,
        ("softmax.log_softmax",),
    ),
    Spelling("log_softmax", "input dim dtype=None", (torch.log_softmax, torch.special.log_softmax), ("log_softmax",)),
    Spelling(
        "softmax",
        "input dim=None _stacklevel=3 dtype=None",
        (F.softmax,),
        (),
        Fact.NORMALISES,
        ("softmax.softmax",),
    ),
    Spelling("softmax", "input dim dtype=None", (torch.softmax, torch.special.softmax), ("softmax",)),
    # reductions over the classes
    Spelling(
        "logsumexp",
        "input dim keepdim=False",
        (torch.logsumexp, torch.special.logsumexp),
        ("logsumexp",),
        Fact.NORMALISES,
        ("reductions.logsumexp",),
    ),
    Spelling("sum", _REDUCE, (torch.sum,), ("sum",), NOTHING, ("ranking.counted", "reductions.total")),
    Spelling("mean", _REDUCE, (torch.mean,), ("mean",), NOTHING, ("ranking.share", "reductions.mean")),
    Spelling(
        "count_nonzero", "input dim=None", (torch.count_nonzero,), ("count_nonzero",), NOTHING, ("ranking.counted",)
    ),
    Spelling("argmax", "input dim=None keepdim=False", (torch.argmax,), ("argmax",), NOTHING, ("reductions.argmax",)),
    Spelling("amax", "input dim keepdim=False", (torch.amax,), ("amax",), NOTHING, ("reductions.amax",)),
    Spelling("max", "input dim keepdim=False", (torch.max,), ("max",), NOTHING, ("reductions.max_and_class",)),
    Spelling(
        "topk", "input k dim=-1 largest=True sorted=True", (torch.topk,), ("topk",), Fact.PICKS, ("ranking.topk",)
    ),
    Spelling(
        "take_along_dim",
        "input indices dim=None",
        (torch.take_along_dim,),
        ("take_along_dim",),
        Fact.PICKS,
        ("reductions.take_along_dim",),
    ),
    Spelling("one_hot", "input num_classes=-1", (F.one_hot, torch._C._nn.one_hot)),
    Spelling("cross_entropy", _CROSS_ENTROPY, (F.cross_entropy,), (), Fact.LOSS, ("reductions.cross_entropy",)),
    Spelling("kl_div", _KL_DIV, (F.kl_div,)),
    Spelling("nll_loss", _NLL, (F.nll_loss,), (), Fact.LOSS, ("reductions.nll_loss",)),
)


@dataclass(frozen=True)
class _Name:
    """What the rows of one canonical name say of it."""

    facts: Fact
    rules: tuple[str, ...]
    head: str
    beside: str
    several: str


NAMES: dict[str, _Name] = {}
for _row in SPELLINGS:
    NAMES.setdefault(_row.name, _Name(_row.facts, _row.rules, _row.head, _row.beside, _row.several))

# Where the rules are for what a walk ends at.
REDUCING = ("reductions.", "ranking.")

FUNCTIONS = {f: (s.name, s.signature) for s in SPELLINGS for f in s.functions}
METHODS = {m: (s.name, s.signature) for s in SPELLINGS for m in s.methods}


def function_of(name: str) -> Callable:
    """The function of torch that a canonical name stands for, with the parameters of its row."""
    return next(row.functions[0] for row in SPELLINGS if row.name == name)


def functions_of(*names: str) -> frozenset[Callable]:
    """The torch functions and Tensor methods of these canonical names, as ``__torch_function__`` is given them."""
    rows = [row for row in SPELLINGS if row.name in names]
    methods = [getattr(torch.Tensor, method) for row in rows for method in row.methods]
    return frozenset((*methods, *(function for row in rows for function in row.functions)))
