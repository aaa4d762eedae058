"""The check of what rows are multiplied by."""

import torch
from torch import Tensor


def check_weight(name: str, weight: Tensor, rows: str, width: int, device: torch.device) -> None:
    """Raise a ValueError unless the weight is (rows, width), on the device."""
    if weight.ndim != 2 or weight.shape[1] != width or weight.device != device:
        raise ValueError(
            f"{name} must be ({rows}, {width}) on {device},"
            f" got {tuple(weight.shape)} on {weight.device}"
        )
