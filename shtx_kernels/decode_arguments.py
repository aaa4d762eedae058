"""Arguments of the ops that generate a token: where one level's share of an op's work reads from
and writes to. A ring is (B, S, ...), whose slot m % S holds level token m.
"""

from typing import NamedTuple

from torch import Tensor


class Lookup(NamedTuple):
    """One level's arguments to `embed`."""

    table: Tensor  # (C, V, D)
    bias: Tensor | None  # (D,)
    activation: str | None  # "silu"
    out: Tensor  # ring (B, S, D)
    stride: int


class Norm(NamedTuple):
    """One level's arguments to `norm`."""

    x: Tensor  # ring (B, S, D)
    gamma: Tensor  # (D,)
    beta: Tensor  # (D,)
    out: Tensor  # ring (B, S, D)
    stride: int


class Projection(NamedTuple):
    """One level's arguments to `project`; O is the width of the result."""

    x: Tensor  # ring (B, S, D)
    weight: Tensor  # (O, D), or (O, taps D)
    out: Tensor  # ring (B, S, O)
    stride: int
    dilation: int = 0  # how far back the token shift reads; 0: there is none
    norm: str | None = None  # "rms", "layer"; its gamma and beta are in the weight and the bias
    bias: Tensor | None = None  # (O,)
    activation: str | None = None  # "gelu", "silu"
    residual: Tensor | None = None  # ring (B, S, O); may be `out`
    taps: int = 0  # how many positions of x are multiplied side by side; 0: one, without taps


class Attention(NamedTuple):
    """One level's arguments to `attend`."""

    qkv: Tensor  # (B, 1, 3 H E)
    kv: Tensor  # ring (B, S, 2, H, E), S a multiple of dilation
    out: Tensor  # (B, 1, H E)
    rotation: Tensor  # (S / dilation, 2, E / 2)
    stride: int
    dilation: int


class Part(NamedTuple):
    """One level's arguments to `merge`; J is the width of the merge's first product."""

    x: Tensor  # ring (B, S, D)
    kept: Tensor | None  # (B, J + 1), for a level with a stride
    stride: int
