"""The pass: a captured graph in, a rewritten copy and a record of every loss out."""

import logging
from collections.abc import Iterable
from dataclasses import replace

from torch.fx import Graph, GraphModule, Node

from ..config import Settings
from ..graph import simplify
from ..graph.hoist import Hoist
from ..graph.refusal import Refusal
from ..graph.regions import checkpointed, copy_graph, differentiated_again
from ..ops.call import Attributes
from ..ops.choice import Chooser
from ..ops.workspace import workspace
from ..ranks import is_distributed
from ..trace.findings import Finding, findings, losses
from ..trace.functions import of_two
from ..trace.interpreter import Interpreter
from ..trace.trace import Decomposition
from ..trace.unnamed import behind_break, unnamed
from . import cleanup, emit, emit_ranking, forward_gradients, groups, reads, sharded_heads, site, split_heads
from .outputs import Deferral, Outputs
from .plan import Plan, make_plans, name_bundles, record
from .result import Rewritten
from .site import Site

log = logging.getLogger(__name__)


class OnOneRankError(RuntimeError):
    """The pass has failed in a graph that other ranks may have rewritten: they would wait for this one."""


def rewrite(
    gm: GraphModule, settings: Settings, version: str, choose: Chooser | None = None, statistics: bool = False
) -> Rewritten:
    """Fuses every loss that can be, and never changes `gm` itself. Raises nothing but OnOneRankError (`faulty`).

    `choose` is asked for the kernel of each head, and may refuse it; without one, the operators run as they are.
    statistics: whether to serve any statistic of the rows, also where the graph has no loss.
    """
    try:
        return _rewrite(gm, settings, version, choose, statistics)
    except Exception as error:
        return faulty(gm, error, settings)


def faulty(gm: GraphModule, error: Exception, settings: Settings) -> Rewritten:
    """What becomes of a graph in which the pass has failed; called where the error is handled.

    A fault of ours must not cost the user the compilation: the graph stays as it was, and the record says why. But a
    head that is spread over ranks has other collectives as it was than fused, and where others have fused it they would
    wait for this one: OnOneRankError.
    """
    if split_heads.has_one(gm) or sharded_heads.is_wanted(gm, settings):
        raise OnOneRankError(
            f"cce_inductor: internal error in the rewrite of a head that is spread over ranks, which others may have "
            f"done; please report it: {error}. Leave such heads alone meanwhile: min_vocab above their number of "
            "classes or, of a sharded head, sharded_head='gather'"
        ) from error
    log.exception("cce_inductor could not rewrite a graph and left it as it was")
    return Rewritten(gm, [_fault(loss, error) for loss in losses(gm.graph)])


def _fault(loss: Node, error: Exception) -> Site:
    refusal = Refusal(loss, f"internal error: {type(error).__name__}: {error}", "please report it")
    return site.make(loss, None, refusal)


def _rewrite(gm: GraphModule, settings: Settings, version: str, choose: Chooser | None, statistics: bool) -> Rewritten:
    """The pass over a graph, and over the regions in it that are checkpointed."""
    # A region is run again for the backward, by PyTorch: what is formed in its forward only must not leave it.
    inside = replace(settings, gradients_in_forward=False, diagnostics=False, defer_logits=False)
    regions = {name: _rewrite(region, inside, version, choose, statistics) for name, region in checkpointed(gm)}
    result = _rewrite_split(gm, settings, version, choose, statistics)
    result = result or _rewrite_sharded(gm, settings, version, choose, statistics)
    sites = [site for region in regions.values() for site in region.sites]
    result.sites[:0] = sites
    result.unnamed += sum(region.unnamed for region in regions.values())
    if any(site.fused for site in sites):
        if result.graph_module is gm:
            result.graph_module = copy_graph(gm)
        for name, region in regions.items():
            setattr(result.graph_module, name, region.graph_module)
    return result


def _rewrite_split(
    gm: GraphModule, settings: Settings, version: str, choose: Chooser | None, statistics: bool
) -> Rewritten | None:
    """The pass over a graph with heads that are split over ranks, if it can be rewritten as if they were not."""
    whole = split_heads.plain(gm, settings.defer_logits) if is_distributed() else None
    if whole is None:
        return None
    # What is kept from the forward, or left out by a bound, is of all classes.
    exact = replace(settings, grad_filter="exact", gradients_in_forward=False, diagnostics=False)
    result = _rewrite_graph(whole.graph_module, exact, version, choose, statistics)
    if not result.fused or not split_heads.localise(result, whole.splits):
        return None
    result.sites = [replace(made, kernel=f"{made.kernel}; split over ranks, exact") for made in result.sites]
    return result


def _rewrite_sharded(
    gm: GraphModule, settings: Settings, version: str, choose: Chooser | None, statistics: bool
) -> Rewritten:
    """The pass over a graph whose heads may be fused without their whole weights; they are gathered if that fails."""
    if not sharded_heads.is_wanted(gm, settings):
        return _rewrite_graph(gm, settings, version, choose, statistics)
    exact = replace(settings, grad_filter="exact", gradients_in_forward=False, diagnostics=False)
    result = _rewrite_graph(gm, exact, version, sharded_heads.alike(choose), statistics)
    reason = sharded_heads.localise(result.graph_module, settings) if result.fused else "its loss is not fused"
    if reason:
        result = _rewrite_graph(gm, settings, version, choose, statistics)
    how = f"its weight is gathered: {reason}" if reason else "sharded over ranks and not gathered, exact"
    result.sites = [replace(made, kernel=f"{made.kernel}; {how}") if made.fused else made for made in result.sites]
    return result


def _rewrite_graph(
    gm: GraphModule, settings: Settings, version: str, choose: Chooser | None, statistics: bool
) -> Rewritten:
    copy = copy_graph(gm)
    graph = copy.graph
    simplify.made_full(graph)
    simplify.kept(graph)
    simplify.broadcast(graph)
    interpreter = Interpreter(graph)
    interpreter.run()
    found = findings(interpreter, settings, statistics)
    dense = {} if statistics else _unnamed(gm, interpreter, found, settings)
    if not found:
        return Rewritten(gm, list(dense.values()), unnamed=len(dense))
    if again := differentiated_again(gm):
        sites = [*_differentiated_again(again, found), *dense.values()]
        return Rewritten(gm, sites, uncompiled=True, unnamed=len(dense))
    hoist = Hoist(graph)
    attributes = Attributes(grad_filter=settings.grad_filter, version=version)
    plans = make_plans(interpreter, found, hoist, settings, choose)
    fused = [plan for plan in plans.values() if plan.refusal is None]
    calls = groups.in_bundles([group for plan in fused for group in plan.groups], hoist)
    # The numbers that diagnostics are made of are a gradient that no loss may scale.
    numbers = settings.diagnostics and settings.grad_filter != "exact"
    early = settings.gradients_in_forward and not numbers
    name_bundles(calls)
    recorded = {f.loss: record(f, plans, calls, settings, attributes, interpreter) for f in found}
    made = dense | {f.loss: _with_reads(recorded[f.loss], f, settings) for f in found}
    sites = [made[node] for node in interpreter.given if node in made]
    if not fused:
        return Rewritten(gm, sites, unnamed=len(dense))
    for call in calls:
        scratch = _with_scratch(attributes, call.first, settings)
        emit.emit(graph, call, scratch, hoist, settings.diagnostics)
    # Behind them: a comparison may be with what they gave.
    for ranks in [ranks for plan in fused for ranks in plan.ranks]:
        emit_ranking.emit(graph, ranks, _with_scratch(attributes, ranks, settings), hoist)
    for trace in [trace for plan in fused for trace in plan.trace.with_parts]:
        cleanup.replace_metadata(graph, trace)
    done = _use_decompositions(interpreter, plans.values(), hoist)
    deferrals, user_outputs = _defer(graph, fused, done, settings)
    served = [*(trace for decomposition in done for trace in decomposition.traces), *(plan.trace for plan in fused)]
    cleanup.erase_dead(graph, served, [r.node for plan in fused for r in plan.trace.reductions])
    interpreter.erase_unused()
    if early and all(p.choice.gradients_in_forward for p in fused if p.groups) and forward_gradients.form(graph):
        sites = [replace(s, kernel=f"{s.kernel}, gradients formed in the forward") if s.fused else s for s in sites]
    if any(node.target is of_two for node in graph.nodes):
        raise AssertionError("a function of two heads was left without an operator; please report this")
    graph.lint()
    copy.recompile()
    return Rewritten(copy, sites, deferrals, user_outputs, unnamed=len(dense))


def _with_scratch(attributes: Attributes, group: groups.Group | groups.RankingGroup, settings: Settings) -> Attributes:
    """The attributes of one call: what it may take depends on where it runs."""
    return replace(attributes, workspace=workspace(settings.workspace_mb, group.value.fake.device))


def _with_reads(made: Site, finding: Finding, settings: Settings) -> Site:
    """The record of a loss with every use of its logits."""
    return replace(made, reads=reads.of(finding.trace, made.fused and settings.defer_logits))


def _differentiated_again(where: str, found: list[Finding]) -> list[Site]:
    reason = f"the loss is differentiated with create_graph=True ({where}): compiled code has no second derivative"
    cure = "compile the model without the penalty, or compute the penalty from another loss"
    return [site.make(f.loss, f.trace.head if f.trace else None, Refusal(f.loss, reason, cure)) for f in found]


def _use_decompositions(interpreter: Interpreter, plans: Iterable[Plan], hoist: Hoist) -> list[Decomposition]:
    """Puts the nodes that others were decomposed into in their places, where all of their heads are fused."""
    refused = {id(plan.trace) for plan in plans if plan.refusal is not None}
    done = [d for d in interpreter.decomposed if not any(id(t) in refused or t.escapes for t in d.traces)]
    for decomposition in done:
        result = decomposition.result  # or what was put in its place, if it is a statistic itself
        decomposition.node.replace_all_uses_with(hoist.replaced.get(result, result))
        interpreter.graph.erase_node(decomposition.node)
    return done


def _defer(
    graph: Graph, fused: list[Plan], done: list[Decomposition], settings: Settings
) -> tuple[list[Deferral], int]:
    """Takes logits out of the outputs, which are read after the losses were replaced: a loss is one of them."""
    outputs = Outputs(graph)
    several = {id(trace): trace for d in done for trace in d.traces if trace.first.members}
    traces = [plan.trace for plan in fused] + list(several.values())
    values = [value for trace in traces for value in trace.outputs] if settings.defer_logits else []
    deferrals = [deferral for value in values for deferral in outputs.defer(value)]
    return deferrals, outputs.finish()


def _unnamed(
    gm: GraphModule, interpreter: Interpreter, findings: list[Finding], settings: Settings
) -> dict[Node, Site]:
    """The losses that no rule has a name for. They are for the record: a fault of ours must not cost a fused loss."""
    try:
        found = unnamed(interpreter, findings, settings)
        made = {
            f.loss: _with_reads(site.make(f.loss, f.trace.head if f.trace else None, f.refusal), f, settings)
            for f in found
        }
        ends = getattr(gm, "compile_subgraph_reason", None)
        behind = behind_break(ends, interpreter, [*findings, *found], settings)
        if behind is not None and behind.trace is not None:
            record = site.make(behind.loss, behind.trace.head, behind.refusal)
            made[behind.loss] = site.moved(record, getattr(ends, "user_stack", ()))
        return made
    except Exception:
        log.exception("cce_inductor could not look for losses that it does not know")
        return {}
