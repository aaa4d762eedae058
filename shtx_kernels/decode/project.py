"""Matrix products of one row, or of a few, with the norm before and the activation after them.

    x_s = x[m], or its second half from x[m - dilation], or the last `taps` rows side by side
    out[m] = activation(weight norm(x_s) + bias) + residual[m]

For one sequence, all that takes time is reading the weights: a program reads whole rows of a
weight, the first of them ahead of x. Several sequences are a small matrix product, and x is
normalized before it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decode_arguments import Projection
from ..launch import accumulator, cdiv, launch, next_power_of_2
from ._device import activate, ahead, normalize, rings_of, row_of, starts, wait
from ._many import project_many
from ._projection import Levels, source, weights_of

# Elements of a weight in a tile, and about how many programs: so few that the next launch has room
# beside them, and can fetch ahead. On an H200 the best of (4096, 528), (8192, 264), (16384, 132).
ROW_ELEMENTS, PROGRAMS = 4096, 528


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
    (_project_row if alone else project_many)(position, projections)
