"""The constants that kernels are compiled with, by head width E, window (-1 for all keys), bytes
of a number and device.

All are the fastest on an H200: the outcome of `python -m benchmarks.search` is in
benchmarks/results/search/h200.json. Wider numbers and heads have the tiles that fit.
"""

import torch

from .._target import capability
from ..launch import next_power_of_2

SHORT = 128  # the widest window whose tiles of keys, or halos, are unrolled


def _hopper(device: torch.device) -> bool:
    """Return whether products read shared memory, which leaves registers for larger tiles."""
    return capability(device) >= 90


def forward_by_tiles(E: int, window: int, itemsize: int, device: torch.device) -> dict | None:
    """None if the window is too wide, or a tile would take too many registers."""
    if itemsize > 2 or E > 64 or not 0 < window <= 64:
        return None
    if E <= 16 and window <= 16:
        return dict(BLOCK=16, HALO=16, num_warps=1, num_stages=1)
    sizes = dict(BLOCK=64, HALO=max(16, next_power_of_2(window)), num_warps=4, num_stages=1)
    if E <= 32 or not _hopper(device):
        return sizes
    return sizes | dict(maxnreg=96 if window <= 32 else 128)


def forward(E: int, window: int, itemsize: int, device: torch.device) -> dict:
    """Tiles of the forward in which a program goes through tiles of keys."""
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
    """None if the window is too wide, or a tile would take too many registers."""
    if itemsize > 2 or E > 64 or not 0 < window <= SHORT:
        return None
    halo = 16 if window <= 16 else 32  # windows up to 16 were not timed
    if E <= 32:
        return dict(BLOCK=64, HALO=halo, num_warps=4, num_stages=1)
    if not _hopper(device):  # not timed: it spills nothing
        return dict(BLOCK=32, HALO=halo, num_warps=4, num_stages=1)
    return dict(BLOCK=64, HALO=halo, num_warps=4, num_stages=1, maxnreg=168)


def backward_by_keys(E: int, window: int, itemsize: int, device: torch.device) -> dict:
    """Tiles of the backward in which a program goes through tiles of queries, or of keys."""
    if itemsize > 2 or E > 128:
        return dict(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=1)
    block = 64 if E <= 64 else 32
    return dict(BLOCK_M=block, BLOCK_N=block, num_warps=4, num_stages=1)


backward_by_queries = backward_by_keys
