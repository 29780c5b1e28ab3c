"""One contender, in a process of its own: trains as `Spec` says and reports JSON lines.

    python -m cce_inductor.demo.worker SPEC_JSON FILE_DESCRIPTOR

Everything printed goes elsewhere than the report, so that no library's message can end up in it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from . import memory
from .data import batches, english_text, load_model, load_tokens
from .run import FUSED, Spec


class Reporter:
    """Writes events to the pipe, each line complete before the next."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __call__(self, event: str, **values: Any) -> None:
        self._stream.write(json.dumps({"event": event, **values}) + "\n")
        self._stream.flush()


def compiled(model: Any, contender: str) -> Any:
    """The one line that differs between the contenders."""
    import torch

    if contender == FUSED:
        import cce_inductor

        return torch.compile(model, backend=cce_inductor.cce_backend)
    return torch.compile(model)


def optimizer_tensors(optimizer: Any) -> Iterable[Any]:
    """Every tensor that the optimizer keeps between steps."""
    import torch

    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def train(spec: Spec, report: Reporter) -> None:
    """Load, compile, take `spec.steps` steps of AdamW; gradients stay allocated from the first step on."""
    import torch
    from torch._dynamo.utils import counters

    report("phase", phase="loading")
    torch.manual_seed(spec.seed)
    path = Path(spec.model)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[spec.dtype]
    model = load_model(path, dtype)
    text = batches(load_tokens(path, english_text()), spec.batch, spec.seq, spec.seed)
    vocab = model.get_output_embeddings().weight.shape[0]
    report("start", rows=spec.batch * spec.seq, vocab=vocab)

    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.lr, fused=True)
    run = compiled(model, spec.contender)
    memory.trim()
    report("phase", phase="compiling")
    for step in range(spec.steps):
        ids = next(text)
        measured = memory.reset_peak()
        start = time.monotonic()
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        seconds = time.monotonic() - start
        peak = memory.peak_rss() if measured else 0
        report("step", loss=loss.item(), seconds=seconds, peak=peak, start=start)
        del loss
        if step == 0:
            memory.trim()
            gradients = (p.grad for p in model.parameters() if p.grad is not None)
            state = memory.tensor_bytes([*model.parameters(), *gradients, *optimizer_tensors(optimizer)])
            report("resting", state_bytes=state, rest=memory.rss())
            report("phase", phase="training")
    report("end", counters={name: int(n) for name, n in counters["cce_inductor"].items()})


def main(argv: list[str]) -> int:
    spec, descriptor = Spec(**json.loads(argv[0])), int(argv[1])
    with open(descriptor, "w") as stream:
        train(spec, Reporter(stream))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
