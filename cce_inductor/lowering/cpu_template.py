"""C++ templates as Inductor buffers: one kernel with several outputs of any shapes and dtypes."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._inductor.lowering  # first: cpp_template cannot be imported before it
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP, cexpr_index
from torch._inductor.utils import Placeholder, parallel_num_threads
from torch._inductor.virtualized import V

from .. import record, version
from ..ops.call import OTHER

# The GEMM of the templates where the CPU has AVX-512. Tests put a plain loop in its place to run that path anywhere.
BRGEMM = "at::native::cpublas::brgemm"


@dataclass(frozen=True)
class Spec:
    """What one kernel is rendered from.

    template: file name without ".cpp.jinja". element: dtype of the GEMMs' operands. compute: dtype the operands are
    rounded to. operands: tensors by the name the template knows them by; `absent` names, with dtypes, those it must
    be able to mention though they were not given. outputs: their layouts by name. constants: more template variables.
    other: for a loss over two heads, the variables that the other head's pieces have in place of these.
    """

    template: str
    element: torch.dtype
    compute: torch.dtype
    operands: dict[str, Any]
    absent: dict[str, torch.dtype]
    outputs: dict[str, ir.Layout]
    constants: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)


def number(value: float) -> str:
    """A float as a C++ literal of type float."""
    return f"{float(value)!r}f"


def launch(spec: Spec, device: torch.device) -> dict[str, ir.TensorBox]:
    """Adds the kernel to the graph that is being lowered and returns its outputs by name.

    In place of CppTemplate.generate(), which requires all outputs to have one shape and dtype (for autotuning, of which
    there is none here).
    """
    layouts = list(spec.outputs.values())
    template = _Template(spec, layouts[0])

    def make_kernel_render(node: Any, **kwargs: Any) -> tuple:
        kernel = CppTemplateKernel(kernel_name=str(Placeholder.KERNEL_NAME), num_threads=template.num_threads)
        return kernel, functools.partial(kernel.render, template, template_buffer_node=node, **kwargs)

    buffer = ir.CppTemplateBuffer(
        layout=ir.MultiOutputLayout(device=device),  # type: ignore[arg-type]
        inputs=template.input_nodes,
        make_kernel_render=make_kernel_render,
        template=template,  # type: ignore[arg-type]
        choice=None,
    )
    buffer.outputs = [ir.MultiOutput(layout, buffer, [(list, i)]) for i, layout in enumerate(layouts)]
    for output in buffer.outputs:
        # A pointwise consumer of the only output in use would be fused and arrive in `epilogue_nodes`.
        V.graph.no_fuse_buffer_names.add(output.get_name())
    return {name: ir.TensorBox.create(output) for name, output in zip(spec.outputs, buffer.outputs, strict=True)}


class _Template(CppTemplate):
    def __init__(self, spec: Spec, layout: ir.Layout):
        super().__init__(spec.template, list(spec.operands.values()), layout, parallel_num_threads())
        self.spec = spec

    def render(  # type: ignore[override]
        self,
        kernel: CppTemplateKernel,
        template_buffer_node: Any = None,
        epilogue_nodes: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> str:
        assert not epilogue_nodes, "outputs are in no_fuse_buffer_names"
        spec = self.spec
        # The scheduler drops outputs that nobody reads, and the call of the kernel must not name them.
        # This runs after it.
        outputs = {
            name: node
            for name, node in zip(spec.outputs, template_buffer_node.outputs, strict=True)
            if node.get_name() not in V.graph.removed_buffers
        }
        # Two operands may be views of one buffer, which is one argument of the kernel.
        arguments: dict[str, Any] = {}
        argument_of: dict[str, str] = {}
        for name, node in spec.operands.items():
            argument_of.setdefault(node.get_name(), f"in_{name}")
            arguments.setdefault(argument_of[node.get_name()], node)
        signature = kernel.def_kernel(
            inputs=arguments,
            outputs={f"out_{name}": node for name, node in outputs.items()},
            extra_sizevars=self._symbols(),
        )
        variables = {
            "element": spec.element,
            "compute": spec.compute,
            "brgemm": BRGEMM,
            "number": number,
            "header": self.header().getvalue(),
            "signature": signature,
            "profile": kernel.maybe_codegen_profile(),
            "declarations": self._declarations(kernel, argument_of),
            "two_heads": bool(spec.other),
            "other_namespace": _namespace(OTHER),
            **spec.constants,
        }
        heads = {prefix: variables | self._of_head(prefix, outputs) for prefix in ("", OTHER)}
        heads[OTHER] |= spec.other
        for head in heads.values():
            head |= {name: DTYPE_TO_CPP[head[name]] for name in ("element", "compute")}

        def piece(name: str, prefix: str = "", **instead: Any) -> str:
            return self._render(name, **heads[prefix] | instead)

        text = self._render(spec.template, piece=piece, **heads[""])
        record.kernel(f"{spec.template}.cpp", text)
        return text

    def _render(self, template: str, **variables: Any) -> str:
        path = version.templates_dir() / f"{template}.cpp.jinja"
        return self._template_from_string(path.read_text()).render(**variables)

    def _of_head(self, prefix: str, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the pieces of one head call its own: names without the prefix."""
        operands = {n.removeprefix(prefix): t for n, t in self.spec.operands.items() if n.startswith(prefix)}
        return {
            "prefix": prefix,
            "namespace": _namespace(prefix),
            "operands": operands,
            "has_bias": "bias" in operands,
            "type": lambda name: DTYPE_TO_CPP[operands[name].get_dtype()],
            "output": lambda name: f"out_{prefix}{name}" if prefix + name in outputs else "nullptr",
        }

    def _symbols(self) -> list[Any]:
        """Sizes, strides and offsets that the declarations mention: of two views of one buffer, one is no argument."""
        nodes = self.spec.operands.values()
        return [e for node in nodes for e in (*node.get_size(), *node.get_stride(), node.get_layout().offset)]

    def _declarations(self, kernel: CppTemplateKernel, argument_of: dict[str, str]) -> str:
        """C++ that gives operands, their strides and the sizes N, D, V, K the names the templates use."""
        spec, lines = self.spec, []
        weight, rows = spec.operands["weight"], spec.operands["input"]
        sizes = [("N", rows, 0), ("D", rows, 1), ("V", weight, 0)]
        sizes += [("K", spec.operands["entries"], 1)] if "entries" in spec.operands else []
        sizes += [("other_D", spec.operands["other_input"], 1)] if spec.other else []
        for letter, node, dim in sizes:
            lines.append(f"const int64_t {letter} = {kernel.size(node, dim)};")
        for name, node in spec.operands.items():
            argument = argument_of[node.get_name()]
            offset = _cexpr(kernel, node.get_layout().offset)
            ctype = DTYPE_TO_CPP[node.get_dtype()]
            lines.append(f"const {ctype}* {name} = reinterpret_cast<const {ctype}*>({argument}) + {offset};")
            dims = len(node.get_size())
            for dim in range(dims):
                suffix = f"_{dim}" if dims > 1 else ""
                lines.append(f"const int64_t {name}_stride{suffix} = {kernel.stride(node, dim)};")
        for name, dtype in spec.absent.items():
            if name not in spec.operands:
                lines.append(f"constexpr {DTYPE_TO_CPP[dtype]}* {name} = nullptr;")
                lines.append(f"constexpr int64_t {name}_stride = 0;")
        return "\n  ".join(lines)


def _cexpr(kernel: CppTemplateKernel, expr: Any) -> str:
    return cexpr_index(kernel.rename_indexing(expr))


def _namespace(prefix: str) -> str:
    """C++ namespace of a head's pieces."""
    return f"{Placeholder.KERNEL_NAME}_{prefix}tiles"
