"""Residual add, token shift and norms."""

import torch
import torch.nn.functional as F
from torch import Tensor, cat

from .widen import widen


def token_shift(x: Tensor, dilation: int) -> Tensor:
    """x (B, M, D) with the second half of its channels from `dilation` tokens earlier, and zeros
    where there is no such token.
    """
    half = (x.shape[-1] + 1) // 2
    kept, shifted = x[..., :half], x[..., half:]
    return cat((kept, F.pad(shifted, (0, 0, dilation, 0))[:, : x.shape[1]]), dim=-1)


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) * sqrt(D) * gamma, for x (..., D): the clamp is on the norm."""
    return F.normalize(x, dim=-1, eps=1e-12) * x.shape[-1] ** 0.5 * gamma


def norm_token_shift(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    branch: Tensor | None = None,
    *,
    norm: str = "rms",
    dilation: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """r = x + branch in the dtype of x, and y = norm(token_shift(r)) in `dtype`, both (B, M, D)."""
    r = x if branch is None else (x + branch).to(x.dtype)
    s = widen(token_shift(r, dilation) if dilation else r)
    if norm == "layer":
        y = F.layer_norm(s, s.shape[-1:], gamma.to(s), beta.to(s), eps=1e-5)
    else:
        y = rms_norm(s, gamma)
    return r, y.to(dtype or x.dtype)
