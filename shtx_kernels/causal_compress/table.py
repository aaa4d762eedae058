"""The table: an embedding is one of V rows, so every product that the convolution can ask for is a
row of T = e W_k^T (V, C, J), and u sums C rows of it. V rows are multiplied in place of all tokens.

In backward, the gradients of u are summed by id and tap: a product with the one-hot matrix of the
ids, which always sums in the same order.
"""

import torch

from .._one_hot import one_hot
from .._sums import column_sums
from ..launch import cdiv
from ..products import add_product, cast, sum_dtype
from .kernels import copy_taps
from .layer import finish, finish_bwd, new_gradients, register_way


def _new_outputs(ids, embedding, w_conv, b_conv, w_out, b_out, stride) -> tuple:
    """Uninitialised: y, the table (V, C, J), and the weight as (C, J, D)."""
    J, D, C = w_conv.shape
    y = w_out.new_empty(ids.shape[0], cdiv(ids.shape[1], stride), w_out.shape[0])
    return y, embedding.new_empty(embedding.shape[0], C, J), embedding.new_empty(C, J, D)


def _causal_compress_table_fwd(ids, embedding, w_conv, b_conv, w_out, b_out, stride):
    outputs = _new_outputs(ids, embedding, w_conv, b_conv, w_out, b_out, stride)
    y, table, taps = outputs
    C, J, D = taps.shape
    copy_taps(w_conv, taps, stride_j=D, stride_c=J * D, to_taps=True)
    torch.mm(embedding, taps.flatten(0, 1).T, out=table.flatten(1))
    finish(y, table, ids, b_conv, w_out, b_out, stride, C, windows=0)
    return outputs


def _causal_compress_table_bwd(ids, embedding, taps, b_conv, w_out, table, dy, stride):
    (C, J, D), (_, M, _), V = taps.shape, dy.shape, len(embedding)
    if not dy.numel():
        return tuple(t.zero_() for t in new_gradients(embedding, b_conv, w_out, C))
    acc = sum_dtype(embedding.dtype)
    du, db_conv, dw_out = finish_bwd(table, ids, b_conv, w_out, dy, stride, C, windows=0)
    dtable = du.new_empty(V * C, J, dtype=acc)
    add_product(dtable, one_hot(ids, V, M, stride, C, du.dtype), du, start=True)
    dtable = cast(dtable, du.dtype).view(V, C * J)
    dembedding, dtaps = (du.new_empty(shape, dtype=acc) for shape in ((V, D), (C * J, D)))
    add_product(dembedding, dtable, taps.flatten(0, 1), start=True)
    add_product(dtaps, dtable.T, embedding, start=True)
    dw_conv = dtaps.new_empty(J, D, C)
    copy_taps(dw_conv, dtaps, stride_j=D, stride_c=J * D, to_taps=False)
    return dembedding, dw_conv, db_conv, dw_out, column_sums(dy.flatten(0, 1))


forward, backward = register_way(
    "causal_compress_table",
    _causal_compress_table_fwd,
    _causal_compress_table_bwd,
    _new_outputs,
    tap_dim=0,
)
