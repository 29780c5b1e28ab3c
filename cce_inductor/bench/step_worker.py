"""One contender's training steps of the demo's model, one at a request."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from ..demo import memory
from ..demo.data import batches, english_text, load_model, load_tokens
from ..demo.run import FUSED, PLAIN, Spec
from ..demo.worker import compiled, optimizer_tensors
from .contenders import COMPILE
from .protocol import Handlers, main


def loss_only(model: Any) -> Any:
    """A compiled function whose only result is the loss: Inductor may then drop the logits itself."""
    import torch

    return torch.compile(lambda ids: model(input_ids=ids, labels=ids).loss)


def with_outputs(model: Any, contender: str) -> Any:
    """The compiled model, called as everybody calls it: its outputs, with the logits, live through the backward."""
    run = compiled(model, contender)
    return lambda ids: run(input_ids=ids, labels=ids)


def handlers(job: dict[str, Any]) -> Handlers:
    import torch

    spec, contender = Spec(**job["spec"]), job["contender"]
    made: dict[str, Any] = {}

    def load() -> dict[str, Any]:
        torch.manual_seed(spec.seed)
        path = Path(spec.model)
        model = load_model(path, {"fp32": torch.float32, "bf16": torch.bfloat16}[spec.dtype])
        made["text"] = batches(load_tokens(path, english_text()), spec.batch, spec.seq, spec.seed)
        made["optimizer"] = torch.optim.AdamW(model.parameters(), lr=spec.lr, fused=True)
        made["model"] = model
        if contender == COMPILE:
            made["run"] = loss_only(model)
        else:
            made["run"] = with_outputs(model, FUSED if contender.startswith("ours") else PLAIN)
        return {"vocab": model.get_output_embeddings().weight.shape[0]}

    def step() -> dict[str, Any]:
        ids = next(made["text"])
        memory.trim()
        before = memory.rss()
        memory.reset_peak()
        start = time.perf_counter()
        outputs = made["run"](ids)
        loss = outputs if isinstance(outputs, torch.Tensor) else outputs.loss
        loss.backward()
        made["optimizer"].step()
        made["optimizer"].zero_grad(set_to_none=False)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "above": memory.peak_rss() - before, "loss": loss.item()}

    def warm_up() -> dict[str, Any]:
        """Compile; gradients and optimizer state stay from here on."""
        first = step()
        step()
        memory.trim()
        parameters = list(made["model"].parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        state = memory.tensor_bytes([*parameters, *gradients, *optimizer_tensors(made["optimizer"])])
        return {"seconds": first["seconds"], "state": state, "rest": memory.rss()}

    return {"load": load, "warm_up": warm_up, "step": step}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], handlers))
