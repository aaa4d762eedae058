"""Scoring data in windows: what a model takes for it, with so much context."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from shtx.model import Trunk
from shtx.train.store import Part


class Score(NamedTuple):
    """Holds what a model takes for some data.

    Attributes:
        bits: of all bytes, or tokens, together.
        by_position: (context,), the mean of the bits that they took with 1, 2, ... before them
            within their windows, which overlap.
    """

    bits: float
    by_position: np.ndarray


def window_starts(count: int, context: int, stride: int) -> list[int]:
    """Return where windows of `context` + 1 begin within `count` bytes; the last ends with them."""
    last = max(0, count - 1 - context)
    return [*range(0, last, stride), last]


@torch.no_grad()
def score(
    model: Trunk,
    data: Part | np.ndarray,
    context: int,
    stride: int,
    *,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, float], None] = lambda done, bits: None,
) -> Score:
    """Bits that a model takes for `data`, each byte, or token, once.

    Args:
        model: predicts every byte; it is in eval mode while this runs.
        data: at least 2 bytes, or tokens.
        context: bytes that a prediction may see; 1 to the model's seq_len.
        stride: by how many bytes windows go on; 1 to context.
        batch_size: windows at a time.
        dtype: of autocast; None: without.
        progress: is told how many bytes have been scored, and their bits.

    Returns:
        the score, whose sums are in fp64.

    Raises:
        ValueError: naming the argument that is not as above.
    """
    if len(data) < 2:
        raise ValueError(f"data must have at least 2 bytes, got {len(data)}")
    for name, value, most in (("context", context, model.seq_len), ("stride", stride, context)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {value}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    starts = window_starts(len(data), context, stride)
    context = min(context, len(data) - 1)
    new = [context, *(b - a for a, b in pairwise(starts))]  # bytes that no window before has scored
    bits, by_position = math.log2(model.num_tokens), torch.zeros(context, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for i in range(0, len(starts), batch_size):
            windows = np.stack([data[s : s + context + 1] for s in starts[i : i + batch_size]])
            ids = torch.from_numpy(windows).to(model.device).long()
            with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
                logits = model(ids[:, :-1])
            nats = F.cross_entropy(logits.mT.float(), ids[:, 1:], reduction="none").double().cpu()
            by_position += nats.sum(0) / math.log(2)
            for row, count in zip(nats, new[i : i + batch_size], strict=True):
                bits += float(row[context - count :].sum()) / math.log(2)
            progress(1 + sum(new[: i + len(ids)]), bits)
    finally:
        model.train(was_training)
    return Score(bits, (by_position / len(starts)).numpy())
