"""The examples share this: bytes to train on, a model, the time of a step beside TrainStep's."""

import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shtx import HierarchicalTransformer, TrainStep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
BATCH, LENGTH, DIM, DEPTH = (8, 2048, 512, 6) if DEVICE == "cuda" else (4, 128, 32, 2)
WARM = min(10, STEPS // 2)  # steps that compile and capture


def build_model() -> HierarchicalTransformer:
    """A byte-level model of three levels, on the device."""
    torch.manual_seed(0)
    return HierarchicalTransformer(
        num_tokens=256,
        dim=DIM,
        depth=DEPTH,
        seq_len=LENGTH,
        hierarchies=(1, 2, 8),
        window_sizes=(32, 64, None),
        ignore_index=-1,
    ).to(DEVICE)


def build_optimizer(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Windows(Dataset):
    """Random windows of the sources of Python's standard library, as many as all steps take.

    Each is (LENGTH + 1,) bytes, as int64.
    """

    def __init__(self):
        sources = sorted(Path(os.__file__).parent.glob("*.py"))
        text = b"".join(path.read_bytes() for path in sources)
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        starts = torch.Generator().manual_seed(0)
        self.starts = torch.randint(len(text) - LENGTH, (BATCH * STEPS,), generator=starts).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = self.starts[index]
        return self.text[start : start + LENGTH + 1].long()


class Clock:
    """Notes losses, and the time of steps but the first; waits for the device twice in all."""

    def __init__(self):
        self.losses, self.times = [], []

    def step(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        if len(self.losses) in (WARM, STEPS):
            synchronize()
            self.times.append(time.perf_counter())

    def report(self, name: str) -> None:
        first, last = (
            torch.stack(part).mean().item() for part in (self.losses[:3], self.losses[-3:])
        )
        ms = (self.times[1] - self.times[0]) * 1e3 / (STEPS - WARM)
        print(f"{name}: loss {first:.3f} to {last:.3f} in {STEPS} steps of {ms:.1f} ms")
        print(f"TrainStep: steps of {train_step_ms():.1f} ms")


def train_step_ms(steps: int = 20) -> float:
    """The time of a step of the same model and batch in shtx.TrainStep."""
    model = build_model()
    precision = "bf16-mixed" if DEVICE == "cuda" else "fp32"
    step = TrainStep(model, build_optimizer(model.parameters()), precision=precision)
    windows = Windows()
    ids = torch.stack([windows[n] for n in range(BATCH)]).to(DEVICE)
    for n in range(WARM + steps):
        if n == WARM:
            synchronize()
            start = time.perf_counter()
        step(ids)
    synchronize()
    return (time.perf_counter() - start) * 1e3 / steps
