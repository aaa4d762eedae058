"""Cross entropy of a level's tokens with the input tokens up to them: see _cross_entropy.py.

The targets of a level token are a slice of the ids, so all targets are one strided view of the ids.
Reference: reference.reconstruction_loss
"""

import torch.nn.functional as F
from torch import Tensor

from ._cross_entropy import cross_entropy


def reconstruction_loss(
    x: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    compress: int,
    stride: int,
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of the C ids up to every level token; id 0, and taps before the start, do not
    count.

    Products are in autocast's dtype under autocast; their sums and the loss are fp32 (fp64 for
    fp64). Extra memory is that of linear_cross_entropy, with copies of one vocabulary at a time;
    for large vocabularies, dx in fp32 is added to it.

    Args:
        x: (B, M, D), a level; M = ceil(N / stride).
        weight: (C V, D), a vocabulary for each of the C taps.
        ids: (B, N) integers in [0, V); others make the loss NaN. Tap i of the level token at
            position p predicts ids[p - (C - 1) + i].
        compress: C.
        stride: input tokens per level token.
        reduction: "mean" over the targets that count, or "sum".

    Returns:
        The 0-dim mean, or the 0-dim sum and count, as linear_cross_entropy has them.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is not as above.

    Source: simple-hierarchical-transformer.
    """
    if compress < 1 or stride < 1:
        raise ValueError(f"compress and stride must be at least 1, got {compress} and {stride}")
    tokens = -(-ids.shape[-1] // stride)
    if ids.ndim != 2 or x.ndim != 3 or x.shape[:2] != (ids.shape[0], tokens):
        raise ValueError(
            f"x must be (B, ceil(N / {stride}), D) for ids (B, N),"
            f" got {tuple(x.shape)} for {tuple(ids.shape)}"
        )
    targets = F.pad(ids, (compress - 1, 0)).unfold(-1, compress, stride)
    return cross_entropy(x, weight, targets, 0, reduction)
