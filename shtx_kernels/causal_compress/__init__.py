"""Token ids to the embeddings of a compressed level: causal convolution, SiLU, linear layer.

    u[m] = b_conv + sum_k W_k e[ids[m s - C + 1 + k]]     ids before the first add nothing
    y[m] = W_out silu(u[m]) + b_out

J is the number of channels of the convolution, s the stride. The one idea: an embedding is one of V
rows. There are two ways to u, chosen by shape alone (`uses_table`): sums of rows of a table, if V
is small (table.py), and products of windows of the sequence (windows.py). Kept for backward are
the table or u, and narrow weights. Reference: reference.causal_compress
"""

import torch
from torch import Tensor

from .._autograd import apply, as_needed, first_order
from .._ids import check_ids
from ..launch import cdiv
from ..products import narrow, product_dtype
from . import table, windows


def uses_table(V: int, D: int, rows: int) -> bool:
    """Return whether a level of `rows` tokens in all takes the table, for V embeddings D wide.

    In units of 2 C J operations, a table takes 3 V D in products and V rows in summing by id;
    products of every token take 3 rows D. Asking for less than two thirds of these leaves room for
    what else the table costs.
    """
    return V * (rows + 3 * D) <= 2 * rows * D


def _function_of(way) -> type[torch.autograd.Function]:
    """The function that PyTorch differentiates, made of the ops of one of the two ways."""

    class CausalCompress(torch.autograd.Function):
        @staticmethod
        def forward(ctx, ids, embedding, w_conv, b_conv, w_out, b_out, stride, dtype):
            ctx.dtypes = [t.dtype for t in (embedding, w_conv, b_conv, w_out, b_out)]
            ctx.stride, ctx.w_shape = stride, w_out.shape
            embedding, w_out = narrow(embedding, dtype), narrow(w_out, dtype).flatten(1)
            y, source, taps = way.forward(ids, embedding, w_conv, b_conv, w_out, b_out, stride)
            ctx.save_for_backward(ids, embedding, taps, b_conv, w_out, source)
            return y

        @staticmethod
        @first_order("causal_compress")
        def backward(ctx, dy):
            gradients = way.backward(*ctx.saved_tensors, dy.contiguous(), ctx.stride)
            gradients = as_needed(gradients, ctx.dtypes, ctx.needs_input_grad[1:6])
            if gradients[3] is not None:
                gradients[3] = gradients[3].view(ctx.w_shape)
            return None, *gradients, None, None

    return CausalCompress


_ByTable, _ByWindows = _function_of(table), _function_of(windows)


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

    Products and result are in autocast's dtype under autocast, else in that of the weights. Ids are
    not checked to be in range, as that would wait for the device.

    Args:
        ids: (B, N) int64 in [0, V).
        embedding: (V, D).
        w_conv: (J, D, C), of the dtype of embedding, as are all weights below.
        b_conv: (J,).
        w_out: (D_out, J, 1).
        b_out: (D_out,).
        stride: how many tokens lie between a level token and the next, at least 1.

    Returns:
        (B, ceil(N / stride), D_out); row m reads the C tokens up to m * stride.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is not as above.

    Source: simple-hierarchical-transformer, CausalConv.
    """
    check_ids(ids, embedding)
    if ids.shape[1] < 1:
        raise ValueError(f"ids must be (B, N) with N of at least 1, got {tuple(ids.shape)}")
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
    rows = len(ids) * cdiv(ids.shape[1], stride)
    function = _ByTable if uses_table(*embedding.shape, rows) else _ByWindows
    return apply(
        function, ids.contiguous(), embedding, w_conv.contiguous(), b_conv.contiguous(), w_out,
        b_out, stride, product_dtype(embedding),
    )  # fmt: skip
