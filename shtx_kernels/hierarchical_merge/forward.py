"""Forward: a pass over each level, the products, a pass at token rate."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# of columns and elements at most; on an H200 the best of 14, all but one narrow shape's (J 256)
LEVEL_TILE = dict(columns=256, elements=2048, num_warps=4)
TOKEN_TILE = dict(columns=1024, elements=2048, num_warps=4)


@triton.jit(do_not_specialize=["M", "kept", "tiles"])
def _hierarchical_merge_level_fwd_kernel(
    x_ptr, branch_ptr, gamma_ptr, r_ptr, g_ptr, square_ptr,
    stride_xb, stride_xm, stride_bb, stride_bm, stride_g,
    M, kept, tiles,
    D: tl.constexpr, HAS_BRANCH: tl.constexpr, FIRST: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """r and g of a level, and |r|^2 added to that of the levels before it, of the same stride."""
    pid = tl.program_id(0).to(tl.int64)
    pid_b = pid // tiles
    offs_m = pid % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    row = pid_b * kept + offs_m
    squares = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    for d in range(0, D, BLOCK_C):
        offs_d = d + tl.arange(0, BLOCK_C)
        mask_d = offs_d < D
        mask = (offs_m < M)[:, None] & mask_d[None, :]
        x_ptrs = x_ptr + pid_b * stride_xb + offs_m[:, None] * stride_xm + offs_d[None, :]
        r = tl.load(x_ptrs, mask=mask, other=0.0)
        if HAS_BRANCH:
            b_ptrs = branch_ptr + pid_b * stride_bb + offs_m[:, None] * stride_bm + offs_d[None, :]
            branch = tl.load(b_ptrs, mask=mask, other=0.0)
            r = (r.to(ACC) + branch.to(ACC)).to(r_ptr.dtype.element_ty)
            tl.store(r_ptr + (pid_b * M + offs_m)[:, None] * D + offs_d[None, :], r, mask=mask)
        r = r.to(ACC)
        squares += r * r
        g = r * tl.load(gamma_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
        mask &= (offs_m < kept)[:, None]
        tl.store(g_ptr + row[:, None] * stride_g + offs_d[None, :], g, mask=mask)
    square = tl.sum(squares, axis=1)
    if not FIRST:
        square += tl.load(square_ptr + row, mask=offs_m < kept, other=0.0)
    tl.store(square_ptr + row, square, mask=offs_m < kept)


@triton.jit
def at_tokens(ptr, pid_b, offs_t, offs, B, N, WIDTH: tl.constexpr, STRIDES: tl.constexpr, ACC):
    """Sum over the strides of row t // s of each, at tokens t [BLOCK_R, 1] and columns `offs`.

    ptr: rows (B, ceil(N / s)) of the strides one after the other, WIDTH wide.
    """
    mask = (offs_t < N) & (offs < WIDTH)
    total = tl.zeros(mask.shape, dtype=ACC)
    for i in tl.static_range(len(STRIDES)):
        rows = ((N + STRIDES[i] - 1) // STRIDES[i]).to(tl.int64)
        row = pid_b * rows + offs_t // STRIDES[i]
        total += tl.load(ptr + row * WIDTH + offs, mask=mask, other=0.0).to(ACC)
        ptr += B * rows * WIDTH
    return total


@triton.jit
def scale_of(norm, WIDTH: tl.constexpr):
    """sqrt(WIDTH) / max(norm, 1e-12), and whether it depends on the norm."""
    root = tl.full(norm.shape, WIDTH**0.5, norm.dtype)
    least = tl.full(norm.shape, 1e-12, norm.dtype)
    return root / tl.maximum(norm, least, propagate_nan=tl.PropagateNan.ALL), norm > least


@triton.jit(do_not_specialize=["B", "N", "tiles"])
def _hierarchical_merge_fwd_kernel(
    z_ptr, square_ptr, bias_ptr, norm_ptr, a_ptr, B, N, tiles,
    WIDTH: tl.constexpr, J: tl.constexpr, STRIDES: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """norm (B, N) and a = silu(u) (B, N, J)."""
    pid = tl.program_id(0).to(tl.int64)
    pid_b = pid // tiles
    offs_t = (pid % tiles * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    row = pid_b * N + offs_t
    offs = tl.arange(0, 1)[None, :]
    norm = tl.sqrt(at_tokens(square_ptr, pid_b, offs_t, offs, B, N, 1, STRIDES, ACC))
    tl.store(norm_ptr + row, norm, mask=offs_t < N)
    scale, _ = scale_of(norm, WIDTH)
    for j in range(0, J, BLOCK_C):
        offs_j = (j + tl.arange(0, BLOCK_C))[None, :]
        z = at_tokens(z_ptr, pid_b, offs_t, offs_j, B, N, J, STRIDES, ACC)
        u = scale * z + tl.load(bias_ptr + offs_j, mask=offs_j < J, other=0.0).to(ACC)
        a = u * tl.sigmoid(u)
        tl.store(a_ptr + row * J + offs_j, a, mask=(offs_t < N) & (offs_j < J))


class Group(NamedTuple):
    """The levels of one stride."""

    stride: int
    levels: list[int]
    tokens: int  # of each that count
    rows: slice  # of z


def groups_of(levels, strides) -> tuple[int, list[Group]]:
    """Tokens of the shortest level at token rate, and the groups in order of their rows."""
    N = min(x.shape[1] * stride for x, stride in zip(levels, strides, strict=True))
    members = {}
    for level, stride in enumerate(strides):
        members.setdefault(stride, []).append(level)
    groups, first = [], 0
    for stride, indices in members.items():
        tokens = -(-N // stride)
        last = first + levels[0].shape[0] * tokens
        groups.append(Group(stride, indices, tokens, slice(first, last)))
        first = last
    return N, groups


def columns_of(w: Tensor, dims: list[int], levels: list[int]) -> Tensor:
    """The columns of w of these levels, side by side: a view where they are so in w."""
    if levels[-1] - levels[0] + 1 == len(levels):
        return w[:, sum(dims[: levels[0]]) : sum(dims[: levels[-1] + 1])]
    parts = w.split(dims, dim=1)
    return torch.cat([parts[level] for level in levels], dim=1)


def tile_of(dtype: torch.dtype, width: int, columns: int, elements: int, num_warps: int) -> dict:
    """What a kernel over rows so wide is compiled for."""
    columns = min(columns, triton.next_power_of_2(width))
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    return dict(ACC=acc, BLOCK_R=elements // columns, BLOCK_C=columns, num_warps=num_warps)


def new_outputs(levels, strides, w_in, w_out, branches) -> tuple:
    """Uninitialised: rs (of 0 elements without a branch), the g of each group, z, norm, merged."""
    B, (N, groups) = levels[0].shape[0], groups_of(levels, strides)
    widths = [sum(levels[level].shape[-1] for level in group.levels) for group in groups]
    return (
        [x.new_empty(0 if b is None else x.shape) for x, b in zip(levels, branches, strict=True)],
        [w_in.new_empty(B * group.tokens, D) for group, D in zip(groups, widths, strict=True)],
        w_in.new_empty(groups[-1].rows.stop, len(w_in)),
        levels[0].new_empty(B, N, dtype=torch.promote_types(levels[0].dtype, torch.float32)),
        w_out.new_empty(B, N, len(w_out)),
    )


def _hierarchical_merge_fwd(levels, strides, gamma, w_in, b_in, w_out, b_out, branches):
    rs, gs, z, norm, merged = new_outputs(levels, strides, w_in, w_out, branches)
    (B, N), J, acc, dims = norm.shape, len(w_in), norm.dtype, [x.shape[-1] for x in levels]
    _, groups = groups_of(levels, strides)
    square, a = norm.new_empty(len(z)), w_in.new_empty(B * N, J)
    gammas = gamma.split(dims)
    # autocast would narrow the products of wider numbers
    with torch.autocast(z.device.type, enabled=False), torch.cuda.device_of(z):
        for group, g in zip(groups, gs, strict=True):
            parts = g.split([dims[level] for level in group.levels], dim=1)
            for level, part in zip(group.levels, parts, strict=True):
                x, branch = levels[level], branches[level]
                if not x.numel():
                    continue
                b, (_, M, D) = x if branch is None else branch, x.shape
                tile = tile_of(acc, D, **LEVEL_TILE)
                tiles = triton.cdiv(M, tile["BLOCK_R"])
                _hierarchical_merge_level_fwd_kernel[(B * tiles,)](
                    x, b, gammas[level], rs[level], part, square[group.rows],
                    x.stride(0), x.stride(1), b.stride(0), b.stride(1), part.stride(0),
                    M, group.tokens, tiles,
                    D=D, HAS_BRANCH=branch is not None, FIRST=level == group.levels[0], **tile,
                )  # fmt: skip
            torch.mm(g, columns_of(w_in, dims, group.levels).T, out=z[group.rows])
        if a.numel():
            tile = tile_of(acc, J, **TOKEN_TILE)
            tiles = triton.cdiv(N, tile["BLOCK_R"])
            _hierarchical_merge_fwd_kernel[(B * tiles,)](
                z, square, b_in, norm, a, B, N, tiles,
                WIDTH=sum(dims), J=J, STRIDES=tuple(group.stride for group in groups), **tile,
            )  # fmt: skip
        torch.addmm(b_out.to(a.dtype), a, w_out.T, out=merged.view(B * N, len(w_out)))
    return rs, gs, z, norm, merged
