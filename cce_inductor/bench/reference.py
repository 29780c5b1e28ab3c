"""The float64 loss and gradients that every contender is compared with, in a process of its own.

Written independently of the library and in bounded memory: blocks of rows by slabs of columns, once for the
log-sum-exps and once for the gradients, which go straight to files. It runs on the case's device.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..instruments.protocol import main
from .cases import IGNORE_INDEX, Case
from .densities import densities
from .inputs import make_inputs

ROWS, COLUMNS = 1024, 8192


def _file(path: Path, rows: int, columns: int) -> Any:
    """A float64 tensor that lives in a file, made if it is not there."""
    import torch

    tensor = torch.from_file(str(path), shared=True, size=rows * columns, dtype=torch.float64)
    return tensor.view(rows, columns)


def files(folder: str | Path, case: Case) -> tuple[Any, Any]:
    """dx and dW in `folder`."""
    return _file(Path(folder) / "dx", case.n, case.d), _file(Path(folder) / "dweight", case.v, case.d)


def write(x: Any, weight: Any, target: Any, dx: Any, dweight: Any) -> float:
    """Fill `dx` and `dweight` with the gradients of the mean loss over the counted rows, which is returned."""
    import torch

    counted = (target != IGNORE_INDEX).nonzero().flatten()
    hidden, index = x.detach()[counted].double(), target[counted]
    n, v = len(counted), len(weight)
    slabs = [(first, min(first + COLUMNS, v)) for first in range(0, v, COLUMNS)]
    blocks = [slice(first, first + ROWS) for first in range(0, n, ROWS)]

    lse = torch.full((n,), -torch.inf, dtype=torch.float64, device=x.device)
    for first, end in slabs:
        w = weight.detach()[first:end].double()
        for rows in blocks:
            lse[rows] = torch.logaddexp(lse[rows], (hidden[rows] @ w.T).logsumexp(1))

    loss, dhidden = 0.0, torch.zeros_like(hidden)
    for first, end in slabs:
        w = weight.detach()[first:end].double()
        dw = torch.zeros_like(w)
        for rows in blocks:
            z = hidden[rows] @ w.T
            here = ((index[rows] >= first) & (index[rows] < end)).nonzero().flatten()
            column = index[rows][here] - first
            loss += float((lse[rows][here] - z[here, column]).sum())
            dz = z.sub_(lse[rows, None]).exp_()
            dz[here, column] -= 1
            dz /= n
            dhidden[rows] += dz @ w
            dw += dz.T @ hidden[rows]
        dweight[first:end] = dw
    dx.zero_()
    dx[counted.to(dx.device)] = dhidden.to(dx.device)
    return loss / n


def handlers(job: dict[str, Any]) -> dict[str, Any]:
    """`compute` writes the gradients of the job's case into its folder; the loss, and the softmax's densities."""

    def compute() -> dict[str, Any]:
        case = Case(**job["case"])
        x, weight, target = make_inputs(case, job["cache"])
        found = densities(x[target != IGNORE_INDEX], weight)
        return {"loss": write(x, weight, target, *files(job["folder"], case)), "densities": found}

    return {"compute": compute}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], handlers))
