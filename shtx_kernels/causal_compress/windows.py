"""The products: a window of the convolution is C D numbers side by side, so u is a product of
windows.

Windows s apart overlap if s < C, which is no matrix for cuBLAS. But every q-th of them, q =
ceil(C / s), does not overlap with the next: that makes q products, without a copy of windows, over
sequences that are padded to a multiple of q s tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._sums import column_sums
from ..launch import cdiv
from ..products import add_product, sum_dtype
from .kernels import copy_taps
from .layer import finish, finish_bwd, new_gradients, register_way


def _count_windows(N: int, C: int, stride: int) -> int:
    """Count the windows of a sequence that are multiplied: at least one for every level token."""
    unit = cdiv(C, stride) * stride
    return cdiv(N + C - 1, unit) * unit // stride


def _padded(ids: Tensor, embedding: Tensor, C: int, length: int) -> Tensor:
    """Embeddings (B length + C, D): for each sequence, C - 1 rows of zeros and then its tokens."""
    (B, N), D = ids.shape, embedding.shape[1]
    x = embedding.new_zeros(B * length + C, D)
    x[: B * length].view(B, length, D)[:, C - 1 : C - 1 + N] = embedding[ids]
    return x


def _windows(x: Tensor, u: Tensor, C: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Matrices of windows (_, C D) of x that do not overlap, with the rows of u that belong to
    them.
    """
    D, apart = x.shape[1], cdiv(C, stride)
    for i in range(apart):
        part = u[i::apart]
        shape, strides = (len(part), C * D), (apart * stride * D, 1)
        yield x.as_strided(shape, strides, i * stride * D), part


def _new_outputs(ids, embedding, w_conv, b_conv, w_out, b_out, stride) -> tuple:
    """Uninitialised: y, u (B, windows, J) without its bias, and the weight as (J, C, D)."""
    (B, N), (J, D, C) = ids.shape, w_conv.shape
    y = w_out.new_empty(B, cdiv(N, stride), w_out.shape[0])
    u = embedding.new_empty(B, _count_windows(N, C, stride), J)
    return y, u, embedding.new_empty(J, C, D)


def _causal_compress_fwd(ids, embedding, w_conv, b_conv, w_out, b_out, stride):
    outputs = _new_outputs(ids, embedding, w_conv, b_conv, w_out, b_out, stride)
    y, u, taps = outputs
    (_, C, D), count = taps.shape, u.shape[1]
    copy_taps(w_conv, taps, stride_j=C * D, stride_c=D, to_taps=True)
    w, x = taps.flatten(1), _padded(ids, embedding, C, count * stride)
    for windows, part in _windows(x, u.flatten(0, 1), C, stride):
        torch.mm(windows, w.T, out=part)
    finish(y, u, ids, b_conv, w_out, b_out, stride, C, count)
    return outputs


def _causal_compress_bwd(ids, embedding, taps, b_conv, w_out, u, dy, stride):
    (B, N), (V, D), (J, C, _), count = ids.shape, embedding.shape, taps.shape, u.shape[1]
    if not dy.numel():
        return tuple(t.zero_() for t in new_gradients(embedding, b_conv, w_out, C))
    acc, length = sum_dtype(embedding.dtype), count * stride
    du, db_conv, dw_out = finish_bwd(u, ids, b_conv, w_out, dy, stride, C, count)
    x, w = _padded(ids, embedding, C, length), taps.flatten(1)
    dx, dtaps = torch.zeros_like(x, dtype=acc), du.new_empty(w.shape, dtype=acc)
    pairs = zip(_windows(x, du, C, stride), _windows(dx, du, C, stride), strict=True)
    for i, ((windows, part), (dwindows, _)) in enumerate(pairs):
        add_product(dwindows, part, w, start=False)
        add_product(dtaps, part.T, windows, start=i == 0)
    dx = dx[: B * length].view(B, length, D)[:, C - 1 : C - 1 + N]
    dembedding = torch.ops.aten.embedding_dense_backward(dx, ids, V, -1, False)
    dw_conv = dtaps.new_empty(J, D, C)
    copy_taps(dw_conv, dtaps, stride_j=C * D, stride_c=D, to_taps=False)
    return dembedding, dw_conv, db_conv, dw_out, column_sums(dy.flatten(0, 1))


forward, backward = register_way(
    "causal_compress", _causal_compress_fwd, _causal_compress_bwd, _new_outputs, tap_dim=1
)
