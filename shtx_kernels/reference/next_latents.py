"""Next latent prediction (NextLat): summaries of chunks, and the loss of rollouts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, arange, cat

from .widen import widen


def chunk_means(x: Tensor, compress: int, stride: int) -> Tensor:
    """Return, for each level token, the mean of the last C tokens of x, or of as many as there are.

    x (B, N, D) to (B, M, D)
    """
    if compress == 1:
        return x
    x = F.pad(x, (0, 0, compress - 1, 0)).unfold(1, compress, stride)
    ends = arange(x.shape[1], device=x.device) * stride
    return x.sum(dim=-1) / (ends + 1).clamp(max=compress)[:, None]


def chunk_summary(
    ids: Tensor,
    embedding: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    compress: int,
    stride: int,
) -> Tensor:
    """The mean embedding of every level token's chunk, (B, M, D), or a linear layer of it.

    ids (B, N), embedding (V, D), weight (D_out, D), bias (D_out,)
    """
    x = chunk_means(F.embedding(ids, embedding), compress, stride)
    return x if weight is None else F.linear(x, weight, bias)


def next_latent_loss(
    h: Tensor,
    summaries: Tensor,
    valid: Tensor,
    norm: tuple[Tensor, Tensor],
    layers: list[tuple[Tensor, Tensor]],
    steps: Tensor,
    *,
    distance: str = "mse_and_cosine_sim",
    decay: float | None = 1.0,
) -> tuple[Tensor, Tensor]:
    """`rollouts` whose next latent is z + mlp(layer_norm([z ; summary])): sums and counts (R,).

    h, summaries (B, M, D), valid (B, M); norm has gamma and beta (2 D,); layers has weight and bias
    of each layer of the MLP, which has GELUs in between; steps (R,) has a weight for each of R
    rollouts.
    """
    gamma, beta = norm

    def advance(summary: Tensor, z: Tensor) -> Tensor:
        x = cat((z, widen(summary)), dim=-1)
        x = F.layer_norm(x, x.shape[-1:], gamma.to(x), beta.to(x), eps=1e-5).to(h.dtype)
        for i, layer in enumerate(layers):
            x = F.linear(F.gelu(x) if i else x, *layer)
        return z + x

    return rollouts(h, summaries, valid, advance, DISTANCES[distance], steps, decay)


def _mse(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().mean(dim=-1)


def _mse_and_cosine(z: Tensor, y: Tensor) -> Tensor:
    return 0.1 * _mse(z, y) + 0.9 * (1 - F.cosine_similarity(z, y, dim=-1, eps=1e-8))


def _smooth_l1(z: Tensor, y: Tensor) -> Tensor:
    return F.smooth_l1_loss(z, y, reduction="none").mean(dim=-1)


DISTANCES = dict(mse_and_cosine_sim=_mse_and_cosine, mse=_mse, smooth_l1=_smooth_l1)


def rollouts(
    h: Tensor,
    summaries: Tensor,
    valid: Tensor,
    advance: Callable[[Tensor, Tensor], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
    steps: Tensor,
    decay: float | None,
) -> tuple[Tensor, Tensor]:
    """Sum up how far predicted latents are from those of h, 1 to R tokens ahead (NextLat).

    z_0 = h[t] and z_r = advance(summaries[t + r], z_(r - 1)), for the K tokens t of a sequence that
    have R tokens after them. Where valid[t + r], token t adds to the sum of step r
    steps[r] exp(-decay (its distances at the steps before)) distance(z_r, h[t + r]).
    Gradients reach h through z alone.

    Args:
        h, summaries: (B, M, D).
        valid: (B, M) bool.
        advance: makes the next latents of summaries and latents (B, K, D).
        distance: takes latents and what they predict (B, K, D), and returns (B, K).
        steps: (R,) weights.
        decay: how fast a token loses weight with its distances so far; None: not at all.

    Returns:
        sums and counts (R,), one of each for every step.
    """
    h, R = widen(h), len(steps)
    K = max(0, h.shape[1] - R)
    z, targets = h[:, :K], h.detach()
    past, sums, counts = 0, [], []
    for r in range(1, R + 1):
        ahead = slice(r, r + K)
        z = advance(summaries[:, ahead], z)
        rows = widen(distance(z, targets[:, ahead]))
        weighted = rows * steps[r - 1].to(rows)
        if decay is not None:
            weighted = weighted if r == 1 else weighted * (-decay * past).exp()
            past = past + rows.detach()
        sums.append(weighted.masked_fill(~valid[:, ahead], 0).sum())
        counts.append(valid[:, ahead].sum())
    return torch.stack(sums), torch.stack(counts)
