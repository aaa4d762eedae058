"""Matrix products of rows of many sequences.

    y = scale weight x_s,   scale = 1 for no norm, sqrt(K) / |x_s| for "rms"
    y = (weight x_s - mean sum_k weight_k) / deviation, for "layer"

A program multiplies up to MAX_ROWS rows of x by BLOCK_O rows of a weight. Every program reads its x
again, and with it adds up what a norm needs to know of a row, so that x is not normalized before.
The fewer programs, the less is read; and where they are too few for the GPU, the channels that are
multiplied are divided into parts. Their sums stand in memory side by side, and the next launch adds
them, in order. A weight that follows a norm is not divided: it has more rows than others.

A row x_s is multiplied in pieces that stand in one place of memory each: its taps, or the halves
that a token shift has of two tokens.
"""

from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dot import dot
from .._target import capability
from ..decode_arguments import Projection
from ..launch import cdiv, launch, next_power_of_2
from ._device import activate, ahead, fetch, rings_of, row_of, starts, wait

MAX_ROWS = 64
# Tiles of 16-bit numbers, and of fp32, which no tensor core multiplies exactly.
NARROW = dict(BLOCK_K=64, num_warps=4, num_stages=4)
WIDE = dict(BLOCK_K=32, num_warps=4, num_stages=2)
# The choices of BLOCK_O for 16-bit numbers, and of a program's share of the channels.
WIDTHS, SHARES = (16, 32, 64, 128), (512, 1024, 2048, 2**31)
PROCESSORS = 132
# Numbers that a multiprocessor reads in the time of a launch that adds parts.
LAUNCH = 48 * 1024
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
def store_result(
    y, out_ptr, bias_ptr, residual_ptr, b, token, offs_o, due, LEVELS: tl.constexpr, I: tl.constexpr
):
    """Store activation(y + bias) + residual where a row is due."""
    O: tl.constexpr = LEVELS.O[I]
    ACTIVATION: tl.constexpr = LEVELS.ACTIVATION[I]
    RINGS_O: tl.constexpr = LEVELS.RINGS_O
    RINGS_R: tl.constexpr = LEVELS.RINGS_R
    offs_o = offs_o[None, :]
    mask = due & (offs_o < O)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_o, mask=offs_o < O, other=0.0)
    y = activate(y, ACTIVATION)
    if residual_ptr is not None:
        y += tl.load(row_of(residual_ptr, b, token, RINGS_R, I) + offs_o, mask=mask, other=0.0)
    tl.store(row_of(out_ptr, b, token, RINGS_O, I) + offs_o, y, mask=mask)


@triton.jit
def scaled(y, shift, sums, squares, weights, K: tl.constexpr, NORM: tl.constexpr):
    """The product y of rows x as if they had been normalized.

    Args:
        y: [BLOCK_B, BLOCK_O].
        shift, sums, squares: [BLOCK_B, 1], a number, and the sums of x - shift and of its squares.
        weights: [1, BLOCK_O], the sums of the rows of the weight.
    """
    if NORM == "rms":
        y *= K**0.5 / tl.maximum(tl.sqrt(squares), 1e-12)
    elif NORM == "layer":
        mean = sums / K
        variance = tl.maximum(squares / K - mean * mean, 0.0)
        y = (y - (shift + mean) * weights) / tl.sqrt(variance + 1e-5)
    return y


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
    shift, sums = tl.zeros(b.shape, dtype=tl.float32), tl.zeros(b.shape, dtype=tl.float32)
    squares, weights = sums, tl.zeros([1, offs_o.shape[0]], dtype=tl.float32)
    if NORM == "layer":  # squares of numbers near the mean keep their digits
        shift += tl.load(row_of(x_ptr, b, token, RINGS_X, I), mask=due, other=0.0)
    for step in range(first, last):
        piece = step // STEPS
        within = (step % STEPS) * BLOCK_K + tl.arange(0, BLOCK_K)
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
        if NORM is not None:
            near = tl.where(mask_k[None, :], x.to(tl.float32) - shift, 0.0)
            squares += tl.sum(near * near, axis=1)[:, None]
        if NORM == "layer":
            sums += tl.sum(near, axis=1)[:, None]
            weights += tl.sum(w.to(tl.float32), axis=1)[None, :]
    return scaled(y, shift, sums, squares, weights, K, NORM)


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
        fetch(weight_ptr, tl.minimum(offs_o, O - 1), first * BLOCK_K, K, K, COLUMNS, AHEAD)
    wait(AHEAD)

    if some:
        y = multiply(x_ptr, weight_ptr, b, position, due, offs_o, first, last, LEVELS, I, BLOCK_K)
        if PARTS == 1:
            token = position // LEVELS.STRIDE[I]
            store_result(y, out_ptr, bias_ptr, residual_ptr, b, token, offs_o, due, LEVELS, I)
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
    parts_ptr, out_ptr, bias_ptr, residual_ptr, b, position, offs_o, B,
    LEVELS: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """A tile of the result, the sum of its parts."""
    O: tl.constexpr = LEVELS.O[I]
    due = (b < B) & (position % LEVELS.STRIDE[I] == 0)
    mask = due & (offs_o < O)[None, :]
    y = tl.zeros([b.shape[0], offs_o.shape[0]], dtype=tl.float32)
    for part in tl.static_range(LEVELS.PARTS[I]):
        y_ptrs = parts_ptr + (part * B.to(tl.int64) + b) * O + offs_o[None, :]
        y += tl.load(y_ptrs, mask=mask, other=0.0)
    token = position // LEVELS.STRIDE[I]
    store_result(y, out_ptr, bias_ptr, residual_ptr, b, token, offs_o, due, LEVELS, I)


@triton.jit(do_not_specialize=["B"])
def _add_parts_kernel(
    position_ptr, parts_ptrs, out_ptrs, bias_ptrs, residual_ptrs, B,
    LEVELS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Every program has a tile of one level's result."""
    pid = tl.program_id(0).to(tl.int64)
    b, position = rows_of(position_ptr, B, BLOCK_B)
    wait(AHEAD)
    for i in tl.static_range(len(parts_ptrs)):
        if (pid >= LEVELS.START[i]) & (pid < LEVELS.START[i + 1]):
            offs_o = (pid - LEVELS.START[i]) * BLOCK_O + tl.arange(0, BLOCK_O)
            add_tile(
                parts_ptrs[i], out_ptrs[i], bias_ptrs[i], residual_ptrs[i], b, position, offs_o, B,
                LEVELS, i,
            )  # fmt: skip


def tiles_of(
    shapes: list[tuple[int, int]], normed: list[bool], widths: tuple[int, ...]
) -> tuple[int, list[int]]:
    """Return BLOCK_O, and how many parts the channels of each level are divided into, so that the
    busiest multiprocessor reads least. They depend on no batch: a row's sums are the same in all.

    Args:
        shapes: (O, K) of the weights.
        normed: which of them follow a norm.
        widths: the choices of BLOCK_O.
    """

    def parts_of(share: int) -> list[int]:
        return [1 if n else cdiv(k, share) for (_, k), n in zip(shapes, normed, strict=True)]

    def cost(choice: tuple[int, int]) -> float:
        width, parts = choice[0], parts_of(choice[1])
        each = [(width + MAX_ROWS) * cdiv(k, n) for (_, k), n in zip(shapes, parts, strict=True)]
        programs = [cdiv(o, width) * n for (o, _), n in zip(shapes, parts, strict=True)]
        total = sum(n * reads for n, reads in zip(programs, each, strict=True))
        # a multiprocessor alone reads twice as fast as it does when all of them read
        return max(total / PROCESSORS, max(each) / 2) + LAUNCH * (max(parts) > 1)

    width, share = min(product(widths, SHARES), key=cost)
    return width, parts_of(share)


def project_rows(position: Tensor, projections: list[Projection]) -> None:
    """`project` for several sequences, and numbers that are at most fp32."""
    each = Projection(*zip(*projections, strict=True))
    B, device, wide = len(position), position.device, each.weight[0].dtype == torch.float32
    shapes = [tuple(w.shape) for w in each.weight]
    BLOCK_O, parts = tiles_of(shapes, list(map(bool, each.norm)), WIDTHS[:1] if wide else WIDTHS)
    O, K = zip(*shapes, strict=True)
    levels = Levels(
        K, O, each.stride, each.dilation, each.taps, each.norm, each.activation, rings_of(each.x),
        rings_of(each.out), rings_of(each.residual), tuple(parts),
        starts([cdiv(o, BLOCK_O) * n for o, n in zip(O, parts, strict=True)]),
    )  # fmt: skip
    options = dict(num_stages=2) if capability(device) == 0 else {}
    sums = tuple(
        torch.empty(n, B, o, dtype=torch.float32, device=device) if n > 1 else None
        for o, n in zip(O, parts, strict=True)
    )
    BLOCK_B = min(MAX_ROWS, max(16, next_power_of_2(B)))
    launch(
        _project_rows_kernel, (levels.START[-1], cdiv(B, BLOCK_B)),
        position, each.x, each.weight, each.out, each.bias, each.residual, sums, B,
        LEVELS=levels, BLOCK_B=BLOCK_B, BLOCK_O=BLOCK_O, FETCHED=FETCHED,
        **(WIDE if wide else NARROW) | options | ahead(device),
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
