"""What a run is told, once each: whether losses fused, which line reads deferred logits, which head is out of reach.

Only where the pass is on for plain PyTorch, by ``enable()`` or `CCE_INDUCTOR=1`: who names our backend can ask
`explain`. Of several ranks the first one speaks. The lines are those of the logger ``cce_inductor.run``.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import compat

log = logging.getLogger("cce_inductor.run")

STEPS = 3  # of an optimizer, after which a run has compiled what it will


@dataclass
class Run:
    """What has happened since the pass was turned on.

    losses: the records of losses, by where they stand. statistics: kinds of those that are called on deferred logits
    and computed without them. reads: how often a line of the program has read such logits.
    """

    steps: int = 0
    graphs: int = 0
    deferred: int = 0
    statistics: int = 0
    losses: dict[Any, Any] = field(default_factory=dict)
    reads: Counter[str] = field(default_factory=Counter)
    head: str = ""


_run: Run | None = None
_hooks: list[Any] = []


def start() -> None:
    """Begins to watch a run."""
    global _run
    if _run is None:
        _run = Run()
        _hooks.append(register_optimizer_step_post_hook(_after_step))
        if log.level == logging.NOTSET and logging.getLogger("cce_inductor").level == logging.NOTSET:
            log.setLevel(logging.INFO)


def stop() -> None:
    """Ends that."""
    global _run
    _run = None
    while _hooks:
        _hooks.pop().remove()


def is_watching() -> bool:
    """Whether the pass is on for plain PyTorch."""
    return _run is not None


def saw_graph(losses: Iterable[Any], deferred: int) -> None:
    """A graph has been rewritten: the records of its losses, and how many of its outputs are deferred."""
    if _run is not None:
        _run.graphs += 1
        _run.deferred += deferred
        for loss in losses:
            known = _run.losses.get((loss.location, loss.loss))
            if known is None or not known.fused:
                _run.losses[loss.location, loss.loss] = loss


def saw_statistic() -> None:
    """A statistic that is called on deferred logits is computed without them."""
    if _run is not None:
        _run.statistics += 1


def saw_read() -> None:
    """Deferred logits have been computed for the program; the second time that a line does so, it is named."""
    if _run is None:
        return
    place = compat.program_place()
    _run.reads[place] += 1
    if _run.reads[place] == 2 and not any(n > 1 for other, n in _run.reads.items() if other != place):
        _say(
            logging.INFO,
            "logits are computed again and again, since this line needs their values: %s. A loss beside it is fused "
            "all the same; without that line its logits would never be written.",
            place or "unknown",
        )


def saw_head(head: str) -> None:
    """A head runs eagerly, out of the reach of the pass."""
    if _run is not None and not _run.head:
        _run.head = f"{head} at {compat.program_place()}"
        _say(
            logging.WARNING,
            "a head runs outside of every compiled graph, so its logits are written: %s. CCE_INDUCTOR_EAGER_HEADS=1, "
            "or cce_inductor.defer_head(module), has it give pending logits, which a loss is fused with.",
            _run.head,
        )


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():  # a compiled optimizer must not break its graph for us
        _count_step()


@torch.compiler.disable
def _count_step() -> None:
    if _run is None:
        return
    _run.steps += 1  # the hook stays: others are being called, and their list must not change meanwhile
    if _run.steps == STEPS:
        level, text = summary(_run)
        _say(level, "%s", text)


def summary(run: Run) -> tuple[int, str]:
    """How loud, and what, a run is told after its first steps."""
    fused = [loss for loss in run.losses.values() if loss.fused]
    declined = [loss for loss in run.losses.values() if not loss.fused]
    size = sum(loss.logits_bytes or 0 for loss in fused) / 2**20
    text = f"after {run.steps} steps: {_losses(len(fused))} fused"
    if size:
        text += f" ({size:,.0f} MiB of logits not written)"
    if run.statistics:
        text += f", {run.statistics} statistics of logits computed without them"
    text += f", {run.deferred} logits deferred, {sum(run.reads.values())} times read, {len(declined)} declined"
    if not run.graphs:
        text += "; torch.compile has captured nothing"
    if declined:
        text += f". {declined[0]}"
    served = bool(fused or run.statistics)
    if not served:
        text += "".join(f". {why}" for (module, name), why in OWN_HEADS.items() if _is_loaded(module, name))
    if declined or not served:
        text += f". More: python -m cce_inductor explain {sys.argv[0] or 'SCRIPT'}"
    return (logging.INFO if served else logging.WARNING), text


# Frameworks that multiply by the head's weight themselves, by chunks, where nobody sees a loss over a vocabulary.
OWN_HEADS = {
    ("trl.trainer.utils", "add_fused_lm_head"): (
        "TRL's trainers compute log-probabilities from lm_head.weight by a function of their own; docs/trainers.md "
        "says which settings hand the loss back"
    ),
    ("torchtitan.components.loss", "ChunkedLossWrapper"): (
        "torchtitan's ChunkedLossWrapper runs the head by chunks with a backward of its own; its CrossEntropyLoss is "
        "fused"
    ),
}


def _is_loaded(module: str, name: str) -> bool:
    return hasattr(sys.modules.get(module), name)


def _losses(n: int) -> str:
    return f"{n} {'loss' if n == 1 else 'losses'} over a vocabulary"


def _say(level: int, text: str, *args: Any) -> None:
    if compat.rank() > 0:
        return
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
    log.log(level, f"cce_inductor: {text}", *args)
