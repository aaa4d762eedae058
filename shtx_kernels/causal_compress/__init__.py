"""Token ids to the embeddings of a compressed level: causal convolution, SiLU, linear layer.

    u[m] = b_conv + sum_k W_k e[ids[m s - C + 1 + k]]     ids before the first add nothing
    y[m] = W_out silu(u[m]) + b_out

Two ways to u, chosen by shape alone (`uses_table`):

The table. An embedding is one of V rows, so every product that the convolution can ask for is a
row of T = e W_k^T (V, C, J), and u sums C rows of it: V rows are multiplied in place of all tokens.
Backward, gradients of u are summed by id and tap: a product with the one-hot matrix of the ids,
which sums in one order always.

The products. A window is C D numbers side by side. Windows s apart overlap where s < C, which
is not a matrix for cuBLAS, but every q-th of them, q = ceil(C / s), do not: q products, without
a copy of windows, over sequences padded to a multiple of q s tokens.

Kept for backward: T or u, and narrow weights. Reference: reference.causal_compress
"""

from math import prod

import torch
from torch import Tensor

from .._autograd import apply, first_order
from .._products import cast, narrow, product_dtype, sum_dtype
from .._register import register
from .kernels import taps_first, taps_inside
from .paths import causal_compress_bwd, causal_compress_fwd, new_outputs, uses_table


def _causal_compress_taps(w, dtype, table):
    return (taps_first if table else taps_inside)(w, dtype)


def _fake_taps(w, dtype, table):
    J, D, C = w.shape
    return w.new_empty((C, J, D) if table else (J, C, D), dtype=dtype)


def _fake_fwd(ids, embedding, taps, b_conv, w_out, b_out, stride, table):
    return new_outputs(ids, embedding, taps, w_out, stride, table)


def _fake_bwd(ids, embedding, taps, b_conv, w_out, source, dy, stride, table):
    acc = sum_dtype(embedding.dtype)
    J, (V, D), C = len(b_conv), embedding.shape, taps.shape[0 if table else 1]
    shapes = (V, D), (J, D, C), (J,), w_out.shape, (len(w_out),)
    return tuple(embedding.new_empty(shape, dtype=acc) for shape in shapes)


def _layer_flops(ids, taps, w_out, stride) -> int:
    """Of the convolution and the linear layer."""
    rows = ids[0] * -(-ids[1] // stride)
    return 2 * rows * (prod(taps) + prod(w_out))


_taps = register(
    "causal_compress_taps",
    "(Tensor w, ScalarType dtype, bool table) -> Tensor",
    _causal_compress_taps,
    _fake_taps,
)
_forward = register(
    "causal_compress",
    "(Tensor ids, Tensor embedding, Tensor taps, Tensor b_conv, Tensor w_out, Tensor b_out,"
    " int stride, bool table) -> (Tensor, Tensor)",
    causal_compress_fwd,
    _fake_fwd,
    flops=lambda ids, embedding, taps, b_conv, w_out, b_out, stride, *_, **__: _layer_flops(
        ids, taps, w_out, stride
    ),
)
_backward = register(
    "causal_compress_bwd",
    "(Tensor ids, Tensor embedding, Tensor taps, Tensor b_conv, Tensor w_out, Tensor source,"
    " Tensor dy, int stride, bool table) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    causal_compress_bwd,
    _fake_bwd,
    flops=lambda ids, embedding, taps, b_conv, w_out, source, dy, stride, *_, **__: (
        2 * _layer_flops(ids, taps, w_out, stride)
    ),
)


class _CausalCompress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, embedding, w_conv, b_conv, w_out, b_out, stride, dtype, table):
        ctx.dtypes = [t.dtype for t in (embedding, w_conv, b_conv, w_out, b_out)]
        ctx.stride, ctx.table, ctx.w_shape = stride, table, w_out.shape
        embedding, w_out = narrow(embedding, dtype), narrow(w_out, dtype).flatten(1)
        taps = _taps(w_conv, dtype, table)
        y, source = _forward(ids, embedding, taps, b_conv, w_out, b_out, stride, table)
        ctx.save_for_backward(ids, embedding, taps, b_conv, w_out, source)
        return y

    @staticmethod
    @first_order("causal_compress")
    def backward(ctx, dy):
        gradients = _backward(*ctx.saved_tensors, dy.contiguous(), ctx.stride, ctx.table)
        pairs = zip(gradients, ctx.dtypes, ctx.needs_input_grad[1:6], strict=True)
        gradients = [cast(g, dtype) if needed else None for g, dtype, needed in pairs]
        if gradients[3] is not None:
            gradients[3] = gradients[3].view(ctx.w_shape)
        return None, *gradients, None, None, None


def _check(name: str, t: Tensor, shape: tuple, like: Tensor):
    if t.shape != shape or t.device != like.device or t.dtype != like.dtype:
        raise ValueError(
            f"{name} must be {shape}, {like.dtype} on {like.device},"
            f" got {tuple(t.shape)}, {t.dtype} on {t.device}"
        )


def causal_compress(
    ids: Tensor,
    embedding: Tensor,
    w_conv: Tensor,
    b_conv: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    *,
    stride: int,
) -> Tensor:
    """Embed ids and compress them by a causal convolution, SiLU and a linear layer.

    Under autocast, products and what is returned are in its dtype, else in that of the weights.
    That ids are in range is not checked: it would wait for the device.

    Args:
        ids: (B, N) int64 in [0, V).
        embedding: (V, D).
        w_conv: (J, D, C), of the dtype of embedding, as everything below.
        b_conv: (J,).
        w_out: (D_out, J, 1).
        b_out: (D_out,).
        stride: tokens from one of the level to the next, at least 1.

    Returns:
        (B, ceil(N / stride), D_out); row m reads the C tokens up to m * stride.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is not as above.

    Source: simple-hierarchical-transformer, CausalConv.
    """
    if ids.ndim != 2 or ids.dtype != torch.int64 or ids.shape[1] < 1:
        raise ValueError(
            f"ids must be (B, N) int64 with N of at least 1, got {tuple(ids.shape)}, {ids.dtype}"
        )
    if embedding.ndim != 2 or not embedding.numel() or embedding.device != ids.device:
        raise ValueError(
            f"embedding must be (V, D), not empty, on {ids.device},"
            f" got {tuple(embedding.shape)} on {embedding.device}"
        )
    D = embedding.shape[1]
    if w_conv.ndim != 3 or not w_conv.numel():
        raise ValueError(f"w_conv must be (J, {D}, C), not empty, got {tuple(w_conv.shape)}")
    if w_out.ndim != 3 or not len(w_out):
        raise ValueError(f"w_out must be (D_out, J, 1), not empty, got {tuple(w_out.shape)}")
    J, _, C = w_conv.shape
    _check("w_conv", w_conv, (J, D, C), embedding)
    _check("b_conv", b_conv, (J,), embedding)
    _check("w_out", w_out, (len(w_out), J, 1), embedding)
    _check("b_out", b_out, (len(w_out),), embedding)
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    rows = len(ids) * -(-ids.shape[1] // stride)
    return apply(
        _CausalCompress, ids.contiguous(), embedding, w_conv.contiguous(), b_conv.contiguous(),
        w_out, b_out, stride, product_dtype(embedding), uses_table(*embedding.shape, rows),
    )  # fmt: skip
