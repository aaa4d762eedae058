"""Forward: a pass over each level, the products, and a pass at token rate.

Levels of one stride and length are a group. W is the width of all levels together, J the width of
the hidden layer; z has the products of all groups, one after the other.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._register import is_plain
from .._rounding import divide, sqrt
from .._silu import sigmoid
from ..launch import KINDS, Kernel, cdiv, next_power_of_2
from ..products import cast, sum_dtype

# The most columns of a tile, and its numbers. On an H200 they are the best of 14 choices for all
# shapes but a narrow one (J 256).
LEVEL_TILE = dict(columns=256, elements=2048, num_warps=4)
TOKEN_TILE = dict(columns=1024, elements=2048, num_warps=4)

# unspecialized, as the kernel is compiled for the alignment of a contiguous level instead
STRIDES_OF_LEVEL = ["stride_xb", "stride_xm", "stride_bb", "stride_bm"]


@triton.jit(do_not_specialize=["M", "kept", "tiles", *STRIDES_OF_LEVEL])
def _hierarchical_merge_level_fwd_kernel(
    x_ptr, branch_ptr, r_ptr, square_ptr,
    stride_xb, stride_xm, stride_bb, stride_bm, stride_r,
    M, kept, tiles,
    D: tl.constexpr, HAS_BRANCH: tl.constexpr, FIRST: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """r of a level; |r|^2 is added to that of the levels before it in the same group."""
    pid = tl.program_id(0).to(tl.int64)
    pid_b = pid // tiles
    offs_m = pid % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    stride_xb, stride_xm = tl.multiple_of(stride_xb, ALIGNED), tl.multiple_of(stride_xm, ALIGNED)
    stride_bb, stride_bm = tl.multiple_of(stride_bb, ALIGNED), tl.multiple_of(stride_bm, ALIGNED)
    squares = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    for d in range(0, D, BLOCK_C):
        offs_d = d + tl.arange(0, BLOCK_C)
        mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]
        x_ptrs = x_ptr + pid_b * stride_xb + offs_m[:, None] * stride_xm + offs_d[None, :]
        r = tl.load(x_ptrs, mask=mask, other=0.0)
        if HAS_BRANCH:
            b_ptrs = branch_ptr + pid_b * stride_bb + offs_m[:, None] * stride_bm + offs_d[None, :]
            branch = tl.load(b_ptrs, mask=mask, other=0.0)
            r = (r.to(ACC) + branch.to(ACC)).to(r_ptr.dtype.element_ty)
        r_ptrs = r_ptr + (pid_b * M + offs_m)[:, None] * stride_r + offs_d[None, :]
        tl.store(r_ptrs, r, mask=mask)
        squares += r.to(ACC) * r.to(ACC)
    square, row = tl.sum(squares, axis=1), pid_b * kept + offs_m
    if not FIRST:
        square += tl.load(square_ptr + row, mask=offs_m < kept, other=0.0)
    tl.store(square_ptr + row, square, mask=offs_m < kept)


@triton.jit
def at_tokens(ptr, pid_b, offs_t, offs, B, N, WIDTH: tl.constexpr, STRIDES: tl.constexpr, ACC):
    """The sum over all strides s of row t // s, at tokens t [BLOCK_R, 1] and columns `offs`.

    ptr points to rows WIDTH wide: (B, ceil(N / s)) of them for every stride, one after the other.
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
    clamped = tl.maximum(norm, least, propagate_nan=tl.PropagateNan.ALL)
    return divide(root, clamped), norm > least


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
    square = at_tokens(square_ptr, pid_b, offs_t, offs, B, N, 1, STRIDES, ACC)
    norm = sqrt(square)
    tl.store(norm_ptr + row, norm, mask=offs_t < N)
    scale, _ = scale_of(norm, WIDTH)
    for j in range(0, J, BLOCK_C):
        offs_j = (j + tl.arange(0, BLOCK_C))[None, :]
        z = at_tokens(z_ptr, pid_b, offs_t, offs_j, B, N, J, STRIDES, ACC)
        u = scale * z + tl.load(bias_ptr + offs_j, mask=offs_j < J, other=0.0).to(ACC)
        a = u * sigmoid(u, a_ptr.dtype.element_ty)
        tl.store(a_ptr + row * J + offs_j, a, mask=(offs_t < N) & (offs_j < J))


class Group(NamedTuple):
    """Levels of one stride and length, side by side."""

    stride: int
    levels: list[int]
    widths: list[int]
    tokens: int  # how many tokens of each level count


def _group(shapes, strides) -> tuple[int, list[Group]]:
    """Tokens of the shortest level at token rate, and the groups of levels."""
    N = min(shape[1] * stride for shape, stride in zip(shapes, strides, strict=True))
    members = []
    for level in range(len(shapes)):
        kind = lambda i: (strides[i], shapes[i][1])
        alike = [indices for indices in members if kind(indices[0]) == kind(level)]
        if alike:
            alike[0].append(level)
        else:
            members.append([level])
    groups = []
    for indices in members:
        stride = strides[indices[0]]
        tokens = -(-N // stride)
        widths = [shapes[level][2] for level in indices]
        groups.append(Group(stride, indices, widths, tokens))
    return N, groups


_grouped = lru_cache(KINDS)(_group)


def groups_of(levels, strides) -> tuple[int, list[Group]]:
    """Tokens of the shortest level at token rate, and the groups in the order of their rows."""
    group = _grouped if is_plain(*levels) else _group  # sizes may be symbols, which no cache takes
    return group(tuple([x.shape for x in levels]), tuple(strides))


def columns_of(w: Tensor, dims: list[int], levels: list[int]) -> Tensor:
    """The columns of w that belong to these levels, side by side: a view of w if they are
    neighbours in it.
    """
    if levels[-1] - levels[0] + 1 == len(levels):
        return w[:, sum(dims[: levels[0]]) : sum(dims[: levels[-1] + 1])]
    parts = w.split(dims, dim=1)
    return torch.cat([parts[level] for level in levels], dim=1)


def factor_of(r: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """The levels of a group as the factor of a product: (B tokens, width)."""
    return cast(r[:, :tokens].flatten(0, 1), dtype)


def matrix_config(width: int, columns: int, elements: int, num_warps: int) -> dict:
    """Sizes of a tile [BLOCK_R, BLOCK_C] of rows that are `width` wide."""
    columns = min(columns, next_power_of_2(width))
    return dict(BLOCK_R=elements // columns, BLOCK_C=columns, num_warps=num_warps)


@lru_cache(KINDS)
def _kernel_of_level(D: int, dtype: torch.dtype, has_branch: bool, first: bool) -> Kernel:
    return Kernel(
        _hierarchical_merge_level_fwd_kernel, dtype, D=D, HAS_BRANCH=has_branch, FIRST=first,
        ALIGNED=_power_of_two_in(D), **matrix_config(D, **LEVEL_TILE),
        # a square that is fused with the sum across lanes gives each lane another last bit, and all
        # of them write the sum
        enable_fp_fusion=False,
    )  # fmt: skip


@lru_cache(KINDS)
def _kernel_of_tokens(W: int, J: int, strides: tuple[int, ...], dtype: torch.dtype) -> Kernel:
    constants = dict(WIDTH=W, J=J, STRIDES=strides, **matrix_config(J, **TOKEN_TILE))
    return Kernel(_hierarchical_merge_fwd_kernel, dtype, **constants)


def new_outputs(levels, strides, w_in, w_out) -> tuple:
    """Uninitialised: the levels of each group side by side, w_in gamma, z, norm, and merged."""
    x, B, (N, groups) = levels[0], levels[0].shape[0], groups_of(levels, strides)
    J, W = w_in.shape
    rows = B * sum([group.tokens for group in groups])
    return (
        [x.new_empty(B, levels[group.levels[0]].shape[1], sum(group.widths)) for group in groups],
        w_out.new_empty(J, W),
        w_out.new_empty(rows, J),
        x.new_empty(B, N, dtype=sum_dtype(x.dtype)),
        w_out.new_empty(B, N, w_out.shape[0]),
    )


def _power_of_two_in(n: int) -> int:
    """The greatest power of two up to 16 that divides n."""
    return min(n & -n, 16)


def _aligned(x: Tensor | None) -> Tensor | None:
    """x, copied unless it is aligned as a contiguous tensor is. The order in which a kernel sums a
    row follows from how it loads the row, and the result must not depend on the strides of x.
    """
    if x is None or not x.numel():
        return x
    unit, (stride_b, stride_m, _) = _power_of_two_in(x.shape[2]), x.stride()
    if x.data_ptr() % 16 == stride_b % unit == stride_m % unit == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _hierarchical_merge_fwd(levels, strides, gamma, w_in, b_in, w_out, b_out, branches):
    rs, w, z, norm, merged = new_outputs(levels, strides, w_in, w_out)
    (B, N), (J, W), dims = norm.shape, w_in.shape, [x.shape[-1] for x in levels]
    _, groups = groups_of(levels, strides)
    square, a = norm.new_empty(z.shape[0]), w.new_empty(B * N, J)
    torch.mul(w_in, gamma, out=w)
    rows = [B * group.tokens for group in groups]
    squares, zs = square.split_with_sizes(rows), z.split_with_sizes(rows)
    for group, side_by_side, square_g, z_g in zip(groups, rs, squares, zs, strict=True):
        parts = side_by_side.split_with_sizes(group.widths, 2)
        for level, r in zip(group.levels, parts, strict=True):
            x, branch = _aligned(levels[level]), _aligned(branches[level])
            if not x.numel():
                continue
            b, (_, M, D) = x if branch is None else branch, x.shape
            kernel = _kernel_of_level(D, norm.dtype, branch is not None, level == group.levels[0])
            tiles = cdiv(M, kernel.constants["BLOCK_R"])
            numbers = *x.stride()[:2], *b.stride()[:2], r.stride(1), M, group.tokens, tiles
            kernel((B * tiles,), (x, b, r, square_g), *numbers)
        columns = columns_of(w, dims, group.levels)
        torch.mm(factor_of(side_by_side, group.tokens, z.dtype), columns.T, out=z_g)
    if a.numel():
        kernel = _kernel_of_tokens(W, J, tuple([group.stride for group in groups]), norm.dtype)
        tiles = cdiv(N, kernel.constants["BLOCK_R"])
        kernel((B * tiles,), (z, square, b_in, norm, a), B, N, tiles)
    torch.addmm(cast(b_out, a.dtype), a, w_out.T, out=merged.flatten(0, 1))
    return rs, w, z, norm, merged
