"""What ops that hold whole rows in registers share: a tile's layout, and sums along its rows."""

import triton
import triton.language as tl

from ._launch import next_power_of_2

LANES = 256  # of a row are one warp's at a time, 16 bytes of 16-bit numbers a thread
ROUNDS = 4  # at most, of a row; a wider one is shared by warps
MAX_D = 8192  # a row is held in registers


@triton.jit
def columns(ROUNDS: tl.constexpr, LANES: tl.constexpr):
    """Of a tile [BLOCK_M, ROUNDS, LANES]: warps lie along rows, so that a row's sum needs one."""
    return tl.arange(0, ROUNDS)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]


@triton.jit
def row_sum(t):
    return tl.sum(tl.sum(t, axis=1, keep_dims=True), axis=2, keep_dims=True)


def tile(D: int, elements: int, warp_elements: int) -> dict:
    """Sizes and warps of a tile of about `elements`, of which a warp holds `warp_elements`."""
    block_d = next_power_of_2(D)
    block_m = max(1, elements // block_d)
    lanes = min(block_d, max(LANES, block_d // ROUNDS))
    return dict(
        BLOCK_M=block_m,
        ROUNDS=block_d // lanes,
        LANES=lanes,
        num_warps=min(32, max(1, block_m * block_d // warp_elements)),
    )
