"""Every op in plain PyTorch, same names and signatures: the specification, and the path that runs
anywhere. The ops of generating a token are in `decode`.

Sizes: B batch, N tokens, M tokens of a level, D width, H heads, E head width, C compression, V
vocabulary. Half precision is accumulated in fp32, fp64 in fp64. Semantics are those of
simple-hierarchical-transformer 0.2.0, and of 0.4.0 where that one alone has something.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, arange, cat
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.graph import get_gradient_edge

__all__ = [
    "causal_compress",
    "chunk_summary",
    "feed_forward",
    "hierarchical_ar_loss",
    "hierarchical_cat",
    "hierarchical_merge",
    "linear",
    "linear_cross_entropy",
    "next_latent_loss",
    "norm_token_shift",
    "reconstruction_loss",
    "rotary_attention",
    "token_embedding",
]


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# residual add, token shift, norm


def token_shift(x: Tensor, dilation: int) -> Tensor:
    """The second half of the channels (B, M, D) from `dilation` tokens earlier, at first zero."""
    half = (x.shape[-1] + 1) // 2
    kept, shifted = x[..., :half], x[..., half:]
    return cat((kept, F.pad(shifted, (0, 0, dilation, 0))[:, : x.shape[1]]), dim=-1)


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) * sqrt(D) * gamma: the clamp is on the norm."""
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
    """(B, M, D) each: r = x + branch in the dtype of x, y = norm(token_shift(r)) in `dtype`."""
    r = x if branch is None else (x + branch).to(x.dtype)
    s = _widen(token_shift(r, dilation) if dilation else r)
    if norm == "layer":
        y = F.layer_norm(s, s.shape[-1:], gamma.to(s), beta.to(s), eps=1e-5)
    else:
        y = rms_norm(s, gamma)
    return r, y.to(dtype or x.dtype)


# attention

MOST_FP32 = 65536  # tokens, of which the factors of xpos are within the range of fp32
SPAN = 2048  # queries at a time, of more tokens than that


def _rotation(
    n: int, E: int, xpos: bool, like: Tensor, anchor: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin and xpos factor (n, E / 2); fp32 angles would be 4e-3 off at 65,536 tokens.

    Factors are 1 at the anchor, by default in the middle.
    """
    wide = torch.float32 if like.device.type == "mps" else torch.float64  # mps has no fp64
    t = arange(n, device=like.device, dtype=wide)[:, None]
    channel = arange(0, E, 2, device=like.device, dtype=wide)
    angle = t * 10000 ** (-channel / E)
    z = (channel + 0.4 * E) / (1.4 * E) if xpos else torch.ones_like(channel)
    decay = z ** (
        (t - (n // 2 if anchor is None else anchor)) / 512
    )  # of q; its inverse is k's, so only the distance counts
    return angle.cos().to(like), angle.sin().to(like), decay.to(like)


def _rotate(t: Tensor, cos: Tensor, sin: Tensor, decay: Tensor) -> Tensor:
    x, y = t.chunk(2, dim=-1)
    return cat(((x * cos - y * sin) * decay, (y * cos + x * sin) * decay), dim=-1)


def halves(t: Tensor) -> Tensor:
    """Channels (..., E) of which neighbours are pairs, as rotary has them: the first of all pairs,
    then the second.
    """
    return t.unflatten(-1, (-1, 2)).mT.flatten(-2)


def neighbours(t: Tensor) -> Tensor:
    """What `halves` has taken apart, (..., E)."""
    return t.unflatten(-1, (2, -1)).mT.flatten(-2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float):
    """Attention as it is written; causal without a mask."""
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = (_widen(q) @ _widen(k).mT * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=-1) @ _widen(v)).to(v.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    causal = mask is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


class _Attention(torch.autograd.Function):
    """PyTorch's attention, whose gradient has none, unless a graph of the gradient is asked for:
    then it is made of `_softmax_attention`.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.edges = scale, None
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return _sdpa(q, k, v, mask, scale)  # checkpoints hold no tensor of a graph in a graph
        with torch.enable_grad():  # views, as q and v may come of each other, but these do not
            qkv = [t.view_as(t) for t in (q, k, v)]
            out = _sdpa(*qkv, mask, scale)
        ctx.edges = [get_gradient_edge(t) for t in (out, *qkv)]
        return out.detach()

    @staticmethod
    def backward(ctx, dout):
        *qkv, mask = ctx.saved_tensors
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        if torch.is_grad_enabled():
            qkv = [t.view_as(t) for t in qkv]
            with torch.autocast(dout.device.type, enabled=False):
                out = _softmax_attention(*qkv, mask, ctx.scale)
            gradients = torch.autograd.grad(out, qkv, dout, create_graph=True)
        elif ctx.edges is None:
            qkv = [t.detach().requires_grad_() for t in qkv]
            with torch.enable_grad():
                out = _sdpa(*qkv, mask, ctx.scale)
            gradients = torch.autograd.grad(out, qkv, dout)
        else:
            out, *qkv = ctx.edges
            gradients = torch.autograd.grad(out, qkv, dout, retain_graph=again)
        return *gradients, None, None


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Causal without a mask."""
    if torch._C._are_functorch_transforms_active() or unpack_dual(q).tangent is not None:
        return _softmax_attention(q, k, v, mask, scale)
    if torch.is_grad_enabled() and q.requires_grad and not torch.compiler.is_compiling():
        return _Attention.apply(q, k, v, mask, scale)
    return _sdpa(q, k, v, mask, scale)


def _by_spans(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention with xpos, whose factors are anchored at the first query of each span: those
    of keys too far away to be seen become 0, and none leaves the range of fp32.
    """
    outs = []
    for first in range(0, q.shape[-2], SPAN):
        end = min(first + SPAN, q.shape[-2])
        cos, sin, decay = _rotation(end, q.shape[-1], True, _widen(q), anchor=first)
        queries = _rotate(q[..., first:end, :], cos[first:], sin[first:], decay[first:])
        keys = _rotate(k[..., :end, :], cos, sin, 1 / decay)
        t = arange(end, device=q.device)
        mask = t <= t[first:, None]
        outs.append(_attention(queries.to(q), keys.to(k), v[..., :end, :], mask, scale))
    return cat(outs, dim=-2)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Every query sees itself and the `window` keys before it: those of two buckets."""
    _, h, n, _ = q.shape
    pad = (0, 0, 0, -n % window)
    q, k, v = (rearrange(F.pad(t, pad), "b h (g w) e -> (b h) g w e", w=window) for t in (q, k, v))
    k, v = (cat((F.pad(t, (0, 0, 0, 0, 1, 0))[:, :-1], t), dim=2) for t in (k, v))
    bucket = arange(q.shape[1], device=q.device)[:, None, None]
    i = arange(window, device=q.device)[:, None] + window
    j = arange(2 * window, device=q.device)
    mask = (j <= i) & (j >= i - window) & ((bucket > 0) | (j >= window))
    out = _attention(q, k, v, mask[None], scale)
    return rearrange(out, "(b h) g w e -> b h (g w) e", h=h)[:, :, :n]


def rotary_attention(
    qkv: Tensor,
    heads: int,
    *,
    window: int | None = None,
    dilation: int = 1,
    xpos: bool = False,
    interleaved: bool = False,
    scale: float | None = None,
) -> Tensor:
    """(B, M, 3 H E) to (B, M, H E): causal attention within each residue class mod `dilation`.

    Rotary pairs channels c and c + E / 2, or if interleaved 2 c and 2 c + 1.
    """
    M = qkv.shape[1]
    dilation = min(dilation, max(1, M))
    q, k, v = rearrange(
        F.pad(qkv, (0, 0, 0, -M % dilation)),
        "b (n a) (qkv h e) -> qkv (b a) h n e",
        qkv=3,
        a=dilation,
        h=heads,
    )
    if interleaved:
        q, k = halves(q), halves(k)
    n, E = q.shape[-2:]
    scale = E**-0.5 if scale is None else scale
    dtype = qkv.dtype
    full, far = window is None or window >= n - 1, xpos and n > MOST_FP32
    if far and not full:
        dtype = torch.float64
    elif xpos and dtype == torch.float16:  # its range ends at 8 thousand tokens
        dtype = torch.float32
    with torch.autocast("cpu" if qkv.is_meta else qkv.device.type, enabled=False):
        if full and far:
            out = _by_spans(q.to(dtype), k.to(dtype), v.to(dtype), scale)
        else:
            cos, sin, decay = _rotation(n, E, xpos, _widen(q.to(dtype)))
            q, k = _rotate(q, cos, sin, decay).to(dtype), _rotate(k, cos, sin, 1 / decay).to(dtype)
            attend = _attention if full else _windowed
            out = attend(q, k, v.to(dtype), None if full else window, scale)
    return rearrange(out, "(b a) h n e -> b (n a) (h e)", a=dilation)[:, :M].to(qkv.dtype)


# products


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T for x (B, M, D), weight (D_out, D)."""
    return F.linear(x, weight)


def feed_forward(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """gelu(x @ w_in^T) @ w_out^T for x (B, M, D), w_in (F, D), w_out (D, F)."""
    return F.linear(F.gelu(F.linear(x, w_in)), w_out)


def causal_compress(
    ids: Tensor,
    embedding: Tensor,
    w_conv: Tensor,
    b_conv: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    *,
    stride: int,
) -> Tensor:
    """Linear(silu(conv(embedding[ids]))), causal: ids (B, N) to (B, ceil(N / stride), d).

    embedding (V, D), w_conv (4D, D, C), b_conv (4D,), w_out (d, 4D, 1), b_out (d,)
    """
    x = F.embedding(ids, embedding).mT
    x = F.conv1d(F.pad(x, (w_conv.shape[-1] - 1, 0)), w_conv, b_conv, stride=stride)
    return F.linear(F.silu(x).mT, w_out.squeeze(-1), b_out)


def hierarchical_cat(levels: list[Tensor], strides: list[int]) -> Tensor:
    """Levels (B, M, D) side by side at token rate: repeated `stride` times, cut to the shortest."""
    levels = [repeat(t, "b m d -> b (m s) d", s=s) for t, s in zip(levels, strides, strict=True)]
    shortest = min(t.shape[1] for t in levels)
    return cat([t[:, :shortest] for t in levels], dim=-1)


def hierarchical_merge(
    levels: list[Tensor],
    strides: list[int],
    gamma: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    branches: list[Tensor | None] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The levels with their branches added, in the dtype of the level, and at token rate
    Linear(silu(Linear(rms_norm(hierarchical_cat(levels))))).
    """
    pairs = zip(levels, branches or [None] * len(levels), strict=True)
    levels = [x if branch is None else (x + branch).to(x.dtype) for x, branch in pairs]
    x = hierarchical_cat(levels, strides)
    x = rms_norm(_widen(x), gamma).to(x.dtype)
    return levels, F.linear(F.silu(F.linear(x, w_in, b_in)), w_out, b_out)


def token_embedding(ids: Tensor, embedding: Tensor, weight: Tensor | None = None) -> Tensor:
    """(B, N, D), or a linear layer of it: ids (B, N), embedding (V, D), weight (D_out, D)."""
    x = F.embedding(ids, embedding)
    return x if weight is None else F.linear(x, weight)


# losses


def _reduce(total: Tensor, count: Tensor, reduction: str) -> Tensor | tuple[Tensor, Tensor]:
    """The mean, 0 where nothing counts, or both."""
    return (total, count) if reduction == "sum" else total / count.clamp(min=1)


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int = 0, reduction: str = "mean"
) -> Tensor | tuple[Tensor, Tensor]:
    """Of logits (..., V) with as many targets: mean, or sum and count of those that count."""
    total = F.cross_entropy(
        _widen(logits).flatten(0, -2),
        targets.flatten(),
        ignore_index=ignore_index,
        reduction="sum",
    )
    return _reduce(total, (targets != ignore_index).sum(), reduction)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = 0,
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of x (B, N, D) @ weight^T (V, D) with targets (B, N)."""
    return cross_entropy(F.linear(x, weight), targets, ignore_index, reduction)


def windows(ids: Tensor, compress: int, stride: int) -> Tensor:
    """(B, M, C) ids behind every level token of (B, N), 0 left of the start."""
    return F.pad(ids, (compress - 1, 0)).unfold(-1, compress, stride)


def reconstruction_loss(
    x: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    compress: int,
    stride: int,
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of the C ids behind every level token: mean, or sum and count.

    x (B, M, D), weight (C V, D), ids (B, N): tap i of the level token at position p predicts
    ids[p - (C - 1) + i]. Index 0 stands left of the start and is ignored everywhere.
    """
    logits = F.linear(x, weight).unflatten(-1, (compress, -1))
    return cross_entropy(logits, windows(ids, compress, stride), 0, reduction)


def hierarchical_ar_loss(
    h: Tensor, weight: Tensor, bias: Tensor, reduction: str = "mean"
) -> Tensor | tuple[Tensor, Tensor]:
    """1 - cos(Linear(h[t]), h[t + 1]) for h (B, M, D), Mirasol3B: mean, or sum and count.

    A single token has no successor: 0.
    """
    return cosine_distance(F.linear(h[:, :-1], weight, bias), h, reduction)


def cosine_distance(
    predicted: Tensor, h: Tensor, reduction: str = "mean"
) -> Tensor | tuple[Tensor, Tensor]:
    """1 - cos(predicted[t], h[t + 1]) for predicted (B, M - 1, D), h (B, M, D): mean, or sum and
    count.
    """
    predicted = F.normalize(_widen(predicted), dim=-1)
    cosine = (predicted * F.normalize(_widen(h[:, 1:]), dim=-1)).sum(dim=-1)
    count = torch.full((), cosine.numel(), device=h.device)
    return _reduce((1 - cosine).sum(), count, reduction)


# next latents


def chunk_means(x: Tensor, compress: int, stride: int) -> Tensor:
    """(B, M, D) of x (B, N, D): the mean of up to C tokens, ending where the level token does."""
    if compress == 1:
        return x
    x = F.pad(x, (0, 0, compress - 1, 0)).unfold(1, compress, stride)
    ends = arange(x.shape[1], device=x.device) * stride
    return x.sum(dim=-1) / (ends + 1).clamp(max=compress)[:, None]


def chunk_summary(
    ids: Tensor,
    embedding: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    compress: int,
    stride: int,
) -> Tensor:
    """The mean embedding of every level token's chunk, or a linear layer of it: (B, M, d).

    ids (B, N), embedding (V, D), weight (d, D), bias (d,)
    """
    x = chunk_means(F.embedding(ids, embedding), compress, stride)
    return x if weight is None else F.linear(x, weight, bias)


def next_latent_loss(
    h: Tensor,
    summaries: Tensor,
    valid: Tensor,
    norm: tuple[Tensor, Tensor],
    layers: list[tuple[Tensor, Tensor]],
    steps: Tensor,
    *,
    distance: str = "mse_and_cosine_sim",
    decay: float | None = 1.0,
) -> tuple[Tensor, Tensor]:
    """`rollouts` of z + mlp(layer_norm([z ; summary])): sums and counts (R,).

    h, summaries (B, M, d), valid (B, M); gamma and beta (2 d,) of the norm; weight and bias of each
    layer of the MLP, which has GELUs in between.
    """
    gamma, beta = norm

    def advance(summary: Tensor, z: Tensor) -> Tensor:
        x = cat((z, _widen(summary)), dim=-1)
        x = F.layer_norm(x, x.shape[-1:], gamma.to(x), beta.to(x), eps=1e-5).to(h.dtype)
        for i, layer in enumerate(layers):
            x = F.linear(F.gelu(x) if i else x, *layer)
        return z + x

    return rollouts(h, summaries, valid, advance, DISTANCES[distance], steps, decay)


def _mse(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().mean(dim=-1)


def _mse_and_cosine(z: Tensor, y: Tensor) -> Tensor:
    return 0.1 * _mse(z, y) + 0.9 * (1 - F.cosine_similarity(z, y, dim=-1, eps=1e-8))


def _smooth_l1(z: Tensor, y: Tensor) -> Tensor:
    return F.smooth_l1_loss(z, y, reduction="none").mean(dim=-1)


DISTANCES = dict(mse_and_cosine_sim=_mse_and_cosine, mse=_mse, smooth_l1=_smooth_l1)


def rollouts(
    h: Tensor,
    summaries: Tensor,
    valid: Tensor,
    advance: Callable[[Tensor, Tensor], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
    steps: Tensor,
    decay: float | None,
) -> tuple[Tensor, Tensor]:
    """How far latents are from those of h that they foretell, 1 to R tokens ahead, NextLat.

    z_0 = h[t], z_r = advance(summaries[t + r], z_(r - 1)), and where valid[t + r], row t of step r
    adds steps[r] exp(-decay (row losses of the steps before)) distance(z_r, h[t + r]).
    Gradients reach h through z alone. All steps have the same t, those with R tokens after them.

    Args:
        h, summaries: (B, M, d).
        valid: (B, M) bool.
        advance: of summaries and latents (B, K, d), to latents.
        distance: of latents and what they foretell, to (B, K).
        steps: (R,) weights.
        decay: None: rows keep their weight.

    Returns:
        sums and counts (R,), one of each step.
    """
    h, R = _widen(h), len(steps)
    K = max(0, h.shape[1] - R)
    z, targets = h[:, :K], h.detach()
    past, sums, counts = 0, [], []
    for r in range(1, R + 1):
        ahead = slice(r, r + K)
        z = advance(summaries[:, ahead], z)
        rows = _widen(distance(z, targets[:, ahead]))
        weighted = rows * steps[r - 1].to(rows)
        if decay is not None:
            weighted = weighted if r == 1 else weighted * (-decay * past).exp()
            past = past + rows.detach()
        sums.append(weighted.masked_fill(~valid[:, ahead], 0).sum())
        counts.append(valid[:, ahead].sum())
    return torch.stack(sums), torch.stack(counts)
