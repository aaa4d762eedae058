"""Full attention by PyTorch's cores, between two passes over memory.

One pass rotates q and k out of the packed layout, into a sequence for each residue class; the other
rotates their gradients back. With several classes, outputs and their gradients change their layout
as well, as the cores take no other.

Forward is cuDNN's, which is the fastest. Backward is FlashAttention 2's, which can be told to give
the same bits every time: cuDNN's is a third faster, but gave other bits within 30 runs.
"""

from contextlib import contextmanager
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..internals import HAS_ATTENTION_CORES, cudnn_attention, flash_attention_backward
from ..launch import KINDS, Kernel, cdiv, next_power_of_2
from .tokens import (
    STEP,
    angles,
    load_halves,
    load_rows,
    packed,
    program,
    rotate,
    store_halves,
    store_rows,
)

BLOCK = 64  # tokens of a tile
FROM = 512  # with fewer tokens in a class, the passes cost more than the cores save
# the most tokens of a class with xpos: for n tokens, a factor is up to 2.86e-1 ** (-n / 1024)
MOST = {torch.bfloat16: 32768, torch.float16: 4096}


def takes(qkv: Tensor, E: int, window: int, n: int, xpos: bool) -> bool:
    """Return whether the cores compute a call. Dtypes and shapes alone decide, so that fake tensors
    and CUDA graphs decide alike.
    """
    return HAS_ATTENTION_CORES and (
        (qkv.is_cuda and torch.version.hip is None and qkv.dtype in MOST)
        and (window < 0 and E % 8 == 0 and n >= FROM)
        and not (xpos and n > MOST[qkv.dtype])
    )


@triton.jit
def move(src_ptr, src_stride, dst_ptr, dst_stride, i0, local, n, n_dst, offs, WIDTH: tl.constexpr):
    """Copy the tokens i0 + local; the source has n tokens, the destination n_dst."""
    rows = load_rows(src_ptr, src_stride, i0, local, n, offs, WIDTH, False)
    store_rows(dst_ptr, dst_stride, i0, local, n_dst, offs, WIDTH, rows)


@triton.jit
def move_rotated(
    src_ptr, src_stride, dst_ptr, dst_stride, i0, local, n, n_dst, offs_c, cos, sin,
    E: tl.constexpr, SRC_INTERLEAVED: tl.constexpr, DST_INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Copy the tokens i0 + local, rotated; the source has n tokens, the destination n_dst."""
    a, b = load_halves(src_ptr, src_stride, i0, local, n, offs_c, E, SRC_INTERLEAVED, False)
    a, b = rotate(a.to(cos.dtype), b.to(cos.dtype), cos, sin)
    store_halves(dst_ptr, dst_stride, i0, local, n_dst, a, b, offs_c, E, DST_INTERLEAVED)


@triton.jit(do_not_specialize=["M", "n_max", "tiles"])
def _rotary_attention_rotate_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, table_ptr, stride_b, stride_m, M, n_max, tiles,
    DILATION: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, XPOS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Packed q, k and v to rotated ones by class; with BACK, gradients the other way."""
    b, r, h, tile, n = program(M, H, DILATION, tiles)
    i0 = (tile * BLOCK).to(tl.int32)
    local, offs_c, offs_e = tl.arange(0, BLOCK), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)
    K: tl.constexpr = H * E  # numbers from a token of a class to the next
    stride = DILATION * stride_m
    packed_q_ptr, packed_k_ptr, packed_v_ptr = packed(qkv_ptr, stride_b, stride_m, b, r, h, H, E)
    offset = (b * DILATION + r) * n_max * K + h * E
    q_ptr, k_ptr, v_ptr = q_ptr + offset, k_ptr + offset, v_ptr + offset
    # positions count from the middle, where the factors of xpos are one
    first = i0 - n_max // 2 // STEP * STEP
    cq, sq = angles(table_ptr, local, first, offs_c, 1.0, E // 2, XPOS, True)
    ck, sk = angles(table_ptr, local, first, offs_c, 1.0, E // 2, -XPOS, True)
    if BACK:
        move_rotated(
            q_ptr, K, packed_q_ptr, stride, i0, local, n, n, offs_c, cq, -sq, E, False, INTERLEAVED
        )
        move_rotated(
            k_ptr, K, packed_k_ptr, stride, i0, local, n, n, offs_c, ck, -sk, E, False, INTERLEAVED
        )
        move(v_ptr, K, packed_v_ptr, stride, i0, local, n, n, offs_e, E)
    else:  # a class that is shorter than others ends in zeros
        move_rotated(
            packed_q_ptr, stride, q_ptr, K, i0, local, n, n_max, offs_c, cq, sq,
            E, INTERLEAVED, False,
        )  # fmt: skip
        move_rotated(
            packed_k_ptr, stride, k_ptr, K, i0, local, n, n_max, offs_c, ck, sk,
            E, INTERLEAVED, False,
        )  # fmt: skip
        move(packed_v_ptr, stride, v_ptr, K, i0, local, n, n_max, offs_e, E)


@triton.jit(do_not_specialize=["M", "n_max", "tiles"])
def _rotary_attention_regroup_kernel(
    tokens_ptr, classes_ptr, stride_b, stride_m, M, n_max, tiles,
    DILATION: tl.constexpr, H: tl.constexpr, E: tl.constexpr, BACK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Tokens in their own order to tokens by class; with BACK, the other way."""
    b, r, h, tile, n = program(M, H, DILATION, tiles)
    i0 = (tile * BLOCK).to(tl.int32)
    local, offs_e = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    K: tl.constexpr = H * E
    stride = DILATION * stride_m
    tokens_ptr += b * stride_b + r * stride_m + h * E
    classes_ptr += (b * DILATION + r) * n_max * K + h * E
    if BACK:
        move(classes_ptr, K, tokens_ptr, stride, i0, local, n, n, offs_e, E)
    else:
        move(tokens_ptr, stride, classes_ptr, K, i0, local, n, n_max, offs_e, E)


@lru_cache(KINDS)
def _kernel_of_rotation(
    dilation: int, H: int, E: int, xpos: bool, interleaved: bool, back: bool
) -> Kernel:
    return Kernel(
        _rotary_attention_rotate_kernel, DILATION=dilation, H=H, E=E, XPOS=int(xpos),
        INTERLEAVED=interleaved, BACK=back,
        BLOCK=BLOCK, BLOCK_C=next_power_of_2(E // 2), BLOCK_E=next_power_of_2(E), num_warps=4,
    )  # fmt: skip


def rotate_classes(qkv, classes, table, dilation: int, xpos: bool, interleaved: bool, back: bool):
    """Rotate qkv (B, M, 3 H E) into `classes`, which are q, k and v (B dilation, n, H, E). With
    `back`, `classes` are gradients, which are rotated back into qkv.
    """
    B, M, _ = qkv.shape
    _, n, H, E = classes[0].shape
    tiles = cdiv(n, BLOCK)
    kernel = _kernel_of_rotation(dilation, H, E, bool(xpos), interleaved, back)
    numbers = *qkv.stride()[:2], M, n, tiles
    kernel((B * H * dilation * tiles,), (qkv, *classes, table), *numbers)


@lru_cache(KINDS)
def _kernel_of_regrouping(dilation: int, H: int, E: int, back: bool) -> Kernel:
    return Kernel(
        _rotary_attention_regroup_kernel, DILATION=dilation, H=H, E=E, BACK=back, BLOCK=BLOCK,
        BLOCK_E=next_power_of_2(E), num_warps=4,
    )  # fmt: skip


def regroup(tokens: Tensor, classes: Tensor, dilation: int, back: bool):
    """Copy tokens (B, M, H E) to classes (B dilation, n, H, E), or with `back` the other way."""
    B, M, _ = tokens.shape
    _, n, H, E = classes.shape
    tiles = cdiv(n, BLOCK)
    numbers = *tokens.stride()[:2], M, n, tiles
    grid = (B * H * dilation * tiles,)
    _kernel_of_regrouping(dilation, H, E, back)(grid, (tokens, classes), *numbers)


def by_class(t: Tensor, dilation: int, heads: int) -> Tensor:
    """(B, M, H E) as (B dilation, n, H, E)."""
    B, M, K = t.shape
    if dilation == 1:
        return t.unflatten(2, (heads, -1))
    classes = t.new_empty(B * dilation, cdiv(M, dilation), heads, K // heads)
    regroup(t, classes, dilation, back=False)
    return classes


@contextmanager
def deterministic():
    """Return a context in which FlashAttention adds up dq in one order.

    It heeds only this setting of all of PyTorch, whose filling of fresh memory is left out.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def forward(qkv, table, heads: int, dilation: int, xpos: bool, interleaved: bool, scale: float):
    """out (B, M, H E), lse (B dilation, H, n), and a list with the rotated q, k and v of all
    classes as one tensor (3, B dilation, n, H, E).
    """
    B, M, width = qkv.shape
    n, E = cdiv(M, dilation), width // (3 * heads)
    classes = qkv.new_empty(3, B * dilation, n, heads, E)
    rotate_classes(qkv, classes, table, dilation, xpos, interleaved, back=False)
    out, lse = cudnn_attention(*classes.transpose(2, 3), scale)
    grouped = out.transpose(1, 2).contiguous()  # no copy: cuDNN keeps the layout of q
    if dilation == 1:
        # a tensor of its own: autograd lets nobody write to a view that an op returns
        storage = grouped.untyped_storage(), grouped.storage_offset()
        out = qkv.new_empty(0).set_(*storage, (B, M, heads * E), (M * heads * E, heads * E, 1))
    else:
        out = qkv.new_empty(B, M, heads * E)
        regroup(out, grouped, dilation, back=True)
    return out, lse, [classes]


def backward(
    classes, table, out, lse, dout, dilation: int, xpos: bool, interleaved: bool, scale: float
):
    """dqkv (B, M, 3 H E), given what forward returned and the gradient of out."""
    B, M, K = out.shape
    heads = classes.shape[3]
    dout, out = (by_class(t, dilation, heads) for t in (dout, out))
    with deterministic():
        gradients = flash_attention_backward(dout, *classes, out, lse, scale)
    dqkv = classes.new_empty(B, M, 3 * K)
    rotate_classes(dqkv, gradients, table, dilation, xpos, interleaved, back=True)
    return dqkv
