"""The passes between the products."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import KINDS, Kernel, accumulator, cdiv, next_power_of_2
from .._products import sum_dtype
from .._silu import sigmoid
from .._sums import column_sums

# The fastest of 30 on an H200. Programs side by side have the same columns of other tokens: so few
# that L1 holds them for every id of a small vocabulary.
TILE = dict(BLOCK_R=64, num_warps=8)
COLUMNS = 64  # of a tile at most
TAPS_ELEMENTS = 8192  # of a tile of weights


@triton.jit
def pre_activation(
    source_ptr, ids_ptr, bias_ptr, b, m, inside, offs_j, N,
    STRIDE: tl.constexpr, C: tl.constexpr, J: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of level tokens m of sequences b [R] at columns offs_j: C rows of a table, or a row as is.

    source: a table (V, C, J) with ROWS 0, else (B, ROWS, J).
    """
    mask_j = offs_j[None, :] < J
    bias = tl.load(bias_ptr + offs_j, mask=offs_j < J, other=0.0).to(ACC)[None, :]
    if ROWS:
        ptrs = source_ptr + (b * ROWS + m)[:, None] * J + offs_j[None, :]
        return bias + tl.load(ptrs, mask=inside[:, None] & mask_j, other=0.0).to(ACC)
    u = tl.broadcast_to(bias, [m.shape[0], offs_j.shape[0]])
    for k in range(C):
        position = m * STRIDE + (k - C + 1)
        known = inside & (position >= 0)
        ids = tl.load(ids_ptr + b * N + position, mask=known, other=0)
        ptrs = source_ptr + (ids * C + k)[:, None] * J + offs_j[None, :]
        u += tl.load(ptrs, mask=known[:, None] & mask_j, other=0.0).to(ACC)
    return u


@triton.jit(do_not_specialize=["N", "M", "R"])
def _causal_compress_fwd_kernel(
    source_ptr, ids_ptr, bias_ptr, a_ptr, N, M, R,
    STRIDE: tl.constexpr, C: tl.constexpr, J: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """a (R, J) = silu(u)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_j = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    u = pre_activation(
        source_ptr, ids_ptr, bias_ptr, row // M, row % M, row < R, offs_j, N,
        STRIDE, C, J, ROWS, ACC,
    )  # fmt: skip
    mask = (row < R)[:, None] & (offs_j < J)[None, :]
    a = u * sigmoid(u, a_ptr.dtype.element_ty)
    tl.store(a_ptr + row[:, None] * J + offs_j[None, :], a, mask=mask)


@triton.jit(do_not_specialize=["N", "M", "R"])
def _causal_compress_bwd_kernel(
    source_ptr, ids_ptr, bias_ptr, da_ptr, du_ptr, dbias_ptr, N, M, R,
    STRIDE: tl.constexpr, C: tl.constexpr, J: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """a over da (R, J); du in rows like those of the source; dbias, a row of a program."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_j = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    b, m = row // M, row % M
    u = pre_activation(
        source_ptr, ids_ptr, bias_ptr, b, m, row < R, offs_j, N, STRIDE, C, J, ROWS, ACC
    )
    gate = sigmoid(u, da_ptr.dtype.element_ty)
    mask = (row < R)[:, None] & (offs_j < J)[None, :]
    ptrs = da_ptr + row[:, None] * J + offs_j[None, :]
    du = tl.load(ptrs, mask=mask, other=0.0).to(ACC) * gate * (1 + u * (1 - gate))
    tl.store(ptrs, u * gate, mask=mask)
    target = b * ROWS + m if ROWS else row
    tl.store(du_ptr + target[:, None] * J + offs_j[None, :], du, mask=mask)
    tl.store(dbias_ptr + pid * J + offs_j, tl.sum(du, axis=0), mask=offs_j < J)


@triton.jit(do_not_specialize=["rows"])
def _causal_compress_taps_kernel(
    w_ptr, taps_ptr, rows, stride_j, stride_c,
    D: tl.constexpr, C: tl.constexpr, TO_TAPS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A convolution's weight (J, D, C), in which taps lie side by side, to or from taps apart."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = (row < rows) & (c < C)
    w_ptrs = w_ptr + row * C + c
    taps_ptrs = taps_ptr + row // D * stride_j + row % D + c * stride_c
    if TO_TAPS:
        tl.store(taps_ptrs, tl.load(w_ptrs, mask=mask), mask=mask)
    else:
        tl.store(w_ptrs, tl.load(taps_ptrs, mask=mask), mask=mask)


@lru_cache(KINDS)
def _kernel_of(kernel, stride: int, taps: int, J: int, rows: int, dtype: torch.dtype) -> Kernel:
    columns = min(COLUMNS, next_power_of_2(J))
    constants = dict(STRIDE=stride, C=taps, J=J, ROWS=rows, ACC=accumulator(dtype))
    return Kernel(kernel, **constants, BLOCK_C=columns, **TILE)


def _grid_of(kernel: Kernel, R: int) -> tuple[int, int]:
    constants = kernel.constants
    return cdiv(R, constants["BLOCK_R"]), cdiv(constants["J"], constants["BLOCK_C"])


def activate(source, ids, b_conv, M: int, stride: int, taps: int, rows: int) -> Tensor:
    """silu of the pre-activations: (B M, J)."""
    (B, N), (J,) = ids.shape, b_conv.shape
    a = source.new_empty(B * M, J)
    if a.numel():
        kernel = _kernel_of(_causal_compress_fwd_kernel, stride, taps, J, rows, source.dtype)
        kernel(_grid_of(kernel, B * M), (source, ids, b_conv, a), N, M, B * M)
    return a


def activate_backward(source, ids, b_conv, da, M: int, stride: int, taps: int, rows: int):
    """du in the layout of the pre-activations, and the gradient of b_conv; da becomes a."""
    (B, N), (R, J) = ids.shape, da.shape
    du = source.new_empty(B, rows or M, J)
    du[:, M:].zero_()
    kernel = _kernel_of(_causal_compress_bwd_kernel, stride, taps, J, rows, source.dtype)
    grid = _grid_of(kernel, R)
    dbias = da.new_empty(grid[0], J, dtype=sum_dtype(da.dtype))
    if R:
        kernel(grid, (source, ids, b_conv, da, du, dbias), N, M, R)
    return du.flatten(0, 1), column_sums(dbias)


@lru_cache(KINDS)
def _kernel_of_copies(D: int, C: int, to_taps: bool) -> Kernel:
    columns = next_power_of_2(C)
    tile = dict(BLOCK_R=max(1, TAPS_ELEMENTS // columns), BLOCK_C=columns, num_warps=8)
    return Kernel(_causal_compress_taps_kernel, D=D, C=C, TO_TAPS=to_taps, **tile)


def _copy_taps(w: Tensor, taps: Tensor, stride_j: int, stride_c: int, to_taps: bool):
    J, D, C = w.shape
    kernel = _kernel_of_copies(D, C, to_taps)
    grid = (cdiv(J * D, kernel.constants["BLOCK_R"]),)
    kernel(grid, (w, taps), J * D, stride_j, stride_c)


def taps_first(w_conv: Tensor, dtype: torch.dtype) -> Tensor:
    """(C, J, D), of (J, D, C)."""
    J, D, C = w_conv.shape
    taps = w_conv.new_empty(C, J, D, dtype=dtype)
    _copy_taps(w_conv, taps, D, J * D, to_taps=True)
    return taps


def taps_inside(w_conv: Tensor, dtype: torch.dtype) -> Tensor:
    """(J, C, D), of (J, D, C)."""
    J, D, C = w_conv.shape
    taps = w_conv.new_empty(J, C, D, dtype=dtype)
    _copy_taps(w_conv, taps, C * D, D, to_taps=True)
    return taps


def taps_last(taps: Tensor, first: bool) -> Tensor:
    """(J, D, C), of (C, J, D) or (J, C, D)."""
    (C, J, D) = taps.shape if first else (taps.shape[1], taps.shape[0], taps.shape[2])
    w = taps.new_empty(J, D, C)
    _copy_taps(w, taps, *((D, J * D) if first else (C * D, D)), to_taps=False)
    return w
