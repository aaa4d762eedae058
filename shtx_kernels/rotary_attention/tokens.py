"""The tokens of a program: where they are, and how they are loaded, rotated and stored.

A program has a tile of tokens of one head and of one residue class. `first` is the number of the
tile's first token in its class, `local` [BLOCK] counts from there, and n is the length of the
class.
"""

import triton
import triton.language as tl

LOCAL = tl.constexpr(512)  # rows of the rotation table for positions in and around a tile
STEP = tl.constexpr(16)  # tokens between the rows after those, for distances of tiles


@triton.jit
def rotate(a, b, cos, sin):
    """The first and the second channels of pairs, rotated."""
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def program(M, H, dilation, tiles):
    """Sequence, residue class, head and tile of this program, and the number of tokens in its
    class.

    Heads are neighbours in memory, so programs of neighbouring heads run at the same time.
    """
    pid = tl.program_id(0).to(tl.int64)
    h, pid = pid % H, pid // H
    r, pid = pid % dilation, pid // dilation
    return pid // tiles, r, h, pid % tiles, ((M - r + dilation - 1) // dilation).to(tl.int32)


@triton.jit
def packed(qkv_ptr, stride_b, stride_m, b, r, h, H: tl.constexpr, E: tl.constexpr):
    """Pointers to q, k and v of a head, at the first token of residue class r of sequence b."""
    q_ptr = qkv_ptr + (b * stride_b + r * stride_m + h * E)
    return q_ptr, q_ptr + H * E, q_ptr + 2 * H * E


@triton.jit
def output(out_ptr, b, r, h, M, H: tl.constexpr, E: tl.constexpr):
    """Pointer to the output of a head, at the first token of a residue class."""
    return out_ptr + ((b * M + r) * H * E + h * E)


@triton.jit
def log_sums(lse_ptr, b, r, h, n_max, H: tl.constexpr, DILATION: tl.constexpr):
    """Pointer to the log-sum-exp of a head and class; every class has room for n_max tokens."""
    return lse_ptr + ((b * H + h) * DILATION + r) * n_max


@triton.jit
def load_rows(ptr, stride, first, local, n, cols, COLS: tl.constexpr, INSIDE: tl.constexpr):
    """Tokens first + local of a class, [BLOCK, BLOCK_C], with zeros for those outside of 0 to n.

    With INSIDE, all are known to be inside. Offsets within a tile are 32 bits wide: 64 bits would
    take twice the registers.
    """
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
    """Store `value` where load_rows loads it from."""
    mask = (local >= -first) & (local < n - first)
    tl.store(
        ptr + tl.cast(first, tl.int64) * stride + local[:, None] * stride + cols[None, :],
        value.to(ptr.dtype.element_ty),
        mask=mask[:, None] & (cols < COLS)[None, :],
    )


@triton.jit
def store_halves(
    ptr, stride, first, local, n, a, b, cols, E: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Store both channels of pairs where load_halves loads them from."""
    if INTERLEAVED:
        rows = tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))
        offs = tl.arange(0, 2 * cols.shape[0])
        store_rows(ptr, stride, first, local, n, offs, E, rows)
    else:
        store_rows(ptr, stride, first, local, n, cols, E // 2, a)
        store_rows(ptr + E // 2, stride, first, local, n, cols, E // 2, b)


@triton.jit
def table_row(table_ptr, row, cols, HALF: tl.constexpr):
    """Both halves of rows `row` [.., 1] of the table, each [.., BLOCK_C]."""
    ptrs = table_ptr + row * (2 * HALF) + cols[None, :]
    mask = (cols < HALF)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0), tl.load(ptrs + HALF, mask=mask, other=0.0)


@triton.jit
def angles(
    table_ptr, position, distance, cols, scale,
    HALF: tl.constexpr, SIGN: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """scale cos and scale sin [BLOCK, BLOCK_C] of the angles at distance + position.

    position [BLOCK] is within 0 to LOCAL - 1; distance is 0 without TURN, else a multiple of STEP.
    SIGN 1 multiplies by the factor of xpos for queries, -1 by that for keys, and 0 by none.
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
    ptr,
    stride,
    first,
    local,
    n,
    cols,
    E: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """The first channels of pairs and the second ones, each [BLOCK, BLOCK_C].

    INTERLEAVED pairs are neighbours, others are half a head apart.
    """
    if INTERLEAVED:
        offs = tl.arange(0, 2 * cols.shape[0])
        rows = load_rows(ptr, stride, first, local, n, offs, E, INSIDE)
        return tl.split(tl.reshape(rows, (rows.shape[0], cols.shape[0], 2)))
    a = load_rows(ptr, stride, first, local, n, cols, E // 2, INSIDE)
    return a, load_rows(ptr + E // 2, stride, first, local, n, cols, E // 2, INSIDE)


@triton.jit
def rotated(a, b, cos, sin):
    """Queries or keys, rotated, in their own dtype, with the two channels of each pair together."""
    c, d = rotate(a.to(cos.dtype), b.to(cos.dtype), cos, sin)
    return tl.reshape(tl.join(c.to(a.dtype), d.to(a.dtype)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def load_rotated(
    ptr, stride, first, local, n, cos, sin, cols, E: tl.constexpr, INTERLEAVED: tl.constexpr,
    INSIDE: tl.constexpr,
):  # fmt: skip
    """Queries or keys of the tokens first + local, rotated."""
    a, b = load_halves(ptr, stride, first, local, n, cols, E, INTERLEAVED, INSIDE)
    return rotated(a, b, cos, sin)
