"""Backward, from probabilities recomputed with the forward's log-sum-exp.

Windows up to 128: a program has a tile of tokens and writes their dq, dk and dv. The queries of the
tile meet a halo of keys before it, and its keys a halo of queries after it. So scores between two
tiles are computed twice, but no gradient is written twice, and nothing is carried between tiles.
Wider windows and full attention: one kernel goes by keys (dk, dv), one by queries (dq).

Scores are held as [keys, queries], so that both products for dk and dv take them from registers.
The keys are multiplied by the scale, or queries and keys by its root: a factor that is not known
before run time keeps Triton from moving the rotation behind the change of layout, where it would be
done twice.
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
    rotate,
    rotated,
    store_halves,
    store_rows,
)

LN2 = tl.constexpr(0.6931471805599453)  # undoes the factor of a softmax in base 2


@triton.jit
def pointers(
    qkv_ptr, out_ptr, lse_ptr, dout_ptr, dqkv_ptr, stride_b, stride_m, stride_dob, stride_dom,
    b, r, h, M, n_max, H: tl.constexpr, E: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """Pointers to everything that a backward reads and writes of a head, at the first token of a
    residue class: q, k, v, out, lse, dout, dq, dk, dv.
    """
    q_ptr, k_ptr, v_ptr = packed(qkv_ptr, stride_b, stride_m, b, r, h, H, E)
    out_ptr = output(out_ptr, b, r, h, M, H, E)
    dout_ptr += b * stride_dob + r * stride_dom + h * E
    dq_ptr = dqkv_ptr + ((b * M + r) * 3 * (H * E) + h * E)
    lse_ptr = log_sums(lse_ptr, b, r, h, n_max, H, DILATION)
    dk_ptr, dv_ptr = dq_ptr + H * E, dq_ptr + 2 * (H * E)
    return q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr


@triton.jit
def load_outputs(
    out_ptr, dout_ptr, lse_ptr, stride_o, stride_do, first, local, n, offs_e, E: tl.constexpr
):
    """dout, the log-sum-exp, and delta = sum(dout out) of each query."""
    out = load_rows(out_ptr, stride_o, first, local, n, offs_e, E, False)
    dout = load_rows(dout_ptr, stride_do, first, local, n, offs_e, E, False)
    lse = tl.load(lse_ptr + first + local, mask=local < n - first, other=0.0)
    return dout, lse, tl.sum(out.to(lse.dtype) * dout.to(lse.dtype), axis=1)


@triton.jit
def scores(
    q, dout, lse, delta, k, v, offs_i, offs_j, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """The probabilities and the gradients of the scores, [keys, queries]."""
    qk = dot(k, tl.trans(q), None, lse.dtype, IP)
    p = tl.exp2(qk - lse[None, :])
    if CAUSAL:
        p = tl.where(offs_i[None, :] >= offs_j[:, None], p, 0.0)
    if WINDOW > 0:
        p = tl.where(offs_i[None, :] <= offs_j[:, None] + WINDOW, p, 0.0)
    dp = dot(v, tl.trans(dout), None, lse.dtype, IP)
    return p.to(v.dtype), (p * (dp - delta[None, :])).to(v.dtype)


@triton.jit
def store_rotated_back(
    ptr, stride, first, local, n, d, cos, sin, cols, E: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Store the gradient of what load_rotated loads, given the gradient `d` of what it returns."""
    a, b = tl.split(tl.reshape(d, (d.shape[0], d.shape[1] // 2, 2)))
    a, b = rotate(a, b, cos, -sin)
    store_halves(ptr, stride, first, local, n, a, b, cols, E, INTERLEAVED)


@triton.jit
def add_queries(
    dk, dv, k, v, offs_j, i0, local, n, q_ptr, out_ptr, dout_ptr, lse_ptr,
    stride, stride_o, stride_do, cos, sin, offs_c, offs_e,
    E: tl.constexpr, INTERLEAVED: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile, with what the queries i0 + local add to them."""
    q = load_rotated(q_ptr, stride, i0, local, n, cos, sin, offs_c, E, INTERLEAVED, False)
    dout, lse, delta = load_outputs(
        out_ptr, dout_ptr, lse_ptr, stride_o, stride_do, i0, local, n, offs_e, E
    )
    p, ds = scores(q, dout, lse, delta, k, v, i0 + local, offs_j, WINDOW, CAUSAL, IP)
    dk = dot(ds, q, dk, dk.dtype, IP)
    dv = dot(p, dout, dv, dv.dtype, IP)
    return dk, dv


@triton.jit
def add_halo(
    dq, q, dout, lse, delta, offs_i, j0, local, n, k_ptr, v_ptr, stride, cos, sin, offs_c, offs_e,
    E: tl.constexpr, INTERLEAVED: tl.constexpr, WINDOW: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """dq of a tile, with what the keys j0 + local of its halo add to it.

    Scores are [queries, keys]: Hopper's products have 64 rows, and there are fewer keys than that.
    """
    k = load_rotated(k_ptr, stride, j0, local, n, cos, sin, offs_c, E, INTERLEAVED, False)
    v = load_rows(v_ptr, stride, j0, local, n, offs_e, E, False)
    offs_j = j0 + local
    # no query sees what is before the start
    offs_j = tl.where(offs_j >= 0, offs_j, -WINDOW - 1)
    qk = dot(q, tl.trans(k), None, dq.dtype, IP)
    dp = dot(dout, tl.trans(v), None, dq.dtype, IP)
    p = tl.exp2(qk - lse[:, None])
    p = tl.where(offs_i[:, None] <= offs_j[None, :] + WINDOW, p, 0.0)
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return dot(ds, k, dq, dq.dtype, IP)


@triton.jit(do_not_specialize=["M", "n_max", "tiles"])
def _rotary_attention_bwd_tile_kernel(
    qkv_ptr, table_ptr, out_ptr, lse_ptr, dout_ptr, dqkv_ptr,
    stride_b, stride_m, stride_dob, stride_dom, M, n_max, tiles, scale,
    DILATION: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, XPOS: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACC: tl.constexpr, IP: tl.constexpr,
    BLOCK: tl.constexpr, HALO: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of a tile of tokens."""
    b, r, h, tile, n = program(M, H, DILATION, tiles)
    t0 = (tile * BLOCK).to(tl.int32)
    local, near = tl.arange(0, BLOCK), tl.arange(0, HALO)
    offs, offs_c, offs_e = t0 + local, tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)
    HALF: tl.constexpr = E // 2
    # the window, where it is a limit within a tile
    INNER: tl.constexpr = WINDOW if WINDOW < BLOCK - 1 else 0
    BEFORE: tl.constexpr = (WINDOW + HALO - 1) // HALO * HALO  # tokens of the halo on either side
    stride, stride_o, stride_do = DILATION * stride_m, DILATION * (H * E), DILATION * stride_dom
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr = pointers(
        qkv_ptr, out_ptr, lse_ptr, dout_ptr, dqkv_ptr, stride_b, stride_m, stride_dob, stride_dom,
        b, r, h, M, n_max, H, E, DILATION,
    )  # fmt: skip

    qa, qb = load_halves(q_ptr, stride, t0, local, n, offs_c, E, INTERLEAVED, False)
    dout, lse, delta = load_outputs(
        out_ptr, dout_ptr, lse_ptr, stride_o, stride_do, t0, local, n, offs_e, E
    )
    ka, kb = load_halves(k_ptr, stride, t0, local, n, offs_c, E, INTERLEAVED, False)
    v = load_rows(v_ptr, stride, t0, local, n, offs_e, E, False)
    c, s = angles(table_ptr, BEFORE + local, 0, offs_c, scale, HALF, XPOS, False)
    q = rotated(qa, qb, c, s)
    c, s = angles(table_ptr, BEFORE + local, 0, offs_c, scale, HALF, -XPOS, False)
    k = rotated(ka, kb, c, s)
    dq = tl.zeros([BLOCK, 2 * BLOCK_C], ACC)
    for start in tl.static_range(0, BEFORE, HALO):
        c, s = angles(table_ptr, start + near, 0, offs_c, scale, HALF, -XPOS, False)
        dq = add_halo(
            dq, q, dout, lse, delta, offs, t0 - BEFORE + start, near, n, k_ptr, v_ptr, stride,
            c, s, offs_c, offs_e, E, INTERLEAVED, WINDOW, IP,
        )  # fmt: skip
    p, ds = scores(q, dout, lse, delta, k, v, offs, offs, INNER, True, IP)
    dq = dot(tl.trans(ds), k, dq, ACC, IP)
    c, s = angles(table_ptr, BEFORE + local, 0, offs_c, scale * LN2, HALF, XPOS, False)
    store_rotated_back(dq_ptr, 3 * stride_o, t0, local, n, dq, c, s, offs_c, E, INTERLEAVED)

    dv = dot(p, dout, None, ACC, IP)
    dk = dot(ds, q, None, ACC, IP)
    for start in tl.static_range(BEFORE + BLOCK, BEFORE + BLOCK + BEFORE, HALO):
        c, s = angles(table_ptr, start + near, 0, offs_c, scale, HALF, XPOS, False)
        dk, dv = add_queries(
            dk, dv, k, v, offs, t0 - BEFORE + start, near, n, q_ptr, out_ptr, dout_ptr, lse_ptr,
            stride, stride_o, stride_do, c, s, offs_c, offs_e, E, INTERLEAVED, WINDOW, False, IP,
        )  # fmt: skip
    store_rows(dv_ptr, 3 * stride_o, t0, local, n, offs_e, E, dv)
    c, s = angles(table_ptr, BEFORE + local, 0, offs_c, scale * LN2, HALF, -XPOS, False)
    store_rotated_back(dk_ptr, 3 * stride_o, t0, local, n, dk, c, s, offs_c, E, INTERLEAVED)


@triton.jit(do_not_specialize=["M", "n_max", "tiles"])
def _rotary_attention_bwd_dkdv_kernel(
    qkv_ptr, table_ptr, out_ptr, lse_ptr, dout_ptr, dqkv_ptr,
    stride_b, stride_m, stride_dob, stride_dom, M, n_max, tiles, scale,
    DILATION: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, XPOS: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACC: tl.constexpr, IP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys."""
    b, r, h, tile, n = program(M, H, DILATION, tiles)
    j0 = (tile * BLOCK_N).to(tl.int32)
    local, offs_c, offs_e = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)
    offs_j = j0 + local
    HALF: tl.constexpr = E // 2
    stride, stride_o, stride_do = DILATION * stride_m, DILATION * (H * E), DILATION * stride_dom
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr = pointers(
        qkv_ptr, out_ptr, lse_ptr, dout_ptr, dqkv_ptr, stride_b, stride_m, stride_dob, stride_dom,
        b, r, h, M, n_max, H, E, DILATION,
    )  # fmt: skip

    ck, sk = angles(table_ptr, local, 0, offs_c, scale, HALF, -XPOS, False)
    k = load_rotated(k_ptr, stride, j0, local, n, ck, sk, offs_c, E, INTERLEAVED, False)
    v = load_rows(v_ptr, stride, j0, local, n, offs_e, E, False)
    dk, dv = tl.zeros([BLOCK_N, 2 * BLOCK_C], ACC), tl.zeros([BLOCK_N, BLOCK_E], ACC)
    first = j0 // BLOCK_M * BLOCK_M
    last = n
    if WINDOW > 0:
        last = tl.minimum(n, j0 + BLOCK_N + WINDOW)
    # From here on, every query sees every key.
    whole = tl.minimum(last, first + tl.cdiv(BLOCK_N, BLOCK_M) * BLOCK_M)
    local_i = tl.arange(0, BLOCK_M)
    for i0 in range(first, whole, BLOCK_M):
        c, s = angles(table_ptr, local_i, i0 - j0, offs_c, 1.0, HALF, XPOS, True)
        dk, dv = add_queries(
            dk, dv, k, v, offs_j, i0, local_i, n, q_ptr, out_ptr, dout_ptr, lse_ptr,
            stride, stride_o, stride_do, c, s, offs_c, offs_e, E, INTERLEAVED, WINDOW, True, IP,
        )  # fmt: skip
    for i0 in range(whole, last, BLOCK_M):
        c, s = angles(table_ptr, local_i, i0 - j0, offs_c, 1.0, HALF, XPOS, True)
        dk, dv = add_queries(
            dk, dv, k, v, offs_j, i0, local_i, n, q_ptr, out_ptr, dout_ptr, lse_ptr,
            stride, stride_o, stride_do, c, s, offs_c, offs_e, E, INTERLEAVED, WINDOW, False, IP,
        )  # fmt: skip

    ck, sk = angles(table_ptr, local, 0, offs_c, scale * LN2, HALF, -XPOS, False)
    store_rotated_back(dk_ptr, 3 * stride_o, j0, local, n, dk, ck, sk, offs_c, E, INTERLEAVED)
    store_rows(dv_ptr, 3 * stride_o, j0, local, n, offs_e, E, dv)


@triton.jit
def add_keys(
    dq, q, dout, lse, delta, i0, j0, offs_i, n, k_ptr, v_ptr, stride, table_ptr,
    offs_c, offs_e, scale,
    E: tl.constexpr, INTERLEAVED: tl.constexpr, WINDOW: tl.constexpr, XPOS: tl.constexpr,
    CAUSAL: tl.constexpr, IP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of the tile at i0, with what the tile of keys at j0 adds to it."""
    local = tl.arange(0, BLOCK_N)
    c, s = angles(table_ptr, local, j0 - i0, offs_c, scale, E // 2, -XPOS, True)
    k = load_rotated(k_ptr, stride, j0, local, n, c, s, offs_c, E, INTERLEAVED, not CAUSAL)
    v = load_rows(v_ptr, stride, j0, local, n, offs_e, E, not CAUSAL)
    _, ds = scores(q, dout, lse, delta, k, v, offs_i, j0 + local, WINDOW, CAUSAL, IP)
    return dot(tl.trans(ds), k, dq, dq.dtype, IP)


@triton.jit(do_not_specialize=["M", "n_max", "tiles"])
def _rotary_attention_bwd_dq_kernel(
    qkv_ptr, table_ptr, out_ptr, lse_ptr, dout_ptr, dqkv_ptr,
    stride_b, stride_m, stride_dob, stride_dom, M, n_max, tiles, scale,
    DILATION: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, XPOS: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACC: tl.constexpr, IP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries."""
    b, r, h, tile, n = program(M, H, DILATION, tiles)
    # In full attention, the tiles with the most keys go first.
    i0 = ((tiles - 1 - tile) * BLOCK_M).to(tl.int32)
    local, offs_c, offs_e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)
    offs_i = i0 + local
    HALF: tl.constexpr = E // 2
    stride, stride_o, stride_do = DILATION * stride_m, DILATION * (H * E), DILATION * stride_dom
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr = pointers(
        qkv_ptr, out_ptr, lse_ptr, dout_ptr, dqkv_ptr, stride_b, stride_m, stride_dob, stride_dom,
        b, r, h, M, n_max, H, E, DILATION,
    )  # fmt: skip

    c, s = angles(table_ptr, local, 0, offs_c, 1.0, HALF, XPOS, False)
    q = load_rotated(q_ptr, stride, i0, local, n, c, s, offs_c, E, INTERLEAVED, False)
    dout, lse, delta = load_outputs(
        out_ptr, dout_ptr, lse_ptr, stride_o, stride_do, i0, local, n, offs_e, E
    )
    dq = tl.zeros([BLOCK_M, 2 * BLOCK_C], ACC)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, i0 - WINDOW) // BLOCK_N * BLOCK_N
    whole = i0 // BLOCK_N * BLOCK_N  # no key up to here is later than a query
    for j0 in range(first, whole, BLOCK_N):
        dq = add_keys(
            dq, q, dout, lse, delta, i0, j0, offs_i, n, k_ptr, v_ptr, stride,
            table_ptr, offs_c, offs_e, scale, E, INTERLEAVED, WINDOW, XPOS, False, IP, BLOCK_N,
        )  # fmt: skip
    for j0 in range(whole, tl.minimum(i0 + BLOCK_M, n), BLOCK_N):
        dq = add_keys(
            dq, q, dout, lse, delta, i0, j0, offs_i, n, k_ptr, v_ptr, stride,
            table_ptr, offs_c, offs_e, scale, E, INTERLEAVED, WINDOW, XPOS, True, IP, BLOCK_N,
        )  # fmt: skip

    c, s = angles(table_ptr, local, 0, offs_c, LN2, HALF, XPOS, False)
    store_rotated_back(dq_ptr, 3 * stride_o, i0, local, n, dq, c, s, offs_c, E, INTERLEAVED)
