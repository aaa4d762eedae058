"""The parts of a level: compressor, block (attention, feed-forward), merge.

A layer holds parameters under the names of simple-hierarchical-transformer. Its `forward` is
upstream's, module by module. `run` computes the same on (B, M, D) tensors of level tokens by the
ops of a plan, which read the weights of plain modules; whatever else is in a module's place is
called (see plan.py). `token_weights` yields, by name, what generating a token reads of a layer.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from local_attention import LocalAttention, LocalMHA
from local_attention.rotary import SinusoidalEmbeddings
from torch import Tensor, arange, nn
from torch.nn import Linear, Module

from shtx.internals import buffers_of, changes_of, constant_result
from shtx.levels import Level
from shtx.ops import (
    cross_entropy,
    halves,
    hierarchical_cat,
    neighbours,
    product_dtype,
    rms_norm,
    token_shift,
    windows,
)
from shtx.plan import OPTIONS, Layer, Plan, is_sharded


def exists(v):
    return v is not None


class RMSNorm(Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(wide), self.gamma).to(x.dtype)


def norm_args(norm: Module) -> dict:
    """Return the arguments of `norm_token_shift` that a norm holds."""
    if isinstance(norm, RMSNorm):
        return dict(gamma=norm.gamma)
    return dict(gamma=norm.weight, beta=norm.bias, norm="layer")


def whole(weight: Tensor) -> Tensor:
    """Return a weight without its gradient, gathered where FSDP2 has sharded it."""
    weight = weight.detach()
    return weight.full_tensor() if is_sharded(weight) else weight


def norm_weights(norm: Module) -> Iterator[tuple[str, Tensor]]:
    """Yield "gamma" of a norm, and "beta" of one that has it."""
    args = norm_args(norm)
    for name in ("gamma", "beta"):
        if name in args:
            yield name, whole(args[name])


def add(x: Tensor, branch: Tensor | None) -> Tensor:
    """Add to a residual stream, which keeps its dtype."""
    return x if branch is None else (x + branch).to(x.dtype)


def dense(x: Tensor) -> Tensor:
    """Return x with a contiguous last dimension, which ops ask for and modules do not promise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def end_norm(norm: Module, x: Tensor, branch: Tensor | None, plan: Plan) -> Tensor:
    """Normalize a level before its first layer, or after its last."""
    # the residual streams begin here, in the dtype of products: under autocast, every pass over
    # a stream moves half of the bytes that fp32 would
    dtype = product_dtype(x)
    if plan.reads(norm):
        return plan.ops.norm_token_shift(x, branch=branch, **norm_args(norm), dtype=dtype)[1]
    return norm(add(x, branch)).to(dtype)


class CausalConv(Module):
    def __init__(self, dim_in: int, dim_out: int, kernel_size: int, stride: int):
        super().__init__()
        self.conv = nn.Conv1d(dim_in, dim_out, kernel_size, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (self.conv.kernel_size[0] - 1, 0)))


class Compress(Layer):
    """Token ids to level embeddings: the embedding itself (1x), or a causal convolution over it."""

    cast_by_ops = ("to_recon", "compress_fn.1.conv")

    def __init__(self, level: Level, dim_embed: int, num_tokens: int, should_recon: bool):
        super().__init__()
        self.level = level
        dim_inner = dim_embed * 4

        if level.compress == 1:
            same = dim_embed == level.dim
            self.compress_fn = nn.Identity() if same else Linear(dim_embed, level.dim, bias=False)
        else:
            self.compress_fn = nn.Sequential(
                Rearrange("b n d -> b d n"),
                CausalConv(dim_embed, dim_inner, level.compress, level.stride),
                nn.SiLU(),
                nn.Conv1d(dim_inner, level.dim, 1),
                Rearrange("b d n -> b n d"),
            )
            if should_recon:
                self.to_recon = Linear(level.dim, level.compress * num_tokens, bias=False)
        self.remember()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) embeddings of tokens to (B, M, d) of the level."""
        return self.compress_fn(x)

    def is_read(self, plan: Plan) -> bool:
        """Return whether `run` may read what a compressor that is plain itself has below it."""
        return plan.reads_all(self.compress_fn)

    def run(self, ids: Tensor, embedding: Tensor, plan: Plan) -> Tensor:
        """(B, N) ids, (V, D) embedding to (B, M, d)."""
        if self.level.compress == 1:
            weight = getattr(self.compress_fn, "weight", None)
            return plan.ops.token_embedding(ids, embedding, weight)
        conv, out = self.compress_fn[1].conv, self.compress_fn[3]
        weights = conv.weight, conv.bias, out.weight, out.bias
        return plan.ops.causal_compress(ids, embedding, *weights, stride=self.level.stride)

    def token_weights(
        self, embedding: Tensor, norm: Module, as_table: bool
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what a token reads, the products of the embedding being made ahead.

        Without compression this is "table" (1, V, d), the normalized level token of every id. Else
        the convolution is "table" (C, V, 4 D), every tap's product for every id, or "rows" (4 D,
        C D), which multiply C embeddings side by side.

        Args:
            embedding: (V, D).
            norm: comes after the compressor.
            as_table: whether a convolution is a table.
        """
        if self.level.compress == 1:
            table, weight = whole(embedding), getattr(self.compress_fn, "weight", None)
            if exists(weight):
                table = F.linear(table, whole(weight))
            affine = (rows for _, rows in norm_weights(norm))
            yield "table", F.layer_norm(table, table.shape[-1:], *affine)[None]
            return
        conv, out = self.compress_fn[1].conv, self.compress_fn[3]
        yield "conv_bias", whole(conv.bias)
        weight = whole(conv.weight)
        if as_table:
            yield "table", torch.einsum("vd,odc->cvo", whole(embedding), weight)
        else:
            yield "rows", weight.mT.flatten(1)
        yield "out", whole(out.weight)[..., 0]
        yield "out_bias", whole(out.bias)
        yield from norm_weights(norm)

    def recon(self, h: Tensor, ids: Tensor, plan: Plan | None = None, reduction: str = "mean"):
        """Return the loss of telling ids (B, N) from the level (B, M, d) after its last layer."""
        plan, c, stride = plan or self.plan_alone(h), self.level.compress, self.level.stride
        if plan.reads(self.to_recon):
            options = dict(compress=c, stride=stride, reduction=reduction)
            return plan.ops.reconstruction_loss(h, self.to_recon.weight, ids, **options)
        logits = self.to_recon(h).unflatten(-1, (c, -1))
        return cross_entropy(logits, windows(ids, c, stride), reduction=reduction)


def rotate(t: Tensor, angles: Tensor, factors: Tensor) -> Tensor:
    """Rotate (B, H, N, E) by (N, E), as upstream's apply_rotary_pos_emb does."""
    a, b = t.chunk(2, dim=-1)
    return t * angles.cos() * factors + torch.cat((-b, a), dim=-1) * angles.sin() * factors


class RotaryEmbedding(Module):
    """Buffers of the checkpoint format. The op computes its own angles: .half() rounds these."""

    def __init__(self, dim: int):
        super().__init__()
        for name, values in rotary_buffers(dim).items():
            self.register_buffer(name, values)

    def reset_parameters(self):
        made = rotary_buffers(2 * len(self.inv_freq))
        self.inv_freq.copy_(made["inv_freq"])
        self.scale.copy_(made["scale"])

    def forward(self, seq_len: int) -> tuple[Tensor, Tensor]:
        """Return angles and xpos factors (seq_len, E), as upstream makes them."""
        t = arange(seq_len, device=self.inv_freq.device, dtype=self.inv_freq.dtype)
        power = (t - (seq_len // 2)) / 512
        angles, factors = t[:, None] * self.inv_freq, self.scale ** power[:, None]
        return torch.cat((angles, angles), dim=-1), torch.cat((factors, factors), dim=-1)


def rotary_buffers(dim: int, device: torch.device | None = None) -> dict[str, Tensor]:
    channel = arange(0, dim, 2, dtype=torch.float32, device=device)
    inv_freq, scale = 1.0 / (10000 ** (channel / dim)), (channel + 0.4 * dim) / (1.4 * dim)
    return dict(inv_freq=inv_freq, scale=scale)


class InterleavedRotary(Module):
    """Buffers of a checkpoint of 0.4.0, whose rotation pairs neighbouring channels."""

    def __init__(self, dim: int):
        super().__init__()
        made = rotary_buffers(dim)
        self.freqs = nn.Parameter(made["inv_freq"], requires_grad=False)
        self.register_buffer("scale", made["scale"], persistent=False)

    @torch.no_grad()
    def reset_parameters(self):
        made = rotary_buffers(2 * len(self.freqs))
        self.freqs.copy_(made["inv_freq"])
        self.scale.copy_(made["scale"])

    def rotate_queries_and_keys(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate (B, H, N, E), as the module does that upstream has in this place."""
        wide = torch.promote_types(q.dtype, torch.float32)  # half precision has no position 257
        t = arange(q.shape[-2], device=q.device, dtype=wide)[:, None]
        angles = torch.cat((t * self.freqs,) * 2, dim=-1)
        factors = torch.cat((self.scale.to(wide) ** ((t - len(t) // 2) / 512),) * 2, dim=-1)
        q, k = rotate(halves(q), angles, factors), rotate(halves(k), angles, 1 / factors)
        return neighbours(q).to(wide), neighbours(k).to(wide)


def rotates_as_made(rotary: Module, *names: str) -> bool:
    """Return whether the buffers that a rotary embedding reads have the values of the op."""
    for name in names:  # a generator's variables are cells, which torch.compile may find empty
        buffer = buffers_of(rotary).get(name)
        if buffer is None or not has_made_values(buffer, name):
            return False
    return True


@constant_result
def has_made_values(buffer: Tensor, name: str) -> bool:
    """Return whether a buffer is that of `rotary_buffers`, or that rounded to a narrower dtype.

    The values are read, and a device waited for, once after each change. PyTorch counts changes,
    all but those through `buffer.data`.
    """
    if type(buffer) not in (Tensor, nn.Parameter) or buffer.is_meta:  # stands for values
        return True
    try:
        stamp = buffer.data_ptr(), None if buffer.is_inference() else changes_of(buffer)
    except RuntimeError:  # within torch.func, a buffer that differs from model to model
        return False
    seen = getattr(buffer, "seen_values", None)
    if seen is None or seen[0] != stamp:
        values, made = buffer.detach().cpu().double(), rotary_buffers(2 * len(buffer), "cpu")[name]
        rounded = (made.to(dtype).double() for dtype in (made.dtype, torch.bfloat16, torch.float16))
        same = any(torch.allclose(values, r, rtol=1e-6, atol=0) for r in rounded)
        buffer.seen_values = seen = stamp, same
    return seen[1]


OPTIONS[LocalAttention] = lambda m: (
    (m.window_size, m.exact_windowsize, m.look_backward, m.look_forward, m.causal),
    (m.autopad, m.scale, m.shared_qk, m.use_xpos),
)
OPTIONS[InterleavedRotary] = lambda m: (
    exists(freqs := m._parameters.get("freqs")) and has_made_values(freqs, "inv_freq"),
    rotates_as_made(m, "scale"),
)
OPTIONS[RotaryEmbedding] = lambda m: rotates_as_made(m, "inv_freq", "scale")
OPTIONS[SinusoidalEmbeddings] = lambda m: (m.use_xpos, rotates_as_made(m, "inv_freq"))


def halves_of_qkv(qkv: Tensor, level: Level, heads: int) -> Tensor:
    """Return qkv (..., 3 H E) as ops of one token take it, which know one pairing alone."""
    if level.window is not None or not level.interleaved:
        return qkv
    q, k, v = qkv.unflatten(-1, (3, heads, level.dim_head)).unbind(-3)
    return torch.stack((halves(q), halves(k), v), dim=-3).flatten(-3)


def attention_weights(attn: Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what a token reads of either attention: "qkv" (3 H E, D), with gamma of the norm, its
    "bias" (3 H E,) where the norm has beta, "out" (D, H E).
    """
    norm = dict(norm_weights(attn.norm))
    qkv = halves_of_qkv(whole(attn.to_qkv.weight).mT, attn.level, attn.heads).mT
    yield "qkv", qkv * norm["gamma"]
    if "beta" in norm:
        yield "bias", qkv @ norm["beta"]
    yield "out", whole(attn.to_out.weight)


class Attention(Layer):
    """Full causal attention, rotary embedding with xpos."""

    def __init__(self, level: Level):
        super().__init__()
        dim_inner = level.dim_head * level.heads
        self.level, self.heads = level, level.heads
        self.norm = RMSNorm(level.dim)
        rotary = InterleavedRotary if level.interleaved else RotaryEmbedding
        self.rotary_emb = rotary(level.dim_head)
        self.to_qkv = Linear(level.dim, dim_inner * 3, bias=False)
        self.to_out = Linear(dim_inner, level.dim, bias=False)
        self.remember()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D), sequences of a level."""
        plan, y = self.plan_alone(x), self.norm(x)
        if plan.reads(self.rotary_emb):
            return self.run(y, plan)
        return self.to_out(self.attend(self.to_qkv(y)))

    def is_read(self, plan: Plan) -> bool:
        """Return whether `run` does what `forward` does, of a layer that is plain itself."""
        return plan.reads(self.rotary_emb)

    def run(self, y: Tensor, plan: Plan, dilation: int = 1) -> Tensor:
        """Attend within y (B, M, D), which is normalized."""
        qkv = plan.linear(self.to_qkv, y)
        options = dict(dilation=dilation, xpos=True, interleaved=self.level.interleaved)
        out = plan.ops.rotary_attention(qkv, self.heads, **options)
        plan.leave("qkv", qkv)
        return plan.linear(self.to_out, out)

    token_weights = attention_weights

    def attend(self, qkv: Tensor) -> Tensor:
        """Attend to what `rotary_emb` rotates, or by its angles, whatever it has become."""
        q, k, v = rearrange(qkv, "b n (qkv h e) -> qkv b h n e", qkv=3, h=self.heads)
        if self.level.interleaved:
            q, k = self.rotary_emb.rotate_queries_and_keys(q, k)
        else:
            angles, factors = self.rotary_emb(qkv.shape[1])
            q, k = rotate(q, angles, factors), rotate(k, angles, 1 / factors)
        q, k = q.to(v.dtype), k.to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return rearrange(out, "b h n e -> b n (h e)")


class WindowAttention(Layer, LocalMHA):
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
        self.remember()

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(B, N, D), sequences of a level; other arguments as local-attention's."""
        plan = self.plan_alone(x)
        if args or kwargs or not plan.reads_all(self.attn_fn):
            return LocalMHA.forward(self, x, *args, **kwargs)
        return self.run(self.norm(x), plan)

    def is_read(self, plan: Plan) -> bool:
        """Return whether `run` does what `forward` does, of a layer that is plain itself."""
        return plan.reads_all(self.attn_fn)

    def run(self, y: Tensor, plan: Plan, dilation: int = 1) -> Tensor:
        """Attend within y (B, M, D), which is normalized."""
        qkv, window = plan.linear(self.to_qkv, y), self.level.window
        out = plan.ops.rotary_attention(qkv, self.heads, window=window, dilation=dilation)
        plan.leave("qkv", qkv)
        return plan.linear(self.to_out, out)

    token_weights = attention_weights


class FeedForward(Layer):
    """Two products with GELU between them.

    Attributes:
        keeps_slope: what `feed_forward` calls keep_slope.
    """

    keeps_slope = False

    def __init__(self, level: Level):
        super().__init__()
        dim_inner = int(level.dim * level.ff_mult)
        self.net = nn.Sequential(
            RMSNorm(level.dim),
            Linear(level.dim, dim_inner, bias=False),
            nn.GELU(),
            Linear(dim_inner, level.dim, bias=False),
        )
        self.remember()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D)"""
        return self.net(x)

    @property
    def norm(self) -> Module:
        return self.net[0]

    def is_read(self, plan: Plan) -> bool:
        """Return whether `run` does what `forward` does, of a layer that is plain itself."""
        return plan.reads(self.net)

    def run(self, y: Tensor, plan: Plan, dilation: int = 1) -> Tensor:
        """Transform y (B, M, D), which is normalized. No tokens meet, whatever their dilation."""
        _, to_inner, gelu, to_out = self.net
        if plan.reads(to_inner, gelu, to_out):
            weights = to_inner.weight, to_out.weight
            return plan.ops.feed_forward(y, *weights, keep_slope=self.keeps_slope)
        return to_out(gelu(to_inner(y)))

    def token_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a token reads: "in" (J, D), with gamma of the norm, and "out" (D, J)."""
        norm, to_inner, _, to_out = self.net
        yield "in", whole(to_inner.weight) * whole(norm.gamma)
        yield "out", whole(to_out.weight)


def along_classes(x: Tensor, dilation: int, layer: Callable) -> Tensor:
    """Call a layer on (B, M, D) in upstream's axial layout, where tokens `dilation` apart form
    sequences of their own.
    """
    if dilation == 1:
        return dense(layer(x))
    M = x.shape[1]
    x = F.pad(x, (0, 0, 0, -M % dilation))
    y = layer(rearrange(x, "b (n a) d -> (b a) n d", a=dilation))
    return rearrange(y, "(b a) n d -> b (n a) d", a=dilation)[:, :M]


class HierarchicalBlock(Layer):
    """x = x + attn(norm(shift(x))); x = x + ff(norm(shift(x)))

    A sum is made by the norm that reads it: `run` is handed x with a branch to add, or None, and
    hands on its own last sum like that, as a call with a plan does.
    """

    takes_plan = True

    def __init__(self, level: Level):
        super().__init__()
        self.level = level
        self.attn = None
        if level.window != 0:
            self.attn = WindowAttention(level) if exists(level.window) else Attention(level)
        self.ff = FeedForward(level)
        self.remember()

    def forward(self, x: Tensor, branch: Tensor | None = None, plan: Plan | None = None):
        """(B, M, D)"""
        return self.run(x, branch, plan) if plan else add(*self.run(x, None, self.plan_alone(x)))

    def run(self, x: Tensor, branch: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
        for name, layer in (("attn", self.attn), ("ff", self.ff)):
            if exists(layer):
                x, branch = self.residual(name, layer, x, branch, plan)
        return x, branch

    def residual(self, name: str, layer: Module, x: Tensor, branch: Tensor | None, plan: Plan):
        """Return x with its branch added, and what the layer has to add to it."""
        dilation = self.level.dilation
        if not (plan.reads(layer) and layer.is_read(plan)):
            x = add(x, branch)
            return x, along_classes(x, dilation, lambda x: layer(token_shift(x, 1)))
        if plan.reads(layer.norm):
            # a norm writes what the product after it reads
            options = dict(dilation=dilation, dtype=product_dtype(x))
            norm = norm_args(layer.norm)
            x, y = plan.ops.norm_token_shift(x, branch=branch, **norm, **options)
        else:
            x = add(x, branch)
            y = dense(layer.norm(token_shift(x, dilation)))
        plan.leave(name, x)
        return x, layer.run(y, plan, dilation)


class HierarchicalMerge(Layer):
    """All levels, with their branches added, and what two linear layers make of them at token
    rate, for the residual stream(s) to add."""

    takes_plan = True
    cast_by_ops = ("net.1",)

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
        self.remember()

    def forward(
        self,
        tokens: list[Tensor],
        branches: list[Tensor | None] | None = None,
        plan: Plan | None = None,
    ):
        """(B, ceil(N / stride), D) of every level to (B, N, D_out); `run` with a plan."""
        if plan:
            return self.run(tokens, branches, plan)
        return self.net(hierarchical_cat(tokens, self.strides))

    def run(
        self, tokens: list[Tensor], branches: list[Tensor | None], plan: Plan
    ) -> tuple[list[Tensor], Tensor]:
        if not plan.reads_all(self.net):
            tokens = list(map(add, tokens, branches))
            return tokens, dense(self.net(hierarchical_cat(tokens, self.strides)))
        # Modules that were called may differ in dtype.
        if len({branch.dtype for branch in filter(exists, branches)}) > 1:
            tokens, branches = list(map(add, tokens, branches)), [None] * len(tokens)
        norm, w_in, _, w_out = self.net
        weights = w_in.weight, w_in.bias, w_out.weight, w_out.bias
        merge = plan.ops.hierarchical_merge
        return merge(tokens, self.strides, norm.gamma, *weights, branches)

    def token_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a token reads: "in" (J, D), with the weight of the norm, "out" (D, J), and the
        bias of either.
        """
        norm, w_in, _, w_out = self.net
        yield "in", whole(w_in.weight) * whole(norm.gamma)
        yield "out", whole(w_out.weight)
        yield "out_bias", whole(w_out.bias)
        yield "in_bias", whole(w_in.bias)
