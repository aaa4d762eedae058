"""Cosine distance of what a linear layer predicts of each token's successor from that successor.

    p[t] = h[t] weight^T + bias
    loss = sum over t < M - 1 of 1 - cos(p[t], h[t + 1])

The one idea: the product is made of all tokens, so that none has to be moved, and a program then
pairs token u of h with token u - 1 of p. It writes the gradients of both in backward, where the
first token of a sequence, which has no pair, and the prediction of the last get zeros. Reference:
reference.hierarchical_ar_loss
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._autograd import apply, first_order
from ._register import register
from ._rows import MAX_D, columns, contiguous_rows, row_config, row_sum
from ._sums import column_sums
from .launch import KINDS, Kernel, cdiv
from .products import add_product, cast, narrow, product_dtype, sum_dtype

TILE = 2048  # numbers of a tile
WARP_TILE = 1024  # numbers of a tile that a warp holds


@triton.jit
def _unit(t):
    """Rows divided by their lengths; the lengths, clamped as F.normalize does; and whether they are
    not clamped.
    """
    length = tl.sqrt(row_sum(t * t))
    least = tl.full([1, 1, 1], 1e-12, t.dtype)  # a bare constant is fp32 in Triton 3.6
    clamped = tl.maximum(length, least, propagate_nan=tl.PropagateNan.ALL)
    return t / clamped, clamped, length >= least


@triton.jit(do_not_specialize=["rows", "M"])
def _hierarchical_ar_loss_kernel(
    p_ptr, h_ptr, dloss_ptr, loss_ptr, dp_ptr, dh_ptr, stride_h, rows, M,
    D: tl.constexpr, ACC: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr, ROUNDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Token u of h with token u - 1 of p, for u up to `rows`: the loss, or both gradients."""
    pid = tl.program_id(0).to(tl.int64)
    u = pid * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None]
    offs_d = columns(ROUNDS, LANES)
    mask_d = offs_d < D
    paired = (u % M > 0) & (u < rows)
    before = (u - 1) * D + offs_d  # [BLOCK_M, ROUNDS, LANES]
    p = tl.load(p_ptr + before, mask=paired & mask_d, other=0.0).to(ACC)
    h = tl.load(h_ptr + u * stride_h + offs_d, mask=paired & mask_d, other=0.0).to(ACC)
    p, length_p, live_p = _unit(p)
    h, length_h, live_h = _unit(h)
    cosine = row_sum(p * h)
    if BACKWARD:
        factor = tl.where(paired, -tl.load(dloss_ptr).to(ACC), 0.0)
        dp = (h - tl.where(live_p, cosine, 0.0) * p) * (factor / length_p)
        dh = (p - tl.where(live_h, cosine, 0.0) * h) * (factor / length_h)
        tl.store(dp_ptr + before, dp, mask=mask_d & (u > 0) & (u <= rows))
        tl.store(dh_ptr + u * D + offs_d, dh, mask=mask_d & (u < rows))
    else:
        tl.store(loss_ptr + pid, tl.sum(tl.where(paired, 1 - cosine, 0.0)))


@lru_cache(KINDS)
def _kernel_of(D: int, dtype: torch.dtype, backward: bool) -> Kernel:
    constants = dict(D=D, BACKWARD=backward, **row_config(D, TILE, WARP_TILE))
    return Kernel(_hierarchical_ar_loss_kernel, dtype, **constants)


def launch_pairs(p, h, M, dtotal=None):
    """One sum of losses per program; given the gradient of their total, the gradients of p and h.

    p and h are (B M, D).
    """
    (rows, D), backward = p.shape, dtotal is not None
    kernel, acc = _kernel_of(D, p.dtype, backward), sum_dtype(p.dtype)
    # one more than h has tokens: the last prediction belongs to the token after the last
    programs = cdiv(rows + 1, kernel.constants["BLOCK_M"])
    loss = p.new_empty(0 if backward else programs, dtype=acc)
    dp = p.new_empty(p.shape if backward else 0)
    # a product is added to dh, in the dtype of both or in that of sums
    dh = h.new_empty(h.shape if backward else 0, dtype=h.dtype if h.dtype == p.dtype else acc)
    tensors = p, h, dtotal if backward else loss, loss, dp, dh
    kernel((programs,), tensors, h.stride(0), rows, max(1, M))
    return (dp, dh) if backward else loss


def _hierarchical_ar_loss_fwd(h, weight, bias):
    M, h = h.shape[1], contiguous_rows(h.flatten(0, 1))
    p = weight.new_empty(h.shape)
    torch.addmm(bias, cast(h, weight.dtype), weight.T, out=p)
    return launch_pairs(p, h, M).sum(), p


def _hierarchical_ar_loss_bwd(dtotal, p, h, weight, needs_dh, needs_dweight, needs_dbias):
    shape, h = h.shape, contiguous_rows(h.flatten(0, 1))
    dp, dh = launch_pairs(p, h, shape[1], dtotal)
    acc = sum_dtype(p.dtype)
    dweight = weight.new_empty(weight.shape if needs_dweight else 0, dtype=acc)
    if needs_dh:
        add_product(dh, dp, weight, start=False)
    if needs_dweight:
        add_product(dweight, dp.T, cast(h, p.dtype), start=True)
    dbias = column_sums(dp) if needs_dbias else dp.new_empty(0, dtype=acc)
    dh = cast(dh.view(shape), h.dtype) if needs_dh else h.new_empty(0)
    return dh, dweight, dbias


def _fake_fwd(h, weight, bias):
    p = weight.new_empty(h.shape[0] * h.shape[1], h.shape[2])
    return p.new_empty((), dtype=torch.promote_types(p.dtype, torch.float32)), p


def _fake_bwd(dtotal, p, h, weight, needs_dh, needs_dweight, needs_dbias):
    acc = torch.promote_types(p.dtype, torch.float32)
    dweight = weight.new_empty(weight.shape if needs_dweight else 0, dtype=acc)
    dbias = p.new_empty(p.shape[-1] if needs_dbias else 0, dtype=acc)
    return h.new_empty(h.shape if needs_dh else 0), dweight, dbias


def _product_flops(h) -> int:
    """FLOPs of a product of all tokens that have a successor with a (D, D) weight."""
    B, M, D = h
    return 2 * B * max(0, M - 1) * D * D


_forward = register(
    "hierarchical_ar_loss",
    "(Tensor h, Tensor weight, Tensor bias) -> (Tensor, Tensor)",
    _hierarchical_ar_loss_fwd,
    fake=_fake_fwd,
    flops=lambda h, *_, **__: _product_flops(h),
)
_backward = register(
    "hierarchical_ar_loss_bwd",
    "(Tensor dtotal, Tensor p, Tensor h, Tensor weight, bool needs_dh, bool needs_dweight,"
    " bool needs_dbias) -> (Tensor, Tensor, Tensor)",
    _hierarchical_ar_loss_bwd,
    fake=_fake_bwd,
    flops=lambda dtotal, p, h, weight, needs_dh, needs_dweight, *_, **__: (
        (needs_dh + needs_dweight) * _product_flops(h)
    ),
)


class _HierarchicalARLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, dtype):
        ctx.dtypes = weight.dtype, bias.dtype
        weight = narrow(weight, dtype)
        total, p = _forward(h, weight, cast(bias, dtype))
        ctx.save_for_backward(p, h, weight)
        return total

    @staticmethod
    @first_order("hierarchical_ar_loss")
    def backward(ctx, dtotal):
        needs = ctx.needs_input_grad[:3]
        dh, dweight, dbias = _backward(dtotal, *ctx.saved_tensors, *needs)
        gradients = dh, cast(dweight, ctx.dtypes[0]), cast(dbias, ctx.dtypes[1])
        return *(t if needed else None for t, needed in zip(gradients, needs, strict=True)), None


def hierarchical_ar_loss(
    h: Tensor, weight: Tensor, bias: Tensor, reduction: str = "mean"
) -> Tensor | tuple[Tensor, Tensor]:
    """1 - cos(h[t] weight^T + bias, h[t + 1]), over all tokens but the last of each sequence.

    Under autocast, the product is in its dtype; cosines and the loss are fp32 (fp64 for fp64).

    Args:
        h: (B, M, D), a level; D at most 8192, all may be strided. It gets the gradient of both
            sides.
        weight: (D, D).
        bias: (D,).
        reduction: "mean" over the B (M - 1) tokens that have a successor, or "sum".

    Returns:
        The 0-dim mean, 0 with zero gradients where M is 1; or the 0-dim sum and the number of
        tokens that have a successor.

    Raises:
        ValueError: naming the argument whose shape, device or value is not as above.

    Source: Mirasol3B (Piergiovanni et al. 2023, arXiv 2311.05698), as in
    simple-hierarchical-transformer.
    """
    if h.ndim != 3:
        raise ValueError(f"h must be (B, M, D), got {tuple(h.shape)}")
    B, M, D = h.shape
    if not 1 <= D <= MAX_D:
        raise ValueError(f"h must have a width D of 1 to {MAX_D}, got {D}")
    for name, t, shape in (("weight", weight, (D, D)), ("bias", bias, (D,))):
        if t.shape != shape or t.device != h.device:
            raise ValueError(
                f"{name} must be {shape} on {h.device}, got {tuple(t.shape)} on {t.device}"
            )
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    total = apply(_HierarchicalARLoss, h, weight, bias, product_dtype(h))
    count = B * max(0, M - 1)
    if reduction == "sum":
        return total, torch.full((), count, device=h.device)
    return total / max(1, count)
