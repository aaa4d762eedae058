"""Everything but the products: the norm of a latent with a summary, the step to the next latent,
and the distance of that from the latent that it predicts, forward and backward.

Row i of a rollout is token t = i % K of sequence i // K; z is its latent and u its summary. The
summary, and the latent that is predicted, are those of token t + lead.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rounding import divide, sqrt
from .._rows import columns, row_config, row_sum
from ..launch import KINDS, Kernel, cdiv
from ..products import sum_dtype

TILE = 2048  # numbers of a tile
WARP_TILE = 1024  # numbers of a tile that a warp holds
# options of the norm's kernels: backward subtracts products, so all must be rounded alike
ALIKE = dict(enable_fp_fusion=False)
DISTANCES = ("mse", "smooth_l1", "mse_and_cosine_sim")
SMOOTH, COSINE = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _moments(z, u, mask, D: tl.constexpr):
    """The mean of rows with halves z and u, and one over their standard deviation."""
    mean = (row_sum(z) + row_sum(u)) / (2 * D)
    z, u = tl.where(mask, z - mean, 0.0), tl.where(mask, u - mean, 0.0)
    eps = tl.full([1, 1, 1], 1e-5, z.dtype)  # a bare constant is fp32 in Triton 3.6
    square = (row_sum(z * z) + row_sum(u * u)) / (2 * D) + eps
    one = tl.full([1, 1, 1], 1.0, z.dtype)
    # Full precision: backward subtracts nearly equal numbers.
    return mean, divide(one, sqrt(square))


@triton.jit(do_not_specialize=["rows", "K", "lead"])
def _next_latent_norm_fwd_kernel(
    z_ptr, u_ptr, y_ptr, stats_ptr, stride_zb, stride_zm, stride_ub, stride_um, rows, K, lead,
    D: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, ROUNDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """y (2, rows, D) has latents and summaries, normalized together; stats (2, rows) has the mean
    of every row and the number by which it is scaled.
    """
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
    """The gradients of latents, with that of the next latents added, and of summaries."""
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
    """The distance of rows z from rows y, and its gradient with respect to z."""
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
    """The next latent is z + out: the loss of its rows, or its gradient.

    Forward stores one sum of losses per program; with KEEPS, it also stores the next latents, and
    the sum of every row's losses so far. In backward, `later` is the gradient from the next
    rollout.
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


@lru_cache(KINDS)
def _kernel_of(kernel, D: int, acc: torch.dtype, **options) -> Kernel:
    return Kernel(kernel, acc, D=D, **options, **row_config(D, TILE, WARP_TILE))


class Rollout:
    """One of the rollouts of a call: where its rows are, and the launches that read them.

    Attributes:
        latents: (B, M, D) or (B, K, D), of which the first K tokens of each sequence are the rows.
        lead: how many tokens ahead of a row the token is that it predicts.
    """

    def __init__(self, latents: Tensor, summaries: Tensor, h: Tensor, rollouts: int, lead: int):
        self.latents, self.summaries, self.h, self.lead = latents, summaries, h, lead
        self.B, self.M, self.D = h.shape
        self.K = self.M - rollouts
        self.rows, self.acc = self.B * self.K, sum_dtype(h.dtype)

    def launch(self, kernel: Kernel, tensors: tuple, *numbers: int):
        """Launch a kernel of this page, whose first numbers are the strides of latents."""
        kernel((programs(self.rows, self.D),), tensors, *self.latents.stride()[:2], *numbers)

    def norm(self, y: Tensor, stats: Tensor):
        """Fill y (2, rows, D) with normalized latents and summaries, and stats (2, rows)."""
        tensors = self.latents, self.summaries, y, stats
        strides = self.summaries.stride()[:2]
        kernel = _kernel_of(_next_latent_norm_fwd_kernel, self.D, self.acc, **ALIKE)
        self.launch(kernel, tensors, *strides, self.rows, self.K, self.lead)

    def norm_bwd(self, stats, dy, dnext, dz, dsummaries: Tensor | None, add: bool):
        """Fill the first K tokens of dz (B, M or K, D), and with `add` add to dsummaries (B, M, D),
        else write it.
        """
        has_du = dsummaries is not None
        du = dsummaries if has_du else dz
        tensors = self.latents, self.summaries, stats, dy, dnext, dz, du
        strides = *self.summaries.stride()[:2], dz.stride(0)
        options = dict(HAS_DU=has_du, ADD_DU=has_du and add, **ALIKE)
        kernel = _kernel_of(_next_latent_norm_bwd_kernel, self.D, self.acc, **options)
        self.launch(kernel, tensors, *strides, self.rows, self.K, self.M, self.lead)

    def _step(self, options: dict, out, valid, steps, decay, past, *others: Tensor):
        kernel = _kernel_of(_next_latent_step_kernel, self.D, self.acc, **options)
        weights = steps, steps if decay is None else decay, out if past is None else past
        tensors = self.latents, out, self.h, valid, *weights, *others
        strides = self.h.stride()[:2]
        self.launch(kernel, tensors, *strides, self.rows, self.K, self.M, self.lead)

    def step(self, kind, out, valid, steps, decay, past, kept: tuple | None, sums):
        """Fill `sums`, one per program, and `kept`: the next latents (rows, D), and the sum of
        every row's losses so far (rows,).
        """
        options = dict(KIND=kind, HAS_PAST=past is not None, HAS_LATER=False)
        options |= dict(KEEPS=kept is not None, BACKWARD=False, HAS_DOUT=False)
        unused = sums
        others = unused, unused, *(kept or (unused, unused)), sums, unused, unused
        self._step(options, out, valid, steps, decay, past, *others)

    def step_bwd(self, kind, out, valid, steps, decay, past, dsums, later, dnext, dout):
        """Fill dnext and dout, which may be one tensor, with the gradient of the next latents."""
        options = dict(KIND=kind, HAS_PAST=past is not None, HAS_LATER=later is not None)
        options |= dict(KEEPS=False, BACKWARD=True, HAS_DOUT=dout is not dnext)
        unused = dnext
        others = dsums, unused if later is None else later, unused, unused, unused, dnext, dout
        self._step(options, out, valid, steps, decay, past, *others)


def programs(rows: int, D: int) -> int:
    """Count the programs that the rows of a rollout take."""
    return cdiv(rows, row_config(D, TILE, WARP_TILE)["BLOCK_M"])
