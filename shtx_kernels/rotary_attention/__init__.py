"""Rotary embedding and causal attention, from packed qkv to packed heads.

    token p = r + dilation i is token i of residue class r, which is a sequence of its own
    q'_i = R(i) q_i, k'_j = R(j) k_j: channels (c, c + E/2) turn by the angle i 10000^(-2c/E),
           or, interleaved, channels (2c, 2c + 1)
    xpos:  q'_i *= z^(i/512), k'_j *= z^(-j/512), z_c = (2c + 0.4 E) / (1.4 E)
    out_i = sum_j softmax_j(scale q'_i k'_j) v_j   over i - window <= j <= i

The one idea: only i - j counts, so a tile is rotated as seen from its own first token, where angles
are small and the factors of xpos near one, at any length. One small table of cos and sin serves all
tiles: one more row of it turns a tile by its distance from another. Nothing else is in memory: a
residue class is a stride, and the gradient is rotated back on its way into the packed layout.
Reference: reference.rotary_attention
"""

from functools import lru_cache

import torch
from torch import Tensor

from .._autograd import apply, first_order
from .._register import register
from ..launch import KINDS, Kernel, cdiv, next_power_of_2
from ..products import matmul_precision, sum_dtype
from . import library, tiles
from .backward import (
    _rotary_attention_bwd_dkdv_kernel,
    _rotary_attention_bwd_dq_kernel,
    _rotary_attention_bwd_tile_kernel,
)
from .forward import _rotary_attention_fwd_kernel, _rotary_attention_fwd_tile_kernel
from .rotations import MAX_TILE, make_table

MAX_E = 256
LOG2_E = 1.4426950408889634  # the softmax is in base 2


def _sizes(qkv: Tensor, heads: int, dilation: int) -> tuple[int, int, int, int]:
    """B, M, E, and the number n of tokens of the longest residue class."""
    B, M, width = qkv.shape
    return B, M, width // (3 * heads), cdiv(M, dilation)


@lru_cache(KINDS)
def _kernel_of(
    kernel, dtype, heads, E, window, dilation, xpos: bool, interleaved: bool, precision, **config
):
    return Kernel(
        kernel, dtype, DILATION=dilation, H=heads, E=E, WINDOW=window, XPOS=int(xpos),
        INTERLEAVED=interleaved, IP=precision, BLOCK_C=max(8, next_power_of_2(E // 2)),
        BLOCK_E=max(16, next_power_of_2(E)), **config,
    )  # fmt: skip


def _rotary_attention_fwd(qkv, table, heads, window, dilation, xpos, interleaved, scale):
    B, M, E, n = _sizes(qkv, heads, dilation)
    if library.takes(qkv, E, window, n, xpos):
        return library.forward(qkv, table, heads, dilation, xpos, interleaved, scale)
    out = qkv.new_empty(B, M, heads * E)
    lse = qkv.new_empty(B, heads, dilation, n, dtype=sum_dtype(qkv.dtype))
    if not out.numel():
        return out, lse, []
    factor, sizes = scale * LOG2_E, (E, window, qkv.itemsize, qkv.device)
    config = tiles.forward_by_tiles(*sizes)
    if config is not None:  # q and k are multiplied by the root of the factor each
        kernel, size, factor = _rotary_attention_fwd_tile_kernel, "BLOCK", factor**0.5
    else:
        config = tiles.forward(*sizes) | dict(SHORT=0 < window <= tiles.SHORT)
        kernel, size = _rotary_attention_fwd_kernel, "BLOCK_M"
    options = qkv.dtype, heads, E, window, dilation, xpos, interleaved, matmul_precision()
    count = cdiv(n, config[size])
    numbers = *qkv.stride()[:2], M, n, count, factor
    grid = (B * heads * dilation * count,)
    _kernel_of(kernel, *options, **config)(grid, (qkv, table, out, lse), *numbers)
    return out, lse, []


def _rotary_attention_bwd(
    saved, table, out, lse, dout, heads, window, dilation, xpos, interleaved, scale
):
    if saved.ndim == 5:
        return library.backward(saved, table, out, lse, dout, dilation, xpos, interleaved, scale)
    B, M, E, n = _sizes(saved, heads, dilation)
    dqkv = saved.new_empty(B, M, 3 * heads * E)
    if not dqkv.numel():
        return dqkv
    options = saved.dtype, heads, E, window, dilation, xpos, interleaved, matmul_precision()
    tensors = saved, table, out, lse, dout, dqkv
    strides = *saved.stride()[:2], *dout.stride()[:2]

    def run(kernel, config, size, factor):
        count = cdiv(n, config[size])
        grid = (B * heads * dilation * count,)
        _kernel_of(kernel, *options, **config)(grid, tensors, *strides, M, n, count, factor)

    factor, sizes = scale * LOG2_E, (E, window, saved.itemsize, saved.device)
    config = tiles.backward_by_tiles(*sizes)
    if config is not None:
        run(_rotary_attention_bwd_tile_kernel, config, "BLOCK", factor**0.5)
        return dqkv
    run(_rotary_attention_bwd_dkdv_kernel, tiles.backward_by_keys(*sizes), "BLOCK_N", factor)
    run(_rotary_attention_bwd_dq_kernel, tiles.backward_by_queries(*sizes), "BLOCK_M", factor)
    return dqkv


def _fake_fwd(qkv, table, heads, window, dilation, xpos, interleaved, scale):
    B, M, E, n = _sizes(qkv, heads, dilation)
    acc = sum_dtype(qkv.dtype)
    out = qkv.new_empty(B, M, heads * E)
    if library.takes(qkv, E, window, n, xpos):
        lse = qkv.new_empty(B * dilation, heads, n, dtype=acc)
        return out, lse, [qkv.new_empty(3, B * dilation, n, heads, E)]
    return out, qkv.new_empty(B, heads, dilation, n, dtype=acc), []


def _fake_bwd(saved, table, out, lse, dout, heads, window, dilation, xpos, interleaved, scale):
    return out.new_empty(*out.shape[:2], 3 * out.shape[2])


def _product_flops(out, window, dilation) -> int:
    """FLOPs of a product of queries with keys: of all with all, or of every bucket of queries,
    which is as wide as the window, with two buckets of keys.
    """
    B, M, K = out
    n = -(-M // dilation)
    pairs = n * n if window < 0 else -(-n // window) * 2 * window * window
    return 2 * B * dilation * K * pairs


OPTIONS = "int heads, int window, int dilation, bool xpos, bool interleaved, float scale"
_forward = register(
    "rotary_attention",
    f"(Tensor qkv, Tensor table, {OPTIONS}) -> (Tensor, Tensor, Tensor[])",
    _rotary_attention_fwd,
    _fake_fwd,
    flops=lambda qkv, table, heads, window, dilation, *_, **__: (
        2 * _product_flops((*qkv[:2], qkv[2] // 3), window, dilation)
    ),
)
_backward = register(
    "rotary_attention_bwd",
    f"(Tensor saved, Tensor table, Tensor out, Tensor lse, Tensor dout, {OPTIONS}) -> Tensor",
    _rotary_attention_bwd,
    _fake_bwd,
    flops=lambda saved, table, out, lse, dout, heads, window, dilation, *_, **__: (
        5 * _product_flops(out, window, dilation)
    ),
)


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, table, *options):
        out, lse, rotated = _forward(qkv, table, *options)
        ctx.save_for_backward(*(rotated or [qkv]), table, out, lse)
        ctx.options = options
        return out

    @staticmethod
    @first_order("rotary_attention")
    def backward(ctx, dout):
        # the gradient of a sum is expanded, even in its last dimension
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        dqkv = _backward(*ctx.saved_tensors, dout, *ctx.options)
        return dqkv, *[None] * 7


def rotary_attention(
    qkv: Tensor,
    heads: int,
    *,
    window: int | None = None,
    dilation: int = 1,
    xpos: bool = False,
    interleaved: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of rotated queries to rotated keys, from the product for q, k and v.

    Args:
        qkv: (B, M, 3 H E), queries, keys and values of H heads of E channels; the last dimension
            contiguous, B and M may be strided. E is even and at most 256.
        heads: H.
        window: how many tokens before itself a query sees, at least 1; None for all.
        dilation: a token attends only to tokens whose distance from it is a multiple of this;
            positions and window count those tokens alone.
        xpos: whether dot products decay with the distance (scale base 512).
        interleaved: whether rotary pairs channels 2 c and 2 c + 1, rather than c and c + E / 2.
        scale: the positive factor of the dot products; E ** -0.5 by default.

    Returns:
        (B, M, H E) in the dtype of qkv, contiguous. For fp32, products are in TF32 where
        torch.set_float32_matmul_precision or torch.backends.cuda.matmul allows it.

    Raises:
        ValueError: naming the argument whose shape, strides or value is not as above.

    Source: rotary embedding (Su et al. 2021, arXiv 2104.09864), xpos (Sun et al. 2022, arXiv
    2212.10554), attention by tiles (Dao 2023, arXiv 2307.08691); semantics of local-attention and
    simple-hierarchical-transformer, whose axial rearrange the dilation replaces.
    """
    if qkv.ndim != 3 or qkv.stride(-1) != 1:
        raise ValueError(
            "qkv must be (B, M, 3 H E) with a contiguous last dimension,"
            f" got {tuple(qkv.shape)}, strides {qkv.stride()}"
        )
    if heads < 1 or qkv.shape[-1] % (6 * heads) or not 2 <= qkv.shape[-1] // (3 * heads) <= MAX_E:
        raise ValueError(
            f"heads must divide the last dimension of qkv into 3 heads of even width E of 2 to"
            f" {MAX_E}, got heads={heads} and qkv {tuple(qkv.shape)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be None or at least 1, got {window}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    dilation = min(dilation, max(1, qkv.shape[1]))
    if min(qkv.shape[1], MAX_TILE * dilation) * max(qkv.stride(1), qkv.shape[2]) >= 2**31:
        raise ValueError(
            f"dilation must keep {MAX_TILE} tokens of a class within 2^31 elements,"
            f" got {dilation} with strides {qkv.stride()}"
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    E, n = qkv.shape[-1] // (3 * heads), cdiv(qkv.shape[1], dilation)
    window = -1 if window is None or window >= n - 1 else window
    scale = E**-0.5 if scale is None else float(scale)
    table = make_table(qkv, E, n)
    return apply(_RotaryAttention, qkv, table, heads, window, dilation, xpos, interleaved, scale)
