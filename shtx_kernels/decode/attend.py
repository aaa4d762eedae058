"""Attention of one token of a sequence, whose key and value are put into a ring.

    score[n] = scale (q k[n] rotated by n)    k[n] is the n-th key before m in its residue class
    out[m] = softmax(score) v

Keys are stored as they came: the product is rotated instead, by the distance of key and query
alone, so no position is ever too large. A program has one head of one sequence.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..decode_arguments import Attention
from ..launch import accumulator, launch, next_power_of_2
from ._device import ahead, program, rings_of, row_of, starts, wait

# Warps of a program, by how many programs there are at least: more where each has a
# multiprocessor to itself, fewer where many share one. KEYS are what a warp takes in a step.
WARPS = ((0, 8), (128, 4), (1024, 2))
KEYS = 16


class Levels(NamedTuple):
    """The constants that the kernel is compiled for, one entry per level."""

    START: tuple[int, ...]  # first programs
    H: tuple[int, ...]  # heads
    E: tuple[int, ...]  # channels of a head
    L: tuple[int, ...]  # keys that a token sees at most
    STRIDE: tuple[int, ...]  # tokens per token of the level
    DILATION: tuple[int, ...]  # residue classes, how many tokens apart keys are
    RINGS_QKV: tuple
    RINGS_KV: tuple
    RINGS_O: tuple
    BLOCK_L: tuple[int, ...]  # keys of a step
    BLOCK_E: tuple[int, ...]  # channels of a half of a head in a tile, at least E / 2


@triton.jit
def past(
    kv_ptr, rotation_ptr, b, head, token, n, keys, offs, mask,
    LEVELS: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """Both halves of the n-th earlier keys and values, and of their rotations."""
    H: tl.constexpr = LEVELS.H[I]
    E: tl.constexpr = LEVELS.E[I]
    HALF: tl.constexpr = E // 2
    RINGS: tl.constexpr = LEVELS.RINGS_KV
    known = (n < keys)[:, None] & mask[None, :]
    tokens = token - n * LEVELS.DILATION[I]
    rows = row_of(kv_ptr, b, tokens, RINGS, I)[:, None] + head * E + offs[None, :]
    turn = rotation_ptr + n[:, None] * E + offs[None, :]
    k1 = tl.load(rows, mask=known, other=0.0)
    k2 = tl.load(rows + HALF, mask=known, other=0.0)
    v1 = tl.load(rows + H * E, mask=known, other=0.0)
    v2 = tl.load(rows + H * E + HALF, mask=known, other=0.0)
    cos = tl.load(turn, mask=known, other=0.0)
    return k1, k2, v1, v2, cos, tl.load(turn + HALF, mask=known, other=0.0)


@triton.jit
def fold(q1, q2, k1, k2, v1, v2, cos, sin, known, top, total, out1, out2):
    """The online softmax with more keys: the greatest score, the sum of exponentials over it, and
    both halves of the sum of values.
    """
    k1, k2 = k1.to(q1.dtype), k2.to(q1.dtype)
    scores = (q1[None, :] * k1 + q2[None, :] * k2) * cos
    scores += (q1[None, :] * k2 - q2[None, :] * k1) * sin
    scores = tl.where(known, tl.sum(scores, axis=1), float("-inf"))
    highest = tl.maximum(top, tl.max(scores, axis=0))
    p, fade = tl.exp(scores - highest), tl.exp(top - highest)
    out1 = out1 * fade + tl.sum(p[:, None] * v1.to(q1.dtype), axis=0)
    out2 = out2 * fade + tl.sum(p[:, None] * v2.to(q1.dtype), axis=0)
    return highest, total * fade + tl.sum(p, axis=0), out1, out2


@triton.jit
def attend_head(
    qkv_ptr, kv_ptr, out_ptr, rotation_ptr, b, head, token,
    LEVELS: tl.constexpr, I: tl.constexpr, ACC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One head of one sequence: its key and value go into the ring, its output to `out`."""
    H: tl.constexpr = LEVELS.H[I]
    E: tl.constexpr = LEVELS.E[I]
    HALF: tl.constexpr = E // 2
    BLOCK_L: tl.constexpr = LEVELS.BLOCK_L[I]
    BLOCK_E: tl.constexpr = LEVELS.BLOCK_E[I]
    RINGS_QKV: tl.constexpr = LEVELS.RINGS_QKV
    RINGS_KV: tl.constexpr = LEVELS.RINGS_KV
    RINGS_O: tl.constexpr = LEVELS.RINGS_O
    offs, n = tl.arange(0, BLOCK_E), 1 + tl.arange(0, BLOCK_L)  # channels of a half, and keys
    mask = offs < HALF
    keys = tl.minimum(token // LEVELS.DILATION[I] + 1, LEVELS.L[I])
    k1, k2, v1, v2, cos, sin = past(
        kv_ptr, rotation_ptr, b, head, token, n, keys, offs, mask, LEVELS, I
    )
    q_ptrs = row_of(qkv_ptr, b, token, RINGS_QKV, I) + head * E + offs
    kv_ptrs = row_of(kv_ptr, b, token, RINGS_KV, I) + head * E + offs
    wait(AHEAD)

    q1 = tl.load(q_ptrs, mask=mask, other=0.0).to(ACC) * E**-0.5
    q2 = tl.load(q_ptrs + HALF, mask=mask, other=0.0).to(ACC) * E**-0.5
    own_k1 = tl.load(q_ptrs + H * E, mask=mask, other=0.0)
    own_k2 = tl.load(q_ptrs + H * E + HALF, mask=mask, other=0.0)
    own_v1 = tl.load(q_ptrs + 2 * H * E, mask=mask, other=0.0)
    own_v2 = tl.load(q_ptrs + 2 * H * E + HALF, mask=mask, other=0.0)
    tl.store(kv_ptrs, own_k1, mask=mask)
    tl.store(kv_ptrs + HALF, own_k2, mask=mask)
    tl.store(kv_ptrs + H * E, own_v1, mask=mask)
    tl.store(kv_ptrs + H * E + HALF, own_v2, mask=mask)
    top = tl.sum(q1 * own_k1.to(ACC) + q2 * own_k2.to(ACC), axis=0)
    total = tl.full([], 1.0, ACC)
    out1, out2 = own_v1.to(ACC), own_v2.to(ACC)
    top, total, out1, out2 = fold(
        q1, q2, k1, k2, v1, v2, cos, sin, n < keys, top, total, out1, out2
    )
    for first in range(BLOCK_L, keys - 1, BLOCK_L):
        k1, k2, v1, v2, cos, sin = past(
            kv_ptr, rotation_ptr, b, head, token, first + n, keys, offs, mask, LEVELS, I
        )
        top, total, out1, out2 = fold(
            q1, q2, k1, k2, v1, v2, cos, sin, first + n < keys, top, total, out1, out2
        )
    out_ptrs = row_of(out_ptr, b, token, RINGS_O, I) + head * E + offs
    tl.store(out_ptrs, out1 / total, mask=mask)
    tl.store(out_ptrs + HALF, out2 / total, mask=mask)


@triton.jit
def _attend_kernel(
    position_ptr, qkv_ptrs, kv_ptrs, out_ptrs, rotation_ptrs,
    LEVELS: tl.constexpr, ACC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Every program has one head of one sequence at one level."""
    pid, b, position = program(position_ptr)
    for i in tl.static_range(len(qkv_ptrs)):
        if (pid >= LEVELS.START[i]) & (pid < LEVELS.START[i + 1]):
            if position % LEVELS.STRIDE[i] == 0:
                attend_head(
                    qkv_ptrs[i], kv_ptrs[i], out_ptrs[i], rotation_ptrs[i], b,
                    pid - LEVELS.START[i], position // LEVELS.STRIDE[i], LEVELS, i, ACC, AHEAD,
                )  # fmt: skip
            else:
                wait(AHEAD)


def attend(position: Tensor, attentions: list[Attention]) -> None:
    """Causal attention of the token at each position to the keys of its residue class, into which
    its own key and value are put.

    Args:
        position: (B,) int64.
        attentions: one per level. rotation is fp32 (fp64 with fp64) and has the cosine and sine of
            every distance, times the decay of xpos; 1 and 0 without rotary embedding.

    Source: simple-hierarchical-transformer, one token at a time; RoPE; xpos.
    """
    if not attentions or not len(position):
        return
    qkv, kv, out, rotation, stride, dilation = zip(*attentions, strict=True)
    _, _, _, H, E = zip(*(ring.shape for ring in kv), strict=True)
    L, START = tuple(map(len, rotation)), starts(H)
    programs = START[-1] * len(position)
    num_warps = [warps for least, warps in WARPS if programs >= least][-1]
    levels = Levels(
        START, H, E, L, stride, dilation, rings_of(qkv), rings_of(kv), rings_of(out),
        BLOCK_L=tuple(min(KEYS * num_warps, max(2, next_power_of_2(n - 1))) for n in L),
        BLOCK_E=tuple(next_power_of_2(e // 2) for e in E),
    )  # fmt: skip
    launch(
        _attend_kernel, (START[-1], len(position)),
        position, qkv, kv, out, rotation,
        LEVELS=levels, ACC=accumulator(qkv[0].dtype), num_warps=num_warps, **ahead(position.device),
    )  # fmt: skip
