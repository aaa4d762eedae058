"""Sums of columns in a fixed order, as gradients of biases are."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The fastest of 72 choices on an H200:
ALONE = 1100  # rows that one program adds up, at most
PROGRAMS = 64  # of a column of more rows, whose sums are added up in turn
FEW = dict(BLOCK_R=64, BLOCK_C=16, num_warps=8)  # rows
MANY = dict(BLOCK_R=32, BLOCK_C=32, num_warps=4)


@triton.jit(do_not_specialize=["rows", "share"])
def _column_sums_kernel(
    x_ptr, out_ptr, rows, share, D, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out (programs, D) of x (rows, D): of `share` rows a program."""
    pid = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    end = tl.minimum((pid + 1) * share, rows)
    for row in range(pid * share, end, BLOCK_R):
        offs_r = row + tl.arange(0, BLOCK_R)[:, None]
        mask = (offs_r < end) & (offs_d < D)[None, :]
        total += tl.load(x_ptr + offs_r * D + offs_d[None, :], mask=mask, other=0.0).to(ACC)
    tl.store(out_ptr + pid * D + offs_d, tl.sum(total, axis=0), mask=offs_d < D)


def column_sums(x: Tensor) -> Tensor:
    """(D,) of contiguous (rows, D), in fp32 or wider."""
    rows, D = x.shape
    acc = torch.promote_types(x.dtype, torch.float32)
    if not x.numel():
        return x.new_zeros(D, dtype=acc)
    if rows > ALONE:
        block = MANY["BLOCK_R"]
        x = _sums(x, acc, triton.cdiv(rows, PROGRAMS * block) * block, MANY)
    return _sums(x, acc, len(x), FEW)[0]


def _sums(x: Tensor, acc: torch.dtype, share: int, tile: dict) -> Tensor:
    """Of `share` rows each."""
    rows, D = x.shape
    out = x.new_empty(triton.cdiv(rows, share), D, dtype=acc)
    with torch.cuda.device_of(x):
        _column_sums_kernel[(len(out), triton.cdiv(D, tile["BLOCK_C"]))](
            x, out, rows, share, D, ACC=tl.float64 if acc == torch.float64 else tl.float32, **tile
        )
    return out
