"""The table of row statistics: what a loss may ask of the logits, and what each costs in the backward.

Notation, here and in every kernel: `z` are the logits of one row, `p = exp(z - lse)` its softmax, `t` its target
class, `c` a weight per column. Each statistic is a function of one row of `z`, so a matrix of logits is reduced to
vectors of length N (entry_logits: to K numbers a row, (N, K)), and the gradient of any loss over them is
`dz_j = sum over statistics of tangent * d statistic / d z_j`.

| statistic    | value             | d / d z_j                      | kind    | filter          |
|--------------|-------------------|--------------------------------|---------|-----------------|
| lse          | log sum_j exp z_j | p_j                            | dense   | yes             |
| lse_low      | what rounding left of lse | none                   | none    | yes             |
| lse_rest     | log sum_{j in R} exp z_j | exp(z_j - lse_rest), 0 elsewhere | dense | no     |
| lse_rest_low | what rounding left of lse_rest | none              | none    | no              |
| target_logit | z_t               | 1 at j = t                     | sparse  | yes             |
| entry_logits | z_e of K classes e | 1 at j = e                    | sparse  | yes             |
| logit_sum    | sum_j c_j z_j     | c_j                            | linear  | without softcap |
| entropy      | lse - sum_j p_j z_j | -p_j (z_j - lse + entropy)   | signed  | no              |
| argmax       | argmax_j z_j      | none                           | none    | yes             |

A second head over the same classes, the *other* one, has logits `r` in the same rows, with the softmax `q`:

| statistic           | value                         | weighs | averages |
|---------------------|-------------------------------|--------|----------|
| other_lse           | log sum_j exp r_j             |        |          |
| other_lse_low       | what rounding left of it      |        |          |
| expected_other      | sum_j p_j r_j                 | z      | r        |
| cross_entropy       | -sum_j q_j log p_j            | r      | z        |
| other_cross_entropy | -sum_j p_j log q_j            | z      | r        |
| divergence          | sum_j q_j (log q_j - log p_j) | r      | z        |
| other_divergence    | sum_j p_j (log p_j - log q_j) | z      | r        |

Their derivatives, with respect to both, are in pairs.py. None allows a filter. Nor do the divergences of
divergences.py, which are named with their parameters, ``jensen_shannon(0.5)``, and need both log-sum-exps before they
are summed. Besides the value of a row, ``jensen_shannon(0.5).own`` and ``.other`` are the sums that its derivatives
need, and have none themselves.

"linear" is rank-1 without a softcap and dense with one. "filter" says whether a backward may leave out columns of small
probability mass where the statistic is asked for (docs/design.md): the bound is one of the dense part of lse, the
sparse part is never dropped, a rank-1 part is formed exactly beside it, and for the others no bound is proved.

Where all logits are large, lse has few digits behind the point. `lse + lse_low` has them: `(z_t - lse) + lse_low` is as
exact as `log_softmax`, which subtracts the maximum first. It is 0 where lse is not finite. See `with_all_digits` for
the gradient.

R are all classes but the target and, where the operands row_label and class_label are given, those whose label is the
row's. They are left out while the others are summed: taken out of the whole sum, the target would leave nothing but
rounding where it holds nearly all mass. No call has lse and lse_rest (`call.check`): in the kernels they are one sum.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from . import pairs
from .divergences import PARTS, VALUE, Divergence
from .pairs import Function, Running, RunningPair, shift

Kind = Literal["dense", "sparse", "linear", "signed", "none"]
Filtered = Literal["yes", "without softcap", "no"]


# What the derivatives of a function of two heads are made of, besides its value.
LSE_OF_BOTH = ("lse", "lse_low", "other_lse", "other_lse_low")


@dataclass
class Tile:
    """One tile of logits in accumulation dtype: rows of a block, columns `start : start + z.shape[1]`."""

    z: Tensor  # (rows, columns)
    start: int
    target: Tensor | None  # (rows,) class indices over the whole vocabulary
    column_weight: Tensor | None  # (columns,)
    entries: Tensor | None = None  # (rows, K) class indices over the whole vocabulary
    other: Tensor | None = None  # (rows, columns), the other head's logits
    same_label: Tensor | None = None  # (rows, columns), bool: classes that lse_rest leaves out besides the target

    def position(self, classes: Tensor | None) -> tuple[Tensor, Tensor]:
        """For each class, whether it lies in this tile, and its column in the tile (0 where it does not)."""
        assert classes is not None
        column = classes - self.start
        inside = (column >= 0) & (column < self.z.shape[1])
        return inside, torch.where(inside, column, 0)

    def target_position(self) -> tuple[Tensor, Tensor]:
        """`position` of the target of each row."""
        return self.position(self.target)


@dataclass
class RunningExp(Running):
    """The online log-sum-exp, and beside it the sum of z weighted by exp z."""

    weighted: Tensor | None  # sum (z - maximum) exp(z - maximum)


@dataclass(frozen=True)
class Statistic:
    """One row of the table. The three functions define it for the eager reference.

    `update(state, tile)` folds one tile into the state (None at first), `finish(state)` gives the result, (rows,) or of
    entry_logits (rows, K), and
    `add_gradient(dz, tile, tangent, saved)` gives `dz` plus tangent * d statistic / d z of one tile, in place; `dz` is
    None at first. `saved` holds the finished statistics of the rows and, where a dense statistic needs them, the
    tile's "log_p" and its softmax "p". Gradients are added in the order of the table.
    """

    name: str
    kind: Kind
    filtered: Filtered
    update: Callable[[Any, Tile], Any]
    finish: Callable[[Any], Tensor]
    add_gradient: Callable[[Tensor | None, Tile, Tensor, dict[str, Tensor]], Tensor] | None
    requires: tuple[str, ...] = ()  # operands and statistics that must be there as well
    integer: bool = False
    state_of: str = ""  # the statistic whose state `finish` is given, where it has none of its own
    pair: tuple[Function, bool] | None = None  # of two heads: which function, and whether the other head weighs
    divergence: Divergence | None = None  # of two heads, from their normalised logits
    part: str = VALUE  # of the divergence

    @property
    def differentiable(self) -> bool:
        return self.add_gradient is not None or self.pair is not None or self.has_divergence

    @property
    def has_divergence(self) -> bool:
        """Whether it is the value of a divergence."""
        return self.divergence is not None and self.part == VALUE

    @property
    def of_both(self) -> bool:
        """Whether it has a gradient for both heads."""
        return self.pair is not None or self.has_divergence

    def allows_filter(self, softcap: float) -> bool:
        """Whether a backward may leave out columns where this is asked for; `softcap` is 0.0 for none."""
        return self.filtered == "yes" or (self.filtered == "without softcap" and not softcap)

    @property
    def uses_softmax(self) -> bool:
        return self.kind in ("dense", "signed")


def _update_exp(state: RunningExp | None, tile: Tile, weighted: bool) -> RunningExp:
    z = tile.z
    maximum = z.amax(1) if state is None else torch.maximum(state.maximum, z.amax(1))
    below = z - shift(maximum)[:, None]
    exp = below.exp() if weighted else below.exp_()
    total = exp.sum(1)
    # z exp z tends to 0 where z is -inf; 0 * -inf would be NaN.
    product = exp.mul_(below).masked_fill_(z == -torch.inf, 0).sum(1) if weighted else None
    if state is not None:
        change = state.shift - shift(maximum)
        rescale = state.rescale(shift(maximum))
        total += state.total * rescale
        if product is not None and state.weighted is not None:
            product += (state.weighted + change * state.total) * rescale
    return RunningExp(maximum, total, product)


def finish_lse(state: RunningExp) -> Tensor:
    return state.total.log() + state.shift


def _finish_lse_low(state: RunningExp) -> Tensor:
    """What is left of the sum in `finish_lse` (Knuth's TwoSum)."""
    log, largest = state.total.log(), state.shift
    lse = log + largest
    of_largest = lse - log
    low = (log - (lse - of_largest)) + (largest - of_largest)
    return torch.where(lse.isfinite(), low, 0)


def _update_rest(state: RunningExp | None, tile: Tile) -> RunningExp:
    return _update_exp(state, replace(tile, z=fill_left_out(tile, tile.z.clone(), -torch.inf)), False)


def fill_left_out(tile: Tile, of: Tensor, number: float) -> Tensor:
    """`of`, (rows, columns), with a number in place of what lse_rest leaves out, in place."""
    inside, column = tile.target_position()
    own = torch.where(inside, number, of.gather(1, column[:, None])[:, 0])
    of.scatter_(1, column[:, None], own[:, None])
    return of if tile.same_label is None else of.masked_fill_(tile.same_label, number)


def _finish_entropy(state: RunningExp) -> Tensor:
    assert state.weighted is not None
    return state.total.log() - state.weighted / state.total


def _update_target(state: Tensor | None, tile: Tile) -> Tensor:
    inside, column = tile.target_position()
    value = torch.where(inside, tile.z.gather(1, column[:, None])[:, 0], 0)
    return value if state is None else state + value


def _update_entries(state: Tensor | None, tile: Tile) -> Tensor:
    inside, column = tile.position(tile.entries)
    value = torch.where(inside, tile.z.gather(1, column), 0)
    return value if state is None else state + value


def _update_sum(state: Tensor | None, tile: Tile) -> Tensor:
    value = tile.z.sum(1) if tile.column_weight is None else tile.z @ tile.column_weight
    return value if state is None else state + value


def _update_argmax(state: tuple[Tensor, Tensor] | None, tile: Tile) -> tuple[Tensor, Tensor]:
    value, column = tile.z.max(1)
    column += tile.start
    if state is None:
        return value, column
    # As torch.argmax: the first of equal values, and NaN above everything.
    better = (value > state[0]) | (value.isnan() & ~state[0].isnan())
    return torch.where(better, value, state[0]), torch.where(better, column, state[1])


def _add(dz: Tensor | None, term: Tensor, tangent: Tensor) -> Tensor:
    """dz + tangent * term, in place of `dz`, or of `term` where there is no `dz` yet."""
    return term.mul_(tangent[:, None]) if dz is None else dz.addcmul_(term, tangent[:, None])


def _grad_entropy(dz: Tensor | None, tile: Tile, tangent: Tensor, saved: dict[str, Tensor]) -> Tensor:
    p, log_p = saved["p"], saved["log_p"]
    # p log p tends to 0 where log p is -inf; 0 * -inf would be NaN.
    term = torch.add(log_p, saved["entropy"][:, None]).mul_(p).masked_fill_(p == 0, 0)
    return _add(dz, term, -tangent)


def _grad_lse(dz: Tensor | None, tile: Tile, tangent: Tensor, saved: dict[str, Tensor]) -> Tensor:
    return _add(dz, saved["p"], tangent)


def _grad_sum(dz: Tensor | None, tile: Tile, tangent: Tensor, saved: dict[str, Tensor]) -> Tensor:
    dz = torch.zeros_like(tile.z) if dz is None else dz
    if tile.column_weight is None:
        return dz.add_(tangent[:, None])
    return dz.addcmul_(tangent[:, None], tile.column_weight)


def _grad_target(dz: Tensor | None, tile: Tile, tangent: Tensor, saved: dict[str, Tensor]) -> Tensor:
    dz = torch.zeros_like(tile.z) if dz is None else dz
    inside, column = tile.target_position()
    return dz.scatter_add_(1, column[:, None], torch.where(inside, tangent, 0)[:, None])


def _update_other(state: RunningExp | None, tile: Tile) -> RunningExp:
    assert tile.other is not None
    return _update_exp(state, replace(tile, z=tile.other), False)


def _of_two(name: str, function: Function, by_other: bool, requires: tuple[str, ...] = LSE_OF_BOTH) -> Statistic:
    """A row of the table for a function of two heads. by_other: the other head's softmax weighs this one's logits."""

    def update(state: RunningPair | None, tile: Tile) -> RunningPair:
        assert tile.other is not None
        a, b = (tile.z, tile.other) if by_other else (tile.other, tile.z)
        return pairs.update(state, a, b, function)

    def finish(state: RunningPair) -> Tensor:
        return pairs.finish(state, function)

    return Statistic(name, "signed", "no", update, finish, None, ("other_input", *requires), pair=(function, by_other))


def _grad_entries(dz: Tensor | None, tile: Tile, tangent: Tensor, saved: dict[str, Tensor]) -> Tensor:
    dz = torch.zeros_like(tile.z) if dz is None else dz
    inside, column = tile.position(tile.entries)
    values = torch.where(inside, tangent, 0)
    if dz.device.type == "cpu":
        return dz.scatter_add_(1, column, values)
    rows = torch.arange(dz.shape[0], device=dz.device)[:, None].expand_as(column)
    return dz.index_put_((rows, column), values, accumulate=True)  # sorts, where scatter_add_ would use atomics


def _identity(state: Tensor) -> Tensor:
    return state


def _nothing(state: Any, tile: Tile) -> Any:
    return state


@functools.cache
def _of_divergence(divergence: Divergence, part: str) -> Statistic:
    """A part of a divergence."""
    beside = LSE_OF_BOTH if part else (*LSE_OF_BOTH, *(f"{divergence}{other}" for other in PARTS if other))
    requires = ("other_input", *beside)
    name = f"{divergence}{part}"
    return Statistic(name, "signed", "no", _nothing, _identity, None, requires, divergence=divergence, part=part)


class _Table(dict[str, Statistic]):
    """The statistics by name; those of a divergence are made where they are asked for."""

    def __missing__(self, name: str) -> Statistic:
        text, part = next(((name[: len(name) - len(p)], p) for p in PARTS[1:] if name.endswith(p)), (name, VALUE))
        divergence = Divergence.read(text)
        if divergence is None:
            raise KeyError(name)
        return _of_divergence(divergence, part)


def known(name: str) -> bool:
    """Whether there is a statistic of that name."""
    try:
        return TABLE[name] is not None
    except KeyError:
        return False


def in_order(names: Iterable[str], order: Iterable[str] = ()) -> list[str]:
    """Each name once, in an order, by default that of the table, and divergences, which it does not have, behind."""
    given, order = {*names}, tuple(order or TABLE)
    return [name for name in order if name in given] + sorted(given.difference(order))


TABLE = _Table(
    (s.name, s)
    for s in (
        # entropy stands before lse: the gradient of lse may be written over p.
        Statistic(
            "entropy", "signed", "no", lambda s, t: _update_exp(s, t, True), _finish_entropy, _grad_entropy, ("lse",)
        ),
        Statistic("lse", "dense", "yes", lambda s, t: _update_exp(s, t, False), finish_lse, _grad_lse),
        Statistic("lse_low", "none", "yes", lambda s, t: s, _finish_lse_low, None, ("lse",), state_of="lse"),
        Statistic("lse_rest", "dense", "no", _update_rest, finish_lse, _grad_lse, ("target_logit",)),
        Statistic(
            "lse_rest_low", "none", "no", lambda s, t: s, _finish_lse_low, None, ("lse_rest",), state_of="lse_rest"
        ),
        Statistic("logit_sum", "linear", "without softcap", _update_sum, _identity, _grad_sum),
        Statistic("target_logit", "sparse", "yes", _update_target, _identity, _grad_target, ("target",)),
        Statistic("entry_logits", "sparse", "yes", _update_entries, _identity, _grad_entries, ("entries",)),
        Statistic("argmax", "none", "yes", _update_argmax, lambda s: s[1], None, integer=True),
        Statistic("other_lse", "none", "no", _update_other, finish_lse, None, ("other_input",)),
        Statistic(
            "other_lse_low", "none", "no", lambda s, t: s, _finish_lse_low, None, ("other_lse",), state_of="other_lse"
        ),
        _of_two("expected_other", "expected", by_other=False, requires=("lse", "lse_low")),
        _of_two("cross_entropy", "cross_entropy", by_other=True),
        _of_two("other_cross_entropy", "cross_entropy", by_other=False),
        _of_two("divergence", "divergence", by_other=True),
        _of_two("other_divergence", "divergence", by_other=False),
    )
)
# Those of two heads that stream.
PAIRS = [name for name, row in TABLE.items() if row.pair]


def update_all(rows: list[Statistic], states: dict[str, Any], tile: Tile) -> None:
    """Folds one tile into the states of the statistics, by name: {} at first."""
    for row in rows:
        if not row.state_of:
            states[row.name] = row.update(states.get(row.name), tile)


def finish_all(rows: list[Statistic], states: dict[str, Any]) -> list[Tensor]:
    """The statistics of the rows whose tiles were folded into `states`."""
    return [row.finish(states.get(row.state_of or row.name)) for row in rows]


def with_all_digits(tangents: dict[str, Any], saved: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tangents and saved statistics, with what lse_low corrects of the gradient put into them.

    A backward takes exp(z - lse) for p, which is off by the factor exp(lse_low), the same for a whole row. What that
    does to the gradient of a softmax is worse: it no longer adds up to 0, and a component that the rows of the weight
    have in common stays in dx. The factor is taken out of the tangents instead, and lse_low out of the entropy, as it
    would have to be in p (z - lse - lse_low + entropy).
    """
    low = saved.get("lse_low", saved.get("lse_rest_low"))
    # With two heads p and q have a correction each: it is made in their logarithms.
    if low is None or any(TABLE[name].of_both for name in tangents):
        return tangents, saved
    tangents = {name: t * (-low).exp() if TABLE[name].uses_softmax else t for name, t in tangents.items()}
    if "entropy" in tangents:
        saved = saved | {"entropy": saved["entropy"] - low}
    return tangents, saved


def parse(names: str) -> list[Statistic]:
    """The rows of the table that an operator's `statistics` argument names, separated by blanks."""
    unknown = [name for name in names.split() if not known(name)]
    if unknown or not names.split():
        raise ValueError(f"statistics {names!r}: expected names out of {', '.join(TABLE)}, separated by blanks")
    return [TABLE[name] for name in names.split()]
