"""Matrix products of rows of many sequences.

    y = scale weight x_s,   scale = 1 for no norm, sqrt(K) / |x_s| for "rms"
    y = (weight x_s - mean sum_k weight_k) / deviation, for "layer"

A program multiplies a tile of rows of x by one of rows of a weight, and while it reads x it adds up
what a norm needs to know of a row, so that x is not normalized before. Where the tiles are too few
for the GPU, the channels that are multiplied are divided into parts, whose sums stand in memory
side by side; the next launch adds them, in order. After a norm they are not: such a weight has more
rows than others.

A row x_s is multiplied in pieces that stand in one place of memory each: its taps, or the halves
that a token shift has of two tokens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dot import dot
from ..decode_arguments import Projection
from ..launch import cdiv, launch
from ._device import activate, ahead, fetch, rings_of, row_of, starts, wait
from ._tiles import rows_and_tiles

FETCHED = 1024  # columns of a weight that a program fetches before it waits
ADDED = dict(BLOCK_B=8, BLOCK_O=128)  # the tile of what is added


class Levels(NamedTuple):
    """The constants that a kernel is compiled for, one entry per level."""

    K: tuple[int, ...]  # channels that are multiplied, of all pieces
    O: tuple[int, ...]  # channels of the result
    STRIDE: tuple[int, ...]  # tokens per token of the level
    DILATION: tuple[int, ...]  # how far back the token shift reads, or 0
    TAPS: tuple[int, ...]  # positions side by side, or 0
    NORM: tuple[str | None, ...]
    ACTIVATION: tuple[str | None, ...]
    RINGS_X: tuple
    RINGS_O: tuple
    RINGS_R: tuple  # those of residuals
    PARTS: tuple[int, ...]
    START: tuple[int, ...]  # first programs


@triton.jit
def rows_of(position_ptr, B, BLOCK_B: tl.constexpr):
    """The sequences of a program, and their positions; those past the end have position 1."""
    b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    return b[:, None], tl.load(position_ptr + b, mask=b < B, other=1)[:, None]


@triton.jit
def load_bias(bias_ptr, offs_o, LEVELS: tl.constexpr, I: tl.constexpr):
    """The bias [1, BLOCK_O] in fp32, zeros where there is none."""
    bias = tl.zeros([1, offs_o.shape[0]], dtype=tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + offs_o, mask=offs_o < LEVELS.O[I], other=0.0)[None, :]
    return bias


@triton.jit
def load_residual(residual_ptr, b, token, offs_o, due, LEVELS: tl.constexpr, I: tl.constexpr):
    """The residual, zeros where there is none, and which elements of the tile are due."""
    RINGS: tl.constexpr = LEVELS.RINGS_R
    mask = due & (offs_o < LEVELS.O[I])[None, :]
    residual = tl.zeros(mask.shape, dtype=tl.float32)
    if residual_ptr is not None:
        pointers = row_of(residual_ptr, b, token, RINGS, I) + offs_o[None, :]
        residual = tl.load(pointers, mask=mask, other=0.0)
    return residual, mask


@triton.jit
def store_result(
    y, bias, residual, out_ptr, b, token, offs_o, mask, LEVELS: tl.constexpr, I: tl.constexpr
):
    """Store activation(y + bias) + residual where `mask` is."""
    ACTIVATION: tl.constexpr = LEVELS.ACTIVATION[I]
    RINGS: tl.constexpr = LEVELS.RINGS_O
    y = activate(y + bias, ACTIVATION) + residual.to(tl.float32)
    tl.store(row_of(out_ptr, b, token, RINGS, I) + offs_o[None, :], y, mask=mask)


@triton.jit
def scaled(y, mean, squares, weights, K: tl.constexpr, NORM: tl.constexpr):
    """The product y [BLOCK_B, BLOCK_O] of rows x as if they had been normalized.

    Args:
        mean, squares: [BLOCK_B, 1], of a row x, and the sum of squares of what it is off its mean;
            for "rms" of its own squares.
        weights: [1, BLOCK_O], the sums of the rows of the weight.
    """
    if NORM == "rms":
        y *= K**0.5 / tl.maximum(tl.sqrt(squares), 1e-12)
    elif NORM == "layer":
        y = (y - mean * weights) / tl.sqrt(squares / K + 1e-5)
    return y


@triton.jit
def spread(x, mask, mean, squares, seen, count):
    """The mean of x [BLOCK_B, BLOCK_K] and of `seen` numbers before, and the sum of squares of what
    all are off it. `count` numbers of a row are not masked.
    """
    total = seen + count
    own = tl.sum(x, axis=1)[:, None] / tl.maximum(count, 1.0)
    off = tl.where(mask, x - own, 0.0)
    step = own - mean
    squares += tl.sum(off * off, axis=1)[:, None] + step * step * (seen * count / total)
    return mean + step * (count / total), squares


@triton.jit
def multiply(
    x_ptr, weight_ptr, b, position, due, offs_o, first, last,
    LEVELS: tl.constexpr, I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The product with channels of steps `first` to `last`, normalized if these are all."""
    K: tl.constexpr = LEVELS.K[I]
    O: tl.constexpr = LEVELS.O[I]
    DILATION: tl.constexpr = LEVELS.DILATION[I]
    TAPS: tl.constexpr = LEVELS.TAPS[I]
    NORM: tl.constexpr = LEVELS.NORM[I]
    RINGS_X: tl.constexpr = LEVELS.RINGS_X
    WIDTH: tl.constexpr = K // TAPS if TAPS > 0 else (K + 1) // 2 if DILATION > 0 else K
    STEPS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    token = position // LEVELS.STRIDE[I]
    y = tl.zeros([b.shape[0], offs_o.shape[0]], dtype=tl.float32)
    mean, squares = tl.zeros(b.shape, dtype=tl.float32), tl.zeros(b.shape, dtype=tl.float32)
    weights, seen = tl.zeros([offs_o.shape[0], 1], dtype=tl.float32), 0.0
    for step in range(first, last):
        piece = step // STEPS
        start = step % STEPS * BLOCK_K
        within = start + tl.arange(0, BLOCK_K)
        columns = piece * WIDTH + within
        mask_k = (within < WIDTH) & (columns < K)
        if TAPS > 0:
            x_row = row_of(x_ptr, b, position - (TAPS - 1) + piece, RINGS_X, I) + within[None, :]
        else:
            x_row = row_of(x_ptr, b, token - piece * DILATION, RINGS_X, I) + columns[None, :]
        w_ptrs = weight_ptr + offs_o[:, None] * K + columns[None, :]
        x = tl.load(x_row, mask=due & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(offs_o < O)[:, None] & mask_k[None, :], other=0.0)
        y = dot(x, w.T, y, tl.float32, "ieee")
        wide = x.to(tl.float32)
        if NORM == "rms":
            squares += tl.sum(wide * wide, axis=1)[:, None]
        elif NORM == "layer":
            left = tl.minimum(WIDTH, K - piece * WIDTH) - start
            count = tl.minimum(tl.maximum(left, 0), BLOCK_K).to(tl.float32)
            mean, squares = spread(wide, mask_k[None, :], mean, squares, seen, count)
            weights += tl.sum(w.to(tl.float32), axis=1)[:, None]
            seen += count
    return scaled(y, mean, squares, weights.T, K, NORM)


@triton.jit
def project_tile(
    position_ptr, x_ptr, weight_ptr, out_ptr, bias_ptr, residual_ptr, parts_ptr, pid, B,
    LEVELS: tl.constexpr, I: tl.constexpr,
    BLOCK_B: tl.constexpr, TILE: tl.constexpr, FETCHED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A tile of the result, or of one of the parts that it is the sum of; TILE is (BLOCK_O,
    BLOCK_K).
    """
    K: tl.constexpr = LEVELS.K[I]
    O: tl.constexpr = LEVELS.O[I]
    PARTS: tl.constexpr = LEVELS.PARTS[I]
    TAPS: tl.constexpr = LEVELS.TAPS[I]
    BLOCK_K: tl.constexpr = TILE[1]
    PIECES: tl.constexpr = TAPS if TAPS > 0 else 2 if LEVELS.DILATION[I] > 0 else 1
    STEPS: tl.constexpr = PIECES * (((K + PIECES - 1) // PIECES + BLOCK_K - 1) // BLOCK_K)
    SHARE: tl.constexpr = (STEPS + PARTS - 1) // PARTS
    COLUMNS: tl.constexpr = min(SHARE * BLOCK_K, FETCHED)
    part = (pid % PARTS).to(tl.int32)
    offs_o = pid // PARTS * TILE[0] + tl.arange(0, TILE[0])
    first, last = part * SHARE, tl.minimum((part + 1) * SHARE, STEPS)
    b, position = rows_of(position_ptr, B, BLOCK_B)
    due = (b < B) & (position % LEVELS.STRIDE[I] == 0)
    some = tl.max(due.to(tl.int32)) > 0
    if some:
        fetch(weight_ptr, tl.minimum(offs_o, O - 1), first * BLOCK_K, K, COLUMNS, AHEAD)
    if PARTS == 1:
        bias = load_bias(bias_ptr, offs_o, LEVELS, I)
    wait(AHEAD)

    if some:
        if PARTS == 1:
            token = position // LEVELS.STRIDE[I]
            residual, mask = load_residual(residual_ptr, b, token, offs_o, due, LEVELS, I)
        y = multiply(x_ptr, weight_ptr, b, position, due, offs_o, first, last, LEVELS, I, BLOCK_K)
        if PARTS == 1:
            store_result(y, bias, residual, out_ptr, b, token, offs_o, mask, LEVELS, I)
        else:
            y_ptrs = parts_ptr + (part.to(tl.int64) * B + b) * O + offs_o[None, :]
            tl.store(y_ptrs, y, mask=due & (offs_o < O)[None, :])


@triton.jit(do_not_specialize=["B"])
def _project_rows_kernel(
    position_ptr, x_ptrs, weight_ptrs, out_ptrs, bias_ptrs, residual_ptrs, parts_ptrs, B,
    LEVELS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    FETCHED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Every program has a tile of one level's product, or of a part, for BLOCK_B sequences."""
    pid = tl.program_id(0).to(tl.int64)
    TILE: tl.constexpr = (BLOCK_O, BLOCK_K)
    for i in tl.static_range(len(x_ptrs)):
        if (pid >= LEVELS.START[i]) & (pid < LEVELS.START[i + 1]):
            project_tile(
                position_ptr, x_ptrs[i], weight_ptrs[i], out_ptrs[i], bias_ptrs[i],
                residual_ptrs[i], parts_ptrs[i], pid - LEVELS.START[i], B,
                LEVELS, i, BLOCK_B, TILE, FETCHED, AHEAD,
            )  # fmt: skip


@triton.jit
def add_tile(
    parts_ptr, out_ptr, bias_ptr, residual_ptr, pid, b, position, B,
    LEVELS: tl.constexpr, I: tl.constexpr, BLOCK_O: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A tile of the result, the sum of its parts."""
    O: tl.constexpr = LEVELS.O[I]
    PARTS: tl.constexpr = LEVELS.PARTS[I]
    offs_o, token = pid * BLOCK_O + tl.arange(0, BLOCK_O), position // LEVELS.STRIDE[I]
    due = (b < B) & (position % LEVELS.STRIDE[I] == 0)
    bias = load_bias(bias_ptr, offs_o, LEVELS, I)
    wait(AHEAD)

    residual, mask = load_residual(residual_ptr, b, token, offs_o, due, LEVELS, I)
    y = tl.zeros(mask.shape, dtype=tl.float32)
    for part in tl.static_range(PARTS):
        y_ptrs = parts_ptr + (part * B.to(tl.int64) + b) * O + offs_o[None, :]
        y += tl.load(y_ptrs, mask=mask, other=0.0)
    store_result(y, bias, residual, out_ptr, b, token, offs_o, mask, LEVELS, I)


@triton.jit(do_not_specialize=["B"])
def _add_parts_kernel(
    position_ptr, parts_ptrs, out_ptrs, bias_ptrs, residual_ptrs, B,
    LEVELS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Every program has a tile of one level's result."""
    pid = tl.program_id(0).to(tl.int64)
    b, position = rows_of(position_ptr, B, BLOCK_B)
    for i in tl.static_range(len(parts_ptrs)):
        if (pid >= LEVELS.START[i]) & (pid < LEVELS.START[i + 1]):
            add_tile(
                parts_ptrs[i], out_ptrs[i], bias_ptrs[i], residual_ptrs[i],
                pid - LEVELS.START[i], b, position, B, LEVELS, i, BLOCK_O, AHEAD,
            )  # fmt: skip


def project_rows(position: Tensor, projections: list[Projection]) -> None:
    """`project` for several sequences, and numbers that are at most fp32."""
    each = Projection(*zip(*projections, strict=True))
    B, device = len(position), position.device
    O, K = zip(*(w.shape for w in each.weight), strict=True)
    normed = list(map(bool, each.norm))
    BLOCK_B, BLOCK_O, parts, tile = rows_and_tiles(B, each.weight, normed)
    levels = Levels(
        K, O, each.stride, each.dilation, each.taps, each.norm, each.activation, rings_of(each.x),
        rings_of(each.out), rings_of(each.residual), tuple(parts),
        starts([cdiv(o, BLOCK_O) * n for o, n in zip(O, parts, strict=True)]),
    )  # fmt: skip
    sums = tuple(
        torch.empty(n, B, o, dtype=torch.float32, device=device) if n > 1 else None
        for o, n in zip(O, parts, strict=True)
    )
    launch(
        _project_rows_kernel, (levels.START[-1], cdiv(B, BLOCK_B)),
        position, each.x, each.weight, each.out, each.bias, each.residual, sums, B,
        LEVELS=levels, BLOCK_B=BLOCK_B, BLOCK_O=BLOCK_O, FETCHED=FETCHED,
        **tile, **ahead(device),
    )  # fmt: skip
    divided = [i for i, n in enumerate(parts) if n > 1]
    if divided:
        some = lambda values: tuple(values[i] for i in divided)
        START = starts([cdiv(O[i], ADDED["BLOCK_O"]) for i in divided])
        levels = Levels(*map(some, levels[:-1]), START)
        launch(
            _add_parts_kernel, (START[-1], cdiv(B, ADDED["BLOCK_B"])),
            position, some(sums), some(each.out), some(each.bias), some(each.residual), B,
            LEVELS=levels, **ADDED, **ahead(device),
        )  # fmt: skip
