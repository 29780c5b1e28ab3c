# with: CCE_INDUCTOR=1
"""Lightning: a compiled model inside a LightningModule, its loss in `training_step`."""

import client
import lightning
import torch
import torch.nn.functional as F


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.compile(client.llama())
        self.losses = []

    def training_step(self, batch, _):
        logits = self.model(input_ids=batch["input_ids"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


client.watch()
module = Module()
trainer = lightning.Trainer(
    max_steps=client.STEPS,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, torch.utils.data.DataLoader(client.rows(), batch_size=client.ROWS))
client.done(module.losses)
