"""The checks that a model makes of ids and labels: methods of `model.Trunk`."""

import torch
from torch import Tensor

from shtx.internals import is_exporting
from shtx.losses import LEFT_OUT


@torch.library.custom_op("shtx::checked_ids", mutates_args=())
def checked_ids(ids: Tensor, num_tokens: int) -> Tensor:
    """ids as int64, every one below num_tokens. An op, so that the check outlives torch.compile."""
    ids = ids.to(torch.long, copy=True)
    if ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= num_tokens:
            raise ValueError(
                f"ids must be in [0, num_tokens) = [0, {num_tokens}),"
                f" got {low if low < 0 else high}"
            )
    return ids


@checked_ids.register_fake
def _(ids, num_tokens):
    return torch.empty_like(ids, dtype=torch.long)


@torch.library.custom_op("shtx::checked_labels", mutates_args=())
def checked_labels(labels: Tensor, num_tokens: int, ignore_index: int) -> Tensor:
    """labels as int64, every one that counts in [0, num_tokens). An op, as `checked_ids`."""
    labels = labels.to(torch.long, copy=True)
    wrong = ((labels < 0) | (labels >= num_tokens)) & (labels != ignore_index)
    if wrong.any():
        raise ValueError(
            f"labels must be in [0, num_tokens) = [0, {num_tokens}), {LEFT_OUT} or"
            f" ignore_index, {ignore_index}, got {int(labels[wrong][0])}"
        )
    return labels


@checked_labels.register_fake
def _(labels, num_tokens, ignore_index):
    return torch.empty_like(labels, dtype=torch.long)


def check_ids(model, ids: Tensor, return_loss: bool, checked: bool = False) -> Tensor:
    """ids as int64, or an error that says what is wrong with them.

    Args:
        checked: whether they are known to be in range.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a tensor of integers, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"ids must be a tensor of integers, got {ids.dtype}")
    if ids.ndim != 2:
        raise ValueError(f"ids must be (batch, tokens), got shape {tuple(ids.shape)}")
    if ids.device != model.device:
        raise ValueError(f"ids must be on the model's {model.device}, got {ids.device}")
    least, most = 1 + return_loss, model.seq_len + return_loss
    if not least <= ids.shape[1] <= most:
        asked = " with return_loss" if return_loss else ""
        raise ValueError(
            f"ids must have {least} to {most} tokens (seq_len {model.seq_len}{asked}),"
            f" got {ids.shape[1]}"
        )
    if not checked and (ids.device.type == "cpu" or model.checked):
        if not is_exporting():  # an exported graph runs where PyTorch's ops alone are known
            return checked_ids(ids, model.num_tokens)
    return ids.long()


def check_labels(model, labels: Tensor, ids: Tensor, checked: bool = False) -> Tensor:
    """labels as int64, those that are left out as ignore_index, or an error that says what is
    wrong with them.

    Args:
        ids: (B, N), of which the labels are.
        checked: whether labels are known to be in range.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor of integers, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be a tensor of integers, got {labels.dtype}")
    if labels.shape != ids.shape:
        raise ValueError(
            f"labels must have the shape of ids, {tuple(ids.shape)}, one for each, got"
            f" {tuple(labels.shape)}"
        )
    if labels.device != ids.device:
        raise ValueError(f"labels must be on the model's {ids.device}, got {labels.device}")
    labels = labels.long()
    labels = labels.masked_fill(labels == LEFT_OUT, model.ignore_index)
    if not checked and (ids.device.type == "cpu" or model.checked):
        if not is_exporting():
            return checked_labels(labels, model.num_tokens, model.ignore_index)
    return labels
