"""Residual add, token shift and norm in one pass.

    r[b, m, d] = x[b, m, d] + branch[b, m, d]
    s[b, m, d] = r[b, m, d]              for d <  ceil(D / 2)
                 r[b, m - dilation, d]   for d >= ceil(D / 2), zero where m < dilation
    y[b, m, :] = norm(s[b, m, :])
        rms:     s / max(|s|, 1e-12) * sqrt(D) * gamma
        layer:   (s - mean s) / sqrt(var s + 1e-5) * gamma + beta

The one idea: a program owns rows of s, not of x. Every element of x, branch, r and their gradients
belongs to one row of s, or to one of the `dilation` rows past its end, so each is read once and
written once, in forward and backward alike, without atomics. Reference: reference.norm_token_shift
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2048  # elements of a program's tile: at 4096, backward spills on sm_80, sm_90 and sm_100
WARP_TILE = 512  # elements of it that a warp holds
BWD_TILES = 8  # tiles that share one row of partial weight gradients
MAX_D = 8192  # a row is held in registers


@triton.jit
def _normalize(s, mask_d, D: tl.constexpr, LAYER: tl.constexpr):
    """Normalized rows s [BLOCK_M, BLOCK_D], their scale, and whether it depends on them."""
    if LAYER:
        s = tl.where(mask_d, s - tl.sum(s, axis=1, keep_dims=True) / D, 0.0)
    square = tl.sum(s * s, axis=1, keep_dims=True)
    square = square / D + 1e-5 if LAYER else square
    one = tl.full([1, 1], 1.0 if LAYER else D**0.5, s.dtype)
    least = tl.full([1, 1], 0.0 if LAYER else 1e-12, s.dtype)
    # sqrt and division of fp32 are approximate by default, and backward subtracts near equals
    length = tl.sqrt(square) if s.dtype == tl.float64 else tl.sqrt_rn(square)
    clamped = tl.maximum(length, least, propagate_nan=tl.PropagateNan.ALL)
    scale = one / clamped if s.dtype == tl.float64 else tl.div_rn(one, clamped)
    return s * scale, scale, length > least


@triton.jit(do_not_specialize=["M", "lag", "tiles"])
def _norm_token_shift_fwd_kernel(
    x_ptr, branch_ptr, gamma_ptr, beta_ptr, r_ptr, y_ptr,
    stride_xb, stride_xm, stride_bb, stride_bm,
    M, lag, tiles,
    D: tl.constexpr, KEPT: tl.constexpr, LAYER: tl.constexpr, HAS_BRANCH: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    pid_b = pid // tiles
    offs_m = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < D
    src_m = offs_m - tl.where(offs_d < KEPT, 0, lag)  # [BLOCK_M, BLOCK_D]
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


@triton.jit(do_not_specialize=["M", "lag", "tiles", "total"])
def _norm_token_shift_bwd_kernel(
    r_ptr, gamma_ptr, dr_ptr, dy_ptr, dx_ptr, dweight_ptr,
    stride_rb, stride_rm, stride_drb, stride_drm, stride_dyb, stride_dym,
    M, lag, tiles, total,
    D: tl.constexpr, KEPT: tl.constexpr, LAYER: tl.constexpr, HAS_DR: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < D
    gamma = tl.load(gamma_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)
    dgamma = tl.zeros([1, BLOCK_D], dtype=ACC)
    dbeta = tl.zeros([1, BLOCK_D], dtype=ACC)

    for i in range(TILES):
        tile = pid * TILES + i
        pid_b = tile // tiles
        offs_m = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        src_m = offs_m - tl.where(offs_d < KEPT, 0, lag)  # [BLOCK_M, BLOCK_D]
        mask_tile = tl.where(tile < total, mask_d, False)
        mask_s = mask_tile & (src_m >= 0) & (src_m < M)
        mask_y = mask_tile & (offs_m < M)

        s = tl.load(r_ptr + pid_b * stride_rb + src_m * stride_rm + offs_d, mask=mask_s, other=0.0)
        dy = tl.load(
            dy_ptr + pid_b * stride_dyb + offs_m * stride_dym + offs_d, mask=mask_y, other=0.0
        ).to(ACC)
        y, scale, live = _normalize(s.to(ACC), mask_d, D, LAYER)
        dgamma += tl.sum(dy * y, axis=0, keep_dims=True)
        dbeta += tl.sum(dy, axis=0, keep_dims=True)

        g = dy * gamma
        along = tl.where(live, tl.sum(g * y, axis=1, keep_dims=True) / D, 0.0)
        if LAYER:
            g -= tl.sum(g, axis=1, keep_dims=True) / D
        dx = (g - y * along) * scale
        if HAS_DR:
            dr = tl.load(
                dr_ptr + pid_b * stride_drb + src_m * stride_drm + offs_d, mask=mask_s, other=0.0
            )
            dx += dr.to(ACC)
        tl.store(dx_ptr + (pid_b * M + src_m) * D + offs_d, dx, mask=mask_s)

    tl.store(dweight_ptr + pid * D + offs_d, dgamma, mask=mask_d)
    if LAYER:
        tl.store(dweight_ptr + (tl.num_programs(0) + pid) * D + offs_d, dbeta, mask=mask_d)


@lru_cache
def _constants(D: int, dtype: torch.dtype) -> dict:
    """What both kernels are compiled for."""
    block_d = triton.next_power_of_2(D)
    block_m = max(1, TILE // block_d)
    return dict(
        D=D,
        KEPT=(D + 1) // 2,
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=max(1, block_m * block_d // WARP_TILE),
        enable_fp_fusion=False,  # backward cancels products: all must be rounded alike
    )


def _norm_token_shift_fwd(x, gamma, beta, branch, dilation, dtype):
    B, M, D = x.shape
    r = x.new_empty(0 if branch is None else x.shape)  # an op may not return its input
    y = x.new_empty(x.shape, dtype=dtype)
    if y.numel():
        b = x if branch is None else branch
        lag, constants = min(dilation, M), _constants(D, x.dtype)
        tiles = triton.cdiv(M + lag, constants["BLOCK_M"])  # of a sequence's rows of s and its end
        with torch.cuda.device_of(x):
            _norm_token_shift_fwd_kernel[(B * tiles,)](
                x, b, gamma, gamma if beta is None else beta, r, y,
                x.stride(0), x.stride(1), b.stride(0), b.stride(1), M, lag, tiles,
                LAYER=beta is not None, HAS_BRANCH=branch is not None, **constants,
            )  # fmt: skip
    return r, y


def _norm_token_shift_bwd(r, gamma, dr, dy, layer, dilation):
    B, M, D = r.shape
    dx = r.new_empty(r.shape)
    lag, constants = min(dilation, M), _constants(D, r.dtype)
    tiles = triton.cdiv(M + lag, constants["BLOCK_M"])
    programs = triton.cdiv(B * tiles, BWD_TILES)
    acc = torch.promote_types(r.dtype, torch.float32)
    dweight = r.new_empty((2 if layer else 1, programs, D), dtype=acc)
    if dx.numel():
        d = dy if dr is None else dr
        with torch.cuda.device_of(r):
            _norm_token_shift_bwd_kernel[(programs,)](
                r, gamma, d, dy, dx, dweight,
                r.stride(0), r.stride(1), d.stride(0), d.stride(1), dy.stride(0), dy.stride(1),
                M, lag, tiles, B * tiles,
                LAYER=layer, HAS_DR=dr is not None, TILES=BWD_TILES, **constants,
            )  # fmt: skip
    else:
        dweight.zero_()
    return dx, dweight.sum(dim=1).to(gamma.dtype)


torch.library.define(
    "shtx::norm_token_shift",
    "(Tensor x, Tensor gamma, Tensor? beta, Tensor? branch, int dilation, ScalarType dtype)"
    " -> (Tensor, Tensor)",
)
torch.library.define(
    "shtx::norm_token_shift_bwd",
    "(Tensor r, Tensor gamma, Tensor? dr, Tensor dy, bool layer, int dilation) -> (Tensor, Tensor)",
)
torch.library.impl("shtx::norm_token_shift", ("CPU", "CUDA"), _norm_token_shift_fwd)
torch.library.impl("shtx::norm_token_shift_bwd", ("CPU", "CUDA"), _norm_token_shift_bwd)


@torch.library.register_fake("shtx::norm_token_shift")
def _(x, gamma, beta, branch, dilation, dtype):
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("shtx::norm_token_shift_bwd")
def _(r, gamma, dr, dy, layer, dilation):
    return r.new_empty(r.shape), gamma.new_empty(2 if layer else 1, r.shape[-1])


def _rows(t: Tensor | None) -> Tensor | None:
    """An incoming gradient may have any layout (that of a sum is expanded)."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


class _NormTokenShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, branch, dilation, dtype):
        r, y = torch.ops.shtx.norm_token_shift.default(x, gamma, beta, branch, dilation, dtype)
        r = x if branch is None else r
        ctx.save_for_backward(r, gamma)
        ctx.dilation, ctx.layer = dilation, beta is not None
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        return r, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dr, dy):
        r, gamma = ctx.saved_tensors
        dweight = (None, None)
        dx = dr
        if dy is not None:
            dx, dweight = torch.ops.shtx.norm_token_shift_bwd.default(
                r, gamma, _rows(dr), _rows(dy), ctx.layer, ctx.dilation
            )
        dbranch = None if ctx.branch_dtype is None or dx is None else dx.to(ctx.branch_dtype)
        return dx, dweight[0], dweight[1] if ctx.layer else None, dbranch, None, None


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
        dtype: of y; that of x by default.

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
    return _NormTokenShift.apply(x, gamma, beta, branch, dilation, dtype or x.dtype)
