"""Scoring a text as one stream: every prediction sees all that the model's windows reach."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from shtx.generation.decoder import Decoder
from shtx.model import Trunk
from shtx.train.store import Part

TOKENS = 1 << 10  # taken from each lane before the host waits for their bits


def reach(model: Trunk) -> int:
    """Return how many earlier tokens can have a part in a prediction, rounded up.

    A block looks its window and one token back for attention, which itself sees tokens shifted by
    one, and one more for the feed-forward; so far apart are tokens of a level as it compresses. A
    merge takes a level's token from up to a stride before.
    """
    levels = model.levels
    if full := [level.compress for level in levels if level.window is None]:
        raise ValueError(
            "stream takes a window for every hierarchy, got full attention for"
            f" {', '.join(map(str, full))}"
        )
    block = max((level.window + 2) * level.compress for level in levels)
    most = max(level.compress for level in levels)
    tokens = len(model.layers) * (block + max(level.stride for level in levels)) + most
    return -(-tokens // most) * most


@torch.no_grad()
def score_stream(
    model: Trunk,
    data: Part | np.ndarray,
    *,
    lanes: int = 16,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, float], None] = lambda done, bits: None,
) -> float:
    """Bits that a model with windows takes for `data`, each byte, or token, once, as one forward
    over all of it would.

    The decoder takes a token after the other, of `lanes` pieces of the data side by side. Every
    piece but the first begins `reach` tokens early, and these count for the piece before.

    Args:
        model: predicts every byte; every level has a window.
        data: at least 2 bytes, or tokens.
        lanes: pieces; fewer where they would be shorter than `reach`.
        dtype: of the decoder's weights and state; None: that of the model's weights.
        progress: is told how many bytes have been scored, and their bits.

    Returns:
        the bits, a sum in fp64; the first byte, which has nothing before it, counts log2(V).

    Raises:
        ValueError: naming what is not as above.
    """
    count, before = len(data), reach(model)
    if count < 2:
        raise ValueError(f"data must have at least 2 bytes, got {count}")
    if lanes < 1:
        raise ValueError(f"lanes must be at least 1, got {lanes}")
    lanes = max(1, min(lanes, count // (before + 1)))
    align = max(level.compress for level in model.levels)  # level tokens are where they were
    steps = -(-(count + (lanes - 1) * before) // lanes)
    steps = -(-steps // align) * align
    starts = np.arange(lanes) * (steps - before)
    bits, scored = math.log2(model.num_tokens), 1
    was_training = model.training
    model.eval()
    try:
        decoder = Decoder(model, lanes, model.seq_len, dtype)
        for first in range(0, steps, TOKENS):
            size = min(TOKENS, steps - first)
            rows = np.zeros((lanes, size + 1), np.int64)  # zeros come after the end of the data
            for row, start in zip(rows, starts, strict=True):
                piece = data[start + first : start + first + size + 1]
                row[: len(piece)] = piece
            ids = torch.from_numpy(rows).to(model.device)
            nats = []
            for i in range(size):
                if first + i == 0:
                    logits = decoder.prefill(model, ids[:, :1])
                else:
                    decoder.ids.copy_(ids[:, i])
                    logits = decoder.step()
                nats.append(F.cross_entropy(logits, ids[:, i + 1], reduction="none"))
            step = first + np.arange(size)[:, None]
            counts = (starts + step + 1 < count) & ((step >= before) | (starts == 0))
            bits += float(torch.stack(nats).double().cpu()[counts].sum()) / math.log(2)
            scored += int(counts.sum())
            progress(scored, bits)
    finally:
        model.train(was_training)
    return bits
