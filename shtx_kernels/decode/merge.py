"""The first product of a merge.

    out = silu(sum over levels of (weight_l x_l[m_l]) sqrt(D) / |x| + bias),  |x|^2 = sum of |x_l|^2

A level makes tokens at its own rate. While it makes none, the product of its last token and the
square of the norm of that are read from `kept`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dot import dot
from ..decode_arguments import Part
from ..launch import accumulator, cdiv, launch, next_power_of_2
from ._device import ahead, options_of_rows, program, rings_of, row_of, starts, wait

ROW_ELEMENTS = 8192  # elements of a weight that a program reads
# The tiles for several sequences: see `options_of_rows`. On an H200 the best of five deep ones.
DEEP = dict(BLOCK_J=16, BLOCK_K=64, num_warps=4, num_stages=8)
SHALLOW = dict(BLOCK_J=16, BLOCK_K=128, num_warps=4)


class Levels(NamedTuple):
    """The constants that the kernels are compiled for, one entry per level."""

    D: tuple[int, ...]  # channels
    FIRST: tuple[int, ...]  # the first column of the weight, and how many columns there are
    STRIDE: tuple[int, ...]  # tokens per token of the level
    RINGS: tuple  # those of x


@triton.jit
def _merge_row_kernel(
    position_ptr, x_ptrs, weight_ptr, kept_ptrs, bias_ptr, out_ptr,
    J: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr, STRIDE_OB: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Every program has BLOCK_J rows of the weight for one sequence."""
    pid, b, position = program(position_ptr)
    FIRST: tl.constexpr = LEVELS.FIRST
    D: tl.constexpr = LEVELS.D
    RINGS: tl.constexpr = LEVELS.RINGS
    offs_j, offs = pid * BLOCK_J + tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_D)
    mask_j, due = offs_j < J, offs < WIDTH
    total, squares = tl.zeros([BLOCK_J], dtype=ACC), tl.zeros([], dtype=ACC)
    for i in tl.static_range(len(x_ptrs)):
        if kept_ptrs[i] is not None:
            if position % LEVELS.STRIDE[i] != 0:
                due = due & ((offs < FIRST[i]) | (offs >= FIRST[i] + D[i]))
                kept = kept_ptrs[i] + b * (J + 1)
                total += tl.load(kept + offs_j, mask=mask_j, other=0.0)
                squares += tl.load(kept + J)
    w_ptrs = weight_ptr + offs_j[:, None] * WIDTH + offs[None, :]
    w = tl.load(w_ptrs, mask=mask_j[:, None] & due[None, :], other=0.0).to(ACC)
    bias = tl.load(bias_ptr + offs_j, mask=mask_j, other=0.0).to(ACC)
    wait(AHEAD)

    x = tl.zeros([BLOCK_D], dtype=ACC)
    for i in tl.static_range(len(x_ptrs)):
        x_row = row_of(x_ptrs[i], b, position // LEVELS.STRIDE[i], RINGS, i)
        mask = due & (offs >= FIRST[i]) & (offs < FIRST[i] + D[i])
        x += tl.load(x_row + offs - FIRST[i], mask=mask, other=0.0).to(ACC)
    for i in tl.static_range(len(x_ptrs)):
        if kept_ptrs[i] is not None:
            if position % LEVELS.STRIDE[i] == 0:
                own = tl.where((offs >= FIRST[i]) & (offs < FIRST[i] + D[i]), x, 0.0)
                kept = kept_ptrs[i] + b * (J + 1)
                tl.store(kept + offs_j, tl.sum(w * own[None, :], axis=1), mask=mask_j)
                if pid == 0:
                    tl.store(kept + J, tl.sum(own * own, axis=0))
    total += tl.sum(w * x[None, :], axis=1)
    squares += tl.sum(x * x, axis=0)
    y = total * (WIDTH**0.5 / tl.maximum(tl.sqrt(squares), 1e-12)) + bias
    tl.store(out_ptr + b * STRIDE_OB + offs_j, y * tl.sigmoid(y), mask=mask_j)


@triton.jit
def part_of_rows(
    x_ptr, weight_ptr, b, token, due, offs_j,
    J: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr, I: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The product and the sums of squares of a level, for the rows that make a token now."""
    D: tl.constexpr = LEVELS.D[I]
    RINGS: tl.constexpr = LEVELS.RINGS
    product = tl.zeros([BLOCK_B, BLOCK_J], dtype=tl.float32)
    squares = tl.zeros([BLOCK_B, 1], dtype=tl.float32)
    if tl.max(due.to(tl.int32)) > 0:
        for k in range(0, D, BLOCK_K):
            offs = k + tl.arange(0, BLOCK_K)
            w_ptrs = weight_ptr + offs_j[:, None] * WIDTH + offs[None, :]
            w = tl.load(w_ptrs, mask=(offs_j < J)[:, None] & (offs < D)[None, :], other=0.0)
            x_ptrs = row_of(x_ptr, b, token, RINGS, I) + offs[None, :]
            x = tl.load(x_ptrs, mask=due & (offs < D)[None, :], other=0.0)
            product = dot(x, w.T, product, tl.float32, "ieee")
            squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)[:, None]
    return product, squares


@triton.jit(do_not_specialize=["B"])
def _merge_rows_kernel(
    position_ptr, x_ptrs, weight_ptr, kept_ptrs, bias_ptr, out_ptr, B,
    J: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr, STRIDE_OB: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Every program has BLOCK_J rows of the weight for BLOCK_B sequences."""
    pid = tl.program_id(0).to(tl.int64)
    b = (tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    offs_j = pid * BLOCK_J + tl.arange(0, BLOCK_J)
    position = tl.load(position_ptr + b, mask=b < B, other=0)
    mask = (b < B) & (offs_j < J)[None, :]
    total = tl.zeros([BLOCK_B, BLOCK_J], dtype=tl.float32)
    squares = tl.zeros([BLOCK_B, 1], dtype=tl.float32)
    wait(AHEAD)
    for i in tl.static_range(len(x_ptrs)):
        due = (b < B) & (position % LEVELS.STRIDE[i] == 0)
        product, square = part_of_rows(
            x_ptrs[i], weight_ptr + LEVELS.FIRST[i], b, position // LEVELS.STRIDE[i], due, offs_j,
            J, WIDTH, LEVELS, i, BLOCK_B, BLOCK_J, BLOCK_K,
        )  # fmt: skip
        if kept_ptrs[i] is not None:
            kept = kept_ptrs[i] + b * (J + 1)
            tl.store(kept + offs_j[None, :], product, mask=mask & due)
            tl.store(kept + J, square, mask=tl.where(pid == 0, due, False))
            past = (b < B) & (position % LEVELS.STRIDE[i] != 0)
            product += tl.load(kept + offs_j[None, :], mask=mask & past, other=0.0)
            square += tl.load(kept + J, mask=past, other=0.0)
        total += product
        squares += square
    y = total * (WIDTH**0.5 / tl.maximum(tl.sqrt(squares), 1e-12))
    y += tl.load(bias_ptr + offs_j, mask=offs_j < J, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + b * STRIDE_OB + offs_j[None, :], y * tl.sigmoid(y), mask=mask)


def merge(position: Tensor, parts: list[Part], weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """out = silu(weight rms_norm(levels side by side) + bias), gamma being in the weight.

    Args:
        position: (B,) int64.
        parts: one per level.
        weight: (J, D), where D is the width of all levels together.
        bias: (J,).
        out: (B, 1, J).

    Source: simple-hierarchical-transformer, one token at a time.
    """
    if not len(position):
        return
    x, kept, stride = zip(*parts, strict=True)
    B, J, D = len(position), len(bias), tuple(t.shape[-1] for t in x)
    levels = Levels(D, starts(D), stride, rings_of(x))
    constants = dict(J=J, WIDTH=sum(D), LEVELS=levels, STRIDE_OB=out.stride(0))
    if B == 1 or bias.dtype == torch.float64:
        BLOCK_D = next_power_of_2(sum(D))
        BLOCK_J = min(max(1, ROW_ELEMENTS // BLOCK_D), next_power_of_2(J))
        launch(
            _merge_row_kernel, (cdiv(J, BLOCK_J), B),
            position, x, weight, kept, bias, out, **constants,
            BLOCK_J=BLOCK_J, BLOCK_D=BLOCK_D, ACC=accumulator(bias.dtype), num_warps=4,
            **ahead(position.device),
        )  # fmt: skip
        return
    options = options_of_rows(B, weight, DEEP, SHALLOW)
    grid = cdiv(J, options["BLOCK_J"]), cdiv(B, options["BLOCK_B"])
    arguments = position, x, weight, kept, bias, out, B
    launch(_merge_rows_kernel, grid, *arguments, **constants, **options)
