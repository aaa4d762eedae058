"""The constants of products, and where they find a row; of one sequence, or of several."""

from typing import NamedTuple

import triton
import triton.language as tl

from ._device import row_of


class Levels(NamedTuple):
    """The constants that a kernel is compiled for, one entry per level; None: it reads none."""

    K: tuple[int, ...]  # channels that are multiplied, of all taps
    STRIDE: tuple[int, ...]  # tokens per token of the level
    START: tuple[int, ...] | None = None  # first programs
    O: tuple[int, ...] | None = None  # channels of the result
    DILATION: tuple[int, ...] | None = None  # how far back the token shift reads, or 0
    TAPS: tuple[int, ...] | None = None  # positions side by side, or 0
    NORM: tuple[str | None, ...] | None = None
    ACTIVATION: tuple[str | None, ...] | None = None
    RINGS_X: tuple | None = None
    RINGS_O: tuple | None = None
    RINGS_R: tuple | None = None  # those of residuals
    TILES: tuple[int, ...] | None = None  # tiles of a program
    BLOCK_O: tuple[int, ...] | None = None  # channels of the result in a tile
    BLOCK_K: tuple[int, ...] | None = None  # channels that are multiplied in a tile, at least K


@triton.jit
def source(x_ptr, b, position, offs_k, LEVELS: tl.constexpr, I: tl.constexpr):
    """Pointers to channels offs_k of the row that is multiplied."""
    K: tl.constexpr = LEVELS.K[I]
    DILATION: tl.constexpr = LEVELS.DILATION[I]
    TAPS: tl.constexpr = LEVELS.TAPS[I]
    RINGS: tl.constexpr = LEVELS.RINGS_X
    if TAPS > 0:
        width: tl.constexpr = K // TAPS
        token = position - (TAPS - 1) + offs_k // width
        pointers = row_of(x_ptr, b, token, RINGS, I) + offs_k % width
    else:
        token = position // LEVELS.STRIDE[I]
        if DILATION > 0:
            token = tl.where(offs_k < (K + 1) // 2, token, token - DILATION)
        pointers = row_of(x_ptr, b, token, RINGS, I) + offs_k
    return pointers


@triton.jit
def weights_of(gamma_ptr, beta_ptr, offs, mask, NORM: tl.constexpr, ACC: tl.constexpr):
    """gamma and beta of a norm; zeros for those that it does not have."""
    gamma, beta = tl.zeros(offs.shape, dtype=ACC), tl.zeros(offs.shape, dtype=ACC)
    if NORM is not None:
        gamma = tl.load(gamma_ptr + offs, mask=mask, other=0.0).to(ACC)
    if NORM == "layer":
        beta = tl.load(beta_ptr + offs, mask=mask, other=0.0).to(ACC)
    return gamma, beta
