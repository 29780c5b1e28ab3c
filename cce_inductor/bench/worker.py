"""The process of one contender at one case."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

from ..instruments.meters import METERS
from ..instruments.protocol import Handlers, main
from .cases import Case
from .contenders import KNOWN, build, with_diagnostics
from .inputs import make_inputs
from .measure import MODES, Head, relative_error, row_summary
from .reference import files


class Worker:
    """One contender at one case: `inputs` first, then `warm_up` or `once`, then anything. Bytes and seconds."""

    def __init__(self, job: dict[str, Any]) -> None:
        importlib.import_module("torch")  # takes seconds, in which an earlier contender compiles
        self.case, self.name, self.job = Case(**job["case"]), job["contender"], job

    def inputs(self) -> dict[str, Any]:
        """Makes the inputs and builds the contender."""
        inputs = make_inputs(self.case, self.job["cache"])
        self.head = Head(build(self.name, self.case), *inputs, METERS[self.case.device]())
        self.head.rest()
        return {}

    def warm_up(self) -> dict[str, Any]:
        """Compile and run everything once."""
        start = time.perf_counter()
        for mode in MODES:
            self.head.timed(mode)
        return {"seconds": time.perf_counter() - start, "note": KNOWN[self.name].note()}

    def timed(self, mode: str) -> dict[str, Any]:
        """One run."""
        return {"seconds": self.head.timed(mode)}

    def peaks(self) -> dict[str, Any]:
        """By mode the peak above inputs and gradients."""
        found = {}
        for mode in MODES:
            found[mode] = self.head.peak(mode)["above"]
            self.head.rest()
        return found

    def once(self) -> dict[str, Any]:
        """Loss and gradients without a warm-up: time and memory with all that compilation takes."""
        return self.head.peak("gradients") | {"note": KNOWN[self.name].note()}

    def error(self, folder: str, loss: float) -> dict[str, Any]:
        """Relative to the reference: its loss, and its gradients in `folder`."""
        head = self.head
        head.rest()
        value = float(head.gradients())
        dx, dweight = files(folder, self.case)
        return {
            "loss": abs(value - loss) / abs(loss),
            "dx": relative_error(head.x.grad, dx),
            "dW": relative_error(head.weight.grad, dweight),
        }

    def rows(self, folder: str) -> dict[str, Any]:
        """Of the gradients that `error` left."""
        return row_summary(self.head.weight.grad, files(folder, self.case)[1])

    def diagnostics(self) -> dict[str, Any]:
        """What the gradient filter did in one backward; nothing for a contender without one."""
        import cce_inductor

        call, head = with_diagnostics(self.name), self.head
        if call is None:
            return {}
        Head(call, head.x, head.weight, head.target, head.meter).run("gradients")
        head.rest()
        numbers = cce_inductor.diagnostics()
        if not numbers:
            raise RuntimeError("no backward left anything out")
        return numbers[0]


REQUESTS = ("inputs", "warm_up", "timed", "peaks", "once", "error", "rows", "diagnostics")


def handlers(job: dict[str, Any]) -> Handlers:
    """The methods of a `Worker` that can be asked for."""
    worker = Worker(job)
    return {name: getattr(worker, name) for name in REQUESTS}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], handlers))
