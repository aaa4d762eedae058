"""What kernels are compiled with, by head width E, window (-1: all keys) and bytes of a number.

The fastest on an H200 in `python -m benchmarks.search`, whose outcome is in
benchmarks/results/search/h200.json. Wider numbers and heads take what fits.
"""

from functools import lru_cache

from triton import knobs
from triton.runtime import driver

SHORT = 128  # forward takes all keys of windows up to here at once
PROGRAMS = 256  # of the backward by runs, at least, before runs get longer; 264 run at a time
LENGTH = 16  # tiles of a run, at most


@lru_cache
def _hopper() -> bool:
    """Whether products take operands from shared memory, which leaves registers for larger tiles.
    The interpreter runs what a Hopper GPU would."""
    if knobs.runtime.interpret:
        return True
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def forward(E: int, window: int, itemsize: int) -> dict:
    if itemsize > 2 or E > 128:
        return dict(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=1)
    if 0 < window <= SHORT:
        if E <= 32 or not _hopper():
            return dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=1)
        if E <= 64:
            block = 128 if window <= 64 else 32
            return dict(BLOCK_M=64, BLOCK_N=block, num_warps=4, num_stages=1, maxnreg=128)
        return dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=1)
    return dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)


def backward_by_runs(E: int, window: int, itemsize: int) -> dict | None:
    """None where the window is wider than a tile, or a tile takes too many registers."""
    if itemsize > 2 or E > 64 or not 0 < window <= 64:
        return None
    if window <= 16:
        return dict(BLOCK=16, num_warps=1, num_stages=1)
    return dict(BLOCK=64, num_warps=4, num_stages=1) if _hopper() else None


def backward_by_keys(E: int, window: int, itemsize: int) -> dict:
    if itemsize > 2 or E > 128:
        return dict(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=1)
    block = 64 if E <= 64 else 32
    return dict(BLOCK_M=block, BLOCK_N=block, num_warps=4, num_stages=1)


backward_by_queries = backward_by_keys
