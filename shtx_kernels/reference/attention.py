"""Rotary embedding and causal attention."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, arange, cat
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.graph import get_gradient_edge

from ..internals import keeps_graph, packs_saved_tensors, transforms_active
from .widen import widen

MOST_FP32 = 65536  # up to so many tokens, the factors of xpos are within the range of fp32
SPAN = 2048  # past that, so many queries are taken at a time


def _rotation(
    n: int, E: int, xpos: bool, like: Tensor, anchor: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin and the factor of xpos (n, E / 2) of n tokens, in the dtype of `like`.

    Angles are made in fp64: in fp32, they would be 4e-3 off at 65,536 tokens. The factor is 1 at
    the anchor, by default in the middle.
    """
    wide = torch.float32 if like.device.type == "mps" else torch.float64  # mps has no fp64
    t = arange(n, device=like.device, dtype=wide)[:, None]
    channel = arange(0, E, 2, device=like.device, dtype=wide)
    angle = t * 10000 ** (-channel / E)
    z = (channel + 0.4 * E) / (1.4 * E) if xpos else torch.ones_like(channel)
    # q is multiplied by this and k by its inverse, so only the distance of the two counts
    decay = z ** ((t - (n // 2 if anchor is None else anchor)) / 512)
    return angle.cos().to(like), angle.sin().to(like), decay.to(like)


def _rotate(t: Tensor, cos: Tensor, sin: Tensor, decay: Tensor) -> Tensor:
    """t (..., n, E), whose channels c and c + E / 2 are a pair, rotated and multiplied by decay."""
    x, y = t.chunk(2, dim=-1)
    return cat(((x * cos - y * sin) * decay, (y * cos + x * sin) * decay), dim=-1)


def halves(t: Tensor) -> Tensor:
    """Channels (..., E) in which rotary pairs are neighbours, reordered: the first channels of all
    pairs, then the second ones.
    """
    return t.unflatten(-1, (-1, 2)).mT.flatten(-2)


def neighbours(t: Tensor) -> Tensor:
    """The inverse of `halves`, for channels (..., E)."""
    return t.unflatten(-1, (2, -1)).mT.flatten(-2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float):
    """Attention by its formula, in differentiable ops; causal without a mask."""
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = (widen(q) @ widen(k).mT * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=-1) @ widen(v)).to(v.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """PyTorch's attention; causal without a mask."""
    causal = mask is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


class _Attention(torch.autograd.Function):
    """PyTorch's attention, whose gradient has no gradient itself. Where a graph of the gradient is
    asked for, the gradient is that of `_softmax_attention` instead.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.edges = scale, None
        if packs_saved_tensors(ignore_tracing=True):
            # hooks as those of checkpoints do not see a graph within a graph, so none is made
            return _sdpa(q, k, v, mask, scale)
        with torch.enable_grad():
            # q, k and v may be computed from each other; views of them are not
            qkv = [t.view_as(t) for t in (q, k, v)]
            out = _sdpa(*qkv, mask, scale)
        ctx.edges = [get_gradient_edge(t) for t in (out, *qkv)]
        return out.detach()

    @staticmethod
    def backward(ctx, dout):
        *qkv, mask = ctx.saved_tensors
        again = keeps_graph()
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
    """Attention in whichever of the forms above the call can be differentiated; causal without a
    mask.
    """
    if transforms_active() or unpack_dual(q).tangent is not None:
        return _softmax_attention(q, k, v, mask, scale)
    if torch.is_grad_enabled() and q.requires_grad and not torch.compiler.is_compiling():
        return _Attention.apply(q, k, v, mask, scale)
    return _sdpa(q, k, v, mask, scale)


def _by_spans(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention with xpos at any length, by spans of queries.

    Factors are anchored at the first query of a span, so none leaves the range of fp32: they become
    0 for keys that are too far away to matter.
    """
    outs = []
    for first in range(0, q.shape[-2], SPAN):
        end = min(first + SPAN, q.shape[-2])
        cos, sin, decay = _rotation(end, q.shape[-1], True, widen(q), anchor=first)
        queries = _rotate(q[..., first:end, :], cos[first:], sin[first:], decay[first:])
        keys = _rotate(k[..., :end, :], cos, sin, 1 / decay)
        t = arange(end, device=q.device)
        mask = t <= t[first:, None]
        outs.append(_attention(queries.to(q), keys.to(k), v[..., :end, :], mask, scale))
    return cat(outs, dim=-2)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Attention of each query to itself and the `window` keys before it.

    Queries and keys are split into buckets as wide as the window, so a query's keys are in two.
    """
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


def split_heads(qkv: Tensor, heads: int, dilation: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, (B A, H, n, E) each, of all A residue classes modulo `dilation`, padded."""
    padded = F.pad(qkv, (0, 0, 0, -qkv.shape[1] % dilation))
    classes = "b (n a) (qkv h e) -> qkv (b a) h n e"
    return rearrange(padded, classes, qkv=3, a=dilation, h=heads).unbind()


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
    """Causal attention within each residue class modulo `dilation`: (B, M, 3 H E) to (B, M, H E).

    Rotary pairs channels c and c + E / 2; if interleaved, 2 c and 2 c + 1.
    """
    M = qkv.shape[1]
    dilation = min(dilation, max(1, M))
    q, k, v = split_heads(qkv, heads, dilation)
    if interleaved:
        q, k = halves(q), halves(k)
    n, E = q.shape[-2:]
    scale = E**-0.5 if scale is None else scale
    dtype = qkv.dtype
    full, far = window is None or window >= n - 1, xpos and n > MOST_FP32
    if far and not full:
        dtype = torch.float64
    elif xpos and dtype == torch.float16:  # factors leave its range past 8 thousand tokens
        dtype = torch.float32
    with torch.autocast("cpu" if qkv.is_meta else qkv.device.type, enabled=False):
        if full and far:
            out = _by_spans(q.to(dtype), k.to(dtype), v.to(dtype), scale)
        else:
            cos, sin, decay = _rotation(n, E, xpos, widen(q.to(dtype)))
            q, k = _rotate(q, cos, sin, decay).to(dtype), _rotate(k, cos, sin, 1 / decay).to(dtype)
            attend = _attention if full else _windowed
            out = attend(q, k, v.to(dtype), None if full else window, scale)
    return rearrange(out, "(b a) h n e -> b (n a) (h e)", a=dilation)[:, :M].to(qkv.dtype)
