"""Matrix products of one row, or of a few, with what stands before and after them.

    x_s = x[m], or its second half from x[m - dilation], or the last `taps` rows side by side
    out[m] = activation(weight norm(x_s) + bias) + residual[m]

One sequence is a matter of reading the weights once: a program reads whole rows of a weight at one
go, ahead of x, and has the weights of a norm in them before x comes. Several sequences are a small
matrix product, in which x is normalized on the way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._groups import Projection
from ._device import accumulator, activate, ahead, ring_of, row_of, starts, wait

ROW_ELEMENTS = 8192  # of a weight, a program
BLOCK_K = 128
MAX_ROWS = 64
PROGRAMS = 132  # of several sequences, at least, where tiles of 16 columns allow


@triton.jit
def source(
    x_ptr, b, position, offs_k,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, TAPS: tl.constexpr,
    RINGS: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """Where channels offs_k of what is multiplied lie."""
    if TAPS > 0:
        width: tl.constexpr = K // TAPS
        token = position - (TAPS - 1) + offs_k // width
        pointers = row_of(x_ptr, b, token, RINGS, I) + offs_k % width
    else:
        token = position // STRIDE
        pointers = row_of(x_ptr, b, token, RINGS, I) + offs_k
        if DILATION > 0:
            earlier = row_of(x_ptr, b, token - DILATION, RINGS, I) + offs_k
            pointers = tl.where(offs_k < (K + 1) // 2, pointers, earlier)
    return pointers


@triton.jit
def _project_row_kernel(
    position_ptr, x_ptrs, weight_ptrs, out_ptrs, gamma_ptrs, beta_ptrs, bias_ptrs, residual_ptrs,
    START: tl.constexpr, K: tl.constexpr, O: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, TAPS: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    RINGS_X: tl.constexpr, RINGS_O: tl.constexpr, RINGS_R: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    position = tl.load(position_ptr + b)
    for i in tl.static_range(len(x_ptrs)):
        if (pid >= START[i]) & (pid < START[i + 1]):
            if position % STRIDE[i] == 0:
                project_row(
                    x_ptrs[i], weight_ptrs[i], out_ptrs[i], gamma_ptrs[i], beta_ptrs[i],
                    bias_ptrs[i], residual_ptrs[i], pid - START[i], b, position,
                    K[i], O[i], STRIDE[i], DILATION[i], TAPS[i], NORM, ACTIVATION, RINGS_X,
                    RINGS_O, RINGS_R, i, BLOCK_O[i], BLOCK_K[i], ACC, AHEAD,
                )  # fmt: skip
            else:
                wait(AHEAD)


@triton.jit
def project_row(
    x_ptr, weight_ptr, out_ptr, gamma_ptr, beta_ptr, bias_ptr, residual_ptr, tile, b, position,
    K: tl.constexpr, O: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    TAPS: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, RINGS_X: tl.constexpr,
    RINGS_O: tl.constexpr, RINGS_R: tl.constexpr, I: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    offs_k, offs_o = tl.arange(0, BLOCK_K), tile * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_k, mask_o = offs_k < K, offs_o < O
    w_ptrs = weight_ptr + offs_o[:, None] * K + offs_k[None, :]
    w = tl.load(w_ptrs, mask=mask_o[:, None] & mask_k[None, :], other=0.0).to(ACC)
    offset = tl.zeros([BLOCK_O], dtype=ACC)
    if bias_ptr is not None:
        offset += tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0).to(ACC)
    if NORM[I] == "layer":
        beta = tl.load(beta_ptr + offs_k, mask=mask_k, other=0.0).to(ACC)
        offset += tl.sum(w * beta[None, :], axis=1)
    if NORM[I] is not None:
        w *= tl.load(gamma_ptr + offs_k, mask=mask_k, other=0.0).to(ACC)[None, :]
    token = position // STRIDE
    x_ptrs = source(x_ptr, b, position, offs_k, K, STRIDE, DILATION, TAPS, RINGS_X, I)
    wait(AHEAD)

    x = tl.load(x_ptrs, mask=mask_k, other=0.0).to(ACC)
    if residual_ptr is not None:
        residual_ptrs = row_of(residual_ptr, b, token, RINGS_R, I) + offs_o
        residual = tl.load(residual_ptrs, mask=mask_o, other=0.0).to(ACC)
    if NORM[I] == "layer":
        x = tl.where(mask_k, x - tl.sum(x, axis=0) / K, 0.0)
    y = tl.sum(w * x[None, :], axis=1)
    if NORM[I] == "layer":
        y = y / tl.sqrt(tl.sum(x * x, axis=0) / K + 1e-5)
    elif NORM[I] == "rms":
        y *= K**0.5 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=0)), 1e-12)
    y = activate(y + offset, ACTIVATION, I)
    if residual_ptr is not None:
        y += residual
    tl.store(row_of(out_ptr, b, token, RINGS_O, I) + offs_o, y, mask=mask_o)


@triton.jit
def statistics(
    pointers, earlier, due,
    K: tl.constexpr, NORM: tl.constexpr, I: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean and scale [BLOCK_B, 1] of rows to be normalized."""
    mean = tl.zeros([BLOCK_B, 1], dtype=tl.float32)
    scale = tl.full([BLOCK_B, 1], 1.0, dtype=tl.float32)
    if NORM[I] == "layer":
        for k in range(0, K, BLOCK_K):
            offs_k = (k + tl.arange(0, BLOCK_K))[None, :]
            x_ptrs = tl.where(offs_k < (K + 1) // 2, pointers, earlier) + offs_k
            x = tl.load(x_ptrs, mask=due & (offs_k < K), other=0.0).to(tl.float32)
            mean += tl.sum(x, axis=1)[:, None]
        mean = mean / K
    if NORM[I] is not None:
        squares = tl.zeros([BLOCK_B, 1], dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            offs_k = (k + tl.arange(0, BLOCK_K))[None, :]
            x_ptrs = tl.where(offs_k < (K + 1) // 2, pointers, earlier) + offs_k
            x = tl.load(x_ptrs, mask=due & (offs_k < K), other=0.0).to(tl.float32)
            x = tl.where(offs_k < K, x - mean, 0.0)
            squares += tl.sum(x * x, axis=1)[:, None]
        if NORM[I] == "layer":
            scale = 1 / tl.sqrt(squares / K + 1e-5)
        else:
            scale = K**0.5 / tl.maximum(tl.sqrt(squares), 1e-12)
    return mean, scale


@triton.jit
def project_rows(
    position_ptr, x_ptr, weight_ptr, out_ptr, gamma_ptr, beta_ptr, bias_ptr, residual_ptr, tile, B,
    K: tl.constexpr, O: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    TAPS: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, RINGS_X: tl.constexpr,
    RINGS_O: tl.constexpr, RINGS_R: tl.constexpr, I: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    position = tl.load(position_ptr + b, mask=b < B, other=1)
    due, token = (b < B) & (position % STRIDE == 0), position // STRIDE
    if tl.max(due.to(tl.int32)) > 0:
        rows = row_of(x_ptr, b, token, RINGS_X, I)
        earlier = row_of(x_ptr, b, token - DILATION, RINGS_X, I)
        mean, scale = statistics(rows, earlier, due, K, NORM, I, BLOCK_B, BLOCK_K)
        offs_o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
        y = tl.zeros([BLOCK_B, BLOCK_O], dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            w_ptrs = weight_ptr + offs_o[:, None] * K + offs_k[None, :]
            w = tl.load(w_ptrs, mask=(offs_o < O)[:, None] & (offs_k < K)[None, :], other=0.0)
            offs_k = offs_k[None, :]
            if TAPS > 0:
                x_ptrs = source(x_ptr, b, position, offs_k, K, STRIDE, 0, TAPS, RINGS_X, I)
            else:
                x_ptrs = tl.where(offs_k < (K + 1) // 2, rows, earlier) + offs_k
            x = tl.load(x_ptrs, mask=due & (offs_k < K), other=0.0)
            if NORM[I] is not None:
                gamma = tl.load(gamma_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
                normed = (x.to(tl.float32) - mean) * scale * gamma
                if NORM[I] == "layer":
                    normed += tl.load(beta_ptr + offs_k, mask=offs_k < K, other=0.0)
                x = normed.to(x.dtype)
            y = tl.dot(x, w.T, y, input_precision="ieee")
        offs_o = offs_o[None, :]
        mask = due & (offs_o < O)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + offs_o, mask=offs_o < O, other=0.0)
        y = activate(y, ACTIVATION, I)
        if residual_ptr is not None:
            y += tl.load(row_of(residual_ptr, b, token, RINGS_R, I) + offs_o, mask=mask, other=0.0)
        tl.store(row_of(out_ptr, b, token, RINGS_O, I) + offs_o, y, mask=mask)


@triton.jit(do_not_specialize=["B"])
def _project_rows_kernel(
    position_ptr, x_ptrs, weight_ptrs, out_ptrs, gamma_ptrs, beta_ptrs, bias_ptrs, residual_ptrs, B,
    START: tl.constexpr, K: tl.constexpr, O: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, TAPS: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    RINGS_X: tl.constexpr, RINGS_O: tl.constexpr, RINGS_R: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(x_ptrs)):
        if (pid >= START[i]) & (pid < START[i + 1]):
            project_rows(
                position_ptr, x_ptrs[i], weight_ptrs[i], out_ptrs[i], gamma_ptrs[i], beta_ptrs[i],
                bias_ptrs[i], residual_ptrs[i], pid - START[i], B,
                K[i], O[i], STRIDE[i], DILATION[i], TAPS[i], NORM, ACTIVATION, RINGS_X, RINGS_O,
                RINGS_R, i, BLOCK_B, BLOCK_O, BLOCK_K,
            )  # fmt: skip


def project(position: Tensor, projections: list[Projection]) -> None:
    """out = activation(weight norm(token_shift(x)) + bias) + residual, in the row of the token at
    each position.

    With taps, x is a ring of positions, whose last `taps` rows stand side by side.

    Args:
        position: (B,) int64.
        projections: of each level.

    Source: simple-hierarchical-transformer, one token at a time.
    """
    if not projections or not len(position):
        return
    each = lambda fn: tuple(map(fn, projections))
    O, K = each(lambda p: p.weight.shape[0]), each(lambda p: p.weight.shape[1])
    tensors = ("x", "weight", "out", "gamma", "beta", "bias", "residual")
    pointers = [each(lambda p, name=name: getattr(p, name)) for name in tensors]
    constants = dict(
        K=K,
        O=O,
        STRIDE=each(lambda p: p.stride),
        DILATION=each(lambda p: p.dilation),
        TAPS=each(lambda p: p.taps),
        NORM=each(lambda p: p.norm),
        ACTIVATION=each(lambda p: p.activation),
        RINGS_X=each(lambda p: ring_of(p.x)),
        RINGS_O=each(lambda p: ring_of(p.out)),
        RINGS_R=each(lambda p: None if p.residual is None else ring_of(p.residual)),
    )
    B, dtype = len(position), projections[0].weight.dtype
    with torch.cuda.device_of(position):
        if B == 1 or dtype == torch.float64:
            columns = tuple(map(triton.next_power_of_2, K))
            rows = [max(1, ROW_ELEMENTS // k) for k in columns]
            rows = tuple(min(n, triton.next_power_of_2(o)) for n, o in zip(rows, O, strict=True))
            START = starts([triton.cdiv(o, n) for o, n in zip(O, rows, strict=True)])
            most = max(n * k for n, k in zip(rows, columns, strict=True))
            _project_row_kernel[(START[-1], B)](
                position, *pointers, START=START, **constants, BLOCK_O=rows, BLOCK_K=columns,
                ACC=accumulator(dtype), num_warps=4 if most <= ROW_ELEMENTS else 8, **ahead(),
            )  # fmt: skip
            return
        BLOCK_B = min(MAX_ROWS, max(16, triton.next_power_of_2(B)))
        BLOCK_O = 32 if sum(O) >= 32 * PROGRAMS else 16
        START = starts([triton.cdiv(o, BLOCK_O) for o in O])
        _project_rows_kernel[(START[-1], triton.cdiv(B, BLOCK_B))](
            position, *pointers, B, START=START, **constants,
            BLOCK_B=BLOCK_B, BLOCK_O=BLOCK_O, BLOCK_K=BLOCK_K, num_warps=4,
        )  # fmt: skip
