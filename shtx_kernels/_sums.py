"""Sums of columns in a fixed order, such as gradients of biases."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Kernel, cdiv
from .products import sum_dtype

# the fastest of 72 choices on an H200
ALONE = 1100  # the most rows that one program adds up by itself
PROGRAMS = 64  # programs among which more rows are shared, and whose sums are then added up
FEW = dict(BLOCK_R=64, BLOCK_C=16, num_warps=8)  # for up to ALONE rows
MANY = dict(BLOCK_R=32, BLOCK_C=32, num_warps=4)  # for more


@triton.jit(do_not_specialize=["rows", "share"])
def _column_sums_kernel(
    x_ptr, out_ptr, rows, share, D, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out (programs, D): each program sums `share` rows of x (rows, D)."""
    pid = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    end = tl.minimum((pid + 1) * share, rows)
    for row in range(pid * share, end, BLOCK_R):
        offs_r = row + tl.arange(0, BLOCK_R)[:, None]
        mask = (offs_r < end) & (offs_d < D)[None, :]
        total += tl.load(x_ptr + offs_r * D + offs_d[None, :], mask=mask, other=0.0).to(ACC)
    tl.store(out_ptr + pid * D + offs_d, tl.sum(total, axis=0), mask=offs_d < D)


@lru_cache
def _kernel_of(few: bool, dtype: torch.dtype) -> Kernel:
    return Kernel(_column_sums_kernel, dtype, **(FEW if few else MANY))


def column_sums(x: Tensor) -> Tensor:
    """The sums (D,) of the columns of x (rows, D), which is contiguous, in fp32 or wider."""
    rows, D = x.shape
    acc = sum_dtype(x.dtype)
    if not x.numel():
        return x.new_zeros(D, dtype=acc)
    if rows > ALONE:
        block = MANY["BLOCK_R"]
        share = cdiv(rows, PROGRAMS * block) * block
        programs = cdiv(rows, share)
        partial = x.new_empty(programs, D, dtype=acc)
        grid = programs, cdiv(D, MANY["BLOCK_C"])
        _kernel_of(False, acc)(grid, (x, partial), rows, share, D)
        x, rows = partial, programs
    out = x.new_empty(D, dtype=acc)
    _kernel_of(True, acc)((1, cdiv(D, FEW["BLOCK_C"])), (x, out), rows, rows, D)
    return out
