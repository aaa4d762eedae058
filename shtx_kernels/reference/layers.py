"""Linear layers, and what embeds, compresses and merges levels."""

import torch.nn.functional as F
from einops import repeat
from torch import Tensor, cat

from .norms import rms_norm
from .widen import widen


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T for x (B, M, D), weight (D_out, D)."""
    return F.linear(x, weight)


def feed_forward(x: Tensor, w_in: Tensor, w_out: Tensor, *, keep_slope: bool = False) -> Tensor:
    """gelu(x @ w_in^T) @ w_out^T for x (B, M, D), w_in (F, D), w_out (D_out, F).

    keep_slope: of no effect on results.
    """
    return F.linear(F.gelu(F.linear(x, w_in)), w_out)


def token_embedding(ids: Tensor, embedding: Tensor, weight: Tensor | None = None) -> Tensor:
    """embedding[ids] (B, N, D), or a linear layer of it (B, N, D_out).

    ids (B, N), embedding (V, D), weight (D_out, D)
    """
    x = F.embedding(ids, embedding)
    return x if weight is None else F.linear(x, weight)


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
    """Linear(silu(conv(embedding[ids]))), causal: ids (B, N) to (B, ceil(N / stride), D_out).

    embedding (V, D), w_conv (J, D, C), b_conv (J,), w_out (D_out, J, 1), b_out (D_out,); J is the
    number of channels of the convolution.
    """
    x = F.embedding(ids, embedding).mT
    x = F.conv1d(F.pad(x, (w_conv.shape[-1] - 1, 0)), w_conv, b_conv, stride=stride)
    return F.linear(F.silu(x).mT, w_out.squeeze(-1), b_out)


def hierarchical_cat(levels: list[Tensor], strides: list[int]) -> Tensor:
    """Levels (B, M, D_l) side by side at token rate: each is repeated `stride` times, and all are
    cut to the shortest.
    """
    levels = [repeat(t, "b m d -> b (m s) d", s=s) for t, s in zip(levels, strides, strict=True)]
    shortest = min(t.shape[1] for t in levels)
    return cat([t[:, :shortest] for t in levels], dim=-1)


def hierarchical_merge(
    levels: list[Tensor],
    strides: list[int],
    gamma: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    branches: list[Tensor | None] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The levels with their branches added, each in its own dtype, and
    Linear(silu(Linear(rms_norm(hierarchical_cat(levels))))) of these, at token rate.
    """
    pairs = zip(levels, branches or [None] * len(levels), strict=True)
    levels = [x if branch is None else (x + branch).to(x.dtype) for x, branch in pairs]
    x = hierarchical_cat(levels, strides)
    x = rms_norm(widen(x), gamma).to(x.dtype)
    return levels, F.linear(F.silu(F.linear(x, w_in, b_in)), w_out, b_out)
