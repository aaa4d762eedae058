"""Backward, from probabilities recomputed with the forward's log-sum-exp.

Windows up to a tile: one kernel walks a run of tiles from left to right. A tile of keys meets its
own queries, whose dq it completes, and those of the next tile, which it carries with their dq to
the next step. So each row is loaded once, but for a tile at a run's start.
Wider windows and full attention: one kernel by keys (dk, dv), one by queries (dq).

Scores are held as [keys, queries], so that both products for dk and dv take them from registers.
The scale goes into the keys: a factor known at run time alone keeps Triton from moving the rotation
behind the change of layout, where it would be done twice.
"""

import triton
import triton.language as tl

from .forward import angles, load_rotated, load_rows, program, rotate, store_rows

LN2 = tl.constexpr(0.6931471805599453)  # keys are scaled for a softmax in base 2


@triton.jit
def load_outputs(
    out_ptr, dout_ptr, lse_ptr, stride_o, stride_do, first, local, n, offs_e, E: tl.constexpr
):
    """Per query: dout, the log-sum-exp, and delta = sum(dout out)."""
    out = load_rows(out_ptr, stride_o, first, local, n, offs_e, E, False)
    dout = load_rows(dout_ptr, stride_do, first, local, n, offs_e, E, False)
    lse = tl.load(lse_ptr + first + local, mask=local < n - first, other=0.0)
    return dout, lse, tl.sum(out.to(lse.dtype) * dout.to(lse.dtype), axis=1)


@triton.jit
def scores(
    q, dout, lse, delta, k, v, offs_i, offs_j, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """Probabilities and gradient of the scores, [keys, queries]."""
    qk = tl.dot(k, tl.trans(q), input_precision=IP, out_dtype=lse.dtype)
    p = tl.exp2(qk - lse[None, :])
    if CAUSAL:
        p = tl.where(offs_i[None, :] >= offs_j[:, None], p, 0.0)
    if WINDOW > 0:
        p = tl.where(offs_i[None, :] <= offs_j[:, None] + WINDOW, p, 0.0)
    dp = tl.dot(v, tl.trans(dout), input_precision=IP, out_dtype=lse.dtype)
    return p.to(v.dtype), (p * (dp - delta[None, :])).to(v.dtype)


@triton.jit
def store_rotated_back(ptr, stride, first, local, n, d, cos, sin, cols, E: tl.constexpr):
    """The gradient of what load_rotated loads, from that of what it returns."""
    a, b = tl.split(tl.reshape(d, (d.shape[0], d.shape[1] // 2, 2)))
    a, b = rotate(a, b, cos, -sin)
    store_rows(ptr, stride, first, local, n, cols, E // 2, a)
    store_rows(ptr + E // 2, stride, first, local, n, cols, E // 2, b)


@triton.jit(do_not_specialize=["M", "n_max", "runs", "length"])
def _rotary_attention_bwd_window_kernel(
    qkv_ptr, table_ptr, out_ptr, lse_ptr, dout_ptr, dqkv_ptr,
    stride_b, stride_m, stride_dob, stride_dom, M, n_max, runs, scale, length,
    DILATION: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, XPOS: tl.constexpr,
    ACC: tl.constexpr, IP: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    pid_b, r, h, run, n = program(tl.program_id(0).to(tl.int64), M, H, DILATION, runs)
    local, offs_c, offs_e = tl.arange(0, BLOCK), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)
    HALF: tl.constexpr = E // 2
    K: tl.constexpr = H * E  # columns from q to k, and from k to v
    stride, stride_o, stride_do = DILATION * stride_m, DILATION * K, DILATION * stride_dom
    qkv_ptr += pid_b * stride_b + r * stride_m + h * E
    out_ptr += (pid_b * M + r) * K + h * E
    dout_ptr += pid_b * stride_dob + r * stride_dom + h * E
    dqkv_ptr += (pid_b * M + r) * 3 * K + h * E
    lse_ptr += ((pid_b * H + h) * DILATION + r) * n_max

    INNER: tl.constexpr = WINDOW if WINDOW < BLOCK - 1 else 0  # a limit inside a tile
    q = tl.zeros([BLOCK, 2 * BLOCK_C], qkv_ptr.dtype.element_ty)
    dout = tl.zeros([BLOCK, BLOCK_E], qkv_ptr.dtype.element_ty)
    lse, delta = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    dq = tl.zeros([BLOCK, 2 * BLOCK_C], ACC)
    for step in range(length + 1):  # the first, a tile before the run, is for dq of the run's first
        position = step * BLOCK + local
        j0 = ((run * length - 1 + step) * BLOCK).to(tl.int32)
        offs_j, offs_i = j0 + local, j0 + BLOCK + local
        end = tl.where(step > 0, n, 0)
        c, s = angles(table_ptr, position, 0, offs_c, scale, HALF, -XPOS, False)
        k = load_rotated(qkv_ptr + K, stride, j0, local, n, c, s, offs_c, E, False)
        v = load_rows(qkv_ptr + 2 * K, stride, j0, local, n, offs_e, E, False)
        p, ds = scores(q, dout, lse, delta, k, v, offs_j, offs_j, INNER, True, IP)
        dk = tl.dot(ds, q, input_precision=IP, out_dtype=ACC)
        dv = tl.dot(p, dout, input_precision=IP, out_dtype=ACC)
        dq = tl.dot(tl.trans(ds), k, dq, input_precision=IP, out_dtype=ACC)
        c, s = angles(table_ptr, position, 0, offs_c, LN2, HALF, XPOS, False)
        store_rotated_back(dqkv_ptr, 3 * stride_o, j0, local, end, dq, c, s, offs_c, E)

        c, s = angles(table_ptr, position + BLOCK, 0, offs_c, 1.0, HALF, XPOS, False)
        q = load_rotated(qkv_ptr, stride, j0 + BLOCK, local, n, c, s, offs_c, E, False)
        dout, lse, delta = load_outputs(
            out_ptr, dout_ptr, lse_ptr, stride_o, stride_do, j0 + BLOCK, local, n, offs_e, E
        )
        seen_j = tl.where(offs_j >= 0, offs_j, -WINDOW - 1)  # by no query
        p, ds = scores(q, dout, lse, delta, k, v, offs_i, seen_j, WINDOW, False, IP)
        dk = tl.dot(ds, q, dk, input_precision=IP, out_dtype=ACC)
        dv = tl.dot(p, dout, dv, input_precision=IP, out_dtype=ACC)
        dq = tl.dot(tl.trans(ds), k, input_precision=IP, out_dtype=ACC)
        c, s = angles(table_ptr, position, 0, offs_c, scale * LN2, HALF, -XPOS, False)
        store_rotated_back(dqkv_ptr + K, 3 * stride_o, j0, local, end, dk, c, s, offs_c, E)
        store_rows(dqkv_ptr + 2 * K, 3 * stride_o, j0, local, end, offs_e, E, dv)


@triton.jit
def add_queries(
    dk, dv, k, v, i0, j0, offs_j, n, q_ptr, out_ptr, dout_ptr, lse_ptr,
    stride, stride_o, stride_do, table_ptr, offs_c, offs_e,
    E: tl.constexpr, WINDOW: tl.constexpr, XPOS: tl.constexpr, CAUSAL: tl.constexpr,
    IP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The gradients of the keys of the tile at j0, past the queries from i0 on."""
    local = tl.arange(0, BLOCK_M)
    c, s = angles(table_ptr, local, i0 - j0, offs_c, 1.0, E // 2, XPOS, True)
    q = load_rotated(q_ptr, stride, i0, local, n, c, s, offs_c, E, False)
    dout, lse, delta = load_outputs(
        out_ptr, dout_ptr, lse_ptr, stride_o, stride_do, i0, local, n, offs_e, E
    )
    p, ds = scores(q, dout, lse, delta, k, v, i0 + local, offs_j, WINDOW, CAUSAL, IP)
    dk = tl.dot(ds, q, dk, input_precision=IP, out_dtype=dk.dtype)
    dv = tl.dot(p, dout, dv, input_precision=IP, out_dtype=dv.dtype)
    return dk, dv


@triton.jit(do_not_specialize=["M", "n_max", "tiles"])
def _rotary_attention_bwd_dkdv_kernel(
    qkv_ptr, table_ptr, out_ptr, lse_ptr, dout_ptr, dqkv_ptr,
    stride_b, stride_m, stride_dob, stride_dom, M, n_max, tiles, scale,
    DILATION: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, XPOS: tl.constexpr,
    ACC: tl.constexpr, IP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    pid_b, r, h, tile, n = program(tl.program_id(0).to(tl.int64), M, H, DILATION, tiles)
    j0 = (tile * BLOCK_N).to(tl.int32)
    local, offs_c, offs_e = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)
    offs_j = j0 + local
    HALF: tl.constexpr = E // 2
    K: tl.constexpr = H * E  # columns from q to k, and from k to v
    stride, stride_o, stride_do = DILATION * stride_m, DILATION * K, DILATION * stride_dom
    qkv_ptr += pid_b * stride_b + r * stride_m + h * E
    out_ptr += (pid_b * M + r) * K + h * E
    dout_ptr += pid_b * stride_dob + r * stride_dom + h * E
    dqkv_ptr += (pid_b * M + r) * 3 * K + h * E
    lse_ptr += ((pid_b * H + h) * DILATION + r) * n_max

    c, s = angles(table_ptr, local, 0, offs_c, scale, HALF, -XPOS, False)
    k = load_rotated(qkv_ptr + K, stride, j0, local, n, c, s, offs_c, E, False)
    v = load_rows(qkv_ptr + 2 * K, stride, j0, local, n, offs_e, E, False)
    dk, dv = tl.zeros([BLOCK_N, 2 * BLOCK_C], ACC), tl.zeros([BLOCK_N, BLOCK_E], ACC)
    first = j0 // BLOCK_M * BLOCK_M
    last = n
    if WINDOW > 0:
        last = tl.minimum(n, j0 + BLOCK_N + WINDOW)
    whole = tl.minimum(
        last, first + tl.cdiv(BLOCK_N, BLOCK_M) * BLOCK_M
    )  # every key is seen from here
    for i0 in range(first, whole, BLOCK_M):
        dk, dv = add_queries(
            dk, dv, k, v, i0, j0, offs_j, n, qkv_ptr, out_ptr, dout_ptr, lse_ptr,
            stride, stride_o, stride_do, table_ptr, offs_c, offs_e,
            E, WINDOW, XPOS, True, IP, BLOCK_M,
        )  # fmt: skip
    for i0 in range(whole, last, BLOCK_M):
        dk, dv = add_queries(
            dk, dv, k, v, i0, j0, offs_j, n, qkv_ptr, out_ptr, dout_ptr, lse_ptr,
            stride, stride_o, stride_do, table_ptr, offs_c, offs_e,
            E, WINDOW, XPOS, False, IP, BLOCK_M,
        )  # fmt: skip

    c, s = angles(table_ptr, local, 0, offs_c, scale * LN2, HALF, -XPOS, False)
    store_rotated_back(dqkv_ptr + K, 3 * stride_o, j0, local, n, dk, c, s, offs_c, E)
    store_rows(dqkv_ptr + 2 * K, 3 * stride_o, j0, local, n, offs_e, E, dv)


@triton.jit
def add_keys(
    dq, q, dout, lse, delta, i0, j0, offs_i, n, k_ptr, v_ptr, stride, table_ptr,
    offs_c, offs_e, scale,
    E: tl.constexpr, WINDOW: tl.constexpr, XPOS: tl.constexpr, CAUSAL: tl.constexpr,
    IP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries of the tile at i0, past the keys from j0 on."""
    local = tl.arange(0, BLOCK_N)
    c, s = angles(table_ptr, local, j0 - i0, offs_c, scale, E // 2, -XPOS, True)
    k = load_rotated(k_ptr, stride, j0, local, n, c, s, offs_c, E, not CAUSAL)
    v = load_rows(v_ptr, stride, j0, local, n, offs_e, E, not CAUSAL)
    _, ds = scores(q, dout, lse, delta, k, v, offs_i, j0 + local, WINDOW, CAUSAL, IP)
    return tl.dot(tl.trans(ds), k, dq, input_precision=IP, out_dtype=dq.dtype)


@triton.jit(do_not_specialize=["M", "n_max", "tiles"])
def _rotary_attention_bwd_dq_kernel(
    qkv_ptr, table_ptr, out_ptr, lse_ptr, dout_ptr, dqkv_ptr,
    stride_b, stride_m, stride_dob, stride_dom, M, n_max, tiles, scale,
    DILATION: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, XPOS: tl.constexpr,
    ACC: tl.constexpr, IP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    pid_b, r, h, tile, n = program(tl.program_id(0).to(tl.int64), M, H, DILATION, tiles)
    i0 = ((tiles - 1 - tile) * BLOCK_M).to(tl.int32)  # the longest rows of full attention first
    local, offs_c, offs_e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)
    offs_i = i0 + local
    HALF: tl.constexpr = E // 2
    K: tl.constexpr = H * E  # columns from q to k, and from k to v
    stride, stride_o, stride_do = DILATION * stride_m, DILATION * K, DILATION * stride_dom
    qkv_ptr += pid_b * stride_b + r * stride_m + h * E
    out_ptr += (pid_b * M + r) * K + h * E
    dout_ptr += pid_b * stride_dob + r * stride_dom + h * E
    dqkv_ptr += (pid_b * M + r) * 3 * K + h * E
    lse_ptr += ((pid_b * H + h) * DILATION + r) * n_max

    c, s = angles(table_ptr, local, 0, offs_c, 1.0, HALF, XPOS, False)
    q = load_rotated(qkv_ptr, stride, i0, local, n, c, s, offs_c, E, False)
    dout, lse, delta = load_outputs(
        out_ptr, dout_ptr, lse_ptr, stride_o, stride_do, i0, local, n, offs_e, E
    )
    dq = tl.zeros([BLOCK_M, 2 * BLOCK_C], ACC)
    k_ptr, v_ptr = qkv_ptr + K, qkv_ptr + 2 * K
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, i0 - WINDOW) // BLOCK_N * BLOCK_N
    whole = i0 // BLOCK_N * BLOCK_N  # no key up to here is later than a query
    for j0 in range(first, whole, BLOCK_N):
        dq = add_keys(
            dq, q, dout, lse, delta, i0, j0, offs_i, n, k_ptr, v_ptr, stride,
            table_ptr, offs_c, offs_e, scale, E, WINDOW, XPOS, False, IP, BLOCK_N,
        )  # fmt: skip
    for j0 in range(whole, tl.minimum(i0 + BLOCK_M, n), BLOCK_N):
        dq = add_keys(
            dq, q, dout, lse, delta, i0, j0, offs_i, n, k_ptr, v_ptr, stride,
            table_ptr, offs_c, offs_e, scale, E, WINDOW, XPOS, True, IP, BLOCK_N,
        )  # fmt: skip

    c, s = angles(table_ptr, local, 0, offs_c, LN2, HALF, XPOS, False)
    store_rotated_back(dqkv_ptr, 3 * stride_o, i0, local, n, dq, c, s, offs_c, E)
