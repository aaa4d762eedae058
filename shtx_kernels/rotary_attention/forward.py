"""Forward, with a softmax in base 2.

Windows up to 64: a program has a tile of tokens, whose queries see the tile's own keys and a halo
of keys before it, all at once. Queries and keys are multiplied by the root of the scale, for the
reason that backward.py gives. Wider windows and full attention: a program has a tile of BLOCK_M
queries, and goes through the keys that they see in tiles of BLOCK_N, with an online softmax.
"""

import triton
import triton.language as tl

from .._dot import dot
from .tokens import (
    angles,
    load_halves,
    load_rotated,
    load_rows,
    log_sums,
    output,
    packed,
    program,
    rotated,
    store_rows,
)


@triton.jit
def attend(
    q, m, l, acc, offs_i, first, local, n, k_ptr, v_ptr, stride, cos, sin, offs_c, offs_e,
    E: tl.constexpr, INTERLEAVED: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    INSIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The online softmax with one more tile of keys, within the limits WINDOW and CAUSAL.

    m, l and acc are the greatest scores so far, and the sums of exponentials and of values over it.
    """
    k = load_rotated(k_ptr, stride, first, local, n, cos, sin, offs_c, E, INTERLEAVED, INSIDE)
    v = load_rows(v_ptr, stride, first, local, n, offs_e, E, INSIDE)
    qk = dot(q, tl.trans(k), None, m.dtype, IP)
    offs_j = first + local
    if CAUSAL:
        qk = tl.where(offs_i[:, None] >= offs_j[None, :], qk, float("-inf"))
    if WINDOW > 0:
        # no query sees what is before the start
        offs_j = tl.where(offs_j >= 0, offs_j, -WINDOW - 1)
        qk = tl.where(offs_i[:, None] <= offs_j[None, :] + WINDOW, qk, float("-inf"))
    m_new = tl.maximum(m, tl.max(qk, axis=1))
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(qk - m_new[:, None])
    l = l * alpha + tl.sum(p, axis=1)
    acc = dot(p.to(v.dtype), v, acc * alpha[:, None], m.dtype, IP)
    return m_new, l, acc


@triton.jit(do_not_specialize=["M", "n_max", "tiles"])
def _rotary_attention_fwd_kernel(
    qkv_ptr, table_ptr, out_ptr, lse_ptr, stride_b, stride_m, M, n_max, tiles, scale,
    DILATION: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, XPOS: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACC: tl.constexpr, IP: tl.constexpr, SHORT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The output and the log-sum-exp of a tile of queries."""
    b, r, h, tile, n = program(M, H, DILATION, tiles)
    # In full attention, the tiles with the most keys go first.
    i0 = ((tiles - 1 - tile) * BLOCK_M).to(tl.int32)
    local, offs_c, offs_e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)
    offs_i = i0 + local
    q_ptr, k_ptr, v_ptr = packed(qkv_ptr, stride_b, stride_m, b, r, h, H, E)
    stride = DILATION * stride_m
    HALF: tl.constexpr = E // 2
    # the tile's keys start so many tokens before it
    BEFORE: tl.constexpr = (
        (BLOCK_M + WINDOW + BLOCK_N - 1) // BLOCK_N * BLOCK_N - BLOCK_M if SHORT else 0
    )

    cq, sq = angles(table_ptr, BEFORE + local, 0, offs_c, scale, HALF, XPOS, False)
    q = load_rotated(q_ptr, stride, i0, local, n, cq, sq, offs_c, E, INTERLEAVED, False)
    m = tl.full([BLOCK_M], -1e30, ACC)  # finite, as a query may see no key of a tile
    l = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_E], ACC)
    if SHORT:
        local_j = tl.arange(0, BLOCK_N)
        for start in tl.static_range(-BEFORE, BLOCK_M, BLOCK_N):
            c, s = angles(table_ptr, BEFORE + start + local_j, 0, offs_c, 1.0, HALF, -XPOS, False)
            m, l, acc = attend(
                q, m, l, acc, offs_i, i0 + start, local_j, n, k_ptr, v_ptr, stride, c, s,
                offs_c, offs_e, E, INTERLEAVED,
                WINDOW if start < 0 or BLOCK_M - 1 - start > WINDOW else 0,
                start + BLOCK_N > 1, False, IP,
            )  # fmt: skip
    else:
        local_j = tl.arange(0, BLOCK_N)
        whole = i0 // BLOCK_N * BLOCK_N  # up to here, every query sees every key
        start = 0
        if WINDOW > 0:
            start = tl.maximum(0, i0 - WINDOW) // BLOCK_N * BLOCK_N
        for j0 in range(start, whole, BLOCK_N):
            c, s = angles(table_ptr, local_j, j0 - i0, offs_c, 1.0, HALF, -XPOS, True)
            m, l, acc = attend(
                q, m, l, acc, offs_i, j0, local_j, n, k_ptr, v_ptr, stride, c, s, offs_c, offs_e,
                E, INTERLEAVED, WINDOW, False, True, IP,
            )  # fmt: skip
        for j0 in range(whole, tl.minimum(i0 + BLOCK_M, n), BLOCK_N):
            c, s = angles(table_ptr, local_j, j0 - i0, offs_c, 1.0, HALF, -XPOS, True)
            m, l, acc = attend(
                q, m, l, acc, offs_i, j0, local_j, n, k_ptr, v_ptr, stride, c, s, offs_c, offs_e,
                E, INTERLEAVED, WINDOW, True, False, IP,
            )  # fmt: skip

    out_ptr = output(out_ptr, b, r, h, M, H, E)
    lse_ptr = log_sums(lse_ptr, b, r, h, n_max, H, DILATION)
    store_rows(out_ptr, DILATION * H * E, i0, local, n, offs_e, E, acc * (1.0 / l)[:, None])
    tl.store(lse_ptr + offs_i, m + tl.log2(l), mask=offs_i < n_max)


@triton.jit(do_not_specialize=["M", "n_max", "tiles"])
def _rotary_attention_fwd_tile_kernel(
    qkv_ptr, table_ptr, out_ptr, lse_ptr, stride_b, stride_m, M, n_max, tiles, scale,
    DILATION: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, XPOS: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACC: tl.constexpr, IP: tl.constexpr,
    BLOCK: tl.constexpr, HALO: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The output and the log-sum-exp of a tile of tokens, with a narrow window."""
    b, r, h, tile, n = program(M, H, DILATION, tiles)
    t0 = (tile * BLOCK).to(tl.int32)
    local, near = tl.arange(0, BLOCK), tl.arange(0, HALO)
    offs_c, offs_e = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)
    q_ptr, k_ptr, v_ptr = packed(qkv_ptr, stride_b, stride_m, b, r, h, H, E)
    stride = DILATION * stride_m
    HALF: tl.constexpr = E // 2

    qa, qb = load_halves(q_ptr, stride, t0, local, n, offs_c, E, INTERLEAVED, False)
    ka, kb = load_halves(k_ptr, stride, t0, local, n, offs_c, E, INTERLEAVED, False)
    halo_a, halo_b = load_halves(k_ptr, stride, t0 - HALO, near, n, offs_c, E, INTERLEAVED, False)
    v = load_rows(v_ptr, stride, t0, local, n, offs_e, E, False)
    halo_v = load_rows(v_ptr, stride, t0 - HALO, near, n, offs_e, E, False)
    c, s = angles(table_ptr, HALO + local, 0, offs_c, scale, HALF, XPOS, False)
    q = rotated(qa, qb, c, s)
    c, s = angles(table_ptr, HALO + local, 0, offs_c, scale, HALF, -XPOS, False)
    k = rotated(ka, kb, c, s)
    c, s = angles(table_ptr, near, 0, offs_c, scale, HALF, -XPOS, False)
    halo_k = rotated(halo_a, halo_b, c, s)

    offs_i, offs_j = t0 + local, t0 - HALO + near
    # no query sees what is before the start
    offs_j = tl.where(offs_j >= 0, offs_j, -WINDOW - 1)
    qk = dot(q, tl.trans(k), None, ACC, IP)
    qk = tl.where(offs_i[:, None] >= offs_i[None, :], qk, float("-inf"))
    if WINDOW < BLOCK - 1:
        qk = tl.where(offs_i[:, None] <= offs_i[None, :] + WINDOW, qk, float("-inf"))
    halo_qk = dot(q, tl.trans(halo_k), None, ACC, IP)
    halo_qk = tl.where(offs_i[:, None] <= offs_j[None, :] + WINDOW, halo_qk, float("-inf"))
    m = tl.maximum(tl.max(qk, axis=1), tl.max(halo_qk, axis=1))  # finite, as a token sees itself
    p, halo_p = tl.exp2(qk - m[:, None]), tl.exp2(halo_qk - m[:, None])
    l = tl.sum(p, axis=1) + tl.sum(halo_p, axis=1)
    acc = dot(p.to(v.dtype), v, None, ACC, IP)
    acc = dot(halo_p.to(v.dtype), halo_v, acc, ACC, IP)

    out_ptr = output(out_ptr, b, r, h, M, H, E)
    lse_ptr = log_sums(lse_ptr, b, r, h, n_max, H, DILATION)
    store_rows(out_ptr, DILATION * H * E, t0, local, n, offs_e, E, acc * (1.0 / l)[:, None])
    tl.store(lse_ptr + offs_i, m + tl.log2(l), mask=offs_i < n_max)
