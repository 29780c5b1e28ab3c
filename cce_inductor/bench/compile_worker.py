"""One cold compilation of a model of a given shape, and how long the pass took of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from ..instruments.protocol import Handlers, main

TOKENS = (2, 64)


def spent() -> float:
    """CPU seconds of this process and of the compilers that it has run: a busy machine does not change them."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


@dataclass
class Clock:
    """What the pass took: all that the backend does but for the compiler behind it."""

    seconds: float = 0.0
    nodes: int = 0


@contextmanager
def timed_pass() -> Iterator[Clock]:
    """Times the pass in every graph compiled inside a ``with`` block."""
    from .. import backend

    clock, original = Clock(), backend.compile_graph

    def compile_graph(gm: Any, inputs: Any, settings: Any, compiler: Callable, *rest: Any, **more: Any) -> Callable:
        behind = 0.0

        def timed_compiler(*args: Any) -> Callable:
            nonlocal behind
            start = spent()
            try:
                return compiler(*args)
            finally:
                behind += spent() - start

        start = spent()
        result = original(gm, inputs, settings, timed_compiler, *rest, **more)
        clock.seconds += spent() - start - behind
        clock.nodes += len(gm.graph.nodes)
        return result

    with mock.patch.object(backend, "compile_graph", compile_graph):
        yield clock


def handlers(job: dict[str, Any]) -> Handlers:
    """`measure` compiles a llama of the job's shape once, with an empty cache."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(job["cache"], f"compile-{job['turn']}"))
    import torch
    from torch._dynamo.utils import counters

    from .. import backend  # noqa: F401 - registered before the clock runs, as an entry point is

    def measure() -> dict[str, Any]:
        import transformers

        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**job["shape"], use_cache=False))
        ids = torch.randint(0, job["shape"]["vocab_size"], TOKENS)
        # Inductor asks the C++ compiler about the CPU once, for its first graph, whoever is the first to want to know.
        torch.compile(torch.sin)(torch.ones(64))
        compiled = torch.compile(model, backend="cce")

        def step() -> float:
            start = spent()
            compiled(input_ids=ids, labels=ids).loss.backward()
            return spent() - start

        with timed_pass() as clock:
            first = step()
        return {
            "total": first - step(),
            "trace": clock.seconds,
            "nodes": clock.nodes,
            "fused": counters["cce_inductor"]["fused"],
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    return {"measure": measure}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], handlers))
