"""Residual add, token shift and norm in one pass.

    r[b, m, d] = x[b, m, d] + branch[b, m, d]
    s[b, m, d] = r[b, m, d]              for d <  ceil(D / 2)
                 r[b, m - dilation, d]   for d >= ceil(D / 2), zero where m < dilation
    y[b, m, :] = norm(s[b, m, :])
        rms:     s / max(|s|, 1e-12) * sqrt(D) * gamma
        layer:   (s - mean s) / sqrt(var s + 1e-5) * gamma + beta

The one idea: a program has rows of s, not of x. Every number of x, branch, r and their gradients
belongs to one row of s, or to one of `dilation` rows past its end, so each is read once and written
once, in forward and backward alike, without atomics. Reference: reference.norm_token_shift
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._autograd import apply, first_order
from ._register import register
from ._rounding import divide, sqrt
from ._rows import MAX_D, columns, contiguous_rows, row_config, row_sum
from ._sums import column_sums
from .launch import KINDS, Kernel, cdiv
from .products import cast, sum_dtype

# The fastest on an H200, or within 5%, at D 128 to 1024 (benchmarks/results/search/h200.json)
FWD_TILE = 4096  # numbers of a tile in forward
BWD_TILE = 1024  # numbers of a tile in backward
WARP_TILE = 1024  # numbers of a tile that a warp holds
BWD_PROGRAMS = 1056  # programs in backward, each of which leaves one row of partial sums
STAGES = 3  # tiles that a program has under way in backward, if rows have WIDE numbers or more
WIDE = 512


@triton.jit
def _normalize(s, mask_d, D: tl.constexpr, LAYER: tl.constexpr):
    """Rows s, normalized; the scale of each, and whether it depends on the row."""
    if LAYER:
        s = tl.where(mask_d, s - row_sum(s) / D, 0.0)
    square = row_sum(s * s)
    square = square / D + 1e-5 if LAYER else square
    one = tl.full([1, 1, 1], 1.0 if LAYER else D**0.5, s.dtype)
    least = tl.full([1, 1, 1], 0.0 if LAYER else 1e-12, s.dtype)
    length = sqrt(square)  # in full precision, as backward subtracts nearly equal numbers
    clamped = tl.maximum(length, least, propagate_nan=tl.PropagateNan.ALL)
    scale = divide(one, clamped)
    return s * scale, scale, length > least


@triton.jit(do_not_specialize=["M", "lag", "tiles"])
def _norm_token_shift_fwd_kernel(
    x_ptr, branch_ptr, gamma_ptr, beta_ptr, r_ptr, y_ptr,
    stride_xb, stride_xm, stride_bb, stride_bm,
    M, lag, tiles,
    D: tl.constexpr, KEPT: tl.constexpr, LAYER: tl.constexpr, HAS_BRANCH: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, ROUNDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """r and y of a tile of rows of s."""
    pid = tl.program_id(0).to(tl.int64)
    pid_b = pid // tiles
    offs_m = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None]
    offs_d = columns(ROUNDS, LANES)
    mask_d = offs_d < D
    src_m = offs_m - tl.where(offs_d < KEPT, 0, lag)  # [BLOCK_M, ROUNDS, LANES]
    mask_s = mask_d & (src_m >= 0) & (src_m < M)

    s = tl.load(x_ptr + pid_b * stride_xb + src_m * stride_xm + offs_d, mask=mask_s, other=0.0)
    if HAS_BRANCH:
        branch = tl.load(
            branch_ptr + pid_b * stride_bb + src_m * stride_bm + offs_d, mask=mask_s, other=0.0
        )
        s = (s.to(ACC) + branch.to(ACC)).to(r_ptr.dtype.element_ty)
        tl.store(r_ptr + (pid_b * M + src_m) * D + offs_d, s, mask=mask_s)

    y, _, _ = _normalize(s.to(ACC), mask_d, D, LAYER)
    y *= tl.load(gamma_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)
    if LAYER:
        y += tl.load(beta_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)
    tl.store(y_ptr + (pid_b * M + offs_m) * D + offs_d, y, mask=mask_d & (offs_m < M))


@triton.jit(do_not_specialize=["M", "lag", "tiles", "total", "share"])
def _norm_token_shift_bwd_kernel(
    r_ptr, gamma_ptr, dr_ptr, dy_ptr, dx_ptr, dbranch_ptr, dweight_ptr,
    stride_rb, stride_rm, stride_drb, stride_drm, stride_dyb, stride_dym,
    M, lag, tiles, total, share,
    D: tl.constexpr, KEPT: tl.constexpr, LAYER: tl.constexpr, HAS_DR: tl.constexpr,
    HAS_DBRANCH: tl.constexpr, STAGES: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, ROUNDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The gradients of x and of the branch, and one row of partial sums of dgamma (and dbeta)
    per program.
    """
    pid = tl.program_id(0).to(tl.int64)
    offs_d = columns(ROUNDS, LANES)
    mask_d = offs_d < D
    gamma = tl.load(gamma_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)
    dgamma = tl.zeros([BLOCK_M, ROUNDS, LANES], dtype=ACC)
    dbeta = tl.zeros([BLOCK_M, ROUNDS, LANES], dtype=ACC)

    for i in tl.range(pid * share, tl.minimum((pid + 1) * share, total), num_stages=STAGES):
        pid_b = i // tiles
        offs_m = i % tiles * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None]
        src_m = offs_m - tl.where(offs_d < KEPT, 0, lag)  # [BLOCK_M, ROUNDS, LANES]
        mask_s = mask_d & (src_m >= 0) & (src_m < M)
        mask_y = mask_d & (offs_m < M)

        s = tl.load(r_ptr + pid_b * stride_rb + src_m * stride_rm + offs_d, mask=mask_s, other=0.0)
        dy = tl.load(
            dy_ptr + pid_b * stride_dyb + offs_m * stride_dym + offs_d, mask=mask_y, other=0.0
        ).to(ACC)
        if HAS_DR:
            dr = tl.load(
                dr_ptr + pid_b * stride_drb + src_m * stride_drm + offs_d, mask=mask_s, other=0.0
            )
        y, scale, live = _normalize(s.to(ACC), mask_d, D, LAYER)
        dgamma += dy * y
        dbeta += dy

        g = dy * gamma
        along = tl.where(live, row_sum(g * y) / D, 0.0)
        if LAYER:
            g -= row_sum(g) / D
        dx = (g - y * along) * scale
        if HAS_DR:
            dx += dr.to(ACC)
        offs_x = (pid_b * M + src_m) * D + offs_d
        tl.store(dx_ptr + offs_x, dx, mask=mask_s)
        if HAS_DBRANCH:
            tl.store(dbranch_ptr + offs_x, dx, mask=mask_s)

    offs_w = pid * (2 * D if LAYER else D) + offs_d
    tl.store(dweight_ptr + offs_w, tl.sum(dgamma, axis=0, keep_dims=True), mask=mask_d)
    if LAYER:
        dbeta = tl.sum(dbeta, axis=0, keep_dims=True)
        tl.store(dweight_ptr + offs_w + D, dbeta, mask=mask_d)


@lru_cache(KINDS)
def _kernel_of(kernel, D: int, dtype: torch.dtype, elements: int, layer: bool, **options) -> Kernel:
    # backward subtracts products, so all must be rounded alike
    constants = dict(D=D, KEPT=(D + 1) // 2, LAYER=layer, enable_fp_fusion=False)
    return Kernel(kernel, dtype, **constants, **options, **row_config(D, elements, WARP_TILE))


def _norm_token_shift_fwd(x, gamma, beta, branch, dilation, dtype):
    B, M, D = x.shape
    y = x.new_empty(B, M, D, dtype=dtype)
    # an op may not return its input: without a branch, r is x
    r = x.new_empty(0) if branch is None else x.new_empty(B, M, D)
    if y.numel():
        size = D, x.dtype, FWD_TILE, beta is not None
        kernel = _kernel_of(_norm_token_shift_fwd_kernel, *size, HAS_BRANCH=branch is not None)
        b = x if branch is None else branch
        lag = min(dilation, M)
        # tiles of a sequence: those of its rows of s, and of the rows past its end
        tiles = cdiv(M + lag, kernel.constants["BLOCK_M"])
        tensors = x, b, gamma, gamma if beta is None else beta, r, y
        kernel((B * tiles,), tensors, *x.stride()[:2], *b.stride()[:2], M, lag, tiles)
    return r, y


def _norm_token_shift_bwd(r, gamma, dr, dy, layer, dilation, branch_dtype):
    B, M, D = r.shape
    has_dbranch = branch_dtype != r.dtype
    options = dict(HAS_DR=dr is not None, HAS_DBRANCH=has_dbranch)
    options |= dict(STAGES=STAGES if D >= WIDE else 1)
    kernel = _kernel_of(_norm_token_shift_bwd_kernel, D, r.dtype, BWD_TILE, layer, **options)
    lag = min(dilation, M)
    tiles = cdiv(M + lag, kernel.constants["BLOCK_M"])
    share = cdiv(B * tiles, BWD_PROGRAMS)
    programs = cdiv(B * tiles, max(1, share))
    dx = r.new_empty(B, M, D)
    dbranches = [r.new_empty(B, M, D, dtype=branch_dtype)] if has_dbranch else []
    partial = r.new_empty(programs, 2 * D if layer else D, dtype=sum_dtype(r.dtype))
    if dx.numel():
        d = dy if dr is None else dr
        strides = *r.stride()[:2], *d.stride()[:2], *dy.stride()[:2]
        tensors = r, gamma, d, dy, dx, *(dbranches or [dx]), partial
        kernel((programs,), tensors, *strides, M, lag, tiles, B * tiles, share)
    return dx, dbranches, cast(column_sums(partial), gamma.dtype)


def _fake_fwd(x, gamma, beta, branch, dilation, dtype):
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape, dtype=dtype)


def _fake_bwd(r, gamma, dr, dy, layer, dilation, branch_dtype):
    dbranches = [] if branch_dtype == r.dtype else [r.new_empty(r.shape, dtype=branch_dtype)]
    return r.new_empty(r.shape), dbranches, gamma.new_empty((1 + layer) * r.shape[-1])


_forward = register(
    "norm_token_shift",
    "(Tensor x, Tensor gamma, Tensor? beta, Tensor? branch, int dilation, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    _norm_token_shift_fwd,
    _fake_fwd,
)
_backward = register(
    "norm_token_shift_bwd",
    "(Tensor r, Tensor gamma, Tensor? dr, Tensor dy, bool layer, int dilation,"
    " ScalarType branch_dtype) -> (Tensor, Tensor[], Tensor)",
    _norm_token_shift_bwd,
    _fake_bwd,
)


class _NormTokenShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, branch, dilation, dtype):
        r, y = _forward(x, gamma, beta, branch, dilation, dtype)
        r = x if branch is None else r
        ctx.save_for_backward(r, gamma)
        ctx.dilation, ctx.layer = dilation, beta is not None
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        return r, y

    @staticmethod
    @first_order("norm_token_shift")
    def backward(ctx, dr, dy):
        r, gamma = ctx.saved_tensors
        has_branch = ctx.branch_dtype is not None
        dtype = ctx.branch_dtype if has_branch else r.dtype
        if dy is None:
            dbranch = dr.to(dtype) if has_branch and dr is not None else None
            return dr, None, None, dbranch, None, None
        dx, dbranches, dweight = _backward(
            r, gamma, contiguous_rows(dr), contiguous_rows(dy), ctx.layer, ctx.dilation, dtype
        )
        (dbranch,) = dbranches or [dx]
        sizes = [len(gamma)] * 2
        dgamma, dbeta = dweight.split_with_sizes(sizes) if ctx.layer else (dweight, None)
        return dx, dgamma, dbeta, dbranch if has_branch else None, None, None


def norm_token_shift(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    branch: Tensor | None = None,
    *,
    norm: str = "rms",
    dilation: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, shift half of its channels, normalize.

    Args:
        x: (B, M, D), the residual stream; D contiguous and at most 8192, B and M may be strided.
        gamma: (D,), the norm's weight.
        beta: (D,), the bias of norm="layer"; None for norm="rms".
        branch: (B, M, D) to be added to x, or None.
        norm: "rms" (x / max(|x|, 1e-12) * sqrt(D)) or "layer" (eps 1e-5).
        dilation: how many tokens earlier the second half of the channels is taken; 0 is no shift.
        dtype: the dtype of y; that of x by default.

    Returns:
        r: (B, M, D), x + branch in the dtype of x; x itself without a branch.
        y: (B, M, D), norm(shift(r)) in `dtype`, contiguous.

    Raises:
        ValueError: naming the argument whose shape, strides, device or value is not as above.

    Source: token shift of RWKV (Peng et al. 2023, arXiv 2305.13048), RMSNorm of
    simple-hierarchical-transformer, whose axial rearrange the dilation replaces.
    """
    if x.ndim != 3 or x.stride(-1) != 1:
        raise ValueError(
            f"x must be (B, M, D) with contiguous D, got {tuple(x.shape)}, strides {x.stride()}"
        )
    D = x.shape[-1]
    if not 1 <= D <= MAX_D:
        raise ValueError(f"x must have a width D of 1 to {MAX_D}, got {D}")
    if norm not in ("rms", "layer"):
        raise ValueError(f'norm must be "rms" or "layer", got {norm!r}')
    if (beta is None) != (norm == "rms"):
        raise ValueError(f'beta must be given for norm="layer" and only there, got norm={norm!r}')
    gamma, beta = contiguous_rows(gamma), contiguous_rows(beta)
    for name, t, shape in (
        ("gamma", gamma, (D,)), ("beta", beta, (D,)), ("branch", branch, x.shape),
    ):  # fmt: skip
        if t is not None and (t.shape != shape or t.stride(-1) != 1 or t.device != x.device):
            raise ValueError(
                f"{name} must be {tuple(shape)} on {x.device} with a contiguous last dimension,"
                f" got {tuple(t.shape)} on {t.device}, strides {t.stride()}"
            )
    if dilation < 0:
        raise ValueError(f"dilation must be at least 0, got {dilation}")
    return apply(_NormTokenShift, x, gamma, beta, branch, dilation, dtype or x.dtype)
