"""What kernels are compiled with, by head width E, window (-1: all keys), bytes of a number
and device.

The fastest on an H200: those of `forward` and the backward by keys and queries in `python -m
benchmarks.search`, whose outcome is in benchmarks/results/search/h200.json; those by tiles in a
sweep of prototypes, which is not. Wider numbers and heads take what fits.
"""

import torch

from .._launch import next_power_of_2
from .._target import capability

SHORT = 128  # most tokens of a window whose blocks or halos are unrolled


def _hopper(device: torch.device) -> bool:
    """Whether products take operands from shared memory: that leaves registers for larger tiles."""
    return capability(device) >= 90


def forward_by_tiles(E: int, window: int, itemsize: int, device: torch.device) -> dict | None:
    """None where the window is wide, or a tile takes too many registers."""
    if itemsize > 2 or E > 64 or not 0 < window <= 64:
        return None
    if E <= 16 and window <= 16:
        return dict(BLOCK=16, HALO=16, num_warps=1, num_stages=1)
    halo = max(16, next_power_of_2(window))
    return dict(BLOCK=64, HALO=halo, num_warps=4, num_stages=1)


def forward(E: int, window: int, itemsize: int, device: torch.device) -> dict:
    if itemsize > 2 or E > 128:
        return dict(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=1)
    if not 0 < window <= SHORT:
        return dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)
    if E <= 32 or not _hopper(device):
        return dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=1)
    if E <= 64:
        return dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=1, maxnreg=128)
    return dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=1)


def backward_by_tiles(E: int, window: int, itemsize: int, device: torch.device) -> dict | None:
    """None where the window is wide, or a tile takes too many registers."""
    if itemsize > 2 or E > 64 or not 0 < window <= SHORT:
        return None
    halo = 16 if window <= 16 else 32  # windows up to 16 are untimed
    if E <= 32:
        return dict(BLOCK=64, HALO=halo, num_warps=4, num_stages=1)
    if not _hopper(device):  # untimed: what spills nothing
        return dict(BLOCK=32, HALO=halo, num_warps=4, num_stages=1)
    return dict(BLOCK=64, HALO=halo, num_warps=4, num_stages=1, maxnreg=168)


def backward_by_keys(E: int, window: int, itemsize: int, device: torch.device) -> dict:
    if itemsize > 2 or E > 128:
        return dict(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=1)
    block = 64 if E <= 64 else 32
    return dict(BLOCK_M=block, BLOCK_N=block, num_warps=4, num_stages=1)


backward_by_queries = backward_by_keys
