"""The torch.compile backend: rewrite the captured graph, hand it on, make the deferred outputs lazy."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import RestartAnalysis
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from . import compat, config, eager_heads, notice, record, version
from .config import Settings
from .deferred import aliases, other_graphs, wrap
from .deferred.eager_calls import EagerCalls
from .deferred.often import Kernels
from .deferred.other_graphs import Form
from .eager_heads import defer_head as defer_head
from .lowering import register as lowering
from .lowering.choose import choose
from .ops import gemm, library, ranking, with_gradients  # noqa: F401 - they register the operators
from .ops.choice import Chooser
from .record import DeclinedError as DeclinedError
from .rewrite.result import Rewritten
from .rewrite.run import OnOneRankError, faulty, rewrite
from .rewrite.site import Site
from .rewrite.without_loss import defer_heads

log = logging.getLogger(__name__)

COUNTERS = "cce_inductor"
_MARK = "cce_inductor_rewritten"


def cce_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Callable:
    """``torch.compile(model, backend=cce_backend)``: Inductor, with losses over a vocabulary fused with their heads.

    `options` may hold every knob of `cce_inductor.config`; other options and `mode` go to Inductor unchanged.
    """
    settings, rest = config.split_options(options)
    return compile_graph(gm, example_inputs, settings, _compiler(settings, mode, {**rest, **kwargs}))


def _compiler(settings: Settings, mode: str | None, options: Mapping[str, Any]) -> Callable:
    if settings.compiler == "inductor":
        return compat.inductor_wrapper(mode, options)
    return compat.named_backend(settings.compiler)


def compile_graph(gm: GraphModule, example_inputs: Sequence[Any], settings: Settings, compiler: Callable) -> Callable:
    """Rewrites `gm` for the compiler of `settings`, and compiles the result with ``compiler(gm, example_inputs)``."""
    if gm.meta.get(_MARK):
        return compiler(gm, example_inputs)
    rest, views = aliases.without_views(gm, settings.min_vocab)
    compiled = _compile(rest, example_inputs, settings, compiler)
    return compiled if views is None else views.put_back(compiled)


def _compile(gm: GraphModule, example_inputs: Sequence[Any], settings: Settings, compiler: Callable) -> Callable:
    lowered = settings.compiler == "inductor"
    try:
        if lowered:
            lowering.register()
        form, result = _settle(other_graphs.forms(gm, example_inputs), settings, choose if lowered else None)
    except (DeclinedError, OnOneRankError):
        raise
    except Exception as error:  # a private name of PyTorch's that is gone, for one
        form, result = Form(gm, list(example_inputs)), faulty(gm, error, settings)
        _record(form, result, settings)
    # compile_fx calls itself, and enable() wraps it: the mark keeps the pass from running twice on one graph.
    # The parts of a graph that DDPOptimizer has cut share one `meta`.
    result.graph_module.meta = {**result.graph_module.meta, _MARK: True}
    as_it_is = form.as_it_is or result.uncompiled or not compat.outputs(result.graph_module)
    try:
        compiled = _as_it_is(result.graph_module) if as_it_is else compiler(result.graph_module, form.inputs)
    except RestartAnalysis:  # Dynamo traces the program again, with a number that it has taken for an input
        _forget(result)
        raise
    if result.deferrals:
        compiled = wrap.with_deferred(compiled, result, eager_calls(settings), settings.defer_timeout)
    if form.inlined or form.read or form.unused:
        compiled = wrap.with_logits(compiled, form, gm)
    # The parts of a graph that DDPOptimizer has cut are compiled before anybody knows what the others return.
    return wrap.computed_on_entry(compiled) if compat.is_part_of_a_graph() else compiled


def _as_it_is(gm: GraphModule) -> Callable:
    """A graph run by PyTorch in eager mode. An error in it must not leave the grad mode that it was in."""

    def run(*args: Any) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return gm.forward(*args)

    return run


def _settle(forms: Iterable[Form], settings: Settings, choose: Chooser | None) -> tuple[Form, Rewritten]:
    """Rewrites a graph in the first of its forms that takes it, and keeps the record of what became of its losses."""
    unfused = None
    for form in forms:
        result = rewrite(form.graph_module, settings, version.source_hash(), choose)
        if len(result.sites) == result.unnamed:
            # Heads beside a loss that cannot be fused may still be deferred.
            result = replace(defer_heads(form.graph_module, settings), sites=result.sites)
        if form.accepts(result):
            break
        unfused = unfused or [_left(site) for site in result.sites]
    result.sites = result.sites if unfused is None else unfused
    _record(form, result, settings)
    return form, result


def _settle_statistic(form: Form, settings: Settings) -> Rewritten:
    """Rewrites the graph of one statistic: no loss, so the record and ``strict`` have nothing to say about it."""
    result = rewrite(form.graph_module, settings, version.source_hash(), statistics=True)
    if form.accepts(result):
        counters[COUNTERS]["statistics"] += 1
        notice.saw_statistic()
    return result


def _record(form: Form, result: Rewritten, settings: Settings) -> None:
    """Counts and records what became of a graph's losses; under ``strict``, one that was not fused is an error."""
    declined = [site for site in result.sites if not site.fused]
    _count(result, 1)
    record.record(form.graph_module, result, settings)
    if settings.strict and declined:
        raise DeclinedError("cce_inductor, with strict=True:\n" + "\n".join(str(site) for site in declined))


def _forget(result: Rewritten) -> None:
    """Takes the graph that was recorded last back: it is not the one that will run."""
    _count(result, -1)
    record.forget()


def _count(result: Rewritten, times: int) -> None:
    ours = counters[COUNTERS]
    ours["fused"] += times * result.fused
    ours["declined"] += times * sum(not site.fused for site in result.sites)
    ours["deferred"] += times * len(result.deferrals)


def _left(site: Site) -> Site:
    """The record of a loss in a form of its graph that was not taken."""
    if not site.fused:
        return site
    reason = "its logits come from another graph, and this one needs them for something else as well"
    return replace(site, fused=False, reason=reason, cure="compute it behind the loss", kernel="", deferred=0)


def eager_calls(settings: Settings) -> EagerCalls:
    """What computes losses and statistics that are called eagerly: the operators' eager implementation, or kernels."""
    return EagerCalls(
        lambda form: _settle([form], settings, None)[1],
        lambda form: _settle_statistic(form, settings),
        Kernels(lambda form: rewrite(form.graph_module, settings, version.source_hash(), choose), _compile_call)
        if settings.compiler == "inductor"
        else None,
    )


def _compile_call(gm: GraphModule, inputs: Sequence[Tensor]) -> Callable:
    """Compiles what the pass has made of an eager call, which is in the record already."""
    gm.meta[_MARK] = True
    compiled = compat.inductor_wrapper(None, {})(gm, inputs)
    counters[COUNTERS]["calls_compiled"] += 1
    return compiled


def _reset() -> None:
    """What torch._dynamo.reset() asks of a backend: drop the CUDA graphs that Inductor recorded."""
    compat.inductor_wrapper(None, {}).reset()


cce_backend.reset = _reset  # type: ignore[attr-defined]
cce_backend.settings_of = lambda kwargs: config.split_options(kwargs.get("options"))[0]  # type: ignore[attr-defined]
eager_heads.BACKEND.calls, eager_heads.BACKEND.compile = eager_calls, cce_backend


# For functions that Dynamo leaves to Python, once it has tried to trace something.
compat.on_compile_start(eager_heads.enable)


@compat.on_compile_start
def _keep_loss_and_head_together() -> None:
    """Hugging Face logs a warning between logits and loss for models without a loss of their own (GPT-2 among them).

    Dynamo would break the graph there. The method exists once transformers is imported, so it is looked for at every
    compilation.
    """
    warning_once = compat.transformers_warning_once()
    if warning_once is not None:
        compat.ignore_logging_function(warning_once)
