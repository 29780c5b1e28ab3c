"""Every knob of the library, once.

Each knob can be set in three places; the nearest one wins:

1. ``torch.compile(model, backend="cce", options={"min_vocab": 0})``: for one compilation;
2. ``cce_inductor.config.min_vocab = 0`` or ``with cce_inductor.config.patch(min_vocab=0):``: for the process;
3. ``CCE_INDUCTOR_MIN_VOCAB=0`` in the environment: read once, when this module is first imported.

`KNOBS` lists them with their defaults and meaning. An unknown name or an unusable value is an error that says so.
"""

import contextlib
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .filters import Filter

ENV_PREFIX = "CCE_INDUCTOR_"


@dataclass(frozen=True)
class Settings:
    """The value of every knob for one compilation or one direct call."""

    compiler: str = "inductor"
    grad_filter: str = "exact"
    min_vocab: int = 4096
    defer_logits: bool = True
    defer_without_loss: bool = True
    defer_timeout: int = 60
    eager_heads: bool = False
    workspace_mb: int | str | None = None
    gradients_in_forward: bool = True
    sharded_head: str = "gather"
    diagnostics: bool = False
    dump_dir: str | None = None
    strict: bool = False


@dataclass(frozen=True)
class Knob:
    """How one knob is read: `parse` takes a Python value or an environment string and raises ValueError."""

    parse: Callable[[Any], Any]
    doc: str


def _choice(*allowed: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(map(repr, allowed))}")
        return str(value)

    return parse


def _integer(least: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("must be an integer") from None
        if isinstance(value, float) and value != number:
            raise ValueError("must be an integer")
        if number < least:
            raise ValueError(f"must be at least {least}")
        return number

    return parse


def _workspace(value: Any) -> int | str | None:
    if value is None or value == "auto":
        return value
    try:
        return _integer(1)(value)
    except ValueError as error:
        raise ValueError(f"{error}, or 'auto', or None") from None


def _boolean(value: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if isinstance(value, str):
        value = words.get(value.strip().lower(), value)
    if value in (0, 1, True, False):
        return bool(value)
    raise ValueError("must be true or false")


def _path(value: Any) -> str | None:
    if value is None or value == "":
        return None
    try:
        return os.fspath(value)
    except TypeError:
        raise ValueError("must be a path or None") from None


def _filter(value: Any) -> str:
    return str(Filter.of(value))


KNOBS: dict[str, Knob] = {
    "compiler": Knob(
        _choice("inductor", "aot_eager", "eager"),
        "what the rewritten graph is handed to",
    ),
    "grad_filter": Knob(
        _filter,
        "which columns of the softmax the backward computes: 'exact' is all of them; a budget such as 0.002 leaves out "
        "at most that share of a block's gradient; ('unbiased', 0.002) samples what it would leave out; "
        "('eps', 0.0002) and ('eps', 0.0002, 'sorted') leave out tiles without a larger entry; read back as text",
    ),
    "min_vocab": Knob(
        _integer(0),
        "heads with fewer classes are left alone; 0 fuses every size",
    ),
    "defer_logits": Knob(
        _boolean,
        "give back logits that leave the graph as a lazy tensor, computed when somebody looks",
    ),
    "defer_without_loss": Knob(
        _boolean,
        "do so too in a graph without a loss, where there are more than four times as many classes as the hidden "
        "states have columns, and the logits require grad or are larger than 64 MiB: a loss outside of the graph "
        "can then be fused",
    ),
    "defer_timeout": Knob(
        _integer(1),
        "seconds that a rank waits for the others where it reads logits of all of them, of a head that is split over "
        "ranks; then it raises `DeferredLogitsError`",
    ),
    "eager_heads": Knob(
        _boolean,
        "after `enable()` or CCE_INDUCTOR=1: every `nn.Linear` with so many classes that runs eagerly in training "
        "gives lazy logits too. Off, since a program that keeps logits past `optimizer.step()` would then get an error",
    ),
    "workspace_mb": Knob(
        _workspace,
        "MiB of scratch memory besides outputs and the fp32 accumulator of the hidden gradient. None, the default, is "
        "64 on CPUs, and on GPUs 512 or a 128th of the device's memory, whichever is less; 'auto' is as much as the "
        "logits that fusing saves",
    ),
    "gradients_in_forward": Knob(
        _boolean,
        "form the gradients of a loss that is one number, linear in the rows', while the forward has the logits, where "
        "that saves a fifth of the time; "
        "they are then paid for, and held, by every forward under grad mode, backward or not",
    ),
    "sharded_head": Knob(
        _choice("gather", "swap", "stream", "auto"),
        "a head whose weight a graph gathers from the ranks (SimpleFSDP): 'gather' leaves it so, 'swap' has the tokens "
        "travel, 'stream' the shards, one at a time; 'auto' swaps where all ranks' tokens are fewer than the classes",
    ),
    "diagnostics": Knob(
        _boolean,
        "every filtered backward leaves numbers of what it computed and left out: cce_inductor.diagnostics()",
    ),
    "dump_dir": Knob(
        _path,
        "folder for the graph before and after, the sites with their reasons, and the kernels",
    ),
    "strict": Knob(
        _boolean,
        "a loss over a vocabulary that cannot be fused raises instead of running unfused",
    ),
}


def _parse(name: str, value: Any, where: str) -> Any:
    if name not in KNOBS:
        raise ValueError(f"cce_inductor has no option {name!r} ({where}); it has {', '.join(KNOBS)}")
    try:
        return KNOBS[name].parse(value)
    except ValueError as error:
        raise ValueError(f"cce_inductor option {name}={value!r} ({where}) {error}") from None


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The knobs that `environ` sets, parsed. Variables with an unknown suffix are an error: a typo must not pass."""
    found = {}
    for variable, text in environ.items():
        if variable.startswith(ENV_PREFIX):
            found[variable] = _parse(
                variable.removeprefix(ENV_PREFIX).lower(), text, f"environment variable {variable}"
            )
    return {key.removeprefix(ENV_PREFIX).lower(): value for key, value in found.items()}


def current() -> Settings:
    """The process-wide settings: defaults, then the environment, then what was assigned to this module."""
    return Settings(**_values)


def split_options(options: Mapping[str, Any] | None) -> tuple[Settings, dict[str, Any]]:
    """Splits ``torch.compile``'s `options` into our settings and what goes on to Inductor unchanged."""
    options = dict(options or {})
    ours = {name: _parse(name, options.pop(name), "options=") for name in list(options) if name in KNOBS}
    return Settings(**{**_values, **ours}), options


@contextlib.contextmanager
def patch(**values: Any) -> Iterator[None]:
    """Sets knobs for the time of a ``with`` block."""
    before = dict(_values)
    try:
        for name, value in values.items():
            _values[name] = _parse(name, value, "config.patch")
        yield
    finally:
        _values.clear()
        _values.update(before)


class _ConfigModule(types.ModuleType):
    """Lets ``cce_inductor.config.<knob>`` be read and assigned, and refuses names that are no knob."""

    def __getattr__(self, name: str) -> Any:
        if name in _values:
            return _values[name]
        raise AttributeError(f"cce_inductor.config has no knob {name!r}; it has {', '.join(KNOBS)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):
            super().__setattr__(name, value)
        else:
            _values[name] = _parse(name, value, "cce_inductor.config")


_values: dict[str, Any] = {**asdict(Settings()), **from_environment(os.environ)}
sys.modules[__name__].__class__ = _ConfigModule
