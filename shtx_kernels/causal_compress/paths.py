"""The two ways to the pre-activations, forward and backward, and what is common to both."""

import torch
from torch import Tensor

from .._one_hot import one_hot
from .._products import add_product, cast, sum_dtype
from .._sums import column_sums
from .kernels import activate, activate_backward, taps_last


def uses_table(V: int, D: int, rows: int) -> bool:
    """Whether a level of `rows` tokens in all takes the table, of V ids and embeddings D wide.

    In units of 2 C J operations, a table takes 3 V D in products and V rows in summing by id;
    products of every token take 3 rows D. Asking for less than two thirds leaves room for what
    else the table costs.
    """
    return V * (rows + 3 * D) <= 2 * rows * D


def _geometry(ids: Tensor, taps: Tensor, stride: int, table: bool) -> tuple[int, int, int]:
    """Taps, tokens of the level, and rows of u that the products make for each sequence, or 0."""
    C, N = taps.shape[0 if table else 1], ids.shape[1]
    if table:
        return C, -(-N // stride), 0
    unit = _apart(C, stride) * stride
    return C, -(-N // stride), -(-(N + C - 1) // unit) * unit // stride


def _apart(C: int, stride: int) -> int:
    """Every how many-th window does not overlap."""
    return -(-C // stride)


def new_outputs(ids, embedding, taps, w_out, stride, table) -> tuple[Tensor, Tensor]:
    """Uninitialised: y, and the table (V, C, J) or the pre-activations (B, rows, J)."""
    C, M, rows = _geometry(ids, taps, stride, table)
    J = taps.shape[1 if table else 0]
    shape = (len(embedding), C, J) if table else (len(ids), rows, J)
    return w_out.new_empty(len(ids), M, len(w_out)), embedding.new_empty(shape)


def causal_compress_fwd(ids, embedding, taps, b_conv, w_out, b_out, stride, table):
    C, M, rows = _geometry(ids, taps, stride, table)
    y, source = new_outputs(ids, embedding, taps, w_out, stride, table)
    if table:
        torch.mm(embedding, taps.flatten(0, 1).T, out=source.flatten(1))
    else:
        w, u = taps.flatten(1), source.flatten(0, 1)
        for windows, part in _windows(_padded(ids, embedding, C, rows * stride), u, C, stride):
            torch.mm(windows, w.T, out=part)
    a = activate(source, ids, b_conv, M, stride, C, rows)
    torch.addmm(cast(b_out, a.dtype), a, w_out.T, out=y.flatten(0, 1))
    return y, source


def causal_compress_bwd(ids, embedding, taps, b_conv, w_out, source, dy, stride, table):
    C, M, rows = _geometry(ids, taps, stride, table)
    acc = sum_dtype(embedding.dtype)
    dy = dy.flatten(0, 1)
    new = lambda *shape: embedding.new_empty(shape, dtype=acc)
    a = dy.new_empty(dy.shape[0], w_out.shape[1])
    torch.mm(dy, w_out, out=a)  # its gradient, which the kernel replaces
    du, db_conv = activate_backward(source, ids, b_conv, a, M, stride, C, rows)
    if not len(dy):
        J, D_out = len(b_conv), len(w_out)
        shapes = embedding.shape, (J, embedding.shape[1], C), w_out.shape, (D_out,)
        dembedding, dw_conv, dw_out, db_out = (new(*shape).zero_() for shape in shapes)
        return dembedding, dw_conv, db_conv, dw_out, db_out
    dw_out = new(*w_out.shape)
    add_product(dw_out, dy.T, a, start=True)
    backward = _table_backward if table else _products_backward
    dembedding, dw_conv = backward(ids, embedding, taps, du, M, stride, C, acc)
    return dembedding, dw_conv, db_conv, dw_out, column_sums(dy)


def _table_backward(ids, embedding, taps, du, M, stride, C, acc):
    (V, D), J = embedding.shape, du.shape[1]
    dtable = du.new_empty(V * C, J, dtype=acc)
    add_product(dtable, one_hot(ids, V, M, stride, C, du.dtype), du, start=True)
    dtable = cast(dtable, du.dtype).view(V, C * J)
    dembedding, dtaps = (du.new_empty(shape, dtype=acc) for shape in ((V, D), (C * J, D)))
    add_product(dembedding, dtable, taps.flatten(0, 1), start=True)
    add_product(dtaps, dtable.T, embedding, start=True)
    return dembedding, taps_last(dtaps.view(C, J, D), first=True)


def _products_backward(ids, embedding, taps, du, M, stride, C, acc):
    (B, N), (V, D), J = ids.shape, embedding.shape, du.shape[1]
    length = len(du) // B * stride
    x, w = _padded(ids, embedding, C, length), taps.flatten(1)
    dx, dw = torch.zeros_like(x, dtype=acc), du.new_empty(w.shape, dtype=acc)
    pairs = zip(_windows(x, du, C, stride), _windows(dx, du, C, stride), strict=True)
    for i, ((windows, part), (dwindows, _)) in enumerate(pairs):
        add_product(dwindows, part, w, start=False)
        add_product(dw, part.T, windows, start=i == 0)
    dx = dx[: B * length].view(B, length, D)[:, C - 1 : C - 1 + N]
    dembedding = torch.ops.aten.embedding_dense_backward(dx, ids, V, -1, False)
    return dembedding, taps_last(dw.view(J, C, D), first=False)


def _padded(ids: Tensor, embedding: Tensor, C: int, length: int) -> Tensor:
    """Embeddings (B length + C, D), of each sequence after C - 1 rows of zeros."""
    (B, N), D = ids.shape, embedding.shape[1]
    x = embedding.new_zeros(B * length + C, D)
    x[: B * length].view(B, length, D)[:, C - 1 : C - 1 + N] = embedding[ids]
    return x


def _windows(x: Tensor, u: Tensor, C: int, stride: int):
    """Windows (rows, C D) of x that do not overlap, with their rows of u, in turn."""
    D, apart = x.shape[1], _apart(C, stride)
    for i in range(apart):
        part = u[i::apart]
        shape, strides = (len(part), C * D), (apart * stride * D, 1)
        yield x.as_strided(shape, strides, i * stride * D), part
