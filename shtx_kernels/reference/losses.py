"""Losses of tokens and of levels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .widen import widen


def _reduce(total: Tensor, count: Tensor, reduction: str) -> Tensor | tuple[Tensor, Tensor]:
    """The mean, 0 if nothing counts; for "sum", the total and the count."""
    return (total, count) if reduction == "sum" else total / count.clamp(min=1)


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int = 0, reduction: str = "mean"
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of logits (..., V) with targets (...), of which ignore_index does not count.

    Returns the mean; for reduction "sum", the sum and the number of targets that count.
    """
    total = F.cross_entropy(
        widen(logits).flatten(0, -2),
        targets.flatten(),
        ignore_index=ignore_index,
        reduction="sum",
    )
    return _reduce(total, (targets != ignore_index).sum(), reduction)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = 0,
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of x (B, N, D) @ weight^T (V, D) with targets (B, N)."""
    return cross_entropy(F.linear(x, weight), targets, ignore_index, reduction)


def windows(ids: Tensor, compress: int, stride: int) -> Tensor:
    """The C ids up to every level token, (B, M, C), for ids (B, N); 0 before the start."""
    return F.pad(ids, (compress - 1, 0)).unfold(-1, compress, stride)


def reconstruction_loss(
    x: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    compress: int,
    stride: int,
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of the C ids up to every level token: mean, or sum and count.

    x (B, M, D), weight (C V, D), ids (B, N): tap i of the level token at position p predicts
    ids[p - (C - 1) + i]. Id 0 stands before the start, and is ignored everywhere.
    """
    logits = F.linear(x, weight).unflatten(-1, (compress, -1))
    return cross_entropy(logits, windows(ids, compress, stride), 0, reduction)


def hierarchical_ar_loss(
    h: Tensor, weight: Tensor, bias: Tensor, reduction: str = "mean"
) -> Tensor | tuple[Tensor, Tensor]:
    """1 - cos(Linear(h[t]), h[t + 1]) for h (B, M, D), as in Mirasol3B: mean, or sum and count.

    It is 0 for a single token, which has no successor.
    """
    return cosine_distance(F.linear(h[:, :-1], weight, bias), h, reduction)


def cosine_distance(
    predicted: Tensor, h: Tensor, reduction: str = "mean"
) -> Tensor | tuple[Tensor, Tensor]:
    """1 - cos(predicted[t], h[t + 1]) for predicted (B, M - 1, D), h (B, M, D): mean, or sum and
    count.
    """
    predicted = F.normalize(widen(predicted), dim=-1)
    cosine = (predicted * F.normalize(widen(h[:, 1:]), dim=-1)).sum(dim=-1)
    count = torch.full((), cosine.numel(), device=h.device)
    return _reduce((1 - cosine).sum(), count, reduction)
