"""Attention of one token of a sequence, which joins the keys and values in a ring.

    score[n] = scale (q k[n] rotated by n)    for the n-th key before, of the residue class of m
    out[m] = softmax(score) v

Keys lie as they came: what is rotated is the product, by the distance alone, so that no position is
ever too large. A program has one head of one sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._groups import Attention
from ._device import accumulator, ahead, ring_of, row_of, starts, wait

MAX_KEYS = 64  # a step


@triton.jit
def attend_head(
    qkv_ptr, kv_ptr, out_ptr, rotation_ptr, b, head, token,
    H: tl.constexpr, E: tl.constexpr, L: tl.constexpr, DILATION: tl.constexpr,
    RINGS_QKV: tl.constexpr, RINGS_KV: tl.constexpr, RINGS_O: tl.constexpr, I: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = E // 2
    offs = tl.arange(0, BLOCK_E)  # of either half
    mask = offs < HALF
    q_ptrs = row_of(qkv_ptr, b, token, RINGS_QKV, I) + head * E + offs
    q1 = tl.load(q_ptrs, mask=mask, other=0.0).to(ACC)
    q2 = tl.load(q_ptrs + HALF, mask=mask, other=0.0).to(ACC)
    k1, k2 = tl.load(q_ptrs + H * E, mask=mask), tl.load(q_ptrs + H * E + HALF, mask=mask)
    v1, v2 = tl.load(q_ptrs + 2 * H * E, mask=mask), tl.load(q_ptrs + 2 * H * E + HALF, mask=mask)
    kv_ptrs = row_of(kv_ptr, b, token, RINGS_KV, I) + head * E + offs
    tl.store(kv_ptrs, k1, mask=mask)
    tl.store(kv_ptrs + HALF, k2, mask=mask)
    tl.store(kv_ptrs + H * E, v1, mask=mask)
    tl.store(kv_ptrs + H * E + HALF, v2, mask=mask)

    scale = E**-0.5
    alike = tl.where(mask, q1 * k1.to(ACC) + q2 * k2.to(ACC), 0.0)
    top = tl.sum(alike, axis=0) * scale
    total = tl.full([], 1.0, ACC)
    out1, out2 = tl.where(mask, v1.to(ACC), 0.0), tl.where(mask, v2.to(ACC), 0.0)
    keys = tl.minimum(token // DILATION + 1, L)
    for first in range(1, keys, BLOCK_L):
        n = first + tl.arange(0, BLOCK_L)
        known = (n < keys)[:, None] & mask[None, :]
        rows = (
            row_of(kv_ptr, b, token - n * DILATION, RINGS_KV, I)[:, None] + head * E + offs[None, :]
        )
        past_k1 = tl.load(rows, mask=known, other=0.0).to(ACC)
        past_k2 = tl.load(rows + HALF, mask=known, other=0.0).to(ACC)
        past_v1 = tl.load(rows + H * E, mask=known, other=0.0).to(ACC)
        past_v2 = tl.load(rows + H * E + HALF, mask=known, other=0.0).to(ACC)
        turn = rotation_ptr + n[:, None] * E + offs[None, :]
        cos = tl.load(turn, mask=known, other=0.0)
        sin = tl.load(turn + HALF, mask=known, other=0.0)
        scores = (q1[None, :] * past_k1 + q2[None, :] * past_k2) * cos
        scores += (q1[None, :] * past_k2 - q2[None, :] * past_k1) * sin
        scores = tl.where(n < keys, tl.sum(scores, axis=1) * scale, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, axis=0))
        p, fade = tl.exp(scores - highest), tl.exp(top - highest)
        total = total * fade + tl.sum(p, axis=0)
        out1 = out1 * fade + tl.sum(p[:, None] * past_v1, axis=0)
        out2 = out2 * fade + tl.sum(p[:, None] * past_v2, axis=0)
        top = highest
    out_ptrs = row_of(out_ptr, b, token, RINGS_O, I) + head * E + offs
    tl.store(out_ptrs, out1 / total, mask=mask)
    tl.store(out_ptrs + HALF, out2 / total, mask=mask)


@triton.jit
def _attend_kernel(
    position_ptr, qkv_ptrs, kv_ptrs, out_ptrs, rotation_ptrs,
    START: tl.constexpr, H: tl.constexpr, E: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, RINGS_QKV: tl.constexpr, RINGS_KV: tl.constexpr, RINGS_O: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    wait(AHEAD)
    pid = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    position = tl.load(position_ptr + b)
    for i in tl.static_range(len(qkv_ptrs)):
        if (pid >= START[i]) & (pid < START[i + 1]) & (position % STRIDE[i] == 0):
            attend_head(
                qkv_ptrs[i], kv_ptrs[i], out_ptrs[i], rotation_ptrs[i], b, pid - START[i],
                position // STRIDE[i], H[i], E[i], L[i], DILATION[i], RINGS_QKV,
                RINGS_KV, RINGS_O, i, BLOCK_L[i], BLOCK_E[i], ACC,
            )  # fmt: skip


def attend(position: Tensor, attentions: list[Attention]) -> None:
    """Causal attention of the token at each position to the keys of its residue class, which it
    joins.

    Args:
        position: (B,) int64.
        attentions: of each level; rotation is fp32 (fp64 with fp64): cosine and sine, times the
            decay of xpos, of every distance.

    Source: simple-hierarchical-transformer, one token at a time; RoPE; xpos.
    """
    if not attentions or not len(position):
        return
    each = lambda fn: tuple(map(fn, attentions))
    H, E = each(lambda a: a.kv.shape[3]), each(lambda a: a.kv.shape[4])
    L, START = each(lambda a: len(a.rotation)), starts(H)
    with torch.cuda.device_of(position):
        _attend_kernel[(START[-1], len(position))](
            position, *(each(lambda a, k=k: a[k]) for k in range(4)),
            START=START, H=H, E=E, L=L, STRIDE=each(lambda a: a.stride),
            DILATION=each(lambda a: a.dilation), RINGS_QKV=each(lambda a: ring_of(a.qkv)),
            RINGS_KV=each(lambda a: ring_of(a.kv)), RINGS_O=each(lambda a: ring_of(a.out)),
            BLOCK_L=tuple(min(MAX_KEYS, max(2, triton.next_power_of_2(n - 1))) for n in L),
            BLOCK_E=tuple(triton.next_power_of_2(e // 2) for e in E),
            ACC=accumulator(attentions[0].qkv.dtype), **ahead(),
        )  # fmt: skip
