"""The GPU that kernels are for."""

from functools import lru_cache

from triton import knobs
from triton.runtime import driver


@lru_cache
def capability() -> int:
    """Compute capability times ten, 0 where there is none; the interpreter runs what Hopper would.

    Of the current device: a machine's GPUs are taken to be alike.
    """
    if knobs.runtime.interpret:
        return 90
    target = driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0
