"""Every difference between the supported versions of PyTorch, and every private name of it that we build on."""

import contextlib
import functools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakIdKeyDictionary

SUPPORTED = ((2, 11), (2, 15))


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def is_supported() -> bool:
    return SUPPORTED[0] <= torch_version() <= SUPPORTED[1]


def supported_span() -> str:
    return "{}.{} to {}.{}".format(*SUPPORTED[0], *SUPPORTED[1])


if not is_supported():  # said where this module is loaded, which is once a process
    warnings.warn(
        f"cce_inductor supports torch {supported_span()}, and this is torch {torch.__version__}: what it does not know "
        "its way around in is left as it is",
        stacklevel=2,
    )


def inductor_wrapper(mode: str | None, options: Mapping[str, Any]) -> Any:
    """What ``torch.compile(backend="inductor", mode=..., options=...)`` calls, with its checks of the arguments."""
    return torch._TorchCompileInductorWrapper(mode, dict(options) or None, None)


def named_backend(name: str) -> Callable:
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name)


def on_compile_start(callback: Callable[[], None]) -> None:
    """Calls `callback` whenever Dynamo begins to trace a frame, also after ``torch._dynamo.reset()``."""
    from torch._dynamo.callback import callback_handler

    kept = _Callbacks(callback_handler.start_callbacks)
    # Of a backward in a compiled function Dynamo would trace it, and wait for the lock under which it is called.
    kept.append(torch._dynamo.disable(lambda _args: callback()))
    kept.lasting = [*getattr(callback_handler.start_callbacks, "lasting", []), kept[-1]]
    callback_handler.start_callbacks = kept


class _Callbacks(list):
    """Dynamo's list of callbacks, which its reset() clears: the `lasting` ones stay."""

    lasting: list[Callable]

    def clear(self) -> None:
        self[:] = self.lasting


def ignore_logging_function(function: Callable) -> None:
    """Lets Dynamo trace through calls of a logging function instead of breaking the graph at them."""
    import torch._dynamo.config

    known: set[Any] = torch._dynamo.config.ignore_logging_functions
    known.add(_JsonFunction(function) if torch_version() < (2, 13) else function)


class _JsonFunction(str):
    """A function's name that equals the function.

    torch before 2.13 writes this config set as JSON into its compilation metrics, and logs an error for each function
    in it; a string passes, and the set is asked by equality only.
    """

    function: Callable

    def __new__(cls, function: Callable) -> "_JsonFunction":
        self = super().__new__(cls, getattr(function, "__name__", repr(function)))
        self.function = function
        return self

    def __eq__(self, other: object) -> bool:
        return other is self.function or (isinstance(other, _JsonFunction) and other.function is self.function)

    def __hash__(self) -> int:
        return hash(self.function)


def transformers_warning_once() -> Callable | None:
    """The method that Hugging Face transformers adds to every logger, once it is imported."""
    return getattr(logging.Logger, "warning_once", None)


def debug_folder() -> str | None:
    """PyTorch's own debug folder under TORCH_COMPILE_DEBUG=1, else None."""
    import torch._dynamo.config
    import torch._inductor.config
    from torch._dynamo.utils import get_debug_dir

    return get_debug_dir() if torch._inductor.config.trace.enabled else None


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """An artifact in the structured trace that ``tlparse`` shows; costs nothing where no trace is written."""
    from torch._logging import trace_structured

    trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text, expect_trace_id=False
    )


def attribute_read(node: Node) -> str | None:
    """The tensor attribute that `node` is a read of, as in ``z.mT``, or None.

    torch before 2.14 captures it as ``getattr(z, "mT")``, later ones as the operator behind the attribute.
    """
    if node.op != "call_function" or not node.args:
        return None
    if node.target is getattr:
        return str(node.args[1])
    return _ATTRIBUTES.get(node.target)


_ATTRIBUTES: dict[Any, str] = {
    torch.ops.aten.numpy_T: "T",
    torch.ops.aten.mT: "mT",
    torch.ops.aten.matrix_H: "H",
    torch.ops.aten.mH: "mH",
}


# A read of ``z.data``, as Dynamo captures it.
DATA: Any = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]


def copy_node_attributes(old: Node, new: Node) -> None:
    """What Dynamo keeps on a node outside its `meta`: where a placeholder came from, which AOTAutograd reads."""
    for name in ("_dynamo_source",):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))


def name_parameter(gm: GraphModule, name: str) -> None:
    """Tells AOTAutograd where a parameter comes from that was added to a Dynamo graph: from nowhere else."""
    from torch._dynamo.source import ConstantSource

    if hasattr(gm, "_param_name_to_source"):
        known: Any = gm._param_name_to_source
        gm._param_name_to_source = {**known, name: ConstantSource(name)}  # type: ignore[assignment]


def readable(gm: GraphModule) -> str:
    """A graph as Python with shapes and source locations."""
    return gm.print_readable(print_output=False)


def user_stack() -> list[tuple[str, int]]:
    """(file, line) of the calls that are being run, or that Dynamo is tracing; the innermost last."""
    from torch._guards import TracingContext

    traced = [(frame.filename, frame.lineno or 0) for frame in TracingContext.extract_stack()]
    return traced or [(frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(sys._getframe(1))][::-1]


def size_hint(size: int | torch.SymInt, unknown: int = 1 << 40) -> int:
    """What a size was when the graph was captured, without a guard on it; `unknown` where nothing is known."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return unknown if hint is None else int(hint)


def autotuned(name: str, choices: list, inputs: list, layout: Any, generators: Mapping[int, Callable]) -> Any:
    """The fastest of Inductor's choices for a kernel, as a node. `generators` fill inputs by their position."""
    from torch._inductor.select_algorithm import autotune_select_algorithm

    # One kernel now, not a buffer that chooses later: what it writes is not its output.
    result = autotune_select_algorithm(
        name, choices, inputs, layout, input_gen_fns=generators, return_multi_template=False
    )
    # torch 2.11 gives the node, later ones the node and the choice.
    return result[0] if isinstance(result, tuple) else result


def can_use_tma(*matrices: Any) -> bool:
    """Whether the device and the matrices allow tensor memory accelerator loads of rows.

    Inductor's own test lets any dimension be the contiguous one, and does not look where in its buffer a view begins.
    """
    from torch._inductor.utils import can_use_tma as possible
    from torch._inductor.virtualized import V

    sizes = V.graph.sizevars
    rows = all(
        sizes.statically_known_equals(m.get_stride()[1], 1)
        and sizes.statically_known_multiple_of(m.get_layout().offset * m.get_dtype().itemsize, 16)
        for m in matrices
    )
    return rows and bool(possible(*matrices))


# What Dynamo does with the functions that run now. In C++, hence not one of those itself.
dynamo_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback


def running_backend(callback: Any) -> Any:
    """What ``torch.compile`` was given as the backend of the compiled function that is running, wrapped by PyTorch.

    callback: of `dynamo_callback`. None in plain eager mode. Where Dynamo has left a function to Python, what that
    calls runs eagerly all the same.
    """
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return callback or None


def as_if_in(function: Any, other: Any) -> Any:
    """`function`, which Dynamo treats as one of the file of `other`: PyTorch's own it traces only within others."""
    function.__code__ = function.__code__.replace(co_filename=other.__code__.co_filename)
    return function


def rank() -> int:
    """The number of this process in its group of processes, 0 where there is no group."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_tracing() -> bool:
    """Whether Dynamo or AOTAutograd is at work: what is asked of a tensor now is not asked for its values."""
    from torch._guards import CompileContext, TracingContext

    return TracingContext.try_get() is not None or CompileContext.try_get() is not None


def has_kernel(operator: Any, key: str) -> bool:
    """Whether an operator has a kernel of its own for a dispatch key, or an alias key such as "Autograd"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key)


@contextlib.contextmanager
def counting_versions() -> Iterator[None]:
    """Views share a version with their base and edits raise it, as ever, also below autograd."""
    key = torch._C.DispatchKey.ADInplaceOrView
    before = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, before)


def dynamo_is_tracing() -> bool:
    """Whether Dynamo is tracing a function, or a backend compiles what it has traced."""
    return _tracer() is not None


def may_break_graph() -> bool:
    """Whether Dynamo may cut the function in two that it is tracing (not under ``fullgraph``)."""
    tracer = _tracer()
    return tracer is not None and not tracer.one_graph and not tracer.error_on_graph_break


def _tracer() -> Any:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx()
    except AttributeError:  # nothing has been traced in this thread
        return None


def restart_tracing(reason: str) -> None:
    """Lets Dynamo trace the function once more, whose arguments now look otherwise."""
    raise _restart_error()(reason)


@functools.cache
def _restart_error() -> type[Exception]:
    from torch._dynamo.exc import RestartAnalysis, Unsupported

    class Restart(RestartAnalysis, Unsupported):
        """Unsupported too, since that is all that what runs an operator on fake tensors lets through."""

        def __init__(self, reason: str) -> None:
            Unsupported.__init__(self, reason)
            self.restart_reason = reason

    return Restart


def break_graph(reason: str) -> None:
    """Cuts the graph that Dynamo is tracing in front of the operator that is being run on fake tensors."""
    from torch._subclasses.fake_tensor import UnsupportedFakeTensorException

    raise UnsupportedFakeTensorException(reason)


def is_transforming() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp) is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def has_forward_gradients() -> bool:
    """Whether forward-mode differentiation is active."""
    return torch.autograd.forward_ad._current_level >= 0


def has_dispatch_modes() -> bool:
    """Whether a mode below autograd sees every operator, such as one of fake tensors or of a checkpoint's policy."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that a product of this tensor has now."""
    on = is_autocast(tensor) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(tensor.device.type) if on else tensor.dtype


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of a torch.func transform, which has no memory of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def operand_source(placeholder: Node, name: str) -> Any:
    """Where an attribute of a placeholder's tensor comes from, as Dynamo says it; None in a graph not of Dynamo's."""
    from torch._dynamo.source import AttrSource

    source = getattr(placeholder, "_dynamo_source", None)
    return None if source is None else AttrSource(source, name)


def set_source(placeholder: Node, source: Any) -> None:
    """Tells AOTAutograd where a placeholder comes from that was added to a Dynamo graph."""
    if source is not None:
        placeholder._dynamo_source = source  # type: ignore[attr-defined]


def fake_mode_of(tensor: torch.Tensor) -> Any:
    """The fake tensor mode of a fake tensor, or of the tensors inside a fake subclass; None for a real one."""
    from torch._subclasses.fake_tensor import maybe_get_fake_mode

    return maybe_get_fake_mode(tensor)


def is_part_of_a_graph() -> bool:
    """Whether a backend is given one of the parts that Dynamo's DDPOptimizer cuts a graph into.

    Its outputs may go to another part, which is compiled for plain tensors.
    """
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    return context is not None and context.ddp_optimizer_ctx is not None


def outputs(gm: GraphModule) -> tuple:
    """What a Dynamo graph returns: nodes and constants."""
    return tuple(next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0])  # type: ignore[arg-type]


_NOT_THE_PROGRAM = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)


def uncompiled_caller() -> CodeType | None:
    """The function of the program that calls the one being compiled, where Dynamo has left it to Python.

    From 2.15 on Dynamo does not break the graph at some calls but skips the function that makes them, and compiles
    what that function calls one by one.
    """
    compiling = False
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        code = frame.f_code
        compiling |= code.co_filename == _dynamo_file("convert_frame.py")
        if code.co_filename == _dynamo_file("eval_frame.py") and code.co_name == "compile_wrapper":
            return None  # the program calls what torch.compile gave it
        if not code.co_filename.startswith(_NOT_THE_PROGRAM):
            return code if compiling else None
    return None


def _dynamo_file(name: str) -> str:
    return os.path.join(os.path.dirname(torch.__file__), "_dynamo", name)


def _program() -> tuple[CodeType, int] | None:
    """The code and the line of the innermost Python frame outside of PyTorch and of this package."""
    frames = ((frame.f_code, line) for frame, line in traceback.walk_stack(sys._getframe(2)))
    return next((found for found in frames if not found[0].co_filename.startswith(_NOT_THE_PROGRAM)), None)


def python_stack() -> str:
    """That frame as in a traceback; "" if there is none."""
    return f'  File "{found[0].co_filename}", line {found[1]}, in {found[0].co_name}\n' if (found := _program()) else ""


def program_place() -> str:
    """``file:line`` of that frame; "" if there is none."""
    return f"{found[0].co_filename}:{found[1]}" if (found := _program()) else ""


def is_freed_after_forward(weight: torch.Tensor) -> bool:
    """Whether FSDP lends this to a module as its parameter, or a view of it, and takes it back after the forward."""
    owner = weight if weight._base is None else weight._base
    if not isinstance(owner, torch.nn.Parameter):
        return bool(getattr(owner, "_fsdp_flattened", False))
    if owner not in _freed:
        _freed[owner] = _by_fsdp2(owner) or getattr(owner, "_fsdp_flattened", False)
    return _freed[owner]


_freed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _by_fsdp2(parameter: torch.Tensor) -> bool:
    states = sys.modules.get("torch.distributed._composable_state")
    for reference in list(states._module_state_mapping.values()) if states is not None else ():
        state = reference()
        # torch 2.11 has one group per module, later ones several.
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            if any(getattr(p, "_unsharded_param", None) is parameter for p in getattr(group, "fsdp_params", ())):
                return getattr(group, "_reshard_after_forward", True)
    return False


def keeps_graph() -> bool:
    """Whether the backward that is running is one of several through its graph: ``retain_graph``."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def running_node(frame: Any) -> Any:
    """The node of the autograd graph that calls the function of this frame itself, rather than a hook of Python's; or
    None."""
    from torch.autograd.graph import _engine_run_backward

    caller = frame.f_back  # None in the thread of a device
    if caller is not None and caller.f_code is not _engine_run_backward.__code__:
        return None
    return torch._C._current_autograd_node()


def boxed_grads(given: tuple) -> list[torch.Tensor | None]:
    """What the backward of an autograd function with ``boxed_grads_call`` is given: older versions do not know it."""
    return given[0] if isinstance(given[0], list) else list(given)


OVERWRITTEN = "output of CUDAGraphs that has been overwritten"


def is_of_replayed_cuda_graph(error: RuntimeError) -> bool:
    """Whether an error says that a CUDA graph's output is read after the graph ran again (`cudagraph_trees`)."""
    return OVERWRITTEN in str(error)


def cpu_extensions() -> list[tuple[str, bool]]:
    """The instruction sets for matrices that this torch can ask a CPU for, each with whether it has them."""
    found = []
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        test = getattr(torch.cpu, name, None)
        if test is not None:
            found.append((name.removeprefix("_is_").removesuffix("_supported"), bool(test())))
    return found


def has_inductor_option(name: str) -> bool:
    """Whether Inductor's config has an option."""
    import torch._inductor.config

    return hasattr(torch._inductor.config, name)


def has_linear_cross_entropy() -> bool:
    """Whether PyTorch has a fused linear cross-entropy of its own."""
    return hasattr(torch.nn.functional, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
