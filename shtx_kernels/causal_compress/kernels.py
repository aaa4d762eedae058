"""The passes between the products."""

import torch
import triton
import triton.language as tl
from torch import Tensor

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


def _grid_of(source: Tensor, b_conv: Tensor, R: int, acc: torch.dtype) -> tuple[tuple, dict]:
    columns = min(COLUMNS, triton.next_power_of_2(len(b_conv)))
    tile = TILE | dict(BLOCK_C=columns, ACC=tl.float64 if acc == torch.float64 else tl.float32)
    return (triton.cdiv(R, tile["BLOCK_R"]), triton.cdiv(len(b_conv), columns)), tile


def activate(source, ids, b_conv, M: int, stride: int, taps: int, rows: int, acc) -> Tensor:
    """silu of the pre-activations: (B M, J)."""
    (B, N), J = ids.shape, len(b_conv)
    a = source.new_empty(B * M, J)
    if a.numel():
        grid, tile = _grid_of(source, b_conv, len(a), acc)
        _causal_compress_fwd_kernel[grid](
            source, ids, b_conv, a, N, M, len(a), STRIDE=stride, C=taps, J=J, ROWS=rows, **tile
        )
    return a


def activate_backward(source, ids, b_conv, da, M: int, stride: int, taps: int, rows: int, acc):
    """du in the layout of the pre-activations, and the gradient of b_conv; da becomes a."""
    (B, N), (R, J) = ids.shape, da.shape
    du = source.new_empty(B, rows or M, J)
    du[:, M:].zero_()
    grid, tile = _grid_of(source, b_conv, R, acc)
    dbias = da.new_empty(grid[0], J, dtype=acc)
    if R:
        _causal_compress_bwd_kernel[grid](
            source, ids, b_conv, da, du, dbias, N, M, R,
            STRIDE=stride, C=taps, J=J, ROWS=rows, **tile,
        )  # fmt: skip
    return du.flatten(0, 1), column_sums(dbias)


def _copy_taps(w: Tensor, taps: Tensor, stride_j: int, stride_c: int, to_taps: bool):
    (J, D, C), columns = w.shape, triton.next_power_of_2(w.shape[-1])
    block = max(1, TAPS_ELEMENTS // columns)
    _causal_compress_taps_kernel[(triton.cdiv(J * D, block),)](
        w, taps, J * D, stride_j, stride_c,
        D=D, C=C, TO_TAPS=to_taps, BLOCK_R=block, BLOCK_C=columns, num_warps=8,
    )  # fmt: skip


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
