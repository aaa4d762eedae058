"""Backward: a pass at token rate and its sums at the rates of the levels, the products, and a pass
over each level."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._products import add_product
from .forward import LEVEL_TILE, TOKEN_TILE, at_tokens, columns_of, groups_of, scale_of, tile_of

BWD_PROGRAMS = 264  # each leaves a row of partial gradients of gamma
STEP = 16  # tokens of a level token, of which more are added up in steps


@triton.jit(do_not_specialize=["B", "N", "tiles"])
def _hierarchical_merge_bwd_kernel(
    z_ptr, norm_ptr, bias_ptr, da_ptr, dz_ptr, slope_ptr, dbias_ptr, B, N, tiles,
    WIDTH: tl.constexpr, J: tl.constexpr, STRIDES: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """a over da (B, N, J), dz at token rate, slope (B, N), by which r adds to its gradient, and the
    gradient of bias, a row of a program."""
    pid = tl.program_id(0).to(tl.int64)
    pid_b = pid // tiles
    offs_t = (pid % tiles * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    row = pid_b * N + offs_t
    norm = tl.load(norm_ptr + row, mask=offs_t < N, other=1.0)
    scale, live = scale_of(norm, WIDTH)
    dscale = tl.zeros([BLOCK_R, 1], dtype=ACC)
    for j in range(0, J, BLOCK_C):
        offs_j = (j + tl.arange(0, BLOCK_C))[None, :]
        mask = (offs_t < N) & (offs_j < J)
        z = at_tokens(z_ptr, pid_b, offs_t, offs_j, B, N, J, STRIDES, ACC)
        u = scale * z + tl.load(bias_ptr + offs_j, mask=offs_j < J, other=0.0).to(ACC)
        gate = tl.sigmoid(u)
        da = tl.load(da_ptr + row * J + offs_j, mask=mask, other=0.0).to(ACC)
        du = da * gate * (1 + u * (1 - gate))
        tl.store(da_ptr + row * J + offs_j, u * gate, mask=mask)
        tl.store(dz_ptr + row * J + offs_j, scale * du, mask=mask)
        dscale += tl.sum(du * z, axis=1, keep_dims=True)
        dbias = tl.sum(du, axis=0, keep_dims=True)
        tl.store(dbias_ptr + pid * J + offs_j, dbias, mask=offs_j < J)
    slope = tl.where(live, -(dscale * scale) * (scale * scale / WIDTH), 0.0)
    tl.store(slope_ptr + row, slope, mask=offs_t < N)


@triton.jit(do_not_specialize=["N", "M"])
def _hierarchical_merge_sum_kernel(
    dz_ptr, slope_ptr, dz_sum_ptr, slope_sum_ptr, N, M,
    J: tl.constexpr, STRIDE: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz and slope of the tokens of a level token, added up."""
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


@triton.jit(do_not_specialize=["M", "kept", "tiles", "total", "share"])
def _hierarchical_merge_level_bwd_kernel(
    r_ptr, gamma_ptr, dg_ptr, slope_ptr, dr_ptr, dx_ptr, dbranch_ptr, dgamma_ptr,
    stride_rb, stride_rm, stride_g, stride_drb, stride_drm,
    M, kept, tiles, total, share,
    WIDTH: tl.constexpr, D: tl.constexpr, HAS_DR: tl.constexpr, HAS_DBRANCH: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_d = offs_d < D
    gamma = tl.load(gamma_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
    dgamma = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    for tile in range(pid * share, tl.minimum((pid + 1) * share, total)):
        pid_b = tile // tiles
        offs_m = tile % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
        row = pid_b * kept + offs_m
        mask = (offs_m < M)[:, None] & mask_d[None, :]
        mask_g = (offs_m < kept)[:, None] & mask_d[None, :]
        r_ptrs = r_ptr + pid_b * stride_rb + offs_m[:, None] * stride_rm + offs_d[None, :]
        r = tl.load(r_ptrs, mask=mask_g, other=0.0).to(ACC)
        dg_ptrs = dg_ptr + row[:, None] * stride_g + offs_d[None, :]
        dg = tl.load(dg_ptrs, mask=mask_g, other=0.0).to(ACC)
        slope = tl.load(slope_ptr + row, mask=offs_m < kept, other=0.0)
        dgamma += dg * r
        dx = dg * gamma + r * slope[:, None]
        if HAS_DR:
            dr_ptrs = dr_ptr + pid_b * stride_drb + offs_m[:, None] * stride_drm + offs_d[None, :]
            dx += tl.load(dr_ptrs, mask=mask, other=0.0).to(ACC)
        offs_x = (pid_b * M + offs_m)[:, None] * D + offs_d[None, :]
        tl.store(dx_ptr + offs_x, dx, mask=mask)
        if HAS_DBRANCH:
            tl.store(dbranch_ptr + offs_x, dx, mask=mask)
    tl.store(dgamma_ptr + pid * WIDTH + offs_d, tl.sum(dgamma, axis=0), mask=mask_d)


def new_gradients(rs, needs_levels, has_dbranch, branch_dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Of the levels, and of the branches that have one of their own: uninitialised."""
    shapes = zip(rs, has_dbranch, strict=True)
    dbranches = [r.new_empty(r.shape if has else 0, dtype=branch_dtype) for r, has in shapes]
    return [r.new_empty(r.shape if needs_levels else 0) for r in rs], dbranches


def _weight_gradient(d: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    dw = d.new_empty(d.shape[1], x.shape[1], dtype=dtype)
    if not len(d):
        return dw.zero_()
    add_product(dw, d.T, x, start=True)
    return dw


def _hierarchical_merge_bwd(
    rs, strides, gamma, w_in, b_in, w_out, gs, z, norm, drs, dout, branch_dtype, has_dbranch,
    needs_levels, needs_w_in, needs_w_out,
):  # fmt: skip
    (B, N), J, dims = norm.shape, len(w_in), [r.shape[-1] for r in rs]
    _, groups = groups_of(rs, strides)
    acc = norm.dtype
    dxs, dbranches = new_gradients(rs, needs_levels, has_dbranch, branch_dtype)
    level_tiles = [tile_of(acc, D, **LEVEL_TILE) for D in dims]
    tiles = [triton.cdiv(r.shape[1], t["BLOCK_R"]) for r, t in zip(rs, level_tiles, strict=True)]
    programs = min(BWD_PROGRAMS, max(1, B * max(tiles))) if needs_levels else 0
    dgamma = norm.new_empty(programs, sum(dims))
    tile = tile_of(acc, J, **TOKEN_TILE)
    token_tiles = triton.cdiv(N, tile["BLOCK_R"])
    db_in = norm.new_empty(B * token_tiles, J)
    dw_in, dw_out = norm.new_empty(0), norm.new_empty(0)
    dws = {}  # of the columns of a level
    gammas, dgammas = gamma.split(dims), dgamma.split(dims, dim=1)
    with torch.autocast(z.device.type, enabled=False), torch.cuda.device_of(z):
        a = torch.mm(dout, w_out)  # its gradient, which the kernel replaces
        dz, slope = torch.empty_like(z), norm.new_empty(len(z))
        at_tokens = [group.rows for group in groups if group.stride == 1]
        dz_t = dz[at_tokens[0]] if at_tokens else torch.empty_like(a)
        slope_t = slope[at_tokens[0]] if at_tokens else torch.empty_like(norm)
        if a.numel():
            _hierarchical_merge_bwd_kernel[(B * token_tiles,)](
                z, norm, b_in, a, dz_t, slope_t, db_in, B, N, token_tiles,
                WIDTH=sum(dims), J=J, STRIDES=tuple(group.stride for group in groups), **tile,
            )  # fmt: skip
        if needs_w_out:
            dw_out = _weight_gradient(dout, a, acc)
        for group, g in zip(groups, gs, strict=True):
            dz_g = dz[group.rows]
            if group.stride > 1 and dz_g.numel():
                columns = tile_of(acc, J, **LEVEL_TILE)["BLOCK_C"]
                _hierarchical_merge_sum_kernel[(len(dz_g), triton.cdiv(J, columns))](
                    dz_t, slope_t, dz_g, slope[group.rows], N, group.tokens,
                    J=J, STRIDE=group.stride, ACC=tile["ACC"],
                    BLOCK_R=min(STEP, triton.next_power_of_2(group.stride)), BLOCK_C=columns,
                )  # fmt: skip
            widths = [dims[level] for level in group.levels]
            if needs_w_in:
                dw = _weight_gradient(dz_g, g, acc)
                dws |= zip(group.levels, dw.split(widths, dim=1), strict=True)
            if not needs_levels:
                continue
            dg = torch.mm(dz_g, columns_of(w_in, dims, group.levels))
            for level, part in zip(group.levels, dg.split(widths, dim=1), strict=True):
                r, (_, M, D) = rs[level], rs[level].shape
                dr = r if drs[level] is None else drs[level]
                total = B * tiles[level]
                _hierarchical_merge_level_bwd_kernel[
                    (programs, triton.cdiv(D, level_tiles[level]["BLOCK_C"]))
                ](
                    r, gammas[level], part, slope[group.rows], dr, dxs[level], dbranches[level],
                    dgammas[level],
                    r.stride(0), r.stride(1), part.stride(0), dr.stride(0), dr.stride(1),
                    M, group.tokens, tiles[level], total, triton.cdiv(total, programs),
                    WIDTH=sum(dims), D=D, HAS_DR=drs[level] is not None,
                    HAS_DBRANCH=has_dbranch[level], **level_tiles[level],
                )  # fmt: skip
        if needs_w_in:
            dw_in = dw if len(groups) == 1 else torch.cat([dws[i] for i in range(len(rs))], dim=1)
        sums = dgamma.sum(dim=0), dw_in, db_in.sum(dim=0), dw_out, dout.sum(dim=0, dtype=acc)
        return dxs, dbranches, *sums
