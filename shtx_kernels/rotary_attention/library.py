"""Full attention by the cores in PyTorch, between two passes over memory: one rotates from the
packed layout into a sequence for each residue class, one rotates the gradients back. Of several
classes, outputs and their gradients change the layout, too: the cores take no others.

Forward is cuDNN's, which is the fastest. Backward is FlashAttention 2's, which can be told to give
the same bits every time: cuDNN's, a third faster, gave others within 30 runs.
"""

from contextlib import contextmanager
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import KINDS, Kernel, cdiv, next_power_of_2
from .forward import (
    STEP,
    angles,
    load_halves,
    load_rows,
    program,
    rotate,
    store_halves,
    store_rows,
)

BLOCK = 64  # rows of a tile
FROM = 512  # tokens of a class: below, the passes cost more than the cores save
# most tokens with xpos, whose factors grow with half of them (2.86e-1 ** (-n / 1024) at most)
MOST = {torch.bfloat16: 32768, torch.float16: 4096}


def takes(qkv: Tensor, E: int, window: int, n: int, xpos: bool) -> bool:
    """By type and shape alone, so that a CUDA graph and a fake tensor decide alike."""
    return (
        (qkv.is_cuda and torch.version.hip is None and qkv.dtype in MOST)
        and (window < 0 and E % 8 == 0 and n >= FROM)
        and not (xpos and n > MOST[qkv.dtype])
    )


@triton.jit
def move(src_ptr, src_stride, dst_ptr, dst_stride, i0, local, n, n_dst, offs, WIDTH: tl.constexpr):
    rows = load_rows(src_ptr, src_stride, i0, local, n, offs, WIDTH, False)
    store_rows(dst_ptr, dst_stride, i0, local, n_dst, offs, WIDTH, rows)


@triton.jit
def move_rotated(
    src_ptr, src_stride, dst_ptr, dst_stride, i0, local, n, n_dst, offs_c, cos, sin,
    E: tl.constexpr, SRC_NEAR: tl.constexpr, DST_NEAR: tl.constexpr,
):  # fmt: skip
    a, b = load_halves(src_ptr, src_stride, i0, local, n, offs_c, E, SRC_NEAR, False)
    a, b = rotate(a.to(cos.dtype), b.to(cos.dtype), cos, sin)
    store_halves(dst_ptr, dst_stride, i0, local, n_dst, a, b, offs_c, E, DST_NEAR)


@triton.jit(do_not_specialize=["M", "n_max", "tiles"])
def _rotary_attention_rotate_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, table_ptr, stride_b, stride_m, M, n_max, tiles,
    DILATION: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, XPOS: tl.constexpr, NEAR: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    pid_b, r, h, tile, n = program(tl.program_id(0).to(tl.int64), M, H, DILATION, tiles)
    i0 = (tile * BLOCK).to(tl.int32)
    local, offs_c, offs_e = tl.arange(0, BLOCK), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)
    K: tl.constexpr = H * E  # columns from q to k, and from k to v; a row of a class
    stride = DILATION * stride_m
    qkv_ptr += pid_b * stride_b + r * stride_m + h * E
    row = (pid_b * DILATION + r) * n_max * K + h * E
    q_ptr, k_ptr, v_ptr = q_ptr + row, k_ptr + row, v_ptr + row
    # positions count from the middle, where xpos factors are one
    first = i0 - n_max // 2 // STEP * STEP
    cq, sq = angles(table_ptr, local, first, offs_c, 1.0, E // 2, XPOS, True)
    ck, sk = angles(table_ptr, local, first, offs_c, 1.0, E // 2, -XPOS, True)
    if BACK:
        move_rotated(q_ptr, K, qkv_ptr, stride, i0, local, n, n, offs_c, cq, -sq, E, False, NEAR)
        move_rotated(
            k_ptr, K, qkv_ptr + K, stride, i0, local, n, n, offs_c, ck, -sk, E, False, NEAR
        )
        move(v_ptr, K, qkv_ptr + 2 * K, stride, i0, local, n, n, offs_e, E)
    else:  # a class that is shorter than others ends in zeros
        move_rotated(qkv_ptr, stride, q_ptr, K, i0, local, n, n_max, offs_c, cq, sq, E, NEAR, False)
        move_rotated(
            qkv_ptr + K, stride, k_ptr, K, i0, local, n, n_max, offs_c, ck, sk, E, NEAR, False
        )
        move(qkv_ptr + 2 * K, stride, v_ptr, K, i0, local, n, n_max, offs_e, E)


@lru_cache(KINDS)
def _kernel_of_rotation(
    dilation: int, H: int, E: int, xpos: bool, near: bool, back: bool
) -> Kernel:
    return Kernel(
        _rotary_attention_rotate_kernel, DILATION=dilation, H=H, E=E, XPOS=int(xpos), NEAR=near,
        BACK=back,
        BLOCK=BLOCK, BLOCK_C=next_power_of_2(E // 2), BLOCK_E=next_power_of_2(E), num_warps=4,
    )  # fmt: skip


def rotate_classes(qkv, classes, table, dilation: int, xpos: bool, interleaved: bool, back: bool):
    """qkv (B, M, 3 H E) to q, k, v (B dilation, n, H, E) in `classes`, or their gradients back."""
    B, M, _ = qkv.shape
    _, n, H, E = classes[0].shape
    tiles = cdiv(n, BLOCK)
    kernel = _kernel_of_rotation(dilation, H, E, bool(xpos), interleaved, back)
    numbers = *qkv.stride()[:2], M, n, tiles
    kernel((B * H * dilation * tiles,), (qkv, *classes, table), *numbers)


@triton.jit(do_not_specialize=["M", "n_max", "tiles"])
def _rotary_attention_regroup_kernel(
    tokens_ptr, classes_ptr, stride_b, stride_m, M, n_max, tiles,
    DILATION: tl.constexpr, H: tl.constexpr, E: tl.constexpr, BACK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    pid_b, r, h, tile, n = program(tl.program_id(0).to(tl.int64), M, H, DILATION, tiles)
    i0 = (tile * BLOCK).to(tl.int32)
    local, offs_e = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    K: tl.constexpr = H * E
    stride = DILATION * stride_m
    tokens_ptr += pid_b * stride_b + r * stride_m + h * E
    classes_ptr += (pid_b * DILATION + r) * n_max * K + h * E
    if BACK:
        move(classes_ptr, K, tokens_ptr, stride, i0, local, n, n, offs_e, E)
    else:
        move(tokens_ptr, stride, classes_ptr, K, i0, local, n, n_max, offs_e, E)


@lru_cache(KINDS)
def _kernel_of_regrouping(dilation: int, H: int, E: int, back: bool) -> Kernel:
    return Kernel(
        _rotary_attention_regroup_kernel, DILATION=dilation, H=H, E=E, BACK=back, BLOCK=BLOCK,
        BLOCK_E=next_power_of_2(E), num_warps=4,
    )  # fmt: skip


def regroup(tokens: Tensor, classes: Tensor, dilation: int, back: bool):
    """tokens (B, M, H E) to classes (B dilation, n, H, E), or back."""
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
    """FlashAttention adds up dq in any order unless PyTorch as a whole is told not to."""
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
    """out (B, M, H E), lse, and [the rotated q, k, v (3, B dilation, n, H, E)] for backward."""
    B, M, width = qkv.shape
    n, E = cdiv(M, dilation), width // (3 * heads)
    classes = qkv.new_empty(3, B * dilation, n, heads, E)
    rotate_classes(qkv, classes, table, dilation, xpos, interleaved, back=False)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        *classes.transpose(2, 3), None, True, 0.0, True, False, scale=scale
    )
    grouped = out.transpose(1, 2).contiguous()  # no copy: cuDNN keeps the layout of q
    if dilation == 1:
        # not a view: autograd lets nobody write to one that was made in here
        storage = grouped.untyped_storage(), grouped.storage_offset()
        out = qkv.new_empty(0).set_(*storage, (B, M, heads * E), (M * heads * E, heads * E, 1))
    else:
        out = qkv.new_empty(B, M, heads * E)
        regroup(out, grouped, dilation, back=True)
    return out, lse.squeeze(-1), [classes]


def backward(
    classes, table, out, lse, dout, dilation: int, xpos: bool, interleaved: bool, scale: float
):
    """dqkv (B, M, 3 H E)"""
    _, _, n, heads, _ = classes.shape
    B, M, K = out.shape
    dout, out = (by_class(t, dilation, heads) for t in (dout, out))
    seed = classes.new_empty(2, dtype=torch.uint64)  # of dropout, which there is none of
    with deterministic():
        gradients = torch.ops.aten._flash_attention_backward.default(
            *(dout, *classes, out, lse, None, None, n, n, 0.0, True, seed, seed), scale=scale
        )
    dqkv = classes.new_empty(B, M, 3 * K)
    rotate_classes(dqkv, gradients, table, dilation, xpos, interleaved, back=True)
    return dqkv
