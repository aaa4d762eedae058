"""A loop of one's own: `python examples/plain_loop.py [STEPS]`.

`model.graphs = True` is what makes it fast on a GPU.
"""

import torch
from common import BATCH, DEVICE, Clock, Windows, build_model, build_optimizer
from torch.utils.data import DataLoader

model = build_model()
model.graphs = True
optimizer = build_optimizer(model.parameters())
clock = Clock()

for ids in DataLoader(Windows(), BATCH, pin_memory=DEVICE == "cuda"):
    ids = ids.to(DEVICE, non_blocking=True)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        loss, _ = model(ids, return_loss=True)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    clock.step(loss)

clock.report("plain loop")
