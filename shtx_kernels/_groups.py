"""What the ops of one token are handed: for each level, where its share of a stage reads from and
writes to. A ring is (B, S, ...), whose slot m % S has the row of level token m.
"""

from typing import NamedTuple

from torch import Tensor


class Lookup(NamedTuple):
    """Of `embed`."""

    table: Tensor  # (C, V, D)
    bias: Tensor | None  # (D,)
    activation: str | None  # "silu"
    out: Tensor  # ring (B, S, D)
    stride: int


class Norm(NamedTuple):
    """Of `norm`."""

    x: Tensor  # ring (B, S, D)
    gamma: Tensor  # (D,)
    beta: Tensor  # (D,)
    out: Tensor  # ring (B, S, D)
    stride: int


class Projection(NamedTuple):
    """Of `project`."""

    x: Tensor  # ring (B, S, D)
    weight: Tensor  # (O, D), or (O, taps D)
    out: Tensor  # ring (B, S, O)
    stride: int
    dilation: int = 0  # of the token shift; 0: none
    norm: str | None = None  # "rms", "layer"
    gamma: Tensor | None = None  # (D,)
    beta: Tensor | None = None  # (D,)
    bias: Tensor | None = None  # (O,)
    activation: str | None = None  # "gelu", "silu"
    residual: Tensor | None = None  # ring (B, S, O); may be `out`
    taps: int = 0


class Attention(NamedTuple):
    """Of `attend`."""

    qkv: Tensor  # (B, 1, 3 H E)
    kv: Tensor  # ring (B, S, 2, H, E), S a multiple of dilation
    out: Tensor  # (B, 1, H E)
    rotation: Tensor  # (S / dilation, 2, E / 2)
    stride: int
    dilation: int


class Part(NamedTuple):
    """Of `merge`."""

    x: Tensor  # ring (B, S, D)
    kept: Tensor | None  # (B, J + 1), of a level with a stride
    stride: int
