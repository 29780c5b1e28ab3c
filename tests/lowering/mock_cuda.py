"""Inductor's GPU code for a training graph, on a machine without a GPU.

AOTAutograd traces on fake CPU tensors, since autograd asks a CUDA device that is not there; each partitioned graph is
then moved to "cuda:0", whose properties are made up, and goes through Inductor as ever. We keep the wrapper's text.
"""

import contextlib
import ctypes
import os
import subprocess
import sysconfig
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
import torch._inductor.compile_fx as compile_fx
from torch._guards import TracingContext, tracing
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

CUDA = torch.device("cuda:0")
# compute capability -> multiprocessors, shared memory per block
CHIPS = {80: (108, 166912), 90: (132, 232448), 100: (148, 232448)}

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
extern "C" void register_guard() {
  static c10::impl::DeviceGuardImplRegistrar guard(
      c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
}
"""


def _register_guard() -> None:
    """A device guard that does nothing: without one, autograd ends the process when it meets a CUDA tensor."""
    torch._C._ensureCUDADeviceGuardSet()  # builds with CUDA
    if torch.backends.cuda.is_built():
        return
    root = Path(torch.__file__).parent
    target = Path(tempfile.gettempdir()) / f"cce_mock_guard_{torch.__version__}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        # Built beside the target and moved there in one step: two processes may build at once.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            source, built = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
            source.write_text(_GUARD)
            command = ["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", built, f"-I{root}/include"]
            subprocess.run([*command, f"-L{root}/lib", "-lc10", f"-Wl,-rpath,{root}/lib"], check=True)
            os.replace(built, target)
    ctypes.CDLL(str(target)).register_guard()


def _properties(capability: int) -> types.SimpleNamespace:
    processors, shared = CHIPS[capability]
    return types.SimpleNamespace(
        name=f"mock sm_{capability}", major=capability // 10, minor=capability % 10, multi_processor_count=processors,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
        total_memory=80 << 30, shared_memory_per_block=49152, shared_memory_per_block_optin=shared,
        L2_cache_size=50 << 20, gcnArchName="", uuid="mock",
    )  # fmt: skip


class _Driver:
    """What Triton asks of the active driver while it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return CUDA

    def is_active(self):
        return True

    def get_device_interface(self):
        return torch.cuda

    def get_benchmarker(self):
        return None


def _clear_caches() -> None:
    import torch._inductor.utils as inductor_utils
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    functions = [*vars(_triton).values(), DeviceProperties.create]
    functions += [getattr(inductor_utils, n, None) for n in ("is_big_gpu", "get_gpu_type", "get_max_num_sms")]
    for function in functions:
        clear = getattr(function, "cache_clear", None) or getattr(
            getattr(function, "__func__", None), "cache_clear", None
        )
        if clear:
            clear()


@contextlib.contextmanager
def device(capability: int = 90, **inductor: object) -> Iterator[None]:
    """In this context Inductor believes in one GPU of that compute capability. `inductor`: more of its options."""
    import triton.runtime.driver as driver
    from torch._dynamo.device_interface import CudaInterface

    _register_guard()
    _clear_caches()
    made_up = _properties(capability)
    pair = capability // 10, capability % 10
    cuda = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_properties": lambda *a, **k: made_up, "get_device_capability": lambda *a, **k: pair,
        "get_device_name": lambda *a: made_up.name, "is_bf16_supported": lambda *a, **k: True,
        "is_tf32_supported": lambda: True, "synchronize": lambda *a, **k: None, "set_device": lambda *a: None,
        "is_initialized": lambda: True, "_lazy_init": lambda: None, "_exchange_device": lambda i: 0,
        "_maybe_exchange_device": lambda i: 0, "current_stream": lambda *a: types.SimpleNamespace(cuda_stream=0),
        "get_rng_state": lambda *a, **k: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda *a, **k: None,
    }  # fmt: skip
    interface = {"get_device_properties": lambda *a, **k: made_up, "current_device": lambda: 0}
    with contextlib.ExitStack() as stack:

        def put(owner: object, values: dict) -> None:
            for name, value in values.items():
                stack.enter_context(patch.object(owner, name, value, create=True))

        put(torch.cuda, cuda)
        put(CudaInterface, {n: staticmethod(f) for n, f in interface.items()})
        put(CudaInterface, {"raise_if_triton_unavailable": staticmethod(lambda *a, **k: None)})
        put(CudaInterface.Worker, {n: staticmethod(f) for n, f in interface.items()})
        put(torch.version, {"cuda": torch.version.cuda or "13.0"})
        put(torch._subclasses.fake_tensor, {"init_gpu_context": lambda *a, **k: None})
        fake_driver = _Driver(capability)
        put(getattr(driver, "driver", driver), {"_active": fake_driver, "_default": fake_driver})
        off = {
            "fx_graph_cache": False,
            "fx_graph_remote_cache": False,
            "compile_threads": 1,
            "triton.cudagraphs": False,
        }
        stack.enter_context(torch._inductor.config.patch({**off, **inductor}))
        stack.enter_context(
            torch._functorch.config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True)
        )
        yield
    _clear_caches()


def _move(gm: torch.fx.GraphModule, inputs: list, mode: FakeTensorMode) -> list:
    """An ATen graph traced on the CPU, moved to the GPU; gives its new fake inputs."""

    def to_cuda(value):
        return CUDA if isinstance(value, torch.device) and value.type == "cpu" else value

    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.args = torch.fx.node.map_aggregate(node.args, to_cuda)
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, to_cuda)
    moved = []
    with mode:
        for value in inputs:
            if isinstance(value, torch.Tensor):
                value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
            moved.append(value)
        for node, value in zip((n for n in gm.graph.nodes if n.op == "placeholder"), moved, strict=True):
            node.meta["val"] = value
        FakeTensorProp(gm, mode=mode).propagate_dont_convert_inputs(*moved)
    gm.recompile()
    return moved


def wrappers(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> list[str]:
    """The wrapper code, forward then backward, that Inductor makes of a graph as Dynamo captured it.

    Inside `device`. `inputs`: tensors like the graph's placeholders, on the CPU, real or fake.
    """
    found: list[str] = []

    def keep(self, *args):
        wrapper, _ = self.codegen()
        found.append(getattr(wrapper, "value", wrapper))
        return types.SimpleNamespace(call=lambda args: None, __file__="mock", runner=None)

    mode = next((t.fake_mode for t in inputs if isinstance(t, FakeTensor)), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [t if isinstance(t, FakeTensor) or not isinstance(t, torch.Tensor) else mode.from_tensor(t) for t in inputs]

    def inner(graph: torch.fx.GraphModule, graph_inputs: list, **options) -> Callable:
        return compile_fx.compile_fx_inner(graph, _move(graph, graph_inputs, mode), **options)

    with (
        patch.object(GraphLowering, "compile_to_module", keep),
        patch.object(GraphLowering, "_compile_to_module", keep, create=True),
        tracing(TracingContext(mode)),
        mode,
    ):
        compile_fx.compile_fx(gm, fakes, inner_compile=inner)
    return found
