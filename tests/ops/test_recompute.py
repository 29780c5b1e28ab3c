"""How often a training step runs the forward operator: once, whatever the compiler may recompute.

Two cases are twice by definition: an eager checkpoint, and a memory budget of exactly 0, which makes a checkpoint of
the whole region and overrules every mark (torch._functorch.partitioners.choose_saved_values_set).
"""

from functools import partial

import pytest
import torch
from head_oracle import Head, error, loss_with_gradients, min_cut
from torch.utils.checkpoint import checkpoint

import cce_inductor
from cce_inductor import config
from cce_inductor.ops import filtered, reference
from cce_inductor.ops.losses import CrossEntropy


@pytest.fixture
def forward_calls(monkeypatch):
    calls = []

    def counted(forward):
        return lambda call: calls.append(call.statistics) or forward(call)

    for module in (reference, filtered):
        monkeypatch.setattr(module, "forward", counted(module.forward))
    return calls


# A loss of several statistics, exact or with a bound and a seed that only the backward reads, and one whose gradients
# are formed in the forward.
LOSSES = {
    "statistics": "lse lse_low target_logit",
    "filtered": "lse lse_low target_logit",
    "gradients in the forward": "lse lse_low target_logit logit_sum",
}


@pytest.fixture(autouse=True)
def grad_filter(request):
    """The filter of the test's loss."""
    kind = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind")
    with config.patch(grad_filter=("unbiased", 0.5) if kind == "filtered" else "exact"):
        yield


class Model(torch.nn.Module):
    """A trunk, a head and a loss out of LOSSES; the trunk or the loss may be checkpointed."""

    def __init__(self, checkpointed: str = "", kind: str = "statistics"):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = torch.nn.Sequential(
            torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16), torch.nn.Tanh()
        )
        self.head = torch.nn.Linear(16, 131, bias=False)
        self.checkpointed, self.kind = checkpointed, kind

    def loss(self, x, target):
        if self.kind == "gradients in the forward":
            return loss_with_gradients(x, self.head.weight, target, None, CrossEntropy(label_smoothing=0.1))
        lse, target_logit = cce_inductor.linear_logsumexp(x, self.head.weight, target)
        return (torch.exp(target_logit - lse) * (lse - target_logit)).mean() + 1e-2 * (lse * lse).mean()

    def both(self, x, target):
        return self.loss(self.trunk(x), target)

    def forward(self, x, target):
        if self.checkpointed == "all":
            return checkpoint(self.both, x, target, use_reentrant=False)
        if self.checkpointed == "loss":
            return checkpoint(self.loss, self.trunk(x), target, use_reentrant=False)
        if self.checkpointed == "trunk":
            return self.loss(checkpoint(self.trunk, x, use_reentrant=False), target)
        return self.both(x, target)


def step(model, compiled, head: Head) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    compiled(head.x, head.target).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


SETTINGS = {
    "default": {},
    "budget 0.5": {"activation_memory_budget": 0.5},
    "budget 0.01": {"activation_memory_budget": 0.01},
    "aggressive": {"aggressive_recomputation": True},
    "all bans lifted": {
        "aggressive_recomputation": True,
        "ban_recompute_used_far_apart": False,
        "ban_recompute_long_fusible_chains": False,
        "ban_recompute_materialized_backward": False,
        "ban_recompute_not_in_allowlist": False,
        "ban_recompute_reductions": False,
    },
}


@pytest.mark.parametrize("checkpointed", ["", "trunk", "loss", "all"])
@pytest.mark.parametrize(
    "settings", [pytest.param(s, marks=pytest.mark.slow if s in ("budget 0.5", "aggressive") else ()) for s in SETTINGS]
)
@pytest.mark.parametrize("kind", LOSSES)
def test_compiled_step_runs_the_forward_operator_once(kind, settings, checkpointed, forward_calls):
    torch._dynamo.reset()
    head = Head.make()
    model = Model(checkpointed, kind)
    want = step(model, model, head)
    forward_calls.clear()
    with torch._functorch.config.patch(SETTINGS[settings]):
        compiled = torch.compile(model, backend=min_cut, fullgraph=True)
        result = step(model, compiled, head)
        assert forward_calls == [LOSSES[kind]]
        forward_calls.clear()
        step(model, compiled, head)
        assert forward_calls == [LOSSES[kind]]
    assert all(error(result[name], want[name]) < 1e-5 for name in want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOSSES)
def test_inductor_step_runs_the_forward_operator_once(kind, forward_calls):
    torch._dynamo.reset()
    # float64 has no template: the eager implementation, which is counted here, runs whatever lowerings are registered.
    head, model = Head.make(dtype=torch.float64), Model("all", kind).double()
    with torch._functorch.config.patch(activation_memory_budget=0.01, aggressive_recomputation=True):
        step(model, torch.compile(model, backend="inductor"), head)
    assert forward_calls == [LOSSES[kind]]


def test_a_budget_of_zero_runs_it_once_more(forward_calls):
    torch._dynamo.reset()
    head, model = Head.make(), Model()
    with torch._functorch.config.patch(activation_memory_budget=0.0):
        step(model, torch.compile(model, backend=min_cut), head)
    assert forward_calls == ["lse lse_low target_logit"] * 2


@pytest.mark.parametrize("checkpointed,calls", [("", 1), ("trunk", 1), ("loss", 2), ("all", 2)])
def test_eager_checkpoint_runs_it_once_more(checkpointed, calls, forward_calls):
    """Outside torch.compile a checkpoint runs what is inside it again, and knows nothing of operators."""
    model = Model(checkpointed)
    step(model, model, Head.make())
    assert len(forward_calls) == calls


def test_selective_checkpoint_saves_the_statistics(forward_calls):
    """A policy that names the operator keeps even an eager checkpoint from running it again."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx, op, *args, **kwargs):
        keep = op == torch.ops.cce_inductor.linear_statistics.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    head, model = Head.make(), Model()
    context_fn = partial(create_selective_checkpoint_contexts, policy)
    checkpoint(model.both, head.x, head.target, use_reentrant=False, context_fn=context_fn).backward()
    assert len(forward_calls) == 1
