"""Forward, with a softmax in base 2.

Windows up to 64: a program owns a tile of tokens, whose queries see its own keys and the halo of
keys before it, all at once. The root of the scale goes into both: see backward.py.
Wider windows and full attention: a program owns BLOCK_M queries of one head and of one residue
class, and walks the keys that they see in blocks of BLOCK_N with an online softmax.
"""

import triton
import triton.language as tl

from .._dot import dot

LOCAL = tl.constexpr(512)  # rows of the rotation table for positions in a tile and around it
STEP = tl.constexpr(16)  # tokens between the rows behind them, for distances between tiles


@triton.jit
def rotate(a, b, cos, sin):
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def program(pid, M, H, dilation, tiles):
    """Sequence, residue class, head and tile of a program, and the number of tokens in its class.

    Heads are neighbours in memory, so they are neighbours in time."""
    h, pid = pid % H, pid // H
    r, pid = pid % dilation, pid // dilation
    return pid // tiles, r, h, pid % tiles, ((M - r + dilation - 1) // dilation).to(tl.int32)


@triton.jit
def load_rows(ptr, stride, first, local, n, cols, COLS: tl.constexpr, INSIDE: tl.constexpr):
    """Rows first + local [BLOCK, BLOCK_C], zero outside of 0 to n, which INSIDE rows are not.

    Offsets inside a tile are 32 bits wide: 64 would take twice the registers."""
    ptrs = ptr + tl.cast(first, tl.int64) * stride + local[:, None] * stride + cols[None, :]
    EXACT: tl.constexpr = cols.shape[0] == COLS
    if INSIDE:
        if EXACT:
            return tl.load(ptrs)
        return tl.load(ptrs, mask=cols[None, :] < COLS, other=0.0)
    mask = (local >= -first) & (local < n - first)
    if EXACT:
        return tl.load(ptrs, mask=mask[:, None], other=0.0)
    return tl.load(ptrs, mask=mask[:, None] & (cols < COLS)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, stride, first, local, n, cols, COLS: tl.constexpr, value):
    mask = (local >= -first) & (local < n - first)
    tl.store(
        ptr + tl.cast(first, tl.int64) * stride + local[:, None] * stride + cols[None, :],
        value.to(ptr.dtype.element_ty),
        mask=mask[:, None] & (cols < COLS)[None, :],
    )


@triton.jit
def store_halves(ptr, stride, first, local, n, a, b, cols, E: tl.constexpr, NEAR: tl.constexpr):
    """To where load_halves loads them from."""
    if NEAR:
        rows = tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))
        offs = tl.arange(0, 2 * cols.shape[0])
        store_rows(ptr, stride, first, local, n, offs, E, rows)
    else:
        store_rows(ptr, stride, first, local, n, cols, E // 2, a)
        store_rows(ptr + E // 2, stride, first, local, n, cols, E // 2, b)


@triton.jit
def table_row(table_ptr, row, cols, HALF: tl.constexpr):
    """Both halves of rows [.., 1] of the table [.., BLOCK_C]."""
    ptrs = table_ptr + row * (2 * HALF) + cols[None, :]
    mask = (cols < HALF)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0), tl.load(ptrs + HALF, mask=mask, other=0.0)


@triton.jit
def angles(
    table_ptr, position, distance, cols, scale,
    HALF: tl.constexpr, SIGN: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """scale cos and scale sin [BLOCK, BLOCK_C] at distance + position < LOCAL [BLOCK]; distance is
    0 without TURN, else a multiple of STEP. SIGN 1 (queries) or -1 (keys) applies xpos, 0 does not.
    """
    c, s = table_row(table_ptr, 1 + position[:, None], cols, HALF)
    if TURN:
        cd, sd = table_row(table_ptr, 1 + LOCAL + tl.abs(distance) // STEP, cols, HALF)
        sd = tl.where(distance < 0, -sd, sd)
        c, s = c * cd - s * sd, s * cd + c * sd
    if SIGN != 0:
        decay, _ = table_row(table_ptr, 0, cols, HALF)
        scale = scale * tl.exp2(decay * ((distance + position) * SIGN)[:, None].to(decay.dtype))
    return c * scale, s * scale


@triton.jit
def load_halves(
    ptr, stride, first, local, n, cols, E: tl.constexpr, NEAR: tl.constexpr, INSIDE: tl.constexpr
):
    """The first channels of pairs and the second, each [BLOCK, BLOCK_C]; pairs are neighbours with
    NEAR, else half a head apart.
    """
    if NEAR:
        offs = tl.arange(0, 2 * cols.shape[0])
        rows = load_rows(ptr, stride, first, local, n, offs, E, INSIDE)
        return tl.split(tl.reshape(rows, (rows.shape[0], cols.shape[0], 2)))
    a = load_rows(ptr, stride, first, local, n, cols, E // 2, INSIDE)
    return a, load_rows(ptr + E // 2, stride, first, local, n, cols, E // 2, INSIDE)


@triton.jit
def rotated(a, b, cos, sin):
    """Queries or keys, rotated, in their own dtype, with the channels of a pair side by side."""
    c, d = rotate(a.to(cos.dtype), b.to(cos.dtype), cos, sin)
    return tl.reshape(tl.join(c.to(a.dtype), d.to(a.dtype)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def load_rotated(
    ptr, stride, first, local, n, cos, sin, cols, E: tl.constexpr, NEAR: tl.constexpr,
    INSIDE: tl.constexpr,
):  # fmt: skip
    a, b = load_halves(ptr, stride, first, local, n, cols, E, NEAR, INSIDE)
    return rotated(a, b, cos, sin)


@triton.jit
def attend(
    q, m, l, acc, offs_i, first, local, n, k_ptr, v_ptr, stride, cos, sin, offs_c, offs_e,
    E: tl.constexpr, NEAR: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    INSIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The online softmax past the keys of a block; WINDOW and CAUSAL are the limits to heed."""
    k = load_rotated(k_ptr, stride, first, local, n, cos, sin, offs_c, E, NEAR, INSIDE)
    v = load_rows(v_ptr, stride, first, local, n, offs_e, E, INSIDE)
    qk = dot(q, tl.trans(k), None, m.dtype, IP)
    offs_j = first + local
    if CAUSAL:
        qk = tl.where(offs_i[:, None] >= offs_j[None, :], qk, float("-inf"))
    if WINDOW > 0:
        offs_j = tl.where(offs_j >= 0, offs_j, -WINDOW - 1)  # nobody sees what is left of the start
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
    NEAR: tl.constexpr, ACC: tl.constexpr, IP: tl.constexpr, SHORT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    pid_b, r, h, tile, n = program(tl.program_id(0).to(tl.int64), M, H, DILATION, tiles)
    i0 = ((tiles - 1 - tile) * BLOCK_M).to(tl.int32)  # the longest rows of full attention first
    local, offs_c, offs_e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)
    offs_i = i0 + local
    qkv_ptr += pid_b * stride_b + r * stride_m + h * E
    k_ptr, v_ptr = qkv_ptr + H * E, qkv_ptr + 2 * H * E
    stride = DILATION * stride_m
    HALF: tl.constexpr = E // 2
    BEFORE: tl.constexpr = (
        (BLOCK_M + WINDOW + BLOCK_N - 1) // BLOCK_N * BLOCK_N - BLOCK_M if SHORT else 0
    )  # tokens before the tile that its keys start with

    c, s = angles(table_ptr, BEFORE + local, 0, offs_c, scale, HALF, XPOS, False)
    q = load_rotated(qkv_ptr, stride, i0, local, n, c, s, offs_c, E, NEAR, False)
    m = tl.full([BLOCK_M], -1e30, ACC)  # finite: a row may see no key of a block
    l = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_E], ACC)
    if SHORT:
        local_j = tl.arange(0, BLOCK_N)
        for start in tl.static_range(-BEFORE, BLOCK_M, BLOCK_N):
            c, s = angles(table_ptr, BEFORE + start + local_j, 0, offs_c, 1.0, HALF, -XPOS, False)
            m, l, acc = attend(
                q, m, l, acc, offs_i, i0 + start, local_j, n, k_ptr, v_ptr, stride, c, s,
                offs_c, offs_e, E, NEAR, WINDOW if start < 0 or BLOCK_M - 1 - start > WINDOW else 0,
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
                E, NEAR, WINDOW, False, True, IP,
            )  # fmt: skip
        for j0 in range(whole, tl.minimum(i0 + BLOCK_M, n), BLOCK_N):
            c, s = angles(table_ptr, local_j, j0 - i0, offs_c, 1.0, HALF, -XPOS, True)
            m, l, acc = attend(
                q, m, l, acc, offs_i, j0, local_j, n, k_ptr, v_ptr, stride, c, s, offs_c, offs_e,
                E, NEAR, WINDOW, True, False, IP,
            )  # fmt: skip

    out_ptr += (pid_b * M + r) * H * E + h * E
    store_rows(out_ptr, DILATION * H * E, i0, local, n, offs_e, E, acc * (1.0 / l)[:, None])
    lse_ptr += ((pid_b * H + h) * DILATION + r) * n_max
    tl.store(lse_ptr + offs_i, m + tl.log2(l), mask=offs_i < n_max)


@triton.jit(do_not_specialize=["M", "n_max", "tiles"])
def _rotary_attention_fwd_tile_kernel(
    qkv_ptr, table_ptr, out_ptr, lse_ptr, stride_b, stride_m, M, n_max, tiles, scale,
    DILATION: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, XPOS: tl.constexpr,
    NEAR: tl.constexpr, ACC: tl.constexpr, IP: tl.constexpr,
    BLOCK: tl.constexpr, HALO: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    pid_b, r, h, tile, n = program(tl.program_id(0).to(tl.int64), M, H, DILATION, tiles)
    t0 = (tile * BLOCK).to(tl.int32)
    local, near = tl.arange(0, BLOCK), tl.arange(0, HALO)
    offs_c, offs_e = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)
    qkv_ptr += pid_b * stride_b + r * stride_m + h * E
    k_ptr, v_ptr = qkv_ptr + H * E, qkv_ptr + 2 * H * E
    stride = DILATION * stride_m
    HALF: tl.constexpr = E // 2

    qa, qb = load_halves(qkv_ptr, stride, t0, local, n, offs_c, E, NEAR, False)
    ka, kb = load_halves(k_ptr, stride, t0, local, n, offs_c, E, NEAR, False)
    halo_a, halo_b = load_halves(k_ptr, stride, t0 - HALO, near, n, offs_c, E, NEAR, False)
    v = load_rows(v_ptr, stride, t0, local, n, offs_e, E, False)
    halo_v = load_rows(v_ptr, stride, t0 - HALO, near, n, offs_e, E, False)
    c, s = angles(table_ptr, HALO + local, 0, offs_c, scale, HALF, XPOS, False)
    q = rotated(qa, qb, c, s)
    c, s = angles(table_ptr, HALO + local, 0, offs_c, scale, HALF, -XPOS, False)
    k = rotated(ka, kb, c, s)
    c, s = angles(table_ptr, near, 0, offs_c, scale, HALF, -XPOS, False)
    halo_k = rotated(halo_a, halo_b, c, s)

    offs_i, offs_j = t0 + local, t0 - HALO + near
    offs_j = tl.where(offs_j >= 0, offs_j, -WINDOW - 1)  # nobody sees what is left of the start
    qk = dot(q, tl.trans(k), None, ACC, IP)
    qk = tl.where(offs_i[:, None] >= offs_i[None, :], qk, float("-inf"))
    if WINDOW < BLOCK - 1:
        qk = tl.where(offs_i[:, None] <= offs_i[None, :] + WINDOW, qk, float("-inf"))
    halo_qk = dot(q, tl.trans(halo_k), None, ACC, IP)
    halo_qk = tl.where(offs_i[:, None] <= offs_j[None, :] + WINDOW, halo_qk, float("-inf"))
    m = tl.maximum(tl.max(qk, axis=1), tl.max(halo_qk, axis=1))  # finite: a row sees itself
    p, halo_p = tl.exp2(qk - m[:, None]), tl.exp2(halo_qk - m[:, None])
    l = tl.sum(p, axis=1) + tl.sum(halo_p, axis=1)
    acc = dot(p.to(v.dtype), v, None, ACC, IP)
    acc = dot(halo_p.to(v.dtype), halo_v, acc, ACC, IP)

    out_ptr += (pid_b * M + r) * H * E + h * E
    store_rows(out_ptr, DILATION * H * E, t0, local, n, offs_e, E, acc * (1.0 / l)[:, None])
    lse_ptr += ((pid_b * H + h) * DILATION + r) * n_max
    tl.store(lse_ptr + offs_i, m + tl.log2(l), mask=offs_i < n_max)
