"""The Triton kernels in a wrapper that Inductor made: taken out, interpreted, compiled ahead of time."""

import ast
import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter

_KERNEL = re.compile(r"^\w+ = async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.S | re.M)
_DECORATOR = re.compile(r"@triton_heuristics\.(\w+)\((.*?)\n\)\n(?=@triton\.jit)", re.S)
# The interpreter has no numpy for functions of the device's library.
_MATH = """
class libdevice:
    @triton.jit
    def tanh(x):
        return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0

    @triton.jit
    def rsqrt(x):
        return 1.0 / tl.sqrt(x)

    @triton.jit
    def sqrt(x):
        return tl.sqrt(x)

    @triton.jit
    def exp(x):
        return tl.exp(x)

    @triton.jit
    def log(x):
        return tl.log(x)

    @triton.jit
    def isinf(x):
        return (x == float("inf")) | (x == float("-inf"))

    @triton.jit
    def isnan(x):
        return x != x

    @triton.jit
    def abs(x):
        return tl.abs(x)

tl_math = libdevice
"""
# What Inductor's own kernels import them as.
_LIBDEVICE = "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math\n"
_IMPORT = "import triton.language as tl\n"
_HELPERS = "from torch._inductor.runtime import triton_helpers\n"


@dataclass(frozen=True)
class Kernel:
    """One kernel. kind: "template" for ours. signature: parameters with Triton's names of their types.

    aligned: indices of parameters known to be divisible by 16. options: num_warps, num_stages.
    """

    name: str
    kind: str
    source: str
    signature: dict[str, str]
    aligned: list[int]
    options: dict[str, int]

    def constants(self) -> dict[str, str]:
        """What the template was rendered with, as text."""
        return dict(re.findall(r"^    (\w+) : tl\.constexpr = (.*)$", self.source, re.M))

    @property
    def ours(self) -> str | None:
        """Its template, with the variant as lowering/triton_configs.py has it; None for a kernel of Inductor's own."""
        return ast.literal_eval(self.constants()["KERNEL"]) if self.kind == "template" else None


def kernels(wrapper: str) -> list[Kernel]:
    found = []
    for match in _KERNEL.finditer(wrapper):
        source = match.group(2).replace("\\\\", "\\")
        decorator = _DECORATOR.search(source)
        meta = decorator.group(2)
        text = source.replace(decorator.group(0), "").replace("triton_helpers.set_driver_to_gpu()\n", "")
        found.append(
            Kernel(
                name=match.group(1),
                kind=decorator.group(1),
                source=re.sub(r"^from torch\._inductor.*$", "", text, flags=re.M).replace(
                    _IMPORT, _IMPORT + _HELPERS, 1
                ),
                signature=ast.literal_eval(re.search(r"'signature': (\{.*?\})", meta).group(1)),
                aligned=[int(i) for i in re.findall(r"\((\d+),\): \[\['tt\.divisibility', 16\]\]", meta)],
                options={k: int(v) for k, v in re.findall(r"^(num_stages|num_warps)=(\d+)", meta, re.M)},
            )
        )
    return found


def load(kernel: Kernel):
    """The kernel as a Triton function; to be interpreted if TRITON_INTERPRET=1 was set when Triton was imported."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    text = kernel.source.replace(_IMPORT, _IMPORT + (_MATH if interpreted else _LIBDEVICE), 1)
    path = Path(tempfile.mkdtemp()) / f"{kernel.name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(kernel.name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[kernel.name] = module
    spec.loader.exec_module(module)
    return getattr(module, kernel.name)


def fix_interpreter() -> None:
    """What Triton's interpreter cannot do.

    bfloat16 (3.6, 3.7): `tl.dot` multiplies the operands' bits, casts cut off, and an int8 becomes bits. Masks: "and"
    with a comparison of 64-bit scalars gives 64 bits, which loads and stores do not take (3.9).
    """
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "fixed", False):
        return
    dot, cast = builder.create_dot, builder.cast_impl
    load, store = builder.create_masked_load, builder.create_masked_store

    def floats(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def to_nearest(self, source, dtype):
        if source.dtype.scalar in (tl.float32, tl.int8) and dtype.scalar == tl.bfloat16:
            data = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(data, tl.bfloat16)
        return cast(self, source, dtype)

    def bits(mask):
        if not isinstance(mask, interpreter.TensorHandle):  # a descriptor's own, bare and right
            return mask
        return interpreter.TensorHandle(mask.data.astype(bool), tl.int1)

    builder.create_masked_load = lambda self, pointers, mask, *rest, **named: load(
        self, pointers, bits(mask), *rest, **named
    )
    builder.create_masked_store = lambda self, pointers, value, mask, *rest, **named: store(
        self, pointers, value, bits(mask), *rest, **named
    )
    builder.create_dot = lambda self, a, b, *rest: dot(self, floats(a), floats(b), *rest)
    builder.cast_impl = to_nearest
    builder.create_fp_trunc = to_nearest
    builder.fixed = True


class _Launcher:
    """Stands for a compiled kernel in a wrapper: interprets the launch."""

    def __init__(self, kernel: Kernel):
        self.kernel, self.function = kernel, load(kernel)
        self.launches = 0

    def run(self, *arguments, stream=None):
        self.launches += 1
        declared = re.search(rf"^def {self.kernel.name}\((.*?)\):$", self.kernel.source, re.M).group(1).split(", ")
        parameters = [p for p in declared if "tl.constexpr" not in p]
        values = dict(zip(parameters, arguments, strict=False))
        if self.kernel.kind == "template":
            grid = tuple(arguments[len(parameters) :])
            self.function[grid](*values.values())
            return
        # Inductor's own kernels: one row of a reduction per program, or 1024 points.
        reduction = "reduction" in self.kernel.kind
        sizes = {"XBLOCK": 1 if reduction else 1024, "R0_BLOCK": 1024}
        wanted = {n: v for n, v in sizes.items() if f"{n} : tl.constexpr" in declared}
        self.function[(-(-values["xnumel"] // wanted.get("XBLOCK", 1)), 1, 1)](*values.values(), **wanted)


def summary(wrapper: str) -> str:
    """What a wrapper allocates and launches, in order; repeats in a row are counted."""
    names = {kernel.name: kernel.ours or kernel.kind.replace("_", " ") for kernel in kernels(wrapper)}
    lines: list[list] = []
    step = r"= empty_strided_cuda\(\((?P<size>.*?)\), \(.*?\), torch\.(?P<dtype>\w+)\)|(?P<kernel>\w+)\.run\("
    for found in re.finditer(step, wrapper):
        name = names.get(found["kernel"], found["kernel"])
        text = f"launch {name}" if name else f"allocate ({found['size'].strip(', ')}) {found['dtype']}"
        if lines and lines[-1][0] == text:
            lines[-1][1] += 1
        else:
            lines.append([text, 1])
    return "\n".join(text + (f" x {count}" if count > 1 else "") for text, count in lines)


def arguments(wrapper: str) -> list[str]:
    """The names of a wrapper's inputs, in order."""
    names = re.search(r"def call\(self, args\):\n\s+(.*?) = args", wrapper).group(1)
    return [name for name in names.strip("()").split(", ") if name]


def _poisoned(size: tuple, stride: tuple, dtype: torch.dtype) -> torch.Tensor:
    """Memory that nobody has written to: reading it shows."""
    memory = torch.empty_strided(size, stride, dtype=dtype)
    return memory.fill_(torch.nan) if dtype.is_floating_point else memory.fill_(dtype != torch.bool and 77)


def execute(wrapper: str, arguments: list) -> tuple[tuple, dict[str, int]]:
    """Runs a wrapper on CPU tensors, its kernels in Triton's interpreter; gives its outputs and launches by kernel."""
    fix_interpreter()
    launchers = {kernel.name: _Launcher(kernel) for kernel in kernels(wrapper)}
    compiler = types.SimpleNamespace(triton=lambda name, *a, **k: launchers[name], wait=lambda scope: None)
    text = wrapper.replace("async_compile = AsyncCompile()", "async_compile = _compiler")
    text = re.sub(r"^from torch\._C import _cuda_getCurrentRawStream as get_raw_stream$", "", text, flags=re.M)
    text = text.replace("torch._C._dynamo.guards._empty_strided_cuda", "_poisoned")
    text = text.replace("torch.cuda._DeviceGuard(0)", "_nothing()").replace("torch.cuda.set_device(0)", "pass")
    scope = {
        "_compiler": compiler,
        "_nothing": contextlib.nullcontext,
        "_poisoned": _poisoned,
        "get_raw_stream": lambda i: 0,
        "__name__": "mock",
    }
    exec(compile(text, "wrapper", "exec"), scope)
    call = scope["call"] if "call" in scope else scope["runner"].call
    return tuple(call(list(arguments))), {name: k.launches for name, k in launchers.items()}


def compile_ahead(kernel: Kernel, architecture: int | str) -> dict:
    """Registers, bytes of stack (spills) and of shared memory, and the matrix instruction, on one architecture."""
    compiled = _compiled(kernel, architecture)
    if isinstance(architecture, str):
        text = compiled.asm["amdgcn"]
        number = {key: int(re.search(rf"{key}: *(\d+)", text).group(1)) for key in (".vgpr_count", "ScratchSize")}
        registers, stack = number.values()
        instruction = "mfma" if "v_mfma" in text else "none"
    else:
        registers, stack = _usage(compiled.asm["cubin"])
        ptx = compiled.asm["ptx"]
        instruction = next((i for i in ("wgmma", "tcgen05", "mma.sync") if i in ptx), "none")
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared, "instruction": instruction}


def assembly(kernel: Kernel, architecture: int) -> str:
    """PTX of a kernel on an NVIDIA architecture."""
    return _compiled(kernel, architecture).asm["ptx"]


def _compiled(kernel: Kernel, architecture: int | str) -> Any:
    attributes = {(i,): [["tt.divisibility", 16]] for i in kernel.aligned}
    source = ASTSource(fn=load(kernel), signature=dict(kernel.signature), constexprs={}, attrs=attributes)
    is_amd = isinstance(architecture, str)
    target = GPUTarget("hip", architecture, 64) if is_amd else GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=kernel.options)


def _usage(binary: bytes) -> list[int]:
    """Registers and bytes of stack of an NVIDIA kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return [int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK")]
