"""What is to be done with each head: its reductions in groups, or the reason to leave it alone."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Graph, Node

from .. import compat
from ..config import Settings
from ..filters import Filter
from ..graph.fakes import fake
from ..graph.hoist import Hoist
from ..graph.memory import written_between
from ..graph.refusal import Refusal, Refused
from ..graph.regions import transform_around
from ..ops.call import Attributes
from ..ops.choice import Choice, Chooser, Problem
from ..ops.statistics import TABLE
from ..ops.workspace import workspace
from ..trace.codes import codes
from ..trace.findings import Finding, source
from ..trace.heads import subclassed
from ..trace.interpreter import Interpreter
from ..trace.trace import Trace, refused_together
from ..trace.values import Head, SeveralHeads, SumOfHeads
from . import site
from .groups import Bundle, Group, RankingGroup, in_groups, in_ranking_groups
from .site import Site

# What the operators run where nobody lowers them.
EAGER = Choice("eager implementation")


@dataclass
class Plan:
    """What is to be done with one head: its losses and rankings in groups, or the reason to leave it alone."""

    trace: Trace
    groups: list[Group] = field(default_factory=list)
    ranks: list[RankingGroup] = field(default_factory=list)
    refusal: Refusal | None = None
    choice: Choice = EAGER


def make_plans(
    interpreter: Interpreter, found: list[Finding], hoist: Hoist, settings: Settings, choose: Chooser | None
) -> dict[Node, Plan]:
    """What is to be done with each head that has a loss, by the node of the head."""
    traces = {f.trace.first.node: f.trace for f in found if f.trace is not None}
    for decomposition in interpreter.decomposed:
        traces |= {trace.first.node: trace for trace in decomposition.traces if not trace.first.members}
    plans = {node: _plan(interpreter.graph, trace, hoist, settings, choose) for node, trace in traces.items()}
    by_trace = {id(plan.trace): plan for plan in plans.values()}
    bound = [plan.trace.with_parts for plan in plans.values()] + [d.traces for d in interpreter.decomposed]
    refused = {i: plan.refusal for i, plan in by_trace.items() if plan.refusal is not None}
    for i, refusal in refused_together(refused, [[t for t in ts if id(t) in by_trace] for ts in bound]).items():
        by_trace[i].refusal = by_trace[i].refusal or refusal
    return plans


def _plan(graph: Graph, trace: Trace, hoist: Hoist, settings: Settings, choose: Chooser | None) -> Plan:
    try:
        refusal = _refusal(graph, trace, settings)
        if refusal is not None:
            return Plan(trace, refusal=refusal)
        groups = in_groups(trace, hoist, settings.grad_filter == "exact")
        ranks = in_ranking_groups(trace, hoist)
        choice = choose(_problem(trace.head, settings, trace)) if choose else EAGER
        if choice.refusal:
            return Plan(trace, refusal=Refusal(trace.head.node, choice.refusal, choice.cure))
        return Plan(trace, groups, ranks, _late_write(graph, trace, [*groups, *ranks], hoist, settings), choice)
    except Refused as refused:
        return Plan(trace, refusal=Refusal(trace.head.node, refused.reason, refused.cure))


def _mixed(trace: Trace) -> bool:
    """Whether a divergence of a mixture with another head's probabilities is asked for."""
    return any(TABLE[name].divergence is not None for reduction in trace.reductions for name in reduction.statistics)


def _problem(head: Head | SeveralHeads, settings: Settings, trace: Trace | None = None) -> Problem:
    """A head in numbers. Symbolic sizes give what they were at capture: asking must not put a guard on them.

    trace: the head's, for what is asked of it besides.
    """
    z = fake(head.node)
    sizes = [compat.size_hint(s) for s in z.shape]
    vocab = compat.size_hint(head.vocab)
    entries = math.prod(sizes)
    grad_filter = Filter.read(settings.grad_filter)
    made = codes(head) if isinstance(head, Head) else None
    read = None if made is None or (made.scales and grad_filter.kind != "exact") else made  # as `codes_read`
    problem = Problem(
        rows=entries // max(1, vocab),
        width=compat.size_hint(head.width),
        vocab=vocab,
        device=z.device.type,
        dtypes=tuple(fake(read.node if read and n in head.weights() else n).dtype for n in head.operands()),
        compute_dtype=head.dtype,
        workspace=workspace(settings.workspace_mb, z.device),
        logits_bytes=entries * z.element_size(),
        filter=grad_filter.kind,
    )
    return problem if trace is None else _with_another(problem, trace)


def _with_another(problem: Problem, trace: Trace) -> Problem:
    """The problem with the second heads that the logits of the first one are compared with."""
    compared = [(r.value, r.other) for r in trace.reductions if r.other is not None]
    others = [other.head for _, other in compared]
    differentiated = [value.head for pair in compared for value in pair if value.fake.requires_grad]
    weights = dict.fromkeys(w for head in differentiated for w in head.weights() if fake(w).requires_grad)
    return replace(
        problem,
        two_heads=bool(compared),
        mixtures=_mixed(trace),
        other_width=max((compat.size_hint(head.width) for head in others), default=0),
        other_dtypes=tuple(fake(n).dtype for head in others for n in (head.node, *head.operands())),
        trained=tuple(fake(w).dtype for w in weights),
    )


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
    transform = transform_around(graph, {*heads, *(reduction.node for reduction in trace.reductions)})
    if transform is not None:
        return Refusal(transform, "the head or the loss is inside a torch.func transform", "compute it outside")
    wrapped = next((refusal for h in (head, *trace.heads) if (refusal := subclassed(h)) is not None), None)
    if wrapped is not None:
        return wrapped
    return trace.escapes[0] if trace.escapes else None


def _copies(head: Head | SeveralHeads, settings: Settings) -> str | None:
    """Why the weights of several heads are not put together in one, or None. Sizes are those at capture."""
    if not isinstance(head, SumOfHeads):
        return None
    problem = _problem(head, settings)
    size = compat.size_hint(head.vocab) * compat.size_hint(head.width) * fake(head.weight).element_size()
    size *= 1 + fake(head.weight).requires_grad
    spare = 0 if settings.workspace_mb == "auto" else problem.workspace
    if size <= max(spare, 2 * problem.logits_bytes):
        return None
    return f"the weights of the heads put together take {size >> 20} MiB, more than the logits and their gradient"


def _late_write(
    graph: Graph,
    trace: Trace,
    groups: Sequence[Group | RankingGroup],
    hoist: Hoist,
    settings: Settings,
) -> Refusal | None:
    """A write to an operand between where the program read it and where the operator (or a deferred read) does."""
    if not hoist.writes:
        return None
    head = trace.head
    reductions = {reduction.node for group in groups for reduction in group.members}
    last = next((n for n in reversed(graph.nodes) if n in reductions), None)
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
        since, final = {reduction.since for reduction in group.members}, group.members[-1].node
        first = next(n for n in graph.nodes if n in since)
        targets = [n for reduction in group.members for n in (reduction.classes, reduction.given) if n is not None]
        writer = writer or written_between(graph, targets, first, final)
    if writer is None:
        return None
    reason = "an operand of the head or the target is written to in place before the loss is computed"
    return Refusal(writer, reason, "write to a copy")


def name_bundles(calls: Iterable[Bundle]) -> None:
    """Gives each call a name of its own. A line of code may hold several, and those that follow are numbered."""
    seen: Counter[str] = Counter()
    for call in calls:
        name = site.name(call.members[0].node)
        seen[name] += 1
        call.name = name if seen[name] == 1 else f"{name} #{seen[name]}"


def record(
    finding: Finding,
    plans: dict[Node, Plan],
    calls: list[Bundle],
    settings: Settings,
    attributes: Attributes,
    interpreter: Interpreter,
) -> Site:
    if finding.trace is None:
        return site.make(finding.loss, None, finding.refusal)
    plan = plans[finding.trace.first.node]
    refusal = finding.refusal or plan.refusal
    reduction = next((r for r in plan.trace.reductions if source(interpreter, r.node) is finding.loss), None)
    if refusal is None and reduction is None:
        reason = "the loss reads the logits in a way the trace did not follow"
        refusal = Refusal(finding.loss, reason, "please report it")
    if refusal is not None:
        return site.make(finding.loss, finding.trace.head, refusal)
    deferred = len(plan.trace.outputs) if settings.defer_logits else 0
    kernel = plan.choice.kernel
    call = next((c for c in calls if reduction in c.members), None)
    if call is None:  # a ranking, which has an operator of its own
        return site.make(finding.loss, finding.trace.head, None, deferred, kernel)
    return site.make(
        finding.loss,
        finding.trace.head,
        None,
        deferred,
        kernel,
        call.name,
        call.filter(attributes),
        settings.workspace_mb,
    )
