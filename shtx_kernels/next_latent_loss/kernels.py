"""What is not a product: the norm of a latent with a summary, the step to the next latent, and how
far that is off, forward and backward.

Row i of a rollout is token t = i % K of sequence i // K. Its summary, and the latent that it
foretells, are those of token t + lead.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import KINDS, Kernel, accumulator, cdiv
from .._products import sum_dtype
from .._rows import columns, row_sum, tile

TILE = 2048  # elements of a program's tile
WARP_TILE = 512  # elements of it that a warp holds
DISTANCES = ("mse", "smooth_l1", "mse_and_cosine_sim")
SMOOTH, COSINE = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _moments(z, u, mask, D: tl.constexpr):
    """Mean of rows that are halves, and one over their deviation."""
    mean = (row_sum(z) + row_sum(u)) / (2 * D)
    z, u = tl.where(mask, z - mean, 0.0), tl.where(mask, u - mean, 0.0)
    eps = tl.full([1, 1, 1], 1e-5, z.dtype)  # a bare constant is fp32 in Triton 3.6
    square = (row_sum(z * z) + row_sum(u * u)) / (2 * D) + eps
    one = tl.full([1, 1, 1], 1.0, z.dtype)
    # sqrt and division of fp32 are approximate by default, and backward subtracts near equals
    deviation = tl.sqrt(square) if z.dtype == tl.float64 else tl.sqrt_rn(square)
    return mean, one / deviation if z.dtype == tl.float64 else tl.div_rn(one, deviation)


@triton.jit(do_not_specialize=["rows", "K", "lead"])
def _next_latent_norm_fwd_kernel(
    z_ptr, u_ptr, y_ptr, stats_ptr, stride_zb, stride_zm, stride_ub, stride_um, rows, K, lead,
    D: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, ROUNDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """y (2, rows, D): latents and summaries, normalized together; stats (2, rows)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None]
    offs_d = columns(ROUNDS, LANES)
    mask = (row < rows) & (offs_d < D)  # [BLOCK_M, ROUNDS, LANES]
    b, t = row // K, row % K
    z = tl.load(z_ptr + b * stride_zb + t * stride_zm + offs_d, mask=mask, other=0.0).to(ACC)
    offs_u = b * stride_ub + (t + lead) * stride_um + offs_d
    u = tl.load(u_ptr + offs_u, mask=mask, other=0.0).to(ACC)
    mean, scale = _moments(z, u, mask, D)
    tl.store(y_ptr + row * D + offs_d, (z - mean) * scale, mask=mask)
    tl.store(y_ptr + (rows + row) * D + offs_d, (u - mean) * scale, mask=mask)
    tl.store(stats_ptr + row, mean, mask=row < rows)
    tl.store(stats_ptr + rows + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "K", "M", "lead"])
def _next_latent_norm_bwd_kernel(
    z_ptr, u_ptr, stats_ptr, dy_ptr, dnext_ptr, dz_ptr, du_ptr,
    stride_zb, stride_zm, stride_ub, stride_um, stride_dzb, rows, K, M, lead,
    D: tl.constexpr, ACC: tl.constexpr, HAS_DU: tl.constexpr, ADD_DU: tl.constexpr,
    BLOCK_M: tl.constexpr, ROUNDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gradients of latents, to which that of the next latent is added, and of summaries."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None]
    offs_d = columns(ROUNDS, LANES)
    mask = (row < rows) & (offs_d < D)  # [BLOCK_M, ROUNDS, LANES]
    b, t = row // K, row % K
    mean = tl.load(stats_ptr + row, mask=row < rows, other=0.0)
    scale = tl.load(stats_ptr + rows + row, mask=row < rows, other=0.0)
    z = tl.load(z_ptr + b * stride_zb + t * stride_zm + offs_d, mask=mask, other=0.0).to(ACC)
    offs_u = b * stride_ub + (t + lead) * stride_um + offs_d
    u = tl.load(u_ptr + offs_u, mask=mask, other=0.0).to(ACC)
    z, u = (z - mean) * scale, (u - mean) * scale
    dz = tl.load(dy_ptr + row * D + offs_d, mask=mask, other=0.0).to(ACC)
    du = tl.load(dy_ptr + (rows + row) * D + offs_d, mask=mask, other=0.0).to(ACC)
    average = (row_sum(dz) + row_sum(du)) / (2 * D)
    along = (row_sum(dz * z) + row_sum(du * u)) / (2 * D)

    dnext = tl.load(dnext_ptr + row * D + offs_d, mask=mask, other=0.0).to(ACC)
    dz = dnext + (dz - average - z * along) * scale
    tl.store(dz_ptr + b * stride_dzb + t * D + offs_d, dz, mask=mask)
    if HAS_DU:
        du = (du - average - u * along) * scale
        offs_du = (b * M + t + lead) * D + offs_d
        if ADD_DU:
            du += tl.load(du_ptr + offs_du, mask=mask, other=0.0).to(ACC)
        tl.store(du_ptr + offs_du, du, mask=mask)


@triton.jit
def _distance(z, y, D: tl.constexpr, KIND: tl.constexpr):
    """Of rows z from rows y, and its gradient at z."""
    off = z - y
    if KIND == SMOOTH:
        size = tl.abs(off)
        loss = row_sum(tl.where(size < 1, off * off * 0.5, size - 0.5)) / D
        slope = tl.where(off >= 1, 1.0, tl.where(off <= -1, -1.0, off)) / D
    else:
        loss = row_sum(off * off) / D
        slope = off * 2.0 / D
    if KIND == COSINE:
        # bare constants are fp32 in Triton 3.6
        least = tl.full([1, 1, 1], 1e-8, z.dtype)
        of_mse, of_cosine = tl.full([1, 1, 1], 0.1, z.dtype), tl.full([1, 1, 1], 0.9, z.dtype)
        length = tl.sqrt(row_sum(z * z))
        clamped = tl.maximum(length, least, propagate_nan=tl.PropagateNan.ALL)
        length_y = tl.sqrt(row_sum(y * y))
        y = y / tl.maximum(length_y, least, propagate_nan=tl.PropagateNan.ALL)
        cosine = row_sum(z * y) / clamped
        loss = of_mse * loss + of_cosine * (1.0 - cosine)
        # PyTorch clamps the length that it divides by, but not in the gradient of that length
        z = z / tl.where(length == 0, 1.0, length)
        slope = of_mse * slope - of_cosine * (y - cosine * z) / clamped
    return loss, slope


@triton.jit(do_not_specialize=["rows", "K", "M", "lead"])
def _next_latent_step_kernel(
    z_ptr, out_ptr, h_ptr, valid_ptr, steps_ptr, decay_ptr, past_ptr, dsums_ptr, later_ptr,
    next_ptr, rows_ptr, sums_ptr, dnext_ptr, dout_ptr,
    stride_zb, stride_zm, stride_hb, stride_hm, rows, K, M, lead,
    D: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr, HAS_PAST: tl.constexpr,
    HAS_LATER: tl.constexpr, KEEPS: tl.constexpr, BACKWARD: tl.constexpr, HAS_DOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, ROUNDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The next latent is z + out: the loss of its rows, or the gradient of it.

    Forward, KEEPS: stores next latents, and the losses of rows so far; always sums of programs.
    Backward, `later` is what the next rollout says of its gradient.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None]
    offs_d = columns(ROUNDS, LANES)
    exists = row < rows
    mask = exists & (offs_d < D)  # [BLOCK_M, ROUNDS, LANES]
    b, t = row // K, row % K
    offs = row * D + offs_d
    z = tl.load(z_ptr + b * stride_zb + t * stride_zm + offs_d, mask=mask, other=0.0).to(ACC)
    z += tl.load(out_ptr + offs, mask=mask, other=0.0).to(ACC)
    offs_h = b * stride_hb + (t + lead) * stride_hm + offs_d
    y = tl.load(h_ptr + offs_h, mask=mask, other=0.0).to(ACC)
    counts = tl.load(valid_ptr + b * M + t + lead, mask=exists, other=0) != 0
    loss, slope = _distance(z, y, D, KIND)

    weight = tl.load(steps_ptr + lead - 1).to(ACC)
    if HAS_PAST:
        past = tl.load(past_ptr + row, mask=exists, other=0.0)
        weight = weight * tl.exp(-tl.load(decay_ptr) * past)
    if BACKWARD:
        weight = weight * tl.load(dsums_ptr + lead - 1).to(ACC)
        dnext = tl.where(counts, slope * weight, 0.0)
        if HAS_LATER:
            dnext += tl.load(later_ptr + offs, mask=mask, other=0.0).to(ACC)
        tl.store(dnext_ptr + offs, dnext, mask=mask)
        if HAS_DOUT:
            tl.store(dout_ptr + offs, dnext, mask=mask)
    else:
        tl.store(sums_ptr + pid, tl.sum(tl.where(counts, loss * weight, 0.0)))
        if KEEPS:
            tl.store(next_ptr + offs, z, mask=mask)
            if HAS_PAST:
                loss += past
            tl.store(rows_ptr + row, loss, mask=exists)


def _constants(D: int, acc: torch.dtype) -> dict:
    return dict(D=D, ACC=accumulator(acc), **tile(D, TILE, WARP_TILE))


@lru_cache(KINDS)
def _norm_of(D: int, acc: torch.dtype) -> Kernel:
    # backward cancels products: all must be rounded alike
    return Kernel(_next_latent_norm_fwd_kernel, enable_fp_fusion=False, **_constants(D, acc))


@lru_cache(KINDS)
def _norm_bwd_of(D: int, acc: torch.dtype, has_du: bool, add_du: bool) -> Kernel:
    constants = dict(HAS_DU=has_du, ADD_DU=add_du, enable_fp_fusion=False, **_constants(D, acc))
    return Kernel(_next_latent_norm_bwd_kernel, **constants)


@lru_cache(KINDS)
def _step_of(D: int, acc: torch.dtype, kind: int, **options) -> Kernel:
    return Kernel(_next_latent_step_kernel, KIND=kind, **options, **_constants(D, acc))


class Rollout:
    """One of the rollouts of a call: where its rows are, and what is launched of them.

    Attributes:
        latents: (B, M, D) or (B, K, D), of which the first K tokens of a sequence are taken.
        lead: how many tokens later those are that they foretell.
    """

    def __init__(self, latents: Tensor, summaries: Tensor, h: Tensor, rollouts: int, lead: int):
        self.latents, self.summaries, self.h, self.lead = latents, summaries, h, lead
        self.B, self.M, self.D = h.shape
        self.K = self.M - rollouts
        self.rows, self.acc = self.B * self.K, sum_dtype(h.dtype)

    def launch(self, kernel: Kernel, tensors: tuple, *numbers: int):
        kernel((programs(self.rows, self.D),), tensors, *self.latents.stride()[:2], *numbers)

    def norm(self, y: Tensor, stats: Tensor):
        """Normalized latents and summaries, y (2, rows, D), and stats (2, rows) for backward."""
        tensors = self.latents, self.summaries, y, stats
        strides = self.summaries.stride()[:2]
        kernel = _norm_of(self.D, self.acc)
        self.launch(kernel, tensors, *strides, self.rows, self.K, self.lead)

    def norm_bwd(self, stats, dy, dnext, dz, dsummaries: Tensor | None, add: bool):
        """dz (B, M or K, D), where the first K tokens are written, and dsummaries (B, M, D)."""
        has_du = dsummaries is not None
        du = dsummaries if has_du else dz
        tensors = self.latents, self.summaries, stats, dy, dnext, dz, du
        strides = *self.summaries.stride()[:2], dz.stride(0)
        kernel = _norm_bwd_of(self.D, self.acc, has_du, has_du and add)
        self.launch(kernel, tensors, *strides, self.rows, self.K, self.M, self.lead)

    def _step(self, kernel, out, valid, steps, decay, past, *others: Tensor):
        weights = steps, steps if decay is None else decay, out if past is None else past
        tensors = self.latents, out, self.h, valid, *weights, *others
        strides = self.h.stride()[:2]
        self.launch(kernel, tensors, *strides, self.rows, self.K, self.M, self.lead)

    def step(self, kind, out, valid, steps, decay, past, kept: tuple | None, sums):
        """sums of programs; kept: next latents (rows, D) and losses of rows so far (rows,)."""
        options = dict(HAS_PAST=past is not None, HAS_LATER=False, KEEPS=kept is not None)
        options |= dict(BACKWARD=False, HAS_DOUT=False)
        kernel = _step_of(self.D, self.acc, kind, **options)
        unused = sums
        others = unused, unused, *(kept or (unused, unused)), sums, unused, unused
        self._step(kernel, out, valid, steps, decay, past, *others)

    def step_bwd(self, kind, out, valid, steps, decay, past, dsums, later, dnext, dout):
        """The gradient of the next latent, in the dtypes of dnext and dout, which may be one."""
        options = dict(HAS_PAST=past is not None, HAS_LATER=later is not None, KEEPS=False)
        options |= dict(BACKWARD=True, HAS_DOUT=dout is not dnext)
        kernel = _step_of(self.D, self.acc, kind, **options)
        unused = dnext
        others = dsums, unused if later is None else later, unused, unused, unused, dnext, dout
        self._step(kernel, out, valid, steps, decay, past, *others)


def programs(rows: int, D: int) -> int:
    return cdiv(rows, tile(D, TILE, WARP_TILE)["BLOCK_M"])
