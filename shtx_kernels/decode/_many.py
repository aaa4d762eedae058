"""Products of the rows of several sequences, which are normalized before.

A program has a tile of the result. One of MAX_ROWS rows starts ahead, and fetches its share of the
weight while the launch before is at work.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._dot import dot
from ..decode_arguments import Projection
from ..launch import cdiv, launch, next_power_of_2
from ._device import (
    activate,
    ahead,
    fetch,
    normalize,
    options_of_rows,
    program,
    rings_of,
    row_of,
    starts,
    wait,
)
from ._projection import Levels, source, weights_of

# See `options_of_rows`. On an H200 the best of six deep tiles for 4 to 256 rows together.
DEEP = dict(BLOCK_O=32, BLOCK_K=64, num_warps=4, num_stages=8)
SHALLOW = dict(BLOCK_O=16, BLOCK_K=128, num_warps=4)
FETCHED = 1024  # columns of a weight that a program of several sequences fetches before it waits


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
def _normed_kernel(
    position_ptr, x_ptrs, out_ptrs, gamma_ptrs, beta_ptrs,
    LEVELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Every program has one level of one sequence."""
    pid, b, position = program(position_ptr)
    wait(AHEAD)
    for i in tl.static_range(len(x_ptrs)):
        if (pid == i) & (position % LEVELS.STRIDE[i] == 0):
            store_normed(
                x_ptrs[i], out_ptrs[i], gamma_ptrs[i], beta_ptrs[i], b, position, LEVELS, i
            )


@triton.jit
def project_rows(
    position_ptr, x_ptr, weight_ptr, out_ptr, bias_ptr, residual_ptr, tile, B,
    LEVELS: tl.constexpr, I: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr, FETCHED: tl.constexpr, AHEAD: tl.constexpr,
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
    some = tl.max(due.to(tl.int32)) > 0
    offs_o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    if some:
        LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth  # 128 bytes
        offs_k = tl.arange(0, FETCHED // LINE) * LINE
        lines = weight_ptr + offs_o[:, None] * K + offs_k[None, :]
        fetch(lines, (offs_o < O)[:, None] & (offs_k < K)[None, :], AHEAD)
    wait(AHEAD)

    if some:
        y = tl.zeros([BLOCK_B, BLOCK_O], dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            w_ptrs = weight_ptr + offs_o[:, None] * K + offs_k[None, :]
            w = tl.load(w_ptrs, mask=(offs_o < O)[:, None] & (offs_k < K)[None, :], other=0.0)
            x_ptrs = x_ptr + b * K + offs_k[None, :]
            x = tl.load(x_ptrs, mask=due & (offs_k < K)[None, :], other=0.0)
            y = dot(x, w.T, y, tl.float32, "ieee")
        columns = offs_o[None, :]
        mask = due & (columns < O)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + columns, mask=columns < O, other=0.0)
        y = activate(y, ACTIVATION)
        if residual_ptr is not None:
            y += tl.load(row_of(residual_ptr, b, token, RINGS_R, I) + columns, mask=mask, other=0.0)
        tl.store(row_of(out_ptr, b, token, RINGS_O, I) + columns, y, mask=mask)


@triton.jit(do_not_specialize=["B"])
def _project_rows_kernel(
    position_ptr, x_ptrs, weight_ptrs, out_ptrs, bias_ptrs, residual_ptrs, B,
    LEVELS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr, FETCHED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Every program has a tile of one level's product for BLOCK_B sequences."""
    pid = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(x_ptrs)):
        if (pid >= LEVELS.START[i]) & (pid < LEVELS.START[i + 1]):
            project_rows(
                position_ptr, x_ptrs[i], weight_ptrs[i], out_ptrs[i], bias_ptrs[i],
                residual_ptrs[i], pid - LEVELS.START[i], B,
                LEVELS, i, BLOCK_B, BLOCK_O, BLOCK_K, FETCHED, AHEAD,
            )  # fmt: skip


def project_many(position: Tensor, projections: list[Projection]) -> None:
    """`project` for several sequences, and numbers that are at most fp32."""
    each = Projection(*zip(*projections, strict=True))
    O, K = zip(*(w.shape for w in each.weight), strict=True)
    B, x = len(position), each.x
    options = options_of_rows(B, each.weight[0], DEEP, SHALLOW)
    if any(p.norm or p.taps or p.x.shape[1] > 1 or not p.x.is_contiguous() for p in projections):
        x = tuple(t.new_empty(B, k) for t, k in zip(each.x, K, strict=True))
        levels = Levels(
            K, each.stride, DILATION=each.dilation, TAPS=each.taps, NORM=each.norm,
            RINGS_X=rings_of(each.x), BLOCK_K=tuple(map(next_power_of_2, K)),
        )  # fmt: skip
        launch(
            _normed_kernel, (len(x), B),
            position, each.x, x, each.gamma, each.beta, LEVELS=levels, num_warps=4,
            **ahead(position.device, options["AHEAD"]),
        )  # fmt: skip
    START = starts([cdiv(o, options["BLOCK_O"]) for o in O])
    levels = Levels(
        K, each.stride, START, O, ACTIVATION=each.activation,
        RINGS_O=rings_of(each.out), RINGS_R=rings_of(each.residual),
    )  # fmt: skip
    launch(
        _project_rows_kernel, (START[-1], cdiv(B, options["BLOCK_B"])),
        position, x, each.weight, each.out, each.bias, each.residual, B,
        LEVELS=levels, FETCHED=FETCHED, **options,
    )  # fmt: skip
