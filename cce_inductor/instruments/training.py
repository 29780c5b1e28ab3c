"""Training steps of a Hugging Face model by one contender, in a process of its own, one step at a request.

python -m cce_inductor.instruments.training JOB_JSON REQUESTS_FD ANSWERS_FD
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import memory
from .data import batches, english_text, load_model, load_tokens
from .protocol import Handlers, main

PLAIN = "torch.compile"
FUSED = "cce_inductor"
ITEMSIZE = {"fp32": 4, "bf16": 2}  # bytes per element of weights and logits, by dtype


@dataclass(frozen=True)
class Spec:
    """The training run. Contenders differ in `contender` only, a key of `CALLS`."""

    contender: str
    model: str  # checkpoint directory or GGUF file
    dtype: str = "fp32"  # of the weights: a key of ITEMSIZE
    steps: int = 3
    batch: int = 4
    seq: int = 256
    lr: float = 1e-4
    seed: int = 0


def _with_outputs(model: Any, **how: Any) -> Callable:
    """The compiled model, called as everybody calls it: its outputs, with the logits, live through the backward."""
    import torch

    run = torch.compile(model, **how)
    return lambda ids: run(input_ids=ids, labels=ids)


def _loss_of_outputs(model: Any, **how: Any) -> Callable:
    """The same, but nobody holds the outputs: only the loss lives through the backward."""
    run = _with_outputs(model, **how)
    return lambda ids: run(ids).loss


def _loss_only(model: Any) -> Callable:
    """A compiled function whose only result is the loss: Inductor may then drop the logits itself."""
    import torch

    return torch.compile(lambda ids: model(input_ids=ids, labels=ids).loss)


def _eager(model: Any) -> Callable:
    """Nothing is compiled."""
    return lambda ids: model(input_ids=ids, labels=ids)


def _eager_with_head(model: Any) -> Callable:
    """The same, but the head gives pending logits."""
    import cce_inductor

    cce_inductor.defer_head(model.get_output_embeddings())
    return _eager(model)


def _ours() -> Callable:
    import cce_inductor

    return cce_inductor.cce_backend


# By contender what makes of a model a function of ids (batch, seq) that returns the loss, or outputs with one.
CALLS: dict[str, Callable[[Any], Callable]] = {
    PLAIN: _loss_of_outputs,
    FUSED: lambda model: _loss_of_outputs(model, backend=_ours()),
    "eager": _eager,
    "ours+head": _eager_with_head,
    "compile": _loss_only,
    "compile+logits": _with_outputs,
    "ours+logits": lambda model: _with_outputs(model, backend=_ours()),
}


def optimizer_tensors(optimizer: Any) -> Iterable[Any]:
    """Every tensor that the optimizer keeps between steps."""
    import torch

    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


class Training:
    """The model, its text and AdamW; gradients stay allocated from the first step on. Bytes and seconds."""

    def __init__(self, spec: Spec) -> None:
        import torch

        torch.manual_seed(spec.seed)
        path = Path(spec.model)
        self.model = load_model(path, {"fp32": torch.float32, "bf16": torch.bfloat16}[spec.dtype])
        self.text = batches(load_tokens(path, english_text()), spec.batch, spec.seq, spec.seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=spec.lr, fused=True)
        self.run = CALLS[spec.contender](self.model)

    def step(self) -> dict[str, Any]:
        """Forward, backward and AdamW on the next batch.

        Returns the loss, how long it took ("seconds") from which `time.monotonic()` ("start"), and the highest resident
        set in it ("peak"), 0 where the kernel does not tell.
        """
        import torch

        ids = next(self.text)
        measured = memory.reset_peak()
        start = time.monotonic()
        outputs = self.run(ids)
        loss = outputs if isinstance(outputs, torch.Tensor) else outputs.loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        seconds = time.monotonic() - start
        peak = memory.peak_rss() if measured else 0
        return {"loss": loss.item(), "seconds": seconds, "peak": peak, "start": start}

    def rest(self) -> dict[str, int]:
        """Gives back what nothing refers to; then the resident set, and the part of it that the training needs."""
        memory.trim()
        parameters = list(self.model.parameters())
        gradients = (p.grad for p in parameters if p.grad is not None)
        state = memory.tensor_bytes([*parameters, *gradients, *optimizer_tensors(self.optimizer)])
        return {"state_bytes": state, "rest": memory.rss()}


def handlers(job: dict[str, Any]) -> Handlers:
    """`load` first, then `step` and `rest`; `counters` is how often each thing happened to cce_inductor."""
    spec = Spec(**job["spec"])
    made: list[Training] = []

    def load() -> dict[str, Any]:
        made.append(Training(spec))
        memory.trim()
        vocab = made[0].model.get_output_embeddings().weight.shape[0]
        return {"rows": spec.batch * spec.seq, "vocab": vocab}

    def counters() -> dict[str, Any]:
        from torch._dynamo.utils import counters

        return {"counters": {name: int(count) for name, count in counters["cce_inductor"].items()}}

    return {"load": load, "step": lambda: made[0].step(), "rest": lambda: made[0].rest(), "counters": counters}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], handlers))
