"""How much scratch a call may take: what is set, the device's own, or as much as the logits that are saved."""

import types

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from capture import graphs_of

import cce_inductor
from cce_inductor import config
from cce_inductor.ops.call import MIB, Attributes, Call
from cce_inductor.ops.workspace import AUTO, workspace
from cce_inductor.rewrite.run import rewrite
from cce_inductor.version import source_hash

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(80 << 30, 512), (141 << 30, 512), (24 << 30, 192), (int(23.6 * 2**30), 176), (int(23.7 * 2**30), 176), (1, 16)],
)
def test_unset_it_is_64_mib_on_cpus_and_a_128th_of_the_memory_on_gpus(memory, expected, monkeypatch):
    properties = types.SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert workspace(None, GPU) == expected * MIB
    assert workspace(None, CPU) == 64 * MIB
    for device in (CPU, GPU):
        assert workspace(7, device) == 7 * MIB and workspace("auto", device) == AUTO


def loss(x, w, t):
    return F.cross_entropy(F.linear(x, w), t)


def data(n=256, d=16, v=20000, dtype=torch.float32):
    torch.manual_seed(0)
    x, w = (torch.randn(k, d).to(dtype).requires_grad_() for k in (n, v))
    return x, w, torch.randint(0, v, (n,))


@pytest.mark.parametrize(("setting", "expected"), [(None, 64 << 20), (3, 3 << 20), ("auto", AUTO)])
def test_it_stands_in_the_graph_and_so_in_the_cache_key(setting, expected):
    """And says nothing of sizes: ranks with batches of their own compile the same graph."""
    graphs = []
    for n in (256, 512):
        x, w, t = data(n)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(t, 0)
        (gm,) = graphs_of(loss, x, w, t)
        settings = config.Settings(min_vocab=0, workspace_mb=setting, gradients_in_forward=False)
        result = rewrite(gm, settings, source_hash())
        (node,) = [n for n in result.graph_module.graph.nodes if "linear_statistics" in str(n.target)]
        assert expected in node.args
        graphs.append([a for a in node.args if isinstance(a, (int, float, str))])
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_no_more_than_the_logits(dtype):
    """The eager implementation: its scratch, and with it the accumulator of dx."""
    x, w, t = data(dtype=dtype)
    call = Call({"input": x, "weight": w, "target": t}, None, "lse target_logit", Attributes(workspace=AUTO))
    logits = x.shape[0] * w.shape[0] * dtype.itemsize
    assert logits // 2 <= call.workspace <= logits
    with config.patch(workspace_mb="auto"):
        value = cce_inductor.linear_cross_entropy(x, w, t)
        with Allocations() as seen:
            value.backward()
    assert 2 * MIB < seen.peak <= logits + x.nbytes + w.nbytes + MIB
