"""The parts of a level: compressor, block (attention, feed-forward), merge.

A layer holds parameters under the names of simple-hierarchical-transformer 0.2.0; what it computes
is written in the ops that `forward` is handed, on (B, M, D) tensors of level tokens.
"""

from types import SimpleNamespace

import torch
from local_attention import LocalMHA
from torch import Tensor, arange, nn
from torch.nn import Linear, Module

from shtx.levels import Level
from shtx.ops import product_dtype


def exists(v):
    return v is not None


class RMSNorm(Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor, ops: SimpleNamespace, branch: Tensor | None = None) -> Tensor:
        # the residual streams begin here, in the dtype of products: under autocast, every pass over
        # a stream moves half of the bytes that fp32 would
        weights = self.weight, self.bias, branch
        return ops.norm_token_shift(x, *weights, norm="layer", dtype=product_dtype(x))[1]


class CausalConv(Module):
    def __init__(self, dim_in: int, dim_out: int, kernel_size: int, stride: int):
        super().__init__()
        self.conv = nn.Conv1d(dim_in, dim_out, kernel_size, stride=stride)


class Compress(Module):
    """Token ids to level embeddings: the embedding itself (1x), or a causal convolution over it."""

    def __init__(self, level: Level, dim_embed: int, num_tokens: int, should_recon: bool):
        super().__init__()
        self.level = level
        dim_inner = dim_embed * 4

        if level.compress == 1:
            same = dim_embed == level.dim
            self.compress_fn = nn.Identity() if same else Linear(dim_embed, level.dim, bias=False)
            return

        self.compress_fn = nn.Sequential(
            nn.Identity(),
            CausalConv(dim_embed, dim_inner, level.compress, level.stride),
            nn.SiLU(),
            nn.Conv1d(dim_inner, level.dim, 1),
        )
        if should_recon:
            self.to_recon = Linear(level.dim, level.compress * num_tokens, bias=False)

    def forward(self, ids: Tensor, embedding: Tensor, ops: SimpleNamespace) -> Tensor:
        if self.level.compress == 1:
            return ops.token_embedding(ids, embedding, getattr(self.compress_fn, "weight", None))
        conv, out = self.compress_fn[1].conv, self.compress_fn[3]
        return ops.causal_compress(
            ids, embedding, conv.weight, conv.bias, out.weight, out.bias, stride=self.level.stride
        )


class RotaryEmbedding(Module):
    """Buffers of the checkpoint format. The op computes its own angles: .half() rounds these."""

    def __init__(self, dim: int):
        super().__init__()
        channel = arange(0, dim, 2).float()
        self.register_buffer("inv_freq", 1.0 / (10000 ** (channel / dim)))
        self.register_buffer("scale", (channel + 0.4 * dim) / (1.4 * dim))


class Attention(Module):
    """Full causal attention, rotary embedding with xpos."""

    def __init__(self, level: Level):
        super().__init__()
        dim_inner = level.dim_head * level.heads
        self.level = level
        self.norm = RMSNorm(level.dim)
        self.rotary_emb = RotaryEmbedding(level.dim_head)
        self.to_qkv = Linear(level.dim, dim_inner * 3, bias=False)
        self.to_out = Linear(dim_inner, level.dim, bias=False)

    @property
    def norm_args(self) -> dict:
        return dict(gamma=self.norm.gamma)

    def forward(self, x: Tensor, ops: SimpleNamespace) -> Tensor:
        level = self.level
        qkv = ops.linear(x, self.to_qkv.weight)
        out = ops.rotary_attention(qkv, level.heads, dilation=level.dilation, xpos=True)
        return ops.linear(out, self.to_out.weight)


class WindowAttention(LocalMHA):
    """Attention to the `window` tokens before, plain rotary: local-attention's parameters."""

    def __init__(self, level: Level):
        super().__init__(
            dim=level.dim,
            window_size=level.window,
            dim_head=level.dim_head,
            heads=level.heads,
            causal=True,
            prenorm=True,
        )
        self.level = level

    @property
    def norm_args(self) -> dict:
        return dict(gamma=self.norm.weight, beta=self.norm.bias, norm="layer")

    def forward(self, x: Tensor, ops: SimpleNamespace) -> Tensor:
        level = self.level
        qkv = ops.linear(x, self.to_qkv.weight)
        out = ops.rotary_attention(qkv, level.heads, window=level.window, dilation=level.dilation)
        return ops.linear(out, self.to_out.weight)


class FeedForward(Module):
    def __init__(self, level: Level):
        super().__init__()
        dim_inner = int(level.dim * level.ff_mult)
        self.net = nn.Sequential(
            RMSNorm(level.dim),
            Linear(level.dim, dim_inner, bias=False),
            nn.GELU(),
            Linear(dim_inner, level.dim, bias=False),
        )

    @property
    def norm_args(self) -> dict:
        return dict(gamma=self.net[0].gamma)

    def forward(self, x: Tensor, ops: SimpleNamespace) -> Tensor:
        return ops.feed_forward(x, self.net[1].weight, self.net[3].weight)


class HierarchicalBlock(Module):
    """x = x + attn(norm(shift(x))); x = x + ff(norm(shift(x)))

    A sum is made by the norm that reads it: a block is handed x with a branch to add, or None, and
    hands on its own last sum like that.
    """

    def __init__(self, level: Level):
        super().__init__()
        self.level = level
        self.attn = None
        if level.window != 0:
            self.attn = WindowAttention(level) if exists(level.window) else Attention(level)
        self.ff = FeedForward(level)

    def forward(
        self, x: Tensor, branch: Tensor | None, ops: SimpleNamespace
    ) -> tuple[Tensor, Tensor]:
        # a norm writes what the product after it reads
        shift = dict(dilation=self.level.dilation, dtype=product_dtype(x))
        if exists(self.attn):
            x, y = ops.norm_token_shift(x, branch=branch, **self.attn.norm_args, **shift)
            branch = self.attn(y, ops)
        x, y = ops.norm_token_shift(x, branch=branch, **self.ff.norm_args, **shift)
        return x, self.ff(y, ops)


class HierarchicalMerge(Module):
    """All levels, with their branches added, and what two linear layers make of them at token
    rate, for the residual stream(s) to add."""

    def __init__(self, levels: tuple[Level, ...], dim_out: int):
        super().__init__()
        dim = sum(level.dim for level in levels)
        self.strides = [level.stride for level in levels]
        self.net = nn.Sequential(
            RMSNorm(dim),
            Linear(dim, dim_out * 2),
            nn.SiLU(),
            Linear(dim_out * 2, dim_out),
        )

    def forward(
        self, tokens: list[Tensor], branches: list[Tensor | None], ops: SimpleNamespace
    ) -> tuple[list[Tensor], Tensor]:
        norm, w_in, _, w_out = self.net
        weights = w_in.weight, w_in.bias, w_out.weight, w_out.bias
        return ops.hierarchical_merge(tokens, self.strides, norm.gamma, *weights, branches)
