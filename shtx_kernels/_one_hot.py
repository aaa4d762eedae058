"""The one-hot matrix of ids: its product with rows adds them up by id, always in the same order."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Kernel, cdiv
from .products import add_product, sum_dtype

# the largest vocabulary that is summed by a product; the matrix has 2 KiB per token in 16 bits then
ONE_HOT = 1024
CONFIG = dict(BLOCK_V=16, BLOCK_R=512, num_warps=4)


@triton.jit(do_not_specialize=["N", "M", "R", "V", "width"])
def _one_hot_kernel(
    ids_ptr, out_ptr, N, M, R, V, width,
    STRIDE: tl.constexpr, C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out (V, C, width): 1 at (v, k, r) if tap k of level token r reads id v, else 0."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    k = tl.program_id(2).to(tl.int64)
    position = row % M * STRIDE + (k - C + 1)
    known = (row < R) & (position >= 0)
    ids = tl.load(ids_ptr + row // M * N + position, mask=known, other=-1)
    # Ids go through fp32, as the interpreter converts integers to bf16 wrongly.
    out = (ids[None, :] == v[:, None]).to(tl.float32).to(out_ptr.dtype.element_ty)
    mask = (v < V)[:, None] & (row < R)[None, :]
    tl.store(out_ptr + (v * C + k)[:, None] * width + row[None, :], out, mask=mask)


@lru_cache
def _kernel_of(stride: int, taps: int) -> Kernel:
    return Kernel(_one_hot_kernel, STRIDE=stride, C=taps, **CONFIG)


def one_hot(ids: Tensor, V: int, M: int, stride: int, taps: int, dtype: torch.dtype) -> Tensor:
    """The matrix (V C, B M) for M level tokens of each sequence of ids (B, N), with C taps.

    Its rows begin a multiple of 16 numbers apart, which cuBLAS is fastest with.
    """
    B, N = ids.shape
    R, kernel = B * M, _kernel_of(stride, taps)
    width = cdiv(R, 16) * 16
    out = torch.empty(V * taps, width, dtype=dtype, device=ids.device)
    grid = cdiv(R, CONFIG["BLOCK_R"]), cdiv(V, CONFIG["BLOCK_V"]), taps
    kernel(grid, (ids, out), N, M, R, V, width)
    return out[:, :R]


def is_small(embedding: Tensor, ids: Tensor) -> bool:
    """Return whether a layer of embedded ids is less work on the embedding's rows than on ids."""
    return len(embedding) <= min(ONE_HOT, ids.numel())


def sum_by_id(x: Tensor, ids: Tensor, V: int) -> Tensor:
    """The sums (V, D) of x (B, N, D) over equal ids (B, N), in fp32 or wider."""
    acc = sum_dtype(x.dtype)
    if V > ONE_HOT:
        return torch.ops.aten.embedding_dense_backward(x.to(acc), ids, V, -1, False)
    total = x.new_empty(V, x.shape[-1], dtype=acc)
    if not x.numel():
        return total.zero_()
    hot = one_hot(ids, V, ids.shape[1], 1, 1, x.dtype)
    add_product(total, hot, x.flatten(0, 1), start=True)
    return total
