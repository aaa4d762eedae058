"""The passes between the products, and the copies of the convolution's weight."""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from .._silu import sigmoid
from .._sums import column_sums
from ..launch import KINDS, Kernel, cdiv, next_power_of_2
from ..products import sum_dtype

# The fastest of 30 on an H200. Programs that run at the same time have the same columns for other
# tokens, and so few that the L1 cache holds them for every id of a small vocabulary.
CONFIG = dict(BLOCK_R=64, num_warps=8)
COLUMNS = 64  # the most columns of a tile
TAPS_TILE = 8192  # numbers of a tile of weights


@triton.jit
def pre_activation(
    source_ptr, ids_ptr, bias_ptr, b, m, inside, offs_j, N,
    STRIDE: tl.constexpr, C: tl.constexpr, J: tl.constexpr, WINDOWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """u for level tokens m of sequences b [BLOCK_R] at columns offs_j.

    source is a table (V, C, J), C rows of which are summed, if WINDOWS is 0; else it is u without
    its bias, (B, WINDOWS, J).
    """
    mask_j = offs_j[None, :] < J
    bias = tl.load(bias_ptr + offs_j, mask=offs_j < J, other=0.0).to(ACC)[None, :]
    if WINDOWS:
        ptrs = source_ptr + (b * WINDOWS + m)[:, None] * J + offs_j[None, :]
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
    STRIDE: tl.constexpr, C: tl.constexpr, J: tl.constexpr, WINDOWS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """a (R, J) = silu(u), for R level tokens in all."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_j = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    u = pre_activation(
        source_ptr, ids_ptr, bias_ptr, row // M, row % M, row < R, offs_j, N,
        STRIDE, C, J, WINDOWS, ACC,
    )  # fmt: skip
    mask = (row < R)[:, None] & (offs_j < J)[None, :]
    a = u * sigmoid(u, a_ptr.dtype.element_ty)
    tl.store(a_ptr + row[:, None] * J + offs_j[None, :], a, mask=mask)


@triton.jit(do_not_specialize=["N", "M", "R"])
def _causal_compress_bwd_kernel(
    source_ptr, ids_ptr, bias_ptr, da_ptr, du_ptr, dbias_ptr, N, M, R,
    STRIDE: tl.constexpr, C: tl.constexpr, J: tl.constexpr, WINDOWS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """a takes the place of da (R, J); du has as many rows as the source has for u, and dbias has
    one row of partial sums per program.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_j = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    b, m = row // M, row % M
    u = pre_activation(
        source_ptr, ids_ptr, bias_ptr, b, m, row < R, offs_j, N, STRIDE, C, J, WINDOWS, ACC
    )
    gate = sigmoid(u, da_ptr.dtype.element_ty)
    mask = (row < R)[:, None] & (offs_j < J)[None, :]
    ptrs = da_ptr + row[:, None] * J + offs_j[None, :]
    du = tl.load(ptrs, mask=mask, other=0.0).to(ACC) * gate * (1 + u * (1 - gate))
    tl.store(ptrs, u * gate, mask=mask)
    target = b * WINDOWS + m if WINDOWS else row
    tl.store(du_ptr + target[:, None] * J + offs_j[None, :], du, mask=mask)
    tl.store(dbias_ptr + pid * J + offs_j, tl.sum(du, axis=0), mask=offs_j < J)


@triton.jit(do_not_specialize=["rows"])
def _causal_compress_taps_kernel(
    w_ptr, taps_ptr, rows, stride_j, stride_c,
    D: tl.constexpr, C: tl.constexpr, TO_TAPS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A convolution's weight w (J, D, C), in which the taps of a channel are contiguous, to or from
    `taps`, in which the channels of a tap are.
    """
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
def _kernel_of(kernel, stride: int, taps: int, J: int, windows: int, dtype) -> Kernel:
    columns = min(COLUMNS, next_power_of_2(J))
    constants = dict(STRIDE=stride, C=taps, J=J, WINDOWS=windows)
    return Kernel(kernel, dtype, **constants, BLOCK_C=columns, **CONFIG)


def _grid_of(kernel: Kernel, R: int) -> tuple[int, int]:
    constants = kernel.constants
    return cdiv(R, constants["BLOCK_R"]), cdiv(constants["J"], constants["BLOCK_C"])


def activate(source, ids, b_conv, M: int, stride: int, taps: int, windows: int) -> Tensor:
    """silu(u) (B M, J), for M level tokens of each sequence."""
    (B, N), (J,) = ids.shape, b_conv.shape
    a = source.new_empty(B * M, J)
    if a.numel():
        kernel = _kernel_of(_causal_compress_fwd_kernel, stride, taps, J, windows, source.dtype)
        kernel(_grid_of(kernel, B * M), (source, ids, b_conv, a), N, M, B * M)
    return a


def activate_bwd(source, ids, b_conv, da, M: int, stride: int, taps: int, windows: int):
    """The gradients of u, with as many rows as the source has, and of b_conv; da becomes a."""
    (B, N), (R, J) = ids.shape, da.shape
    du = source.new_empty(B, windows or M, J)
    du[:, M:].zero_()
    kernel = _kernel_of(_causal_compress_bwd_kernel, stride, taps, J, windows, source.dtype)
    grid = _grid_of(kernel, R)
    dbias = da.new_empty(grid[0], J, dtype=sum_dtype(da.dtype))
    if R:
        kernel(grid, (source, ids, b_conv, da, du, dbias), N, M, R)
    return du.flatten(0, 1), column_sums(dbias)


@lru_cache(KINDS)
def _kernel_of_taps(D: int, C: int, to_taps: bool) -> Kernel:
    columns = next_power_of_2(C)
    block = dict(BLOCK_R=max(1, TAPS_TILE // columns), BLOCK_C=columns, num_warps=8)
    return Kernel(_causal_compress_taps_kernel, D=D, C=C, TO_TAPS=to_taps, **block)


def copy_taps(w: Tensor, taps: Tensor, stride_j: int, stride_c: int, to_taps: bool):
    """Copy w (J, D, C) to `taps`, in which the D numbers of a tap are contiguous, or back."""
    J, D, C = w.shape
    kernel = _kernel_of_taps(D, C, to_taps)
    grid = (cdiv(J * D, kernel.constants["BLOCK_R"]),)
    kernel(grid, (w, taps), J * D, stride_j, stride_c)
