"""The speed of a run, and the memory that it takes."""

import resource
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

from shtx.train.config import Config

# dense bf16 products of tensor cores, FLOP/s, of NVIDIA's data sheets; the first name that fits
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
OF_PEAK = {"bf16-mixed": 1.0, "fp16-mixed": 1.0, "tf32": 0.5}


def flops_of(config: Config) -> int:
    """Floating point operations of a step over all processes: the model's, forward and backward,
    whatever its fused ops save; counted on no device.
    """
    model = config.model
    with torch.device("meta"):
        counted = model.kind(impl="reference", **model.arguments())
        ids = torch.zeros(1, model.seq_len + 1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        counted(ids, return_loss=True)[0].backward()
    return counter.get_total_flops() * config.batch_size


def peak_of(device: torch.device, precision: str) -> float | None:
    """FLOP/s that a device can do; None where that is not known."""
    if device.type != "cuda" or precision not in OF_PEAK:
        return None
    name = torch.cuda.get_device_name(device)
    return next((p * OF_PEAK[precision] for known, p in PEAKS.items() if known in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes of memory that this process has had at most, on a GPU there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
