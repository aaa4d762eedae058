"""The mean embedding of the tokens up to a level token, or a linear layer of it.

    x[b, m] = mean of e[ids[b, n]] over n from max(0, m s - C + 1) to m s
    y[b, m] = x[b, m]    or    W x[b, m] + bias

C is `compress`, s is `stride`. The one idea: an embedding is one of V rows, and a linear layer of a
mean is the mean of linear layers. If there are fewer rows than tokens, the linear layer is applied
to the rows, and every level token is the mean of C results that the L2 cache holds. In backward,
each token gathers from the level tokens that it is in, so that nothing is added by atomics, and
gradients are then summed by id.
Reference: reference.chunk_summary
"""

from functools import lru_cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._autograd import apply, as_needed, first_order
from ._ids import check_ids
from ._one_hot import is_small, sum_by_id
from ._register import register
from ._rows import MAX_D, columns, row_config
from ._sums import column_sums
from .launch import KINDS, Kernel, cdiv
from .products import add_product, cast, narrow, product_dtype, sum_dtype

TILE = 2048  # numbers of a tile
WARP_TILE = 512  # numbers of a tile that a warp holds


@triton.jit(do_not_specialize=["rows", "N", "M", "C", "stride", "terms"])
def _chunk_summary_kernel(
    ids_ptr, x_ptr, out_ptr, rows, N, M, C, stride, terms,
    D: tl.constexpr, ACC: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr, ROUNDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The mean of rows of x for every level token; in backward, the gradient of every token's row.

    The k-th term of level token m is token m stride - k. In backward, the k-th term of token n is
    level token ceil(n / stride) + k.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None]
    offs_d = columns(ROUNDS, LANES)
    mask = (row < rows) & (offs_d < D)  # [BLOCK_M, ROUNDS, LANES]
    length = N if BACKWARD else M
    b, position = row // length, row % length
    total = tl.zeros([BLOCK_M, ROUNDS, LANES], dtype=ACC)
    for k in range(0, terms):
        if BACKWARD:
            m = (position + stride - 1) // stride + k
            here = (row < rows) & (m < M) & (m * stride - position < C)
            source = b * M + m
        else:
            m = position
            n = m * stride - k
            here = (row < rows) & (n >= 0)
            source = tl.load(ids_ptr + b * N + n, mask=here, other=0)
        share = 1.0 / tl.minimum(m * stride + 1, C).to(ACC)
        x = tl.load(x_ptr + source * D + offs_d, mask=here & mask, other=0.0).to(ACC)
        total += x * share
    tl.store(out_ptr + row * D + offs_d, total, mask=mask)


@lru_cache(KINDS)
def _kernel_of(D: int, dtype: torch.dtype, backward: bool) -> Kernel:
    constants = dict(D=D, BACKWARD=backward, **row_config(D, TILE, WARP_TILE))
    return Kernel(_chunk_summary_kernel, dtype, **constants)


def _launch_means(ids: Tensor, x: Tensor, out: Tensor, compress: int, stride: int, backward: bool):
    """Fill out (B, M, D) from x (V, D), or in backward out (B, N, D) from x (B, M, D)."""
    N, D, rows = ids.shape[1], x.shape[-1], out.shape[0] * out.shape[1]
    if not out.numel():
        return
    kernel = _kernel_of(D, x.dtype, backward)
    terms = cdiv(compress, stride) if backward else compress
    sizes = rows, N, -(-N // stride), compress, stride, terms
    kernel((cdiv(rows, kernel.constants["BLOCK_M"]),), (ids, x, out), *sizes)


def _means(ids: Tensor, x: Tensor, dtype: torch.dtype, compress: int, stride: int) -> Tensor:
    """(B, M, D), the mean of rows of x (V, D) for every level token."""
    out = x.new_empty(len(ids), cdiv(ids.shape[1], stride), x.shape[1], dtype=dtype)
    _launch_means(ids, x, out, compress, stride, backward=False)
    return out


def _by_token(dx: Tensor, ids: Tensor, compress: int, stride: int) -> Tensor:
    """(B, N, D), the gradient of every token's row, from the gradient dx (B, M, D) of means."""
    if compress == stride == 1:
        return dx
    out = dx.new_empty(*ids.shape, dx.shape[-1])
    _launch_means(ids, dx, out, compress, stride, backward=True)
    return out


def _chunk_summary_fwd(ids, embedding, weight, bias, compress, stride, dtype):
    if weight is None:
        return _means(ids, embedding, dtype, compress, stride)
    product = torch.mm if bias is None else lambda *args, out: torch.addmm(bias, *args, out=out)
    if is_small(embedding, ids):
        table = embedding.new_empty(len(embedding), len(weight))
        product(embedding, weight.T, out=table)
        return _means(ids, table, dtype, compress, stride)
    x = _means(ids, embedding, dtype, compress, stride)
    y = x.new_empty(*x.shape[:2], len(weight))
    product(x.flatten(0, 1), weight.T, out=y.flatten(0, 1))
    return y


def _new_gradients(embedding, weight, has_bias, needs_embedding, needs_weight):
    """Uninitialised gradients in the dtype of sums, empty if not needed."""
    acc = sum_dtype(embedding.dtype)
    dembedding = embedding.new_empty(embedding.shape if needs_embedding else 0, dtype=acc)
    dweight = embedding.new_empty(weight.shape if needs_weight else 0, dtype=acc)
    return dembedding, dweight, embedding.new_empty(len(weight) if has_bias else 0, dtype=acc)


def _chunk_summary_bwd(
    dy, ids, embedding, weight, compress, stride, has_bias, needs_embedding, needs_weight
):
    V, acc = len(embedding), sum_dtype(dy.dtype)
    gradients = _new_gradients(embedding, weight, has_bias, needs_embedding, needs_weight)
    dembedding, dweight, _ = gradients
    if not dy.numel():
        return tuple(t.zero_() for t in gradients)
    dbias = column_sums(dy.flatten(0, 1)) if has_bias else dy.new_empty(0, dtype=acc)
    if weight is None:
        return sum_by_id(_by_token(dy, ids, compress, stride), ids, V), dweight, dbias
    if is_small(embedding, ids):
        d = cast(sum_by_id(_by_token(dy, ids, compress, stride), ids, V), dy.dtype)
        if needs_embedding:
            add_product(dembedding, d, weight, start=True)
        if needs_weight:
            add_product(dweight, d.T, embedding, start=True)
        return dembedding, dweight, dbias
    if needs_embedding:
        dx = dy.new_empty(*dy.shape[:2], embedding.shape[1])
        torch.mm(dy.flatten(0, 1), weight, out=dx.flatten(0, 1))
        dembedding = sum_by_id(_by_token(dx, ids, compress, stride), ids, V)
    if needs_weight:
        x = _means(ids, embedding, dy.dtype, compress, stride)
        add_product(dweight, dy.flatten(0, 1).T, x.flatten(0, 1), start=True)
    return dembedding, dweight, dbias


def _fake_fwd(ids, embedding, weight, bias, compress, stride, dtype):
    D = embedding.shape[1] if weight is None else weight.shape[0]
    return embedding.new_empty(ids.shape[0], -(-ids.shape[1] // stride), D, dtype=dtype)


def _product_flops(ids, weight, stride) -> int:
    """FLOPs of the linear layer of every level token."""
    return 0 if weight is None else 2 * ids[0] * cdiv(ids[1], stride) * prod(weight)


_forward = register(
    "chunk_summary",
    "(Tensor ids, Tensor embedding, Tensor? weight, Tensor? bias, int compress, int stride,"
    " ScalarType dtype) -> Tensor",
    _chunk_summary_fwd,
    fake=_fake_fwd,
    flops=lambda ids, embedding, weight, bias, compress, stride, *_, **__: _product_flops(
        ids, weight, stride
    ),
)
_backward = register(
    "chunk_summary_bwd",
    "(Tensor dy, Tensor ids, Tensor embedding, Tensor? weight, int compress, int stride,"
    " bool has_bias, bool needs_embedding, bool needs_weight) -> (Tensor, Tensor, Tensor)",
    _chunk_summary_bwd,
    fake=lambda dy, ids, embedding, weight, compress, stride, *needs: _new_gradients(
        embedding, weight, *needs
    ),
    flops=lambda dy, ids, embedding, weight, compress, stride, has_bias, *needs, **__: (
        sum(needs) * _product_flops(ids, weight, stride)
    ),
)


class _ChunkSummary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, embedding, weight, bias, compress, stride, dtype):
        tensors = embedding, weight, bias
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.sizes, ctx.has_bias = (compress, stride), bias is not None
        if weight is not None:  # without a weight, rows are read in the dtype that they have
            embedding, weight = narrow(embedding, dtype), narrow(weight, dtype)
            bias = None if bias is None else cast(bias, dtype)
        ctx.save_for_backward(ids, embedding, weight)
        return _forward(ids, embedding, weight, bias, compress, stride, dtype)

    @staticmethod
    @first_order("chunk_summary")
    def backward(ctx, dy):
        needs = ctx.needs_input_grad[1:4]
        args = *ctx.saved_tensors, *ctx.sizes, ctx.has_bias, *needs[:2]
        gradients = _backward(dy.contiguous(), *args)
        return None, *as_needed(gradients, ctx.dtypes, needs), None, None, None


def chunk_summary(
    ids: Tensor,
    embedding: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    compress: int,
    stride: int,
) -> Tensor:
    """The mean embedding of the up to C tokens that end at a level token, or a linear layer of it.

    The result is in autocast's dtype under autocast, else in that of the embedding; means are made
    and gradients are summed in fp32 (fp64 for fp64). Ids are not checked to be in range, as that
    would wait for the device.

    Args:
        ids: (B, N) int64 in [0, V).
        embedding: (V, D); D at most 8192.
        weight: (D_out, D), D_out at most 8192, of the dtype of embedding, or None.
        bias: (D_out,), of the dtype of embedding, or None.
        compress: C, at least 1.
        stride: how many tokens lie between a level token and the next, 1 to C.

    Returns:
        (B, ceil(N / stride), D_out), or (B, ceil(N / stride), D) without a weight.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is not as above.

    Source: the chunk summaries of next latent prediction (NextLat, arXiv 2511.05963) in
    simple-hierarchical-transformer 0.4.0.
    """
    check_ids(ids, embedding)
    D, like = embedding.shape[1], (embedding.dtype, embedding.device)
    if D > MAX_D:
        raise ValueError(f"embedding must have a width D of 1 to {MAX_D}, got {D}")
    if weight is None and bias is not None:
        raise ValueError("bias must be None without a weight, got a tensor")
    if weight is not None and (
        (weight.ndim, weight.shape[-1], weight.dtype, weight.device) != (2, D, *like)
        or not 1 <= len(weight) <= MAX_D
    ):
        raise ValueError(
            f"weight must be (D_out, {D}), D_out 1 to {MAX_D}, {like[0]} on {like[1]},"
            f" got {tuple(weight.shape)}, {weight.dtype} on {weight.device}"
        )
    if bias is not None and (bias.shape, bias.dtype, bias.device) != (weight.shape[:1], *like):
        raise ValueError(
            f"bias must be ({len(weight)},), {like[0]} on {like[1]},"
            f" got {tuple(bias.shape)}, {bias.dtype} on {bias.device}"
        )
    if compress < 1:
        raise ValueError(f"compress must be at least 1, got {compress}")
    if not 1 <= stride <= compress:
        raise ValueError(f"stride must be 1 to {compress} (compress), got {stride}")
    dtype = product_dtype(embedding)
    args = ids.contiguous(), embedding.contiguous(), weight, bias, compress, stride, dtype
    return apply(_ChunkSummary, *args)
