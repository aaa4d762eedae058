"""Backward: a pass at token rate, its sums at the rates of the levels, the products, and a pass
over each level.

`slope` is the number by which a token's r is multiplied in the gradient of r.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import columns, row_config, row_sum
from .._silu import sigmoid
from .._sums import column_sums
from ..launch import KINDS, Kernel, cdiv, next_power_of_2
from ..products import add_product
from .forward import (
    LEVEL_TILE,
    Group,
    at_tokens,
    columns_of,
    factor_of,
    groups_of,
    matrix_config,
    scale_of,
)

# The pass at token rate has, by the widest J, these numbers of a tile, numbers that a warp holds,
# and programs, each of which leaves one row of partial sums. On an H200 they are the fastest of 11.
TOKEN_TILES = (
    (512, (1024, 512, 1056)),
    (1024, (1024, 1024, 1056)),
    (float("inf"), (4096, 1024, 264)),
)
WEIGHT_CONFIG = dict(BLOCK_R=32, BLOCK_C=128, num_warps=4)
STEP = 16  # tokens of a level token that are added up at once


@triton.jit(do_not_specialize=["B", "N", "tiles", "total", "share"])
def _hierarchical_merge_bwd_kernel(
    z_ptr, norm_ptr, bias_ptr, da_ptr, dz_ptr, slope_ptr, dbias_ptr, B, N, tiles, total, share,
    WIDTH: tl.constexpr, J: tl.constexpr, STRIDES: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, ROUNDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """a takes the place of da (B, N, J); dz at token rate, slope (B, N), and one row of partial
    sums of the gradient of bias per program.
    """
    pid = tl.program_id(0).to(tl.int64)
    offs_j = columns(ROUNDS, LANES)
    mask_j = offs_j < J
    bias = tl.load(bias_ptr + offs_j, mask=mask_j, other=0.0).to(ACC)
    dbias = tl.zeros([BLOCK_M, ROUNDS, LANES], dtype=ACC)
    for i in range(pid * share, tl.minimum((pid + 1) * share, total)):
        pid_b = i // tiles
        offs_t = i % tiles * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None]
        row, inside = pid_b * N + offs_t, offs_t < N
        scale, live = scale_of(tl.load(norm_ptr + row, mask=inside, other=1.0), WIDTH)
        z = at_tokens(z_ptr, pid_b, offs_t, offs_j, B, N, J, STRIDES, ACC)
        u = scale * z + bias
        gate = sigmoid(u, da_ptr.dtype.element_ty)
        offs, mask = row * J + offs_j, inside & mask_j
        da = tl.load(da_ptr + offs, mask=mask, other=0.0).to(ACC)
        du = da * gate * (1 + u * (1 - gate))
        tl.store(da_ptr + offs, u * gate, mask=mask)
        tl.store(dz_ptr + offs, scale * du, mask=mask)
        dbias += du
        dscale = row_sum(du * z)
        slope = tl.where(live, -(dscale * scale) * (scale * scale / WIDTH), 0.0)
        tl.store(slope_ptr + row, slope, mask=inside)
    dbias = tl.sum(dbias, axis=0, keep_dims=True)
    tl.store(dbias_ptr + pid * J + offs_j, dbias, mask=mask_j)


@triton.jit(do_not_specialize=["N", "M"])
def _hierarchical_merge_sum_kernel(
    dz_ptr, slope_ptr, dz_sum_ptr, slope_sum_ptr, N, M,
    J: tl.constexpr, STRIDE: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sums of dz and of slope over the tokens of every level token."""
    row = tl.program_id(0).to(tl.int64)
    pid_j = tl.program_id(1).to(tl.int64)
    first = row // M * N
    offs_j = pid_j * BLOCK_C + tl.arange(0, BLOCK_C)
    dz = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    slope = tl.zeros([BLOCK_R], dtype=ACC)
    for step in range(0, STRIDE, BLOCK_R):
        offs_s = step + tl.arange(0, BLOCK_R)
        offs_t = row % M * STRIDE + offs_s
        inside = (offs_s < STRIDE) & (offs_t < N)
        dz_ptrs = dz_ptr + (first + offs_t)[:, None] * J + offs_j[None, :]
        dz += tl.load(dz_ptrs, mask=inside[:, None] & (offs_j < J)[None, :], other=0.0).to(ACC)
        slope += tl.load(slope_ptr + first + offs_t, mask=inside, other=0.0)
    tl.store(dz_sum_ptr + row * J + offs_j, tl.sum(dz, axis=0), mask=offs_j < J)
    if pid_j == 0:
        tl.store(slope_sum_ptr + row, tl.sum(slope, axis=0))


@triton.jit(do_not_specialize=["M", "kept", "tiles"])
def _hierarchical_merge_level_bwd_kernel(
    r_ptr, dg_ptr, slope_ptr, dr_ptr, dx_ptr, dbranch_ptr,
    stride_r, stride_g, stride_drb, stride_drm,
    M, kept, tiles,
    D: tl.constexpr, HAS_DR: tl.constexpr, HAS_DBRANCH: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = dg + slope r + dr for a level; dg is the gradient of r as a factor of the product."""
    pid = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    pid_b = pid // tiles
    offs_m = pid % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    x_row, row = pid_b * M + offs_m, pid_b * kept + offs_m
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]
    mask_g = (offs_m < kept)[:, None] & mask
    r_ptrs = r_ptr + x_row[:, None] * stride_r + offs_d[None, :]
    dg_ptrs = dg_ptr + row[:, None] * stride_g + offs_d[None, :]
    slope = tl.load(slope_ptr + row, mask=offs_m < kept, other=0.0)
    dx = tl.load(dg_ptrs, mask=mask_g, other=0.0).to(ACC)
    dx += tl.load(r_ptrs, mask=mask_g, other=0.0).to(ACC) * slope[:, None]
    if HAS_DR:
        dr_ptrs = dr_ptr + pid_b * stride_drb + offs_m[:, None] * stride_drm + offs_d[None, :]
        dx += tl.load(dr_ptrs, mask=mask, other=0.0).to(ACC)
    offs_x = x_row[:, None] * D + offs_d[None, :]
    tl.store(dx_ptr + offs_x, dx, mask=mask)
    if HAS_DBRANCH:
        tl.store(dbranch_ptr + offs_x, dx, mask=mask)


@triton.jit(do_not_specialize=["J"])
def _hierarchical_merge_weight_bwd_kernel(
    dw_ptr, w_ptr, gamma_ptr, dgamma_ptr, J, D,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of w gamma (J, D) becomes that of w; for gamma, one row of partial sums per
    program.
    """
    offs_d = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    pid_j = tl.program_id(1).to(tl.int64)
    offs_j = pid_j * BLOCK_R + tl.arange(0, BLOCK_R)
    gamma = tl.load(gamma_ptr + offs_d, mask=offs_d < D, other=0.0).to(ACC)[None, :]
    mask = (offs_j < J)[:, None] & (offs_d < D)[None, :]
    offs = offs_j[:, None] * D + offs_d[None, :]
    dw = tl.load(dw_ptr + offs, mask=mask, other=0.0)
    dgamma = tl.sum(dw * tl.load(w_ptr + offs, mask=mask, other=0.0).to(ACC), axis=0)
    tl.store(dw_ptr + offs, dw * gamma, mask=mask)
    tl.store(dgamma_ptr + pid_j * D + offs_d, dgamma, mask=offs_d < D)


def new_gradients(rs, branch_dtype, needs_levels, has_dbranches) -> tuple[list, list]:
    """Uninitialised gradients: of the levels, and of the branches if their dtype is another."""
    new = lambda wanted, dtype: [r.new_empty(*r.shape, dtype=dtype) for r in rs] if wanted else []
    return new(needs_levels, rs[0].dtype), new(has_dbranches, branch_dtype)


def _weight_gradient(d: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """d^T x in `dtype`."""
    dw = d.new_empty(d.shape[1], x.shape[1], dtype=dtype)
    if not d.shape[0]:
        return dw.zero_()
    add_product(dw, d.T, x, start=True)
    return dw


@lru_cache(KINDS)
def _kernel_of_tokens(W: int, J: int, strides: tuple[int, ...], dtype: torch.dtype) -> Kernel:
    elements, warp_elements, _ = _token_tile(J)
    return Kernel(
        _hierarchical_merge_bwd_kernel, dtype, WIDTH=W, J=J, STRIDES=strides,
        **row_config(J, elements, warp_elements),
    )  # fmt: skip


def _token_tile(J: int) -> tuple[int, int, int]:
    """Numbers of a tile, numbers that a warp holds, and programs of the pass at token rate."""
    return next(sizes for width, sizes in TOKEN_TILES if J <= width)


@lru_cache(KINDS)
def _kernel_of_sums(J: int, stride: int, dtype: torch.dtype) -> Kernel:
    columns = matrix_config(J, **LEVEL_TILE)["BLOCK_C"]
    block = dict(BLOCK_R=min(STEP, next_power_of_2(stride)), BLOCK_C=columns)
    return Kernel(_hierarchical_merge_sum_kernel, dtype, J=J, STRIDE=stride, **block)


@lru_cache(KINDS)
def _kernel_of_level(D: int, dtype: torch.dtype, has_dr: bool, has_dbranch: bool) -> Kernel:
    constants = dict(D=D, HAS_DR=has_dr, HAS_DBRANCH=has_dbranch, **matrix_config(D, **LEVEL_TILE))
    return Kernel(_hierarchical_merge_level_bwd_kernel, dtype, **constants)


@lru_cache
def _kernel_of_weight(dtype: torch.dtype) -> Kernel:
    return Kernel(_hierarchical_merge_weight_bwd_kernel, dtype, **WEIGHT_CONFIG)


def _hierarchical_merge_bwd(
    rs, side_by_side, strides, gamma, w_in, w, b_in, w_out, z, norm, drs, dout, branch_dtype,
    has_dbranches, needs_levels, needs_w_in, needs_w_out,
):  # fmt: skip
    (B, N), (J, W), dims = norm.shape, w.shape, [r.shape[-1] for r in rs]
    _, groups = groups_of(rs, strides)
    acc = norm.dtype
    dxs, dbranches = new_gradients(rs, branch_dtype, needs_levels, has_dbranches)
    kernel = _kernel_of_tokens(W, J, tuple([group.stride for group in groups]), acc)
    tiles = cdiv(N, kernel.constants["BLOCK_M"])
    share = cdiv(B * tiles, _token_tile(J)[2])
    programs = cdiv(B * tiles, max(1, share))
    dws = {}  # by level, the gradient of its columns of w
    a = dout.new_empty(dout.shape[0], J)
    torch.mm(dout, w_out, out=a)  # the gradient of a, which the kernel replaces by a
    dz, slope = torch.empty_like(a), norm.new_empty(B * N)
    db_in = norm.new_empty(programs, J)
    if a.numel():
        tensors = z, norm, b_in, a, dz, slope, db_in
        kernel((programs,), tensors, B, N, tiles, B * tiles, share)
    dw_out = _weight_gradient(dout, a, acc) if needs_w_out else norm.new_empty(0)
    for group, r in zip(groups, side_by_side, strict=True):
        dz_g, slope_g = dz, slope
        if group.stride > 1:
            dz_g, slope_g = _summed(dz, slope, norm, group)
        if needs_w_in:
            dw = _weight_gradient(dz_g, factor_of(r, group.tokens, z.dtype), acc)
            dws |= zip(group.levels, dw.split_with_sizes(group.widths, 1), strict=True)
        if needs_levels:
            dg = dz_g.new_empty(dz_g.shape[0], sum(group.widths))
            torch.mm(dz_g, columns_of(w, dims, group.levels), out=dg)
            for level, part in zip(group.levels, dg.split_with_sizes(group.widths, 1), strict=True):
                _level_bwd(
                    rs[level], part, slope_g, drs[level], dxs[level],
                    dbranches[level] if has_dbranches else None, group.tokens,
                )  # fmt: skip
    if needs_w_in:
        dw_in = dw if len(groups) == 1 else torch.cat([dws[i] for i in range(len(rs))], dim=1)
        grid = cdiv(W, WEIGHT_CONFIG["BLOCK_C"]), cdiv(J, WEIGHT_CONFIG["BLOCK_R"])
        dgamma = norm.new_empty(grid[1], W)
        _kernel_of_weight(acc)(grid, (dw_in, w_in, gamma, dgamma), J, W)
        dgamma = column_sums(dgamma)
    else:
        dw_in, dgamma = norm.new_empty(0), norm.new_empty(0)
    return dxs, dbranches, dgamma, dw_in, column_sums(db_in), dw_out, column_sums(dout)


def _summed(dz: Tensor, slope: Tensor, norm: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """The sums of dz and of slope over the tokens of every level token of a group."""
    (B, N), J = norm.shape, dz.shape[1]
    rows = B * group.tokens
    out = dz.new_empty(rows, J), slope.new_empty(rows)
    if out[0].numel():
        kernel = _kernel_of_sums(J, group.stride, norm.dtype)
        grid = rows, cdiv(J, kernel.constants["BLOCK_C"])
        kernel(grid, (dz, slope, *out), N, group.tokens)
    return out


def _level_bwd(r, dg, slope, dr, dx, dbranch, tokens: int):
    """Fill dx, and dbranch if there is one; the first `tokens` tokens of a level count."""
    B, M, D = r.shape
    if not r.numel():
        return
    kernel = _kernel_of_level(D, slope.dtype, dr is not None, dbranch is not None)
    dr, dbranch = r if dr is None else dr, dx if dbranch is None else dbranch
    tiles = cdiv(M, kernel.constants["BLOCK_R"])
    grid = B * tiles, cdiv(D, kernel.constants["BLOCK_C"])
    strides = r.stride(1), dg.stride(0), *dr.stride()[:2]
    kernel(grid, (r, dg, slope, dr, dx, dbranch), *strides, M, tokens, tiles)
