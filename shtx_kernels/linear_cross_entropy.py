"""Cross entropy of a linear layer's outputs, which are never all in memory: see _cross_entropy.py.

Reference: reference.linear_cross_entropy
"""

from torch import Tensor

from ._cross_entropy import cross_entropy


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = 0,
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of x @ weight^T with targets.

    Products are in autocast's dtype under autocast; their sums and the loss are fp32 (fp64 for
    fp64). Extra memory is taken by logits, 40 MiB or as much as the fp32 gradient of weight, up to
    160 MiB; by a copy of weight in the dtype of the products if that is another; by one more copy
    if V is not a multiple of 16; and by the fp32 gradient if weight is narrower.

    Args:
        x: (B, N, D).
        weight: (V, D).
        targets: (B, N) integers in [0, V), or ignore_index; others make the loss NaN.
        ignore_index: target that does not count.
        reduction: "mean" over the targets that count, or "sum".

    Returns:
        The 0-dim mean, 0 with zero gradients where no target counts; or the 0-dim sum and the
        number of targets that count.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is not as above.

    Source: Wijmans et al. 2024 (arXiv 2411.09009) and Hsu et al. 2024 (arXiv 2410.10989) for
    losses without logits.
    """
    if x.ndim != 3:
        raise ValueError(f"x must be (B, N, D), got {tuple(x.shape)}")
    if targets.shape != x.shape[:2]:
        raise ValueError(f"targets must be {tuple(x.shape[:2])}, got {tuple(targets.shape)}")
    return cross_entropy(x, weight, targets[..., None], ignore_index, reduction)
