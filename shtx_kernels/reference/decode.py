"""The ops of one token of every sequence of a batch: the model as a recurrence over positions.

The past is kept in rings (B, S, ...), whose slot m % S holds level token m; before the start, slots
are zero. The token at position p (B,) makes level token p // stride if p is a multiple of the
stride; else the level has nothing to do, and its rings stay as they are. Every op writes to its
`out`, and does its part of the work for all levels at once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, arange

from ..decode_arguments import Attention, Lookup, Norm, Part, Projection
from .norms import rms_norm
from .widen import widen

__all__ = ["attend", "embed", "merge", "norm", "project", "sample"]


def read(ring: Tensor, token: Tensor) -> Tensor:
    """Read a ring's rows (B, ...) of the level tokens (B,)."""
    return ring[arange(len(ring), device=ring.device), token % ring.shape[1]]


def write(ring: Tensor, position: Tensor, stride: int, rows: Tensor) -> None:
    """Put rows (B, ...) into the slots of the level tokens that the positions (B,) make."""
    token, due = position // stride, position % stride == 0
    due = due.view(-1, *[1] * (rows.ndim - 1))
    rows = torch.where(due, rows.to(ring.dtype), read(ring, token))
    ring[arange(len(ring), device=ring.device), token % ring.shape[1]] = rows


def activate(x: Tensor, activation: str | None) -> Tensor:
    """The function of torch.nn.functional with that name, applied to x; x itself for None."""
    return x if activation is None else getattr(F, activation)(x)


def normalize(x: Tensor, norm: str | None) -> Tensor:
    """The "layer" or "rms" norm of x (..., D), without weights; x itself for None."""
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=1e-5)
    return rms_norm(x, x.new_ones(())) if norm == "rms" else x


def embed(position: Tensor, ids: Tensor, history: Tensor, lookups: list[Lookup]) -> None:
    """out = activation(bias + sum over taps t of table[t, id of tap t]), for ids up to `position`.

    ids (B,), at `position`, are put into the ring history (B, C). Taps before the start add
    nothing.
    """
    write(history, position, 1, ids)
    for table, bias, activation, out, stride in lookups:
        taps = len(table)
        total = 0
        for t in range(taps):
            token = position - (taps - 1) + t
            rows = widen(table[t, read(history, token)])
            total = total + rows * (token >= 0)[:, None]
        total = total if bias is None else total + bias.to(total)
        write(out, position, stride, activate(total, activation))


def norm(position: Tensor, norms: list[Norm]) -> None:
    """out = layer_norm(x), for each level."""
    for x, gamma, beta, out, stride in norms:
        rows = normalize(widen(read(x, position // stride)), "layer")
        write(out, position, stride, rows * gamma.to(rows) + beta.to(rows))


def project(position: Tensor, projections: list[Projection]) -> None:
    """out = activation(weight norm(token_shift(x)) + bias) + residual.

    With taps, x is a ring of positions, and the rows of the last `taps` positions are multiplied
    side by side.
    """
    for p in projections:
        token = position // p.stride
        if p.taps:
            taps = [read(p.x, position - t) for t in reversed(range(p.taps))]
            x = torch.cat(taps, dim=-1)
        else:
            x = read(p.x, token)
        if p.dilation:
            half = (x.shape[-1] + 1) // 2
            x = torch.cat((x[:, :half], read(p.x, token - p.dilation)[:, half:]), dim=-1)
        x = normalize(widen(x), p.norm).to(p.weight.dtype)
        y = widen(F.linear(x, p.weight))
        y = activate(y if p.bias is None else y + p.bias.to(y), p.activation)
        if p.residual is not None:
            y = y + read(p.residual, token).to(y)
        write(p.out, position, p.stride, y)


def attend(position: Tensor, attentions: list[Attention]) -> None:
    """Causal attention of a token of every sequence, qkv (B, 1, 3 H E), to the keys of its residue
    class in the ring kv (B, S, 2, H, E), into which its own key and value are put.

    rotation (S / dilation, 2, E / 2) has the cosine and sine of every distance, times the decay of
    xpos.
    """
    for qkv, kv, out, rotation, stride, dilation in attentions:
        q, k, v = qkv[:, 0].unflatten(-1, (3, *kv.shape[-2:])).unbind(1)
        write(kv, position, stride, torch.stack((k, v), dim=1))
        distance = arange(len(rotation), device=kv.device)
        token = (position // stride)[:, None] - distance * dilation
        batch = arange(len(kv), device=kv.device)[:, None]
        k, v = widen(kv[batch, token % kv.shape[1]]).unbind(2)  # (B, L, H, E)
        cos, sin = rotation[:, :, None].to(k).unbind(1)  # (L, 1, E / 2)
        (k1, k2), (q1, q2) = k.chunk(2, dim=-1), widen(q)[:, None].chunk(2, dim=-1)
        scores = (q1 * k1 + q2 * k2) * cos + (q1 * k2 - q2 * k1) * sin
        scores = scores.sum(dim=-1) * kv.shape[-1] ** -0.5
        scores = scores.masked_fill((token < 0)[..., None], float("-inf"))
        rows = (scores.softmax(dim=1)[..., None] * v).sum(dim=1)
        write(out, position, stride, rows.flatten(1))


def merge(position: Tensor, parts: list[Part], weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """out = silu(weight rms_norm(levels side by side) + bias), gamma being in the weight.

    A level that makes no token now adds what its last token added: `kept` (B, J + 1) has the
    product of that token, and the square of its norm.
    """
    total, width = 0, 0
    for x, kept, stride in parts:
        x = read(x, position // stride)
        columns = weight[:, width : width + x.shape[-1]]
        product, square = widen(F.linear(x, columns)), widen(x).square().sum(dim=-1, keepdim=True)
        share = torch.cat((product, square), dim=1)
        if kept is not None:
            write(kept[:, None], position, stride, share)
            share = kept
        total = total + share
        width += x.shape[-1]
    scale = width**0.5 / total[:, -1:].sqrt().clamp(min=1e-12)
    write(out, position, 1, F.silu(total[:, :-1] * scale + bias.to(total)))


def sample(
    position: Tensor,
    logits: Tensor,
    noise: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    out: Tensor,
) -> None:
    """out = argmax of softmax(logits / temperature) / noise: an id as likely as the softmax says.

    logits (B, V), out (B,); noise is a ring of positions (B, S, V), exponentially distributed. Ids
    are drawn from the top_k best, and of these from the fewest whose probabilities add up to top_p;
    ids as likely as the last of them count as well. At temperature 0, out is the best id.
    """
    if temperature == 0:
        out.copy_(logits.argmax(dim=-1))
        return
    scores = widen(logits) / max(temperature, 1e-10)
    if top_k < scores.shape[-1]:
        least = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if top_p < 1:
        best = scores.sort(dim=-1, descending=True).values
        before = F.pad(best.softmax(dim=-1).cumsum(dim=-1)[:, :-1], (1, 0))
        least = best.masked_fill(before >= top_p, float("inf")).amin(dim=-1, keepdim=True)
        scores = scores.masked_fill(scores < least, float("-inf"))
    noise = read(noise, position).clamp(min=1e-20)
    out.copy_((scores - noise.log()).argmax(dim=-1))
