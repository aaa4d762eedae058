"""Cross entropy of the products of rows with vocabularies, whose logits are never all in memory.

    logits[t, c] = x[t] weight[c]^T            row t has C targets, each with a vocabulary of its
    own loss = sum over (t, c) that count of logsumexp(logits[t, c]) - logits[t, c, target[t, c]]
    dlogits = softmax(logits) - onehot(target) dx[t] = sum_c dlogits[t, c] weight[c]      dweight[c]
    = sum_t dlogits[t, c]^T x[t]

The one idea: forward knows everything that the gradients need but one factor, so it makes them as
well. It goes through the targets, and for each of them through chunks of rows: a product writes the
logits of a chunk, a kernel replaces them by their gradients, and two products take those. Products
are cuBLAS's; dweight is added up in fp32 in the order of the chunks, dx in the order of the
targets. Backward multiplies by the gradient of the loss. A tap is one of the C targets of a row.
linear_cross_entropy (C = 1) and reconstruction_loss are both made of this.
"""

from functools import lru_cache
from math import prod

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._autograd import apply, first_order
from ._register import is_plain, register
from .internals import keeps_graph
from .launch import KINDS, Kernel, cdiv, next_power_of_2
from .products import add_product, cast, product_dtype, sum_dtype

# the fewest and the most bytes of a chunk's logits; between these it has as many as the gradient of
# the weight, all of which each chunk reads and writes
WORKSPACE = 40 * 2**20, 160 * 2**20
ROUND = 128  # a chunk has a multiple of so many rows: the tile of a product
ENOUGH = 32 * ROUND  # a chunk has so many rows before it gets more targets
BLOCK_V = 8192  # the most logits of a row that a program holds at a time
TILE = 2048  # the fewest logits that a program holds at a time
WARP_TILE = 1024  # the most logits that a warp holds
SCALED = 4096  # numbers that a program multiplies by the gradient of the loss
ALIGN = 16  # vocabularies are padded to a multiple of this, as products of odd sizes are slow
LOG2_E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_logits(ptr, cols, counted, V: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr):
    """Logits [BLOCK_R, BLOCK_V], with -inf in rows that do not count and past V; with WHOLE, none
    of the columns is past V.
    """
    mask = counted[:, None] if WHOLE else counted[:, None] & (cols < V)[None, :]
    return tl.load(ptr + cols[None, :], mask=mask, other=float("-inf")).to(ACC)


@triton.jit
def exp_over(x, m, NARROW: tl.constexpr):
    """exp(x - m); for 16-bit x, in one instruction less, which rounds m."""
    return tl.exp2(x * LOG2_E - m * LOG2_E) if NARROW else tl.exp2((x - m) * LOG2_E)


@triton.jit
def add_up(x, m, l, NARROW: tl.constexpr):
    """The greatest logit m and the sum l of exponentials over it, with the logits x added."""
    m_new = tl.maximum(m, tl.max(x, axis=1))
    l = l * exp_over(m, m_new, False) + tl.sum(exp_over(x, m_new[:, None], NARROW), axis=1)
    return m_new, l


@triton.jit
def probabilities(x, m, l, counted, NARROW: tl.constexpr):
    """Probabilities [BLOCK_R, BLOCK_V]; 0 in rows that do not count."""
    if NARROW:
        return exp_over(x, (m + tl.log2(l) * LN2)[:, None], True)
    return tl.where(counted[:, None], exp_over(x, m[:, None], False) * (1 / l)[:, None], 0.0)


@triton.jit(do_not_specialize=["first", "rows", "M", "tap"])
def _cross_entropy_fwd_kernel(
    logits_ptr, target_ptr, loss_ptr, count_ptr, stride_b, stride_m, stride_c, first, rows, M, tap,
    ignore_index,
    C: tl.constexpr, TAPS: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
    GRADIENTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Losses, and in place of logits (rows, TAPS WIDTH) their gradients.

    The logits are those of tokens from `first` on, and of their taps from `tap` on.
    """
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = offs < rows * TAPS
    t, c = first + offs // TAPS, tap + offs % TAPS
    target_ptrs = target_ptr + t // M * stride_b + t % M * stride_m + c * stride_c
    target = tl.load(target_ptrs, mask=inside, other=ignore_index)
    counted = inside & (target != ignore_index)
    known = (target >= 0) & (target < V)
    ptr = logits_ptr + offs * WIDTH
    of_target = tl.load(ptr + target, mask=counted & known, other=float("nan")).to(ACC)
    NARROW: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth == 16
    WHOLE: tl.constexpr = V // BLOCK_V * BLOCK_V

    offs_v = tl.arange(0, BLOCK_V)
    m = tl.full([BLOCK_R], -1e30, ACC)  # finite, as rows that do not count have no other logit
    l = tl.zeros([BLOCK_R], ACC)
    for v in range(0, WHOLE, BLOCK_V):
        x = load_logits(ptr[:, None], v + offs_v, counted, V, True, ACC)
        m, l = add_up(x, m, l, NARROW)
    if WHOLE < V:
        x = load_logits(ptr[:, None], WHOLE + offs_v, counted, V, False, ACC)
        m, l = add_up(x, m, l, NARROW)
    l = tl.where(counted, l, 1.0)
    # The log-sum-exp is left out here: it would round off what is small beside the largest logit.
    loss = tl.where(counted, tl.log2(l) * LN2 + (m - of_target), 0.0)
    tl.store(loss_ptr + pid, tl.sum(loss))
    tl.store(count_ptr + pid, tl.sum(counted.to(tl.int32)))
    if GRADIENTS:
        if WHOLE < V:
            p = probabilities(x, m, l, counted, NARROW)
            mask = inside[:, None] & (WHOLE + offs_v < WIDTH)[None, :]
            tl.store(ptr[:, None] + (WHOLE + offs_v)[None, :], p, mask=mask)
        for v in range(0, WHOLE, BLOCK_V):
            x = load_logits(ptr[:, None], v + offs_v, counted, V, True, ACC)
            p = probabilities(x, m, l, counted, NARROW)
            tl.store(ptr[:, None] + (v + offs_v)[None, :], p, mask=inside[:, None])
        tl.debug_barrier()  # other threads have just stored what the next store replaces
        p = probabilities(of_target[:, None], m, l, counted, NARROW)
        tl.store(ptr[:, None] + target[:, None], p - 1, mask=(counted & known)[:, None])


@triton.jit
def _scale_kernel(ptr, factor_ptr, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply n numbers by a factor, in place."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(ptr + offs, mask=offs < n).to(ACC) * tl.load(factor_ptr).to(ACC)
    tl.store(ptr + offs, x.to(ptr.dtype.element_ty), mask=offs < n)


def _sizes(logits_bytes: int, gradient_bytes: int, rows: int, C: int) -> tuple[int, int]:
    """The rows and targets of a chunk, given the bytes of a row's logits for one target."""
    least, most = WORKSPACE
    workspace = max(least, min(gradient_bytes, most))
    enough = workspace // (ENOUGH * logits_bytes)
    taps = max(taps for taps in range(1, C + 1) if C % taps == 0 and taps <= max(1, enough))
    fit = max(ROUND, workspace // (logits_bytes * taps) // ROUND * ROUND)
    even = cdiv(rows, cdiv(rows, fit)) if rows else 1
    return cdiv(even, ROUND) * ROUND, taps


@lru_cache(KINDS)
def _kernel_of(
    C: int,
    taps: int,
    V: int,
    width: int,
    dtype: torch.dtype,
    gradients: bool,
    block_r: int,
    block_v: int,
) -> Kernel:
    return Kernel(
        _cross_entropy_fwd_kernel, dtype, C=C, TAPS=taps, V=V, WIDTH=width, GRADIENTS=gradients,
        BLOCK_R=block_r, BLOCK_V=block_v, num_warps=max(4, block_r * block_v // WARP_TILE),
    )  # fmt: skip


def _linear_cross_entropy_fwd(x, weight, targets, ignore_index, needs_dx, needs_dweight):
    B, M, C = targets.shape
    rows, D, V = B * M, x.shape[-1], weight.shape[0] // C
    width = cdiv(V, ALIGN) * ALIGN
    x, weight = x.reshape(rows, D), weight.unflatten(0, (C, V))
    acc = sum_dtype(x.dtype)
    dx = x.new_empty((B, M, D) if needs_dx else 0)
    dweight = x.new_empty((C, width, D) if needs_dweight else 0, dtype=acc)
    if not rows:
        dweight.zero_()
    chunk, taps = _sizes(width * x.itemsize, dweight.nbytes, rows, C)
    logits = x.new_empty(chunk, taps * width)
    block_v = min(BLOCK_V, next_power_of_2(width))
    block_r = max(1, TILE // block_v)
    programs = cdiv(chunk * taps, block_r)
    losses = x.new_zeros(C // taps, cdiv(rows, chunk), programs, dtype=acc)
    counts = torch.zeros_like(losses, dtype=torch.int32)
    if needs_dx:
        summed = dx.view(rows, D) if taps == C else x.new_empty(rows, D, dtype=acc)
    gradients = needs_dx or needs_dweight
    kernel = _kernel_of(C, taps, V, width, x.dtype, gradients, block_r, block_v)
    for tap in range(0, C, taps):
        w = cast(weight[tap : tap + taps], x.dtype)
        if width > V:
            w = F.pad(w, (0, 0, 0, width - V))
        w = w.flatten(0, 1)
        for first in range(0, rows, chunk):
            part = x[first : first + chunk]
            here = part.shape[0]
            scores = logits[:here]
            torch.mm(part, w.T, out=scores)
            sums = [t[tap // taps, first // chunk] for t in (losses, counts)]
            numbers = *targets.stride(), first, here, M, tap, ignore_index
            kernel((cdiv(here * taps, block_r),), (scores, targets, *sums), *numbers)
            if needs_dx:
                add_product(summed[first : first + chunk], scores, w, start=tap == 0)
            if needs_dweight:
                dw = dweight[tap : tap + taps].flatten(0, 1)
                add_product(dw, scores.T, part, start=first == 0)
    if needs_dx and taps < C:
        dx.copy_(summed.view_as(dx))
    if needs_dweight:
        dweight = dweight[:, :V].flatten(0, 1)
    return losses.sum(), counts.sum(), dx, dweight


@lru_cache
def _kernel_of_scale(dtype: torch.dtype) -> Kernel:
    return Kernel(_scale_kernel, dtype, BLOCK=SCALED)


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor. As gradients are large, it takes the place of `gradient`, unless the graph
    is kept for another backward.
    """
    if not is_plain(gradient) or keeps_graph():
        return (gradient * factor).to(gradient.dtype)
    size = gradient.numel()
    _kernel_of_scale(factor.dtype)((cdiv(size, SCALED),), (gradient, factor), size)
    return gradient


def _fake(x, weight, targets, ignore_index, needs_dx, needs_dweight):
    acc = sum_dtype(x.dtype)
    dx = x.new_empty(x.shape if needs_dx else 0)
    dweight = x.new_empty(weight.shape if needs_dweight else 0, dtype=acc)
    count = targets.new_empty((), dtype=torch.int64)
    return x.new_empty((), dtype=acc), count, dx, dweight


_forward = register(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool needs_dx,"
    " bool needs_dweight) -> (Tensor, Tensor, Tensor, Tensor)",
    _linear_cross_entropy_fwd,
    _fake,
    flops=lambda x, weight, targets, ignore_index, *needs, **_: (
        2 * prod(x) * weight[0] * (1 + sum(needs))
    ),
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, dtype, needs_dx, needs_dweight):
        total, count, dx, dweight = _forward(
            cast(x, dtype), weight, targets, ignore_index, needs_dx, needs_dweight
        )
        ctx.save_for_backward(dx, dweight)
        ctx.dtypes = x.dtype, weight.dtype
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    @first_order("linear_cross_entropy or reconstruction_loss")
    def backward(ctx, dtotal, _):
        return *(
            cast(_times(gradient, dtotal), dtype) if needed else None
            for gradient, dtype, needed in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False
            )
        ), *[None] * 5


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str):
    """Cross entropy of x (B, M, D) and weight (C V, D) with targets (B, M, C) of any strides: the
    mean, or for reduction "sum" the sum and the count.
    """
    C = targets.shape[-1]
    if (
        weight.ndim != 2
        or weight.shape[-1] != x.shape[-1]
        or weight.shape[0] not in range(C, 2**31, C)
    ):
        raise ValueError(
            f"weight must be ({C} V, {x.shape[-1]}) with V at least 1, got {tuple(weight.shape)}"
        )
    if targets.is_floating_point():
        raise ValueError(f"targets must be integers, got {targets.dtype}")
    for name, t in (("weight", weight), ("targets", targets)):
        if t.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (x, weight)]
    arguments = x, weight, targets, ignore_index, product_dtype(x), *wanted
    total, count = apply(_CrossEntropy, *arguments)
    return (total, count) if reduction == "sum" else total / count.clamp(min=1)
