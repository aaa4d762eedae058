"""The GPU that kernels are compiled for."""

from functools import lru_cache

import torch
from triton import knobs
from triton.runtime import driver


@lru_cache
def capability(device: torch.device) -> int:
    """The compute capability times ten; 0 for GPUs that have none, such as AMD's, for those that
    are not here, and for tensors without memory.

    Triton's interpreter runs what Hopper would. Kernels for tensors on a CPU are compiled for
    Triton's current target.
    """
    if knobs.runtime.interpret:
        return 90
    if device.type == "cpu":
        target = driver.active.get_current_target()
        return target.arch if target.backend == "cuda" else 0
    if device.type == "meta" or torch.version.hip is not None or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
