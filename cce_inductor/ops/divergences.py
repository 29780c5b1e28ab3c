"""Divergences of two heads that do not stream: a row's value needs the normalised logits of both, entry by entry.

Notation: p and q are the softmaxes of the first head's logits and of the other one's, `m = (1 - w) p + w q` their
mixture. A divergence is the sum over the classes of a function f(log p, log q), which is all that is written of it: its
derivatives are PyTorch's. With `f_p = df / d log p` and S_p the sum of f_p over the classes,

    d value / d z_j = f_p(j) - p_j S_p          z: the logits of the first head; those of the other one likewise

The sums of f, f_p and f_q are known only after both log-sum-exps. So logits are read twice, and kept for that where
those of a chunk of rows of both heads fit in the workspace.

| name           | f                                     |
|----------------|---------------------------------------|
| jensen_shannon | (1 - w) p log(p / m) + w q log(q / m) |
| skew           | p log(p / m)                          |
| mixture        | -p log m                              |

With `other_` in front of its name, p and q change places: ``other_skew(0.1)`` is `q log(q / (0.9 q + 0.1 p))`.
Jensen-Shannon: Lin, 1991; with any w as in arXiv 2306.13649. Skew: Lee, 2001; arXiv 2402.03898.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

# What a statistic of a divergence is, by what stands behind its name: f summed, f_p, f_q.
VALUE, OWN, OTHER = "", ".own", ".other"
PARTS = (VALUE, OWN, OTHER)
# Logarithms of probabilities are taken for this where they are less: their differences have exponentials in fp32. What
# is a function of them must not count such probabilities.
LEAST = -80.0


_tracing = threading.local()


def held(x: Tensor) -> Tensor:
    """x, as a constant where first derivatives are traced: for what all derivatives through x add up to 0 of.

    They would be nothing but rounding.
    """
    return x.detach() if getattr(_tracing, "on", False) else x


def _log_ratio(d: Tensor, w: float) -> Tensor:
    """log(m / p), of d = log(q / p). With all digits where p and q are close, and 0 where they are equal."""
    return torch.log1p(w * torch.expm1(d))


def jensen_shannon(log_p: Tensor, log_q: Tensor, w: float) -> Tensor:
    d = log_q - log_p
    to_p = _log_ratio(d, w)
    return -((1 - w) * log_p.exp() * held(to_p) + w * log_q.exp() * held(to_p - d))


def skew(log_p: Tensor, log_q: Tensor, w: float) -> Tensor:
    return -log_p.exp() * _log_ratio(log_q - log_p, w)


def mixture(log_p: Tensor, log_q: Tensor, w: float) -> Tensor:
    return -log_p.exp() * (log_p + _log_ratio(log_q - log_p, w))


# (log_p, log_q, *parameters), all tensors of one shape, to f.
TABLE: dict[str, Callable[..., Tensor]] = {
    "jensen_shannon": jensen_shannon,
    "skew": skew,
    "mixture": mixture,
}
_EXCHANGED = "other_"


@dataclass(frozen=True)
class Divergence:
    """A row of the table, with numbers for its parameters. As text: ``jensen_shannon(0.5)``.

    exchanged: whether p and q change places.
    """

    name: str
    parameters: tuple[float, ...]
    exchanged: bool = False

    def __str__(self) -> str:
        return f"{_EXCHANGED * self.exchanged}{self.name}({','.join(map(repr, self.parameters))})"

    @staticmethod
    def read(text: str) -> "Divergence | None":
        """From its text; None if it is none of the table."""
        name, bracket, rest = text.removeprefix(_EXCHANGED).partition("(")
        if name not in TABLE or not bracket or not rest.endswith(")"):
            return None
        parameters = tuple(float(number) for number in rest[:-1].split(",") if number)
        return Divergence(name, parameters, text.startswith(_EXCHANGED))

    def of(self, first: bool) -> "Divergence":
        """The same of the heads in this order, or in the other one."""
        return self if first else replace(self, exchanged=not self.exchanged)

    def entries(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """f, entry by entry."""
        p, q = (log_q, log_p) if self.exchanged else (log_p, log_q)
        return TABLE[self.name](p, q, *self.parameters)

    def parts(self, log_p: Tensor, log_q: Tensor, wanted: Sequence[str]) -> list[Tensor]:
        """Those of f, f_p and f_q that are wanted, entry by entry. No logarithm may be less than `LEAST`."""
        return traced(self, tuple(wanted))(log_p, log_q)


@functools.cache
def traced(divergence: Divergence, wanted: tuple[str, ...]) -> GraphModule:
    """(log_p, log_q) to the parts that are wanted, as a graph of ATen operators on tensors of any one shape."""

    def every(log_p: Tensor, log_q: Tensor) -> list[Tensor]:
        _tracing.on = True
        value, back, *_ = torch.func.vjp(divergence.entries, log_p, log_q)
        found = dict(zip(PARTS, (value, *back(torch.ones_like(value))), strict=True))
        return [found[part] for part in wanted]

    # In a thread of its own, where no mode and no dispatch key of the caller's is in force.
    with ThreadPoolExecutor(1) as thread:
        graph = thread.submit(lambda: make_fx(every)(torch.zeros(2), torch.ones(2))).result()
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
