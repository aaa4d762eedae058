"""Matrix products of one row, or of a few, with the norm before and the activation after them.

    x_s = x[m], or its second half from x[m - dilation], or the last `taps` rows side by side
    out[m] = activation(weight norm(x_s) + bias) + residual[m]

For one sequence, all that takes time is reading the weights: a program reads whole rows of a
weight, the first of them ahead of x. Several sequences are a small matrix product, and x is
normalized before it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dot import dot
from ..decode_arguments import Projection
from ..launch import accumulator, cdiv, launch, next_power_of_2
from ._device import activate, ahead, normalize, rings_of, row_of, starts, wait

# Elements of a weight in a tile, and about how many programs: so few that the next launch has room
# beside them, and can fetch ahead. On an H200 the best of (4096, 528), (8192, 264), (16384, 132).
ROW_ELEMENTS, PROGRAMS = 4096, 528
# The tile for several sequences is as good as 32 wide, and better than 64 or 256 deep.
TILE = dict(BLOCK_O=16, BLOCK_K=128, num_warps=4)
MAX_ROWS = 64


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


@triton.jit
def project_row(
    x_ptr, weight_ptr, out_ptr, gamma_ptr, beta_ptr, bias_ptr, residual_ptr, pid, b, position,
    LEVELS: tl.constexpr, I: tl.constexpr, ACC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A product with TILES tiles of the weight, each loaded while the one before is multiplied."""
    K: tl.constexpr = LEVELS.K[I]
    O: tl.constexpr = LEVELS.O[I]
    NORM: tl.constexpr = LEVELS.NORM[I]
    ACTIVATION: tl.constexpr = LEVELS.ACTIVATION[I]
    RINGS_O: tl.constexpr = LEVELS.RINGS_O
    RINGS_R: tl.constexpr = LEVELS.RINGS_R
    TILES: tl.constexpr = LEVELS.TILES[I]
    BLOCK_O: tl.constexpr = LEVELS.BLOCK_O[I]
    BLOCK_K: tl.constexpr = LEVELS.BLOCK_K[I]
    first = pid * (TILES * BLOCK_O)
    end = tl.minimum(first + TILES * BLOCK_O, O)
    offs_k, offs_o = tl.arange(0, BLOCK_K), first + tl.arange(0, BLOCK_O)
    mask_k, token = offs_k < K, position // LEVELS.STRIDE[I]
    w_ptrs = weight_ptr + offs_k[None, :]
    mask_w = (offs_o < end)[:, None] & mask_k[None, :]
    w = tl.load(w_ptrs + offs_o[:, None] * K, mask=mask_w, other=0.0)
    gamma, beta = weights_of(gamma_ptr, beta_ptr, offs_k, mask_k, NORM, ACC)
    x_ptrs = source(x_ptr, b, position, offs_k, LEVELS, I)
    wait(AHEAD)

    x = tl.load(x_ptrs, mask=mask_k, other=0.0).to(ACC)
    x = normalize(x, gamma, beta, mask_k, K, NORM)
    for tile in range(TILES):
        rows = offs_o + tile * BLOCK_O
        after = rows + BLOCK_O
        mask_w = (after < end)[:, None] & mask_k[None, :]
        following = tl.load(w_ptrs + after[:, None] * K, mask=mask_w, other=0.0)
        if residual_ptr is not None:
            residual_ptrs = row_of(residual_ptr, b, token, RINGS_R, I) + rows
            residual = tl.load(residual_ptrs, mask=rows < O, other=0.0).to(ACC)
        y = tl.sum(w.to(ACC) * x[None, :], axis=1)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + rows, mask=rows < O, other=0.0).to(ACC)
        y = activate(y, ACTIVATION)
        if residual_ptr is not None:
            y += residual
        tl.store(row_of(out_ptr, b, token, RINGS_O, I) + rows, y, mask=rows < O)
        w = following


@triton.jit
def _project_row_kernel(
    position_ptr, x_ptrs, weight_ptrs, out_ptrs, gamma_ptrs, beta_ptrs, bias_ptrs, residual_ptrs,
    LEVELS: tl.constexpr, ACC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Every program has some rows of one level's weight for one sequence."""
    pid = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    position = tl.load(position_ptr + b)
    for i in tl.static_range(len(x_ptrs)):
        if (pid >= LEVELS.START[i]) & (pid < LEVELS.START[i + 1]):
            if position % LEVELS.STRIDE[i] == 0:
                project_row(
                    x_ptrs[i], weight_ptrs[i], out_ptrs[i], gamma_ptrs[i], beta_ptrs[i],
                    bias_ptrs[i], residual_ptrs[i], pid - LEVELS.START[i], b, position,
                    LEVELS, i, ACC, AHEAD,
                )  # fmt: skip
            else:
                wait(AHEAD)


@triton.jit
def store_normed(
    x_ptr, out_ptr, gamma_ptr, beta_ptr, b, position, LEVELS: tl.constexpr, I: tl.constexpr
):
    """Store the row of a level that is multiplied, normalized."""
    K: tl.constexpr = LEVELS.K[I]
    NORM: tl.constexpr = LEVELS.NORM[I]
    offs = tl.arange(0, LEVELS.BLOCK_K[I])
    mask = offs < K
    pointers = source(x_ptr, b, position, offs, LEVELS, I)
    x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    gamma, beta = weights_of(gamma_ptr, beta_ptr, offs, mask, NORM, tl.float32)
    x = normalize(x, gamma, beta, mask, K, NORM)
    tl.store(out_ptr + b * K + offs, x, mask=mask)


@triton.jit
def _normed_kernel(position_ptr, x_ptrs, out_ptrs, gamma_ptrs, beta_ptrs, LEVELS: tl.constexpr):
    """Every program has one level of one sequence."""
    pid = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    position = tl.load(position_ptr + b)
    for i in tl.static_range(len(x_ptrs)):
        if (pid == i) & (position % LEVELS.STRIDE[i] == 0):
            store_normed(
                x_ptrs[i], out_ptrs[i], gamma_ptrs[i], beta_ptrs[i], b, position, LEVELS, i
            )


@triton.jit
def project_rows(
    position_ptr, x_ptr, weight_ptr, out_ptr, bias_ptr, residual_ptr, tile, B,
    LEVELS: tl.constexpr, I: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_B, BLOCK_O] of a product, for the sequences that make a token now."""
    K: tl.constexpr = LEVELS.K[I]
    O: tl.constexpr = LEVELS.O[I]
    STRIDE: tl.constexpr = LEVELS.STRIDE[I]
    ACTIVATION: tl.constexpr = LEVELS.ACTIVATION[I]
    RINGS_O: tl.constexpr = LEVELS.RINGS_O
    RINGS_R: tl.constexpr = LEVELS.RINGS_R
    b = (tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    position = tl.load(position_ptr + b, mask=b < B, other=1)
    due, token = (b < B) & (position % STRIDE == 0), position // STRIDE
    if tl.max(due.to(tl.int32)) > 0:
        offs_o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
        y = tl.zeros([BLOCK_B, BLOCK_O], dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            w_ptrs = weight_ptr + offs_o[:, None] * K + offs_k[None, :]
            w = tl.load(w_ptrs, mask=(offs_o < O)[:, None] & (offs_k < K)[None, :], other=0.0)
            x_ptrs = x_ptr + b * K + offs_k[None, :]
            x = tl.load(x_ptrs, mask=due & (offs_k < K)[None, :], other=0.0)
            y = dot(x, w.T, y, tl.float32, "ieee")
        offs_o = offs_o[None, :]
        mask = due & (offs_o < O)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + offs_o, mask=offs_o < O, other=0.0)
        y = activate(y, ACTIVATION)
        if residual_ptr is not None:
            y += tl.load(row_of(residual_ptr, b, token, RINGS_R, I) + offs_o, mask=mask, other=0.0)
        tl.store(row_of(out_ptr, b, token, RINGS_O, I) + offs_o, y, mask=mask)


@triton.jit(do_not_specialize=["B"])
def _project_rows_kernel(
    position_ptr, x_ptrs, weight_ptrs, out_ptrs, bias_ptrs, residual_ptrs, B,
    LEVELS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Every program has a tile of one level's product for BLOCK_B sequences."""
    pid = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(x_ptrs)):
        if (pid >= LEVELS.START[i]) & (pid < LEVELS.START[i + 1]):
            project_rows(
                position_ptr, x_ptrs[i], weight_ptrs[i], out_ptrs[i], bias_ptrs[i],
                residual_ptrs[i], pid - LEVELS.START[i], B,
                LEVELS, i, BLOCK_B, BLOCK_O, BLOCK_K,
            )  # fmt: skip


def _project_row(position: Tensor, projections: list[Projection]) -> None:
    each = Projection(*zip(*projections, strict=True))
    O, K = zip(*(w.shape for w in each.weight), strict=True)
    columns = tuple(map(next_power_of_2, K))
    rows = [max(1, ROW_ELEMENTS // k) for k in columns]
    rows = tuple(min(n, next_power_of_2(o)) for n, o in zip(rows, O, strict=True))
    tiles = [cdiv(o, n) for o, n in zip(O, rows, strict=True)]
    TILES = tuple(cdiv(n * len(projections), PROGRAMS) for n in tiles)
    START = starts([cdiv(n, t) for n, t in zip(tiles, TILES, strict=True)])
    levels = Levels(
        K, each.stride, START, O, each.dilation, each.taps, each.norm, each.activation,
        RINGS_X=rings_of(each.x), RINGS_O=rings_of(each.out), RINGS_R=rings_of(each.residual),
        TILES=TILES, BLOCK_O=rows, BLOCK_K=columns,
    )  # fmt: skip
    launch(
        _project_row_kernel, (START[-1], len(position)),
        position, each.x, each.weight, each.out, each.gamma, each.beta, each.bias, each.residual,
        LEVELS=levels, ACC=accumulator(each.weight[0].dtype), num_warps=4,
        **ahead(position.device),
    )  # fmt: skip


def _project_rows(position: Tensor, projections: list[Projection]) -> None:
    each = Projection(*zip(*projections, strict=True))
    O, K = zip(*(w.shape for w in each.weight), strict=True)
    B, x = len(position), each.x
    if any(p.norm or p.taps or p.x.shape[1] > 1 or not p.x.is_contiguous() for p in projections):
        x = tuple(t.new_empty(B, k) for t, k in zip(each.x, K, strict=True))
        levels = Levels(
            K, each.stride, DILATION=each.dilation, TAPS=each.taps, NORM=each.norm,
            RINGS_X=rings_of(each.x), BLOCK_K=tuple(map(next_power_of_2, K)),
        )  # fmt: skip
        launch(
            _normed_kernel, (len(x), B),
            position, each.x, x, each.gamma, each.beta, LEVELS=levels, num_warps=4,
        )  # fmt: skip
    BLOCK_B = min(MAX_ROWS, max(16, next_power_of_2(B)))
    START = starts([cdiv(o, TILE["BLOCK_O"]) for o in O])
    levels = Levels(
        K, each.stride, START, O, ACTIVATION=each.activation,
        RINGS_O=rings_of(each.out), RINGS_R=rings_of(each.residual),
    )  # fmt: skip
    launch(
        _project_rows_kernel, (START[-1], cdiv(B, BLOCK_B)),
        position, x, each.weight, each.out, each.bias, each.residual, B,
        LEVELS=levels, BLOCK_B=BLOCK_B, **TILE,
    )  # fmt: skip


def project(position: Tensor, projections: list[Projection]) -> None:
    """out = activation(weight norm(token_shift(x)) + bias) + residual, for the level token that
    each position makes.

    With taps, x is a ring of positions, and the rows of the last `taps` positions are multiplied
    side by side.

    Args:
        position: (B,) int64.
        projections: one per level.

    Source: simple-hierarchical-transformer, one token at a time.
    """
    if not projections or not len(position):
        return
    alone = len(position) == 1 or projections[0].weight.dtype == torch.float64
    (_project_row if alone else _project_rows)(position, projections)
