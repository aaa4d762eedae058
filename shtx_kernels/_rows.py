"""Ops that hold whole rows in registers: the layout of a tile, and sums along its rows."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import next_power_of_2

LANES = 256  # numbers of a row that a warp holds side by side: 16 bytes of 16-bit numbers a thread
ROUNDS = 4  # how often a warp goes on along a row at most; a wider row is shared by warps
MAX_D = 8192  # the widest row that registers hold


@triton.jit
def columns(ROUNDS: tl.constexpr, LANES: tl.constexpr):
    """The columns of a tile [BLOCK_M, ROUNDS, LANES], whose warps lie along rows, so that one warp
    can sum a row.
    """
    return tl.arange(0, ROUNDS)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]


@triton.jit
def row_sum(t):
    """Sums [BLOCK_M, 1, 1] of the rows of a tile."""
    return tl.sum(tl.sum(t, axis=1, keep_dims=True), axis=2, keep_dims=True)


def row_config(D: int, elements: int, warp_elements: int) -> dict:
    """Sizes and warps of a tile of rows D wide, of about `elements` numbers in all, of which a warp
    holds `warp_elements`.
    """
    block_d = next_power_of_2(D)
    block_m = max(1, elements // block_d)
    lanes = min(block_d, max(LANES, block_d // ROUNDS))
    return dict(
        BLOCK_M=block_m,
        ROUNDS=block_d // lanes,
        LANES=lanes,
        num_warps=min(32, max(1, block_m * block_d // warp_elements)),
    )


def contiguous_rows(t: Tensor | None) -> Tensor | None:
    """t, copied unless its last dimension is contiguous. Weights and incoming gradients may have
    any layout: the gradient of a sum is expanded.
    """
    return t if t is None or t.stride(-1) == 1 else t.contiguous()
