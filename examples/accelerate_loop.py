"""Hugging Face accelerate: `python examples/accelerate_loop.py [STEPS]`, or `accelerate launch`."""

from accelerate import Accelerator
from common import BATCH, DEVICE, Clock, Windows, build_model, build_optimizer
from torch.utils.data import DataLoader

model = build_model()
model.graphs = True
optimizer = build_optimizer(model.parameters())
accelerator = Accelerator(mixed_precision="bf16" if DEVICE == "cuda" else "no")
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Windows(), BATCH))
clock = Clock()

for ids in loader:
    loss, _ = model(ids, return_loss=True)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    clock.step(loss)

clock.report("accelerate")
