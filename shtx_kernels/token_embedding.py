"""Token ids to the embeddings of a level that is not compressed.

    y[b, n] = e[ids[b, n]]    or    e[ids[b, n]] W^T

The one idea: an embedding is one of V rows. If there are fewer rows than tokens, the linear layer
is applied to the rows, not to the tokens. In backward, small vocabularies sum gradients by id in a
product with the one-hot matrix of the ids, which always sums in the same order; PyTorch adds them
with atomics. Reference: reference.token_embedding
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import apply, as_needed, first_order
from ._ids import check_ids
from ._one_hot import is_small, sum_by_id
from ._register import register
from .products import add_product, cast, narrow, product_dtype, sum_dtype


def _new_output(ids, embedding, weight) -> Tensor:
    """An uninitialised result."""
    return embedding.new_empty(*ids.shape, embedding.shape[1] if weight is None else len(weight))


def _token_embedding_fwd(ids, embedding, weight):
    if weight is None:
        return F.embedding(ids, embedding)
    if is_small(embedding, ids):
        rows = embedding.new_empty(embedding.shape[0], weight.shape[0])
        return F.embedding(ids, torch.mm(embedding, weight.T, out=rows))
    x = F.embedding(ids, embedding)
    y = _new_output(ids, embedding, weight)
    torch.mm(x.flatten(0, 1), weight.T, out=y.flatten(0, 1))
    return y


def _new_gradients(embedding, weight, needs_weight) -> tuple[Tensor, Tensor]:
    """Uninitialised gradients in the dtype of sums; that of the weight is empty if not needed."""
    acc = sum_dtype(embedding.dtype)
    dweight = embedding.new_empty(weight.shape if needs_weight else 0, dtype=acc)
    return embedding.new_empty(embedding.shape, dtype=acc), dweight


def _token_embedding_bwd(dy, ids, embedding, weight, needs_weight):
    V = len(embedding)
    dembedding, dweight = _new_gradients(embedding, weight, needs_weight)
    if weight is None:
        return sum_by_id(dy, ids, V), dweight
    if is_small(embedding, ids):
        d, x = cast(sum_by_id(dy, ids, V), dy.dtype), embedding
        add_product(dembedding, d, weight, start=True)
    else:
        d, x = dy.flatten(0, 1), F.embedding(ids.flatten(), embedding)
        dx = dy.new_empty(*ids.shape, embedding.shape[1])
        torch.mm(d, weight, out=dx.flatten(0, 1))
        dembedding = sum_by_id(dx, ids, V)
    if needs_weight:
        add_product(dweight, d.T, x, start=True) if len(d) else dweight.zero_()
    return dembedding, dweight


def _product_flops(ids, weight) -> int:
    """FLOPs of the linear layer of every token."""
    return 0 if weight is None else 2 * prod(ids) * prod(weight)


_forward = register(
    "token_embedding",
    "(Tensor ids, Tensor embedding, Tensor? weight) -> Tensor",
    _token_embedding_fwd,
    fake=_new_output,
    flops=lambda ids, embedding, weight, **_: _product_flops(ids, weight),
)
_backward = register(
    "token_embedding_bwd",
    "(Tensor dy, Tensor ids, Tensor embedding, Tensor? weight, bool needs_weight)"
    " -> (Tensor, Tensor)",
    _token_embedding_bwd,
    fake=lambda dy, ids, *arguments: _new_gradients(*arguments),
    flops=lambda dy, ids, embedding, weight, needs_weight, **_: (
        (1 + needs_weight) * _product_flops(ids, weight)
    ),
)


class _TokenEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, embedding, weight, dtype):
        ctx.dtypes = embedding.dtype, None if weight is None else weight.dtype
        embedding = narrow(embedding, dtype)
        weight = None if weight is None else narrow(weight, dtype)
        ctx.save_for_backward(ids, embedding, weight)
        return _forward(ids, embedding, weight)

    @staticmethod
    @first_order("token_embedding")
    def backward(ctx, dy):
        needs = ctx.needs_input_grad[1:3]
        gradients = _backward(dy.contiguous(), *ctx.saved_tensors, needs[1])
        return None, *as_needed(gradients, ctx.dtypes, needs), None


def token_embedding(ids: Tensor, embedding: Tensor, weight: Tensor | None = None) -> Tensor:
    """Rows of an embedding, or a linear layer of them.

    The result is in autocast's dtype under autocast, else in that of the embedding; gradients are
    summed in fp32 (fp64 for fp64). Ids are not checked to be in range, as that would wait for the
    device.

    Args:
        ids: (B, N) int64 in [0, V).
        embedding: (V, D).
        weight: (D_out, D), of the dtype of embedding, or None.

    Returns:
        (B, N, D_out), or (B, N, D) without a weight.

    Raises:
        ValueError: naming the argument whose shape, dtype or device is not as above.

    Source: torch.nn.functional.embedding, as simple-hierarchical-transformer uses it.
    """
    check_ids(ids, embedding)
    D, dtype, device = embedding.shape[1], embedding.dtype, embedding.device
    if weight is not None and (
        (weight.ndim, weight.shape[-1], weight.dtype, weight.device) != (2, D, dtype, device)
    ):
        raise ValueError(
            f"weight must be (D_out, {D}), {dtype} on {device},"
            f" got {tuple(weight.shape)}, {weight.dtype} on {weight.device}"
        )
    dtype = product_dtype(embedding)
    return apply(_TokenEmbedding, ids.contiguous(), embedding, weight, dtype)
