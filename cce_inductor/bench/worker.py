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


def handlers(job: dict[str, Any]) -> Handlers:
    """`inputs` first, then `warm_up` or `once`, then anything."""
    importlib.import_module("torch")  # takes seconds, in which an earlier contender compiles
    case, name = Case(**job["case"]), job["contender"]
    made: list[Head] = []

    def inputs() -> dict[str, Any]:
        made.append(Head(build(name, case), *make_inputs(case, job["cache"]), METERS[case.device]()))
        made[0].rest()
        return {}

    def warm_up() -> dict[str, Any]:
        """Compile and run everything once."""
        start = time.perf_counter()
        for mode in MODES:
            made[0].timed(mode)
        return {"seconds": time.perf_counter() - start, "note": KNOWN[name].note()}

    def timed(mode: str) -> dict[str, Any]:
        return {"seconds": made[0].timed(mode)}

    def peaks() -> dict[str, Any]:
        found = {}
        for mode in MODES:
            found[mode] = made[0].peak(mode)["above"]
            made[0].rest()
        return found

    def once() -> dict[str, Any]:
        """Loss and gradients without a warm-up: time and memory with all that compilation takes."""
        return made[0].peak("gradients") | {"note": KNOWN[name].note()}

    def error(folder: str, loss: float) -> dict[str, Any]:
        head = made[0]
        head.rest()
        value = float(head.gradients())
        dx, dweight = files(folder, case)
        return {
            "loss": abs(value - loss) / abs(loss),
            "dx": relative_error(head.x.grad, dx),
            "dW": relative_error(head.weight.grad, dweight),
        }

    def rows(folder: str) -> dict[str, Any]:
        """Of the gradients that `error` left."""
        return row_summary(made[0].weight.grad, files(folder, case)[1])

    def diagnostics() -> dict[str, Any]:
        """What the gradient filter did in one backward; nothing for a contender without one."""
        import cce_inductor

        call = with_diagnostics(name)
        if call is None:
            return {}
        Head(call, made[0].x, made[0].weight, made[0].target, made[0].meter).run("gradients")
        made[0].rest()
        numbers = cce_inductor.diagnostics()
        if not numbers:
            raise RuntimeError("no backward left anything out")
        return numbers[0]

    return {
        "inputs": inputs,
        "warm_up": warm_up,
        "timed": timed,
        "peaks": peaks,
        "once": once,
        "error": error,
        "rows": rows,
        "diagnostics": diagnostics,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], handlers))
