"""The pass: a captured graph in, a rewritten copy and a record of every loss out."""

import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Graph, GraphModule, Node

from .. import compat
from ..config import Settings
from ..ops.call import Attributes
from ..ops.choice import Choice, Chooser, Problem
from ..ops.filters import Filter
from . import emit, emit_ranking, site
from .defer import Deferral, Outputs
from .heads import subclassed
from .hoist import Hoist
from .readings import Loss
from .site import Site
from .trace import Finding, Interpreter, Trace, WrittenOut, losses, written_between
from .unnamed import behind_break, unnamed
from .values import Head, Refusal, Refused, fake

log = logging.getLogger(__name__)


@dataclass
class Rewritten:
    """The result of the pass. `graph_module` is the original one where nothing was fused.

    uncompiled: the program differentiates the graph twice, which no compiled graph can be: it has to run as it is.
    unnamed: how many of the sites are losses that no rule has a name for.
    """

    graph_module: GraphModule
    sites: list[Site]
    deferrals: list[Deferral] = field(default_factory=list)
    user_outputs: int = 0
    uncompiled: bool = False
    unnamed: int = 0

    @property
    def fused(self) -> int:
        return sum(s.fused for s in self.sites)


def rewrite(
    gm: GraphModule, settings: Settings, version: str, choose: Chooser | None = None, statistics: bool = False
) -> Rewritten:
    """Fuses every loss that can be; never raises for a graph it cannot take, and never changes `gm` itself.

    `choose` is asked for the kernel of each head, and may refuse it; without one, the operators run as they are.
    statistics: whether to serve any statistic of the rows, also where the graph has no loss.
    """
    try:
        return _rewrite(gm, settings, version, choose, statistics)
    except Exception as error:
        return faulty(gm, error)


def faulty(gm: GraphModule, error: Exception) -> Rewritten:
    """What becomes of a graph in which the pass has failed; called where the error is handled.

    A fault of ours must not cost the user the compilation: the graph stays as it was, and the record says why.
    """
    log.exception("cce_inductor could not rewrite a graph and left it as it was")
    return Rewritten(gm, [_fault(loss, error) for loss in losses(gm.graph)])


def _fault(loss: Node, error: Exception) -> Site:
    refusal = Refusal(loss, f"internal error: {type(error).__name__}: {error}", "please report it")
    return site.make(loss, None, refusal)


def differentiated_again(gm: GraphModule) -> str:
    """Where the program takes a derivative that it differentiates again, right behind a graph; "" if it does not.

    Dynamo breaks the graph there, and says so, or leaves the function that does so to Python.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and "autograd.grad" in str(reason.reason) and reason.user_stack:
        frame = reason.user_stack[-1]
        return f"{frame.filename}:{frame.lineno}" if _AGAIN in (frame.line or "") else ""
    caller = compat.uncompiled_caller()
    if caller is None:
        return ""
    try:
        lines, first = inspect.getsourcelines(caller)
    except (OSError, TypeError):  # typed in, or made by exec()
        return ""
    return next((f"{caller.co_filename}:{first + i}" for i, line in enumerate(lines) if _AGAIN in line), "")


_AGAIN = "create_graph=True"


def copy_graph(gm: GraphModule) -> GraphModule:
    """A copy of a Dynamo graph module that keeps node metadata and the module's attributes."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    result = graph.graph_copy(gm.graph, mapping, return_output_node=True)
    assert isinstance(result, tuple)
    graph.output(result[0]).meta.update(result[1].meta)
    for old, new in mapping.items():
        compat.copy_node_attributes(old, new)
    copy = GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for name, value in vars(gm).items():
        if name not in vars(copy):
            setattr(copy, name, value)
    return copy


def _rewrite(gm: GraphModule, settings: Settings, version: str, choose: Chooser | None, statistics: bool) -> Rewritten:
    """The pass over a graph, and over the regions in it that are checkpointed."""
    # A region is run again for the backward, by PyTorch: what is formed in its forward only must not leave it.
    inside = replace(settings, gradients_in_forward=False, diagnostics=False, defer_logits=False)
    regions = {name: _rewrite(region, inside, version, choose, statistics) for name, region in _checkpointed(gm)}
    result = _rewrite_graph(gm, settings, version, choose, statistics)
    sites = [site for region in regions.values() for site in region.sites]
    result.sites[:0] = sites
    result.unnamed += sum(region.unnamed for region in regions.values())
    if any(site.fused for site in sites):
        if result.graph_module is gm:
            result.graph_module = copy_graph(gm)
        for name, region in regions.items():
            setattr(result.graph_module, name, region.graph_module)
    return result


def _checkpointed(gm: GraphModule) -> list[tuple[str, GraphModule]]:
    """The bodies of torch.utils.checkpoint calls, by the names of the attributes that hold them."""
    found = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.higher_order.tag_activation_checkpoint:
            body = node.args[0]
            region = getattr(gm, str(body.target), None) if isinstance(body, Node) and body.op == "get_attr" else None
            if isinstance(region, GraphModule):
                found[str(body.target)] = region
    return list(found.items())


def _rewrite_graph(
    gm: GraphModule, settings: Settings, version: str, choose: Chooser | None, statistics: bool
) -> Rewritten:
    copy = copy_graph(gm)
    graph = copy.graph
    interpreter = Interpreter(graph)
    interpreter.run()
    findings = interpreter.findings(statistics)
    dense = {} if statistics else _unnamed(gm, interpreter, findings, settings)
    if not findings:
        return Rewritten(gm, list(dense.values()), unnamed=len(dense))
    if again := differentiated_again(gm):
        reason = f"the loss is differentiated with create_graph=True ({again}): compiled code has no second derivative"
        cure = "compile the model without the penalty, or compute the penalty from another loss"
        sites = [site.make(f.loss, f.trace.head if f.trace else None, Refusal(f.loss, reason, cure)) for f in findings]
        return Rewritten(gm, [*sites, *dense.values()], uncompiled=True, unnamed=len(dense))
    hoist = Hoist(graph)
    attributes = Attributes(grad_filter=settings.grad_filter, workspace=settings.workspace_bytes, version=version)
    traces = {f.trace.first.node: f.trace for f in findings if f.trace is not None}
    for written in interpreter.written_out:
        traces |= {trace.first.node: trace for trace in written.traces if not trace.first.head.members}
    plans = {node: _plan(graph, trace, hoist, settings, choose) for node, trace in traces.items()}
    _refuse_together(list(plans.values()), interpreter.written_out)
    fused = [plan for plan in plans.values() if plan.refusal is None]
    calls = emit.bundles([group for plan in fused for group in plan.groups], hoist)
    # The numbers that diagnostics are made of are a gradient that no loss may scale.
    numbers = settings.diagnostics and settings.grad_filter != "exact"
    early = settings.gradients_in_forward and not numbers and _one_linear_loss(calls)
    _name(calls)
    made = {f.loss: _site(f, plans, calls, settings, early, attributes, interpreter.source) for f in findings} | dense
    sites = [made[node] for node in interpreter.given if node in made]
    if not fused:
        return Rewritten(gm, sites, unnamed=len(dense))
    deferrals: list[Deferral] = []
    for call in calls:
        gradients = early and fused[0].choice.gradients_in_forward
        emit.emit(graph, call, attributes, hoist, gradients, settings.diagnostics)
    # Behind them: a comparison may be with what they gave.
    for ranks in [ranks for plan in fused for ranks in plan.ranks]:
        emit_ranking.emit(graph, ranks, attributes, hoist)
    for plan in fused:
        for trace in plan.trace.with_parts:
            emit.replace_metadata(graph, trace)
    refused = {id(plan.trace) for plan in plans.values() if plan.refusal is not None}
    done = [w for w in interpreter.written_out if not any(id(t) in refused or t.escapes for t in w.traces)]
    for written in done:
        written.node.replace_all_uses_with(written.result)
        graph.erase_node(written.node)
    # The outputs are read after the losses were replaced: a loss is one of them.
    outputs = Outputs(graph)
    several = {id(trace): trace for written in done for trace in written.traces if trace.first.head.members}
    for trace in (*(plan.trace for plan in fused), *several.values()):
        for value in trace.outputs if settings.defer_logits else []:
            deferrals += outputs.defer(value)
    user_outputs = outputs.finish()
    for trace in (trace for written in done for trace in written.traces):
        emit.erase_dead(graph, trace, [])
    for plan in fused:
        emit.erase_dead(graph, plan.trace, [reading.node for reading in plan.trace.readings])
    interpreter.erase_unused()
    graph.lint()
    copy.recompile()
    return Rewritten(copy, sites, deferrals, user_outputs, unnamed=len(dense))


def _unnamed(
    gm: GraphModule, interpreter: Interpreter, findings: list[Finding], settings: Settings
) -> dict[Node, Site]:
    """The losses that no rule has a name for. They are for the record: a fault of ours must not cost a fused loss."""
    try:
        found = unnamed(interpreter, findings, settings)
        made = {f.loss: site.make(f.loss, f.trace.head if f.trace else None, f.refusal) for f in found}
        ends = getattr(gm, "compile_subgraph_reason", None)
        behind = behind_break(ends, interpreter, [*findings, *found], settings)
        if behind is not None and behind.trace is not None:
            record = site.make(behind.loss, behind.trace.head, behind.refusal)
            made[behind.loss] = site.moved(record, getattr(ends, "user_stack", ()))
        return made
    except Exception:
        log.exception("cce_inductor could not look for losses that it does not know")
        return {}


# What the operators run where nobody lowers them.
EAGER = Choice("eager implementation")


@dataclass
class Plan:
    """What is to be done with one head: its losses and rankings in groups, or the reason to leave it alone."""

    trace: Trace
    groups: list[emit.Group] = field(default_factory=list)
    ranks: list[emit_ranking.Group] = field(default_factory=list)
    refusal: Refusal | None = None
    choice: Choice = EAGER


def _plan(graph: Graph, trace: Trace, hoist: Hoist, settings: Settings, choose: Chooser | None) -> Plan:
    try:
        refusal = _refusal(graph, trace, settings)
        if refusal is not None:
            return Plan(trace, refusal=refusal)
        groups = emit.groups(trace, hoist, settings.grad_filter == "exact")
        ranks = emit_ranking.groups(trace, hoist)
        choice = choose(_problem(trace.head, settings)) if choose else EAGER
        if choice.refusal:
            return Plan(trace, refusal=Refusal(trace.head.node, choice.refusal, choice.cure))
        return Plan(trace, groups, ranks, _late_write(graph, trace, [*groups, *ranks], hoist, settings), choice)
    except Refused as refused:
        return Plan(trace, refusal=Refusal(trace.head.node, refused.reason, refused.cure))


def _refuse_together(plans: list[Plan], written_out: list[WrittenOut]) -> None:
    """Heads that were combined are fused together, or none of them is."""
    bound = [{id(trace) for trace in plan.trace.with_parts} for plan in plans]
    bound += [{id(trace) for trace in written.traces} for written in written_out]
    refused = True
    while refused:
        refused = False
        for traces in bound:
            together = [plan for plan in plans if id(plan.trace) in traces]
            refusal = next((plan.refusal for plan in together if plan.refusal is not None), None)
            for plan in together:
                if refusal is not None and plan.refusal is None:
                    plan.refusal = refusal
                    refused = True


def _problem(head: Head, settings: Settings) -> Problem:
    """A head in numbers. Symbolic sizes give what they were at capture: asking must not put a guard on them."""
    z = fake(head.node)
    sizes = [compat.size_hint(s) for s in z.shape]
    vocab = compat.size_hint(head.vocab)
    entries = math.prod(sizes)
    return Problem(
        rows=entries // max(1, vocab),
        width=compat.size_hint(head.width),
        vocab=vocab,
        device=z.device.type,
        dtypes=tuple(fake(n).dtype for n in head.operands()),
        compute_dtype=head.dtype,
        workspace=settings.workspace_bytes,
        logits_bytes=entries * z.element_size(),
        filter=Filter.read(settings.grad_filter).kind,
    )


def _one_linear_loss(calls: list[emit.Bundle]) -> bool:
    """Whether the gradients may be formed in the forward.

    One loss in the graph, since each holds a gradient of its weight until the backward; a mean or a sum under grad,
    since only then all tangents are known but for a factor.
    """
    members = [reading for call in calls for reading in call.members]
    if len(members) != 1:
        return False
    (loss,) = members
    # Masked columns are put back into the log-sum-exp behind the operator, and change its tangent.
    return isinstance(loss, Loss) and loss.arguments.linear and loss.differentiated and not loss.value.masks


def _refusal(graph: Graph, trace: Trace, settings: Settings) -> Refusal | None:
    """Why a head is not fused at all, or None."""
    head = trace.head
    if head.vocab < settings.min_vocab:
        return Refusal(
            head.node,
            f"{head.vocab} classes are fewer than min_vocab={settings.min_vocab}: there is little to save",
            "lower cce_inductor.config.min_vocab",
        )
    if (reason := _copies(head, settings)) is not None:
        return Refusal(head.node, reason, "merge the weights, or compute the sum of the hidden states instead")
    heads = [h.node for h in trace.heads]
    transform = _transform_around(graph, {*heads, *(reading.node for reading in trace.readings)})
    if transform is not None:
        return Refusal(transform, "the head or the loss is inside a torch.func transform", "compute it outside")
    wrapped = next((refusal for h in (head, *trace.heads) if (refusal := subclassed(h)) is not None), None)
    if wrapped is not None:
        return wrapped
    return trace.escapes[0] if trace.escapes else None


def _copies(head: Head, settings: Settings) -> str | None:
    """Why the weights of several heads are not put together in one, or None. Sizes are those at capture."""
    if not head.sum_of:
        return None
    problem = _problem(head, settings)
    size = compat.size_hint(head.vocab) * compat.size_hint(head.width) * fake(head.weight).element_size()
    size *= 1 + fake(head.weight).requires_grad
    if size <= max(settings.workspace_bytes, 2 * problem.logits_bytes):
        return None
    return f"the weights of the heads put together take {size >> 20} MiB, more than the logits and their gradient"


def _transform_around(graph: Graph, nodes: set[Node]) -> Node | None:
    """The torch.func transform (vmap, grad, jvp) around one of `nodes`: the operators have no rules for it."""
    open_levels: list[Node] = []
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name.endswith("_increment_nesting"):
            open_levels.append(node)
        elif name.endswith("_decrement_nesting"):
            open_levels.pop()
        elif node in nodes and open_levels:
            return open_levels[-1]
    return None


def _late_write(
    graph: Graph,
    trace: Trace,
    groups: Sequence[emit.Group | emit_ranking.Group],
    hoist: Hoist,
    settings: Settings,
) -> Refusal | None:
    """A write to an operand between where the program read it and where the operator (or a deferred read) does."""
    if not hoist.writes:
        return None
    head = trace.head
    readings = {reading.node for group in groups for reading in group.members}
    last = next((n for n in reversed(graph.nodes) if n in readings), None)
    returned = any(t.outputs for t in (trace, *trace.wholes))
    end = None if returned and settings.defer_logits else last
    writer = None
    for h in trace.heads:
        writer = writer or written_between(graph, [*head.operands(), *h.operands()], h.node, end)
    values = list(dict.fromkeys(node for t in (*trace.with_parts, *trace.wholes) for node in t.values))
    for made in values:
        others = [n for n in made.all_input_nodes if n not in values]
        writer = writer or written_between(graph, others, made, end)
    for group in groups:
        since, final = {reading.since for reading in group.members}, group.members[-1].node
        first = next(n for n in graph.nodes if n in since)
        targets = [n for reading in group.members for n in (reading.target, reading.given) if n is not None]
        writer = writer or written_between(graph, targets, first, final)
    if writer is None:
        return None
    reason = "an operand of the head or the target is written to in place before the loss is computed"
    return Refusal(writer, reason, "write to a copy")


def _name(calls: Iterable[emit.Bundle]) -> None:
    """Gives each call a name of its own. A line of code may hold several, and those that follow are numbered."""
    seen: Counter[str] = Counter()
    for call in calls:
        name = site.name(call.members[0].node)
        seen[name] += 1
        call.name = name if seen[name] == 1 else f"{name} #{seen[name]}"


def _site(
    finding: Finding,
    plans: dict[Node, Plan],
    calls: list[emit.Bundle],
    settings: Settings,
    early: bool,
    attributes: Attributes,
    source: Callable[[Node], Node],
) -> Site:
    if finding.trace is None:
        return site.make(finding.loss, None, finding.refusal)
    plan = plans[finding.trace.first.node]
    refusal = finding.refusal or plan.refusal
    reading = next((r for r in plan.trace.readings if source(r.node) is finding.loss), None)
    if refusal is None and reading is None:
        reason = "the loss reads the logits in a way the trace did not follow"
        refusal = Refusal(finding.loss, reason, "please report it")
    if refusal is not None:
        return site.make(finding.loss, finding.trace.head, refusal)
    deferred = len(plan.trace.outputs) if settings.defer_logits else 0
    kernel = plan.choice.kernel
    if early and plan.choice.gradients_in_forward:
        kernel += ", gradients formed in the forward"
    call = next(c for c in calls if reading in c.members)
    return site.make(
        finding.loss,
        finding.trace.head,
        None,
        deferred,
        kernel,
        call.name,
        call.filter(attributes),
        attributes.workspace,
    )
