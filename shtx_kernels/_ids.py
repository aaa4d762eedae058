"""The checks of ids and of the embedding that they are read from."""

import torch
from torch import Tensor


def check_ids(ids: Tensor, embedding: Tensor) -> None:
    """Raise a ValueError unless ids are (B, N) int64 and embedding is (V, D) on their device."""
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be (B, N) int64, got {tuple(ids.shape)}, {ids.dtype}")
    if embedding.ndim != 2 or not embedding.numel() or embedding.device != ids.device:
        raise ValueError(
            f"embedding must be (V, D), not empty, on {ids.device},"
            f" got {tuple(embedding.shape)} on {embedding.device}"
        )
