# with: CCE_INDUCTOR=1 CCE_INDUCTOR_EAGER_HEADS=1
"""torchtitan: Llama's blocks compiled one by one, FSDP2 with norm and head as a group, its loss compiled apart.

Its attention is FlexAttention, which has no backward on CPUs: plain attention stands in for it here.
"""

import os

import client
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.config import CompileConfig
from torchtitan.models.llama3 import llama3_configs


class Attention(torch.nn.Module):
    def forward(self, q, k, v, **_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


client.watch()
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "1"}
dist.init_process_group("gloo")
config = llama3_configs["debugmodel"]("flex")
config.vocab_size = config.tok_embeddings.num_embeddings = config.lm_head.out_features = client.VOCAB
config.layers = config.layers[:2]
torch.manual_seed(0)
model = config.build()
model.init_states(buffer_device=None)
for block in model.layers.values():
    block.attention.inner_attention = Attention()
    block.compile(backend="inductor", fullgraph=True)
mesh = init_device_mesh("cpu", (1,))
for block in model.layers.values():
    fully_shard(block, mesh=mesh)
fully_shard([model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
fully_shard(model, mesh=mesh)
loss_of = CrossEntropyLoss(CrossEntropyLoss.Config(), compile_config=CompileConfig(enable=True, components=["loss"]))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for batch in client.tokens(length=client.LENGTH + 1).split(client.ROWS)[: client.STEPS]:
    tokens, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    loss, _ = loss_of(model(tokens), labels, torch.tensor(float(labels.numel())))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
client.done(losses)
dist.destroy_process_group()
