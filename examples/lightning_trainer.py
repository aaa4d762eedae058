"""Lightning: `python examples/lightning_trainer.py [STEPS]`."""

import lightning
from common import BATCH, DEVICE, STEPS, Clock, Windows, build_model, build_optimizer
from torch.utils.data import DataLoader


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = build_model()
        self.model.graphs = True

    def training_step(self, ids, _):
        loss, _ = self.model(ids, return_loss=True)
        clock.step(loss)
        return loss

    def configure_optimizers(self):
        return build_optimizer(self.parameters())


clock = Clock()
trainer = lightning.Trainer(
    accelerator=DEVICE,
    devices=1,
    max_steps=STEPS,
    precision="bf16-mixed" if DEVICE == "cuda" else "32-true",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Module(), DataLoader(Windows(), BATCH))

clock.report("Lightning")
