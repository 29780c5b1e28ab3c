"""One training step of a small model under backend="cce"; prints what happened as JSON. Run by the cache tests."""

import json
import sys

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import cce_inductor

torch.manual_seed(0)
torch.set_num_threads(1)
trunk, head = torch.nn.Linear(16, 16), torch.nn.Linear(16, 96, bias=False)
options = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
rows, dynamic = options.pop("rows", 24), options.pop("dynamic", None)


def step(x, t):
    logits = head(torch.tanh(trunk(x)))
    return F.cross_entropy(logits, t), logits


x, t = torch.randn(rows, 16), torch.randint(0, 96, (rows,))
loss, logits = torch.compile(step, backend="cce", dynamic=dynamic, options={"min_vocab": 0, **options})(x, t)
loss.backward()
want = step(x, t)[0]
print(
    json.dumps(
        {
            "loss": loss.item(),
            "error": abs(loss.item() - want.item()),
            "lazy": type(logits).__name__,
            "cce": dict(counters["cce_inductor"]),
            "aot": dict(counters["aot_autograd"]),
            "inductor": dict(counters["inductor"]),
            "numbers": cce_inductor.diagnostics(),
        }
    )
)
